"""The experiment kit, with few steps and few rules: that all of it runs, and that a second run measures nothing anew."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import make_model, make_tokenizer, tiny_config

KIT = Path(__file__).parents[1] / "benchmarks" / "paper"


def run(setting: str, folder: Path, **environment: str) -> str:
    command = [sys.executable, str(KIT), setting, str(folder), "--quick"]
    environment = os.environ | {"PYTHONHASHSEED": "0"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return (folder / "results.md").read_text(encoding="utf-8")


def scores(folder: Path) -> list[dict[str, object]]:
    lines = [line for path in sorted(folder.rglob("scores.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_toy(tmp_path):
    page = run("toy", tmp_path)
    for rule in ("target", "task arithmetic", "TIES", "DARE", "DELLA", "ACT, as in the paper"):
        assert f"| {rule} |" in page
    for image in ("grid", "distribution"):
        assert f"![](results/toy-{image}.png)" in page
        assert (tmp_path / f"results/toy-{image}.png").stat().st_size > 10_000
    measured = scores(tmp_path)
    assert run("toy", tmp_path) == page
    assert scores(tmp_path) == measured


def test_qwen_with_models_and_data_that_stand_in(tmp_path):
    models, data, tokenizer = tmp_path / "models", tmp_path / "data", make_tokenizer()
    data.mkdir()
    for seed, name in enumerate(("Math-7B", "7B", "Coder-7B", "Math-1.5B", "1.5B")):
        config = tiny_config("qwen2", max_position_embeddings=256)
        make_model(config, models / f"Qwen2.5-{name}-Instruct", seed=seed, tokenizer=tokenizer)
    columns = {"science": ("question", "answer"), "math": ("query", "response"), "code": ("input", "output")}
    for name, (prompt, answer) in columns.items():
        subjects = ("physics", "chemistry", "biology")
        rows = [{prompt: f"{n}+{n}", answer: str(2 * n), "subject": subjects[n % 3]} for n in range(40)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = run("qwen", tmp_path / "out", QWEN_MODELS=str(models), QWEN_DATA=str(data))
    assert "`math-7B`" in page
    assert "| science |" in page
    assert "test task arithmetic 1 0.5 fine-tuned" in {one["key"] for one in scores(tmp_path)}


@pytest.fixture
def kit(monkeypatch):
    """The kit's modules can be imported, as when it runs."""
    monkeypatch.syspath_prepend(str(KIT))


def test_nothing_is_chosen_on_test_samples(kit, tmp_path):
    """All scores are known: by those on validation samples one point is best, by those on test samples another."""
    import yaml
    from experiment import Experiment, Setting
    from rules import Rule
    from tables import measure

    own = {"dataset": "d.jsonl", "prompt": "q", "answer": "a"}
    abilities = {"facts": {**own, "role": "recover"}, "sums": {**own, "role": "keep"}}
    file = tmp_path / "abilities.yml"
    file.write_text(yaml.safe_dump({"target": "t", "ability_model": "m", "abilities": abilities}))
    experiment = Experiment("one", "ones", (file,))
    setting = Setting("hand", "", (experiment,), None, ())

    def scored(recover: float, keep: float) -> dict[str, object]:
        return {"recover": {"facts": [[recover, 1, 0.0]] * 4}, "keep": {"sums": [[keep, 1, 1.0]] * 4}}

    known = {
        "validation target": scored(3.0, 0.1),
        "validation DARE 0.2 1": {"keep": scored(0.0, 0.2)["keep"]},  # loses too much
        "validation DARE 0.2 0.5": scored(2.0, 0.12),
        "validation DARE 0.5 1": scored(1.0, 0.1),
        "test target": scored(3.0, 0.1),
        "test m": scored(0.1, 3.0),
        "test DARE 0.2 1": scored(0.2, 0.1),
        "test DARE 0.2 0.5": scored(0.5, 0.1),
        "test DARE 0.5 1": scored(2.5, 0.9),
        "moved DARE 0.2": {"channels": 0.2, "parameters": 0.2},
        "moved DARE 0.5": {"channels": 0.5, "parameters": 0.5},
    }
    (tmp_path / "scores.jsonl").write_text(
        "".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in known.items())
    )
    rule = Rule("DARE", method="dare_linear", shares=(0.2, 0.5), weights=(1.0, 0.5))
    (row,) = measure(setting, experiment, tmp_path, [rule]).best
    assert (row.point.share, row.point.weight) == (0.5, 1.0)
    assert row.scores.nats("recover") == pytest.approx(2.5)


