"""What a report is made of: sections with figures and tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_act.report.tables import Table

__all__ = ["UNION", "Picture", "Section", "file_name"]

UNION = "union of all"  # no ability is called that: their names have no spaces


@dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Attributes:
        name: of its files.
        caption: what it shows.
        draw: makes the matplotlib figure.
    """

    name: str
    caption: str
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Section:
    """A part of a report; ``folded`` parts of it are shown on demand."""

    title: str
    text: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    warnings: Sequence[str] = ()
    folded: Sequence[Section] = ()
    parts: Sequence[Section] = ()


def file_name(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-")
