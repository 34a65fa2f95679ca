"""Tables: for people on a page, as csv for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Cell", "Row", "Table"]


@dataclass(frozen=True)
class Cell:
    """A cell with a second line."""

    text: str
    more: str


#: Plain text stands for itself, None for nothing.
Row: TypeAlias = "list[Cell | str | None]"


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        name: of its csv file.
        caption: what it shows.
        header: of all columns; the first column names the rows.
        rows: what it shows; a table without is only a csv file.
        csv_header: of the csv file, which has plain numbers.
        csv_rows: likewise.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Row]
    csv_header: Sequence[str]
    csv_rows: Sequence[Sequence[object]]
