"""A transfer from its first step to a sentence about its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_act.abilities import load_abilities
from mergekit_act.files import check_writable
from mergekit_act.runs.folders import claimed
from mergekit_act.transferring.judgement import judge, list_results
from mergekit_act.transferring.plan import TransferPlan, TransferSettings
from mergekit_act.transferring.steps import Echo, Run, Steps
from mergekit_act.wording import escape

__all__ = ["Transfer", "describe_transfer", "run_transfer"]


@dataclass(frozen=True)
class Transfer:
    """What a transfer left.

    Attributes:
        model: folder of the result; None if no point of the sweep recovers anything within the limit.
        evaluation: what ``evaluate --json`` writes.
        results: the table of it.
        judgement: a sentence.
    """

    model: Path | None
    evaluation: Mapping[str, Any]
    results: str
    judgement: str


def describe_transfer(path: Path, out: Path, settings: TransferSettings) -> str:
    """The commands of a transfer, and what they take; nothing is written.

    Raises:
        FileNotFoundError: as ``run_transfer``.
        OSError: likewise.
        ValueError: likewise.
    """
    planned = TransferPlan(path, load_abilities(path), out, settings)
    planned.check()
    commands = "\n".join(f"$ {step}" for step in planned.steps())
    return f"{commands}\n\n{planned.describe_needs()}"


def run_transfer(path: Path, out: Path, settings: TransferSettings, *, run: Run, echo: Echo) -> Transfer:
    """Take the whole path; what an earlier run has done on the same files is not done again.

    Args:
        path: the abilities file.
        out: folder for everything.
        settings: how.
        run: runs a command, given its words.
        echo: prints a line.

    Raises:
        FileNotFoundError: the file, a model or a data set does not exist.
        BlockingIOError: another transfer is at work in the folder.
        OSError: the disk is too small.
        ValueError: the models are one, there are too few held-out rows, or the folder is of another pair.
    """
    planned = TransferPlan(path, load_abilities(path), out, settings)
    planned.check()
    check_writable(out)
    with claimed(out / "transfer.json"):
        _claim(planned)
        planned.make_repository()
        steps = Steps(out / "transfer.json", run, echo)
        planned.write_inputs()
        for step in planned.steps():
            if step.name == "merge" and not planned.config.exists():
                break  # no point of the sweep is good enough
            steps.take(step)
    return _result(planned)


def _result(planned: TransferPlan) -> Transfer:
    """What the steps have left."""
    if not planned.config.exists():
        words = "No point of the sweep recovers anything within the limit: there is nothing to publish."
        return Transfer(None, {}, "", words)
    evaluation = json.loads((planned.out / "evaluation.json").read_text(encoding="utf-8"))
    last = planned.tuned if planned.settings.finetune else planned.merged
    names = {planned.target: "target", planned.ability_model: "ability model", str(planned.merged): "merged"}
    names |= {str(planned.tuned): "tuned"} if planned.settings.finetune else {}
    judgement = judge(evaluation, planned.target, planned.ability_model, str(last))
    return Transfer(last, evaluation, list_results(evaluation, names), judgement)


def _claim(planned: TransferPlan) -> None:
    """See that a folder is of a transfer between these models, or of none.

    Raises:
        FileExistsError: it has files of something else.
        ValueError: it is of another pair.
    """
    out, own = planned.out, (planned.target, planned.ability_model)
    before = out / "merge.yml"
    if not (out / "transfer.json").exists():
        if any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise FileExistsError(f"{escape(out)} has files of something else; name another folder")
        return
    written = yaml.safe_load(before.read_text(encoding="utf-8")) if before.exists() else {}
    if written and (written["base_model"], written["models"][0]["model"]) != own:
        raise ValueError(
            f"{escape(out)} is of a transfer from {written['models'][0]['model']} into {written['base_model']}; name "
            "another folder"
        )
