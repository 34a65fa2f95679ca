"""README.md files with Hub metadata, of which a marked part is ours and the rest somebody else's."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import CardData
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import SingleQuotedScalarString
from ruamel.yaml.util import load_yaml_guess_indent

from mergekit_act.files import write_atomically
from mergekit_act.logs import muted
from mergekit_act.wording import escape, one_line

__all__ = [
    "HUB_ID",
    "PAPER",
    "TITLE",
    "Readme",
    "Source",
    "WrittenCard",
    "add_values",
    "block_of",
    "code",
    "fence",
    "is_hub_dataset",
    "link_dataset",
    "link_file",
    "link_model",
    "on_hub",
    "parse_readme",
    "plain",
    "read_readme",
    "replace_block",
    "table",
    "write_readme",
]


@dataclass(frozen=True)
class WrittenCard:
    """What was written of a card.

    Attributes:
        files: all that it wrote or found written; none if the README.md is somebody else's.
        remarks: what is worth knowing.
    """

    files: tuple[Path, ...]
    remarks: tuple[str, ...] = ()


PAPER = "https://arxiv.org/abs/2601.09398"
TITLE = "Ability Transfer and Recovery via Modularized Parameters Localization"
#: What a mask records of a profile that it was made of.
Source = Mapping[str, Any]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Readme:
    """A README.md.

    Attributes:
        front: its YAML block, as it is written.
        text: what stands behind it.
    """

    front: str
    text: str

    @property
    def metadata(self) -> dict[str, Any]:
        """What the block says."""
        return yaml.safe_load(self.front) or {}

    def changed(self, metadata: Mapping[str, Any], text: str, where: object) -> str:
        """The file with other metadata and text; of the block only what differs is written anew.

        Raises:
            ValueError: the Hub's parser refuses the metadata.
        """
        try:
            front = _edited(self.front, self.metadata, metadata)
            if yaml.safe_load(front) != dict(metadata):
                raise ValueError("it would say something else to others; write it in plain block style")
            content = f"---\n{front}---\n{text}"
            with muted("huggingface_hub.repocard"):
                ModelCard(content)
        except (ValueError, yaml.YAMLError, YAMLError) as error:
            raise ValueError(
                f"{where} has metadata that can't be continued, or that the Hub does not take: {one_line(error)}"
            ) from error
        return content


def read_readme(path: Path) -> Readme | None:
    """A README.md; None if there is none. Lines may end as on Windows.

    Raises:
        ValueError: its metadata can't be read.
    """
    if not path.is_file():
        return None
    try:
        return parse_readme(path.read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error})") from error


def parse_readme(content: str, where: object) -> Readme:
    """The two parts of a README.md.

    Raises:
        ValueError: its metadata can't be read.
    """
    match = re.match(r"\s*---[ \t]*\n(.*?\n)??---[ \t]*(?:\n|$)", content, re.DOTALL)
    front, text = ((match.group(1) or ""), content[match.end() :]) if match else ("", content)
    try:
        metadata = yaml.safe_load(front) or {}
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{where} has metadata that cannot be read: {one_line(error)}") from error
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise ValueError(f"{where} has metadata that cannot be read: expected a mapping with names for keys")
    return Readme(front, text)


def write_readme(path: Path, content: str) -> None:
    """Write a README.md whose text has changed, with the line ends that the file has."""
    old = path.read_bytes() if path.is_file() else b""
    windows = 2 * old.count(b"\r\n") > old.count(b"\n")
    written = content.replace("\n", "\r\n") if windows else content
    if written.encode() != old.removeprefix(codecs.BOM_UTF8):
        write_atomically(path, written.encode(), overwrite=True)


def _edited(front: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """A YAML block with some keys changed; other values, comments and quotes stay, lines may be laid out anew."""
    if not before:
        return front + _dumped(after)
    editor = YAML()
    editor.preserve_quotes, editor.width = True, 1 << 16
    _, sequence, offset = load_yaml_guess_indent(front)
    editor.indent(mapping=2, sequence=sequence or 2, offset=offset or 0)
    content = front.rstrip("\n") + "\n"
    data = editor.load(content)
    for key in before.keys() - after.keys():
        del data[key]
    for key, value in after.items():
        old = before.get(key)
        if isinstance(old, list) and isinstance(value, list) and value[: len(old)] == old:
            data[key].extend(map(_quoted, value[len(old) :]))
        elif key not in before or old != value:
            data[key] = _quoted(value)
    written = io.StringIO()
    editor.dump(data, written)
    return written.getvalue() + front[len(content) :]


def _quoted(value: Any) -> Any:
    """A value whose texts are quoted where YAML 1.1, which the Hub reads, would take them for something else."""
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    if isinstance(value, dict):
        return {key: _quoted(item) for key, item in value.items()}
    return SingleQuotedScalarString(value) if isinstance(value, str) and not _is_plain(value) else value


def _is_plain(text: str) -> bool:
    """Whether a text is itself in YAML without quotes."""
    try:
        return bool(yaml.safe_load(text) == text)
    except (yaml.YAMLError, ValueError):
        return False


def _dumped(values: Mapping[str, Any]) -> str:
    return f"{CardData(**values).to_yaml()}\n"


def replace_block(text: str, name: str, block: str, *, before: str | None = None) -> str:
    """Put a marked block into a text: in place of the one that is there, before a heading, or at the end.

    Args:
        text: Markdown.
        name: of the block.
        block: Markdown.
        before: a line.

    Raises:
        ValueError: the text has the beginning of the block and not its end.
    """
    begin, end = _marks(name)
    block = block.replace("<!-- mergekit-act", "<!- mergekit-act")
    marked = f"{begin}\n{block.strip()}\n{end}"
    if begin in text:
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise ValueError(f'the line "{end}" is missing; put it back where the part of mergekit-act ends')
        return head + marked + tail
    lines = text.splitlines(keepends=True)
    place = next((i for i, line in enumerate(lines) if before is not None and line.rstrip() == before), len(lines))
    head, tail = "".join(lines[:place]), "".join(lines[place:])
    return head.rstrip("\n") + "\n\n" + marked + "\n" + (f"\n{tail}" if tail else "")


def block_of(text: str, name: str) -> str | None:
    """The content of a marked block; None if there is none."""
    begin, end = _marks(name)
    _, found, rest = text.partition(begin)
    return rest.partition(end)[0] if found else None


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- mergekit-act {name}: begin -->", f"<!-- mergekit-act {name}: end -->"


def add_values(metadata: dict[str, Any], key: str, values: Iterable[str]) -> None:
    """Add to a list of the metadata what is not in it yet.

    Raises:
        ValueError: what is there is no list.
    """
    present = metadata.get(key) or []
    present = [present] if isinstance(present, str) else present
    if not isinstance(present, list):
        raise ValueError(f'its metadata has "{key}: {present}"; expected a list')
    added = [*present, *(value for value in dict.fromkeys(values) if value not in present)]
    if added:
        metadata[key] = added


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; the first columns to the left, the others to the right."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text: object) -> str:
    """A name from a file, as text in Markdown: on one line, without markup."""
    return re.sub(r"[|<`\\*\[\]]", lambda match: f"&#{ord(match.group())};", escape(" ".join(str(text).split())))


def code(text: object) -> str:
    """A name from a file, as code in Markdown."""
    shown = escape(" ".join(str(text).split())).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`"


def fence(language: str, content: str) -> str:
    """A block of code, in a fence that nothing in it closes."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return f"{ticks}{language}\n{content.rstrip()}\n{ticks}"


