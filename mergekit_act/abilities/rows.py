"""The rows of data sets: local files and folders, Hub data sets; filtered, shuffled, balanced."""

from __future__ import annotations

import os
import random
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from mergekit_act.abilities.schema import Ability

__all__ = ["fill_template", "load_rows", "select_rows"]

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(name: str, ability: Ability, split: str) -> datasets.Dataset:
    """All rows of an ability's data set.

    Args:
        name: the ability's name, for messages.
        ability: its settings.
        split: which split.

    Raises:
        FileNotFoundError: a local file or folder does not exist.
        ValueError: ``datasets`` can't load it.
    """
    source = ability.dataset
    path = Path(source)
    suffix = next((s for s in reversed(path.suffixes) if s in _BUILDERS), None)
    if not path.exists() and (suffix or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f'ability "{name}": data set {source} does not exist (relative to {os.getcwd()})')
    if path.is_file() and suffix is None:
        raise ValueError(f'ability "{name}": {source} is no data file; expected {", ".join(_BUILDERS)}')
    try:
        if path.is_file():
            return datasets.load_dataset(_BUILDERS[suffix or ""], data_files=str(path), split=split)
        return datasets.load_dataset(source, ability.name, revision=ability.revision, split=split)
    except Exception as error:  # datasets raises errors of many libraries
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f'ability "{name}": cannot load split "{split}" of {source}: {reason}') from error


def select_rows(
    name: str, ability: Ability, rows: datasets.Dataset, *, offset: int, samples: int
) -> tuple[datasets.Dataset, int]:
    """Where, shuffle by seed, skip ``offset``, take ``samples``.

    Returns:
        The rows, and how many fewer they are than asked for.

    Raises:
        ValueError: a column is missing, no row is left, or the values of ``balance`` can't be had equally.
    """
    for column in (*ability.where, *([ability.balance] if ability.balance else [])):
        require_column(name, ability, rows, column)
    indices = list(range(len(rows)))
    for column, wanted in ability.where.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        values = rows[column][:]
        indices = [index for index in indices if values[index] in allowed]
        missing = [value for value in allowed if value not in values]
        if missing:
            raise ValueError(
                f'ability "{name}": no row of {ability.dataset} has {", ".join(map(repr, missing))} in column '
                f'"{column}"; there are {", ".join(map(repr, sorted(set(values), key=str)[:10]))}'
            )
    random.Random(ability.seed).shuffle(indices)
    if ability.balance is None:
        taken = indices[offset : offset + samples]
    else:
        taken = _balanced(name, ability, rows[ability.balance][:], indices, offset, samples)
    if not taken:
        raise ValueError(
            f'ability "{name}" has no samples: {ability.dataset} has {len(indices)} rows that match, offset is {offset}'
        )
    return rows.select(taken), samples - len(taken)


def require_column(name: str, ability: Ability, rows: datasets.Dataset, column: str) -> None:
    """Raise a ValueError that lists the columns if this one is missing."""
    if column not in rows.column_names:
        raise ValueError(
            f'ability "{name}": {ability.dataset} has no column "{column}"; its columns are '
            f"{', '.join(rows.column_names)}"
        )


def fill_template(name: str, ability: Ability, rows: datasets.Dataset, template: str) -> list[str]:
    """One text per row: a column's value, or a format string over columns.

    Raises:
        ValueError: a column is missing, or the format string is malformed.
    """
    if template in rows.column_names:
        return [str(value) for value in rows[template][:]]
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f'ability "{name}": "{template}" is not a valid format string ({error})') from error
    if not fields:  # no placeholder: it was meant as a column's name
        require_column(name, ability, rows, template)
    for field in fields:
        require_column(name, ability, rows, field.split(".")[0].split("[")[0])
    return [template.format_map(row) for row in rows]


def _balanced(
    name: str, ability: Ability, values: Sequence[Any], indices: Sequence[int], offset: int, samples: int
) -> list[int]:
    kinds = sorted({values[index] for index in indices}, key=str)
    if samples % len(kinds) or offset % len(kinds):
        raise ValueError(
            f'ability "{name}": samples {samples} and offset {offset} cannot be divided equally among the '
            f'{len(kinds)} values of "{ability.balance}"; use multiples of {len(kinds)}'
        )
    skip, take = offset // len(kinds), samples // len(kinds)
    seen: Counter[Any] = Counter()
    taken = []
    for index in indices:
        place = seen[values[index]]
        seen[values[index]] += 1
        if skip <= place < skip + take:
            taken.append(index)
    short = {kind: seen[kind] - skip for kind in kinds if seen[kind] < skip + take}
    if short:
        raise ValueError(
            f'ability "{name}": column "{ability.balance}" needs {take} rows of each value after skipping {skip}; '
            + ", ".join(f"{kind!r} has {max(0, count)}" for kind, count in short.items())
        )
    return taken
