"""The criteria by which channels are scored; profiles record their names."""

from __future__ import annotations

__all__ = ["CRITERIA", "WITHOUT_DATA"]

WITHOUT_DATA = ("weight", "random")
CRITERIA = ("activation", "local", "attribution", *WITHOUT_DATA)
