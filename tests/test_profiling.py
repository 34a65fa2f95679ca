"""Profiles against an independent implementation, whatever the architecture, batch size and padding."""

from __future__ import annotations

import json
import math
import shutil

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from oracle import plain_experts, plain_profile
from safetensors.torch import load_file, save_file
from samples import ARCHITECTURES, as_ability, assert_close, random_samples
from tiny import SIZES, make_model, make_tokenizer, tiny_config

from mergekit_act.abilities import Sample
from mergekit_act.abilities.batches import cut_batches
from mergekit_act.artifacts import load_profile
from mergekit_act.channels import layout_of_model
from mergekit_act.cli import main
from mergekit_act.profiling import ProfilingSettings, open_pair, profile_pair, profile_without_data
from mergekit_act.streaming.loading import ModelWeights
from mergekit_act.streaming.segments import SegmentedModel


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_profiles_equal_whole_forwards_with_hooks(pair_of, name):
    target, ability = pair_of(name)
    pair = open_pair(str(target), str(ability))
    samples = random_samples()
    batch_tokens = {"qwen2": 1, "llama": 64, "gpt2": 70}.get(name, 4096)
    (profile,) = profile_pair(
        pair, [as_ability(samples)], ProfilingSettings(device="cpu", dtype="float32", batch_tokens=batch_tokens)
    )
    assert_close(profile.scores, plain_profile(target, ability, samples, pair.layout.modules))
    assert profile.samples == 5
    assert profile.answer_tokens == 8 + 4 + 30 + 1 + 4
    assert profile.dtype == "float32"


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_every_expert_and_router_is_scored(pair_of, name):
    """The two models route differently; an expert that a token is not routed to has activation 0 for it."""
    target, ability = pair_of(name)
    pair = open_pair(str(target), str(ability))
    samples = random_samples()
    (profile,) = profile_pair(
        pair, [as_ability(samples)], ProfilingSettings(device="cpu", dtype="float32", batch_tokens=64)
    )
    plain = [m for m in pair.layout.modules if "experts" not in m and not m.endswith((".gate", ".router"))]
    expected = plain_profile(target, ability, samples, plain) | plain_experts(target, ability, samples)
    assert_close(profile.scores, {module: expected[module] for module in pair.layout.modules})
    answers = 8 + 4 + 30 + 1 + 4
    assert [sum(counts) for counts in profile.data["expert_tokens"].values()] == [2 * answers] * 2


def test_segments_of_experts_give_the_models_own_logits(pair_of):
    model = transformers.AutoModelForCausalLM.from_pretrained(pair_of("gpt_oss")[0], dtype=torch.float32).eval()
    segmented = SegmentedModel(model)
    ids = torch.arange(3, 45).reshape(3, 14)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        with segmented.observing(layout_of_model(model).modules):
            carried = segmented.embed(ids)
            for index in range(len(segmented.layers)):
                carried.hidden = segmented.layer(index, ids, carried)
            logits = segmented.head(segmented.normalise(ids, carried.hidden))
        torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-6)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)  # the model is as it was


def test_experts_that_do_not_show_their_outputs_are_refused(tmp_path):
    config = transformers.Llama4TextConfig(
        **SIZES | {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48, "bos_token_id": 1}
    )
    folders = [make_model(config, tmp_path / name, seed=i) for i, name in enumerate("ta")]
    pair = open_pair(*map(str, folders))
    with pytest.raises(ValueError, match=r'the experts of "model\.layers\.0\.feed_forward\.experts" do not show their'):
        profile_pair(pair, [as_ability(random_samples())], ProfilingSettings(device="cpu", dtype="float32"))


def test_experts_in_modules_of_their_own_are_refused(tmp_path):
    config = transformers.JetMoeConfig(
        **SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2}
    )
    folders = [make_model(config, tmp_path / name, seed=i) for i, name in enumerate("ta")]
    pair = open_pair(*map(str, folders))
    assert pair.layout.channel_shape("model.layers.0.mlp.input_linear")[0] == 4
    with pytest.raises(ValueError, match="do not show their outputs; it cannot be profiled"):
        profile_pair(pair, [as_ability(random_samples())], ProfilingSettings(device="cpu", dtype="float32"))


