"""What real merge configs bring: tied heads, vocabularies, slices, modules, several documents, mergekit's flags."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from mergekit.scripts.multimerge import main as mergekit_multi
from merges import act_config, assert_merged, copy_with, merged, random_mask, refusal, state_of
from oracle import plain_merge
from safetensors.torch import save_file
from tiny import VOCABULARY, make_model, make_tokenizer, make_vision_language_model, tiny_config

from mergekit_act.cli import main
from mergekit_act.merging import TensorSelection

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# Tied heads


@pytest.mark.parametrize("as_files", [False, True], ids=["mergekit-yaml", "mergekit-pytorch"])
def test_methods_that_draw_random_numbers_keep_a_head_tied(pair_of, tmp_path, as_files):
    folders = [
        copy_with(folder, tmp_path / folder.name, lm_head__weight=state_of(folder)[EMBEDDING].clone())
        for folder in pair_of("qwen2-tied")
    ]
    random_mask(*folders, tmp_path / "m.safetensors", density=0.5)
    parameters = {"weight": 0.5, "density": 0.5, "mask": str(tmp_path / "m.safetensors")}
    config = act_config(folders[0], (folders[1], parameters), merge_method="act_dare_linear")
    if as_files:
        config["base_model"] += "/model.safetensors"
        config["models"][0]["model"] += "/model.safetensors"
        (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
        run = CliRunner().invoke(mergekit_pytorch, [str(tmp_path / "c.yml"), str(tmp_path / "out")])
        assert run.exit_code == 0, (run.output, run.exception)
        result = state_of(tmp_path / "out")
    else:
        result = merged(config, tmp_path / "out")
    assert not torch.equal(result[EMBEDDING], state_of(folders[0])[EMBEDDING])
    assert torch.equal(result[HEAD], result[EMBEDDING])


@pytest.mark.parametrize("both", [False, True])
def test_mergekit_pytorch_keeps_a_head_tied(pair_of, tmp_path, both):
    """Pickles of a whole state hold a tied matrix under both names."""
    files, states = [], []
    for folder in pair_of("qwen2-tied"):
        state = state_of(folder)
        if both:
            state[HEAD] = state[EMBEDDING].clone()
        files.append(str(tmp_path / f"{folder.name}.safetensors"))
        save_file(state, files[-1])
        states.append({**state, HEAD: state[EMBEDDING]})
    mask = random_mask(*pair_of("qwen2-tied"), tmp_path / "m.safetensors")
    models = [{"model": files[1], "parameters": {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}}]
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"merge_method": "act", "base_model": files[0], "models": models}))
    run = CliRunner().invoke(mergekit_pytorch, [str(tmp_path / "c.yml"), str(tmp_path / "out")])
    assert run.exit_code == 0, (run.output, run.exception)
    expected = plain_merge(states[0], [(states[1], 0.5, mask)], tied=True)
    result = state_of(tmp_path / "out")
    assert (HEAD in result) == both
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize("stored", ["neither", "target", "ability", "both"])
def test_both_tied_whatever_the_files_store(pair_of, tmp_path, stored):
    """An output that stores both names holds one matrix, and Transformers loads it as one."""
    folders = {}
    for name, folder in zip(("target", "ability"), pair_of("qwen2-tied"), strict=True):
        head = {"lm_head__weight": state_of(folder)[EMBEDDING].clone()} if stored in (name, "both") else {}
        folders[name] = copy_with(folder, tmp_path / name, **head)
    target, ability = folders.values()
    mask = random_mask(target, ability, tmp_path / "m.safetensors", density=0.3)
    config = act_config(target, (ability, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    result = merged(config, tmp_path / "out")
    assert (HEAD in result) == (stored != "neither")
    if stored != "neither":
        assert torch.equal(result[HEAD], result[EMBEDDING])
    before, other = ({**state_of(f), HEAD: state_of(f)[EMBEDDING]} for f in (target, ability))
    expected = plain_merge(before, [(other, 0.5, mask)], tied=True)
    torch.testing.assert_close(result[EMBEDDING], expected[EMBEDDING], rtol=3e-7, atol=1e-8)
    untouched = ~mask.channels["lm_head"][:, None] & ~mask.channels["model.embed_tokens"]
    assert torch.equal(result[EMBEDDING][untouched], before[EMBEDDING][untouched])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_models_leftover_head_is_not_used(pair_of, tmp_path):
    """Its config says that the embedding is the head, so a stale lm_head in its file is not merged."""
    target, ability = pair_of("qwen2-tied")
    stale = copy_with(ability, tmp_path / "stale", lm_head__weight=torch.zeros(VOCABULARY, 32))
    random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}
    straight = merged(act_config(target, (ability, parameters)), tmp_path / "straight")
    result = merged(act_config(target, (stale, parameters)), tmp_path / "out")
    assert torch.equal(result[EMBEDDING], straight[EMBEDDING])
    assert torch.equal(result[HEAD], straight[EMBEDDING])


def test_both_untied(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    assert_merged(merged(config, tmp_path / "out"), state_of(target), [(state_of(ability), 0.5, mask)], tied=False)


# Vocabularies


def test_rows_that_only_the_tensor_has_are_not_selected():
    """As tokens that a merge adds behind the target's."""
    selection = TensorSelection({0: torch.tensor([True, False, True])}, vocabulary_axis=0)
    assert selection.fitted("lm_head.weight", (5, 4)).slices[0].tolist() == [True, False, True, False, False]


