"""Rows of data sets: mappings from columns to values that keep their writing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from mergekit_act.wording import enumerate_some

__all__ = ["ReadRows", "Rows", "Written", "render_as_written", "value_text"]


class Rows(Protocol):
    """A table. A row is a plain dict with every column; what it lacks is None."""

    @property
    def column_names(self) -> list[str]:
        """The columns in their order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __getitem__(self, column: str) -> list[Any]:
        """A column's values."""

    def select(self, indices: Sequence[int]) -> Rows:
        """The rows of these indices, in this order."""

    def origin(self, place: int) -> str:
        """Where a row stands in its data set, as in "line 3"."""


@dataclass(frozen=True)
class ReadRows:
    """Rows that were read from text files, in memory.

    Attributes:
        column_names: the columns in their order.
        values: each row's values; a row may lack columns.
        origins: where each row stands, for messages.
    """

    column_names: list[str]
    values: Sequence[Mapping[str, Any]]
    origins: Sequence[str]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.values:
            yield {column: row.get(column) for column in self.column_names}

    def __getitem__(self, column: str) -> list[Any]:
        return [row.get(column) for row in self.values]

    def select(self, indices: Sequence[int]) -> ReadRows:
        """The rows of these indices, in this order."""
        values = [self.values[index] for index in indices]
        return ReadRows(self.column_names, values, [self.origins[index] for index in indices])

    def origin(self, place: int) -> str:
        """Where a row stands, as in "line 3"."""
        return self.origins[place]


class Written(float):
    """A number that Python would write in another way: 1.50, 1e5, -0. As a text it is what was written.

    ``json.dumps`` does not ask subclasses; see ``render_as_written``.
    """

    written: str

    def __new__(cls, written: str) -> Written:
        """The number, with the text it was written as."""
        number = super().__new__(cls, written)
        number.written = written
        return number

    @staticmethod
    def whole(text: str) -> int | Written:
        """A whole number as JSON writes it; Python has no -0, and refuses to read thousands of digits."""
        return int(text) if len(text) < 4000 and text != "-0" else Written(text)

    @staticmethod
    def fractional(text: str) -> float:
        """Any other number, or NaN and Infinity."""
        number = float(text)
        return number if repr(number) == text else Written(text)

    @staticmethod
    def decimal(value: Decimal) -> float:
        """A decimal of a database, with all its digits."""
        return Written(format(value, "f"))

    def __str__(self) -> str:
        return self.written

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return super().__format__(spec) if spec else self.written

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]
        return (self.written,)


def value_text(value: Any) -> str | None:
    """A value as a text: as it is written, truth as in JSON; None if it has no writing of its own."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and (math.isnan(value) or str(value).endswith(("inf", "Infinity"))):
        return None
    return str(value) if isinstance(value, str | int | float) else None


def render_as_written(values: Any, render: Callable[[Any], str]) -> str:
    """Render nested values so that their numbers stand in the text as written, also where JSON is made of them.

    The renderer gets other numbers in their place, which are found in what it wrote. It is asked a second time with
    others again: a renderer that computes with numbers gives itself away.

    Args:
        values: what is rendered; it is not changed.
        render: makes a text of it.

    Raises:
        ValueError: the text depends on such a number otherwise than by writing it.
    """
    texts = []
    for mark in ("7309261", "4618093"):
        found: list[str] = []
        stand_ins = _with_stand_ins(values, mark, found)
        if not found:
            return render(values)
        text = render(stand_ins)
        places = range(len(found))
        texts.append(_restored(text, {f"{mark}.{place:06d}7": found[place] for place in places}))
    if texts[0] != texts[1]:
        raise ValueError(
            f"the template computes with numbers, so {enumerate_some(sorted(set(found)))} can't be kept as written; "
            "write such numbers as Python does (1.5, 100000.0) or as texts"
        )
    return texts[0]


def _restored(text: str, written: Mapping[str, str]) -> str:
    return re.sub(r"\d{7}\.\d{7}", lambda match: written.get(match[0], match[0]), text)


def _with_stand_ins(value: Any, mark: str, found: list[str]) -> Any:
    """The value with a number of its own, exact in 14 digits, for each ``Written``."""
    if isinstance(value, Written):
        found.append(value.written)
        return float(f"{mark}.{len(found) - 1:06d}7")
    if isinstance(value, Mapping):
        return {key: _with_stand_ins(item, mark, found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_stand_ins(item, mark, found) for item in value]
    return value
