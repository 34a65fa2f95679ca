"""Merging with mergekit itself, against a plain second implementation, and the refusals before the first tensor."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from merges import act_config, assert_merged, merged, random_mask, refusal, run_merge, state_of
from oracle import plain_merge
from safetensors.torch import save_file
from tiny import make_model, make_tokenizer, tiny_config

from mergekit_act.artifacts import Mask, load_mask, load_profile, save_mask, save_profile
from mergekit_act.channels import channel_layout
from mergekit_act.merging import TensorSelection, transfer
from mergekit_act.profiling import open_pair, profile_without_data
from mergekit_act.selection import make_mask, select_channels, unite

ARCHITECTURES = ["qwen2", "qwen2-tied", "llama", "gemma2", "qwen3", "gpt2"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merge_equals_the_formula(pair_of, tmp_path, name):
    target, ability = pair_of(name)
    mask = random_mask(target, ability, tmp_path / "mask.safetensors")
    config = act_config(target, (ability, {"weight": 0.4, "mask": str(tmp_path / "mask.safetensors")}))
    result = merged(config, tmp_path / "out")
    tied = bool(mask.layout.tied)
    assert_merged(result, state_of(target), [(state_of(ability), 0.4, mask)], tied=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings == tied
    assert any(not torch.equal(result[n], t) for n, t in state_of(target).items())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_masks_of_experts_select_rows_of_single_experts(pair_of, tmp_path, name):
    """Also where experts are stored transposed and with biases; mergekit writes them in the layout of Transformers 5."""
    target, ability = pair_of(name)
    layout = channel_layout(tiny_config(name))
    generator = torch.Generator().manual_seed(0)
    chosen = {m: torch.rand(layout.channel_shape(m), generator=generator) < 0.4 for m in layout.modules}
    save_mask(Mask(chosen, layout), tmp_path / "m.safetensors")
    merged(act_config(target, (ability, {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")})), tmp_path / "out")
    states = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (target, ability, tmp_path / "out")
    ]
    assert_merged(states[2], states[0], [(states[1], 0.4, Mask(chosen, layout))], tied=False)


def test_bfloat16_rounds_once(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.7, "mask": str(tmp_path / "m.safetensors")}), dtype="bfloat16")
    result = merged(config, tmp_path / "out")
    states = [{name: tensor.bfloat16() for name, tensor in state_of(folder).items()} for folder in (target, ability)]
    expected = plain_merge(states[0], [(states[1], 0.7, mask)], tied=False)
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


def test_several_models_add_up_in_order(pair_of, tmp_path):
    target, first = pair_of("llama")
    second = make_model(tiny_config("llama"), tmp_path / "second", seed=9)
    masks = [random_mask(target, first, tmp_path / f"{i}.safetensors", density=0.5, seed=i) for i in range(2)]
    config = act_config(
        target,
        (first, {"weight": 0.4, "mask": str(tmp_path / "0.safetensors")}),
        (second, {"weight": -0.3, "mask": str(tmp_path / "1.safetensors")}),
    )
    result = merged(config, tmp_path / "out")
    others = [(state_of(first), 0.4, masks[0]), (state_of(second), -0.3, masks[1])]
    assert_merged(result, state_of(target), others, tied=False)


def test_profiles_with_a_density_and_globs(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    pair = open_pair(str(target), str(ability))
    (tmp_path / "profiles").mkdir()
    for seed in range(2):
        save_profile(
            profile_without_data(pair, "random", random_seed=seed), tmp_path / "profiles" / f"{seed}.safetensors"
        )
    profiles = [load_profile(tmp_path / "profiles" / f"{seed}.safetensors") for seed in range(2)]
    mask = make_mask(profiles, 0.1)
    assert {m: c.tolist() for m, c in mask.channels.items()} == {
        m: c.tolist() for m, c in unite(select_channels(profile, 0.1) for profile in profiles).items()
    }
    parameters = {"weight": 1.0, "mask": str(tmp_path / "profiles" / "*.safetensors"), "mask_density": 0.1}
    globbed = merged(act_config(target, (ability, parameters)), tmp_path / "globbed")
    assert_merged(globbed, state_of(target), [(state_of(ability), 1.0, mask)], tied=False)
    parameters["mask"] = ", ".join(str(tmp_path / "profiles" / f"{seed}.safetensors") for seed in range(2))
    listed = merged(act_config(target, (ability, parameters)), tmp_path / "listed")
    assert all(torch.equal(listed[name], tensor) for name, tensor in globbed.items())


def test_weight_gradients_and_filters_work_as_everywhere_in_mergekit(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors", density=1.0)
    weight = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.25}]
    result = merged(
        act_config(target, (ability, {"weight": weight, "mask": str(tmp_path / "m.safetensors")})), tmp_path / "out"
    )
    base, other = state_of(target), state_of(ability)

    def expected(name: str, factor: float) -> torch.Tensor:
        return plain_merge({name: base[name]}, [(other, factor, mask)], tied=False)[name]

    up = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(result[up.format(0)], base[up.format(0)])
    torch.testing.assert_close(result[up.format(1)], expected(up.format(1), 1.0), rtol=3e-7, atol=1e-8)
    torch.testing.assert_close(result["lm_head.weight"], expected("lm_head.weight", 0.25), rtol=3e-7, atol=1e-8)


def test_untied_target_takes_the_head_of_a_tied_model_from_its_embedding(pair_of, tmp_path):
    target, ability = pair_of("qwen2")[0], pair_of("qwen2-tied")[1]
    mask = random_mask(target, ability, tmp_path / "m.safetensors", density=0.5)
    result = merged(
        act_config(target, (ability, {"weight": 1.0, "mask": str(tmp_path / "m.safetensors")})), tmp_path / "out"
    )
    state = state_of(ability)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    assert_merged(result, state_of(target), [(state, 1.0, mask)], tied=False)


def test_vocabularies_are_aligned_by_token_id(pair_of, tmp_path, caplog):
    """The ability model has fewer rows, and its tokenizer's tokens are kept: fewer rows than either."""
    target, _ = pair_of("qwen2")
    short = make_model(tiny_config("qwen2", vocab_size=120), tmp_path / "short", seed=5)
    mask = random_mask(target, short, tmp_path / "m.safetensors", density=0.6)
    parameters = {"weight": 1.0, "mask": str(tmp_path / "m.safetensors")}
    result = merged(act_config(target, (short, parameters), tokenizer={"source": "base"}), tmp_path / "out")
    rows = len(result["lm_head.weight"])
    lost = int(mask.channels["lm_head"][rows:].sum())
    assert f'"lm_head.weight" has {rows} rows: {lost} selected rows behind them are dropped' in caplog.text
    assert rows == len(make_tokenizer()) < 120
    cut = {n: t[:rows] if "embed" in n or "lm_head" in n else t for n, t in state_of(target).items()}
    other = {n: t[:rows] if "embed" in n or "lm_head" in n else t for n, t in state_of(short).items()}
    channels = {m: c[:rows] if m == "lm_head" else c for m, c in mask.channels.items()}
    assert_merged(result, cut, [(other, 1.0, Mask(channels, mask.layout))], tied=False)


