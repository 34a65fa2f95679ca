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

from click.testing import CliRunner
from merges import state_of
from transfers import files, steps, transfer

from mergekit_act.cli import main
from mergekit_act.transferring.judgement import judge, list_results
from mergekit_act.transferring.steps import Step, Steps

OF = {"target": "t", "ability_model": "a", "file": "f", "abilities": {}}


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
    written_otherwise = [str(tmp_path / "abilities.yml"), f"{tmp_path}/./out", "--keep-within", "0.9"]
    assert CliRunner().invoke(main, ["transfer", *written_otherwise]).output == again.output
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
    for step in ("profile", "merge"):
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
    for _ in range(3):  # Python loses an interrupt that comes while it destroys an object
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (tmp_path / "out/sweep/sweep.csv").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
        if process.returncode:
            break
        shutil.rmtree(tmp_path / "out")
    assert process.returncode == 130
    assert "the same command goes on from there" in told
    assert not json.loads(begun.read_text())["steps"]["sweep"]["done"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "It recovers " in done.stdout


class Recorder:
    """Runs commands by writing down what they are given beside their names; may be killed there."""

    def __init__(self, path):
        self.path, self.given = path, []

    def take(self, step, *, killed=False, device="cpu"):
        def run(words):
            self.given.append(words[2:])
            if killed:
                raise RuntimeError

        with contextlib.suppress(RuntimeError):
            Steps(self.path, run, lambda line: None, device=device, of=OF).take(step)


def test_what_a_killed_run_meant_to_overwrite_is_overwritten(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "found.txt").write_text("first")
    reads, writes = (tmp_path / "data",), (tmp_path / "found.txt",)
    step = Step("mask", ("mergekit-act", "mask"), reads, writes, again="resumes")
    recorder = Recorder(tmp_path / "transfer.json")
    recorder.take(step)
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")  # in a folder of data
    for killed in (True, False, False):
        recorder.take(step, killed=killed)
    assert recorder.given == [[], ["--overwrite"], ["--overwrite"]]  # and then it is done


def test_unfinished_work_of_another_device_is_overwritten(tmp_path):
    recorder = Recorder(tmp_path / "transfer.json")
    for device in ("cpu", "cpu", "cuda"):
        recorder.take(Step("sweep", ("mergekit-act", "sweep"), (), (), again="resumes"), killed=True, device=device)
    assert recorder.given == [[], [], ["--overwrite"]]


def test_what_a_killed_run_left_is_overwritten(tmp_path):
    """A step that begins anew may have written some of its files; one that goes on by itself finds them."""
    recorder = Recorder(tmp_path / "transfer.json")
    for again in ("anew", "ends", "resumes"):
        for _ in range(2):
            step = Step(again, ("mergekit-act", "report"), (), (tmp_path / "last.html",), again=again)
            recorder.take(step, killed=True)
    assert recorder.given == [[], ["--overwrite"], [], [], [], []]


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
    assert "tags:\n- mergekit\n- merge\n- mergekit-act\n- sft\n" in card
    reproduce = (tmp_path / "out/tuned/reproduce.json").read_bytes()
    assert reproduce == (tmp_path / "out/merged/reproduce.json").read_bytes()
    assert not any(steps(transfer(*fixed, "--finetune", "--device", "cpu").output).values())
    assert "\nout/tuned is of an earlier run, with --finetune\n" in transfer(*fixed, "--device", "cpu").output


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
    answered = evaluation(*won)
    for result in answered["results"]:
        interval = {"t": None, "a": [0.1, 0.3], "m": [0.0, 0.1]}[result["model"]]
        result["exact_match"] = {"value": 0.5, "difference_interval": interval}
    assert judge(answered, "a", "m", 0.2)[0].endswith(
        ". No more whole answers of facts are right than before, beyond chance."
    )
    answered["results"][2]["exact_match"]["difference_interval"] = [0.01, 0.1]
    assert judge(answered, "a", "m", 0.2)[0].endswith("beyond chance.")
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
