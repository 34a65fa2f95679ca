"""``evaluate`` and ``sweep``: what models know."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_act.cli import options
from mergekit_act.cli.framework import command, common, echo, packed

if TYPE_CHECKING:
    from mergekit_act.evaluation import Evaluation, EvaluationSettings
    from mergekit_act.sweeping import Grid, SweepSettings


@command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--abilities", "file", metavar="ABILITIES.yml", required=True, type=click.Path(path_type=Path))
@click.option("--ability", "names", metavar="NAME", multiple=True, help="Only this ability of the file. Repeatable.")
@click.option("--generate/--no-generate", default=True, show_default=True, help="Answers too, for exact match.")
@options.evaluation_device
@options.dtype
@options.batch_tokens
@click.option("--random-seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@options.printable("json", "All results as JSON, to a file, or instead of the table.")
@options.printable("csv", "The table's numbers as csv, likewise.")
@click.option(
    "--predictions",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A JSON line per model and sample, with the generated text.",
)
@options.lora_merge_cache
@options.trust
@options.overwrite
@common
@packed("mergekit_act.evaluation", "EvaluationSettings", "settings")
def evaluate(
    models: tuple[str, ...],
    file: Path,
    names: tuple[str, ...],
    json_out: str | None,
    csv_out: str | None,
    predictions: Path | None,
    overwrite: bool,
    settings: EvaluationSettings,
) -> None:
    """Measure models on held-out samples.

    For every MODEL and ability: negative log-likelihood of the answers per token, exact match of greedy answers, with
    95 % bootstrap intervals; every model against the first, on the same samples. Samples are those that "evaluate"
    names in ABILITIES.yml; by default 200 behind the profiled ones.

    Files are written after each model.
    """
    from mergekit_act.abilities import load_abilities
    from mergekit_act.evaluation import run_evaluation
    from mergekit_act.files import check_free, check_writable
    from mergekit_act.report import list_evaluation
    from mergekit_act.runs.folders import claimed

    if json_out == csv_out == "-":
        raise ValueError("--json and --csv cannot both be printed; name a file for one of them")
    json, csv = (None if path in (None, "-") else Path(path) for path in (json_out, csv_out))
    named = {"json": json, "csv": csv, "predictions": predictions}
    outputs = {what: path for what, path in named.items() if path is not None}
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        shown = ", ".join(map(str, outputs.values()))
        raise ValueError(f"{shown}: two outputs would go into one file; name different ones")
    check_free(outputs.values(), overwrite=overwrite)
    for path in outputs.values():
        check_writable(path.parent)
    abilities = load_abilities(file)
    done = None
    try:
        with ExitStack() as claims:
            for path in outputs.values():
                claims.enter_context(claimed(path))
            for evaluation in run_evaluation(models, abilities, names or None, settings):
                _write(evaluation, outputs)
                done = evaluation
    finally:  # what is measured is told, also if a later model fails
        if done is not None and json_out == "-":
            echo(done.json().rstrip())
        elif done is not None and csv_out == "-":
            echo(done.csv().rstrip())
        elif done is not None:
            echo(list_evaluation(done.results))
            for path in outputs.values():
                echo(path)


def _write(evaluation: Evaluation, outputs: dict[str, Path]) -> None:
    """Write anew what is measured so far, so that nothing is lost if a later model fails."""
    from mergekit_act.files import write_atomically

    for what, path in outputs.items():
        write_atomically(path, getattr(evaluation, what)().encode(), overwrite=True)


@command()
@click.argument("config_file", metavar="CONFIG.yml", type=click.Path(path_type=Path))
@click.argument("abilities_file", metavar="ABILITIES.yml", type=click.Path(path_type=Path))
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--grid",
    "kind",
    type=click.Choice(["default", "paper"]),
    default="default",
    show_default=True,
    help="default: densities 0.01, 0.02, 0.05, 0.1 by weights 0.2, 0.4, 0.7, 1. paper: 252 points, densities 0.01 to "
    "0.1 and 0.15 to 1 by weights 0.1 to 0.9.",
)
@click.option("--density", "densities", type=float, multiple=True, help="In place of the grid's. Repeatable.")
@click.option("--weight", "weights", type=float, multiple=True, help="In place of the grid's. Repeatable.")
@click.option(
    "--criterion",
    "criteria",
    multiple=True,
    help="Only the config's profiles by this criterion. Repeatable, to compare criteria.",
)
@click.option(
    "--fit",
    "fits",
    metavar="INPUTS",
    multiple=True,
    help="Every point also with its rows fitted to this file of inputs, of profile --inputs. Repeatable.",
)
@click.option("--per-model", is_flag=True, help="Every combination of weights, instead of one for all ability models.")
@options.keep_within
@click.option("--generate/--no-generate", default=True, show_default=True, help="Exact match too, on the frontier.")
@click.option("--device", help="Where the target runs, such as cuda or cpu.  [default: the accelerator, if any]")
@options.batch_tokens
@options.lora_merge_cache
@options.trust
@options.overwrite
@common
@packed("mergekit_act.sweeping", "Grid", "grid")
@packed("mergekit_act.sweeping", "SweepSettings", "settings")
def sweep(
    config_file: Path, abilities_file: Path, out_dir: Path, overwrite: bool, grid: Grid, settings: SweepSettings
) -> None:
    """Find a good density and weight, criterion and fit.

    Merges every point of a grid in memory and scores it on the held-out samples of ABILITIES.yml: what the abilities
    with "role: recover" gain against what those with "role: keep" lose. CONFIG.yml is a merge config of act whose
    masks are profiles; its densities and weights are replaced.

    Writes sweep.csv, point by point, a picture, and best.yml, which mergekit-yaml merges to the very weights that were
    scored. The same command goes on after an interruption.
    """
    from mergekit_act.abilities import load_abilities
    from mergekit_act.report import can_draw, check_drawing, draw_sweep, list_sweep
    from mergekit_act.sweeping import run_sweep
    from mergekit_act.sweeping.config import read_swept_config

    config = read_swept_config(config_file)
    points = grid.points(len(config.models))
    check_drawing()  # before hours of work
    result = run_sweep(config, load_abilities(abilities_file), out_dir, points, settings, overwrite=overwrite)
    echo(list_sweep(result))
    echo(f"{len(result.frontier)} of {len(result.scores)} points, which no other surpasses; all are in sweep.csv")
    if result.best is None:
        limit = f"{settings.keep_within:.0%} of what is to be kept"
        echo(f"every point loses more than {limit} or recovers nothing: no best.yml")
    written = [out_dir / name for name in ("sweep.csv", "best.yml") if (out_dir / name).exists()]
    if can_draw():
        written += draw_sweep(result, out_dir)
    else:
        echo('for a picture: pip install "mergekit-act[plots]", and the same command again')
    for path in written:
        echo(path)
