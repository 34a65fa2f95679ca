"""Devices other than the CPU, on machines that have none.

Merges give the same bytes wherever mergekit is told to load, to compute and to keep tensors; there the other device is
PyTorch's ``meta``: a tensor that is moved there has lost its numbers, and cannot be written. Where there is a GPU, it is
CUDA. What runs models runs on one that stands in for an accelerator (``standin.py``).
"""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from mergekit import multigpu_executor
from merges import act_config, merged, random_mask, run_merge, state_of
from safetensors.torch import load_file, save_file
from test_adapters import train_adapter
from test_fit import inputs_of
from tiny import make_model, tiny_config
from torch.utils import backend_registration

from mergekit_act.artifacts import save_inputs
from mergekit_act.cli import main

ACCELERATOR = "cuda" if torch.cuda.is_available() else "meta"
ON = ("--device", ACCELERATOR)
FLAGS = {
    "device": ON,
    "low memory": (*ON, "--low-cpu-memory", "--lazy-unpickle"),
    "read to device": (*ON, "--low-cpu-memory", "--read-to-gpu"),
    "several devices": ("--multi-gpu",),
    "rich": (*ON, "--gpu-rich"),
    "written by others": (*ON, "--low-cpu-memory", "--async-write", "--write-threads", "2"),
    "clones in shards": (*ON, "--low-cpu-memory", "--clone-tensors", "--out-shard-size", "40K"),
    "several devices, in shards": ("--multi-gpu", "--out-shard-size", "40K"),
}


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """For ``--multi-gpu``: mergekit counts accelerators, and its workers use streams of CUDA."""
    if ACCELERATOR == "cuda":
        return
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_type", lambda: "meta")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_count", lambda: 2)
    device = SimpleNamespace(synchronize=lambda device: None)
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_module", lambda name: device)
    streams = SimpleNamespace(Stream=lambda device: None, stream=lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(multigpu_executor, "torch", SimpleNamespace(**vars(torch) | {"cuda": streams}))


@pytest.fixture
def config_of(pair_of, tmp_path):
    """Kind of merge -> its config."""

    def setting(target, *models, method="act", architecture=None, **top):
        parts = []
        for n, model in enumerate(models):
            mask = tmp_path / f"m{n}.safetensors"
            random_mask(target, architecture or model, mask, seed=n)
            parts.append((model, {"weight": 0.5, "mask": str(mask)}))
        return act_config(target, *parts, **{"merge_method": method} | top)

    def get(kind):
        target, ability = pair_of(
            {"experts": "qwen3_moe", "tied": "qwen2-tied", "both names": "qwen2-tied"}.get(kind, "qwen2")
        )
        if kind == "several models":
            return setting(target, ability, make_model(tiny_config("qwen2"), tmp_path / "third", seed=3))
        if kind == "fit":
            save_inputs(inputs_of(target, ability), tmp_path / "inputs.safetensors")
            config = setting(target, ability)
            config["models"][0]["parameters"]["fit"] = str(tmp_path / "inputs.safetensors")
            return config
        if kind == "pickles":
            folders = [tmp_path / folder.name for folder in (target, ability)]
            for folder, pickled in zip((target, ability), folders, strict=True):
                shutil.copytree(folder, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
                torch.save(state_of(folder), pickled / "pytorch_model.bin")
            return setting(*folders)
        if kind == "act_dare_linear":
            return setting(target, ability, method=kind, parameters={"density": 0.5})
        if kind == "adapter":
            train_adapter(target, tmp_path / "adapter", 1)
            config = setting(target, ability)
            config["models"][0]["model"] = f"{target}+{tmp_path / 'adapter'}"
            return config
        if kind in ("tokenizer", "cut"):
            short = make_model(tiny_config("qwen2", vocab_size=120), tmp_path / "short", seed=5)
            return setting(target, short, tokenizer={"source": "base"} if kind == "tokenizer" else None)
        if kind == "both names":
            for folder in (target, ability):
                path = Path(shutil.copytree(folder, tmp_path / folder.name)) / "model.safetensors"
                tensors = load_file(path)
                save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
            return setting(*(tmp_path / folder.name for folder in (target, ability)))
        method = "act_ties" if kind == "act_ties" else "act"
        return setting(target, ability, method=method, dtype="bfloat16" if kind == "dtype" else None)

    return get


@pytest.mark.parametrize(
    "kind",
    [
        *("act", "act_ties", "act_dare_linear", "tied", "both names", "several models", "experts", "adapter"),
        *("tokenizer", "cut", "dtype", "fit", "pickles"),
    ],
)
def test_same_bytes_with_all_flags(config_of, tmp_path, kind):
    config = config_of(kind)
    options = ["--random-seed", "0", "--lora-merge-cache", str(tmp_path / "cache")]
    options += ["--unsafe-truncate-embeddings"] if kind == "cut" else []
    expected = merged(config, tmp_path / "cpu", *options)
    for name, flags in FLAGS.items():
        result = merged(config, tmp_path / name, *options, *flags)
        assert set(result) == set(expected), name
        assert all(torch.equal(result[n].view(torch.uint8), t.view(torch.uint8)) for n, t in expected.items()), name
    indices = [(tmp_path / name / "model.safetensors.index.json").read_bytes() for name in FLAGS if "shards" in name]
    assert indices[0] == indices[1]  # the files are the same ones, too


@pytest.mark.skipif(ACCELERATOR == "cuda", reason="CUDA keeps the numbers")
def test_mergekit_moves_what_is_not_ours(pair_of, tmp_path):
    """Or the tests above could not fail: with a method of mergekit's own the numbers are lost."""
    target, ability = pair_of("qwen2")
    models = (ability, {"weight": 0.5})
    config = act_config(target, models, merge_method="task_arithmetic")
    for name in ("low memory", "rich"):
        result = run_merge(config, tmp_path / name, *FLAGS[name])
        assert isinstance(result.exception, (NotImplementedError, RuntimeError)), name


CRITERIA = ("activation", "local", "attribution")


@pytest.fixture(scope="module")
def ran(pair_of, sums_file, tmp_path_factory):
    """Folder of what was written (in it one for each device), and of each command what crossed to and from standin."""
    root = tmp_path_factory.mktemp("ran")
    target, ability = pair_of("qwen2")

    def abilities(architecture, samples):
        models = dict(zip(("target", "ability_model"), map(str, pair_of(architecture)), strict=True))
        own = {"prompt": "q", "answer": "a", "samples": samples, "evaluate": {"samples": samples, "offset": 10}}
        path = root / f"{architecture}-{samples}.yml"
        path.write_text(json.dumps(models | {"abilities": {"sums": {"dataset": str(sums_file), **own}}}))
        return path

    def commands(device):
        on, out = ("--device", device), root / device
        wide = (*on, "--dtype", "float32")
        found = {}
        for name in ("qwen2", "qwen3_moe"):
            for criterion in CRITERIA:
                place = out / f"{name} {criterion}"
                found[place.name] = ("profile", abilities(name, 10), place, "--criterion", criterion, *wide)
        for criterion in CRITERIA:  # in batches of some samples
            for samples in (10, 4):
                place = out / f"{samples} {criterion}"
                on_samples = ("--criterion", criterion, "--batch-tokens", "20", *wide)
                found[place.name] = ("profile", abilities("qwen2", samples), place, *on_samples)
        little = ("--batch-tokens", "64", *(() if device == "cpu" else ("--memory-budget", "1.33MB")))
        found["streamed"] = ("profile", abilities("qwen2", 10), out / "streamed", *little, *wide)
        for name, samples in (("evaluate", 10), ("evaluate few", 4)):
            held_out = ("--abilities", abilities("qwen2", samples), "--json", out / f"{name}.json", "--no-generate")
            held_out += ("--batch-tokens", "20")
            found[name] = ("evaluate", target, *held_out, *wide)
        mask = {"mask": str(root / "cpu" / "qwen2 activation" / "sums.safetensors"), "mask_density": 0.2}
        (root / "merge.yml").write_text(json.dumps(act_config(target, (ability, {"weight": 1.0, **mask}))))
        grid = ("--density", "0.2", "--weight", "0.5", "--weight", "1", "--no-generate")
        found["sweep"] = ("sweep", root / "merge.yml", abilities("qwen2", 10), out / "sweep", *grid, *on)
        return {name: list(map(str, command)) for name, command in found.items()}

    if not (torch.cuda.is_available() or hasattr(backend_registration, "_setup_privateuseone_for_python_backend")):
        pytest.skip("this PyTorch makes no devices in Python")
    for command in commands("cpu").values():
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, (result.output, result.exception)
    mine = commands("standin")
    (root / "commands.json").write_text(json.dumps(list(mine.values())))
    script = Path(__file__).with_name("on_a_device.py")
    done = subprocess.run([sys.executable, script, root / "commands.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, dict(zip(mine, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_profiles_on_a_device(ran):
    root, crossed = ran
    profiled = [name for name in crossed if (root / "cpu" / name / "sums.safetensors").exists()]
    assert len(profiled) == 13
    for name in profiled:
        expected, found = (load_file(root / device / name / "sums.safetensors") for device in ("cpu", "standin"))
        assert set(found) == set(expected)
        for module, scores in expected.items():
            torch.testing.assert_close(found[module], scores, rtol=1e-4, atol=1e-7)


def test_scores_on_a_device(ran):
    root, _ = ran
    mine, theirs = (json.loads((root / d / "evaluate.json").read_text())["results"][0] for d in ("standin", "cpu"))
    assert mine["nll"]["value"] == pytest.approx(theirs["nll"]["value"])
    mine, theirs = ([*csv.DictReader((root / d / "sweep" / "sweep.csv").open())] for d in ("standin", "cpu"))
    assert [row["channels"] for row in mine] == [row["channels"] for row in theirs] == ["0", "153", "153"]
    losses = [float(row["nll:sums"]) for row in theirs]
    assert [float(row["nll:sums"]) for row in mine] == pytest.approx(losses)
    assert len(set(losses)) == 3


def test_what_crosses(ran, pair_of):
    """Models once, of a sweep's points the selected rows; back come results, nothing for every module or token."""
    _, crossed = ran
    for name in ("qwen2", "qwen3_moe"):
        models = sum((folder / "model.safetensors").stat().st_size for folder in pair_of(name))
        for criterion in CRITERIA:
            one = crossed[f"{name} {criterion}"]
            assert 0.9 * models < one["bytes_in"] < 1.1 * models
            assert one["bytes_out"] < 0.15 * models
    # A micro-batch, here a sample, brings its tokens and takes back whether all is finite, or losses; Transformers asks
    # besides, up to twice a forward, whether sequences are packed.
    pairs = {"evaluate": "evaluate few"} | {f"10 {criterion}": f"4 {criterion}" for criterion in CRITERIA}
    for many, few in pairs.items():
        for copies in ("copies_in", "copies_out"):
            assert crossed[many][copies] - crossed[few][copies] <= 6 * 5, (many, copies)
    model = (pair_of("qwen2")[0] / "model.safetensors").stat().st_size
    assert crossed["streamed"]["bytes_in"] > 4 * model  # or nothing was streamed
    assert (
        crossed["sweep"]["bytes_in"] < crossed["evaluate"]["bytes_in"] + 0.2 * model
    )  # three evaluations' samples too
