"""Evaluation: likelihoods and greedy answers against plain implementations, intervals, files, mistakes."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_act.abilities import Tokenizers, collect_samples, load_abilities
from mergekit_act.cli import main
from mergekit_act.evaluation import collect_held_out, generate_answers, score_answers
from mergekit_act.evaluation.statistics import measure

KEYS = "    prompt: q\n    answer: a\n"
HELD_OUT = KEYS + "    evaluate: {samples: 6, max_new_tokens: 5}\n"


@pytest.fixture
def held_out_of(pair_of, abilities_yml, sums_file):
    """Architecture, keys -> (model, the ability's held-out samples)."""

    def get(name, keys=HELD_OUT):
        target, ability = pair_of(name)
        file = load_abilities(abilities_yml(target, ability, sums_file, ability_keys=keys))
        (one,) = collect_held_out(file, Tokenizers(str(target), str(ability)))
        return AutoModelForCausalLM.from_pretrained(target).eval(), one

    return get


@torch.no_grad()
def plain_losses(model, samples):
    """−log p of the answers, a sample at a time, from all logits."""
    found = []
    for sample in samples:
        logs = model(input_ids=sample.input_ids[None]).logits[0].double().log_softmax(-1)
        found.append(-sum(logs[t - 1, sample.input_ids[t]] for t in sample.is_answer.nonzero().flatten() if t > 0))
    return torch.stack(found)


@torch.no_grad()
def plain_answer(model, prompt, ends, new_tokens):
    """Greedy tokens, without a cache and without padding."""
    ids = prompt
    while len(ids) < len(prompt) + new_tokens:
        token = model(input_ids=ids[None], use_cache=False).logits[0, -1].argmax()
        if int(token) in ends:
            break
        ids = torch.cat([ids, token[None]])
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2", "qwen3_moe"])
def test_likelihoods_and_answers_are_those_of_plain_loops(held_out_of, name):
    model, held_out = held_out_of(name)
    samples = sorted(held_out.samples, key=lambda sample: len(sample.input_ids))  # shortest first, unlike in batches
    assert len(samples[0].input_ids) < len(samples[-1].input_ids)
    expected = plain_losses(model, samples)
    for batch_tokens in (1, 60, 4096):
        losses, tokens = score_answers(model, samples, batch_tokens=batch_tokens)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        assert tokens.tolist() == [int(sample.is_answer.sum()) for sample in samples]
        generated = generate_answers(model, held_out, batch_tokens=batch_tokens)
        texts = [held_out.decode(plain_answer(model, prompt, [2], 5)) for prompt in held_out.prompts]
        assert [answer.text for answer in generated] == texts


def test_settings_of_generation_that_a_model_brings_do_not_count(held_out_of):
    model, held_out = held_out_of("qwen2")
    before = generate_answers(model, held_out)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_new_tokens=1)
    assert generate_answers(model, held_out) == before
    assert model.generation_config.repetition_penalty == 3.0


def test_held_out_samples_are_others_than_profiled_ones(pair_of, abilities_yml, sums_file):
    target, ability = pair_of("qwen2")
    file = load_abilities(abilities_yml(target, ability, sums_file, ability_keys=HELD_OUT))
    tokenizers = Tokenizers(str(target), str(ability))
    (held_out,) = collect_held_out(file, tokenizers)
    profiled = {tuple(sample.input_ids.tolist()) for sample in collect_samples(file, "sums", tokenizers).samples}
    assert len(held_out.samples) == 6
    assert not profiled & {tuple(sample.input_ids.tolist()) for sample in held_out.samples}


def test_prompts_and_references(held_out_of):
    _, held_out = held_out_of("qwen2")
    for prompt, reference, sample in zip(held_out.prompts, held_out.references, held_out.samples, strict=True):
        text = held_out.tokenizer.decode(prompt)
        assert text.endswith("<|im_start|>assistant\n")
        a, b = text.split("user\n")[1].split("<|im_end|>")[0].split("+")
        assert reference == str(int(a) + int(b))
        assert held_out.tokenizer.decode(sample.input_ids) == f"{text}{reference}<|im_end|>"


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        (r"\d+", "first 3, then 42.", "42"),
        (r"answer: (\w+)", "answer: a answer: b", "b"),
        (r"answer: (\w+)", "nothing", None),
        (r"x(y)?", "x", ""),
    ],
)
def test_extract_reads_the_last_match(held_out_of, extract, text, answer):
    keys = KEYS + f"    evaluate: {{samples: 6, extract: '{extract}|\\d+'}}\n"
    if answer is not None:
        _, held_out = held_out_of("qwen2", keys)
        assert held_out.references  # sums are numbers
    _, held_out = held_out_of("qwen2", KEYS + f"    evaluate: {{samples: 6, extract: '{extract}'}}\n")
    assert held_out.read(text) == answer


