"""The card of a merged model: what was moved into it, from where, and how to make it again."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mergekit.card import generate_card
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_act.artifacts import load_inputs
from mergekit_act.cards.instructions import Instructions
from mergekit_act.cards.markdown import (
    Readme,
    Source,
    WrittenCard,
    add_values,
    block_of,
    is_hub_dataset,
    parse_readme,
    read_readme,
    replace_block,
    write_readme,
)
from mergekit_act.cards.masks import MaskFile, find_fits, find_masks, map_setting
from mergekit_act.cards.reproduce import describe_reproduction
from mergekit_act.cards.results import read_results
from mergekit_act.cards.transfer import describe_transfer
from mergekit_act.checking.summary import CheckSummary, check_config
from mergekit_act.files import file_hash, write_atomically
from mergekit_act.merging import is_ours
from mergekit_act.yaml_files import read_yaml

__all__ = ["write_merge_card"]

_CONFIG = "mergekit_config.yml"
_PICTURE = "composition.png"
_BEFORE = "## Merge Details"  # a heading of mergekit's


def write_merge_card(
    merged: Path,
    options: MergeOptions,
    *,
    evaluation: Path | None = None,
    evaluated_as: str | None = None,
    draw: Callable[[CheckSummary], Mapping[str, bytes]] = lambda _summary: {},
    overwrite: bool = False,
) -> WrittenCard:
    """Extend the card that mergekit wrote, and copy the masks beside it.

    Paths in the merge's config are relative to the working directory, as for the merge.

    Args:
        merged: the output folder of a merge with a method of ours.
        options: what mergekit-yaml was given.
        evaluation: what ``mergekit-act evaluate --json`` wrote.
        evaluated_as: the merged model's name in it.
        draw: makes pictures of what was moved, file name -> content.
        overwrite: replace masks and other files of an earlier card that are different.

    Raises:
        FileNotFoundError: the folder holds no merge, or a mask or model is not there.
        FileExistsError: a file that the card brings is there, is different, and ``overwrite`` is false.
        ValueError: the merge is not of our methods, as ``check_config``; the card or the evaluation can't be read.
    """
    if not (merged / _CONFIG).is_file():
        raise FileNotFoundError(f"{merged} has no {_CONFIG}; name the folder that mergekit-yaml wrote")
    config = read_yaml(merged / _CONFIG, "merge config")
    if not is_ours(str(config.get("merge_method"))):
        raise ValueError(f"{merged} is a merge by {config.get('merge_method')}; card tells of merges by act and act_*")
    summary = check_config(merged / _CONFIG, options)
    masks = find_masks(summary.masks)
    results = None if evaluation is None else read_results(evaluation, merged, evaluated_as)
    fits = {setting: (path, f"fit/{file_hash(path)[:8]}-{path.name}") for setting, path in find_fits(config).items()}
    inputs = {copy: load_inputs(source) for source, copy in fits.values()}
    instructions = Instructions(masks, summary.target, summary.ability_models, inputs)
    files = _files(merged, config, masks, fits, instructions, options) | dict(draw(summary))
    changed = [name for name, content in files.items() if not _is(merged / name, content)]
    taken = [str(merged / name) for name in changed if (merged / name).exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)}: there, and different. Move it away or say --overwrite.")
    path = merged / "README.md"
    readme = read_readme(path) or _new_readme(merged, config)
    picture = _PICTURE if _PICTURE in files or (merged / _PICTURE).is_file() else None
    before = block_of(readme.text, "transfer") or ""
    transfer = describe_transfer(summary, masks, instructions, options, fits, picture=picture, before=before)
    text = replace_block(readme.text, "transfer", transfer, before=_BEFORE)
    metadata = _extended(readme.metadata, [source for mask in masks for source in mask.sources])
    if results is not None:
        text = replace_block(text, "evaluation", results.section(), before=_BEFORE)
        metadata["model-index"] = results.add_to(metadata.get("model-index"), merged.resolve().name)
    card = readme.changed(metadata, text, path)
    for name in changed:
        write_atomically(merged / name, files[name], overwrite=True)
    write_readme(path, card)
    remarks = [*summary.remarks, *_private(config, masks), *_younger(masks, merged)]
    return WrittenCard((path, *(merged / name for name in files)), tuple(remarks))


def _files(
    merged: Path,
    config: Any,
    masks: Sequence[MaskFile],
    fits: Mapping[str, tuple[Path, str]],
    instructions: Instructions,
    options: MergeOptions,
) -> dict[str, bytes]:
    """What goes into the folder beside the card: masks, inputs, the config with them, the data they were made of."""
    copies: dict[str, list[str]] = {}
    for mask in masks:
        copies.setdefault(mask.setting, []).append(mask.copy)
    own = map_setting(config, "mask", lambda setting: ",".join(dict.fromkeys(copies.get(setting, [setting]))))
    own = map_setting(own, "fit", lambda setting: fits[setting][1])
    texts = instructions.files | {"act.yml": yaml.safe_dump(own, sort_keys=False, allow_unicode=True)}
    texts["reproduce.json"] = describe_reproduction(merged / "reproduce.json", own, masks, fits, options)
    used = {mask.copy: mask.path for mask in masks} | {copy: path for path, copy in fits.values()}
    return {copy: path.read_bytes() for copy, path in used.items()} | {name: t.encode() for name, t in texts.items()}


def _is(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _new_readme(merged: Path, config: Any) -> Readme:
    """The card that mergekit would have written."""
    model = MergeConfiguration.model_validate(config)
    written = (merged / _CONFIG).read_text(encoding="utf-8")
    return parse_readme(generate_card(model, written, merged.resolve().name), merged)


def _extended(metadata: dict[str, Any], sources: Sequence[Source]) -> dict[str, Any]:
    """A card's metadata, with what the Hub should know of a merge; base models are mergekit's business."""
    metadata = copy.deepcopy(metadata)
    if metadata.get("base_model"):
        metadata.setdefault("base_model_relation", "merge")
    else:
        metadata.pop("base_model", None)  # mergekit's empty list, of local models
    data = [source.get("data") or {} for source in sources]
    add_values(metadata, "datasets", [str(one["dataset"]) for one in data if is_hub_dataset(one)])
    metadata.setdefault("library_name", "transformers")
    add_values(metadata, "tags", ["mergekit", "merge", "mergekit-act"])
    return metadata


def _private(config: Any, masks: Sequence[MaskFile]) -> list[str]:
    """What a reader of the folder's files would learn of this machine."""
    data = [(source.get("data") or {}).get("dataset") for mask in masks for source in mask.sources]
    named = [
        part.strip() for value in [*_strings(config), *filter(None, data)] for part in re.split(r"[,+]", str(value))
    ]
    local = sorted({name for name in named if Path(name).is_absolute() or name.startswith(("~", ".."))})
    if not local:
        return []
    where = f"README.md, {_CONFIG}, act.yml or abilities.yml"
    return [f"{where} name files of this machine: {', '.join(local)}; mend that before you share"]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)


def _younger(masks: Sequence[MaskFile], merged: Path) -> list[str]:
    """Masks that were written after the merge, which may have used others."""
    made = (merged / _CONFIG).stat().st_mtime
    young = dict.fromkeys(str(mask.path) for mask in masks if mask.path.stat().st_mtime > made)
    return [f"{path} is younger than the merge: the card is wrong if the mask was another then" for path in young]
