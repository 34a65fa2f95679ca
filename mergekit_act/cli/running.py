"""Commands that run commands."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

import click

__all__ = ["run_words", "runner"]


def runner(*, quiet: bool) -> Callable[[Sequence[str]], None]:
    """``run_words`` with ``-v`` and ``--quiet`` of the command that is running."""
    return partial(run_words, quiet=quiet, verbose=click.get_current_context().params["verbose"])


def run_words(words: Sequence[str], *, quiet: bool = False, verbose: int = 0) -> None:
    """Run a command in this process, so that it ends when this one is ended.

    Args:
        words: the command, as a user gives it.
        quiet: show no progress bars.
        verbose: whether the command's own error is raised, and no sentence made of it.

    Raises:
        ClickException: the command failed; the sentence says why.
        KeyboardInterrupt: the user ended it.
        SystemExit: it failed, and has said why.
        ValueError: the Hub's command failed.
    """
    from mergekit_act.cli import main

    program, *arguments = words
    arguments += ["--quiet"] * quiet
    if program == "hf":
        done = subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", *arguments], check=False)
        if done.returncode:
            raise ValueError(f"{shlex.join(words)} failed; the same command goes on from there")
        return
    arguments += ["-v"] * verbose
    try:
        code = main.main(args=["merge"] * (program == "mergekit-yaml") + arguments, standalone_mode=False)
    except SystemExit as ended:  # mergekit's command ends so when all is well, too
        code = ended.code
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
