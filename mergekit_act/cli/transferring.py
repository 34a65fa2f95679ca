"""``transfer``: the whole path as one command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_act.cli import options
from mergekit_act.cli.framework import command, common, echo, packed
from mergekit_act.criteria import CRITERIA

if TYPE_CHECKING:
    from mergekit_act.transfer import TransferSettings


@command()
@click.argument("abilities_file", metavar="ABILITIES.yml", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
@click.option("--criterion", type=click.Choice(CRITERIA), default="attribution", show_default=True)
@click.option("--density", type=float, metavar="P", help="Of each profile, with --weight and without a sweep.")
@click.option("--weight", type=float, help="With --density.")
@click.option(
    "--keep-within",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    metavar="SHARE",
    help="How much of the kept abilities may be lost: of the likelihood of an answer token.",
)
@click.option("--finetune", is_flag=True, help="Fine-tune the merged model on the profiled samples.")
@click.option("--dry-run", is_flag=True, help="Print the commands and what they need, and run none.")
@click.option("--device", help="Where models run, such as cuda or cpu.  [default: the accelerator, if any]")
@options.dtype
@options.batch_tokens
@click.option("--memory-budget", type=options.Bytes(), help="For profiling, such as 10GB.")
@options.lora_merge_cache
@options.trust
@common
@packed("mergekit_act.transfer", "TransferSettings", "settings")
def transfer(abilities_file: Path, out: Path, dry_run: bool, quiet: bool, settings: TransferSettings) -> None:
    """The whole path: profile, sweep, merge, evaluate, card and report.

    Runs the commands that it prints, each as you could give it; all files go to OUT. The same command again goes on
    after an interruption, and does again only what depends on a file that has changed. Of the held-out samples, two
    fifths choose density and weight, the others measure what came of it.
    """
    from mergekit_act import autoload

    autoload.install()
    from mergekit_act.transfer import run_transfer

    def run(words: Sequence[str]) -> None:
        _run([*words, "--quiet"] if quiet else words)

    done = run_transfer(abilities_file, out, settings, run=run, echo=echo, plan_only=dry_run)
    if done is None:
        return
    echo(f"\n{done.results}\n\n{done.judgement}" if done.results else f"\n{done.judgement}")
    if done.model is None:
        raise SystemExit(1)
    echo(f"{done.model}")


def _run(words: Sequence[str]) -> None:
    """Run a command in this process, so that it ends when this one is ended."""
    from mergekit_act.cli import main

    program, *arguments = words
    try:
        main.main(args=["merge"] * (program == "mergekit-yaml") + arguments, standalone_mode=False)
    except SystemExit as ended:  # mergekit's command ends so when all is well, too
        if ended.code:
            raise
