"""The rows of data sets: local files and folders, Hub data sets; filtered, shuffled, balanced."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import datasets

from mergekit_act.abilities.schema import Ability

__all__ = ["fill_template", "load_rows", "select_rows"]


def load_rows(name: str, ability: Ability) -> datasets.Dataset:
    """All rows of an ability's data set; texts as they are written, also where they look like numbers or dates.

    Args:
        name: the ability's name, for messages.
        ability: its settings.

    Raises:
        FileNotFoundError: a local file or folder does not exist.
        ValueError: ``datasets`` can't load it.
    """
    source = ability.dataset
    path = Path(source)
    suffix = next((s for s in reversed(path.suffixes) if s in _READERS), None)
    if not path.exists() and (suffix or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f'ability "{name}": data set {source} does not exist (relative to {os.getcwd()})')
    if path.is_file() and suffix is None:
        raise ValueError(f'ability "{name}": {source} is no data file; expected {", ".join(_READERS)}')
    try:
        if not path.is_file():
            return datasets.load_dataset(source, ability.name, revision=ability.revision, split=ability.split)
        rows = _READERS[suffix or ""](path)
        parts = datasets.ReadInstruction.from_spec(ability.split).to_absolute({"train": len(rows)})
        return rows.select([place for part in parts for place in range(len(rows))[part.from_ : part.to]])
    except Exception as error:  # datasets raises errors of many libraries
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ValueError(f'ability "{name}": cannot load split "{ability.split}" of {source}: {reason}') from error


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
        allowed = [str(value) for value in (wanted if isinstance(wanted, list) else [wanted])]
        values = [str(value) for value in rows[column][:]]
        indices = [index for index in indices if values[index] in allowed]
        missing = [value for value in allowed if value not in values]
        if missing:
            raise ValueError(
                f'ability "{name}": no row of {ability.dataset} has {", ".join(map(repr, missing))} in column '
                f'"{column}"; there are {", ".join(map(repr, sorted(set(values))[:10]))}'
            )
    random.Random(ability.seed).shuffle(indices)
    if ability.balance is None:
        taken = indices[offset : offset + samples]
    else:
        taken = _balanced(name, ability, [str(value) for value in rows[ability.balance][:]], indices, offset, samples)
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
        ValueError: a column is missing, a value is no text or number, or the format string is malformed.
    """
    if template in rows.column_names:
        template = f"{{{template}}}"
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f'ability "{name}": "{template}" is not a valid format string ({error})') from error
    if not fields:  # no placeholder: it was meant as a column's name
        require_column(name, ability, rows, template)
    for field in fields:
        require_column(name, ability, rows, field)
    texts = []
    for place, row in enumerate(rows.select_columns(list(dict.fromkeys(fields)))):
        for column, value in row.items():
            if not isinstance(value, str | int | float):
                what = "is empty" if value is None else f"is a {type(value).__name__}"
                raise ValueError(f'ability "{name}": column "{column}" of sample {place} {what}; expected a text')
        try:
            texts.append(template.format_map(row))
        except ValueError as error:
            raise ValueError(
                f'ability "{name}": "{template}" cannot be filled from sample {place} ({error})'
            ) from error
    return texts


def _balanced(
    name: str, ability: Ability, values: Sequence[str], indices: Sequence[int], offset: int, samples: int
) -> list[int]:
    kinds = sorted({values[index] for index in indices})
    if samples % len(kinds) or offset % len(kinds):
        raise ValueError(
            f'ability "{name}": samples {samples} and offset {offset} cannot be divided equally among the '
            f'{len(kinds)} values of "{ability.balance}"; use multiples of {len(kinds)}'
        )
    skip, take = offset // len(kinds), samples // len(kinds)
    seen: Counter[str] = Counter()
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


def _read_json(path: Path) -> datasets.Dataset:
    """A list of objects, or one object per line. The loader of ``datasets`` would make dates of texts that look so."""
    with _open_text(path) as file:
        text = file.read()
    is_list = text.lstrip().startswith("[")
    content = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    if not content or not all(isinstance(row, dict) for row in content):
        raise ValueError("expected a list of objects, or one object per line")
    columns = dict.fromkeys(column for row in content for column in row)
    return datasets.Dataset.from_dict({column: [row.get(column) for row in content] for column in columns})


def _read_csv(path: Path) -> datasets.Dataset:
    """All columns as texts: a guess would make 1.5 of 1.50, and nothing of NA."""
    with _open_text(path) as file:
        texts = datasets.Features(dict.fromkeys(next(csv.reader(file), []), datasets.Value("string")))
    return datasets.load_dataset("csv", data_files=str(path), keep_default_na=False, features=texts, split="train")


def _read_parquet(path: Path) -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=str(path), split="train")


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


_READERS = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
