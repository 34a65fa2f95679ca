"""Adapters and caches: what is used is made from what is there now; how models and adapters are written."""

from __future__ import annotations

import json
import os
import shutil

import peft
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from merges import act_config, assert_merged, merged, random_mask, refusal, state_of

from mergekit_act.artifacts import save_mask
from mergekit_act.checkpoints import merged_model, open_checkpoint, parse_reference, read_config
from mergekit_act.cli import main
from mergekit_act.merging import load_mask_files


def train_adapter(base, folder, seed):
    """Save an adapter; returns the weights of the model that it is merged into."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=4, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in adapted.merge_and_unload().state_dict().items()}


def opened(base, adapter, cache):
    return open_checkpoint(f"{base}+{adapter}", lora_merge_cache=str(cache))


def assert_equal(state, expected):
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_an_adapter_that_is_trained_again_is_merged_again(pair_of, tmp_path, caplog):
    base, adapter, cache = tmp_path / "base", tmp_path / "adapter", tmp_path / "cache"
    shutil.copytree(pair_of("qwen2")[0], base)
    first = train_adapter(base, adapter, 1)
    folder = opened(base, adapter, cache).folder
    assert_equal(state_of(folder), first)
    made = (folder / "model.safetensors").stat().st_ino
    assert opened(base, adapter, cache).folder == folder
    assert (folder / "model.safetensors").stat().st_ino == made
    assert "is made anew" not in caplog.text

    second = train_adapter(base, adapter, 2)
    assert_equal(state_of(opened(base, adapter, cache).folder), second)
    assert caplog.text.count("is made anew") == 1
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {folder.name}

    # The base changes, the adapter stays.
    shutil.copy(pair_of("qwen2")[1] / "model.safetensors", base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert_equal({name: state_of(opened(base, adapter, cache).folder)[name]}, state_of(base))


def test_a_model_that_was_half_merged_is_merged_again(pair_of, tmp_path):
    base, adapter, cache = pair_of("qwen2")[0], tmp_path / "adapter", tmp_path / "cache"
    expected = train_adapter(base, adapter, 1)
    kept = merged_model(parse_reference(f"{base}+{adapter}"), str(cache))
    kept.folder.mkdir(parents=True)  # as mergekit leaves it when it is killed
    (kept.folder / "config.json").write_text("{}")
    (cache / f".{kept.folder.name}.unfinished" / "half").mkdir(parents=True)
    assert not kept.is_current()
    assert_equal(state_of(opened(base, adapter, cache).folder), expected)
    assert kept.is_current()
    assert not [path for path in cache.iterdir() if path.name.endswith("unfinished")]


def test_merges_and_checks_see_an_adapter_as_it_is(pair_of, tmp_path):
    """The same process merges twice: mergekit keeps the loaders of the first merge."""
    target, adapter = pair_of("qwen2")[0], tmp_path / "adapter"
    train_adapter(target, adapter, 1)
    mask = random_mask(*pair_of("qwen2"), tmp_path / "m.safetensors")
    config = act_config(target, (target, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    config["models"][0]["model"] = f"{target}+{adapter}"
    options = ["--lora-merge-cache", str(tmp_path / "cache")]
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))

    def remarks():
        result = CliRunner().invoke(main, ["check", "--json", *options, str(tmp_path / "c.yml")])
        return json.loads(result.stdout)["remarks"]

    first = [f"{target}+{adapter} is merged with its LoRA first"]
    assert remarks() == first
    for seed in (1, 2):
        expected = train_adapter(target, adapter, seed)
        assert remarks() == first
        result = merged(config, tmp_path / f"out{seed}", *options)
        assert_merged(result, state_of(target), [(expected, 0.5, mask)], tied=False)
        assert first[0] not in remarks()


def test_a_model_that_is_written_again_is_read_again(pair_of, tmp_path):
    """mergekit's loaders live as long as the process; they know in which file a tensor was."""
    target, ability = pair_of("qwen2")
    model = tmp_path / "model"
    shutil.copytree(ability, model)
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (model, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    merged(config, tmp_path / "one")
    (model / "model.safetensors").unlink()
    transformers.AutoModelForCausalLM.from_pretrained(target).save_pretrained(model, max_shard_size="60KB")
    assert_merged(merged(config, tmp_path / "two"), state_of(target), [(state_of(model), 0.5, mask)], tied=False)


def test_a_mask_that_is_written_again_is_read_again(pair_of, tmp_path):
    path = tmp_path / "m.safetensors"
    random_mask(*pair_of("qwen2"), path, seed=1)
    load_mask_files(str(path), None)
    date = path.stat()
    other = random_mask(*pair_of("qwen2"), tmp_path / "other.safetensors", seed=2)
    save_mask(other, path, overwrite=True)
    os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))  # as files are copied with their dates
    found = load_mask_files(str(path), None).channels
    assert all(torch.equal(found[module], channels) for module, channels in other.channels.items())


