"""Every file in example_configs/ is validated or run, with tiny models in place of the big ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
import yaml
from click.testing import CliRunner
from hub import run_there
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml
from merges import random_mask, state_of
from oracle import plain_merge
from samples import as_ability, random_samples
from tiny import make_model, make_vision_language_model, tiny_config

from mergekit_act.abilities import load_abilities
from mergekit_act.artifacts import load_mask, save_inputs, save_profile
from mergekit_act.cli import main
from mergekit_act.merging import load_mask_files
from mergekit_act.profiling import ProfilingSettings, open_pair, profile_without_data
from mergekit_act.profiling.scoring import measure_pair

EXAMPLES = Path(__file__).parent.parent / "example_configs"
ABILITIES = sorted(EXAMPLES.glob("abilities*.yml"))
MERGES = sorted(set(EXAMPLES.glob("*.yml")) - set(ABILITIES))
KINDS = {"act-tied": "qwen2-tied", "act-experts": "qwen3_moe"}


@pytest.mark.parametrize("path", ABILITIES, ids=lambda path: path.name)
def test_abilities_files_are_valid(path):
    roles = {name: ability.role for name, ability in load_abilities(path).abilities.items()}
    assert "recover" in roles.values()
    assert list(roles) == list(yaml.safe_load(path.read_text(encoding="utf-8"))["abilities"])


def make_example_folder(name: str, folder: Path) -> list[Path]:
    """The models, masks and profiles that an example names."""
    if name == "act-vision-language":
        models = [make_vision_language_model(folder / f"m{i}", seed=i) for i in range(2)]
    else:
        short = {1: {"vocab_size": 120}} if name == "act-vocabulary" else {}
        models = [
            make_model(tiny_config(KINDS.get(name, "qwen2"), **short.get(i, {})), folder / f"m{i}", seed=i)
            for i in range(3)
        ]
    if name == "act-lora":
        model = transformers.AutoModelForCausalLM.from_pretrained(models[0])
        settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        peft.get_peft_model(model, settings).save_pretrained(folder / "lora")
    exclude = ["model.visual.*"] if name == "act-vision-language" else []
    for i, mask in enumerate(("science", "code")):
        random_mask(
            models[0], models[1], folder / "masks" / f"{mask}.safetensors", density=0.5, seed=i, exclude=exclude
        )
    if name == "act-profiles":
        pair = open_pair(str(models[0]), str(models[1]))
        for i, profile in enumerate(("science-en", "science-ar", "history-en")):
            save_profile(
                profile_without_data(pair, "random", random_seed=i), folder / f"profiles/{profile}.safetensors"
            )
    if name == "act-fit":
        pair = open_pair(str(models[0]), str(models[1]))
        abilities = [as_ability(random_samples(i), role) for i, role in enumerate(("recover", "keep"))]
        settings = ProfilingSettings(device="cpu", dtype="float32")
        inputs = measure_pair(pair, abilities, settings, roles={role: role for role in ("recover", "keep")})[1]
        save_inputs(inputs, folder / "profiles/fit/inputs.safetensors")
    return models


def with_tiny_models(config: Any, models: list[Path], names: dict[str, str]) -> Any:
    """The config with its models replaced, in the order in which they come: the base is the first."""
    if isinstance(config, list):
        return [with_tiny_models(item, models, names) for item in config]
    if not isinstance(config, dict):
        return config
    found = {}
    for key in sorted(config, key=lambda key: key != "base_model"):
        value = config[key]
        if key in ("base_model", "model") and value != "with-science":
            if "+" in value:
                value = f"{models[0]}+{models[0].parent / 'lora'}"
            elif value not in names:
                names[value] = str(models[len(names)]) + ("/model.safetensors" * value.endswith(".safetensors"))
            found[key] = names.get(value, value)
        else:
            found[key] = with_tiny_models(value, models, names)
    return found


@pytest.mark.parametrize("path", [path for path in MERGES if "hub" not in path.name], ids=lambda path: path.name)
def test_merge_configs_run(path, tmp_path, monkeypatch):
    models = make_example_folder(path.stem, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, str] = {}
    documents = [with_tiny_models(config, models, names) for config in yaml.safe_load_all(path.read_text())]
    for config in documents:
        config["dtype"] = "float32"
        config.pop("out_dtype", None)
    Path("c.yml").write_text(yaml.safe_dump_all(documents))
    command, arguments = mergekit_yaml, ["out", "--quiet", "--lora-merge-cache", "cache"]
    if path.stem == "act-multi":
        command, arguments = (
            mergekit_multi,
            ["--out-path", "out", "--intermediate-dir", str(tmp_path / "steps"), "--quiet"],
        )
    elif path.stem == "act-pytorch":
        command, arguments = mergekit_pytorch, ["out"]
    else:
        checked = CliRunner().invoke(main, ["check", "c.yml", "--lora-merge-cache", "cache"])
        assert checked.exit_code == 0, (checked.output, checked.exception)
    run = CliRunner().invoke(command, ["c.yml", *arguments])
    assert run.exit_code == 0, (run.output, run.exception)
    target, result = state_of(models[0]), state_of(Path("out"))
    changed = {name for name in target if name in result and not result[name].equal(target[name][: len(result[name])])}
    assert changed
    if path.stem in ("act", "act-several-models", "act-profiles"):
        settings = [model["parameters"] for model in documents[0]["models"]]
        masks = [load_mask_files(setting["mask"], setting.get("mask_density")) for setting in settings]
        selected = {name for mask in masks for module in mask.channels for name, _ in mask.layout.parameters[module]}
        assert changed == selected
    if path.stem in ("act", "act-pytorch"):
        mask = load_mask("masks/science.safetensors")
        expected = plain_merge(target, [(state_of(models[1]), 0.4, mask)], tied=False)
        for name, tensor in expected.items():
            assert result[name].allclose(tensor, rtol=3e-7, atol=1e-8)


def test_the_mask_from_the_hub(tmp_path):
    models = make_example_folder("act-hub-mask", tmp_path)
    (tmp_path / "hub" / "someone").mkdir(parents=True)
    (tmp_path / "masks").rename(tmp_path / "hub" / "someone" / "masks")
    config = with_tiny_models(yaml.safe_load((EXAMPLES / "act-hub-mask.yml").read_text()), models, {})
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    done, asked = run_there(tmp_path, str(Path(sys.executable).parent / "mergekit-yaml"), "c.yml", "out", "--quiet")
    assert done.returncode == 0, (done.stderr[-2000:], asked)
    mask = load_mask(tmp_path / "hub" / "someone" / "masks" / "science.safetensors")
    narrow = [{name: tensor.bfloat16() for name, tensor in state_of(folder).items()} for folder in models[:2]]
    expected = plain_merge(narrow[0], [(narrow[1], 0.4, mask)], tied=False)
    assert all(tensor.equal(expected[name]) for name, tensor in state_of(tmp_path / "out").items())
