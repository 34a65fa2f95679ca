"""What a merge's card says of the transfer: what was moved from where, and how to make it again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_act.cards.instructions import Instructions, requirements, shell_line
from mergekit_act.cards.markdown import (
    HUB_ID,
    PAPER,
    TITLE,
    Source,
    code,
    fence,
    link_dataset,
    link_file,
    link_model,
    plain,
    table,
)
from mergekit_act.cards.masks import MaskFile
from mergekit_act.cards.reproduce import OPTIONS
from mergekit_act.checking.summary import CheckSummary
from mergekit_act.checkpoints import model_name, parse_reference
from mergekit_act.criteria import WITHOUT_DATA
from mergekit_act.files import file_hash
from mergekit_act.selection import describe_selection, predicted_effects
from mergekit_act.wording import percent

__all__ = ["describe_transfer"]


Fits = Mapping[str, tuple[Path, str]]


def describe_transfer(
    summary: CheckSummary,
    masks: Sequence[MaskFile],
    instructions: Instructions,
    options: MergeOptions,
    fits: Fits,
    *,
    picture: str | None,
    before: str,
) -> str:
    """Markdown of a card's part on the transfer.

    Args:
        summary: what the merge moved.
        masks: that it used.
        instructions: how they are made again.
        options: of the merge.
        fits: a ``fit`` setting -> the file of inputs, and its path in the merge's folder.
        picture: of the composition, if there is one.
        before: what the card has said so far; the versions it names stay.
    """
    once = {(mask.copy, mask.density): mask for mask in masks}  # several settings may name a file
    sources = [source for mask in once.values() for source in mask.sources]
    parts = ["## Transferred abilities", *_moved(summary, sources), *([_abilities(sources)] if sources else [])]
    if picture is not None:
        parts.append(f"![Share of each module's channels that was moved, by module kind and layer]({picture})")
    kinds = [
        [code(kind.kind), f"{kind.tensors:,}", f"{kind.parameters:,}", percent(kind.moved, kind.parameters)]
        for kind in summary.kinds
    ]
    parts.append(table(["tensors", "number", "parameters", "moved"], kinds))
    return "\n\n".join([*parts, *_again(summary, masks, instructions, options, fits, before)])


def _moved(summary: CheckSummary, sources: Sequence[Source]) -> Iterator[str]:
    moved = sum(kind.moved for kind in summary.kinds)
    parameters = sum(kind.parameters for kind in summary.kinds)
    method = f"[ACT]({PAPER}) (activation-guided channel-wise ability transfer; *{TITLE}*)"
    is_control = bool(sources) and all(source.get("criterion") in WITHOUT_DATA for source in sources)
    chosen = "with channels chosen without data, a control of" if is_control else "by"
    channels = f"{summary.selected:,} of {summary.channels:,} channels ({percent(summary.selected, summary.channels)})"
    owned = f"{moved:,} of {parameters:,} parameters ({percent(moved, parameters)})"
    yield (
        f"{channels} were moved into the target, {owned}, {chosen} {method}; merge method `{summary.merge_method}`. "
        "Everything else is the target's."
    )
    models = [f"- Target: {_link(summary.target)}"]
    for model in summary.ability_models:
        weights = summary.weights.get(model, ())
        shown = f", weight {weights[0]:g}" if len(weights) == 1 else ""
        shown = f", weights {weights[0]:g} to {weights[-1]:g}, by tensor" if len(weights) > 1 else shown
        models.append(f"- Ability model: {_link(model)}{shown}")
    yield "\n".join(models)


def _abilities(sources: Sequence[Source]) -> str:
    rows = [
        [
            plain(source.get("ability")),
            f"{link_model(source.get('ability_model') or {})}, {link_model(source.get('target') or {})}",
            link_dataset(source.get("data") or {}),
            f"{plain(source.get('criterion'))}, {plain(describe_selection(source))}",
            f"{source['samples']:,}" if source.get("samples") else "",
            f"{source['answer_tokens']:,}" if source.get("answer_tokens") else "",
        ]
        for source in sources
    ]
    header = ["ability", "models compared", "data set", "channels by", "samples", "answer tokens"]
    return "\n\n".join([table(header, rows, left=4), *map(plain, predicted_effects(sources))])


def _again(
    summary: CheckSummary,
    masks: Sequence[MaskFile],
    instructions: Instructions,
    options: MergeOptions,
    fits: Fits,
    before: str,
) -> Iterator[str]:
    yield "### Make it again"
    hashes = {mask.copy: mask.sha256 for mask in masks} | {copy: file_hash(path) for path, copy in fits.values()}
    yield table(["file", "SHA-256"], [[link_file(name), f"`{digest}`"] for name, digest in hashes.items()], left=2)
    written = re.search(r"^pip install .*$", before, re.MULTILINE)
    install = written.group() if written else shell_line(["pip", "install", *requirements()])
    files = ", ".join(map(link_file, ("act.yml", *instructions.files)))
    models = [name for name in (summary.target, *summary.ability_models) if not _is_hub_id(name)]
    named = ", ".join(dict.fromkeys(map(_local_name, [*models, *instructions.local])))
    needed = f", and the local {named} where these name it" if named else ""
    yield f"In a folder of its own with {files} from here{needed} (versions of the machine that wrote this card):"
    yield fence("sh", install)
    flags = _flags(options, "trust_remote_code", *(("lora_merge_cache",) if "+" in named else ()))
    made = instructions.commands(*flags)
    if made:
        yield "The masks, from data; or take the folder `masks` from here:"
        yield fence("sh", made)
    if fits:
        yield (
            "The selected rows are fitted to inputs of the target's modules. The same commands make them; they are in "
            "the folder `fit` here."
        )
    yield "The merge:"
    yield fence("sh", shell_line(["mergekit-yaml", "act.yml", "./again", *_flags(options, *OPTIONS)]))


def _flags(options: MergeOptions, *names: str) -> list[str]:
    """Options that differ from their defaults, as a command line has them."""
    found = []
    for name in names:
        value = getattr(options, name, None)
        if value is not None and value is not False:
            shown = "./lora-cache" if name == "lora_merge_cache" else str(value)
            found += [f"--{name.replace('_', '-')}", *([] if value is True else [shown])]
    return found


def _is_hub_id(reference: str) -> bool:
    path = parse_reference(reference).model.path
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _local_name(reference: str) -> str:
    parsed = parse_reference(reference)
    return code("+".join(Path(part.path).name for part in (parsed.model, parsed.lora) if part is not None))


def _link(reference: str) -> str:
    """A model reference of a merge config, linked if it is on the Hub or from its cache; of a local folder the name."""
    model = parse_reference(reference).model
    name, revision = model_name(model.path)
    if not (_is_hub_id(reference) or revision):
        return _local_name(reference)
    tree = f"/tree/{revision or model.revision}" if revision or model.revision else ""
    return f"[{plain(f'{name}@{revision}' if revision else reference)}](https://huggingface.co/{name}{tree})"
