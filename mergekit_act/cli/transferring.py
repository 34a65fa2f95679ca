"""``transfer``: the whole path as one command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_act.cli import options
from mergekit_act.cli.framework import command, common, echo, packed
from mergekit_act.cli.running import runner
from mergekit_act.criteria import CRITERIA, WITHOUT_DATA

if TYPE_CHECKING:
    from mergekit_act.transferring import TransferSettings


@command()
@click.argument("paths", metavar="[ABILITIES.yml] OUT", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--target", help="The model to improve. This and the next six are in place of ABILITIES.yml.")
@click.option("--ability-model", help="A model of the same backbone that has the ability.")
@click.option("--recover", metavar="DATA[:SPLIT]", multiple=True, help="Data set of what is to come back. Repeatable.")
@click.option("--keep", metavar="DATA[:SPLIT]", multiple=True, help="Data set of what is to stay. Repeatable.")
@click.option("--prompt", metavar="COLUMN", help="Or a format string of columns.")
@click.option("--answer", metavar="COLUMN", help="Likewise.")
@click.option("--template", type=click.Choice(["chat", "plain"]), help="Plain for models without a chat template.")
@click.option(
    "--criterion",
    type=click.Choice([name for name in CRITERIA if name not in WITHOUT_DATA]),
    default="attribution",
    show_default=True,
    help="By which channels are scored; see mergekit-act profile --help.",
)
@click.option("--density", type=float, metavar="P", help="Of each profile, with --weight; without a sweep and a fit.")
@click.option("--weight", type=float, help="With --density.")
@options.keep_within
@click.option("--finetune", is_flag=True, help="Fine-tune the merged model on the profiled samples.")
@click.option("--push-to-hub", metavar="USER/NAME", help="Upload the result, into a private repository if it is new.")
@click.option("--yes", is_flag=True, help="Do not ask before --push-to-hub.")
@click.option("--dry-run", is_flag=True, help="Print the commands and what they need, and run none.")
@click.option("--device", help="Where models run, such as cuda or cpu.  [default: the accelerator, if any]")
@options.dtype
@options.batch_tokens
@click.option("--memory-budget", type=options.Bytes(), help="For profiling, such as 10GB.")
@options.lora_merge_cache
@options.trust
@common
@packed("mergekit_act.transferring", "TransferSettings", "settings")
def transfer(
    paths: tuple[Path, ...], yes: bool, dry_run: bool, quiet: bool, settings: TransferSettings, **pair: Any
) -> None:
    """The whole path: profile, sweep, merge, evaluate, card and report.

    Runs the commands that it prints, each as you could give it; all files go to OUT. The same command again goes on
    after an interruption, and does again only what depends on a file that has changed. Of the held-out samples, two
    fifths choose density and weight, the others measure what came of it.
    """
    from mergekit_act import autoload

    autoload.install()
    from mergekit_act.transferring import describe_transfer, run_transfer
    from mergekit_act.transferring.repository import visibility

    *files, out = paths
    path = _abilities_file(files, out, pair)
    if dry_run:
        echo(describe_transfer(path, out, settings))
        return
    if settings.push_to_hub and not yes:
        seen_by = visibility(settings.push_to_hub)
        click.confirm(f"Upload the result to {settings.push_to_hub} ({seen_by}), if it is worth it?", abort=True)
    try:
        done = run_transfer(path, out, settings, run=runner(quiet=quiet), echo=echo)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Interrupted; the same command goes on from there.") from None
    if done.model is None:
        raise SystemExit(1)
    echo(f"{done.model}")


def _abilities_file(files: Sequence[Path], out: Path, pair: Mapping[str, Any]) -> Path:
    """The one that is named; without one OUT.yml, which says what the options do."""
    needed = ("target", "ability_model", "recover", "prompt", "answer")
    given = [name for name in (*needed, "keep", "template") if pair[name]]
    if len(files) == 1 and not given:
        return files[0]
    if files or not all(pair[name] for name in needed):
        options_needed = ", ".join(f"--{name.replace('_', '-')}" for name in needed)
        raise click.UsageError(f"give ABILITIES.yml and OUT; or OUT alone, and {options_needed}")
    from mergekit_act.files import write_atomically
    from mergekit_act.transferring.describe import check_replaceable, describe_abilities, write_described

    if out.name in ("", ".."):
        raise click.UsageError(f"{out} has no name of its own, which the abilities file would get; name a folder")
    path = out.with_name(f"{out.name}.yml")
    content = describe_abilities(**pair)
    if path.exists():
        check_replaceable(path, content, begun=(out / "transfer.json").exists())
    text = write_described(content)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode(), overwrite=True)
        echo(f"wrote {path}")
    return path