def test_measures_by_hand():
    found = measure([1.0, 3.0], [1, 3])
    assert found.value == 1.0  # per token, not per sample
    assert found.difference is None
    assert measure([2.0], [2]).interval is None
    same = measure([1.0, 5.0, 3.0], [1, 1, 1], first=[1.0, 5.0, 3.0])
    assert (same.difference, same.difference_interval) == (0.0, (0.0, 0.0))
    better = measure([1.0, 2.0, 3.0], [1, 1, 1], first=[2.0, 3.0, 4.0])
    assert (better.difference, better.difference_interval) == (-1.0, (-1.0, -1.0))  # paired: no spread


def test_intervals_are_those_of_a_normal_mean():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    low, high = measure(values, np.ones(400)).interval
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.05 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.05 * error)


@pytest.fixture
def run(abilities_yml, pair_of, sums_file):
    """Run ``evaluate`` on models of the qwen2 pair with more arguments."""
    target, ability = pair_of("qwen2")
    path = abilities_yml(target, ability, sums_file, ability_keys=HELD_OUT)

    def get(*arguments, models=(target, ability)):
        return CliRunner().invoke(main, ["evaluate", *map(str, models), "--abilities", str(path), *map(str, arguments)])

    return get


def test_the_command(run, pair_of, tmp_path):
    files = ["--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv", "--predictions", tmp_path / "p.jsonl"]
    done = run(*files, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    target, ability = map(str, pair_of("qwen2"))
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [result["model"] for result in results] == [target, ability]
    predictions = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for result in results:
        own = [line for line in predictions if line["model"] == result["model"]]
        assert len(own) == result["samples"] == 6
        nll = sum(line["nll"] for line in own) / sum(line["tokens"] for line in own)
        assert result["nll"]["value"] == pytest.approx(nll)
        assert f"{nll:.3f}" in done.output
        assert result["exact_match"]["value"] == sum(line["is_right"] for line in own) / 6
    difference = results[1]["nll"]["value"] - results[0]["nll"]["value"]
    assert results[0]["nll"]["difference"] is None
    assert results[1]["nll"]["difference"] == pytest.approx(difference)
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [float(row["nll"]) for row in rows] == [result["nll"]["value"] for result in results]
    assert rows[0]["nll_difference"] == ""

    again = run(*files)
    assert again.exit_code == 1
    assert "exist" in again.output
    assert "--overwrite" in again.output


def test_json_in_place_of_the_table(run):
    done = run("--no-generate", "--json")
    (first, _) = json.loads(done.stdout)["results"]
    assert first["exact_match"] is None


def test_a_perfect_model_is_right(run, pair_of, tmp_path, sums_file):
    """Trained until it knows every sum, a model matches all answers exactly."""
    target, _ = pair_of("qwen2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    rows = [json.loads(line) for line in sums_file.read_text().splitlines()]
    texts = [f"<|im_start|>user\n{row['q']}<|im_end|>\n<|im_start|>assistant\n{row['a']}<|im_end|>\n" for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "trained")
    done = run("--json", "--dtype", "float32", models=(target, tmp_path / "trained"))
    results = json.loads(done.stdout)["results"]
    assert results[1]["exact_match"]["value"] == 1.0
    assert results[1]["exact_match"]["difference"] == 1.0 - results[0]["exact_match"]["value"]
    assert results[1]["nll"]["difference_interval"][1] < 0


def broken(folder, tmp_path, change):
    """A copy of a model with other weights."""
    shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "broken"


def test_weights_that_are_nan_are_named(run, pair_of, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    model = broken(pair_of("qwen2")[0], tmp_path, lambda weights: weights[name][3, 4].fill_(float("nan")))
    files = ["--json", tmp_path / "r.json"]
    done = run(*files, models=(pair_of("qwen2")[1], model))
    assert done.exit_code == 1
    assert f'"{name}" has values that are NaN' in done.output
    assert str(model) in done.output
    assert len(json.loads((tmp_path / "r.json").read_text())["results"]) == 1  # the first model's are kept
    assert str(pair_of("qwen2")[1]) in done.stdout  # and shown


def test_weights_that_are_missing_are_named(run, pair_of, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    done = run(models=(broken(pair_of("qwen2")[0], tmp_path, lambda weights: weights.pop(name)),))
    assert done.exit_code == 1
    assert f"lacks {name}" in done.output


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (KEYS + "    evaluate: {offset: 500}\n", "has no samples"),
        (KEYS + "    evaluate: {extract: '('}\n", "is no regular expression"),
        (KEYS + "    evaluate: {samples: 5, extract: 'zzz'}\n", "finds nothing in the right answer"),
        (KEYS + "    evaluate: {offset: 3}\n", "overlap the profiled rows"),
    ],
)
def test_mistakes_are_told_in_a_sentence(pair_of, abilities_yml, sums_file, keys, message):
    target, ability = pair_of("qwen2")
    path = abilities_yml(target, ability, sums_file, ability_keys=keys)
    done = CliRunner().invoke(main, ["evaluate", str(target), "--abilities", str(path)])
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


def test_models_of_another_backbone_are_told_by_their_tokens(run, pair_of, tmp_path):
    shutil.copytree(pair_of("qwen2")[0], tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"1":', '"x":', 1).replace('"2":', '"1":', 1).replace('"x":', '"2":', 1))
    done = run(models=(tmp_path / "other",))
    assert done.exit_code == 1
    assert "expected a model of the abilities file's backbone" in done.output


def test_samples_without_a_prompt_are_scored_but_not_generated(pair_of, abilities_yml, tmp_path):
    target, ability = pair_of("qwen2")
    rows = [{"input_ids": [5, 6, 7 + i], "labels": [5, 6, 7 + i]} for i in range(30)]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = abilities_yml(target, ability, tmp_path / "ids.jsonl")
    command = ["evaluate", str(target), "--abilities", str(path)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "has no prompt to answer" in done.output
    done = CliRunner().invoke(main, [*command, "--no-generate", "--json"])
    (result,) = json.loads(done.stdout)["results"]
    assert result["answer_tokens"] == 2 * result["samples"]  # nothing stands before the first


def test_samples_longer_than_the_model_are_told(pair_of, abilities_yml, tmp_path):
    target, ability = pair_of("gpt2")
    row = {"q": "x" * 200, "a": "y"}
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row | {"q": row["q"] + str(i)}) + "\n" for i in range(30)))
    path = abilities_yml(target, ability, tmp_path / "long.jsonl", ability_keys=KEYS)
    done = CliRunner().invoke(main, ["evaluate", str(target), "--abilities", str(path)])
    assert done.exit_code == 1
    assert "has 128 positions. Set max_length to 128 or less" in done.output


def test_answers_end_at_one_length_whatever_is_generated_together(held_out_of, caplog):
    model, held_out = held_out_of("qwen2", KEYS + "    evaluate: {samples: 6, max_new_tokens: 200}\n")
    together = generate_answers(model, held_out)
    assert "answers end after" in caplog.text
    assert generate_answers(model, held_out, batch_tokens=1) == together


def test_slices_of_one_split_that_overlap_are_found(pair_of, abilities_yml, sums_file):
    target, ability = pair_of("qwen2")
    keys = KEYS + "    split: 'train[:12]'\n    evaluate: {split: 'train[%s:]', samples: 8}\n"
    for start, code in ((12, 0), (4, 1)):
        path = abilities_yml(target, ability, sums_file, ability_keys=keys % start)
        done = CliRunner().invoke(main, ["evaluate", str(target), "--abilities", str(path), "--no-generate"])
        assert done.exit_code == code, done.output
    assert "held-out samples are among the profiled ones" in done.output


def test_a_model_in_place_of_a_file_is_not_written_to(run, tmp_path):
    done = run("--json", str(tmp_path / "model"))
    assert done.exit_code == 2
    assert "does not end with .json" in done.output


def test_folders_in_the_place_of_outputs_are_told_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "r.json").mkdir()
    done = run("no-such-model", "--json", tmp_path / "r.json", "--overwrite")
    assert done.exit_code == 1
    assert "r.json: a folder, which no file can replace; choose another name" in done.output


def test_dates_that_yaml_makes_of_settings_are_written_down(pair_of, abilities_yml, sums_file, tmp_path):
    target, ability = pair_of("qwen2")
    file = abilities_yml(target, ability, sums_file, top="template_kwargs: {date: 2024-07-26}", ability_keys=HELD_OUT)
    arguments = ["--ability", "sums", "--ability", "sums", "--no-generate", "--json", str(tmp_path / "r.json")]
    done = CliRunner().invoke(main, ["evaluate", str(target), "--abilities", str(file), *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["abilities"]["sums"]["template_kwargs"] == {"date": "2024-07-26"}
    assert len(written["results"]) == 1  # an ability that is named twice is measured once
