"""Models that do not fit the memory: what stays, what is streamed, and that scores do not depend on it."""

from __future__ import annotations

import gc
import logging
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from oracle import plain_profile
from samples import ARCHITECTURES, as_ability, assert_close, random_samples
from tiny import SIZES, make_model

from mergekit_act.abilities.batches import cut_batches
from mergekit_act.cli import main
from mergekit_act.profiling import ProfilingSettings, open_pair, profile_pair
from mergekit_act.streaming import weights
from mergekit_act.streaming.chunks import ChunkCutter
from mergekit_act.streaming.hidden import HiddenStates
from mergekit_act.streaming.memory import MemoryPlan, free_memory, parse_bytes, plan_memory

SETTINGS = {"device": "cpu", "dtype": "float32", "batch_tokens": 40, "quiet": True}


def least_budget(pair, abilities, **changes) -> int:
    """What the refusal of a tiny budget says is needed, and the rounding of what it says."""
    with pytest.raises(ValueError, match="need about") as caught:
        profile_pair(pair, abilities, ProfilingSettings(memory_budget=1, **SETTINGS | changes))
    number, unit = re.search(r"need about ([\d.]+ [MG]B)", str(caught.value))[1].split()
    return int(parse_bytes(number + unit) * 1.006)


@pytest.mark.parametrize(
    "name",
    [*ARCHITECTURES, "qwen3_moe", "gpt_oss"],
)
def test_streamed_profiles_are_the_resident_ones_to_the_bit(pair_of, name, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mergekit_act")
    pair = open_pair(*map(str, pair_of(name)))
    abilities = [as_ability(random_samples(), "one"), as_ability(random_samples(1), "two")]
    whole = profile_pair(pair, abilities, ProfilingSettings(memory_budget=10**12, **SETTINGS))
    monkeypatch.setattr(weights, "HEAD_ROWS", 48)  # the head in three slices
    resident = profile_pair(pair, abilities, ProfilingSettings(memory_budget=10**12, **SETTINGS))
    for profile, expected in zip(resident, whole, strict=True):
        assert_close(profile.scores, {module: scores.double() for module, scores in expected.scores.items()})
    assert "both models stay in memory" in caplog.text
    ones = SETTINGS | {"batch_tokens": 1}  # single rows are multiplied by other kernels
    alone, alone_streamed = (
        profile_pair(pair, abilities[:1], ProfilingSettings(memory_budget=budget, **ones))[0]
        for budget in (10**12, least_budget(pair, abilities))
    )
    assert all(torch.equal(alone.scores[module], alone_streamed.scores[module]) for module in alone.scores)
    least = least_budget(pair, abilities)
    stay = []
    for budget in (least, least + 40_000):
        caplog.clear()
        streamed = profile_pair(pair, abilities, ProfilingSettings(memory_budget=budget, **SETTINGS))
        stay.append(int(re.search(r"(\d) of 5 pieces of the models stay in memory", caplog.text)[1]))
        for expected, profile in zip(resident, streamed, strict=True):
            assert all(torch.equal(expected.scores[module], profile.scores[module]) for module in expected.scores)
            assert profile.data == expected.data
    assert stay[0] <= stay[1] < 5  # more memory holds no fewer, and something is streamed


@pytest.mark.parametrize("name", [*ARCHITECTURES, "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("criterion", ["local", "attribution"])
def test_other_criteria_streamed_are_the_resident_ones_to_the_bit(pair_of, name, criterion, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mergekit_act")
    monkeypatch.setattr(weights, "HEAD_ROWS", 48)
    pair = open_pair(*map(str, pair_of(name)))
    abilities = [as_ability(random_samples(), "one"), as_ability(random_samples(1), "two")]
    changes = {"criterion": criterion, "points": 2 if criterion == "attribution" else 1}
    least = least_budget(pair, abilities, **changes)
    resident, streamed = (
        profile_pair(pair, abilities, ProfilingSettings(memory_budget=budget, **SETTINGS | changes))
        for budget in (10**12, least)
    )
    assert "both models stay in memory" in caplog.text
    assert re.search(r"[01] of 5 pieces of the models stay in memory", caplog.text)
    for expected, profile in zip(resident, streamed, strict=True):
        assert all(torch.equal(expected.scores[module], profile.scores[module]) for module in expected.scores)
        assert all(torch.equal(expected.damage[module], profile.damage[module]) for module in expected.damage)
        assert profile.data == expected.data


def test_no_weight_is_left_behind(pair_of, monkeypatch):
    """A streamed layer has no weights but while it runs: another's would be used without a word."""
    made = []
    original = weights.PairWeights.__init__
    monkeypatch.setattr(
        weights.PairWeights, "__init__", lambda self, *args: (made.append(self), original(self, *args))[1]
    )
    pair = open_pair(*map(str, pair_of("qwen3")))
    abilities = [as_ability(random_samples())]
    profile_pair(pair, abilities, ProfilingSettings(memory_budget=least_budget(pair, abilities), **SETTINGS))
    streamed = [made[-1].pieces[place].layer for place in made[-1]._order]
    for model in made[-1].models:
        for layer in streamed:
            if layer is not None:
                assert {p.device.type for p in model.segmented.layers[layer].parameters()} == {"meta"}
        assert model.segmented.embedding.weight.device.type == "meta"


def test_files_are_closed_after_each_piece(pair_of):
    pair = open_pair(*map(str, pair_of("mistral")))
    abilities = [as_ability(random_samples())]
    profile_pair(pair, abilities, ProfilingSettings(memory_budget=least_budget(pair, abilities), **SETTINGS))
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    assert str(pair_of("mistral")[0].resolve()) not in maps
    assert str(pair_of("mistral")[1].resolve()) not in maps


def test_old_pickles_stream_too(pair_of, tmp_path):
    target, ability = pair_of("llama")
    state = transformers.AutoModelForCausalLM.from_pretrained(ability).state_dict()
    for zipped in (True, False):
        folder = tmp_path / str(zipped)
        folder.mkdir()
        (folder / "config.json").write_text((ability / "config.json").read_text())
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        pair = open_pair(str(target), str(folder))
        abilities = [as_ability(random_samples())]
        streamed, resident = (
            profile_pair(pair, abilities, ProfilingSettings(memory_budget=budget, **SETTINGS))[0]
            for budget in (least_budget(pair, abilities), 10**12)
        )
        assert all(torch.equal(resident.scores[module], streamed.scores[module]) for module in resident.scores)


def test_budgets_on_the_command_line(pair_of, sums_file, abilities_yml, tmp_path):
    path = abilities_yml(*pair_of("qwen2"), sums_file, ability_keys="    prompt: q\n    answer: a\n")
    command = ["profile", str(path), str(tmp_path / "out"), "--dtype", "float32", "--memory-budget"]
    for wrong in ("12", "much"):
        run = CliRunner().invoke(main, [*command, wrong])
        assert run.exit_code == 2
        assert f'"{wrong}" is no size; expected a number with a unit, such as 1.5GB or 900MB' in run.output
    run = CliRunner().invoke(main, [*command, "100KB"])
    assert run.exit_code == 1
    assert re.search(
        r"a layer of both models, or a slice of their heads, and a micro-batch of \d+ tokens need about ([\d.]+ MB) on "
        r"cpu; --memory-budget says 100 kB. Say a smaller --batch-tokens, or a --memory-budget above \1\n",
        run.output,
    )
    assert not (tmp_path / "out").exists()
    run = CliRunner().invoke(main, [*command, "2.4MB"])
    assert run.exit_code == 0, run.output


def test_missing_tensors_are_told_before_anything_is_loaded(pair_of, tmp_path):
    from safetensors.torch import load_file, save_file

    target, ability = pair_of("llama")
    state = load_file(ability / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.norm.weight"] = state["model.norm.weight"][:5].clone()
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "config.json").write_text((ability / "config.json").read_text())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    pair = open_pair(str(target), str(folder))
    with pytest.raises(ValueError, match="does not fit its config") as caught:
        profile_pair(pair, [as_ability(random_samples())], ProfilingSettings(memory_budget=1, **SETTINGS))
    assert str(caught.value).endswith(
        '"model.layers.1.mlp.up_proj.weight" is missing; "model.norm.weight" is [5], the config says [32]'
    )


def test_plans_by_hand():
    sizes = {"whole": 100, "working": 10, "outside": 2, "hidden": 4, "all_hidden": 40}
    pieces = [20, 20, 20, 20]
    assert plan_memory(pieces, budget=114, **sizes) == MemoryPlan(hidden=4)
    # 10 + 2 + a fifth of the budget for hidden states + the pieces that stay + buffers
    assert plan_memory(pieces, budget=114, **sizes | {"whole": 130}) == MemoryPlan(frozenset({2}), 1, 22)
    assert plan_memory(pieces, budget=113, **sizes) == MemoryPlan(frozenset({0, 2, 3}), 2, 22)
    assert plan_memory(pieces, budget=92, **sizes) == MemoryPlan(frozenset({0, 2, 3}), 2, 18)
    assert plan_memory(pieces, budget=60, **sizes) == MemoryPlan(frozenset({0, 1, 2, 3}), 2, 4)
    assert plan_memory(pieces, budget=36, **sizes) == MemoryPlan(frozenset({0, 1, 2, 3}), 1, 4)
    assert plan_memory(pieces, budget=35, **sizes) == 36


def test_sizes():
    assert parse_bytes("1.5GB") == 1_500_000_000
    assert parse_bytes("8 GiB") == 8 << 30
    assert parse_bytes("900mb") == 900_000_000
    assert 0 < free_memory("cpu", 2) <= free_memory("cpu") < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("place", ["device", "host"])
def test_hidden_states_come_back_as_they_were(place):
    hidden = HiddenStates(place, "cpu")
    assert hidden.take("a") is None
    first, second = torch.randn(3, 5, 8).bfloat16(), torch.randn(2, 7)
    hidden.put("a", first)
    hidden.put("b", second)
    assert torch.equal(hidden.take("a"), first)
    hidden.put("a", first[:, :2] + 1)  # the head's input is smaller
    assert torch.equal(hidden.take("a"), first[:, :2] + 1)
    assert torch.equal(hidden.take("b"), second)
    assert hidden.take("b").dtype == torch.float32
    hidden.close()
    assert hidden.take("b") is None


def test_chunks_grow_while_models_are_waited_for(monkeypatch):
    samples = as_ability([([1] * 1000, [True] * 1000)] * 200).samples
    batches = list(cut_batches(samples, 4000))
    cutter = ChunkCutter(2 * 16 * 20_000, 16, 100, on_host=False, processes=1)
    assert cutter.cut(batches) == (4, "device")  # 16,384 tokens are four times 4,000
    cutter.learn(10, 0.1)
    assert cutter.cut(batches) == (4, "device")
    cutter.learn(10, 5)
    assert cutter.cut(batches) == (5, "device")  # twice as many do not fit: 20,000 do
    assert cutter.cut(batches[-1:]) == (1, "device")
    cutter.learn(1000, 1)
    assert cutter.cut(batches) == (4, "device")
    narrow = ChunkCutter(16 * 5000, 16, 1_000_000, on_host=False, processes=1)
    assert narrow.cut(batches) == (1, "device")  # the rows of 5,000 tokens' embeddings fit the device
    assert ChunkCutter(0, 16, 100, on_host=False, processes=1).cut(batches)[0] == 1


def test_arguments_that_depend_on_embeddings_are_kept(tmp_path):
    """Gemma 4 gives each layer inputs made from the token embeddings, which a streamed model has no more."""
    config = transformers.Gemma4TextConfig(
        **SIZES
        | {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 16, "sliding_window": 8}
        | {"vocab_size_per_layer_input": 128, "num_kv_shared_layers": 0}
    )
    folders = [make_model(config, tmp_path / name, seed=i) for i, name in enumerate("ta")]
    pair = open_pair(*map(str, folders))
    abilities = [as_ability(random_samples())]
    least = least_budget(pair, abilities)
    (resident,), (streamed,) = (
        profile_pair(pair, abilities, ProfilingSettings(memory_budget=n, **SETTINGS)) for n in (10**12, least)
    )
    assert all(torch.equal(resident.scores[module], streamed.scores[module]) for module in resident.scores)
    assert_close(resident.scores, plain_profile(*folders, random_samples(), pair.layout.modules))


def test_out_of_memory_names_what_to_say(pair_of, monkeypatch):
    def never(self, hidden):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.models.qwen2.modeling_qwen2.Qwen2MLP, "forward", never)
    one = [as_ability([([5, 6, 7], [False, True, True])])]
    with pytest.raises(
        ValueError,
        match=r"out of memory on cpu; say a --memory-budget below .* weights stay, or a smaller --batch-tokens",
    ):
        profile_pair(open_pair(*map(str, pair_of("qwen2"))), one, ProfilingSettings(device="cpu", quiet=True))
