"""``check``, ``merge`` and ``card``: from a mask to a model on the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_act.cli import options
from mergekit_act.cli.framework import command, common, echo
from mergekit_act.logs import muted


@command(
    context_settings={"ignore_unknown_options": True},
    options_metavar="[OPTIONS] [OPTIONS OF mergekit-yaml]",
)
@click.argument("arguments", metavar="CONFIG.yml", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, problems too.")
@common
def check(arguments: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Tell what a merge would do.

    Reads the config and the headers of the files it names, no weights: what is transferred, copied and has no
    channels, what the merge costs, and everything that would make it fail (exit code 1). Takes mergekit-yaml's
    options too; those that change the plan count.
    """
    import dataclasses
    import json

    from mergekit_act import autoload

    autoload.install()
    from mergekit_act.checking.summary import check_config, parse_check_arguments
    from mergekit_act.planning import MergeConfigError
    from mergekit_act.report import list_check

    path, options = parse_check_arguments(arguments)
    try:
        with muted("mergekit_act.checking"):  # what it would warn of is in the summary
            summary = check_config(path, options)
    except (ValueError, OSError) as error:
        if not as_json:
            raise
        problems = error.problems if isinstance(error, MergeConfigError) else [str(error)]
        echo(json.dumps({"problems": problems}, indent=2))
        raise SystemExit(1) from error
    echo(json.dumps(dataclasses.asdict(summary) | {"problems": []}, indent=2) if as_json else list_check(summary))


@command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    options_metavar="[OPTIONS OF mergekit-yaml]",
)
@click.argument("arguments", metavar="CONFIG.yml OUT", nargs=-1, type=click.UNPROCESSED)
def merge(arguments: tuple[str, ...]) -> None:
    """mergekit-yaml with the same arguments.

    For places where plain mergekit-yaml does not know the method act, because Python reads no .pth files there
    (pip --target, zipapps).
    """
    from mergekit_act import autoload

    autoload.install()
    from mergekit_act.cli.mergekit_yaml import run_mergekit_yaml

    run_mergekit_yaml(arguments)


@command(
    context_settings={"ignore_unknown_options": True},
    options_metavar="[OPTIONS] [OPTIONS OF mergekit-yaml]",
)
@click.argument("arguments", metavar="FOLDER", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--evaluation",
    metavar="FILE.json",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Results of mergekit-act evaluate --json, for the card and the Hub's model-index.",
)
@click.option("--evaluated-as", metavar="MODEL", help="The merged model's name in that file, if not its path.")
@options.overwrite
@common
def card(
    arguments: tuple[str, ...], evaluation: Path | None, evaluated_as: str | None, overwrite: bool, quiet: bool
) -> None:
    """Say on a merge's model card what was moved.

    Extends the README.md that mergekit wrote to FOLDER: method, models, abilities and their data, what was moved,
    how to make it again. Copies the masks into it, with act.yml and abilities.yml. Run it where the merge was run, with
    the options of mergekit-yaml that it was given. The same command again changes nothing; parts of the card that
    others wrote stay.

    Of a FOLDER with profiles and masks, writes the README.md that describes them; to the card of a fine-tuned model,
    adds --evaluation.
    """
    from mergekit_act import autoload

    autoload.install()
    from mergekit_act.cards.files import has_artifacts, write_folder_card
    from mergekit_act.cards.finetuned import add_evaluation
    from mergekit_act.cards.merged import write_merge_card
    from mergekit_act.checking.summary import parse_check_arguments
    from mergekit_act.report import can_draw, draw_moved

    named, merge_options = parse_check_arguments(arguments)
    folder = Path(named)
    if not (folder / "config.json").exists() and has_artifacts(folder):
        if evaluation is not None or evaluated_as is not None:
            raise ValueError(f"{folder} holds profiles and masks; --evaluation is of merged models")
        described = write_folder_card(folder)
        if not described.files:
            raise ValueError(f"{folder / 'README.md'} is of somebody else; move it, and give the same command again")
        echo(*described.files)
        return
    if (folder / "finetune.json").exists() and evaluation is not None:
        echo(*add_evaluation(folder, evaluation, evaluated_as).files)
        return
    with muted("mergekit_act.checking"):  # what it would warn of is in the summary
        written = write_merge_card(
            folder,
            merge_options,
            evaluation=evaluation,
            evaluated_as=evaluated_as,
            draw=draw_moved,
            overwrite=overwrite,
        )
    for remark in written.remarks:
        echo(f"note: {remark}")
    if not can_draw():
        echo('note: for a picture: pip install "mergekit-act[plots]", and the same command again')
    for path in written.files:
        echo(path)