def test_scores_belong_to_their_rows_wherever_those_lie(kit, tmp_path):
    import click
    import yaml
    from experiment import Experiment
    from scoring import Scorer

    def opened(folder: Path, row: str) -> Scorer:
        (folder / "rows.jsonl").write_text(row)
        own = {"dataset": str(folder / "rows.jsonl"), "prompt": "q", "answer": "a"}
        (folder / "file.yml").write_text(
            yaml.safe_dump({"target": "t", "ability_model": "m", "abilities": {"facts": own}})
        )
        return Scorer(Experiment("one", "ones", (folder / "file.yml",)), folder / "measured", "settings")

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    opened(here, "first").once("key", lambda: 1)
    here.rename(there)
    assert opened(there, "first").once("key", lambda: 2) == 1
    with pytest.raises(click.UsageError, match="other settings or rows"):
        opened(there, "second")


def test_answers_with_and_without_what_they_share(kit, pair_of):
    import torch
    from scoring import _answers
    from transformers import AutoModelForCausalLM

    from mergekit_act.abilities import Sample

    model = AutoModelForCausalLM.from_pretrained(pair_of("qwen2")[0], dtype=torch.float32).eval()
    torch.manual_seed(0)
    samples = []
    for length, answer in ((9, 2), (12, 4), (9, 3)):
        ids = torch.cat([torch.arange(5, 9), torch.randint(10, 90, (length - 4,))])
        samples.append(Sample(ids, torch.arange(length) >= length - answer))
    for found, sample in zip(_answers(model, samples), samples, strict=True):
        with torch.inference_mode():
            logits = model(sample.input_ids[None]).logits[0, :-1][sample.is_answer[1:]]
        labels = sample.input_ids[sample.is_answer]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        assert found == (pytest.approx(float(loss), rel=1e-5), len(labels), float((logits.argmax(-1) == labels).all()))


def test_scores_by_hand(kit):
    from scoring import Scores, difference

    before = Scores({"recover": {"a": [[5.0, 2, 0.0], [2.0, 1, 0.0]], "b": [[3.0, 1, 0.0], [5.0, 1, 1.0]]}, "keep": {}})
    after = Scores({"recover": {"a": [[3.0, 2, 1.0], [1.0, 1, 1.0]], "b": [[2.0, 1, 0.0], [4.0, 1, 1.0]]}, "keep": {}})
    assert before.nats("recover") == pytest.approx((7 / 3 + 8 / 2) / 2)
    assert before.right("recover") == (0 + 1 / 2) / 2
    assert math.isnan(before.nats("keep"))
    gain, (low, high) = difference(before, after, "recover")
    assert gain == pytest.approx((7 / 3 + 8 / 2) / 2 - (4 / 3 + 6 / 2) / 2)
    assert (low, high) == pytest.approx((1.0, 1.0))  # every sample gains one nat a token: whatever is drawn
    low, high = after.right_interval("recover")
    assert low < 0.75 < high < 1.0


def model(name: str, nats: float, tuned: float | None = None) -> object:
    """A row of a table, of ten samples that all have the same loss: intervals are points."""
    from scoring import Scores
    from tables import Row

    scores, after = (
        None if value is None else Scores({"recover": {"a": [[value, 1, 0.0]] * 10}}) for value in (nats, tuned)
    )
    return Row(name, scores, tuned=after)


