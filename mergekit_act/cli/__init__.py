"""The command ``mergekit-act``: it parses, calls one function of the library, and prints what comes back.

Heavy imports happen inside the commands.
"""

from __future__ import annotations

import click

from mergekit_act import __version__
from mergekit_act.cli.framework import Group
from mergekit_act.cli.measuring import evaluate, sweep
from mergekit_act.cli.merging import card, check, merge
from mergekit_act.cli.selecting import channels, mask, profile, report
from mergekit_act.cli.training import demo, finetune
from mergekit_act.cli.transferring import transfer

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-act")
def main() -> None:
    """Move one ability of a model into another: profile, mask, merge.

    ACT (arXiv 2601.09398) compares the activations of two models of one backbone on samples of an ability, ranks all
    channels by how far they differ, and moves only the top ones with mergekit (merge_method: act).
    """


for _command in (channels, profile, mask, check, merge, evaluate, sweep, finetune, report, card, transfer, demo):
    main.add_command(_command)
