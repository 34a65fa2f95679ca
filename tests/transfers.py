"""Transfers as users run them, and what they print and leave."""

from __future__ import annotations

import shlex

from click.testing import CliRunner

from mergekit_act.cli import main


def transfer(*arguments):
    return CliRunner().invoke(main, ["transfer", "abilities.yml", "out", *arguments])


def steps(output):
    """The commands that were printed, and whether each was run."""
    lines = output.splitlines()
    return {
        shlex.split(a)[2]: b.strip() != "done before, from the same files"
        for a, b in zip(lines, [*lines[1:], ""], strict=True)
        if a.startswith("$ mergekit-act")
    }


def files(folder):
    """All that is in a folder, but for what says how long something took."""
    found = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}
    return {
        str(path.relative_to(folder)): content
        for path, content in found.items()
        if path.name not in ("sweep.csv", "transfer.json")
    }