def table(specialist: float = 2.0, **nats: tuple[float, float]) -> object:
    """The target has 3 nats, and 1 after fine-tuning; every rule's are given, or are 2 and 1."""
    from tables import Table

    names = ("task arithmetic", "TIES", "DARE", "DELLA", "ACT, as in the paper")
    every = dict.fromkeys(names, (2.0, 1.0)) | {name.replace("_", " "): some for name, some in nats.items()}
    every["ACT, as in the paper"] = every.pop("ACT", every["ACT, as in the paper"])
    rules = [model(name, *some) for name, some in every.items()]
    return Table(model("target", 3.0, 1.0), [model("specialist", specialist)], rules)


def findings(**changed: object) -> object:
    """Of two pairs and abilities, such that every finding of the paper holds."""
    from findings import Found

    overlap = np.full((2, 2, 2, 2), 0.2)
    overlap[:, [0, 1], :, [0, 1]] = 0.6  # of one ability by two pairs
    fullest = [[("q_proj", 0.4, 0.1)] * 2] * 2
    every = {
        "pairs": ["one", "two"],
        "abilities": ["a", "b"],
        "held": np.full((2, 2), 0.3),
        "head": np.zeros((2, 2)),
        "kinds": fullest,
        "layers": fullest,
        "overlap": overlap,
        "weights": np.full((2, 2), 0.02),
    }
    return Found(**every | changed)


@pytest.mark.parametrize(
    ("number", "changed"),
    [
        (0, {"held": np.array([[0.3, 0.3], [0.3, 0.05]])}),
        (1, {"layers": [[("7", 0.6, 0.1), ("7", 0.2, 0.1)]] * 2}),
        (2, {"overlap": np.full((2, 2, 2, 2), 0.55)}),
        (3, {"overlap": np.full((2, 2, 2, 2), 0.3)}),
        (4, {"weights": np.array([[0.02, 0.02], [0.3, 0.02]])}),
    ],
)
def test_verdicts_on_findings(kit, number, changed):
    from claims import claims

    good, found = findings(), findings(**changed)
    assert [one.holds for one in claims({"x": table()}, None, good, good)][:5] == [True] * 5
    assert [one.holds for one in claims({"x": table()}, None, found, good)][number] is False


def test_verdicts_on_transfers(kit):
    from claims import claims

    def verdicts(first, second, merged):
        *_, recovers, tuned, best, specialists = claims({"x": first, "y": second}, merged, findings(), findings())
        return recovers, tuned, best, specialists

    ahead = table(ACT=(1.0, 0.5))
    recovers, tuned, best, specialists = verdicts(ahead, ahead, ahead)
    assert [one.holds for one in (recovers, tuned, best, specialists)] == [True] * 4
    assert "TIES 1.00 (1.00 to 1.00) (2 of 2 beyond its interval)" in recovers.why
    assert "by 0.50 (0.50 to 0.50) nats" in tuned.why
    assert "DELLA 0.50 (0.50 to 0.50) (2 of 2 beyond its interval)" in best.why

    recovers, tuned, best, specialists = verdicts(ahead, table(ACT=(1.0, 1.2), TIES=(0.5, 0.1)), table(TIES=(1.5, 1.0)))
    assert [one.holds for one in (recovers, tuned, best, specialists)] == [False] * 4  # one table is enough
    assert "TIES 0.25 (-0.50 to 1.00) (1 of 2 beyond its interval)" in recovers.why

    assert verdicts(ahead, ahead, table(ACT=(3.0, 1.0)))[-1].holds is False  # others are better
    alike = dict.fromkeys(("ACT", "TIES", "DARE", "DELLA", "task arithmetic"), (3.0, 1.0))
    assert verdicts(ahead, ahead, table(specialist=3.0, **alike))[-1].holds is None  # no better than the base
    assert verdicts(ahead, ahead, table())[-1].holds  # as well as the others is enough
