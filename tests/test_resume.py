"""Runs that are killed or interrupted go on where they were, to the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from samples import as_ability, random_samples

from mergekit_act.abilities import load_abilities
from mergekit_act.cli import main
from mergekit_act.profiling import ProfilingSettings, open_pair, profile_pair, write_profiles

SETTINGS = ["--dtype", "float32", "--batch-tokens", "30", "--save-every", "0"]


def end_run(path: Path, out: Path, how: signal.Signals, *options: str) -> tuple[int, str, int]:
    """Start a run, and end it by a signal when it has saved its state once more; exit code, output, what is done."""
    before = (out / "profile.state").stat().st_mtime_ns if out.exists() else 0
    process = subprocess.Popen(
        [sys.executable, "-m", "mergekit_act", "profile", str(path), str(out), *SETTINGS, *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "profile.state").exists() or (out / "profile.state").stat().st_mtime_ns == before:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(how)
    _, said = process.communicate()
    with safe_open(out / "profile.state", framework="pt") as file:
        metadata = json.loads(file.metadata()["mergekit_act"])
    return process.returncode, said, metadata["done"]


def test_killed_and_interrupted_runs_give_the_same_bytes(two_abilities, tmp_path):
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    write_profiles(
        load_abilities(two_abilities), whole, ProfilingSettings(dtype="float32", batch_tokens=30, quiet=True)
    )
    code, _, first = end_run(two_abilities, ended, signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, _, second = end_run(two_abilities, ended, signal.SIGKILL, "--memory-budget", "1.6MB")  # streamed
    assert code == -signal.SIGKILL
    code, said, third = end_run(two_abilities, ended, signal.SIGINT)
    assert code == 130
    assert f"Interrupted. {ended}/profile.state keeps what is done; the same command goes on from there." in said
    assert 0 < first < second < third
    (ended / ".profile.state.abc.tmp").write_bytes(b"half")  # as a kill while it is written leaves it
    code = CliRunner().invoke(main, ["profile", str(two_abilities), str(ended), *SETTINGS])
    assert code.exit_code == 0, code.output
    assert sorted(path.name for path in ended.iterdir()) == ["README.md", "one.safetensors", "two.safetensors"]
    for name in ("one", "two"):
        assert (ended / f"{name}.safetensors").read_bytes() == (whole / f"{name}.safetensors").read_bytes()


def test_killed_attributions_with_inputs_give_the_same_bytes(two_abilities, tmp_path):
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    options = ("--criterion", "attribution", "--inputs")
    settings = {"criterion": "attribution", "inputs": True, "dtype": "float32", "batch_tokens": 30, "quiet": True}
    write_profiles(load_abilities(two_abilities), whole, ProfilingSettings(**settings))
    code, _, first = end_run(two_abilities, ended, signal.SIGKILL, *options)
    assert code == -signal.SIGKILL
    code, _, second = end_run(two_abilities, ended, signal.SIGINT, "--memory-budget", "1.8MB", *options)  # streamed
    assert code == 130
    assert 0 < first < second
    done = CliRunner().invoke(main, ["profile", str(two_abilities), str(ended), *SETTINGS, *options])
    assert done.exit_code == 0, done.output
    for name in ("one", "two", "fit/inputs"):
        assert (ended / f"{name}.safetensors").read_bytes() == (whole / f"{name}.safetensors").read_bytes()
    assert not list(ended.glob("*.state"))


def stop_after(monkeypatch, count: int, error: BaseException) -> None:
    """The run ends with an error in its micro-batch number ``count``."""
    from mergekit_act.streaming.segments import SegmentedModel

    original, seen = SegmentedModel.normalise, []

    def normalise(self, ids, hidden, observer=None):
        seen.append(None)
        if len(seen) == 2 * count:  # both models' go through here, and the first probe
            raise error
        return original(self, ids, hidden, observer)

    monkeypatch.setattr(SegmentedModel, "normalise", normalise)


def test_changed_settings_are_named(two_abilities, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(patched, 5, OSError("No space left on device"))
        run = CliRunner().invoke(main, ["profile", str(two_abilities), str(out), *SETTINGS])
    assert run.exit_code == 1
    assert "No space left on device" in run.output
    assert [path.name for path in out.iterdir()] == ["profile.state"]
    state = (out / "profile.state").read_bytes()

    def refusal(*options: str) -> str:
        run = CliRunner().invoke(main, ["profile", str(two_abilities), str(out), *SETTINGS, *options])
        assert run.exit_code == 1
        assert (out / "profile.state").read_bytes() == state
        return run.output

    start = f"Error: {out}/profile.state keeps an unfinished run with other settings: "
    end = ". Go on with the settings it had, or say --overwrite to start anew\n"
    assert refusal("--batch-tokens", "31") == f"{start}batch_tokens was 30, is 31{end}"
    assert refusal("--dtype", "bfloat16") == f"{start}dtype was float32, is bfloat16{end}"
    text = two_abilities.read_text()
    two_abilities.write_text(text.replace("seed: 3", "seed: 4"))
    assert "abilities.two.seed was 3, is 4; abilities.two.fingerprint was " in refusal()
    lines = text.splitlines()
    two_abilities.write_text("\n".join([*lines[:3], lines[4], lines[3]]))
    assert refusal() == f"{start}order was ['one', 'two'], is ['two', 'one']{end}"
    two_abilities.write_text(text)
    monkeypatch.setattr("mergekit_act.versions.version", lambda name: "9.9")
    assert "versions.torch was " in refusal()
    monkeypatch.undo()
    (out / "profile.state").write_bytes(state[:100])
    run = CliRunner().invoke(main, ["profile", str(two_abilities), str(out), *SETTINGS])
    assert "is not the state of a run of this mergekit-act" in run.output
    run = CliRunner().invoke(main, ["profile", str(two_abilities), str(out), *SETTINGS, "--overwrite"])
    assert run.exit_code == 0, run.output
    assert not (out / "profile.state").exists()


def test_folders_that_cannot_be_written_are_told_first(two_abilities, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    run = CliRunner().invoke(main, ["profile", str(two_abilities), str(tmp_path / "file" / "out"), *SETTINGS])
    assert run.output == (
        f"Error: {tmp_path}/file is no folder; choose another output folder than {tmp_path}/file/out\n"
    )

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    run = CliRunner().invoke(main, ["profile", str(two_abilities), str(tmp_path / "out"), *SETTINGS])
    assert run.exit_code == 1
    assert (
        f"{tmp_path}/out/profile.state could not be written: No space left on device. Mend that and give the same command"
    ) in run.output
    assert not (tmp_path / "out").exists()


def test_profiles_of_others_are_not_replaced_by_a_run_that_goes_on(two_abilities, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(patched, 5, OSError("stop"))
        CliRunner().invoke(main, ["profile", str(two_abilities), str(out), *SETTINGS])
    (out / "two.safetensors").write_text("mine")
    run = CliRunner().invoke(main, ["profile", str(two_abilities), str(out), *SETTINGS])
    assert run.output == f"Error: {out}/two.safetensors exists. Choose another name or say --overwrite.\n"
    assert (out / "two.safetensors").read_text() == "mine"


def test_a_run_that_was_ended_while_it_wrote_profiles_writes_them(two_abilities, tmp_path, monkeypatch):
    from mergekit_act.profiling import run as runs

    out, saved = tmp_path / "out", runs.save_profile

    def save_one(profile, path, **options):
        if path.name == "two.safetensors":
            raise OSError("No space left on device")
        saved(profile, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "save_profile", save_one)
        CliRunner().invoke(main, ["profile", str(two_abilities), str(out), *SETTINGS])
    assert sorted(path.name for path in out.iterdir()) == ["one.safetensors", "profile.state"]
    first = (out / "one.safetensors").read_bytes()
    monkeypatch.setattr("mergekit_act.profiling.engine.ForwardEngine.run", None)  # nothing is computed again
    run = CliRunner().invoke(main, ["profile", str(two_abilities), str(out), *SETTINGS])
    assert run.exit_code == 0, run.output
    assert (out / "one.safetensors").read_bytes() == first
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "one.safetensors", "two.safetensors"]


@pytest.mark.parametrize("where", ["closing", "restoring"])
def test_an_interruption_between_chunks_counts_none_twice(pair_of, tmp_path, monkeypatch, where):
    """After a chunk is added up, and a second one while a broken chunk is taken back."""
    from mergekit_act.profiling.sums import ChannelSums
    from mergekit_act.streaming.hidden import HiddenStates

    pair = open_pair(*map(str, pair_of("qwen2")))
    abilities = [as_ability(random_samples(), "one")]
    settings = {"device": "cpu", "dtype": "float32", "batch_tokens": 31, "quiet": True}
    (expected,) = profile_pair(pair, abilities, ProfilingSettings(**settings))
    state = tmp_path / "run.state"
    close, seen = HiddenStates.close, []

    def interrupted(self):
        close(self)
        seen.append(None)
        if len(seen) == 3:
            raise KeyboardInterrupt

    def half_undone(self):
        def interrupted_undo():
            self.vector.zero_()
            raise KeyboardInterrupt

        return interrupted_undo

    with monkeypatch.context() as patched:
        if where == "closing":
            patched.setattr(HiddenStates, "close", interrupted)
        else:
            stop_after(patched, 4, KeyboardInterrupt())
            patched.setattr(ChannelSums, "remember", half_undone)
        with pytest.raises(KeyboardInterrupt):
            profile_pair(pair, abilities, ProfilingSettings(save_every=0, **settings), state=state)
    (went_on,) = profile_pair(pair, abilities, ProfilingSettings(**settings), state=state)
    assert all(torch.equal(expected.scores[module], went_on.scores[module]) for module in expected.scores)


def test_an_interrupted_call_from_python_keeps_its_state(pair_of, tmp_path, monkeypatch):
    pair = open_pair(*map(str, pair_of("mixtral")))
    abilities = [as_ability(random_samples(), "one"), as_ability(random_samples(1), "two")]
    settings = {"device": "cpu", "dtype": "float32", "batch_tokens": 31, "quiet": True}
    expected = profile_pair(pair, abilities, ProfilingSettings(**settings))
    state = tmp_path / "run.state"
    with monkeypatch.context() as patched:
        stop_after(patched, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match=r"run\.state keeps what is done"):
            profile_pair(pair, abilities, ProfilingSettings(**settings), state=state)
    went_on = profile_pair(pair, abilities, ProfilingSettings(**settings), state=state)
    for first, second in zip(expected, went_on, strict=True):
        assert all(torch.equal(first.scores[module], second.scores[module]) for module in first.scores)
        assert first.data == second.data  # the experts' tokens
    with pytest.raises(ValueError, match=r"run\.state keeps an unfinished run with other settings: batch_tokens was"):
        profile_pair(pair, abilities, ProfilingSettings(**settings | {"batch_tokens": 40}), state=state)
