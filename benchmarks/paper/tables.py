"""Tables 3 and 4 and figure 5: each rule's best point, chosen on validation samples, told on test samples."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    before = scorer.score("validation", "target", merges.of_target)["likelihood"]

    def enough(one: Scores) -> bool:
        return math.isnan(before) or one["likelihood"] >= KEPT * before

    def tuned(key: str, write: Callable[[Path], None] | str) -> Scores | None:
        if experiment.recipe is None:
            return None
        return scorer.score("test", f"{key} fine-tuned", partial(_tuned, setting, experiment, merges, folder, write))

    target = scorer.score("test", "target", merges.of_target)
    rows = [Row("target", None, None, 0.0, 0.0, target, tuned("target", merges.files[0].target))]
    for file in merges.files:
        key = f"ability model {Path(file.ability_model).name}"
        scores = scorer.score("test", key, partial(merges.loaded, file.ability_model))
        rows.append(Row(key, None, None, 1.0, 1.0, scores))
    for rule in tqdm(rules, desc=experiment.name):
        tried = list(_tried(rule, scorer, merges, enough, math.isnan(before)))
        allowed = [(one["nll"], point) for point, one in tried if enough(one)]
        for share in (None, *(rule.shares if len(rule.shares) > 1 and rule.method == "act" else ())):
            some = [one for one in allowed if share in (None, one[1].share)]
            if not some:
                rows.append(Row(rule.name, None, share, 0.0, 0.0, None))
                continue
            point = min(some, key=lambda one: one[0])[1]
            moved = scorer.once(f"moved {rule.name} {point.share:g}", partial(merges.moved, point))
            scores = scorer.score("test", point.key, partial(merges.merged, point))
            row = Row(rule.name, point, share, moved["channels"], moved["parameters"], scores)
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
            one = scorer.score("validation", point.key, partial(merges.merged, point))
            found.setdefault(rule.name, []).append((point.share, point.weight, one))
    return found


def _criteria(rules: Sequence[Rule]) -> list[str]:
    return list(dict.fromkeys(["weight", *(rule.criterion for rule in rules if rule.criterion), "attribution"]))


def _tried(
    rule: Rule, scorer: Scorer, merges: Merges, enough: Callable[[Scores], bool], every: bool
) -> Iterator[tuple[Point, Scores]]:
    """Of each share the points from the largest weight on, until the kept abilities keep enough."""
    for some in points(rule):
        for point in some:
            one = scorer.score("validation", point.key, partial(merges.merged, point))
            yield point, one
            if enough(one) and not every:
                break


@contextmanager
def _tuned(
    setting: Setting, experiment: Experiment, merges: Merges, folder: Path, write: Callable[[Path], None] | str
) -> Iterator[Any]:
    """The model after fine-tuning on the profiled samples.

    Args:
        write: writes the model into a folder, or the model's folder.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        merged, out = Path(temporary) / "merged", Path(temporary) / "tuned"
        if not isinstance(write, str):
            write(merged)
        source = write if isinstance(write, str) else str(merged)
        settings = TrainingSettings(
            save_steps=0, device=setting.device if setting.device == "cpu" else None, quiet=True
        )
        merges.unload()  # room for the training
        finetune(source, merges.files[0], out, experiment.recipe, settings)
        with merges.loaded(out) as model:
            yield model
