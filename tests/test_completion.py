"""Every tensor of the target is in the output, also those that mergekit's definition of its architecture lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from merges import act_config, assert_merged, merged, random_mask, refusal, state_of, summary
from oracle import plain_merge
from safetensors.torch import save_file
from tiny import SIZES, make_model, tiny_config

from mergekit_act.artifacts import Mask, save_mask
from mergekit_act.channels import channel_layout
from mergekit_act.checkpoints import open_checkpoint
from mergekit_act.models import load_model
from mergekit_act.profiling import open_pair


def with_tensors(folder: Path, to: Path, **tensors: torch.Tensor) -> Path:
    """A copy of a model folder with more tensors; "__" in a name stands for a dot."""
    shutil.copytree(folder, to)
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(state_of(folder) | more, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory) -> tuple[Path, Path]:
    """Llama-shaped models whose attention has biases; mergekit's llama has none."""
    root = tmp_path_factory.mktemp("biases")
    config = tiny_config("llama", attention_bias=True)
    return make_model(config, root / "target", seed=1), make_model(config, root / "ability", seed=2)


@pytest.fixture(scope="module")
def dense_first(tmp_path_factory) -> tuple[Path, Path]:
    """Mixtures of experts whose first layer is dense, stored expert by expert; mergekit infers what they consist of."""
    root = tmp_path_factory.mktemp("dense-first")
    experts = {"n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    more = {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    sizes = SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 4}
    config = transformers.Glm4MoeLiteConfig(**sizes, **experts, **heads, **more)
    return make_model(config, root / "target", seed=1), make_model(config, root / "ability", seed=2)


def full_state(folder: Path) -> dict[str, torch.Tensor]:
    """A model's tensors as Transformers loads them, both names of tied ones."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return dict(model.state_dict())


@pytest.mark.parametrize("method", ["act", "act_task_arithmetic"])
def test_biases_that_the_definition_lacks_move_with_their_rows(with_biases, tmp_path, method):
    target, ability = with_biases
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}))
    result = merged(config | {"merge_method": method}, tmp_path / "out")
    before = state_of(target)
    assert_merged(result, before, [(state_of(ability), 0.4, mask)], tied=False)
    moved = [name for name in result if name.endswith("bias") and not torch.equal(result[name], before[name])]
    assert len(moved) == 8
    assert summary(config, tmp_path)["selected"] == mask.counts["channels"]


def test_experts_behind_dense_layers(dense_first, tmp_path):
    """Their files name every expert by itself; the output has them in the layout of Transformers 5, as other merges."""
    target, ability = dense_first
    layout = channel_layout(transformers.AutoConfig.from_pretrained(target))
    generator = torch.Generator().manual_seed(0)
    chosen = {m: torch.rand(layout.channel_shape(m), generator=generator) < 0.4 for m in layout.modules}
    save_mask(Mask(chosen, layout), tmp_path / "m.safetensors")
    merged(act_config(target, (ability, {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")})), tmp_path / "out")
    states = [full_state(folder) for folder in (target, ability, tmp_path / "out")]
    assert_merged(states[2], states[0], [(states[1], 0.4, Mask(chosen, layout))], tied=False)
    experts = "model.layers.2.mlp.experts.gate_up_proj"
    assert not torch.equal(states[2][experts], states[0][experts])


def test_what_no_model_class_knows_is_copied(pair_of, tmp_path):
    """Layers for multi-token prediction, buffers of integers: to the bit, in their own dtype."""
    plain, ability = pair_of("qwen2")
    more = {
        "model__layers__2__eh_proj__weight": torch.randn(8, 16, generator=torch.Generator().manual_seed(0)),
        "model__layers__0__self_attn__mask": torch.tensor([[True, False], [True, True]]),
        "counter": torch.tensor([2**40 + 1]),
    }
    target = with_tensors(plain, tmp_path / "target", **more)
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}))
    result = merged(config, tmp_path / "out")
    assert set(result) == set(state_of(target))
    for name, tensor in more.items():
        found = result.pop(name.replace("__", "."))
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert_merged(result, state_of(plain), [(state_of(ability), 0.4, mask)], tied=False)
    half = merged(config | {"dtype": "bfloat16"}, tmp_path / "half")
    assert half["counter"].item() == 2**40 + 1
    assert half["model.layers.2.eh_proj.weight"].dtype == torch.bfloat16
    message = refusal(config | {"out_dtype": "bfloat16"}, tmp_path / "refused")
    assert '"counter" is I64: out_dtype would make bfloat16 of it; say "dtype: bfloat16" instead' in message


@pytest.mark.parametrize("name", ["gpt_neox", "phi3-tied", "phi3-untied-target"])
def test_what_the_definition_has_and_the_target_lacks(pair_of, tmp_path, name):
    """Buffers that Transformers 5 no longer saves, a head that is tied: mergekit's own methods refuse these models."""
    if name == "gpt_neox":
        target, ability = pair_of(name)
    else:
        ties = [name == "phi3-tied", True]
        target, ability = (
            make_model(tiny_config("phi3", tie_word_embeddings=tied), tmp_path / f"model{seed}", seed=seed)
            for seed, tied in enumerate(ties)
        )
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}))
    result = merged(config, tmp_path / "out")
    assert set(result) == set(state_of(target))
    states = [full_state(folder) for folder in (tmp_path / "out", target, ability)]
    assert_merged(states[0], states[1], [(states[2], 0.4, mask)], tied=name == "phi3-tied")


