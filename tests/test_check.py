"""mergekit-act check: what a merge would do, from headers alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from hub import run_there
from merges import act_config, check, copy_with, merged, random_mask, state_of, summary
from safetensors.torch import save_file
from tiny import make_model, tiny_config

from mergekit_act.cli import main


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "gpt2", "qwen3_moe"])
def test_the_counts_are_the_masks_and_the_outputs(pair_of, tmp_path, name):
    target, ability = pair_of(name)
    mask = random_mask(target, ability, tmp_path / "m.safetensors", density=0.2)
    config = act_config(target, (ability, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}), dtype="bfloat16")
    found = summary(config, tmp_path)
    assert (found["selected"], found["channels"]) == (mask.counts["channels"], mask.counts["channels_total"])
    kinds = {kind["kind"]: kind for kind in found["kinds"]}
    assert sum(kind["moved"] for kind in kinds.values()) == mask.counts["parameters"]
    assert sum(kind["parameters"] for kind in kinds.values()) == mask.counts["parameters_total"]

    result = merged(config, tmp_path / "out")
    assert found["bytes_written"] == sum(tensor.nbytes for tensor in result.values())
    before = transformers.AutoModelForCausalLM.from_pretrained(target).state_dict()
    changed = {key for key in result if not torch.equal(result[key], before[key].bfloat16())}
    for key in result:
        kind = kinds[next(k for k in kinds if k.replace("*", "0") == key.replace(".1.", ".0."))]
        assert kind["has_channels"]
        assert (key in changed) <= (kind["transferred"] > 0)
    assert sum(kind["transferred"] for kind in kinds.values()) == len(changed)


def test_on_the_terminal(pair_of, tmp_path):
    target, ability = pair_of("gpt_oss")
    random_mask(target, ability, tmp_path / "m.safetensors", density=0.2, exclude=["model.norm"])
    config = act_config(target, (ability, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    result = check(config, tmp_path)
    assert result.exit_code == 0, (result.output, result.exception)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in result.output.splitlines() if line}
    assert lines["act"] == f"into {target}"
    assert lines["model.norm.weight"] == "1 0 32 copied"
    assert lines["model.layers.*.self_attn.sinks"] == "2 0 8 no channels: copied"
    assert lines["model.layers.*.mlp.experts.down_proj"].startswith("2 2 12,288 ")
    assert "kB written" in result.output


def test_no_weights_are_read(pair_of, tmp_path):
    """Files with holes where their weights were will do."""
    folders = []
    for folder in pair_of("qwen2"):
        shutil.copytree(folder, tmp_path / folder.name)
        folders.append(tmp_path / folder.name)
    random_mask(*folders, tmp_path / "m.safetensors")
    for folder in folders:
        file = folder / "model.safetensors"
        size, start = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], "little")
        os.truncate(file, start)
        os.truncate(file, size)
    config = act_config(folders[0], (folders[1], {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    found = summary(config, tmp_path)
    assert found["selected"]
    assert any("another pair" in remark for remark in found["remarks"])  # fingerprints see the ends of the files


def test_problems_make_it_fail_and_are_listed(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    config = act_config(target, (ability, {"wieght": 0.5, "mask": "none.safetensors"}))
    result = check(config, tmp_path)
    assert result.exit_code == 1
    assert 'has no parameter "wieght" (did you mean "weight"?)' in result.output
    result = check(config, tmp_path, "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["problems"]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "merge_method: linear\nmodels: [{model: a}]\n",
            'uses merge_method "linear"; mergekit-act does not check it (expected act, act_breadcrumbs',
        ),
        ("merge_method: act_tie\nmodels: [{model: a}]\n", 'did you mean "act_ties"?'),
        ("merge_method: act\nbase_model: ./nope\nmodels: [{model: ./nope}]\n", "./nope does not exist"),
        ("merge_method: [\n", "is no merge config"),
        (
            "merge_method: act\nmodels: [{model: a, parameters: {mask: null}}]\n",
            "is no merge config: models.0.parameters.mask is null; give it a value or leave it out",
        ),
        (
            "merge_method: act\nmodels: [{model: a, parameters: {weight: {a: b}}}]\n",
            "models.0.parameters.weight is nothing that a parameter can be; expected a number",
        ),
        ("merge_method: act\nslices: 5\n", "is no merge config: slices: Input should be a valid list, got 5"),
        ("a: 1\n---\nb: 2\n", "holds several configs"),
        ("merge_method: act\nmodls: []\n", "is no merge config"),
    ],
)
def test_what_is_no_config_of_ours(tmp_path, text, words):
    result = check(text, tmp_path)
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output


def test_what_mergekit_passes_over_in_silence_is_told(pair_of, tmp_path, monkeypatch):
    for name, folder in zip(("t", "a"), pair_of("qwen2"), strict=True):
        shutil.copytree(folder, tmp_path / "models" / name)
    monkeypatch.chdir(tmp_path)
    random_mask(Path("./models/t"), Path("./models/a"), tmp_path / "m.safetensors")
    config = act_config(Path("models/t"), (Path("models/a"), {"weight": 0.0, "mask": "m.safetensors"}), dtpye="float32")
    told = summary(config, tmp_path)["remarks"]
    assert 'mergekit ignores the key "dtpye"' in told
    assert any('"models/a" could be a Hub id' in remark for remark in told)
    assert any("nothing will be moved" in remark for remark in told)


def test_a_list_of_masks_is_no_union(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    random_mask(target, ability, tmp_path / "m.safetensors")
    masks = [str(tmp_path / "m.safetensors")] * 2
    result = check(act_config(target, (ability, {"weight": 0.5, "mask": masks})), tmp_path)
    assert result.exit_code == 1
    assert f'separated by commas: "{masks[0]}, {masks[0]}"' in result.output


def test_slices_beyond_the_last_layer(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    sources = [
        {"model": str(target), "layer_range": [1, 3]},
        {"model": str(ability), "layer_range": [1, 3], "parameters": parameters},
    ]
    result = check({"merge_method": "act", "base_model": str(target), "slices": [{"sources": sources}]}, tmp_path)
    assert result.exit_code == 1
    assert f"layer_range [1, 3] of {target}: it has 2 layers" in result.output


def test_a_missing_file_and_an_unknown_option(tmp_path):
    result = CliRunner().invoke(main, ["check", str(tmp_path / "none.yml")])
    assert (result.exit_code, "none.yml" in result.output) == (1, True)
    result = check("merge_method: act\n", tmp_path, "--out-shard-sizes", "5")
    assert (result.exit_code, "No such option" in result.output) == (2, True)


def test_what_changes_the_forward_pass_is_told_with_both_values(tmp_path):
    target = make_model(tiny_config("qwen2"), tmp_path / "target", seed=0)
    ability = make_model(
        tiny_config("qwen2", rope_theta=1e6, max_position_embeddings=64, rms_norm_eps=1e-5),
        tmp_path / "ability",
        seed=1,
    )
    random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    told = summary(config, tmp_path)["remarks"]
    assert len(told) == 3
    assert any("rope_theta: 10000.0 and 1000000.0" in remark for remark in told)
    assert any("max_position_embeddings: 128 and 64" in remark for remark in told)
    assert any("rms_norm_eps: 1e-06 and 1e-05" in remark for remark in told)


def test_a_density_that_trims_nothing_is_told(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    random_mask(target, ability, tmp_path / "m.safetensors", density=0.1)
    parameters = {"weight": 0.5, "density": 0.7, "mask": str(tmp_path / "m.safetensors")}
    (told,) = summary(act_config(target, (ability, parameters), merge_method="act_ties"), tmp_path)["remarks"]
    assert told.startswith(f"act_ties trims nothing of {ability} in ")
    parameters["density"] = 0.001
    assert not summary(act_config(target, (ability, parameters), merge_method="act_ties"), tmp_path)["remarks"]


def test_outliers_that_are_all_that_is_selected_are_told(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    random_mask(target, ability, tmp_path / "m.safetensors", density=0.1)
    parameters = {"weight": 0.5, "density": 0.9, "gamma": 0.6, "mask": str(tmp_path / "m.safetensors")}
    (told,) = summary(act_config(target, (ability, parameters), merge_method="act_breadcrumbs"), tmp_path)["remarks"]
    assert told.startswith(f"act_breadcrumbs moves nothing of {ability} in ")


def test_half_precision_without_a_dtype(pair_of, tmp_path):
    folders = []
    for folder in pair_of("qwen2"):
        half = {name.replace(".", "__"): tensor.half() for name, tensor in state_of(folder).items()}
        folders.append(copy_with(folder, tmp_path / folder.name, **half))
    random_mask(*folders, tmp_path / "m.safetensors")
    config = act_config(folders[0], (folders[1], {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    assert summary(config, tmp_path)["bytes_written"] == sum(
        t.nbytes for t in merged(config, tmp_path / "out").values()
    )


def test_every_error_is_json_if_asked_for(tmp_path):
    result = CliRunner().invoke(main, ["check", "--json", str(tmp_path / "none.yml")])
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert "none.yml" in problem


def test_mergekits_options_count(pair_of, tmp_path):
    """A smaller shard needs less memory; a LoRA is not merged for a check."""
    target, ability = pair_of("qwen2")
    random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    peaks = [summary(config, tmp_path, "--out-shard-size", size)["peak_memory"] for size in ("20K", "1M")]
    assert peaks[0] < peaks[1]
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    config["models"][0]["model"] = f"{ability}+{tmp_path / 'lora'}"
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    options = ["--lora-merge-cache", str(tmp_path / "cache")]
    result = CliRunner().invoke(main, ["check", "--json", *options, str(tmp_path / "c.yml")])
    found = json.loads(result.stdout)
    assert found["remarks"] == [f"{ability}+{tmp_path / 'lora'} is merged with its LoRA first"]
    assert not (tmp_path / "cache").exists()


def test_models_on_the_hub_are_not_fetched(pair_of, tmp_path):
    for name, folder in zip(("target", "ability"), pair_of("qwen2"), strict=True):
        shutil.copytree(folder, tmp_path / "hub" / "someone" / name)
    random_mask(*pair_of("qwen2"), tmp_path / "m.safetensors")
    config = act_config(Path("someone/target"), (Path("someone/ability"), {"weight": 0.5, "mask": "m.safetensors"}))
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    done, asked = run_there(tmp_path, sys.executable, "-m", "mergekit_act", "check", "c.yml", "--json")
    assert done.returncode == 0, (done.stderr[-2000:], asked)
    found = json.loads(done.stdout)
    assert found["selected"]
    assert [remark.split(":")[0] for remark in found["remarks"]] == [
        "someone/ability is fetched first",
        "someone/target is fetched first",
    ]
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_tensor_that_is_missing_from_the_ability_model(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    bias = "model.layers.0.self_attn.q_proj.bias"
    part = copy_with(ability, tmp_path / "part", **{bias.replace(".", "__"): None})
    random_mask(target, ability, tmp_path / "m.safetensors", density=1.0)
    config = act_config(target, (part, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    result = check(config, tmp_path)
    assert result.exit_code == 1
    assert f'{part} has no tensor "{bias}"' in result.output


def test_a_profiles_pair_that_was_saved_again(pair_of, tmp_path):
    """Same weights in another file: another fingerprint, told but not refused."""
    target, ability = pair_of("qwen2")
    shutil.copytree(target, tmp_path / "again")
    save_file(state_of(target), tmp_path / "again" / "model.safetensors", metadata={"format": "pt", "by": "me"})
    random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(tmp_path / "again", (ability, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    (told,) = summary(config, tmp_path)["remarks"]
    assert "was made from another pair of models" in told
