"""Several processes that share the samples, started as users start them."""

from __future__ import annotations

import subprocess
import sys

import torch
from safetensors import safe_open

from mergekit_act.abilities import load_abilities
from mergekit_act.artifacts import load_inputs, load_profile
from mergekit_act.profiling import ProfilingSettings, write_profiles

DIES = """
import os, sys
from mergekit_act.cli import main
from mergekit_act.streaming.segments import SegmentedModel
original, seen = SegmentedModel.normalise, []
def normalise(self, *arguments):
    seen.append(None)
    if os.environ["RANK"] == "1" and len(seen) > 9:
        os.kill(os.getpid(), 9)
    return original(self, *arguments)
SegmentedModel.normalise = normalise
main()
"""


def torchrun(count: int, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)


def test_processes_share_the_samples_and_one_may_have_none(two_abilities, tmp_path):
    """Two micro-batches, one per ability, for three processes."""
    settings = ["--dtype", "float32", "--batch-tokens", "4096"]
    done = torchrun(3, "-m", "mergekit_act", "profile", two_abilities, tmp_path / "many", *settings)
    assert done.returncode == 0, done.stderr
    names = ["one.safetensors", "two.safetensors"]
    told = [word for word in done.stdout.split() if word.startswith(str(tmp_path))]  # older PyTorch tells of ranks, too
    assert told == [f"{tmp_path}/many/{name}" for name in names]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["README.md", *names]
    write_profiles(load_abilities(two_abilities), tmp_path / "alone", ProfilingSettings(dtype="float32", quiet=True))
    for name in names:
        many, alone = (load_profile(tmp_path / folder / name) for folder in ("many", "alone"))
        for module, scores in alone.scores.items():
            torch.testing.assert_close(many.scores[module], scores, rtol=1e-5, atol=1e-7)
        assert (many.samples, many.answer_tokens, many.data) == (alone.samples, alone.answer_tokens, alone.data)


def test_processes_share_attribution_and_inputs(two_abilities, tmp_path):
    options = ["--criterion", "attribution", "--inputs", "--dtype", "float32", "--batch-tokens", "400"]
    done = torchrun(2, "-m", "mergekit_act", "profile", two_abilities, tmp_path / "many", *options)
    assert done.returncode == 0, done.stderr
    settings = {"criterion": "attribution", "inputs": True, "dtype": "float32", "batch_tokens": 400, "quiet": True}
    write_profiles(load_abilities(two_abilities), tmp_path / "alone", ProfilingSettings(**settings))
    many, alone = (load_profile(tmp_path / folder / "one.safetensors") for folder in ("many", "alone"))
    for ours, theirs in ((many.scores, alone.scores), (many.damage, alone.damage)):
        for module, values in theirs.items():
            torch.testing.assert_close(ours[module], values, rtol=1e-4, atol=1e-6 * float(values.abs().max()))
    many, alone = (load_inputs(tmp_path / folder / "fit/inputs.safetensors") for folder in ("many", "alone"))
    assert (many.roles, many.sources) == (alone.roles, alone.sources)
    assert all(torch.equal(many.rows(name), alone.rows(name)) for name in alone.tensors)


def test_a_process_that_dies_ends_the_run_without_a_profile(two_abilities, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    settings = ["--dtype", "float32", "--batch-tokens", "60", "--save-every", "0"]
    command = ["profile", two_abilities, tmp_path / "out", *settings]
    done = torchrun(2, tmp_path / "dies.py", *command)
    assert done.returncode != 0
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with safe_open(tmp_path / "out" / "profile-1-of-2.state", framework="pt") as file:
        assert '"processes": 2' in file.metadata()["mergekit_act"]
    refused = subprocess.run([sys.executable, "-m", "mergekit_act", *map(str, command)], capture_output=True, text=True)
    assert "other settings: processes was 2, is 1" in refused.stderr
    done = torchrun(2, "-m", "mergekit_act", *command)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "one.safetensors",
        "two.safetensors",
    ]
    write_profiles(
        load_abilities(two_abilities),
        tmp_path / "alone",
        ProfilingSettings(dtype="float32", batch_tokens=60, quiet=True),
    )
    for name in ("one", "two"):
        many, alone = (load_profile(tmp_path / folder / f"{name}.safetensors") for folder in ("out", "alone"))
        for module, scores in alone.scores.items():
            torch.testing.assert_close(many.scores[module], scores, rtol=1e-5, atol=1e-7)
