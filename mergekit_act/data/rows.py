"""The rows of data sets: local files and folders, Hub data sets; filtered, shuffled, balanced."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from mergekit_act.data.filling import column_values, fill_template
from mergekit_act.data.schema import Ability
from mergekit_act.data.stored import load_folder, load_hub, read_parquet, take_split
from mergekit_act.data.table import Rows, value_text
from mergekit_act.data.text_files import TEXT_READERS
from mergekit_act.wording import enumerate_some, one_line

__all__ = ["fill_template", "load_rows", "select_rows"]

LOG = logging.getLogger(__name__)

# In the order in which messages name them.
_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".tsv")


def load_rows(name: str, ability: Ability) -> Rows:
    """All rows of an ability's data set, values as they are written.

    Args:
        name: the ability's name, for messages.
        ability: its settings.

    Raises:
        FileNotFoundError: a local file or folder does not exist.
        ValueError: it can't be read; the line or row is named where there is one.
    """
    source = ability.dataset
    path = Path(source)
    packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    known = suffix in TEXT_READERS or (suffix == ".parquet" and not packed)
    if not _exists(path) and (known or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f'ability "{name}": data set {source} does not exist (relative to {os.getcwd()})')
    if _exists(path) and not path.is_dir() and not (path.is_file() and known):
        expected = f"expected {', '.join(_SUFFIXES)}, or such a text file with .gz behind its name"
        raise ValueError(f'ability "{name}": {source} is no data file; {expected}')
    try:
        if not _exists(path):
            return load_hub(source, ability)
        if path.is_dir():
            return load_folder(path, ability)
        rows = TEXT_READERS[suffix](path) if suffix in TEXT_READERS else read_parquet(path)
        return take_split({"train": rows}, ability.split)
    except MemoryError:
        raise
    except Exception as error:  # datasets raises errors of many libraries
        cause = error.__cause__ if error.__cause__ and not isinstance(error, ValueError) else error
        reason = one_line(cause)
        reason = reason if len(reason) <= 600 else f"{reason[:600]}…"
        raise ValueError(f'ability "{name}": cannot load split "{ability.split}" of {source}: {reason}') from error


def select_rows(name: str, ability: Ability, rows: Rows, *, offset: int, samples: int) -> tuple[Rows, int]:
    """Where, shuffle by seed, skip ``offset``, take ``samples``.

    Returns:
        The rows, and how many fewer they are than asked for.

    Raises:
        ValueError: a column is missing, no row is left, or the values of ``balance`` can't be had equally.
    """
    columns = [*ability.where, *([ability.balance] if ability.balance else [])]
    texts = {column: _texts(name, ability, rows, column) for column in columns}
    indices = list(range(len(rows)))
    for column, wanted in ability.where.items():
        allowed = _allowed(name, ability, texts[column], column, wanted if isinstance(wanted, list) else [wanted])
        indices = [index for index in indices if texts[column][index] in allowed]
    random.Random(ability.seed).shuffle(indices)
    if ability.balance is None:
        taken = indices[offset : offset + samples]
    else:
        values = [str(text) for text in texts[ability.balance]]
        offset, samples = _multiples(name, ability, len({values[index] for index in indices}), offset, samples)
        taken = _balanced(name, ability, values, indices, offset, samples)
    if not taken:
        raise ValueError(
            f'ability "{name}" has no samples: {ability.dataset} has {len(indices)} rows that match, offset is {offset}'
        )
    return rows.select(taken), samples - len(taken)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have, also not on the Hub; datasets says so
        return False


def _texts(name: str, ability: Ability, rows: Rows, column: str) -> list[str | None]:
    """The values of a column by which rows are chosen; None for empty ones."""
    found = []
    for place, value in enumerate(column_values(name, ability, rows, column)):
        if isinstance(value, dict | list):
            raise ValueError(
                f'ability "{name}": column "{column}" of {rows.origin(place)} is a {type(value).__name__}; expected '
                "texts or numbers to choose rows by"
            )
        found.append(None if value is None else value_text(value) or str(value))
    return found


def _allowed(
    name: str, ability: Ability, texts: Sequence[str | None], column: str, wanted: Sequence[Any]
) -> set[str | None]:
    """Those of a column's values that are wanted."""
    values = dict.fromkeys(texts)
    allowed: set[str | None] = set()
    missing = []
    for one in wanted:
        same = {value for value in values if _is_meant(one, value)}
        allowed |= same
        if not same:
            missing.append("null" if one is None else repr(value_text(one) or str(one)))
    if missing:
        there = sorted("null" if value is None else repr(value) for value in values)
        raise ValueError(
            f'ability "{name}": no row of {ability.dataset} has {enumerate_some(missing)} in column "{column}"; '
            f"there are {enumerate_some(there)}"
        )
    return allowed


def _is_meant(wanted: Any, value: str | None) -> bool:
    """Whether a value is what the abilities file says: YAML makes numbers and truths of what data may hold as texts."""
    if wanted is None or value is None:
        return wanted is value
    if isinstance(wanted, bool):
        return value.casefold() == str(wanted).casefold()
    if isinstance(wanted, int | float):
        try:
            return Decimal(value) == Decimal(str(wanted))
        except InvalidOperation:
            return False
    return str(wanted) == value


def _multiples(name: str, ability: Ability, kinds: int, offset: int, samples: int) -> tuple[int, int]:
    """Numbers that nobody wrote down become multiples of the number of values: ``samples`` fewer, ``offset`` more."""
    written = ability.model_fields_set
    if kinds and "offset" not in written and offset == ability.offset:
        offset += -offset % kinds
    if kinds and "samples" not in written and samples == ability.samples and samples % kinds and samples > kinds:
        LOG.warning(
            'ability "%s": %d samples in place of %d, equal numbers of the %d values of "%s"',
            name, samples - samples % kinds, samples, kinds, ability.balance,
        )  # fmt: skip
        samples -= samples % kinds
    return offset, samples


def _balanced(
    name: str, ability: Ability, values: Sequence[str], indices: Sequence[int], offset: int, samples: int
) -> list[int]:
    kinds = sorted({values[index] for index in indices})
    if kinds and (samples % len(kinds) or offset % len(kinds)):
        raise ValueError(
            f'ability "{name}": samples {samples} and offset {offset} cannot be divided equally among the '
            f'{len(kinds)} values of "{ability.balance}"; use multiples of {len(kinds)}'
        )
    skip, take = (offset // len(kinds), samples // len(kinds)) if kinds else (0, 0)
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
            + enumerate_some([f"{kind!r} has {max(0, count)}" for kind, count in short.items()])
        )
    return taken
