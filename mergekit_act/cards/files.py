"""The README.md beside profiles and masks, so that their folder can go to the Hub as it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_act.artifacts import ArtifactError, ForeignFileError, load_metadata
from mergekit_act.cards.markdown import (
    PAPER,
    Readme,
    Source,
    WrittenCard,
    add_values,
    block_of,
    fence,
    is_hub_dataset,
    link_dataset,
    link_file,
    link_model,
    on_hub,
    plain,
    read_readme,
    replace_block,
    table,
    write_readme,
)
from mergekit_act.files import file_hash
from mergekit_act.selection import describe_selection

__all__ = ["has_artifacts", "write_folder_card"]

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _File:
    """A profile or mask of the folder."""

    name: str
    sha256: str
    is_mask: bool
    sources: Sequence[Source]
    channels: int | None


def has_artifacts(folder: Path) -> bool:
    """Whether a folder has profiles or masks in it."""
    return any(_read(path) is not None for path in sorted(folder.glob("*.safetensors")))


def write_folder_card(folder: Path) -> WrittenCard:
    """Describe a folder's profiles and masks in its README.md, with metadata for the Hub.

    A README.md that is not of this function stays as it is, and of one that is, what others have written. The profiles
    and masks matter more: what is wrong with the README.md, or with another file in the folder, becomes a warning.

    Args:
        folder: with profiles or masks in it.
    """
    path = folder / "README.md"
    try:
        before = read_readme(path)
        if before is not None and block_of(before.text, "files") is None:
            LOG.info("%s is not of mergekit-act: left as it is", path)
            return WrittenCard(())
        files = [file for found in sorted(folder.glob("*.safetensors")) if (file := _read(found)) is not None]
        sources = [source for file in files for source in file.sources]
        readme = before or Readme("", f"# {_title(sources)}\n")
        text = replace_block(readme.text, "files", "\n\n".join(filter(None, _block(files, sources))))
        write_readme(path, readme.changed(_extended(readme.metadata, sources), text, path))
    except (ValueError, OSError, yaml.YAMLError) as error:
        LOG.warning("%s was left as it is: %s", path, error)
        return WrittenCard(())
    return WrittenCard((path,))


def _read(path: Path) -> _File | None:
    """What a file says of itself; None if it is not ours, or not as it should be."""
    try:
        metadata = load_metadata(path)
    except ForeignFileError:
        return None
    except (ArtifactError, OSError) as error:
        LOG.warning("%s It is not in README.md.", error)
        return None
    is_mask = metadata["kind"] == "mask"
    sources = metadata.get("sources", []) if is_mask else [metadata]
    return _File(path.name, file_hash(path), is_mask, sources, metadata.get("counts", {}).get("channels"))


def _extended(metadata: dict[str, Any], sources: Sequence[Source]) -> dict[str, Any]:
    metadata = copy.deepcopy(metadata)
    models = [source.get(role) or {} for role in ("target", "ability_model") for source in sources]
    add_values(metadata, "base_model", [name for model in models for name in on_hub(model)])
    data = [source.get("data") or {} for source in sources]
    add_values(metadata, "datasets", [str(one["dataset"]) for one in data if is_hub_dataset(one)])
    add_values(metadata, "tags", ["mergekit-act", "activation-differences"])
    return metadata


def _title(sources: Sequence[Source]) -> str:
    roles = ("ability_model", "target")
    models = ([str((source.get(role) or {}).get("model")).rpartition("/")[2] for role in roles] for source in sources)
    pairs = dict.fromkeys(" → ".join(pair) for pair in models)
    return plain(f"ACT channels: {', '.join(pairs)}" if pairs else "ACT channels")


def _block(files: Sequence[_File], sources: Sequence[Source]) -> list[str]:
    rows = []
    for file in files:
        for place, source in enumerate(file.sources or [{}]):
            pair = (link_model(source.get(role) or {}) for role in ("ability_model", "target"))
            first = [link_file(file.name), "mask" if file.is_mask else "profile"] if not place else ["", ""]
            selected = f"{plain(source.get('criterion', ''))}, {plain(describe_selection(source))}" if source else ""
            counts = [f"{source[key]:,}" if source.get(key) else "" for key in ("samples", "answer_tokens")]
            channels = "" if place or file.channels is None else f"{file.channels:,}"
            names = [plain(source.get("ability", "")), ", ".join(pair) if source else ""]
            rows.append([*first, *names, link_dataset(source.get("data") or {}), selected, *counts, channels])
    header = ["file", "kind", "ability", "models compared", "data set", "channels by", "samples", "answer tokens"]
    return [
        f"Scores and selections of channels, for [ACT]({PAPER}) with mergekit-act: by *activation*, how far the "
        "activations of an ability model and of a target differ on an ability's answers; by *local* and *attribution*, "
        "what moving a channel does to the target's output there, and to its loss.",
        table([*header, "channels"], rows, left=6),
        "In a merge config of [mergekit](https://github.com/arcee-ai/mergekit), with mergekit-act installed:",
        fence("yaml", _example(files)),
        table(["file", "SHA-256"], [[plain(file.name), f"`{file.sha256}`"] for file in files], left=2),
    ]


def _example(files: Sequence[_File]) -> str:
    """A merge config with one of the files, a mask if there is one."""
    file = next((file for file in files if file.is_mask), files[0] if files else None)
    source: Source = file.sources[0] if file is not None and file.sources else {}
    target, ability_model = (
        str((source.get(role) or {}).get("model", default))
        for role, default in (("target", "TARGET"), ("ability_model", "ABILITY_MODEL"))
    )
    parameters = {"weight": 0.4, "mask": f"hf://USER/REPO/{file.name if file else 'mask.safetensors'}"}
    parameters |= {} if file is None or file.is_mask else {"mask_density": 0.01}
    models = [{"model": ability_model, "parameters": parameters}]
    config = {"merge_method": "act", "base_model": target, "models": models, "dtype": "bfloat16"}
    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