def test_saved_buffers_are_loaded(tmp_path):
    """A router's correction decides which experts a token goes to."""
    config = transformers.DeepseekV3Config(
        **SIZES
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"first_k_dense_replace": 1, "moe_intermediate_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    )
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    folders = [make_model(config, tmp_path / side, seed=i) for i, side in enumerate("ta")]
    state = load_file(folders[0] / "model.safetensors")
    state[name] = torch.tensor([3.0, 0.0, 1.0, 0.0])
    save_file(state, folders[0] / "model.safetensors", metadata={"format": "pt"})
    pair = open_pair(*map(str, folders))
    skeleton, _ = pair.skeletons()
    ModelWeights(SegmentedModel(skeleton), pair.target, torch.float32, "cpu").load()
    assert skeleton.get_buffer(name).tolist() == [3.0, 0.0, 1.0, 0.0]
    samples = random_samples()
    (profile,) = profile_pair(pair, [as_ability(samples)], ProfilingSettings(device="cpu", dtype="float32"))
    expected = plain_experts(*folders, samples)
    assert_close({module: profile.scores[module] for module in expected}, expected)


def test_weight_criterion_of_experts(pair_of):
    target, ability = pair_of("gpt_oss")
    states = [transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (target, ability)]
    profile = profile_without_data(open_pair(str(target), str(ability)), "weight")
    name = "model.layers.1.mlp.experts.down_proj"
    change, bias = (states[1][key].double() - states[0][key].double() for key in (name, f"{name}_bias"))
    expected = (change.square().sum(1) + bias.square()).sqrt()
    torch.testing.assert_close(profile.scores[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_left_padding_gives_the_same_scores(pair_of):
    target, ability = pair_of("gemma3")
    pair = open_pair(str(target), str(ability))
    samples = random_samples(1)
    (profile,) = profile_pair(pair, [as_ability(samples)], ProfilingSettings(device="cpu", dtype="float32"))
    assert_close(profile.scores, plain_profile(target, ability, samples, pair.layout.modules, pad_left=6))


def test_batch_size_changes_nothing_but_rounding(pair_of):
    pair = open_pair(*map(str, pair_of("qwen3")))
    ability = as_ability(random_samples())
    one, many = (
        profile_pair(pair, [ability], ProfilingSettings(device="cpu", dtype="float32", batch_tokens=n))[0]
        for n in (1, 4096)
    )
    assert_close(many.scores, {module: scores.double() for module, scores in one.scores.items()})


def test_abilities_of_one_run_do_not_mix(pair_of):
    pair = open_pair(*map(str, pair_of("llama")))
    first, second = as_ability(random_samples(0), "first"), as_ability(random_samples(1), "second")
    together = profile_pair(pair, [first, second], ProfilingSettings(device="cpu", dtype="float32"))
    alone = profile_pair(pair, [second], ProfilingSettings(device="cpu", dtype="float32"))
    assert [profile.ability for profile in together] == ["first", "second"]
    for module, scores in alone[0].scores.items():
        assert torch.equal(together[1].scores[module], scores)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2", "falcon"])
def test_segments_give_the_logits_of_the_models_own_forward(pair_of, name):
    folder, _ = pair_of(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    segmented = SegmentedModel(model)
    ids = torch.arange(3, 45).reshape(3, 14)
    with torch.no_grad():
        carried = segmented.embed(ids)
        for index in range(len(segmented.layers)):
            carried.hidden = segmented.layer(index, ids, carried)
        logits = segmented.head(segmented.normalise(ids, carried.hidden))
        whole = model(input_ids=ids, use_cache=False).logits
        cap = getattr(model.config, "final_logit_softcapping", None)
        assert torch.equal(cap * torch.tanh(logits / cap) if cap else logits, whole)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)  # the model is as it was


def test_each_model_runs_under_its_own_rope(pair_of, tmp_path):
    target, _ = pair_of("qwen2")
    shutil.copytree(target, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 7.0
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    pair = open_pair(str(target), str(tmp_path / "other"))
    samples = random_samples()
    (profile,) = profile_pair(pair, [as_ability(samples)], ProfilingSettings(device="cpu", dtype="float32"))
    assert_close(profile.scores, plain_profile(target, tmp_path / "other", samples, pair.layout.modules))
    assert float(profile.scores["model.layers.0.self_attn.q_proj"].max()) == 0  # before attention they are one model
    assert float(profile.scores["model.layers.0.self_attn.o_proj"].min()) > 0


def test_vocabularies_of_different_length_are_compared_on_common_ids(pair_of, tmp_path):
    target, _ = pair_of("qwen2")
    short = make_model(tiny_config("qwen2", vocab_size=120), tmp_path / "short", seed=5)
    pair = open_pair(str(target), str(short))
    samples = [([i % 100 + 3 for i in ids], answer) for ids, answer in random_samples()]
    (profile,) = profile_pair(pair, [as_ability(samples)], ProfilingSettings(device="cpu", dtype="float32"))
    assert profile.shared_rows == {"lm_head": 120}
    assert profile.scores["lm_head"].shape == (128,)
    assert profile.scores["lm_head"][120:].tolist() == [0.0] * 8
    assert float(profile.scores["lm_head"][:120].min()) > 0
    with pytest.raises(ValueError, match=r'ability "x" has token id 125; .* has 0 to 119'):
        profile_pair(pair, [as_ability([([3, 125], [False, True])])], ProfilingSettings(device="cpu"))


def test_weight_criterion_is_the_norm_of_what_a_channel_owns(pair_of):
    target, ability = pair_of("qwen2-tied")
    states = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (target, ability)
    ]
    change = {name: states[1][name].double() - states[0][name].double() for name in states[0]}
    profile = profile_without_data(open_pair(str(target), str(ability)), "weight")
    q_proj = "model.layers.1.self_attn.q_proj"
    expected = {
        q_proj: (change[f"{q_proj}.weight"].square().sum(1) + change[f"{q_proj}.bias"].square()).sqrt(),
        "model.embed_tokens": change["model.embed_tokens.weight"].square().sum(0).sqrt(),
        "lm_head": change["model.embed_tokens.weight"].square().sum(1).sqrt(),
        "model.norm": change["model.norm.weight"].abs(),
    }
    for module, column in expected.items():
        torch.testing.assert_close(profile.scores[module].double(), column, rtol=1e-6, atol=1e-7)
    assert (profile.criterion, profile.ability) == ("weight", "weight")


def test_random_criterion_repeats_with_its_seed(pair_of):
    pair = open_pair(*map(str, pair_of("qwen2")))
    first, again, other = (profile_without_data(pair, "random", random_seed=seed).scores for seed in (0, 0, 1))
    assert all(torch.equal(first[module], again[module]) for module in first)
    assert not torch.equal(first["lm_head"], other["lm_head"])


def test_micro_batches_are_cut_by_padded_tokens():
    samples = [Sample(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in (3, 10, 4, 4, 9)]
    batches = list(cut_batches(samples, 20))
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 10), (3, 4)]
    assert [batch.tokens for batch in batches] == [19, 11]
    assert batches[1].sample_of.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert batches[1].position_of.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert len(list(cut_batches(samples, 1))) == 5


def test_command_writes_one_profile_per_ability(pair_of, sums_file, abilities_yml, tmp_path):
    target, ability = pair_of("qwen2")
    path = abilities_yml(
        target, ability, sums_file, ability_keys=f"    prompt: q\n    answer: a\n  half:\n    dataset: {sums_file}\n"
        "    prompt: '{q}='\n    answer: a\n    samples: 5\n"
    )  # fmt: skip
    out = tmp_path / "profiles"
    run = CliRunner().invoke(main, ["profile", str(path), str(out), "--dtype", "float32", "--batch-tokens", "256"])
    assert run.exit_code == 0, run.output
    assert run.stdout.splitlines() == [f"{out}/sums.safetensors", f"{out}/half.safetensors"]
    profile = load_profile(out / "half.safetensors")
    assert profile.samples == 5
    assert profile.target["model"] == "target"
    assert profile.data["prompt"] == "{q}="
    assert all(math.isfinite(float(scores.sum())) for scores in profile.scores.values())

    again = CliRunner().invoke(main, ["profile", str(path), str(out)])
    assert again.exit_code == 1
    assert again.output.endswith("half.safetensors exist. Choose another name or say --overwrite.\n")
    before = (out / "sums.safetensors").read_bytes()
    run = CliRunner().invoke(
        main, ["profile", str(path), str(out), "--dtype", "float32", "--batch-tokens", "256", "--overwrite"]
    )
    assert run.exit_code == 0, run.output
    assert (out / "sums.safetensors").read_bytes() == before  # a profile is a function of its inputs


def refusal(target, ability) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_pair(str(target), str(ability))
    return str(caught.value)


def test_pairs_that_do_not_fit_are_refused(pair_of, tmp_path):
    qwen2, llama, tied = pair_of("qwen2")[0], pair_of("llama")[0], pair_of("qwen2-tied")[0]
    message = refusal(qwen2, llama)
    assert "(qwen2)" in message
    assert "(llama) differ in their modules" in message
    assert '"model.layers.0.self_attn.q_proj.bias" is [32] in the first, missing in the second' in message
    wide = make_model(tiny_config("qwen2", intermediate_size=64), tmp_path / "wide", seed=3)
    assert '"model.layers.0.mlp.up_proj.weight" is [48, 32] in the first, [64, 32] in the second' in refusal(
        qwen2, wide
    )
    assert "ties its head to its embedding (model.embed_tokens.weight = lm_head.weight) and" in refusal(tied, qwen2)
    assert open_pair(str(qwen2), str(tied)).ability_layout.tied  # the other way round is fine
    assert "; expected a model folder or a Hub id" in refusal(tmp_path / "no", qwen2)


def test_incomplete_checkpoints_are_refused(pair_of, tmp_path):
    qwen2 = pair_of("qwen2")[0]
    shutil.copytree(qwen2, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        open_pair(str(qwen2), str(tmp_path / "empty"))


def test_untied_target_with_tied_ability_model(pair_of):
    target, ability = pair_of("qwen2")[0], pair_of("qwen2-tied")[1]
    pair = open_pair(str(target), str(ability))
    samples = random_samples()
    (profile,) = profile_pair(pair, [as_ability(samples)], ProfilingSettings(device="cpu", dtype="float32"))
    assert_close(profile.scores, plain_profile(target, ability, samples, pair.layout.modules))
    weights = profile_without_data(pair, "weight").scores["lm_head"]
    states = [transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (target, ability)]
    expected = (states[1]["model.embed_tokens.weight"] - states[0]["lm_head.weight"]).norm(dim=1)
    torch.testing.assert_close(weights, expected)


def test_checkpoints_of_any_kind_give_the_same_profile(pair_of, tmp_path):
    """Old pickles without prefix, and a tied checkpoint that stores only its head."""
    samples = [as_ability(random_samples())]
    for name, prefix in (("gpt2", "transformer."), ("qwen2-tied", "model.")):
        target, ability = pair_of(name)
        shutil.copytree(ability, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        state = load_file(ability / "model.safetensors")
        if name == "gpt2":
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        else:
            state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
        torch.save(state, tmp_path / name / "pytorch_model.bin", _use_new_zipfile_serialization=name != "gpt2")
        whole, old = (
            profile_pair(
                open_pair(str(target), str(folder)), samples, ProfilingSettings(device="cpu", dtype="float32")
            )[0].scores
            for folder in (ability, tmp_path / name)
        )
        assert all(torch.equal(whole[module], old[module]) for module in whole)


def test_sharded_half_precision_and_lora_references(pair_of, tmp_path):
    target, ability = pair_of("llama")
    samples = [as_ability(random_samples())]

    def scores(reference: str) -> dict[str, torch.Tensor]:
        pair = open_pair(str(target), reference, lora_merge_cache=str(tmp_path / "merged"))
        return dict(profile_pair(pair, samples, ProfilingSettings(device="cpu", dtype="float32"))[0].scores)

    whole = scores(str(ability))
    model = transformers.AutoModelForCausalLM.from_pretrained(ability, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = scores(str(tmp_path / "sharded"))
    assert all(torch.equal(whole[module], sharded[module]) for module in whole)

    model.half().save_pretrained(tmp_path / "half")
    rounded = make_model(tiny_config("llama"), tmp_path / "rounded", seed=2)
    state = {name: tensor.half().float() for name, tensor in load_file(rounded / "model.safetensors").items()}
    save_file(state, rounded / "model.safetensors", metadata={"format": "pt"})
    half, expected = scores(str(tmp_path / "half")), scores(str(rounded))
    assert all(torch.equal(half[module], expected[module]) for module in half)

    torch.manual_seed(0)
    adapted = peft.get_peft_model(model.float(), peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="has a LoRA; say --lora-merge-cache FOLDER"):
        open_pair(str(target), f"{ability}+{tmp_path / 'lora'}")
    with_lora = scores(f"{ability}+{tmp_path / 'lora'}")
    adapted.merge_and_unload().save_pretrained(tmp_path / "by-hand")
    by_hand = scores(str(tmp_path / "by-hand"))
    layer = "model.layers.0.self_attn.v_proj"
    assert not torch.equal(with_lora[layer], whole[layer])
    # v_proj's rounding may differ in how the two merges are ordered
    assert all(torch.allclose(with_lora[module], by_hand[module], rtol=1e-3) for module in with_lora)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_samples_longer_than_the_models_take(pair_of, name):
    """As evaluate does, whether positions are a table or a rotation that was never trained for more."""
    pair = open_pair(*map(str, pair_of(name)))
    ability = as_ability([([5] * 129, [True] * 129)])
    with pytest.raises(ValueError, match=r"a sample of 129 tokens; .* has 128 positions\. Set max_length to 128"):
        profile_pair(pair, [ability], ProfilingSettings(device="cpu"))


def test_activations_that_are_not_finite_write_nothing(pair_of, sums_file, abilities_yml, tmp_path):
    target, ability = pair_of("qwen2")
    shutil.copytree(ability, tmp_path / "nan")
    state = load_file(ability / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(state, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    path = abilities_yml(target, tmp_path / "nan", sums_file, ability_keys="    prompt: q\n    answer: a\n")
    run = CliRunner().invoke(main, ["profile", str(path), str(tmp_path / "out"), "--quiet", "--dtype", "float32"])
    assert run.exit_code == 1
    assert 'ability "sums": activations of ' in run.output
    assert '(the first is "model.layers.1.mlp.up_proj"); try --dtype float32' in run.output
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_not_needed_for_token_ids(pair_of, tmp_path, abilities_yml):
    folders = []
    for folder in pair_of("llama"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("token*", "chat*", "special*"))
        folders.append(tmp_path / folder.name)
    data = tmp_path / "ids.jsonl"
    data.write_text(
        "".join(json.dumps({"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, i]}) + "\n" for i in range(12))
    )
    run = CliRunner().invoke(main, ["profile", str(abilities_yml(*folders, data)), str(tmp_path / "out"), "--quiet"])
    assert run.exit_code == 0, run.output
    assert load_profile(tmp_path / "out" / "sums.safetensors").answer_tokens == 24
    assert make_tokenizer().chat_template  # the pair itself has one
