"""Every file in example_configs/ is validated or run, with tiny models in place of the big ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import make_model, tiny_config
from oracle import plain_merge
from test_merging import merged, random_mask, state_of

from mergekit_act.abilities import load_abilities
from mergekit_act.artifacts import load_mask, save_profile
from mergekit_act.merging import load_mask_files
from mergekit_act.profiling import open_pair, profile_without_data

EXAMPLES = Path(__file__).parent.parent / "example_configs"
ABILITIES = sorted(EXAMPLES.glob("abilities*.yml"))
MERGES = sorted(set(EXAMPLES.glob("*.yml")) - set(ABILITIES))


@pytest.mark.parametrize("path", ABILITIES, ids=lambda path: path.name)
def test_abilities_files_are_valid(path):
    assert load_abilities(path).abilities


@pytest.fixture
def example_folder(tmp_path, monkeypatch):
    """A working directory with the models, masks and profiles that the examples name."""
    models = [make_model(tiny_config("qwen2"), tmp_path / name, seed=i) for i, name in enumerate(("base", "m0", "m1"))]
    for name in ("science", "code"):
        random_mask(models[0], models[1], tmp_path / "masks" / f"{name}.safetensors", density=0.5, seed=len(name))
    pair = open_pair(str(models[0]), str(models[1]))
    for i, name in enumerate(("science-en", "science-ar", "history-en")):
        save_profile(profile_without_data(pair, "random", random_seed=i), tmp_path / "profiles" / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return models


@pytest.mark.parametrize("path", MERGES, ids=lambda path: path.name)
def test_merge_configs_run(path, example_folder, tmp_path):
    config = yaml.safe_load(path.read_text())
    config["base_model"] = str(example_folder[0])
    config["dtype"] = "float32"
    for model, folder in zip(config["models"], example_folder[1:], strict=False):
        model["model"] = str(folder)
    result = merged(config, tmp_path / "out")
    target = state_of(example_folder[0])
    changed = {name for name in target if (result[name] != target[name]).any()}
    masks = [
        load_mask_files(model["parameters"]["mask"], model["parameters"].get("mask_density"))
        for model in config["models"]
    ]
    selected = {name for mask in masks for module in mask.channels for name, _ in mask.layout.parameters[module]}
    assert changed == selected
    if path.name == "act.yml":
        mask = load_mask("masks/science.safetensors")
        expected = plain_merge(target, [(state_of(example_folder[1]), 0.4, mask)], tied=False)
        for name, tensor in expected.items():
            assert result[name].allclose(tensor, rtol=3e-7, atol=1e-8)