@pytest.mark.parametrize("command", ["channels", "evaluate", "finetune", "profile"])
def test_an_adapter_alone_is_told_to_be_written_behind_its_base(pair_of, tmp_path, abilities_yml, sums_file, command):
    target, _ = pair_of("qwen2")
    adapter = tmp_path / "adapter"
    train_adapter(target, adapter, 1)
    # The abilities file names it as its target too, whose tokenizer is what is loaded first.
    file = abilities_yml(adapter, adapter, sums_file, ability_keys="    prompt: q\n    answer: a\n")
    arguments = {
        "channels": [adapter],
        "evaluate": [adapter, "--abilities", file],
        "finetune": [adapter, file, tmp_path / "out"],
        "profile": [file, tmp_path / "out"],
    }
    done = CliRunner().invoke(main, [command, *map(str, arguments[command])])
    assert done.exit_code == 1
    assert f'{adapter} is an adapter (LoRA), no model; write "{target}+{adapter}"' in done.output


def test_an_adapter_alone_in_a_merge_config(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    train_adapter(target, tmp_path / "adapter", 1)
    random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (tmp_path / "adapter", {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    assert f'write "{target}+{tmp_path / "adapter"}", its base model in front' in refusal(config, tmp_path / "out")


def test_how_references_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "c++", "it@home", "lora", "lo+ra"):
        (tmp_path / name).mkdir()

    def parts(reference):
        parsed = parse_reference(reference)
        lora = parsed.lora and (parsed.lora.path, parsed.lora.revision)
        return (parsed.model.path, parsed.model.revision), lora

    assert parts("someone/model") == (("someone/model", None), None)
    assert parts("someone/model@v1+other/lora@v2") == (("someone/model", "v1"), ("other/lora", "v2"))
    assert parts("base+lora") == (("base", None), ("lora", None))
    assert parts("c++") == (("c++", None), None)
    assert parts("./it@home") == (("./it@home", None), None)
    assert parts("./it@home+lora") == (("./it@home", None), ("lora", None))
    assert parts("c+++./lo+ra") == (("c++", None), ("./lo+ra", None))
    with pytest.raises(ValueError, match=r'"a\+b\+c" cannot be parsed; expected MODEL or MODEL\+LORA'):
        parse_reference("a+b+c")
    with pytest.raises(ValueError, match='"a@b@c" is no model; expected a path, or a Hub id with at most one @'):
        parse_reference("a@b@c")


def test_a_folder_with_a_plus_in_its_name(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    model = tmp_path / "maths+code"
    shutil.copytree(ability, model)
    assert read_config(str(model)).model_type == "qwen2"
    assert open_checkpoint(str(model)).folder == model
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (model, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    told = refusal(config, tmp_path / "out", "--lora-merge-cache", str(tmp_path / "cache"))
    assert f'"{model}" is a folder, but mergekit takes what stands behind "+" for a LoRA' in told
    written = yaml.safe_load(told.partition("mapping, ")[2].partition(", or rename")[0])
    config["models"][0]["model"] = written
    result = merged(config, tmp_path / "out")
    assert_merged(result, state_of(target), [(state_of(ability), 0.5, mask)], tied=False)
