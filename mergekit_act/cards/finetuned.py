"""The card of a fine-tuned model: which recipe it was made with, and what had been moved into it before."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit_act import __version__
from mergekit_act.cards.markdown import (
    PAPER,
    TITLE,
    Readme,
    WrittenCard,
    add_values,
    block_of,
    is_hub_dataset,
    link_dataset,
    link_model,
    on_hub,
    read_readme,
    replace_block,
    table,
    write_readme,
)
from mergekit_act.cards.results import read_results
from mergekit_act.files import write_atomically
from mergekit_act.finetuning import FineTuned

__all__ = ["add_evaluation", "write_finetuned_card"]


LOG = logging.getLogger(__name__)


def write_finetuned_card(model: FineTuned) -> WrittenCard:
    """Write the model card, README.md, and beside it what says how the merge is made that was trained, if it was one.

    Raises:
        ValueError: the Hub does not take the metadata.
    """
    path = model.out / "README.md"
    recipe, abilities, described = model.recipe, model.abilities, model.checkpoint.describe()
    metadata: dict[str, Any] = {"library_name": "transformers"}
    add_values(metadata, "base_model", on_hub(described))
    data = (str(ability.data["dataset"]) for ability in abilities if is_hub_dataset(ability.data))
    add_values(metadata, "datasets", data)
    before = _card_of(model.checkpoint.folder)
    add_values(metadata, "tags", [*((before and before.metadata.get("tags")) or ["mergekit-act"]), "sft"])
    counts = table(
        ["ability", "data", "samples", "answer tokens"],
        [[a.name, link_dataset(a.data), f"{len(a.samples):,}", f"{a.answer_tokens:,}"] for a in abilities],
        left=2,
    )
    made_with = f"mergekit-act {__version__}, " + ", ".join(
        f"{shown} {version(package)}"
        for shown, package in (("TRL", "trl"), ("Transformers", "transformers"), ("PyTorch", "torch"))
    )
    text = (
        f"# {model.out.resolve().name}\n\n"
        f"{link_model(described)}, fine-tuned on the answers of a few samples per ability, the last stage of ACT\n"
        f"([{TITLE}]({PAPER})).\n\n"
        f"{counts}\n\n"
        f"Full-parameter supervised fine-tuning on answer tokens: Adam, learning rate {recipe.learning_rate:g} "
        f"({recipe.scheduler}), {recipe.epochs:g} epochs, an update per {recipe.batch_size} samples, gradients clipped "
        f"at 1, computed in {recipe.dtype}, weights kept in {recipe.master_dtype}, seed {recipe.random_seed}. All "
        f"settings are in `finetune.json`, the loss in `loss.csv`.\n\nMade with {made_with}.\n"
    )
    card = Readme("", "").changed(metadata, text + _transferred(before), path)
    write_atomically(path, card.encode(), overwrite=True)
    merge = model.checkpoint.folder / "reproduce.json"
    if not merge.is_file():
        return WrittenCard((path,))
    write_atomically(model.out / merge.name, merge.read_bytes(), overwrite=True)
    return WrittenCard((path, model.out / merge.name))


def add_evaluation(folder: Path, evaluation: Path, evaluated_as: str | None) -> WrittenCard:
    """Say on a fine-tuned model's card what was measured of it.

    Args:
        folder: of the model.
        evaluation: what ``mergekit-act evaluate --json`` wrote.
        evaluated_as: the model's name in it.

    Raises:
        FileNotFoundError: there is no such file, or no card.
        ValueError: the card or the evaluation can't be read.
    """
    path = folder / "README.md"
    readme, results = read_readme(path), read_results(evaluation, folder, evaluated_as)
    if readme is None:
        raise FileNotFoundError(f"{path} does not exist; mergekit-act finetune writes it, when given again too")
    metadata = readme.metadata | {
        "model-index": results.add_to(readme.metadata.get("model-index"), folder.resolve().name)
    }
    write_readme(path, readme.changed(metadata, replace_block(readme.text, "evaluation", results.section()), path))
    return WrittenCard((path,))


def _card_of(folder: Path) -> Readme | None:
    """The card of the model that was trained."""
    try:
        return read_readme(folder / "README.md")
    except ValueError as error:  # no reason to lose a training
        LOG.warning("the card says nothing of what was moved before: %s", error)
        return None


def _transferred(card: Readme | None) -> str:
    """What it says of the transfer, without the files beside it."""
    block = None if card is None else block_of(card.text, "transfer")
    if block is None:
        return ""
    told = block.partition("### Make it again")[0].replace("## ", "## Before the fine-tuning: ", 1)
    return "\n" + "\n".join(line for line in told.splitlines() if not line.startswith("![")) + "\n"
