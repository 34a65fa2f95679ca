"""Tables 3 and 4 and figure 5: each rule's best point, chosen on validation samples, told on test samples."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiment import Experiment, Setting
from rules import PAPER, RULES, Merges, Point, Rule, points
from scoring import Scorer
from tqdm import tqdm

from mergekit_act.finetuning import TrainingSettings, finetune

__all__ = ["KEPT", "Row", "grid", "measure"]

KEPT = 0.97  # of the likelihood that the target gives to answer tokens of kept abilities

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A model of a table.

    Attributes:
        name: of the rule, or which model it is.
        point: what was chosen; None of models that are not merged.
        share: that it was chosen among; None for the best of all.
        channels: share that is moved.
        parameters: likewise.
        scores: on test samples; None if no point keeps enough.
        tuned: likewise, after fine-tuning.
    """

    name: str
    point: Point | None
    share: float | None
    channels: float
    parameters: float
    scores: Scores | None
    tuned: Scores | None = None


def measure(setting: Setting, experiment: Experiment, folder: Path, rules: Sequence[Rule]) -> list[Row]:
    """The rows of a table; what was measured before is read from FOLDER/scores.jsonl."""
    scorer = Scorer(experiment, folder / "scores.jsonl")
    merges = Merges(setting, experiment, folder, _criteria(rules))
    target = {part: scorer.score(part, "target", merges.target) for part in ("validation", "test")}

    def enough(one: Scores) -> bool:
        before = target["validation"]["likelihood"]
        return math.isnan(before) or one["likelihood"] >= KEPT * before

    def tuned(key: str, write: Callable[[Path], None] | str) -> Scores | None:
        return _tuned(setting, scorer, merges, folder, key, write) if setting.recipe else None

    rows = [Row("target", None, None, 0.0, 0.0, target["test"], tuned("target", merges.files[0].target))]
    for file in merges.files:
        key = f"ability model {Path(file.ability_model).name}"
        model = None if scorer.known("test", key) else merges.load(file.ability_model)
        rows.append(Row(key, None, None, 1.0, 1.0, scorer.score("test", key, model)))
    for rule in tqdm(rules, desc=experiment.name):
        tried = list(_tried(rule, scorer, merges, enough, math.isnan(target["validation"]["likelihood"])))
        allowed = [(one["nll"], point) for point, one in tried if enough(one)]
        for share in (None, *(rule.shares if len(rule.shares) > 1 and rule.method == "act" else ())):
            some = [one for one in allowed if share in (None, one[1].share)]
            if not some:
                rows.append(Row(rule.name, None, share, 0.0, 0.0, None))
                continue
            point = min(some, key=lambda one: one[0])[1]
            if not scorer.known("test", point.key):
                with merges.merged(point) as model:
                    scorer.score("test", point.key, model)
            row = Row(rule.name, point, share, *merges.channels(point), scorer.score("test", point.key, None))
            if share is None and rule in RULES:
                row = replace(row, tuned=tuned(point.key, partial(merges.write, point)))
            rows.append(row)
    return rows


def grid(setting: Setting, experiment: Experiment, folder: Path) -> dict[str, list[tuple[float, float, Scores]]]:
    """Figure 5: rule -> (share, weight, scores on validation samples) of every share and weight."""
    rules = [rule for rule in RULES if rule.name in ("task arithmetic", PAPER.name, "attribution over damage")]
    scorer = Scorer(experiment, folder / "scores.jsonl")
    merges = Merges(setting, experiment, folder, _criteria(rules))
    found: dict[str, list[tuple[float, float, Scores]]] = {}
    for rule in rules:
        for point in (point for some in points(rule) for point in some):
            found.setdefault(rule.name, []).append((point.share, point.weight, _validated(point, scorer, merges)))
    return found


def _criteria(rules: Sequence[Rule]) -> list[str]:
    return list(dict.fromkeys(["weight", *(rule.criterion for rule in rules if rule.criterion), "attribution"]))


def _validated(point: Point, scorer: Scorer, merges: Merges) -> Scores:
    if scorer.known("validation", point.key):
        return scorer.score("validation", point.key, None)
    with merges.merged(point) as model:
        return scorer.score("validation", point.key, model)


def _tried(
    rule: Rule, scorer: Scorer, merges: Merges, enough: Callable[[Scores], bool], every: bool
) -> Iterator[tuple[Point, Scores]]:
    """Of each share the points from the largest weight on, until the kept abilities keep enough."""
    for some in points(rule):
        for point in some:
            one = _validated(point, scorer, merges)
            yield point, one
            if enough(one) and not every:
                break


def _tuned(
    setting: Setting, scorer: Scorer, merges: Merges, folder: Path, key: str, write: Callable[[Path], None] | str
) -> Scores:
    """Scores after fine-tuning on the profiled samples.

    Args:
        write: writes the model into a folder, or the model's folder.
    """
    tuned = f"{key} fine-tuned"
    if scorer.known("test", tuned):
        return scorer.score("test", tuned, None)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        merged, out = Path(temporary) / "merged", Path(temporary) / "tuned"
        if not isinstance(write, str):
            write(merged)
        source = write if isinstance(write, str) else str(merged)
        settings = TrainingSettings(
            save_steps=0, device=setting.device if setting.device == "cpu" else None, quiet=True
        )
        merges.target.to("cpu")  # room for the training
        finetune(source, merges.files[0], out, setting.recipe, settings)
        merges.target.to(setting.device)
        return scorer.score("test", tuned, merges.load(out))
