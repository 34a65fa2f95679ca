"""Tables 3 and 4 and figure 5: each rule's best point, chosen on validation samples, told on test samples."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiment import Experiment, Setting
from rules import CONTROLS, PAPER, RULES, SHARES, Merges, Point, Rule, points
from scoring import Scorer, Scores
from tqdm import tqdm

from mergekit_act.finetuning import TrainingSettings, finetune

__all__ = ["KEPT", "Row", "Table", "grid", "measure"]

KEPT = 0.03  # nats by which an answer token of the kept abilities may become less likely than by the target


@dataclass(frozen=True)
class Row:
    """A model of a table.

    Attributes:
        name: of the rule, or which model it is.
        scores: on test samples; the target's if no point keeps enough.
        point: what was chosen; None of models that are not merged, and if no point keeps enough.
        share: that it was chosen among; None for the best of all.
        channels: share that is moved.
        parameters: likewise.
        tuned: scores after fine-tuning.
    """

    name: str
    scores: Scores
    point: Point | None = None
    share: float | None = None
    channels: float = 0.0
    parameters: float = 0.0
    tuned: Scores | None = None


@dataclass(frozen=True)
class Table:
    """An experiment's rows.

    Attributes:
        target: the model as it is.
        abilities: the ability models.
        rules: of each rule the best point, and the best of each share.
    """

    target: Row
    abilities: Sequence[Row]
    rules: Sequence[Row]

    @property
    def best(self) -> list[Row]:
        """Of each rule the best point."""
        return [row for row in self.rules if row.share is None]


def measure(setting: Setting, experiment: Experiment, folder: Path, rules: Sequence[Rule]) -> Table:
    """The table of an experiment; what was measured before is read from FOLDER/scores.jsonl."""
    scorer, merges = _opened(setting, experiment, folder, rules)
    before = scorer.score("validation", "target", merges.of_target).nats("keep")
    target = scorer.score("test", "target", merges.of_target)

    def enough(scores: Scores) -> bool:
        return math.isnan(before) or scores.nats("keep") <= before + KEPT

    def tuned(key: str, source: Callable[[Path], None] | str) -> Scores | None:
        if experiment.recipe is None:
            return None
        return scorer.score("test", f"{key} fine-tuned", partial(_tuned, setting, experiment, merges, folder, source))

    abilities = []
    for file in merges.files:
        name = Path(file.ability_model).name
        abilities.append(Row(name, scorer.score("test", name, partial(merges.loaded, file.ability_model))))
    stays = Row("target", target, tuned=tuned("target", merges.files[0].target))
    rows = []
    for rule in tqdm(rules, desc=experiment.name):
        tried = list(_tried(rule, scorer, merges, enough, every=math.isnan(before)))
        shown = rule.shares if len(rule.shares) > 1 and rule.method == "act" and not math.isnan(before) else ()
        for share in (None, *shown):
            some = [one for one in tried if share in (None, one[0].share) and enough(one[1])]
            if not some:
                rows.append(replace(stays, name=rule.name, share=share))
                continue
            point = min(some, key=lambda one: one[1].nats("recover"))[0]
            moved = scorer.once(f"moved {rule.name} {point.share:g}", partial(merges.moved, point))
            row = Row(rule.name, scorer.score("test", point.key, partial(merges.merged, point)), point, share, **moved)
            # of the controls only the paper's own settings are fine-tuned
            if share is None and (rule.of == "each" or rule.name in {one.name for one in RULES}):
                row = replace(row, tuned=tuned(point.key, partial(merges.write, point)))
            rows.append(row)
    return Table(stays, abilities, rows)


def grid(
    setting: Setting, experiment: Experiment, folder: Path, rules: Sequence[Rule]
) -> dict[str, list[tuple[Point, Scores]]]:
    """Figure 5: rule -> scores on validation samples of shares and weights; of TIES and DARE with one weight."""
    sparse = {name: {"shares": SHARES, "weights": (0.5,)} for name in ("TIES", "DARE")}
    names = ("task arithmetic", *sparse, PAPER.name, "attribution")
    rules = [replace(rule, **sparse.get(rule.name, {})) for rule in rules if rule.name in names]
    scorer, merges = _opened(setting, experiment, folder, rules)
    return {
        rule.name: [
            (point, scorer.score("validation", point.key, partial(merges.merged, point)))
            for some in points(rule)
            for point in some
        ]
        for rule in rules
    }


def _opened(setting: Setting, experiment: Experiment, folder: Path, rules: Sequence[Rule]) -> tuple[Scorer, Merges]:
    criteria = dict.fromkeys(["weight", *(rule.criterion for rule in rules if rule.criterion), "attribution"])
    scorer = Scorer(experiment, folder, (RULES, CONTROLS, KEPT, setting.exclude, setting.dtype, setting.device))
    return scorer, Merges(setting, experiment, folder, list(criteria))


def _tried(
    rule: Rule, scorer: Scorer, merges: Merges, enough: Callable[[Scores], bool], *, every: bool
) -> Iterator[tuple[Point, Scores]]:
    """Of each share the points from the largest weight on, until the kept abilities keep enough."""
    for some in points(rule):
        for point in some:
            wanted = None if every else enough
            scores = scorer.score("validation", point.key, partial(merges.merged, point), wanted)
            yield point, scores
            if enough(scores) and not every:
                break


@contextmanager
def _tuned(
    setting: Setting, experiment: Experiment, merges: Merges, folder: Path, source: Callable[[Path], None] | str
) -> Iterator[Any]:
    """The model after fine-tuning on the profiled samples.

    Args:
        source: the model's folder, or what writes the model into a folder.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        merged, out = Path(temporary) / "merged", Path(temporary) / "tuned"
        if not isinstance(source, str):
            source(merged)
            source = str(merged)
        settings = TrainingSettings(
            save_steps=0, device=setting.device if setting.device == "cpu" else None, quiet=True
        )
        merges.unload()  # room for the training
        finetune(source, merges.files[0], out, experiment.recipe, settings)
        merges.unload()
        with merges.loaded(out) as model:
            yield model
