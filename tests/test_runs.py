"""No two runs write to one place at a time, no claim outlives its process, and log files have no progress bars."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
import yaml
from click.testing import CliRunner
from merges import act_config

from mergekit_act.artifacts import save_profile
from mergekit_act.cli import main
from mergekit_act.profiling import open_pair, profile_without_data
from mergekit_act.runs.folders import claimed, lock_of


@pytest.mark.parametrize(
    ("command", "claim"),
    [("profile", "profile.state"), ("evaluate", "r.json"), ("sweep", "sweep.json"), ("finetune", "finetune.json")],
)
def test_the_second_run_is_refused(pair_of, abilities_yml, sums_file, tmp_path, command, claim):
    target, ability = pair_of("qwen2")
    path = abilities_yml(
        target, ability, sums_file, ability_keys="    prompt: q\n    answer: a\n    evaluate: {samples: 4}\n"
    )
    out = tmp_path / "out"
    save_profile(profile_without_data(open_pair(str(target), str(ability)), "random"), tmp_path / "p.safetensors")
    mask = {"mask": str(tmp_path / "p.safetensors"), "mask_density": 0.1, "weight": 1.0}
    (tmp_path / "act.yml").write_text(yaml.safe_dump(act_config(target, (ability, mask))))
    arguments = {
        "profile": [path, out],
        "evaluate": [target, "--abilities", path, "--json", out / "r.json", "--no-generate"],
        "sweep": [tmp_path / "act.yml", path, out, "--density", "0.1", "--weight", "0.5", "--no-generate"],
        "finetune": [target, path, out],
    }[command]
    with claimed(out / claim):
        result = CliRunner().invoke(main, [command, *map(str, arguments)])
        assert result.exit_code == 1
        assert result.output.endswith(
            f"Error: another run is at work on {out / claim}; wait until it has ended, or choose another place\n"
        )
        assert list(out.iterdir()) == [lock_of(out / claim)]
    assert not out.exists()
    assert CliRunner().invoke(main, [command, *map(str, arguments)]).exit_code == 0
    assert not lock_of(out / claim).exists()


def test_a_killed_run_leaves_no_claim(tmp_path):
    path = tmp_path / "out" / "profile.state"
    code = (
        "import sys\nfrom pathlib import Path\nfrom mergekit_act.runs.folders import claimed\n"
        "with claimed(Path(sys.argv[1])):\n    print('here', flush=True)\n    sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    with pytest.raises(BlockingIOError, match="another run is at work on"), claimed(path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lock_of(path).exists()
    with claimed(path):
        path.write_text("state")
    assert [file.name for file in path.parent.iterdir()] == ["profile.state"]


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_are_for_terminals(pair_of, abilities_yml, sums_file, tmp_path, terminal):
    target, ability = pair_of("qwen2")
    path = abilities_yml(target, ability, sums_file, ability_keys="    prompt: q\n    answer: a\n")
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-m", "mergekit_act", "profile", str(path), str(tmp_path / "out")]
    environment = {
        name: value for name, value in os.environ.items() if "PROGRESS" not in name and name != "TQDM_DISABLE"
    }
    with os.fdopen(ours, "rb", buffering=0) as said:
        process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
        os.close(theirs)
        text = b""
        with suppress(OSError):  # what a pseudo-terminal says where a pipe ends
            while part := said.read(1 << 16):
                text += part
    assert process.wait() == 0
    assert (b"Profiling" in text) == terminal, text
    assert terminal or not text
