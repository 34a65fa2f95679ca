"""YAML as people write it by hand: read whole and plain, or refused with the line where it goes wrong.

Plain are mappings with texts for keys, lists, texts, numbers, booleans and nulls. Dates stay the texts that they are.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mergekit_act.wording import escape, shorten

__all__ = ["SeveralDocumentsError", "parse_yaml", "read_yaml"]

_MOST_BYTES = 1_000_000
_MOST_NODES = 100_000  # with aliases written out
_DEEPEST = 50
_BRACES = re.compile(r"\{\{|\}[ \t]*[^\s,}\]#]")  # what people write who mean a text


class SeveralDocumentsError(ValueError):
    """A file with several YAML documents where one is expected."""


def read_yaml(path: str | Path, kind: str, keys: str = "") -> dict[str, Any]:
    """Read a file that is one mapping.

    Args:
        path: of the file.
        kind: what it should be, such as "merge config".
        keys: that it should have, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, too large, not UTF-8, or not plain YAML; the message says in which line.
        SeveralDocumentsError: it holds several documents.
    """
    path = Path(path)
    shown = escape(path)
    if not path.exists():
        article = "an" if kind[0] in "aeiou" else "a"
        raise FileNotFoundError(f"{shown} does not exist; expected {article} {kind} (YAML)")
    refused = f"{shown} is no {kind}"
    if not path.is_file():  # to read from a pipe or a device may never end
        raise ValueError(f"{refused}: it is {'a folder' if path.is_dir() else 'not a regular file'}")
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{refused}: it is larger than {_MOST_BYTES:,} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{refused}: it is not UTF-8, byte 0x{content[error.start]:02x} in line {line}; save it as UTF-8"
        ) from error
    found = parse_yaml(text, f"{refused}: it")
    if not isinstance(found, dict):
        what = "it is empty" if found is None else f"it is a {type(found).__name__}"
        raise ValueError(f"{refused}: {what}; expected {keys or 'a mapping of keys to values'}")
    return found


def parse_yaml(text: str, where: str) -> Any:
    """The content of one YAML document.

    Args:
        text: the document.
        where: names it in messages.

    Raises:
        ValueError: it is not plain YAML.
        SeveralDocumentsError: there are several.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{error.character:04X} is not allowed (line {line})"
        raise ValueError(f"{where} is not valid YAML: {problem}") from error
    except yaml.MarkedYAMLError as error:
        if error.context == "expected a single document in the stream":
            raise SeveralDocumentsError(f"{where} holds several documents{_line(error)}; expected one") from error
        told = shorten(" ".join(filter(None, (error.context, error.problem))), 500)
        hint = "; a text with braces goes in quotes" if _BRACES.search(_text_of(text, error)) else ""
        raise ValueError(f"{where} is not valid YAML: {escape(told)}{_line(error)}{hint}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(f"{where} is not valid YAML: {escape(shorten(error, 500))}") from error


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return "" if mark is None else f" (line {mark.line + 1})"


def _text_of(text: str, error: yaml.MarkedYAMLError) -> str:
    """The lines in which an error begins and ends."""
    lines = text.splitlines()
    marks = [mark.line for mark in (error.context_mark, error.problem_mark) if mark is not None]
    return "".join(line for mark in marks for line in lines[mark : mark + 1])


class _PlainLoader(yaml.SafeLoader):
    """Takes plain YAML, each key of a mapping once; what aliases make of it stays as small as what people write."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, tuple[int, int]] = {}  # a node's id -> number of nodes in it, depth
        self._open = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark
        self._open += 1
        if self._open > _DEEPEST:
            raise _problem(f"it is nested more than {_DEEPEST} deep", line)
        node = super().compose_node(parent, index)
        self._open -= 1
        if node is None:
            return None
        if id(node) not in self._sizes:
            if isinstance(event, yaml.AliasEvent):
                raise _problem("an alias stands inside of what it names", line)
            sizes = [self._sizes[id(child)] for child in self._inner(node)]
            nodes, depth = 1 + sum(size for size, _ in sizes), 1 + max((deep for _, deep in sizes), default=0)
            self._sizes[id(node)] = nodes, depth
            if nodes > _MOST_NODES:
                raise _problem(f"with its aliases it has more than {_MOST_NODES:,} values", line)
            if depth > _DEEPEST:
                raise _problem(f"with its aliases it is nested more than {_DEEPEST} deep", line)
        return node

    @staticmethod
    def _inner(node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.MappingNode):
            return [one for pair in node.value for one in pair]
        return list(node.value) if isinstance(node, yaml.SequenceNode) else []

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise _problem(f'"{shorten(node.value, 100)}" cannot be read as {_tag(node)}', node.start_mark) from error
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _problem(f"{escape(shorten(value, 100))!r} has half a character", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _problem(f"expected a mapping, found {_tag(node)}", node.start_mark)
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # the keys of another mapping
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                if not isinstance(key_node, yaml.ScalarNode):
                    raise _problem("a list or mapping cannot be a key", key_node.start_mark)
                raise _problem(
                    f"the key {shorten(key_node.value, 100)} is no text; write it in quotes", key_node.start_mark
                )
            if key in seen:
                raise _problem(f'key "{shorten(key, 100)}" stands twice in one mapping', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _problem(what: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, what, where)


def _tag(node: yaml.Node) -> str:
    return str(node.tag).replace("tag:yaml.org,2002:", "!!")


def _refuse(_loader: _PlainLoader, node: yaml.Node) -> None:
    raise _problem(f"{_tag(node)} is not taken; expected texts, numbers, lists and mappings", node.start_mark)


def _text(loader: _PlainLoader, node: Any) -> Any:
    return loader.construct_scalar(node)


for _kind in ("timestamp", "value"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _text)
for _kind in ("binary", "set", "omap", "pairs"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _refuse)
_PlainLoader.add_constructor(None, _refuse)
