"""The abilities file, data sets, templates, answer tokens."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer
from tokenizers import processors

from mergekit_act.abilities import AbilitiesFile, Tokenizers, collect_samples, load_abilities
from mergekit_act.data.rows import load_rows, select_rows


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory) -> tuple[Path, Path]:
    """Folders with the same tokenizer, and with one that numbers its tokens otherwise."""
    root = tmp_path_factory.mktemp("tokenizers")
    make_tokenizer().save_pretrained(root / "same")
    other = make_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    other.save_pretrained(root / "other")
    saved = json.loads((root / "other" / "tokenizer.json").read_text())
    saved["model"]["vocab"] = vocabulary
    (root / "other" / "tokenizer.json").write_text(json.dumps(saved))
    return root / "same", root / "other"


def collect(tokenizers: Tokenizers, ability: dict, **top):
    file = AbilitiesFile(target="t", ability_model="a", abilities={"x": ability}, **top)
    return collect_samples(file, "x", tokenizers)


@pytest.fixture
def tokenizers(tokenizer_folders) -> Tokenizers:
    return Tokenizers(str(tokenizer_folders[0]), str(tokenizer_folders[0]))


def answers(collected, tokenizer) -> list[str]:
    return [tokenizer.decode(s.input_ids[s.is_answer].tolist()) for s in collected.samples]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_chat_answers_end_with_the_end_of_turn_token(tokenizers, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"q": "1+1", "a": "2"}])
    collected = collect(tokenizers, {"dataset": str(data), "prompt": "{q}?", "answer": "a"})
    (sample,) = collected.samples
    text = tokenizers.target.decode(sample.input_ids.tolist())
    assert text == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    assert answers(collected, tokenizers.target) == ["2<|im_end|>"]
    assert sample.is_answer.tolist()[-2:] == [True, True]
    assert int(sample.is_answer.sum()) == 2
    assert collected.answer_tokens == 2


def test_an_answer_may_hold_what_looks_like_the_end(tokenizers, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"q": "hi", "a": "say <|im_end|> twice\n"}])
    collected = collect(tokenizers, {"dataset": str(data), "prompt": "q", "answer": "a"})
    assert answers(collected, tokenizers.target) == ["say <|im_end|> twice\n<|im_end|>"]


def test_system_turn_and_template_kwargs_reach_the_template(tokenizers, tmp_path):
    tokenizers.target.chat_template = "{{ mood }}" + tokenizers.target.chat_template
    data = write_rows(tmp_path / "d.jsonl", [{"q": "hi", "a": "ho"}])
    collected = collect(
        tokenizers,
        {"dataset": str(data), "prompt": "q", "answer": "a"},
        system="Be brief.",
        template_kwargs={"mood": "calm"},
    )
    text = tokenizers.target.decode(collected.samples[0].input_ids.tolist())
    assert text.startswith("calm<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi")


def test_plain_is_prompt_newline_answer_end_of_sequence(tokenizers, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"q": "1+1", "a": "2"}])
    collected = collect(tokenizers, {"dataset": str(data), "prompt": "q", "answer": "a"}, template="plain")
    (sample,) = collected.samples
    assert tokenizers.target.decode(sample.input_ids.tolist()) == "1+1\n2<|im_end|>"
    assert sample.is_answer.tolist() == [False] * 4 + [True, True]


def test_the_last_assistant_turn_of_messages_is_the_answer(tokenizers, tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    data = write_rows(tmp_path / "d.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    collected = collect(tokenizers, {"dataset": str(data)})
    assert answers(collected, tokenizers.target) == ["d<|im_end|>"]
    assert "<|im_start|>assistant\nb<|im_end|>" in tokenizers.target.decode(collected.samples[0].input_ids.tolist())


def test_token_ids_and_labels_are_used_as_they_are(tokenizers, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, -100]}])
    (sample,) = collect(tokenizers, {"dataset": str(data)}).samples
    assert sample.input_ids.tolist() == [5, 6, 7, 8]  # nothing after the last answer token is needed
    assert sample.is_answer.tolist() == [False, True, False, True]


def test_long_prompts_are_cut_from_the_left_and_long_answers_dropped(tokenizers, tmp_path, caplog):
    rows = [{"q": "p" * 50, "a": "short"}, {"q": "p", "a": "x" * 50}, {"q": "p", "a": "ok"}]
    data = write_rows(tmp_path / "d.jsonl", rows)
    ability = {"dataset": str(data), "prompt": "q", "answer": "a"}
    collected = collect(tokenizers, ability, max_length=30)
    assert sorted(answers(collected, tokenizers.target)) == ["ok<|im_end|>", "short<|im_end|>"]
    assert max(len(sample.input_ids) for sample in collected.samples) == 30
    assert (collected.data["prompts_cut"], collected.data["samples_dropped"]) == (1, 1)
    assert 'ability "x": 1 prompts were cut from the left to 30 tokens' in caplog.text
    assert 'ability "x": 1 samples dropped' in caplog.text


def test_where_shuffle_offset_samples(sums_file):
    file = {"dataset": str(sums_file), "prompt": "q", "answer": "a", "where": {"kind": "even"}, "seed": 3}
    ability = AbilitiesFile(target="t", ability_model="a", abilities={"x": file}).abilities["x"]
    rows = load_rows("x", ability)
    everything, short = select_rows("x", ability, rows, offset=0, samples=100)
    assert set(everything["kind"]) == {"even"}
    assert short == 100 - len(everything)
    part, short = select_rows("x", ability, rows, offset=2, samples=5)
    assert part["q"][:] == everything["q"][2:7]
    assert short == 0
    assert everything["q"][:] != sorted(everything["q"][:])


def test_balance_takes_equal_numbers(sums_file):
    file = {"dataset": str(sums_file), "prompt": "q", "answer": "a", "balance": "kind", "seed": 1}
    ability = AbilitiesFile(target="t", ability_model="a", abilities={"x": file}).abilities["x"]
    rows = load_rows("x", ability)
    first, _ = select_rows("x", ability, rows, offset=0, samples=8)
    second, _ = select_rows("x", ability, rows, offset=8, samples=8)
    assert Counter(first["kind"]) == Counter(second["kind"]) == {"even": 4, "odd": 4}
    assert not set(first["q"]) & set(second["q"])
    with pytest.raises(
        ValueError, match='samples 7 and offset 0 cannot be divided equally among the 2 values of "kind"'
    ):
        select_rows("x", ability, rows, offset=0, samples=7)
    with pytest.raises(ValueError, match='column "kind" needs 50 rows of each value after skipping 0'):
        select_rows("x", ability, rows, offset=0, samples=100)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_local_formats(tokenizers, tmp_path, suffix):
    rows = datasets.Dataset.from_list([{"q": "1+1", "a": "2"}, {"q": "1+2", "a": "3"}])
    path = tmp_path / f"d.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows.to_list()))
    else:
        {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](path)
    collected = collect(tokenizers, {"dataset": str(path), "prompt": "q", "answer": "a"})
    assert sorted(answers(collected, tokenizers.target)) == ["2<|im_end|>", "3<|im_end|>"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_texts_stay_as_they_are_written(tokenizers, tmp_path, suffix):
    """Loaders like to make dates and numbers of texts that look like them."""
    written = ["2009-01-05", "007", "1.50", "NA", "true", "2009-01-05T00:00:00Z"]
    path = tmp_path / f"d.{suffix}"
    if suffix == "csv":
        path.write_text("q,a\n" + "".join(f"x,{answer}\n" for answer in written))
    else:
        write_rows(path, [{"q": "x", "a": answer} for answer in written])
    collected = collect(tokenizers, {"dataset": str(path), "prompt": "q", "answer": "a"})
    assert sorted(answers(collected, tokenizers.target)) == sorted(f"{answer}<|im_end|>" for answer in written)


def test_dates_in_messages_stay_texts(tokenizers, tmp_path):
    turns = [{"role": "user", "content": "2001-02-03"}, {"role": "assistant", "content": "2009-01-05"}]
    data = write_rows(tmp_path / "d.jsonl", [{"messages": turns}])
    assert answers(collect(tokenizers, {"dataset": str(data)}), tokenizers.target) == ["2009-01-05<|im_end|>"]


def test_white_space_belongs_to_the_token_it_is_part_of(tokenizers, tmp_path):
    """With trim_offsets a tokenizer reports tokens without the white space in front of them."""
    backend = tokenizers.target.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizers.target.chat_template = tokenizers.target.chat_template.replace("assistant\n", "assistant: ").replace(
        "{{ m['role'] }}\n", "{{ m['role'] }}{{ ': ' if m['role'] == 'assistant' else '\n' }}"
    )
    data = write_rows(tmp_path / "d.jsonl", [{"q": "1+1", "a": "2"}])
    collected = collect(tokenizers, {"dataset": str(data), "prompt": "q", "answer": "a"})
    assert answers(collected, tokenizers.target) == ["2<|im_end|>"]


def test_splits_of_a_file_may_be_sliced(tokenizers, sums_file):
    ability = {"dataset": str(sums_file), "prompt": "q", "answer": "a", "split": "train[5:9]", "samples": 4}
    first = [json.loads(line) for line in sums_file.read_text().splitlines()][5:9]
    collected = collect(tokenizers, ability)
    assert sorted(answers(collected, tokenizers.target)) == sorted(f"{row['a']}<|im_end|>" for row in first)


def test_json_may_be_a_list_or_lines_or_compressed(tokenizers, tmp_path):
    rows = [{"q": "1", "a": "2009-01-05"}, {"q": "2", "a": "x", "more": 1}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    write_rows(tmp_path / "lines.json", rows)
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for path in tmp_path.iterdir():
        collected = collect(tokenizers, {"dataset": str(path), "prompt": "q", "answer": "a"})
        assert sorted(answers(collected, tokenizers.target)) == ["2009-01-05<|im_end|>", "x<|im_end|>"]
    (tmp_path / "bad.json").write_text("3")
    message = refusal(tokenizers, {"dataset": str(tmp_path / "bad.json"), "prompt": "q", "answer": "a"})
    assert "expected a list of objects, or one object per line" in message


def test_a_folder_is_a_data_set(tokenizers, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"q": "1+1", "a": "2"}])
    collected = collect(tokenizers, {"dataset": str(folder), "prompt": "q", "answer": "a"})
    assert answers(collected, tokenizers.target) == ["2<|im_end|>"]


def test_fingerprint_follows_tokens_and_answers(tokenizers, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    one = collect(tokenizers, {"dataset": str(write_rows(tmp_path / "1.jsonl", rows))}).data["fingerprint"]
    again = collect(tokenizers, {"dataset": str(write_rows(tmp_path / "2.jsonl", rows))}).data["fingerprint"]
    rows[0]["labels"] = [-100, -100, 7]
    other = collect(tokenizers, {"dataset": str(write_rows(tmp_path / "3.jsonl", rows))}).data["fingerprint"]
    assert one == again != other


@settings(max_examples=40, deadline=None)
@given(
    question=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12),
    answer=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=12),
)
def test_answer_tokens_are_the_answer_and_its_end(tmp_path_factory, question, answer):
    from mergekit_act.abilities.rendering import render_chat

    tokenizer = make_tokenizer()
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (rendering,) = render_chat("x", [turns], tokenizer, system=None, options={})
    assert rendering.text[rendering.answer_start : rendering.end_of_turn] == answer
    assert rendering.text[rendering.end_of_turn :] == "<|im_end|>\n"


def refusal(tokenizers, ability, **top) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        collect(tokenizers, ability, **top)
    return str(caught.value)


def test_data_that_is_not_there(tokenizers, sums_file, tmp_path):
    good = {"dataset": str(sums_file), "prompt": "q", "answer": "a"}
    assert 'has no column "question"; its columns are q, a, kind' in refusal(tokenizers, good | {"prompt": "question"})
    assert 'has no column "x"' in refusal(tokenizers, good | {"answer": "{x}!"})
    assert 'has no column "subject"' in refusal(tokenizers, good | {"where": {"subject": "a"}})
    assert 'has no column "subject"' in refusal(tokenizers, good | {"balance": "subject"})
    message = refusal(tokenizers, good | {"where": {"kind": ["even", "prime"]}})
    assert "no row of" in message
    assert "has 'prime' in column \"kind\"; there are 'even', 'odd'" in message
    assert 'ability "x" has no samples' in refusal(tokenizers, good | {"offset": 20})
    assert 'cannot load split "test"' in refusal(tokenizers, good | {"split": "test"})
    assert "does not exist" in refusal(tokenizers, good | {"dataset": "no/such.jsonl"})
    (tmp_path / "d.txt").write_text("x")
    assert "is no data file; expected .json, .jsonl, .csv, .parquet" in refusal(
        tokenizers, good | {"dataset": str(tmp_path / "d.txt")}
    )
    message = refusal(tokenizers, {"dataset": str(sums_file)})
    assert 'has neither a "messages" column nor "input_ids" and "labels"; give prompt and answer' in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"from": "human", "value": "hi"}]}, 'sample 0 has no list of turns with "role" and "content"'),
        ({"messages": "hi"}, 'sample 0 has no list of turns with "role" and "content"'),
        ({"messages": [{"role": "user", "content": "hi"}]}, 'sample 0 has no assistant turn in "messages"'),
        ({"input_ids": [3.5], "labels": [3]}, 'sample 0 has no list of whole numbers in "input_ids"'),
        ({"input_ids": None, "labels": [3]}, 'sample 0 has no list of whole numbers in "input_ids"'),
        ({"input_ids": [3, 4], "labels": [3]}, "sample 0 has 2 input_ids and 1 labels"),
    ],
)
def test_rows_of_another_form(tokenizers, tmp_path, row, message):
    data = write_rows(tmp_path / "d.jsonl", [row])
    assert f'ability "x": {message}' in refusal(tokenizers, {"dataset": str(data)})


def test_values_that_are_no_texts(tokenizers, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"q": "1", "a": None, "l": ["x"], "n": 1}])
    ability = {"dataset": str(data), "prompt": "q", "answer": "a"}
    assert refusal(tokenizers, ability) == 'ability "x": column "a" of sample 0 (line 1) is empty; expected a text'
    assert 'column "l" of sample 0 (line 1) is a list; expected a text' in refusal(
        tokenizers, ability | {"answer": "{l}!"}
    )
    assert 'has no column "q.upper"' in refusal(tokenizers, ability | {"answer": "{q.upper}"})
    assert '"{q:d}" cannot be filled from sample 0' in refusal(tokenizers, ability | {"answer": "{q:d}"})


def test_an_answer_that_the_tokenizer_leaves_out(tokenizers, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"q": "1", "a": "\u00e9\u00e9"}])
    for template in ("chat", "plain"):
        message = refusal(tokenizers, {"dataset": str(data), "prompt": "q", "answer": "a"}, template=template)
        assert message == 'ability "x": the tokenizer makes no tokens of the answer of sample 0'


def test_samples_without_answer_tokens(tokenizers, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"input_ids": [5, 6], "labels": [-100, -100]}])
    assert refusal(tokenizers, {"dataset": str(data)}) == 'ability "x": 1 of 1 samples have no answer tokens'
    data = write_rows(tmp_path / "e.jsonl", [{"q": "1", "a": "x" * 40}])
    message = refusal(tokenizers, {"dataset": str(data), "prompt": "q", "answer": "a"}, max_length=20)
    assert message == 'ability "x" has no samples: all 1 answers exceed max_length 20'


def test_templates_that_do_not_fit(tokenizers, sums_file):
    good = {"dataset": str(sums_file), "prompt": "q", "answer": "a"}
    template = tokenizers.target.chat_template
    tokenizers.target.chat_template = None
    assert "tokenizer has no chat template" in refusal(tokenizers, good)
    tokenizers.target.chat_template = template.replace("assistant\n{% endif %}", "helper\n{% endif %}")
    assert "prompt is not a prefix of the full conversation" in refusal(tokenizers, good)
    tokenizers.target.chat_template = template.replace("<|im_end|>", " and so on ")
    assert "in which there is no end-of-turn token" in refusal(tokenizers, good)
    tokenizers.target.chat_template = template + "{{ raise_exception('no system turns here') }}"
    assert "cannot render sample 0: no system turns here" in refusal(tokenizers, good)


def test_tokenizers_that_disagree(tokenizer_folders, sums_file, tmp_path):
    ability = {"dataset": str(sums_file), "prompt": "q", "answer": "a"}
    message = refusal(Tokenizers(*map(str, tokenizer_folders)), ability)
    assert 'ability "x": the tokenizers disagree on sample' in message
    assert "both models must get the same token ids" in message
    message = refusal(Tokenizers(str(tokenizer_folders[0]), str(tmp_path)), ability)
    assert "has no tokenizer that Transformers can load" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target: t\nability_modle: a\nabilities: {x: {dataset: d}}", r'unknown key "ability_modle" \(did you mean "ability_model"\?\)'),
        ("target: t\nability_model: a\nabilities: {x: {dataset: d, promt: q}}", r'unknown key "abilities.x.promt" \(did you mean "prompt"\?\)'),
        ("target: t\nability_model: a\nabilities: {x: {prompt: q, answer: a}}", 'key "abilities.x.dataset" is missing'),
        ("target: t\nability_model: a\nabilities: {x: {dataset: d, prompt: q}}", "prompt and answer go together"),
        ("target: t\nability_model: a\nabilities: {x: {dataset: d, samples: 0}}", "abilities.x.samples: .*greater than or equal to 1; got 0"),
        ("target: t\nability_model: a\nabilities: {a-en: {dataset: d}, A-en: {dataset: d}}", '"a-en" and "A-en" differ only in case'),
        ("target: t\nability_model: a\nabilities: {x: {dataset: d}, x: {dataset: e}}", 'key "x" stands twice'),
        ("target: t\nability_model: a\nabilities: {a/b: {dataset: d}}", 'ability name "a/b" has other characters'),
        ("target: t\nability_model: a\nabilities: {weight: {dataset: d}}", 'ability name "weight" is reserved'),
        ("target: t\nability_model: a\nabilities: {x: {dataset: d, samples: 10, evaluate: {offset: 5}}}", "held-out rows 5 to 204 overlap the profiled rows 0 to 9"),
        ("target: t\nability_model: a\nabilities: {}", "abilities: .*at least 1 item"),
        ("- a", "is no abilities file"),
        ("a: [", "is not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(tmp_path, text, message):
    path = tmp_path / "abilities.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_abilities(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"abilities\.yml does not exist; expected an abilities file"):
        load_abilities(tmp_path / "abilities.yml")
