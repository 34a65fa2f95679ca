"""The whole path as one command: what it leaves, what it does again, and what it says."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import yaml
from click.testing import CliRunner
from hub import run_there
from merges import state_of

from mergekit_act.cli import main
from mergekit_act.transferring.judgement import judge, list_results
from mergekit_act.transferring.steps import Step, Steps

ON = {"device": "cpu", "of": {"target": "t", "ability_model": "a", "file": "f", "abilities": {}}}


@pytest.fixture
def abilities(pair_of, sums_file, tmp_path, monkeypatch):
    """Write abilities.yml with two abilities into the working directory; keys of the one that is recovered."""
    monkeypatch.chdir(tmp_path)
    target, ability_model = pair_of("qwen2")

    def write(**keys):
        own = {"dataset": str(sums_file), "prompt": "q", "answer": "a"}
        held_out = {"samples": 5, "max_new_tokens": 4}
        both = {
            "even": own | {"where": {"kind": "even"}, "samples": 5, "evaluate": held_out} | keys,
            "odd": own | {"where": {"kind": "odd"}, "samples": 5, "evaluate": held_out, "role": "keep"},
        }
        content = {"target": str(target), "ability_model": str(ability_model), "abilities": both}
        (tmp_path / "abilities.yml").write_text(yaml.safe_dump(content))
        return content

    write()
    return write


def transfer(*arguments):
    return CliRunner().invoke(main, ["transfer", "abilities.yml", "out", *arguments])


def steps(output):
    """The commands that were printed, and whether each was run."""
    lines = output.splitlines()
    return {
        shlex.split(a)[2]: b.strip() != "done before, from the same files"
        for a, b in zip(lines, [*lines[1:], ""], strict=True)
        if a.startswith("$ mergekit-act")
    }


def files(folder):
    """All that is in a folder, but for what says how long something took."""
    found = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}
    return {
        str(path.relative_to(folder)): content
        for path, content in found.items()
        if path.name not in ("sweep.csv", "transfer.json")
    }


def test_whole_path(abilities, tmp_path):
    result = transfer("--keep-within", "0.9")
    assert result.exit_code == 0, (result.output, result.exception)
    assert list(steps(result.output)) == ["profile", "sweep", "evaluate", "card", "report"]
    assert "\n$ mergekit-yaml out/sweep/best.yml out/merged\n" in result.output
    table, moved, judgement = result.output.split("\n\n")[-3:]
    assert "even, to recover" in table
    assert "odd, to keep" in table
    assert re.fullmatch(r"moved: [\d.]+ % of the channels, [\d.]+ % of the parameters, weight [\d.]+(, fitted)?", moved)
    assert judgement.startswith("It recovers ")
    evaluation = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [one["samples"] for one in evaluation["results"]] == [3] * 6  # the other two of five chose

    again = transfer("--keep-within", "0.9")
    assert not any(steps(again.output).values())
    assert again.output.split("\n\n")[-3:] == [table, moved, judgement]

    # With another limit the sweep chooses anew, and scores nothing anew.
    scored = (tmp_path / "out/sweep/sweep.csv").read_bytes()
    other = transfer("--keep-within", "0.5")
    assert steps(other.output)["sweep"]
    assert "--overwrite" not in other.output.partition("mergekit-yaml")[0]
    assert (tmp_path / "out/sweep/sweep.csv").read_bytes() == scored
    transfer("--keep-within", "0.9")

    # Its commands, given one by one, make the same files.
    before = files(tmp_path / "out")
    kept = {name: (tmp_path / "out" / name).read_text() for name in ("choose.yml", "measure.yml", "merge.yml")}
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    for name, content in kept.items():
        (tmp_path / "out" / name).write_text(content)
    for line in result.output.splitlines():
        if line.startswith("$ "):
            program, *words = shlex.split(line[2:])
            done = CliRunner().invoke(main, ["merge"] * (program == "mergekit-yaml") + words)
            assert done.exit_code == 0, (line, done.output, done.exception)
    after = files(tmp_path / "out")
    assert set(after) == set(before)
    assert [name for name in before if after[name] != before[name]] == []


def test_only_what_depends_on_a_change_is_done_again(abilities, tmp_path):
    fixed = ("--density", "0.2", "--weight", "0.5")
    first = transfer(*fixed)
    assert list(steps(first.output)) == ["profile", "mask", "evaluate", "card", "report"]
    abilities(evaluate={"samples": 4, "max_new_tokens": 4})
    assert steps(transfer(*fixed).output) == {
        "profile": False,
        "mask": False,
        "evaluate": True,
        "card": True,
        "report": False,
    }
    shutil.rmtree(tmp_path / "out/merged")
    assert steps(transfer(*fixed).output)["card"]
    assert (tmp_path / "out/merged/reproduce.json").exists()
    abilities(samples=4)
    assert all(steps(transfer(*fixed).output).values())
    before = state_of(tmp_path / "out/merged")
    result = transfer("--density", "0.2", "--weight", "1")
    assert "done before" not in result.output.partition("mergekit-yaml")[2].partition("$")[0]
    assert not steps(result.output)["mask"]
    assert any((tensor != state_of(tmp_path / "out/merged")[name]).any() for name, tensor in before.items())


def test_killed_and_given_again(abilities, tmp_path):
    command = [sys.executable, "-m", "mergekit_act", "transfer", "abilities.yml"]
    options = ["--keep-within", "0.9"]
    subprocess.run([*command, "whole", *options], check=True, capture_output=True)
    begun = tmp_path / "out" / "transfer.json"
    for step in ("profile", "sweep", "merge", "evaluate"):
        process = subprocess.Popen([*command, "out", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (begun.exists() and step in json.loads(begun.read_text())["steps"]):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run([*command, "out", *options], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, killed = files(tmp_path / "whole"), files(tmp_path / "out")
    assert set(whole) == set(killed)
    for name in ("sweep/best.yml", "merged/model.safetensors", "profiles/even.safetensors", "evaluation.json"):
        assert killed[name].replace(b"out/", b"whole/") == whole[name], name


def test_interrupted_and_given_again(abilities, tmp_path):
    command = [sys.executable, "-m", "mergekit_act", "transfer", "abilities.yml", "out", "--keep-within", "0.9"]
    begun = tmp_path / "out" / "transfer.json"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "out/sweep/sweep.csv").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130
    assert "the same command goes on from there" in told
    assert not json.loads(begun.read_text())["steps"]["sweep"]["done"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "It recovers " in done.stdout


def test_what_a_killed_run_meant_to_overwrite_is_overwritten(tmp_path):
    (tmp_path / "data").mkdir()
    out = tmp_path / "found.txt"

    def take(run):
        step = Step("mask", ("mergekit-act", "mask"), (tmp_path / "data",), (out,), again="resumes")
        Steps(tmp_path / "transfer.json", run, lambda line: None, **ON).take(step)

    def killed(words):
        given.append(words)
        raise RuntimeError

    given = []
    out.write_text("first")
    take(given.append)
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")  # in a folder of data
    for run in (killed, given.append, given.append):
        with contextlib.suppress(RuntimeError):
            take(run)
    assert given == [["mergekit-act", "mask"], *[["mergekit-act", "mask", "--overwrite"]] * 2]  # and then it is done


def test_what_a_killed_run_left_is_overwritten(tmp_path):
    """A step that begins anew may have written some of its files; one that goes on by itself finds them."""
    given = []

    def killed(words):
        given.append(words[2:])
        raise RuntimeError

    for again in ("anew", "ends", "resumes"):
        step = Step(again, ("mergekit-act", "report"), (), (tmp_path / "last.html",), again=again)
        steps = Steps(tmp_path / "transfer.json", killed, lambda line: None, **ON)
        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                steps.take(step)
    assert given == [[], ["--overwrite"], [], [], [], []]


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
        return {line.partition(": ")[0]: line for line in lines if line.startswith(("time: ", "disk: "))}

    swept, tuned = told(), told("--density", "0.2", "--weight", "0.5", "--finetune")
    assert "sweep" in swept["time"]
    assert "finetune" not in swept["time"]
    assert "sweep" not in tuned["time"]
    assert "finetune" in tuned["time"]
    assert swept["disk"] != tuned["disk"]


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
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "out has files of something else; name another folder" in told()


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


def test_what_is_removed_is_made_again(abilities, tmp_path):
    transfer("--keep-within", "0.9")
    for name, step in (("profiles/fit/inputs.safetensors", "profile"), ("sweep/best.yml", "sweep")):
        (tmp_path / "out" / name).unlink()
        result = transfer("--keep-within", "0.9")
        assert result.exit_code == 0, result.output
        assert steps(result.output)[step]
        assert (tmp_path / "out" / name).exists()


def test_nothing_that_is_good_enough(abilities, tmp_path):
    """Told each time, whatever an earlier run has left; scores are put so that every point makes it worse."""
    assert transfer("--keep-within", "0.9").exit_code == 0
    path = tmp_path / "out/sweep/sweep.csv"
    scored, best = path.read_text(), (tmp_path / "out/sweep/best.yml").read_bytes()
    header, target, *points = csv.reader(scored.splitlines())
    place = header.index("nll:even")
    worse = [[*point[:place], "99", *point[place + 1 :]] for point in points]
    path.write_text("".join(",".join(line) + "\n" for line in (header, target, *worse)))
    for _ in range(2):
        result = transfer("--keep-within", "0.8")
        assert result.exit_code == 1
        assert result.output.endswith("within the limit: there is nothing to publish.\n")
    path.write_text(scored)
    assert transfer("--keep-within", "0.9").exit_code == 0
    assert (tmp_path / "out/sweep/best.yml").read_bytes() == best


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


def test_fine_tuned(abilities, tmp_path):
    fixed = ("--density", "0.2", "--weight", "0.5")
    result = transfer(*fixed, "--finetune", "--device", "cpu")
    assert result.exit_code == 0, (result.output, result.exception)
    assert list(steps(result.output)) == ["profile", "mask", "card", "finetune", "evaluate", "report"]
    assert "## Evaluation" in (tmp_path / "out/merged/README.md").read_text()
    card = (tmp_path / "out/tuned/README.md").read_text()
    assert "## Before the fine-tuning: Transferred abilities" in card
    assert "| this model |" in card
    assert "model-index" in card
    assert not any(steps(transfer(*fixed, "--finetune", "--device", "cpu").output).values())


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
    assert own | {"samples": 10, "evaluate": {"samples": 10}, "dataset": str(sums_file), "role": "recover"} == own
    other = CliRunner().invoke(main, ["transfer", "out", *pair, "--recover", str(sums_file), "--keep", str(sums_file)])
    assert 'two data sets are called "sums"' in other.output
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


def test_models_that_cannot_be_reached(abilities, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "abilities.yml").write_text(yaml.safe_dump(abilities() | {"ability_model": "me/private"}))
    command = [sys.executable, "-m", "mergekit_act", "transfer", "abilities.yml", "out"]
    done, asked = run_there(tmp_path, *command)
    assert done.returncode == 1
    assert "Error: me/private has no config that can be loaded: " in done.stderr
    assert any("/me/private/" in path for path in asked)
    done, _ = run_there(tmp_path, *command, HF_HUB_OFFLINE="1")  # as without a network
    assert "Error: me/private has no config that can be loaded: We couldn't connect to" in done.stderr
    assert not (tmp_path / "out").exists()


def test_push_to_the_hub(abilities, tmp_path):
    (tmp_path / "hub").mkdir()
    command = [sys.executable, "-m", "mergekit_act", "transfer", "abilities.yml", "out", "--push-to-hub", "me/sums"]
    command += ["--density", "0.2", "--weight", "0.5", "--yes"]
    done, asked = run_there(tmp_path, *command, HF_TOKEN="hf_x")
    assert done.returncode == 0, done.stderr
    assert "$ hf upload me/sums out/merged --private" in done.stdout
    for name in ("model.safetensors", "README.md", "act.yml"):
        assert (tmp_path / "hub/me/sums" / name).read_bytes() == (tmp_path / "out/merged" / name).read_bytes()
    assert sum("/api/repos/create" in path for path in asked) >= 1
    (tmp_path / "hub/me/public").mkdir()
    for name, seen_by in (("me/sums", "private"), ("me/public", "public"), ("me/new", "new, private")):
        done, asked = run_there(tmp_path, *command[:6], "--push-to-hub", name, HF_TOKEN="hf_x")
        assert done.returncode == 1
        assert f"Upload the result to {name} ({seen_by}), if it is worth it? [y/N]" in done.stdout
        assert not any("create" in path for path in asked)
    (tmp_path / "hub/others/there").mkdir(parents=True)
    for name in ("others/sums", "others/there"):
        done, _ = run_there(tmp_path, *command[:6], "--push-to-hub", name, "--yes", HF_TOKEN="hf_x")
        assert done.returncode == 1
        assert f"Error: {name} cannot be written to: " in done.stderr
        assert "403" in done.stderr


def test_what_is_not_worth_it_is_not_uploaded(abilities, tmp_path):
    """All weights of the ability model, whose answers on what is kept are worse."""
    (tmp_path / "hub").mkdir()
    command = [sys.executable, "-m", "mergekit_act", "transfer", "abilities.yml", "out", "--push-to-hub", "me/sums"]
    command += ["--density", "1", "--weight", "-3", "--yes"]
    done, _ = run_there(tmp_path, *command, HF_TOKEN="hf_x")
    assert done.returncode == 0, done.stderr
    assert "do not publish." in done.stdout
    assert "Not uploaded, as it is not worth it. This would:\n$ hf upload me/sums out/merged --private" in done.stdout
    assert list((tmp_path / "hub/me/sums").iterdir()) == []


def test_judgement_by_hand():
    def one(model, ability, role, value, difference=None, interval=None):
        nll = {"value": value, "difference": difference, "difference_interval": interval}
        return {"model": model, "ability": ability, "role": role, "samples": 100, "nll": nll, "exact_match": None}

    def evaluation(gain, low, high, cost=0.0, far=-3.0):
        facts = [
            one("t", "facts", "recover", 4.0),
            one("a", "facts", "recover", 4.0 + far, far, [far - 0.1, far + 0.1]),
            one("m", "facts", "recover", 4.0 + gain, gain, [low, high]),
        ]
        sums = [
            one("t", "sums", "keep", 1.0),
            one("a", "sums", "keep", 5.0),
            one("m", "sums", "keep", 1.0 + cost, cost, [cost - 0.1, cost + 0.1]),
        ]
        return {"results": [*facts, *sums]}

    def judged(*numbers, **more):
        return judge(evaluation(*numbers, **more), "a", "m", keep_within=0.2)

    won = (-1.5, -1.7, -1.3)
    assert judged(*won) == ("It recovers 50 % of the nats of facts; sums has not changed beyond chance.", True)
    assert judged(*won, 0.2) == (
        "It recovers 50 % of the nats of facts; sums is worse by 0.20 nats.",
        True,
    )  # exp(-0.2) is 0.82
    assert judged(*won, 0.25) == (
        "It recovers 50 % of the nats of facts; sums is worse by 0.25 nats, which is more than allowed: do not publish.",
        False,
    )
    both = evaluation(*won)
    lost = [one("t", "dates", "recover", 2.0), one("a", "dates", "recover", 1.0, -1.0, [-1.1, -0.9])]
    both["results"] += [*lost, one("m", "dates", "recover", 4.0, 2.0, [1.9, 2.1])]
    told, is_worth_it = judge(both, "a", "m", keep_within=0.2)
    assert told.startswith("It recovers 50 % of the nats of facts; dates is worse by 2.00 nats; ")
    assert told.endswith(": do not publish.")
    assert not is_worth_it
    assert judged(*won, far=-0.05)[0].startswith("It recovers 1.50 nats of facts; ")
    assert judged(-0.1, -0.3, 0.1) == ("It recovers nothing that is beyond chance: do not publish.", False)
    assert judged(-0.1, -0.3, 0.1, far=2.0)[0].endswith(" The ability model is worse than the target on facts.")
    small = evaluation(*won)
    small["results"] = [result | {"samples": 12} for result in small["results"]]
    assert judge(small, "a", "m", 0.2)[0].endswith(" These are few samples: 12 of facts, 12 of sums.")
    shown = list_results(
        evaluation(-1.5, -1.7, -1.3), {"t": "target", "a": "ability model", "m": "merged"}
    ).splitlines()
    assert shown[1].split() == [
        "facts,",
        "to",
        "recover",
        "100",
        "4.00",
        "1.00",
        "2.50",
        "-1.50",
        "(-1.70",
        "to",
        "-1.30)",
    ]
