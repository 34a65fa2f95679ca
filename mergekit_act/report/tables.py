"""Tables: for people on a page, as csv for programs, as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mergekit_act.wording import escape

__all__ = ["Cell", "Row", "Table", "table"]


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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right.

    >>> print(table(["a", "b"], [["x", "10"], ["yyy", "2"]]))
    a     b
    x    10
    yyy   2
    """
    header, rows = [escape(cell) for cell in header], [[escape(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
