"""Rows of json, csv and tsv files, every value as it is written there."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_act.data.table import ReadRows, Written
from mergekit_act.wording import enumerate_some

__all__ = ["TEXT_READERS", "read_json_value"]

# How JSON calls what Python reads of it.
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def _read_json(path: Path) -> ReadRows:
    """A list of objects, or one object per line.

    Raises:
        ValueError: it is neither; the line or row is named.
    """
    text = _text(path)
    if text.lstrip().startswith("["):
        rows, origins = _listed_objects(text), "row"
        numbers = list(range(1, len(rows) + 1))
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows, origins = [read_json_value(line, f"line {number}") for number, line in lines], "line"
        numbers = [number for number, _ in lines]
    if not rows:
        raise ValueError("it has no rows; expected a list of objects, or one object per line")
    for number, row in zip(numbers, rows, strict=True):
        if not isinstance(row, dict):
            raise ValueError(
                f"{origins} {number} is {_KINDS.get(type(row), 'a number')}; expected a list of objects, or one object "
                "per line"
            )
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return ReadRows(columns, rows, [f"{origins} {number}" for number in numbers])


def _listed_objects(text: str) -> list[Any]:
    rows = read_json_value(text, None)
    return rows if isinstance(rows, list) else [rows]


def read_json_value(text: str, where: str | None) -> Any:
    """Read a JSON value whose numbers keep their writing.

    Args:
        text: the value.
        where: the line in which it stands; None if its own lines are to be counted.

    Raises:
        ValueError: it is not JSON, has a key twice in one object, half a character, or is nested too deeply.
    """
    try:
        value = json.loads(
            text,
            parse_int=Written.whole,
            parse_float=Written.fractional,
            parse_constant=Written,
            object_pairs_hook=_unique_keys,
        )
    except json.JSONDecodeError as error:
        place = where or f"line {error.lineno}"
        hint = "; expected a list of objects, or one object per line"
        raise ValueError(f"{place}, column {error.colno}, is not JSON ({error.msg}){hint}") from error
    except RecursionError as error:
        raise ValueError(f"{where or 'a row'} is nested too deeply") from error
    except _TwiceError as error:
        raise ValueError(f'{where or "a row"} has the key "{error}" twice in one object') from error
    if re.search(r"\\u[dD][89a-fA-F]", text):  # two of them may be one character, one alone is none
        _check_characters(value, where or "a row")
    return value


class _TwiceError(Exception):
    """A key that stands twice in one object; JSON would keep the last without a word."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(enumerate_some([next(key for key in found if keys.count(key) > 1)]))
    return found


def _check_characters(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start]).strip("'")
        raise ValueError(f"{where} has {half}, half of a character (a surrogate without its other half)") from error


def _read_csv(path: Path) -> ReadRows:
    """A header and rows of as many fields, separated by what separates the header's: comma, semicolon, tab or bar.

    All values are texts. Columns without a name, as pandas writes its index, are left out.

    Raises:
        ValueError: a row has another number of fields, a name stands twice, or quotes are wrong; the line is named.
    """
    text = _text(path)
    with _fields_of_any_size(text):
        marks = [mark for mark in ",;\t|" if len(_header(text, mark)) > 1]
        if len(marks) > 1:  # a name that holds one of them; only one of them fits all rows, or csv means commas
            marks = [mark for mark in marks if _fits(text, mark)] or marks
        return _table(text, marks[0] if marks else ",")


def _read_tsv(path: Path) -> ReadRows:
    """The same, separated by tabs."""
    text = _text(path)
    with _fields_of_any_size(text):
        return _table(text, "\t")


def _records(text: str, mark: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of everything that is no empty line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"line {line} is not valid csv ({error}); a field with quotes is quoted and its quotes are doubled"
            ) from error
        if fields is None:
            return
        if fields:
            yield line, fields


def _header(text: str, mark: str) -> list[str]:
    try:
        return next(_records(text, mark), (1, []))[1]
    except ValueError:
        return []


def _fits(text: str, mark: str) -> bool:
    try:
        return len({len(fields) for _, fields in _records(text, mark)}) == 1
    except ValueError:
        return False


def _table(text: str, mark: str) -> ReadRows:
    records = _records(text, mark)
    _, header = next(records, (0, []))
    twice = [name for name in dict.fromkeys(header) if name and header.count(name) > 1]
    if twice:
        raise ValueError(f"its header names {enumerate_some(twice)} twice; expected columns of different names")
    if not any(header):
        raise ValueError("its first line names no columns")
    rows, origins = [], []
    for line, fields in records:
        if len(fields) != len(header):
            behind = (
                "; a separator at the end of a line makes one more field: take it away, or end the header with one too"
                if len(fields) == len(header) + 1 and not fields[-1]
                else "; a field that holds the separator is put in double quotes"
            )
            counted = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
            raise ValueError(f"line {line} has {counted}, separated by {mark!r}, the header has {len(header)}{behind}")
        rows.append({name: field for name, field in zip(header, fields, strict=True) if name})
        origins.append(f"line {line}")
    if not rows:
        raise ValueError("it has a header and no rows")
    return ReadRows([name for name in header if name], rows, origins)


@contextmanager
def _fields_of_any_size(text: str) -> Iterator[None]:
    """Long documents are fields too; the limit of the csv module is one for the whole process."""
    before = csv.field_size_limit(len(text) + 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _text(path: Path) -> str:
    """The content of a text file.

    Raises:
        ValueError: it is empty, no gzip file though its name ends so, or not UTF-8; the remedy is named.
    """
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"it is no whole gzip file ({error}); expected one, as its name ends with .gz") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"it is UTF-16; make it UTF-8: iconv -f utf-16 -t utf-8 {path.name!r} > utf-8{path.suffix}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); make the file UTF-8, if it is latin-1 by "
            f"iconv -f latin1 -t utf-8 {path.name!r} > utf-8{path.suffix}"
        ) from error
    if not text.strip():
        raise ValueError("it is empty")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line} has a NUL character; expected a text file in UTF-8")
    return text


TEXT_READERS: dict[str, Callable[[Path], ReadRows]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