def test_a_tensor_that_the_target_has_lost_is_refused(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    shutil.copytree(target, tmp_path / "target")
    state = {name: tensor for name, tensor in state_of(target).items() if name != "model.layers.1.mlp.up_proj.weight"}
    save_file(state, tmp_path / "target/model.safetensors", metadata={"format": "pt"})
    random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    message = refusal(act_config(tmp_path / "target", (ability, parameters)), tmp_path / "out")
    assert f'{tmp_path / "target"} has no tensor "model.layers.1.mlp.up_proj.weight", which its config' in message


def slices(target: Path, ability: Path, ranges: list[list[int]], parameters: dict) -> dict:
    parts = [
        {
            "sources": [
                {"model": str(target), "layer_range": part},
                {"model": str(ability), "layer_range": part, "parameters": parameters},
            ]
        }
        for part in ranges
    ]
    return {"merge_method": "act", "base_model": str(target), "slices": parts}


def test_slices_take_what_is_left_out_along(with_biases, tmp_path):
    """The second layer twice, the first not at all."""
    target, ability = with_biases
    mask = random_mask(target, ability, tmp_path / "m.safetensors", exclude=["model.layers.0.*"])
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    result = merged(slices(target, ability, [[1, 2], [1, 2]], parameters), tmp_path / "out")
    before = state_of(target)
    expected = plain_merge(before, [(state_of(ability), 0.4, mask)], tied=False)
    second = {name: tensor for name, tensor in expected.items() if ".layers.1." in name}
    assert len(second) == 13
    assert set(result) == {name for name in before if "layers" not in name} | {
        name.replace(".1.", f".{layer}.") for name in second for layer in (0, 1)
    }
    for name, tensor in second.items():
        for layer in (0, 1):
            torch.testing.assert_close(result[name.replace(".1.", f".{layer}.")], tensor, rtol=3e-7, atol=1e-8)


def test_slices_have_no_place_for_what_lies_behind_the_layers(pair_of, tmp_path):
    plain, ability = pair_of("qwen2")
    target = with_tensors(plain, tmp_path / "target", model__layers__2__eh_proj__weight=torch.ones(2, 2))
    random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    message = refusal(slices(target, ability, [[1, 2]], parameters), tmp_path / "refused")
    assert f"1 tensors of {target} lie behind its layers and have no place among the slices" in message
    assert '"model.layers.2.eh_proj.weight"' in message
    whole = merged(slices(target, ability, [[0, 2]], parameters), tmp_path / "out")
    assert set(whole) == set(state_of(target))


def test_a_bias_that_only_the_ability_model_has(pair_of, with_biases, tmp_path):
    """Rows would be moved without it, so such a pair is refused; where none of its rows is selected it does no harm."""
    target, (_, ability) = pair_of("llama")[0], with_biases
    with pytest.raises(ValueError, match=r'q_proj.bias" is missing in the first, \[32\] in the second'):
        open_pair(str(target), str(ability))
    with pytest.raises(ValueError, match=r'q_proj.bias" is \[32\] in the first, missing in the second'):
        open_pair(str(ability), str(target))
    random_mask(*pair_of("llama"), tmp_path / "m.safetensors")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    message = refusal(act_config(target, (ability, parameters)), tmp_path / "refused")
    assert f'{ability} has 8 tensors that the target lacks, such as "model.layers.0.self_attn.k_proj.bias"' in message
    random_mask(*pair_of("llama"), tmp_path / "mlp.safetensors", exclude=["*self_attn*"])
    parameters["mask"] = str(tmp_path / "mlp.safetensors")
    assert set(merged(act_config(target, (ability, parameters)), tmp_path / "out")) == set(state_of(target))


def test_optional_tensors_of_the_ability_model_alone_are_not_added(pair_of, tmp_path):
    """mergekit would write what any model has of an optional tensor; the output is the target's."""
    (target, _), (_, ability) = pair_of("mistral"), pair_of("mistral")
    extra = with_tensors(ability, tmp_path / "extra", model__layers__0__self_attn__q_proj__bias=torch.ones(32))
    random_mask(target, ability, tmp_path / "m.safetensors", exclude=["*q_proj"])
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    assert set(merged(act_config(target, (extra, parameters)), tmp_path / "out")) == set(state_of(target))


# Vocabularies


@pytest.mark.parametrize("method", ["act", "act_task_arithmetic"])
@pytest.mark.parametrize("rows", [120, 140])
@pytest.mark.parametrize("tied", [False, True])
def test_vocabularies_of_other_lengths_need_no_tokenizer(pair_of, tmp_path, caplog, method, rows, tied):
    """The target keeps its rows, padding included; rows that both have are merged by their number."""
    name = "qwen2-tied" if tied else "qwen2"
    target, _ = pair_of(name)
    other = make_model(tiny_config(name, vocab_size=rows), tmp_path / "other", seed=5)
    mask = random_mask(target, other, tmp_path / "m.safetensors", density=0.6)
    config = act_config(target, (other, {"weight": 1.0, "mask": str(tmp_path / "m.safetensors")}))
    result = merged(config | {"merge_method": method}, tmp_path / "out")
    before = state_of(target)
    theirs = {
        key: torch.cat([tensor, before[key][rows:]])[:128] if "embed" in key or "lm_head" in key else tensor
        for key, tensor in state_of(other).items()
    }
    if tied:
        for state in (before, theirs, result):
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
    assert_merged(result, before, [(theirs, 1.0, mask)], tied=tied)
    assert f"has {rows}, {target} has 128 rows of token ids; rows behind the shorter one" in caplog.text


def test_a_tokenizer_section_tells_the_rows_that_it_cuts(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 1.0, "mask": str(tmp_path / "m.safetensors")}))
    assert not [remark for remark in summary(config, tmp_path)["remarks"] if "rows" in remark]
    found = summary(config | {"tokenizer": {"source": "base"}}, tmp_path)
    told = [remark for remark in found["remarks"] if '"lm_head.weight"' in remark]
    result = merged(config | {"tokenizer": {"source": "base"}}, tmp_path / "out")
    assert told == [
        f'"lm_head.weight" of {target} has 128 rows and its tokenizer {len(result["lm_head.weight"])} tokens: with a '
        f'"tokenizer:" section the output has {len(result["lm_head.weight"])} rows. Leave the section out to keep all of '
        "them; vocabularies may differ in length"
    ]


