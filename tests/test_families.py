"""Models as the Hub has them: multimodal checkpoints by text, gated layers, folders and references of all kinds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from merges import act_config, assert_merged, merged, random_mask, refusal, state_of
from oracle import plain_profile
from samples import as_ability, assert_close, random_samples
from tiny import SIZES, make_model, make_tokenizer

from mergekit_act.checkpoints import open_checkpoint
from mergekit_act.profiling import ProfilingSettings, open_pair, profile_pair

HEADS = {"head_dim": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
}
TOWER = ("model.vision_tower.*", "model.multi_modal_projector.*")
MULTIMODAL: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=SIZES | HEADS | {"sliding_window": 8},
            vision_config=VISION | {"image_size": 28},
            mm_tokens_per_image=4,
        )
    ),
    "mistral3": lambda: transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=SIZES | {"model_type": "mistral"},
            vision_config=VISION | HEADS | {"model_type": "pixtral", "image_size": 28},
        )
    ),
}


def save_random(model: Any, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MULTIMODAL)
def test_multimodal_checkpoints_are_profiled_by_text_and_merged(tmp_path, name):
    """Their files have other names than the model's parameters, and Gemma's others than mergekit expects."""
    torch.manual_seed(0)
    target, ability = (save_random(MULTIMODAL[name](), tmp_path / f"m{seed}", seed) for seed in (1, 2))
    assert next(iter(state_of(target))).startswith("language_model.model.")
    pair = open_pair(str(target), str(ability), exclude=TOWER)
    samples = random_samples()
    (profile,) = profile_pair(pair, [as_ability(samples)], ProfilingSettings(device="cpu", dtype="float32"))
    kind = transformers.AutoModelForImageTextToText
    states = []
    for folder in (target, ability):
        states.append(dict(kind.from_pretrained(folder, dtype=torch.float32).state_dict()))
    assert set(profile.scores) == set(pair.layout.modules)
    assert all(scores.min() > 0 for module, scores in profile.scores.items() if "norm" in module)

    mask = random_mask(target, ability, tmp_path / "m.safetensors", density=0.4)
    config = act_config(target, (ability, {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}))
    merged(config, tmp_path / "out")
    model, report = kind.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tied = bool(mask.layout.tied)
    assert_merged(dict(model.state_dict()), states[0], [(states[1], 0.4, mask)], tied=tied)


def test_norms_of_heads_that_are_one_dimension_with_the_positions(tmp_path):
    """Gated norms of linear attention, as Qwen3-Next and Qwen3.5 have them."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    linear |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
    config = transformers.Qwen3_5TextConfig(
        **SIZES, **HEADS, **linear, layer_types=["linear_attention", "full_attention"]
    )
    target, ability = (make_model(config, tmp_path / f"m{seed}", seed=seed) for seed in (1, 2))
    pair = open_pair(str(target), str(ability))
    norm = "model.layers.0.linear_attn.norm"
    assert norm in pair.layout.modules
    assert "model.layers.0.linear_attn.A_log" in pair.layout.without_channels()
    samples = random_samples()
    (profile,) = profile_pair(pair, [as_ability(samples)], ProfilingSettings(device="cpu", dtype="float32"))
    assert_close(profile.scores, plain_profile(target, ability, samples, pair.layout.modules))


# Folders and references


def test_folders_of_the_hubs_cache_are_named_by_repository_and_revision(pair_of, tmp_path):
    folder = tmp_path / "hub/models--some--one--x/snapshots" / ("1" * 40)
    shutil.copytree(pair_of("qwen2")[0], folder)
    described = open_checkpoint(str(folder)).describe()
    assert (described["model"], described["revision"]) == ("some/one/x", "1" * 40)
    described = open_checkpoint(str(pair_of("qwen2")[0])).describe()
    assert (described["model"], described["revision"]) == ("target", None)


def test_a_path_with_a_space(pair_of, tmp_path):
    folders = [shutil.copytree(folder, tmp_path / "my models" / folder.name) for folder in pair_of("qwen2")]
    mask = random_mask(*folders, tmp_path / "m.safetensors")
    config = act_config(folders[0], (folders[1], {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}))
    result = merged(config, tmp_path / "out")
    assert_merged(result, state_of(folders[0]), [(state_of(folders[1]), 0.4, mask)], tied=False)


def test_a_config_without_architectures(pair_of, tmp_path):
    target, ability = pair_of("llama")[0], tmp_path / "ability"
    shutil.copytree(pair_of("llama")[1], ability)
    config = json.loads((ability / "config.json").read_text())
    del config["architectures"]
    (ability / "config.json").write_text(json.dumps(config))
    random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    message = refusal(act_config(target, (ability, parameters)), tmp_path / "out")
    assert f'config.json of {ability} has no "architectures"' in message
    assert 'add "architectures": ["LlamaForCausalLM"]' in message


def test_two_sets_of_weights_in_one_folder(pair_of, tmp_path):
    """mergekit follows the index, Transformers takes the single file."""
    target, ability = pair_of("qwen2")
    model = transformers.AutoModelForCausalLM.from_pretrained(ability)
    model.save_pretrained(tmp_path / "both", max_shard_size="50KB")
    shutil.copy(ability / "model.safetensors", tmp_path / "both")
    with pytest.raises(
        ValueError, match=r"both holds two sets of weights: model\.safetensors, which Transformers takes"
    ):
        open_checkpoint(str(tmp_path / "both"))
    random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    message = refusal(act_config(target, (tmp_path / "both", parameters)), tmp_path / "out")
    assert "holds two sets of weights" in message
    (tmp_path / "both/model.safetensors").unlink()
    assert open_checkpoint(str(tmp_path / "both")).headers


@pytest.mark.parametrize("lost", ["index", "file"])
def test_an_index_that_does_not_fit_its_files(pair_of, tmp_path, lost):
    folder = tmp_path / "sharded"
    transformers.AutoModelForCausalLM.from_pretrained(pair_of("qwen2")[0]).save_pretrained(
        folder, max_shard_size="50KB"
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    if lost == "index":
        del index["weight_map"]["model.norm.weight"]
        words = 'has besides "model.norm.weight"'
    else:
        index["weight_map"]["model.nothing"] = index["weight_map"]["model.norm.weight"]
        words = 'has not "model.nothing"'
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        open_checkpoint(str(folder))