def test_a_merge_in_memory_takes_files_too(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    states = {"target": state_of(target), "ability": state_of(ability)}
    result = merge_state_dicts(
        states, "act", base="target", parameters={"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}
    )
    assert_merged(result, states["target"], [(states["ability"], 0.5, mask)], tied=False)


def test_a_mask_that_does_not_fit_a_tensor_in_memory():
    mask = TensorSelection({0: torch.ones(5, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r'the mask has \[5\] channels for "w"; the tensor is \[4, 3\] \(axis 0\)'):
        mask.fitted("w", (4, 3))
    with pytest.raises(ValueError, match=r'the mask has \[1, 4\] channels for "w"'):
        TensorSelection({0: torch.ones((1, 4), dtype=torch.bool)}).fitted("w", (4, 3))


def test_checkpoints_of_the_old_pickle_format(pair_of, tmp_path):
    """As old GPT-2 checkpoints: no archive, no prefix."""
    folders = []
    for folder in pair_of("gpt2"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("*.safetensors"))
        state = {name.removeprefix("transformer."): tensor for name, tensor in state_of(folder).items()}
        torch.save(state, tmp_path / folder.name / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        folders.append(tmp_path / folder.name)
    mask = random_mask(*folders, tmp_path / "m.safetensors")
    config = act_config(folders[0], (folders[1], {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}))
    target, ability = pair_of("gpt2")
    assert_merged(merged(config, tmp_path / "out"), state_of(target), [(state_of(ability), 0.4, mask)], tied=True)


def test_mergekit_pytorch(pair_of, tmp_path):
    target, ability = pair_of("gpt2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = {
        "merge_method": "act",
        "base_model": str(target / "model.safetensors"),
        "models": [
            {
                "model": str(ability / "model.safetensors"),
                "parameters": {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")},
            }
        ],
    }
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    run = CliRunner().invoke(mergekit_pytorch, [str(tmp_path / "c.yml"), str(tmp_path / "out")])
    assert run.exit_code == 0, (run.output, run.exception)
    assert_merged(state_of(tmp_path / "out"), state_of(target), [(state_of(ability), 0.5, mask)], tied=True)
    random_mask(*pair_of("qwen2"), tmp_path / "qwen2.safetensors")
    config["models"][0]["parameters"]["mask"] = str(tmp_path / "qwen2.safetensors")
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    run = CliRunner().invoke(mergekit_pytorch, [str(tmp_path / "c.yml"), str(tmp_path / "out1")])
    assert run.exit_code == 1
    assert 'no output tensor matches "model.embed_tokens", "model.layers.0.self_attn.q_proj", ' in run.output
    config["models"][0]["parameters"]["mask"] = str(tmp_path / "m.safetensors")
    part = {name: tensor for name, tensor in state_of(ability).items() if name != "transformer.ln_f.bias"}
    save_file(part, tmp_path / "part.safetensors")
    config["models"][0]["model"] = str(tmp_path / "part.safetensors")
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    run = CliRunner().invoke(mergekit_pytorch, [str(tmp_path / "c.yml"), str(tmp_path / "out3")])
    assert run.exit_code == 1
    assert 'are in no ability model and would be left out, such as "transformer.ln_f.bias"' in run.output
    config["models"][0]["model"] = str(tmp_path / "gone.safetensors")
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    run = CliRunner().invoke(mergekit_pytorch, [str(tmp_path / "c.yml"), str(tmp_path / "out4")])
    assert "gone.safetensors is no file" in run.output
    config["models"][0]["model"] = str(ability / "model.safetensors")
    config["models"][0]["parameters"] = {"weight": 0.5, "mask": "no.safetensors", "wieght": 1}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    run = CliRunner().invoke(mergekit_pytorch, [str(tmp_path / "c.yml"), str(tmp_path / "out2")])
    assert run.exit_code == 1
    assert 'has no parameter "wieght" (did you mean "weight"?)' in run.output
    assert 'mask "no.safetensors" does not exist' in run.output


def test_layers_that_stay_in_place_may_be_written_as_slices(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    sources = [
        {"model": str(target), "layer_range": [0, 2]},
        {"model": str(ability), "layer_range": [0, 2], "parameters": parameters},
    ]
    config = {"merge_method": "act", "base_model": str(target), "slices": [{"sources": sources}]}
    result = merged(config, tmp_path / "out")
    assert_merged(result, state_of(target), [(state_of(ability), 0.4, mask)], tied=False)


def test_masks_follow_the_source_layer(pair_of, tmp_path):
    """Layers swapped in the output: each keeps the mask of the layer it was."""
    target, ability = pair_of("qwen2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    slices = [
        {
            "sources": [
                {"model": str(target), "layer_range": layers},
                {"model": str(ability), "layer_range": layers, "parameters": parameters},
            ]
        }
        for layers in ([1, 2], [0, 1])
    ]
    result = merged({"merge_method": "act", "base_model": str(target), "slices": slices}, tmp_path / "out")
    straight = plain_merge(state_of(target), [(state_of(ability), 0.4, mask)], tied=False)
    for name, tensor in straight.items():
        place = (
            name.replace("layers.0.", "layers.x.").replace("layers.1.", "layers.0.").replace("layers.x.", "layers.1.")
        )
        torch.testing.assert_close(result[place], tensor, rtol=3e-7, atol=1e-8)

    slices[0]["sources"][1]["layer_range"] = [0, 1]
    message = refusal({"merge_method": "act", "base_model": str(target), "slices": slices}, tmp_path / "refused")
    assert "channels can only be moved between the same layers" in message


def test_nothing_selected_returns_the_base_itself():
    base = torch.randn(4, 3)
    selection = TensorSelection({0: torch.zeros(4, dtype=torch.bool)})
    assert transfer(base, [(torch.randn(4, 3), 1.0, selection)]) is base
    assert transfer(base, []) is base


def test_negative_zero_and_nan_outside_the_mask_keep_their_bits():
    base = torch.tensor([[-0.0, float("nan")], [1.0, 2.0]])
    other = torch.tensor([[0.0, 3.0], [5.0, 6.0]])
    result = transfer(base, [(other, 1.0, TensorSelection({0: torch.tensor([False, True])}))])
    assert torch.equal(result[0].view(torch.int32), base[0].view(torch.int32))
    assert result[1].tolist() == [5.0, 6.0]
    assert base[1].tolist() == [1.0, 2.0]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_transfer_equals_the_formula_cell_by_cell(data):
    """Any shape, dtype, axes, weights and number of models, against a loop over cells."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    shape = data.draw(st.sampled_from([(5,), (4, 3), (3, 6), (2, 3, 4)]))
    axes = {1: [(0,)], 2: [(0,), (1,), (0, 1)], 3: [(1,), (2,)]}[len(shape)]
    models = data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    kinds = [data.draw(st.sampled_from(axes))] * models
    contributions = []
    for chosen_axes in kinds:
        tensor = torch.randn(shape, generator=generator).to(dtype)
        weight = data.draw(st.sampled_from([0.4, 1.0, -0.5, 2.0]))
        slices = {}
        for axis in chosen_axes:
            lead = (shape[0], shape[axis]) if len(shape) == 3 else (shape[axis],)
            slices[axis] = torch.rand(lead, generator=generator) < 0.5
        contributions.append((tensor, weight, TensorSelection(slices)))
    result = transfer(base, contributions)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for cell in torch.cartesian_prod(*[torch.arange(n) for n in shape]).reshape(-1, len(shape)).tolist():
        change, touched = torch.zeros((), dtype=wide), False
        for tensor, weight, selection in contributions:
            inside = any(
                bool(chosen[cell[0], cell[axis]] if chosen.ndim == 2 else chosen[cell[axis]])
                for axis, chosen in selection.slices.items()
            )
            if inside:
                touched = True
                change = change + weight * (tensor[tuple(cell)].to(wide) - base[tuple(cell)].to(wide))
        value = base[tuple(cell)]
        expected = (value.to(wide) + change).to(dtype) if touched else value
        assert result[tuple(cell)].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
        if not touched:
            assert result[tuple(cell)].item() == value.item()


@pytest.fixture
def good(pair_of, tmp_path):
    """A pair, a mask of it, and parameters that merge."""
    target, ability = pair_of("qwen2")
    random_mask(target, ability, tmp_path / "m.safetensors")
    return target, ability, {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}


def test_mask_settings_that_do_not_fit(good, tmp_path):
    target, ability, parameters = good
    pair = open_pair(str(target), str(ability))
    save_profile(profile_without_data(pair, "random"), tmp_path / "p.safetensors")
    out = tmp_path / "out"

    def told(**changes: Any) -> str:
        return refusal(act_config(target, (ability, {**parameters, **changes})), out)

    assert "m.safetensors is a mask; its density was chosen when it was made. Remove mask_density" in told(
        mask_density=0.1
    )
    profile = str(tmp_path / "p.safetensors")
    assert "p.safetensors is a profile; add mask_density, the fraction of channels to keep" in told(mask=profile)
    assert "density is 1.5; expected a fraction in (0, 1]" in told(mask=profile, mask_density=1.5)
    assert 'mask "no.safetensors" does not exist' in told(mask="no.safetensors")
    assert 'no-*.safetensors" matches no file' in told(mask=str(tmp_path / "no-*.safetensors"))
    assert f'{ability} has no "mask"; name a mask or profile under its "parameters:"' in refusal(
        act_config(target, (ability, {"weight": 1})), out
    )
    (tmp_path / "x.safetensors").write_bytes(b"\x00")
    assert "x.safetensors is not a complete safetensors file" in told(mask=str(tmp_path / "x.safetensors"))


def test_misspelled_parameters_are_told_with_everything_else(good, tmp_path):
    target, ability, parameters = good
    config = act_config(
        target, (ability, {**parameters, "wieght": 1.0, "mask": "no.safetensors"}), parameters={"densty": 1}
    )
    message = refusal(config, tmp_path / "out")
    assert message.splitlines()[0] == "Error: 3 problems:"
    assert 'merge method act has no parameter "wieght" (did you mean "weight"?)' in message
    assert 'merge method act has no parameter "densty"' in message
    assert 'mask "no.safetensors" does not exist' in message


def test_mask_of_another_model(good, pair_of, tmp_path):
    target, ability, parameters = good
    wide = [make_model(tiny_config("qwen2", intermediate_size=64), tmp_path / f"w{i}", seed=i) for i in range(2)]
    random_mask(*wide, tmp_path / "wide.safetensors")
    message = refusal(
        act_config(target, (ability, {**parameters, "mask": str(tmp_path / "wide.safetensors")})), tmp_path / "out"
    )
    assert (
        'wide.safetensors has 64 channels for "model.layers.0.mlp.up_proj.weight"; the target\'s tensor is [48, 32] (axis 0). '
        "Profile this pair again with mergekit-act profile"
    ) in message
    assert message.startswith("Error: 4 problems:")  # gate and up of both layers; down's rows are the same
    random_mask(*pair_of("gpt2"), tmp_path / "gpt2.safetensors")
    message = refusal(
        act_config(target, (ability, {**parameters, "mask": str(tmp_path / "gpt2.safetensors")})), tmp_path / "out2"
    )
    assert message.startswith("Error: mask ")
    assert 'no output tensor matches "transformer.' in message
    assert "--exclude 'transformer.h.0.attn.c_attn'" in message


def test_models_of_different_width(good, tmp_path):
    target, _, parameters = good
    wide = make_model(tiny_config("qwen2", intermediate_size=64), tmp_path / "wide", seed=3)
    message = refusal(act_config(target, (wide, parameters)), tmp_path / "out")
    assert f"[48, 32] in {target}" in message
    assert f"[64, 32] in {wide}" in message
    assert message.count("; ACT needs models of one backbone") == 6


def test_models_that_are_not_there_or_not_whole(good, tmp_path):
    target, ability, parameters = good
    message = refusal(act_config(target, (tmp_path / "gone", parameters)), tmp_path / "out")
    assert f"{tmp_path}/gone does not exist" in message
    assert "expected a model folder or a Hub id" in message
    shutil.copytree(ability, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refusal(act_config(target, (tmp_path / "cut", parameters)), tmp_path / "out")
    assert "cut has no complete weight file (" in message


def test_values_that_mergekit_would_trip_over(good, tmp_path):
    target, ability, parameters = good
    out = tmp_path / "out"
    assert 'dtype "float33" is not one that models can be merged in; expected bfloat16' in refusal(
        act_config(target, (ability, parameters), dtype="float33"), out
    )
    message = refusal(act_config(target, (ability, {**parameters, "weight": "half"})), out)
    assert message.count("\n") == 1
    assert "a parameter has a wrong value" in message
    assert "got 'half'" in message
    message = refusal(act_config(target, (ability, {"mask": parameters["mask"]})), out)
    assert f'{ability} has no "weight"; give the factor on its changes under its "parameters:"' in message
    message = refusal(act_config(target, (ability, parameters), (target, parameters)), out)
    assert f"{target} is the base_model, the target; it takes no mask" in message
    sources = [{"model": str(m), "layer_range": [0, 2], "parameters": parameters} for m in (target, ability)]
    message = refusal({"merge_method": "act", "base_model": str(target), "slices": [{"sources": sources}]}, out)
    assert f"{target} is the base_model, the target; it takes no mask" in message
    message = refusal(act_config(target, (ability, {"weight": 1.0, "mask": " ,"})), out)
    assert "mask is empty; name a mask or profile" in message
    (tmp_path / "lora").mkdir()
    config = act_config(target, (ability, parameters))
    config["models"][0]["model"] = f"{ability}+{tmp_path / 'lora'}"
    message = refusal(config, out)
    assert "has a LoRA; say --lora-merge-cache FOLDER" in message
    assert "lora has no adapter_config.json; expected a LoRA as PEFT saves it" in message
    config = act_config(target, (ability, parameters))
    del config["base_model"]
    assert "act needs base_model, the target; the config names none" in refusal(config, out)


def test_models_of_different_architecture(good, pair_of, tmp_path):
    target, _, parameters = good
    llama = pair_of("llama")[1]
    message = refusal(act_config(target, (llama, parameters)), tmp_path / "out")
    assert "the models differ in architecture: " in message
    assert f"{llama} is LlamaForCausalLM" in message
    assert f"{target} is Qwen2ForCausalLM; ACT needs models of one backbone" in message


def test_tied_target_and_untied_ability_model(pair_of, tmp_path):
    target, ability = pair_of("qwen2-tied")[0], pair_of("qwen2")[1]
    random_mask(*pair_of("qwen2-tied"), tmp_path / "m.safetensors")
    message = refusal(
        act_config(target, (ability, {"weight": 1.0, "mask": str(tmp_path / "m.safetensors")})), tmp_path / "out"
    )
    assert f"{target} ties its head to its embedding and {ability} does not" in message


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"source": "union"}, "which moves rows"),
        ({"source": "base", "pad_to_multiple_of": 64}, "refills rows with a mean"),
    ],
)
def test_tokenizer_settings_that_move_selected_rows(good, tmp_path, tokenizer, words):
    target, ability, parameters = good
    assert words in refusal(act_config(target, (ability, parameters), tokenizer=tokenizer), tmp_path / "out")
    random_mask(target, ability, tmp_path / "no-head.safetensors", exclude=["lm_head"])
    config = act_config(
        target, (ability, {**parameters, "mask": str(tmp_path / "no-head.safetensors")}), tokenizer=tokenizer
    )
    assert run_merge(config, tmp_path / "fine").exit_code == 0


def test_a_mask_of_another_pair_is_told_and_used(good, tmp_path, caplog):
    target, _, parameters = good
    third = make_model(tiny_config("qwen2"), tmp_path / "third", seed=7)
    result = merged(act_config(target, (third, parameters)), tmp_path / "out")
    assert f"was made from another pair of models than {target} and {third}" in caplog.text
    assert_merged(result, state_of(target), [(state_of(third), 0.4, load_mask(parameters["mask"]))], tied=False)


def test_a_mask_by_others_with_the_common_metadata_alone(good, tmp_path):
    """The format asks for no more than kind, version, modules, parameters and tied."""
    target, ability, parameters = good
    module = "model.layers.0.mlp.up_proj"
    metadata = {
        "kind": "mask",
        "format_version": 1,
        "modules": [module],
        "parameters": {module: [[f"{module}.weight", 0]]},
        "tied": [],
    }
    chosen = torch.arange(48) % 2 == 0
    save_file({module: chosen}, tmp_path / "own.safetensors", metadata={"mergekit_act": json.dumps(metadata)})
    config = act_config(target, (ability, {**parameters, "mask": str(tmp_path / "own.safetensors")}))
    result = merged(config, tmp_path / "out")
    before = state_of(target)
    changed = {name for name in before if not torch.equal(before[name], result[name])}
    assert changed == {f"{module}.weight"}
    assert torch.equal((result[f"{module}.weight"] != before[f"{module}.weight"]).any(1), chosen)
