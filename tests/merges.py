"""Merges as users run them, and what they give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from oracle import plain_merge
from safetensors.torch import load_file, save_file

from mergekit_act.artifacts import Mask, load_mask, save_mask
from mergekit_act.cli import main
from mergekit_act.profiling import open_pair, profile_without_data
from mergekit_act.selection import make_mask


def run_merge(config: dict[str, Any], out: Path, *options: str):
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(config))
    return CliRunner().invoke(mergekit_yaml, [str(path), str(out), "--quiet", *options])


def check(config, folder: Path, *options: str):
    path = folder / "check.yml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return CliRunner().invoke(main, ["check", str(path), *options])


def merged(config: dict[str, Any], out: Path, *options: str) -> dict[str, torch.Tensor]:
    result = run_merge(config, out, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return state_of(out)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def refusal(config: dict[str, Any], out: Path, *options: str) -> str:
    result = run_merge(config, out, *options)
    assert result.exit_code == 1
    assert not out.exists() or not list(out.glob("*.safetensors"))
    assert result.output.startswith("Error: "), (result.output, result.exception)
    return result.output


def act_config(target: Path, *models: tuple[Path, dict[str, Any]], **top: Any) -> dict[str, Any]:
    return {
        "merge_method": "act",
        "base_model": str(target),
        "models": [{"model": str(model), "parameters": parameters} for model, parameters in models],
        **top,
    }


def random_mask(
    target: Path, ability: Path, path: Path, *, density: float = 0.3, seed: int = 0, **options: Any
) -> Mask:
    """A mask of random channels; every kind of module is in it."""
    profile = profile_without_data(open_pair(str(target), str(ability)), "random", random_seed=seed)
    save_mask(make_mask([profile], density, **options), path)
    return load_mask(path)


def assert_merged(result, target, others, *, tied: bool) -> None:
    """Bit for bit outside the masks, to the last rounding inside."""
    expected = plain_merge(target, others, tied=tied)
    assert set(result) == set(target)
    for name, tensor in expected.items():
        assert result[name].dtype == tensor.dtype
        changed = tensor != target[name]
        assert torch.equal(result[name][~changed].view(torch.uint8), target[name][~changed].view(torch.uint8)), name
        torch.testing.assert_close(
            result[name], tensor, rtol=3e-7 if tensor.dtype == torch.float32 else 1e-2, atol=1e-8
        )


def summary(config, folder: Path, *options: str) -> dict:
    result = check(config, folder, "--json", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def copy_with(folder: Path, to: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with tensors added, replaced or (None) removed."""
    shutil.copytree(folder, to)
    state = {**state_of(folder), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    kept = {name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    return to
