"""The card of a fine-tuned model: which recipe it was made with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from mergekit_act import __version__
from mergekit_act.abilities import AbilitySamples
from mergekit_act.checkpoints import Checkpoint
from mergekit_act.finetuning.recipe import Recipe

__all__ = ["write_card"]

_TITLE = "Ability Transfer and Recovery via Modularized Parameters Localization"


def write_card(
    path: Path, name: str, checkpoint: Checkpoint, abilities: Sequence[AbilitySamples], recipe: Recipe, settings: str
) -> None:
    """Write a model card.

    Args:
        path: of the card.
        name: of the trained model.
        checkpoint: the model that was trained.
        abilities: the samples it was trained on.
        recipe: how.
        settings: name of the file that has all settings.
    """
    described = checkpoint.describe()
    sources = sorted({str(ability.data["dataset"]) for ability in abilities})
    on_hub = [source for source in sources if not Path(source).exists() and source.count("/") == 1]
    front = ["library_name: transformers", "tags:", "- mergekit-act", "- sft"]
    front += [] if Path(checkpoint.reference.model.path).exists() else ["base_model:", f"- {described['model']}"]
    front += ["datasets:", *(f"- {source}" for source in on_hub)] if on_hub else []
    counts = "".join(
        f"| {a.name} | {a.data['dataset']} | {len(a.samples):,} | {a.answer_tokens:,} |\n" for a in abilities
    )
    made_with = f"mergekit-act {__version__}, " + ", ".join(
        f"{shown} {version(package)}"
        for shown, package in (("TRL", "trl"), ("Transformers", "transformers"), ("PyTorch", "torch"))
    )
    text = (
        "---\n" + "\n".join(front) + "\n---\n\n"
        f"# {name}\n\n"
        f"`{described['model']}`, fine-tuned on the answers of a few samples per ability, the last stage of ACT\n"
        f"([{_TITLE}](https://arxiv.org/abs/2601.09398)).\n\n"
        f"| ability | data | samples | answer tokens |\n|---|---|---|---|\n{counts}\n"
        f"Full-parameter supervised fine-tuning on answer tokens: Adam, learning rate {recipe.learning_rate:g} "
        f"({recipe.scheduler}), {recipe.epochs:g} epochs, an update per {recipe.batch_size} samples, gradients clipped "
        f"at 1, computed in {recipe.dtype}, weights kept in {recipe.master_dtype}, seed {recipe.random_seed}. All "
        f"settings are in `{settings}`, the loss in `loss.csv`.\n\nMade with {made_with}.\n"
    )
    path.write_text(text, encoding="utf-8")
