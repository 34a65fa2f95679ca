"""How text from files and people is shown: never a control character, never more than a screen."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

__all__ = [
    "LONGEST",
    "as_csv",
    "enumerate_some",
    "escape",
    "one_line",
    "percent",
    "shorten",
    "show_bytes",
    "show_seconds",
    "shown_density",
    "table",
]

LONGEST = 2000  # characters of a message

# C0 and C1, DEL, line and paragraph separators, marks that turn the direction of text, and halves of characters.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def escape(text: object, *, keep: str = "") -> str:
    r"""Text on one line, whose control characters are written as Python writes them.

    Args:
        text: from a file or a person.
        keep: control characters that stay, such as the end of a line.

    >>> print(escape("a\x1b[2J\nb"))
    a\x1b[2J\nb
    """
    return _CONTROL.sub(lambda match: match.group() if match.group() in keep else _written(match.group()), str(text))


def _written(character: str) -> str:
    """As Python writes it; what JSON leaves as it is, so that JSON reads it."""
    code = ord(character)
    return character.encode("unicode_escape").decode("ascii") if code < 0x20 else f"\\u{code:04x}"


def shorten(text: object, length: int = LONGEST) -> str:
    """Text of at most ``length`` characters: of longer ones the beginning and the end, where the remedy stands."""
    whole = str(text)
    if len(whole) <= length:
        return whole
    gap = f" … {len(whole) - length:,} characters more … "
    end = length // 4
    return whole[: length - end - len(gap)] + gap + whole[len(whole) - end :]


def one_line(error: object, longest: int | None = None) -> str:
    r"""What an error says, on one line of at most so many characters; its kind if it says nothing.

    >>> one_line(ValueError("two\n  lines")), one_line(ValueError()), one_line("too long", 5)
    ('two lines', 'ValueError', 'too …')
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if longest is None or len(text) <= longest else f"{text[: longest - 2].rstrip()} …"


def enumerate_some(items: Iterable[object], separator: str = ", ", *, most: int = 10) -> str:
    """The first items of a list, whole while they have at most about 1,500 characters, and how many more there are.

    >>> enumerate_some("abcd", most=2)
    'a, b, and 2 more'
    """
    found = list(items)
    shown: list[str] = []
    for item in found[:most]:
        text = shorten(item, 1000)
        if shown and sum(map(len, shown)) + len(text) > 1500:
            break
        shown.append(text)
    more = len(found) - len(shown)
    return separator.join([*shown, *([f"and {more} more"] if more else [])])


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    r"""Rows as csv; None is an empty cell, and names stay on one line.

    >>> as_csv([["a", "b"], ["x\ny", None]])
    'a,b\nx\\ny,\n'
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([escape(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue()


def show_bytes(size: float) -> str:
    """A size for people.

    >>> show_bytes(1_530_000_000), show_bytes(999_600_000), show_bytes(12)
    ('1.53 GB', '1 GB', '12 bytes')
    """
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((unit for unit in units if size >= 0.9995 * unit[0]), (1, "bytes"))
    return f"{size / unit:.3g} {name}"


def show_seconds(seconds: float) -> str:
    """A time for people.

    >>> show_seconds(0.4), show_seconds(95), show_seconds(7300)
    ('1 s', '2 min', '2.0 h')
    """
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(part: float, whole: float) -> str:
    """A share, with two digits behind the point; one that is not 0 does not look like it.

    >>> percent(1, 3), percent(1, 100_000)
    ('33.33 %', '<0.01 %')
    """
    if not whole:
        return "none"
    return "<0.01 %" if 0 < part / whole < 0.00005 else f"{100 * part / whole:.2f} %"


def shown_density(density: float) -> str:
    """A density in percent.

    >>> shown_density(0.005)
    '0.5 %'
    """
    return f"{100 * density:g} %"


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