def link_file(name: str) -> str:
    """A link to a file beside the card."""
    return f"[{plain(name)}]({quote(name)})"


def link_model(model: Mapping[str, Any]) -> str:
    """A model as profiles describe it, linked if it is on the Hub; of a local folder the name."""
    base, _, lora = str(model.get("model")).partition("+")
    revision = model.get("revision")
    if revision is None or not HUB_ID.fullmatch(base):
        return code(model.get("model"))
    return f"[{plain(base)}](https://huggingface.co/{base}/tree/{quote(str(revision))})" + (
        f" + {code(lora)}" if lora else ""
    )


def on_hub(model: Mapping[str, Any]) -> list[str]:
    """The Hub ids of a model as profiles describe it: of a LoRA two; none of a local folder."""
    names = str(model.get("model")).split("+") if model.get("revision") else []
    return [name for name in names if HUB_ID.fullmatch(name)]


def link_dataset(data: Mapping[str, Any]) -> str:
    """A data set as profiles describe it, with its filter; linked if it is on the Hub, of a local one the name."""
    if data.get("dataset") is None:
        return ""
    name = str(data["dataset"])
    shown = code(Path(name).name)
    if is_hub_dataset(data):
        shown = f"[{plain(name)}](https://huggingface.co/datasets/{name})"
    chosen = [
        f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in _where(data)
    ]
    return ", ".join([shown, *map(plain, chosen)])


def _where(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    where = data.get("where")
    return list(where.items()) if isinstance(where, dict) else []


def is_hub_dataset(data: Mapping[str, Any]) -> bool:
    """Whether a data set was loaded from the Hub."""
    return bool(data.get("on_hub")) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data.get("dataset"))) is not None
