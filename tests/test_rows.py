"""Data sets as they are written: values, formats, refusals; held-out samples that were not profiled."""

from __future__ import annotations

import csv
import gzip
import json
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow
import pytest
from tiny import make_tokenizer

from mergekit_act.abilities import AbilitiesFile, Ability, Tokenizers, collect_samples, load_abilities
from mergekit_act.data.rows import fill_template, load_rows, select_rows
from mergekit_act.data.table import render_as_written
from mergekit_act.evaluation import collect_held_out


def ability_of(path: Path, **keys) -> Ability:
    return Ability(dataset=str(path), **({"prompt": "q", "answer": "a"} | keys))


def filled(path: Path, template: str, **keys) -> list[str]:
    ability = ability_of(path, **keys)
    return fill_template("x", ability, load_rows("x", ability), template)


def refusal(path: Path, template: str = "q") -> str:
    with pytest.raises(ValueError, match='ability "x"') as caught:
        filled(path, template)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def test_numbers_of_json_stay_as_written(tmp_path):
    written = [
        "1",
        "1.0",
        "1.50",
        "1e5",
        "0.10",
        "-0",
        "-0.0",
        "1E-7",
        "1e400",
        "123456789012345678901234567890",
        "true",
        "9" * 5000,
    ]
    (tmp_path / "d.jsonl").write_text("".join(f'{{"q": {one}, "other": [{one}]}}\n' for one in written))
    assert filled(tmp_path / "d.jsonl", "{q}") == written
    (tmp_path / "d.json").write_text("[" + ",".join(f'{{"q": {one}}}' for one in written) + "]")
    assert filled(tmp_path / "d.json", "q") == written
    assert filled(tmp_path / "d.jsonl", "{other.0}") == written


def test_nested_values_keep_their_keys_and_numbers(tmp_path):
    lines = ['{"m": {"a": 1.50, "l": []}, "id": 1}', '{"m": {"b": null}, "id": "x"}', '{"m": [1, "2", 1e5], "id": []}']
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    rows = list(load_rows("x", ability_of(tmp_path / "d.jsonl")))
    assert [render_as_written(row, json.dumps) for row in rows] == lines
    assert str(rows[0]["m"]["a"]) == "1.50"
    with pytest.raises(ValueError, match=r"computes with numbers, so 1\.50 can't be kept"):
        render_as_written(rows[0], lambda row: str(2 * row["m"]["a"]))


def test_a_folder_of_text_files_is_read_as_they_are_written(tmp_path):
    (tmp_path / "train.csv").write_text("q,a\n1.50,NA\n")
    (tmp_path / "test.csv").write_text("q,a\n007,\n")
    assert filled(tmp_path, "{q}|{a}") == ["1.50|NA"]
    assert filled(tmp_path, "{q}|{a}", split="train+test") == ["1.50|NA", "007|"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.csv", 'q,a\n"1,5","x ""y"""\n'),
        ("d.csv", 'q;a\n"1,5";"x ""y"""\n'),
        ("d.csv", 'q|a\n1,5|"x ""y"""\n'),
        ("d.tsv", 'q\ta\n1,5\t"x ""y"""\n'),
        ("d.CSV", '\ufeff,q,a\r\n0,"1,5","x ""y"""\r\n'),
    ],
)
def test_separators(tmp_path, name, text):
    (tmp_path / name).write_text(text, newline="")
    assert filled(tmp_path / name, "{q}|{a}") == ['1,5|x "y"']


