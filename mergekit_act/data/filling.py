"""Format strings over columns, filled from rows; nothing but values is looked up, nothing is executed."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from mergekit_act.data.schema import Ability
from mergekit_act.data.table import Rows, value_text
from mergekit_act.wording import enumerate_some

__all__ = ["column_values", "fill_template", "require_column"]

_MISSING = object()


def fill_template(name: str, ability: Ability, rows: Rows, template: str) -> list[str]:
    """One text per row: a column's value, or a format string over columns.

    A name is a column, or leads into nested values: ``answers.text.0`` is the first of the texts in the column
    ``answers``. A column whose own name is so written goes first.

    Args:
        name: the ability's name, for messages.
        ability: its settings, for messages.
        rows: from which it is filled.
        template: a name, or a text with names in braces.

    Raises:
        ValueError: a column is missing, a value is no text or number, or the format string is malformed.
    """
    parts = _parse(name, template, rows)
    fields = dict.fromkeys(field for _, field, _, _ in parts if field is not None)
    columns = {field: column_values(name, ability, rows, field) for field in fields}
    texts = []
    for place in range(len(rows)):
        filled = []
        for literal, field, spec, conversion in parts:
            filled.append(literal)
            if field is None:
                continue
            text = value_text(columns[field][place])
            where = f"sample {place} ({rows.origin(place)})"
            if text is None:
                raise ValueError(
                    f'ability "{name}": column "{_short(field)}" of {where} {_described(columns[field][place], field)}'
                )
            try:
                filled.append(_formatted(columns[field][place], text, spec, conversion))
            except (ValueError, OverflowError, MemoryError) as error:
                raise ValueError(
                    f'ability "{name}": "{_short(template)}" cannot be filled from {where}: {error}'
                ) from error
        texts.append("".join(filled))
    return texts


def column_values(name: str, ability: Ability, rows: Rows, column: str) -> list[Any]:
    """A column's values, or what lies under dotted names inside a column; None where a row has nothing there.

    Raises:
        ValueError: there is no such column, and no row has such names inside one.
    """
    if column in rows.column_names:
        return rows[column]
    keys = column.split(".")
    heads = [".".join(keys[:cut]) for cut in range(len(keys) - 1, 0, -1)]
    head = next((head for head in heads if head in rows.column_names), None)
    if head is not None:
        values = [_inside(value, keys[head.count(".") + 1 :]) for value in rows[head]]
        if any(value is not _MISSING for value in values):
            return [None if value is _MISSING else value for value in values]
    require_column(name, ability, rows, column)
    return []


def require_column(name: str, ability: Ability, rows: Rows, column: str) -> None:
    """Raise a ValueError that lists the columns if this one is missing."""
    if column not in rows.column_names:
        hint = "" if re.fullmatch(r"[\w. -]+", column) else "; in a format string, braces that are text are doubled"
        raise ValueError(
            f'ability "{name}": {_short(ability.dataset)} has no column "{_short(column)}"; its columns are '
            f"{enumerate_some(rows.column_names)}{hint}"
        )


def _parse(name: str, template: str, rows: Rows) -> list[tuple[str, str | None, str, str | None]]:
    """The template as (text, column behind it, format, conversion)."""
    if template in rows.column_names:
        return [("", template, "", None)]
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f'ability "{name}": "{_short(template)}" is not a valid format string ({error})') from error
    if all(field is None for _, field, _, _ in parts):  # no placeholder: it was meant as a column's name
        return [("", template, "", None)]
    found = []
    for literal, field, spec, conversion in parts:
        whole = f"{field}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
        if whole in rows.column_names:  # a column with a colon in its name
            field, spec, conversion = whole, "", None
        if "{" in (spec or "") or re.search(r"\d{5}", spec or ""):
            raise ValueError(
                f'ability "{name}": "{_short(template)}" has the format "{_short(spec or "")}"; expected one without '
                "braces and without numbers of five digits"
            )
        found.append((literal, field, spec or "", conversion))
    return found


def _inside(value: Any, keys: list[str]) -> Any:
    """What lies under these keys; a key may itself have dots, a number counts in a list."""
    if not keys:
        return value
    if isinstance(value, Mapping):
        for cut in range(len(keys), 0, -1):
            key = ".".join(keys[:cut])
            if key in value:
                return _inside(value[key], keys[cut:])
    if isinstance(value, list) and keys[0].isdecimal() and len(keys[0]) < 10 and int(keys[0]) < len(value):
        return _inside(value[int(keys[0])], keys[1:])
    return _MISSING


def _formatted(value: Any, text: str, spec: str, conversion: str | None) -> str:
    if not (spec or conversion):
        return text
    plain = text if isinstance(value, bool) else value
    return format(string.Formatter().convert_field(plain, conversion), spec)


def _described(value: Any, field: str) -> str:
    if value is None:
        return "is empty; expected a text"
    if isinstance(value, float):
        return f"is {value}; expected a text or a number"
    hint = ""
    if isinstance(value, Mapping) and value:
        hint = f', or a name inside it, as in "{_short(f"{field}.{next(iter(value))}")}"'
    elif isinstance(value, list):
        hint = f', or one of its items, as in "{_short(field)}.0"'
    return f"is a {type(value).__name__}; expected a text{hint}"


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
