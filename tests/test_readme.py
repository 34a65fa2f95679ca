"""What the README says has to be true."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner
from mergekit.merge_methods import get

from mergekit_act.checking.configs import config_problems
from mergekit_act.cli import main
from mergekit_act.planning import MergeConfigError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_readmes_test_command():
    (command,) = re.findall(r"^pip install -e .*pytest.*$", README, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_commands_and_options_in_the_readme_exist():
    for line in re.findall(r"^\$? ?mergekit-act (.+)$", README, re.MULTILINE):
        command, *rest = line.split()
        if command in main.commands:
            known = {name for option in main.commands[command].params for name in option.opts}
            used = {word.split("=")[0] for word in rest if word.startswith("-")}
            assert command == "merge" or used <= known, line
    for command in main.commands:
        assert f"mergekit-act {command}" in README
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"""(?:\]\(|src="|srcset=")([^)"#]+)""", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_message_in_the_readme_is_the_one_that_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"wieght": 1, "weight": 1, "mask": "masks/scince.safetensors"}
    config = {"base_model": "t", "models": [{"model": "a", "parameters": settings}], "parameters": {"densty": 1}}
    message = f"Error: {MergeConfigError(config_problems(config, get('act').spec)).message}"
    assert message.replace(str(tmp_path), "/home/me/merges") in README