def test_long_fields_are_read_and_the_limit_is_left_alone(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "d.csv").write_text("q,a\n" + "x" * 200_000 + ",1\n")
    assert filled(tmp_path / "d.csv", "q") == ["x" * 200_000]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"q,a\n2+2?,4,\n", "line 2 has 3 fields, separated by ',', the header has 2; a separator at the end"),
        ("d.csv", b"q,a\n1,2\n3\n", "line 3 has 1 field,"),
        ("d.csv", b'q,a\n"1,2\n', "line 2 is not valid csv"),
        ("d.csv", b"q,q\n1,2\n", "its header names q twice"),
        ("d.csv", b"q,a\n", "it has a header and no rows"),
        ("d.csv", b"q,a\n1,\0\n", "line 2 has a NUL character"),
        ("d.csv", b"", "it is empty"),
        ("d.csv", "q,a\n1,2\n3,é\n".encode("latin-1"), r"line 3 is not UTF-8 (byte 0xe9)"),
        ("d.csv", "q,a\n1,2\n".encode("utf-16"), "it is UTF-16; make it UTF-8: iconv"),
        ("d.csv.gz", b"q,a\n1,2\n", "it is no whole gzip file"),
        ("d.csv.gz", gzip.compress(b"q,a\n1,2\n", mtime=0)[:-9], "it is no whole gzip file"),
        ("d.jsonl", b"", "it is empty"),
        ("d.jsonl", b'{"q": 1}\n[1]\n', "line 2 is a list; expected"),
        ("d.jsonl", b'[{"q": 1}, 3]', "row 2 is a number; expected a list of objects"),
        ("d.jsonl", b"[]", "it has no rows"),
        ("d.jsonl", b'{"q": 1}\n{"q": \n', "line 2, column 7, is not JSON"),
        ("d.jsonl", b'{"q": 1}\n{"q": 1, "q": 2}\n', 'line 2 has the key "q" twice'),
        ("d.jsonl", b'{"q": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1 is nested too deeply"),
        ("d.jsonl", b'{"q": "\\ud800"}', "half of a character"),
        ("d.jsonl", b'{"q": NaN}', 'column "q" of sample 0 (line 1) is NaN; expected a text or a number'),
        ("d.jsonl", b'{"a": 1}\n\n{"q": null}', 'column "q" of sample 0 (line 1) is empty'),
        ("d.jsonl", b'{"q": {"t": 1}}', 'is a dict; expected a text, or a name inside it, as in "q.t"'),
        ("d.parquet", b"no", "cannot load split"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_refused_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    told = refusal(tmp_path / name)
    assert message in told
    assert str(tmp_path / name) in told or "(line 1)" in told


def test_what_is_no_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "d.jsonl")
    assert "is no data file" in refusal(tmp_path / "d.jsonl")
    (tmp_path / "folder.csv").mkdir()
    assert "cannot load split" in refusal(tmp_path / "folder.csv")


def test_names_in_format_strings(tmp_path):
    row = {"q": "x", "a.b": "dot", "a": {"b": "in", "t": ["y", "z"]}, "{o}": "brace", "c:d": "colon", "n": 3}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    data = tmp_path / "d.jsonl"
    for template, text in {
        "a.b": "dot", "{a.b}": "dot", "{a.t.1}": "z", "a.t.0": "y", "{o}": "brace", "{c:d}!": "colon!",
        "{{{q}}} {n:03d}": "{x} 003",
    }.items():  # fmt: skip
        assert filled(data, template) == [text]
    for template in ("{q.__class__}", "{q[0]}", "{q.0}", "{}", "{0}", '{"answer": 1}', "{a.nope}"):
        assert "has no column" in refusal(data, template)
    assert "expected one without braces" in refusal(data, "{q:{n}}")
    assert "numbers of five digits" in refusal(data, "{q:>99999}")
    assert "is a list; expected a text" in refusal(data, "{a.t}")


def test_labels_decimals_and_structs_of_stored_data(tmp_path):
    features = datasets.Features(
        {
            "q": datasets.ClassLabel(names=["no", "yes"]),
            "a": {"x": datasets.Value("int64"), "y": datasets.Value("string")},
        }
    )
    table = datasets.Dataset.from_dict(
        {"q": [1, 0], "a": [{"x": 1, "y": None}, {"x": None, "y": "b"}]}, features=features
    )
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    table.to_parquet(tmp_path / "d.parquet")
    for name in ("one", "two", "d.parquet"):
        rows = list(load_rows("x", ability_of(tmp_path / name)))
        assert rows == [{"q": "yes", "a": {"x": 1}}, {"q": "no", "a": {"y": "b"}}]
    ability = ability_of(tmp_path / "two", split="test", where={"q": "no"})
    chosen, _ = select_rows("x", ability, load_rows("x", ability), offset=0, samples=5)
    assert chosen["q"] == ["no"]
    decimals = datasets.Dataset(pyarrow.table({"q": pyarrow.array([Decimal("1.50")], pyarrow.decimal128(5, 2))}))
    decimals.to_parquet(tmp_path / "e.parquet")
    assert filled(tmp_path / "e.parquet", "q") == ["1.50"]


def test_where_compares_what_yaml_and_data_mean(tmp_path):
    (tmp_path / "d.csv").write_text("q,level,done\na,1,true\nb,1.0,False\nc,2,true\n")
    for where, expected in (({"level": 1}, ["a", "b"]), ({"done": True}, ["a", "c"]), ({"level": "1"}, ["a"])):
        ability = ability_of(tmp_path / "d.csv", where=where)
        chosen, _ = select_rows("x", ability, load_rows("x", ability), offset=0, samples=5)
        assert sorted(chosen["q"]) == expected


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Tokenizers:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return Tokenizers(str(folder), str(folder))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def held_out(tokenizers, **abilities):
    file = AbilitiesFile(target="t", ability_model="a", abilities=abilities)
    return file, collect_held_out(file, tokenizers)


def keys(samples) -> set[tuple[int, ...]]:
    return {tuple(sample.input_ids.tolist()) for sample in samples}


def test_duplicates_of_profiled_rows_are_left_out_and_told(tokenizers, tmp_path, caplog):
    rows = [{"q": str(i % 20), "a": str(i % 20)} for i in range(30)]
    one = {"dataset": str(write(tmp_path / "d.jsonl", rows)), "prompt": "q", "answer": "a", "samples": 20}
    file, (found,) = held_out(tokenizers, one=one | {"evaluate": {"samples": 10}})
    profiled = keys(collect_samples(file, "one", tokenizers).samples)
    assert found.samples
    assert not keys(found.samples) & profiled
    left_out = found.data.data["duplicates_left_out"]
    assert left_out + len(found.samples) == 10
    assert f'ability "one": {left_out} of 10 held-out samples are among the profiled ones and left out' in caplog.text
    write(tmp_path / "d.jsonl", rows[:1] * 30)
    with pytest.raises(ValueError, match="10 of 10 held-out samples are among the profiled ones; choose another"):
        held_out(tokenizers, one=one | {"evaluate": {"samples": 10}})[1][0].check(generate=False)


def test_samples_that_another_ability_profiles_are_told(tokenizers, tmp_path, caplog):
    data = str(write(tmp_path / "d.jsonl", [{"q": str(i), "a": "x"} for i in range(20)]))
    one = {"dataset": data, "prompt": "q", "answer": "a", "samples": 10}
    held_out(
        tokenizers,
        one=one,
        two=one
        | {
            "split": "train[:20]",
            "samples": 20,
            "evaluate": {"dataset": str(write(tmp_path / "e.jsonl", [{"q": "e", "a": "e"}]))},
        },
    )
    assert 'ability "one": 10 of 10 held-out samples are among the profiled ones of "two"' in caplog.text


def test_balanced_numbers_that_nobody_wrote_are_rounded(tokenizers, tmp_path, caplog):
    rows = [{"q": f"{kind}{i}", "a": "x", "kind": kind} for i in range(100) for kind in "abc"]
    one = {
        "dataset": str(write(tmp_path / "d.jsonl", rows)),
        "prompt": "q",
        "answer": "a",
        "balance": "kind",
        "samples": 90,
    }
    _, (found,) = held_out(tokenizers, one=one)
    assert len(found.samples) == 198
    assert '198 samples in place of 200, equal numbers of the 3 values of "kind"' in caplog.text
    with pytest.raises(ValueError, match="samples 200 and offset 90 cannot be divided equally"):
        held_out(tokenizers, one=one | {"evaluate": {"samples": 200}})


def test_held_out_samples_of_another_data_set(tokenizers, tmp_path):
    one = {"dataset": str(write(tmp_path / "d.jsonl", [{"q": "1", "a": "2", "k": "x"}])), "prompt": "q", "answer": "a"}
    other = str(write(tmp_path / "e.csv", []))
    Path(other).write_text("question,reply\n5,6\n")
    evaluate = {"dataset": other, "prompt": "{question}?", "answer": "reply"}
    _, (found,) = held_out(
        tokenizers, one=one | {"balance": "k", "where": {"k": "x"}, "samples": 1, "evaluate": evaluate}
    )
    assert "5?" in tokenizers.target.decode(found.samples[0].input_ids)
    assert found.references == ["6"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("evaluate: {prompt: q, answer: a}", 'prompt and answer of "evaluate" go with a "dataset" of its own'),
        ("evaluate: {dataset: e, prompt: q}", "prompt and answer go together"),
        ("prompt: {q}, answer: a", "needs quotes in YAML"),
    ],
)
def test_mistakes_in_the_file(tmp_path, keys, message):
    path = tmp_path / "abilities.yml"
    path.write_text(f"target: t\nability_model: a\nabilities: {{x: {{dataset: d, {keys}}}}}\n")
    with pytest.raises(ValueError, match=message):
        load_abilities(path)
