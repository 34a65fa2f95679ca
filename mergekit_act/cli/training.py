"""``finetune`` and ``demo``: what trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_act.cli import options
from mergekit_act.cli.framework import command, common, echo, packed
from mergekit_act.cli.running import runner

if TYPE_CHECKING:
    from mergekit_act.finetuning import FineTuned, Recipe, TrainingSettings


@command()
@click.argument("model", metavar="MODEL")
@click.argument("abilities_file", metavar="ABILITIES.yml", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
@click.option("--ability", "names", metavar="NAME", multiple=True, help="Only this ability of the file. Repeatable.")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=2e-5, show_default=True)
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Samples of one update, in all."
)
@click.option(
    "--micro-batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples that a process computes at once; more is faster and takes more memory.",
)
@click.option(
    "--scheduler",
    type=click.Choice(["linear", "constant", "cosine"]),
    default="linear",
    show_default=True,
    help="How the learning rate goes on; the paper does not say.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="In which it computes.  [default: bfloat16 where the device multiplies it natively, else float32]",
)
@click.option(
    "--master-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="In which weights and Adam's means are kept. bfloat16 takes half the memory, but rounds small updates away.",
)
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=True, show_default=True)
@click.option(
    "--save-steps",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Updates between checkpoints, from which the same command goes on; 0 for none.",
)
@click.option("--device", help="cpu, to leave an accelerator alone.  [default: the accelerator, if any]")
@click.option("--random-seed", type=int, default=0, show_default=True, help="Of the order of the samples.")
@options.lora_merge_cache
@options.trust
@options.overwrite
@common
@packed("mergekit_act.finetuning", "Recipe", "recipe")
@packed("mergekit_act.finetuning", "TrainingSettings", "settings")
def finetune(
    model: str,
    abilities_file: Path,
    out: Path,
    names: tuple[str, ...],
    overwrite: bool,
    recipe: Recipe,
    settings: TrainingSettings,
) -> None:
    """Fine-tune a model lightly.

    Full-parameter training of MODEL on the answer tokens of all samples of ABILITIES.yml, the ones it profiles, with
    TRL's SFTTrainer; the defaults are the paper's. Writes the model, its card, loss.csv and a picture to OUT. The same
    command goes on after an interruption. With several GPUs:

      accelerate launch --config_file fsdp.yaml -m mergekit_act finetune MODEL ABILITIES.yml OUT
    """
    from mergekit_act.abilities import load_abilities
    from mergekit_act.finetuning import finetune
    from mergekit_act.report import check_drawing
    from mergekit_act.runs.processes import end_process, rank_and_count

    check_drawing()  # before hours of work
    done = finetune(model, load_abilities(abilities_file), out, recipe, settings, names=names, overwrite=overwrite)
    if rank_and_count()[0] == 0:
        made = _describe(done)
        if not made and not done.is_new:
            raise FileExistsError(f"{out} is finished already. Choose another folder or say --overwrite.")
        for path in (out, out / "loss.csv", *made[1:]) if done.is_new else made:  # the card is part of the model
            echo(path)
    end_process()


def _describe(model: FineTuned) -> list[Path]:
    """Write a model's card and the picture of its losses; of a model that was there before what it lacks."""
    from mergekit_act.cards.finetuned import write_finetuned_card
    from mergekit_act.report import can_draw, draw_losses

    made: list[Path] = []
    if model.is_new or not (model.out / "README.md").exists():
        made += write_finetuned_card(model).files
    pictures, losses = [model.out / "loss.svg", model.out / "loss.png"], model.losses()
    if losses and can_draw() and (model.is_new or not all(picture.exists() for picture in pictures)):
        made += draw_losses(losses, model.out / "loss")
    return made


@command()
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(path_type=Path, file_okay=False))
@common
def demo(out_dir: Path, quiet: bool) -> None:
    """Run the whole path on tiny models.

    Trains them, lets one forget, and brings the forgotten ability back with ACT.
    Evaluates them, and fine-tunes lightly if TRL is installed. Needs no downloads and two to four minutes on two CPU
    cores; all files stay in OUT_DIR.
    """
    from mergekit_act.demo import run_demo

    run_demo(out_dir, run=runner(quiet=quiet), echo=echo, quiet=quiet)
