"""Loggers that are silent for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["muted"]


@contextmanager
def muted(name: str) -> Iterator[None]:
    """Within, a logger tells errors and no warnings, because what it warns of is told otherwise."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