# The output's config


def test_a_promoted_dtype_is_told_and_named(pair_of, tmp_path):
    """float16 and bfloat16 have no common dtype but float32."""
    folders = []
    for folder, dtype in zip(pair_of("qwen2"), (torch.float16, torch.bfloat16), strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model.save_pretrained(tmp_path / folder.name)
        folders.append(tmp_path / folder.name)
        shutil.copy(folder / "tokenizer.json", tmp_path / folder.name)
    random_mask(*pair_of("qwen2"), tmp_path / "m.safetensors")
    config = act_config(folders[0], (folders[1], {"weight": 1.0, "mask": str(tmp_path / "m.safetensors")}))
    remark = (
        "the target is in float16, the models together need float32: the output is in float32, 2 times the target's "
        'size. Add "dtype: float16" to keep the target\'s'
    )
    assert remark in summary(config, tmp_path)["remarks"]
    result = merged(config, tmp_path / "out")
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    merged(config | {"dtype": "float16"}, tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"
    assert not [line for line in summary(config | {"dtype": "float16"}, tmp_path)["remarks"] if "together" in line]


# Quantised weights


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def with_quantisation(folder: Path, to: Path, settings: dict) -> Path:
    """A copy whose config says that it is quantised."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | {"quantization_config": settings}
    (to / "config.json").write_text(json.dumps(config))
    return to


def packed(form: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight as it lies in files of this form."""
    if form == "fp8":
        return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    if form == "bitsandbytes":
        return {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(4)}
    stem = name.removesuffix("weight")
    return {f"{stem}qweight": torch.zeros(4, 4, dtype=torch.int32), f"{stem}scales": torch.ones(4)}


@pytest.mark.parametrize("form", ["fp8", "bitsandbytes", "gptq"])
@pytest.mark.parametrize("declared", [True, False])
def test_quantised_weights_are_refused_everywhere(pair_of, tmp_path, form, declared):
    """By what is in the files, whatever the config says."""
    target, ability = pair_of("qwen2")
    settings = {"quant_method": form} if form != "fp8" else FP8
    folder = tmp_path / "quantised"
    with_quantisation(ability, folder, settings) if declared else shutil.copytree(ability, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state_of(ability).items():
        tensors |= packed(form, name, tensor) if "proj.weight" in name else {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    for pair in ((target, folder), (folder, target)):
        for top in ({}, {"dtype": "bfloat16"}):
            message = refusal(act_config(pair[0], (pair[1], parameters), **top), tmp_path / "refused")
            assert message.count("\n") == 1
            assert f"{folder} is quantised ({form if declared else 'no method named'}: " in message
        with pytest.raises(ValueError, match=r"is quantised \(.*expected float32, float16 or bfloat16 weights"):
            open_pair(*map(str, pair))


def test_a_leftover_of_a_quantisation_beside_plain_weights(pair_of, tmp_path):
    """It is no quantised model, neither for profiles nor for merges, and the output does not say that it is one."""
    target = with_quantisation(pair_of("qwen2")[0], tmp_path / "target", FP8)
    ability = with_quantisation(pair_of("qwen2")[1], tmp_path / "ability", {"quant_method": "awq", "bits": 4})
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}))
    assert_merged(merged(config, tmp_path / "out"), state_of(target), [(state_of(ability), 0.4, mask)], tied=False)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    model = load_model(open_checkpoint(str(ability)), dtype=torch.float32)
    assert torch.equal(model.state_dict()["lm_head.weight"], state_of(ability)["lm_head.weight"])


def test_mergekits_own_methods_are_left_as_they_are(with_biases, tmp_path):
    """The completion is ours alone: plain task arithmetic still drops what mergekit does not know."""
    target, ability = with_biases
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(target),
        "models": [{"model": str(ability), "parameters": {"weight": 0.5}}],
    }
    assert not [name for name in merged(config, tmp_path / "out") if name.endswith("bias")]