def test_columns_of_the_embedding_follow_any_tokenizer(pair_of, tmp_path):
    """Moving rows does not harm where only columns are selected."""
    target, _ = pair_of("qwen2")
    other = make_model(tiny_config("qwen2"), tmp_path / "other", seed=9)
    random_mask(target, other, tmp_path / "m.safetensors", density=0.5, exclude=["lm_head"])
    config = act_config(
        target,
        (other, {"weight": 1.0, "mask": str(tmp_path / "m.safetensors")}),
        tokenizer={"source": "union", "pad_to_multiple_of": 16},
    )
    result = merged(config, tmp_path / "out")
    rows = len(make_tokenizer())
    assert len(result[HEAD]) == -(-rows // 16) * 16
    assert torch.equal(result[HEAD][:rows], state_of(target)[HEAD][:rows])


def test_rows_cannot_follow_the_ability_models_tokenizer(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    random_mask(target, ability, tmp_path / "m.safetensors", density=0.5)
    parameters = {"weight": 1.0, "mask": str(tmp_path / "m.safetensors")}
    config = act_config(target, (ability, parameters), tokenizer={"source": str(ability)})
    message = refusal(config, tmp_path / "out")
    assert f'rows of "lm_head.weight" are selected and the tokenizer\'s source is "{ability}"' in message


# Slices and modules


def test_slices_of_the_target_alone_and_layers_twice(pair_of, tmp_path, caplog):
    """A stack of layers: the first copied from the target, then both, merged."""
    target, ability = pair_of("qwen2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    slices = [
        {"sources": [{"model": str(target), "layer_range": [0, 1]}]},
        {
            "sources": [
                {"model": str(target), "layer_range": [0, 2]},
                {"model": str(ability), "layer_range": [0, 2], "parameters": parameters},
            ]
        },
    ]
    config = {"merge_method": "act", "base_model": str(target), "slices": slices}
    result = merged(config, tmp_path / "out")
    straight = plain_merge(state_of(target), [(state_of(ability), 0.4, mask)], tied=False)
    for name, tensor in straight.items():
        if ".layers." in name:
            layer = int(name.split(".")[2])
            place = name.replace(f"layers.{layer}.", f"layers.{layer + 1}.")
            torch.testing.assert_close(result[place], tensor, rtol=3e-7, atol=1e-8)
        elif name == EMBEDDING:  # it belongs to the first slice
            assert torch.equal(result[name], state_of(target)[name])
    first = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(result[first], state_of(target)[first])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3

    slices.reverse()
    assert merged(config, tmp_path / "reversed")
    told = [record.message for record in caplog.records if "nothing of 2 modules will be moved" in record.message]
    assert len(told) == 1  # norm and head belong to the last slice
    slices.reverse()

    slices[1]["sources"] = slices[1]["sources"][1:]
    assert f"slices[1] lacks the base_model {target} among its sources" in refusal(config, tmp_path / "refused")


def test_a_layer_that_is_left_out_needs_a_mask_without_it(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    parameters = {"weight": 0.4, "mask": str(tmp_path / "m.safetensors")}
    sources = [
        {"model": str(target), "layer_range": [1, 2]},
        {"model": str(ability), "layer_range": [1, 2], "parameters": parameters},
    ]
    config = {"merge_method": "act", "base_model": str(target), "slices": [{"sources": sources}]}
    random_mask(target, ability, tmp_path / "m.safetensors")
    message = refusal(config, tmp_path / "refused")
    assert 'no output tensor matches "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", ' in message
    assert "make the mask with --exclude 'model.layers.0.self_attn.q_proj' --exclude " in message
    (tmp_path / "m.safetensors").unlink()
    random_mask(target, ability, tmp_path / "m.safetensors", exclude=["model.layers.0.*"])
    assert merged(config, tmp_path / "out")


@pytest.fixture(scope="module")
def vision_language_pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("vl")
    return [make_vision_language_model(root / name, seed=seed) for seed, name in enumerate(("target", "ability"))]


@pytest.mark.parametrize("as_modules", [False, True])
def test_a_vision_language_model_is_profiled_by_text_and_the_rest_copied(
    vision_language_pair, abilities_yml, sums_file, tmp_path, as_modules
):
    target, ability = vision_language_pair
    file = abilities_yml(target, ability, sums_file, ability_keys="    prompt: q\n    answer: a\n")
    run = CliRunner()
    result = run.invoke(main, ["profile", str(file), str(tmp_path / "profiles"), "--quiet", "--dtype", "float32"])
    assert result.exit_code == 1
    assert "leave them out with --exclude, such as --exclude 'model.visual.*'" in result.output
    arguments = [str(file), str(tmp_path / "profiles"), "--quiet", "--dtype", "float32", "--exclude", "model.visual.*"]
    result = run.invoke(main, ["profile", *arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    parameters = {"weight": 1.0, "mask": str(tmp_path / "profiles" / "sums.safetensors"), "mask_density": 0.3}
    config = act_config(target, (ability, parameters))
    if as_modules:
        models = config.pop("models")
        only_target = [{"model": str(target)}]
        config["modules"] = {"text_decoder": {"models": models}}
        config["modules"] |= {name: {"models": only_target} for name in ("multi_modal_projector", "vision_tower")}
    merged_state = merged(config, tmp_path / "out")
    before, other = state_of(target), state_of(ability)
    changed = {name for name in before if not torch.equal(before[name], merged_state[name])}
    assert changed
    assert all(name.startswith(("model.", "lm_head.")) for name in changed)
    up = "model.layers.1.mlp.up_proj.weight"
    rows = (merged_state[up] != before[up]).any(1)
    assert 0 < rows.sum() < len(rows)
    torch.testing.assert_close(merged_state[up][rows], other[up][rows])
    transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_a_tied_vision_language_model(tmp_path):
    """Its outer config says that the head is the embedding, its text config nothing."""
    target, ability = (make_vision_language_model(tmp_path / name, seed=i, tied=True) for i, name in enumerate("ta"))
    mask = random_mask(target, ability, tmp_path / "m.safetensors", density=0.3, exclude=["model.visual.*"])
    config = act_config(target, (ability, {"weight": 1.0, "mask": str(tmp_path / "m.safetensors")}))
    result, before = merged(config, tmp_path / "out"), state_of(target)
    assert HEAD not in result
    rows, columns = mask.channels["lm_head"], mask.channels["model.language_model.embed_tokens"]
    moved = rows[:, None] | columns
    assert torch.equal(result[EMBEDDING] != before[EMBEDDING], moved)


# Several documents, flags, dtypes, references


def test_mergekit_multi_merges_into_a_merge(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}
    first = act_config(target, (ability, parameters)) | {"name": "first"}
    second = act_config(target, (ability, parameters)) | {"base_model": "first"}
    (tmp_path / "c.yml").write_text(yaml.safe_dump_all([first, second]))
    arguments = [str(tmp_path / "c.yml"), "--out-path", str(tmp_path / "out"), "-I", str(tmp_path / "steps"), "--quiet"]
    run = CliRunner().invoke(mergekit_multi, arguments)
    assert run.exit_code == 0, (run.output, run.exception)
    half = plain_merge(state_of(target), [(state_of(ability), 0.5, mask)], tied=False)
    expected = plain_merge(half, [(state_of(ability), 0.5, mask)], tied=False)
    for name, tensor in state_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8)


def test_mergekit_multi_does_not_begin_if_a_later_merge_will_fail(pair_of, tmp_path):
    target, ability = pair_of("qwen2")
    random_mask(target, ability, tmp_path / "m.safetensors")
    first = act_config(target, (ability, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")})) | {"name": "first"}
    second = act_config(target, (Path("/gone away"), {"wieght": 0.5, "mask": "none.safetensors"})) | {
        "base_model": "first"
    }
    (tmp_path / "c.yml").write_text(yaml.safe_dump_all([first, second]))
    arguments = [str(tmp_path / "c.yml"), "--out-path", str(tmp_path / "out"), "-I", str(tmp_path / "steps"), "--quiet"]
    run = CliRunner().invoke(mergekit_multi, arguments)
    assert run.exit_code == 1
    assert 'the unnamed merge: merge method act has no parameter "wieght"' in run.output
    assert 'the unnamed merge: mask "none.safetensors" does not exist' in run.output
    assert "the unnamed merge: /gone away does not exist" in run.output
    assert 'the unnamed merge: mergekit-multi can\'t write "/gone away" down' in run.output
    assert not list((tmp_path / "steps").iterdir())


def test_pickles_are_read_lazily(pair_of, tmp_path):
    folders = []
    for folder in pair_of("qwen2"):
        folders.append(tmp_path / folder.name)
        shutil.copytree(folder, folders[-1], ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(state_of(folder), folders[-1] / "pytorch_model.bin")
    mask = random_mask(*folders, tmp_path / "m.safetensors")
    config = act_config(folders[0], (folders[1], {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    before, other = (state_of(folder) for folder in pair_of("qwen2"))
    result = merged(config, tmp_path / "out", "--lazy-unpickle")
    assert_merged(result, before, [(other, 0.5, mask)], tied=False)


@pytest.mark.parametrize("flags", [[], ["--async-write"], ["--clone-tensors"], ["--out-shard-size", "1M"]], ids=str)
def test_tensors_of_many_pages(tmp_path, flags):
    """Large enough that outputs share pages with the target's file and single rows are read."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1, "tie_word_embeddings": True}
    folders = [make_model(tiny_config("qwen2", **sizes), tmp_path / name, seed=i) for i, name in enumerate("ta")]
    mask = random_mask(*folders, tmp_path / "m.safetensors", density=0.02)
    config = act_config(folders[0], (folders[1], {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    before, other = (state_of(folder) for folder in folders)
    assert_merged(merged(config, tmp_path / "out", *flags), before, [(other, 0.5, mask)], tied=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(folders[0]).items())


def test_several_gpus(pair_of, tmp_path, monkeypatch):
    """mergekit's own executor for several GPUs, its worker thread on the processor, which has no streams."""
    from mergekit import multigpu_executor

    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_count", lambda: 1)
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_module", lambda _type: torch.cpu)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cpu, "synchronize", lambda device: None)
    target, ability = pair_of("qwen2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    result = merged(config, tmp_path / "out", "--multi-gpu")
    assert_merged(result, state_of(target), [(state_of(ability), 0.5, mask)], tied=False)


def test_dtype_and_out_dtype(pair_of, tmp_path):
    """Both models are cast to dtype first, as whole tensors would be; the result is rounded to out_dtype."""
    target, ability = pair_of("qwen2")
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    parameters = {"weight": 0.3, "mask": str(tmp_path / "m.safetensors")}
    narrow = [{n: t.bfloat16() for n, t in state_of(folder).items()} for folder in (target, ability)]
    result = merged(act_config(target, (ability, parameters), dtype="bfloat16"), tmp_path / "bfloat16")
    expected = plain_merge(narrow[0], [(narrow[1], 0.3, mask)], tied=False)
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())

    folders = [tmp_path / "b0", tmp_path / "b1"]
    for folder, source, state in zip(folders, (target, ability), narrow, strict=True):
        shutil.copytree(source, folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = act_config(folders[0], (folders[1], parameters), dtype="float32", out_dtype="bfloat16")
    result = merged(config, tmp_path / "wide")
    wide = [{n: t.float() for n, t in state.items()} for state in narrow]
    expected = plain_merge(wide[0], [(wide[1], 0.3, mask)], tied=False)
    assert all(torch.equal(result[name], tensor.bfloat16()) for name, tensor in expected.items())

    result = merged(act_config(folders[0], (ability, parameters)), tmp_path / "promoted")
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    assert_merged(result, wide[0], [(state_of(ability), 0.3, mask)], tied=False)


def test_a_lora_as_ability_model(pair_of, tmp_path):
    target, _ = pair_of("qwen2")
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    settings = peft.LoraConfig(r=4, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(model, settings)
    lora.save_pretrained(tmp_path / "lora")
    whole = tmp_path / "whole"
    lora.merge_and_unload().save_pretrained(whole)
    mask = random_mask(target, whole, tmp_path / "m.safetensors")
    config = act_config(target, (target, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    config["models"][0]["model"] = f"{target}+{tmp_path / 'lora'}"
    result = merged(config, tmp_path / "out", "--lora-merge-cache", str(tmp_path / "cache"))
    assert_merged(result, state_of(target), [(state_of(whole), 0.5, mask)], tied=False)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_stored_one_by_one_or_fused(pair_of, tmp_path, name):
    """mergekit writes the v5 layout; what is stored in an older one is converted while it is read."""
    target, ability = pair_of(name)
    mask = random_mask(target, ability, tmp_path / "m.safetensors")
    config = act_config(target, (ability, {"weight": 0.5, "mask": str(tmp_path / "m.safetensors")}))
    result = merged(config, tmp_path / "out")
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (target, ability)]
    expected = plain_merge(models[0], [(models[1], 0.5, mask)], tied=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert result
    for key, tensor in expected.items():
        torch.testing.assert_close(loaded[key], tensor, rtol=3e-7, atol=1e-8)
