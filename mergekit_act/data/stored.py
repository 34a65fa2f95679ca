"""Rows that ``datasets`` keeps in Arrow tables: Hub data, Parquet, folders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets

from mergekit_act.data.schema import Ability
from mergekit_act.data.table import ReadRows, Rows, Written
from mergekit_act.data.text_files import TEXT_READERS, read_json_value

__all__ = ["StoredRows", "load_folder", "load_hub", "read_parquet", "take_split"]

# Rows that become Python values together.
_CHUNK = 1000


@dataclass(frozen=True)
class StoredRows:
    """Rows of an Arrow table, made into Python values when they are read.

    Labels are their names, decimals keep their digits, columns of JSON are what was written. An Arrow struct gives
    every row the keys of all rows, with null where a row had none: keys that are null inside a struct are left out.

    Attributes:
        table: the data set.
        places: of each row in its split, for messages.
    """

    table: datasets.Dataset
    places: Sequence[int]

    @classmethod
    def of(cls, table: datasets.Dataset) -> StoredRows:
        """All rows of a data set."""
        return cls(table, range(len(table)))

    @property
    def column_names(self) -> list[str]:
        """The columns in their order."""
        return list(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._read(self.table)

    def __getitem__(self, column: str) -> list[Any]:
        return [row[column] for row in self._read(self.table.select_columns([column]))]

    def select(self, indices: Sequence[int]) -> StoredRows:
        """The rows of these indices, in this order."""
        return StoredRows(self.table.select(indices), [self.places[index] for index in indices])

    def origin(self, place: int) -> str:
        """Where a row stands, as in "row 3"; counted from 1."""
        return f"row {1 + self.places[place]}"

    def _read(self, table: datasets.Dataset) -> Iterator[dict[str, Any]]:
        features = table.features
        raw = table.with_format("arrow")  # datasets would decode images and fill structs
        for start in range(0, len(table), _CHUNK):
            for place, row in enumerate(raw[start : start + _CHUNK].to_pylist(), start):
                try:
                    yield {column: _plain(value, features[column]) for column, value in row.items()}
                except ValueError as error:
                    raise ValueError(f"{self.origin(place)}: {error}") from error


def _plain(value: Any, feature: Any) -> Any:
    """An Arrow value as the template gets it."""
    if value is None:
        return None
    if isinstance(feature, datasets.ClassLabel):
        return feature.names[value] if 0 <= value < len(feature.names) else None
    if type(feature).__name__ == "Json" and isinstance(value, str):
        return read_json_value(value, "a value")
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent == 0 else Written.decimal(value)
    if isinstance(value, Mapping):
        features = feature if isinstance(feature, Mapping) else {}
        return {key: _plain(item, features.get(key)) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_plain(item, inner) for item in value]
    return value


def load_hub(source: str, ability: Ability) -> Rows:
    """The split of a Hub data set."""
    return StoredRows.of(datasets.load_dataset(source, ability.name, revision=ability.revision, split=ability.split))


def read_parquet(path: Path) -> Rows:
    """All rows of a Parquet file."""
    return StoredRows.of(datasets.load_dataset("parquet", data_files=str(path), split="train"))


def load_folder(path: Path, ability: Ability) -> Rows:
    """The split of a folder: one written by ``save_to_disk``, or of files; text files are read as they are written."""
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        stored = datasets.load_from_disk(str(path))
        parts = stored if isinstance(stored, dict) else {str(stored.split or "train"): stored}
        return take_split({name: StoredRows.of(table) for name, table in parts.items()}, ability.split)
    builder = datasets.load_dataset_builder(str(path), ability.name)
    files = {str(split): [Path(file) for file in found] for split, found in (builder.config.data_files or {}).items()}
    texts = all(_suffix(file) in TEXT_READERS and file.is_file() for found in files.values() for file in found)
    if not (files and texts) or getattr(builder.config, "field", None):
        return StoredRows.of(datasets.load_dataset(str(path), ability.name, split=ability.split))
    wanted = set(re.findall(r"\w[\w.-]*", ability.split))
    return take_split(
        {split: _read_files(found, path) if split in wanted else None for split, found in files.items()}, ability.split
    )


def take_split(parts: Mapping[str, Rows | None], spec: str) -> Rows:
    """The rows that a split such as ``train[:10%]`` names.

    Args:
        parts: the rows of each split; None for those that ``spec`` does not name.
        spec: as for ``datasets.load_dataset``.

    Raises:
        ValueError: there is no such split, or several are named.
    """
    sizes = {name: 0 if rows is None else len(rows) for name, rows in parts.items()}
    chosen = []
    for part in datasets.ReadInstruction.from_spec(spec).to_absolute(sizes):
        rows = parts[part.splitname]
        if rows is None:
            raise ValueError(f"there is no such split; there are {', '.join(parts)}")
        chosen.append(rows.select(range(len(rows))[part.from_ : part.to]))
    return chosen[0] if len(chosen) == 1 else _joined(chosen)


def _joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several splits, one after the other."""
    read = [part for part in parts if isinstance(part, ReadRows)]
    if len(read) == len(parts):
        columns = dict.fromkeys(column for part in read for column in part.column_names)
        values = [row for part in read for row in part.values]
        return ReadRows(list(columns), values, [origin for part in read for origin in part.origins])
    return StoredRows.of(datasets.concatenate_datasets([part.table for part in parts if isinstance(part, StoredRows)]))


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _read_files(paths: Sequence[Path], folder: Path) -> Rows:
    parts = []
    for path in paths:
        name = path.relative_to(folder.resolve()) if path.is_relative_to(folder.resolve()) else path
        try:
            rows = TEXT_READERS[_suffix(path)](path)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        parts.append(ReadRows(rows.column_names, rows.values, [f"{name}, {origin}" for origin in rows.origins]))
    return _joined(parts)
