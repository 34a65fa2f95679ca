"""What a transfer is given: what it takes is told, and what cannot be done, before anything starts."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple

import pytest
import yaml
from click.testing import CliRunner
from transfers import files, transfer

from mergekit_act.cli import main
from mergekit_act.transferring import commands, plan
from mergekit_act.transferring.needs import Needs


def test_a_dry_run_writes_nothing(abilities, tmp_path):
    result = transfer("--dry-run")
    assert result.exit_code == 0, result.output
    assert [line.split()[2] for line in result.output.splitlines() if line.startswith("$ mergekit-act")] == [
        "profile",
        "sweep",
        "evaluate",
        "card",
        "report",
    ]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_what_it_takes(abilities):
    def told(*arguments):
        lines = transfer("--dry-run", *arguments).output.splitlines()
        return {line.partition(": ")[0]: line for line in lines if line.startswith(("time: ", "memory: ", "disk: "))}

    swept, tuned = told(), told("--density", "0.2", "--weight", "0.5", "--finetune")
    assert "sweep" in swept["time"]
    assert "finetune" not in swept["time"]
    assert "sweep" not in tuned["time"]
    assert "finetune" in tuned["time"]
    assert swept["disk"] != tuned["disk"]
    assert "with the rows that a sweep moves (and of the machine's " in swept["memory"]
    assert " to fine-tune; " in tuned["memory"]


def test_without_matplotlib(abilities, monkeypatch):
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    told = transfer("--dry-run").output
    assert "mergekit-act report" not in told
    assert "The report is left out, it needs matplotlib" in told


def test_a_commands_own_error(abilities):
    """Is one sentence, or raised where a traceback is wanted."""
    little = ("--memory-budget", "1kB")
    result = transfer(*little)
    assert isinstance(result.exception, SystemExit)
    assert "need about" in result.output
    assert isinstance(transfer(*little, "-v").exception, ValueError)


def test_samples_that_choose_and_measure(abilities, tmp_path, caplog):
    rows = [{"q": f"{n}+0", "a": str(n)} for n in range(5)]

    def told(*held_out):
        (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(rows[n]) + "\n" for n in held_out))
        evaluate = {"dataset": "held-out.jsonl", "offset": 0, "samples": 5, "max_new_tokens": 4}
        abilities(where={}, samples=1, evaluate=evaluate)
        return transfer("--dry-run")

    result = told(3, 3, 3, 3, 3)
    assert result.exit_code == 1
    assert 'ability "even": of 3 samples that measure, 3 also choose: rows stand twice in the data' in result.output
    result = told(3, 3, 3, 3, 4)
    assert result.exit_code == 0, result.output
    assert re.search(r"of 3 samples that measure, [23] also choose: rows stand twice", caplog.text)


def test_what_cannot_be_done_is_told_first(abilities, tmp_path, monkeypatch):
    def told(*arguments):
        result = transfer(*arguments)
        assert result.exit_code == 1
        assert not (tmp_path / "out/profiles").exists()
        return result.output

    abilities(samples=9)
    assert 'ability "even" has 1 held-out rows of 10; some choose density and weight and others measure, so 3' in told()
    (tmp_path / "twice.jsonl").write_text('{"q": "1+1", "a": "2"}\n' * 10)
    abilities(dataset="twice.jsonl", where={})
    assert "held-out samples are among the profiled ones" in told()
    abilities(role="keep")
    assert 'no ability has "role: recover"' in told()
    content = abilities()
    (tmp_path / "abilities.yml").write_text(yaml.safe_dump(content | {"ability_model": content["target"]}))
    assert "target and ability_model are the same model" in told()
    (tmp_path / "link").symlink_to(content["target"])
    (tmp_path / "abilities.yml").write_text(yaml.safe_dump(content | {"ability_model": "./link"}))
    assert "target and ability_model are the same model" in told()
    abilities()
    assert "density and weight go together" in told("--density", "0.1")
    assert "density is 1.5; expected a fraction" in told("--density", "1.5", "--weight", "1")
    assert "weight is nan; expected a finite number" in told("--density", "0.1", "--weight", "nan")
    assert "float16 is no dtype to fine-tune in" in told("--finetune", "--dtype", "float16")
    assert 'device "cpu:0" cannot be chosen for fine-tuning' in told("--finetune", "--device", "cpu:0")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
        assert "has 1 kB free, and " in told()
    (tmp_path / "out").write_text("mine")
    assert "out is no folder; name another OUT" in told()
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "out has files of something else; name another folder" in told()


def test_what_is_fetched_counts_for_the_disk(abilities, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    monkeypatch.setattr(plan, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for fetched, is_enough in ((900, True), (901, False)):
        monkeypatch.setattr(plan, "estimate_needs", lambda *_, n=fetched, **__: Needs(100, n, 1, ()))
        result = transfer("--dry-run")
        assert (result.exit_code == 0) == is_enough, result.output
        assert ("1 kB free, and 1 kB are needed" in result.output) != is_enough


def test_a_folder_of_another_pair(abilities, tmp_path, pair_of):
    assert transfer("--density", "0.2", "--weight", "0.5").exit_code == 0
    swapped = dict(zip(("target", "ability_model"), map(str, reversed(pair_of("qwen2"))), strict=True))
    (tmp_path / "abilities.yml").write_text(yaml.safe_dump(abilities() | swapped))
    result = transfer("--density", "0.2", "--weight", "0.5")
    assert result.exit_code == 1
    assert "out is of a transfer from " in result.output


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"of": {}, "steps": {}}'])
def test_a_state_that_is_none(abilities, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "transfer.json").write_text(content)
    assert "out/transfer.json is no state of a transfer by this version" in transfer().output


def test_a_folder_of_another_file(abilities, tmp_path):
    fixed = ("--density", "0.2", "--weight", "0.5")
    assert transfer(*fixed).exit_code == 0
    (tmp_path / "abilities.yml").rename(tmp_path / "other.yml")
    other = ["transfer", "other.yml", "out", *fixed]
    assert CliRunner().invoke(main, other).exit_code == 0  # it says the same
    content = yaml.safe_load((tmp_path / "other.yml").read_text())
    content["abilities"]["even"]["samples"] = 4
    (tmp_path / "other.yml").write_text(yaml.safe_dump(content))
    assert CliRunner().invoke(main, other).exit_code == 0  # the file that it was of last
    content["abilities"]["even"]["samples"] = 5
    (tmp_path / "third.yml").write_text(yaml.safe_dump(content))
    before = files(tmp_path / "out")
    result = CliRunner().invoke(main, ["transfer", "third.yml", "out", *fixed])
    assert result.exit_code == 1
    assert f"by {tmp_path / 'other.yml'}; name another folder" in result.output
    assert files(tmp_path / "out") == before


def test_without_a_file(pair_of, sums_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target, ability_model = map(str, pair_of("qwen2"))
    pair = ["--target", target, "--ability-model", ability_model, "--prompt", "q", "--answer", "a"]
    result = CliRunner().invoke(main, ["transfer", "out", *pair, "--recover", f"{sums_file}:train", "--dry-run"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "$ mergekit-act profile out.yml out/profiles " in result.output
    assert "time: about " in result.output
    assert result.output.startswith("wrote out.yml\n")
    own = yaml.safe_load((tmp_path / "out.yml").read_text())["abilities"]["sums"]
    assert "template" not in yaml.safe_load((tmp_path / "out.yml").read_text())
    plain = ["--recover", f"{sums_file}:train", "--template", "plain", "--dry-run"]
    assert CliRunner().invoke(main, ["transfer", "plain", *pair, *plain]).exit_code == 0
    assert yaml.safe_load((tmp_path / "plain.yml").read_text())["template"] == "plain"
    assert own | {"samples": 10, "evaluate": {"samples": 10}, "dataset": str(sums_file), "role": "recover"} == own
    other = CliRunner().invoke(main, ["transfer", "out", *pair, "--recover", str(sums_file), "--keep", str(sums_file)])
    assert 'two data sets are called "sums"' in other.output
    for nameless in (".", ".."):
        result = CliRunner().invoke(main, ["transfer", nameless, *pair, "--recover", str(sums_file)])
        assert f"{nameless} has no name of its own" in result.output
    for words in (["out"], ["out", *pair[:4]], ["abilities.yml", "out", *pair]):
        result = CliRunner().invoke(main, ["transfer", *words])
        assert result.exit_code == 2
        assert "give ABILITIES.yml and OUT; or OUT alone, and --target, --ability-model" in result.output


def test_the_file_that_options_write(pair_of, tmp_path, monkeypatch):
    """What a mistake or less data has left is written anew; what was edited, or is of another transfer, is not."""
    monkeypatch.chdir(tmp_path)
    target, ability_model = map(str, pair_of("qwen2"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"q": f"{n}+1", "a": str(n)}) + "\n" for n in range(20)))
    pair = ["--target", target, "--ability-model", ability_model, "--recover", "data.jsonl", "--answer", "a"]

    def told(column, *more):
        result = CliRunner().invoke(main, ["transfer", "out", *pair, "--prompt", column, *more])
        return result.exit_code, result.output

    assert told("qq")[0] == 1
    fixed = ("--density", "0.2", "--weight", "0.5", "--dry-run")
    assert told("q", *fixed)[1].startswith("wrote out.yml\n")
    assert told("q", *fixed[:-1])[0] == 0
    code, output = told("{q}", *fixed)
    assert code == 1
    assert "out.yml says something else than the options (abilities.data.prompt was q, is {q})" in output
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"q": "30+1", "a": "31"}\n{"q": "31+1", "a": "32"}\n')
    assert told("q", *fixed)[1].startswith("wrote out.yml\n")
    text = (tmp_path / "out.yml").read_text()
    (tmp_path / "out.yml").write_text(text.replace("samples: 11", "samples: 5"))
    code, output = told("q", *fixed)
    assert code == 1
    assert "(it was edited); give out.yml in place of them" in output
