"""A transfer from its first step to a sentence about its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions

from mergekit_act.abilities import load_abilities
from mergekit_act.checking.summary import check_config
from mergekit_act.devices import usable_device
from mergekit_act.files import check_writable
from mergekit_act.logs import muted
from mergekit_act.runs.folders import claimed
from mergekit_act.transferring.commands import list_steps, upload, what_is_left_out
from mergekit_act.transferring.judgement import judge, list_results
from mergekit_act.transferring.plan import TransferPlan, TransferSettings
from mergekit_act.transferring.repository import make_repository
from mergekit_act.transferring.steps import Echo, Run, Steps, read_state
from mergekit_act.wording import escape, percent
from mergekit_act.yaml_files import read_yaml

__all__ = ["Transfer", "describe_transfer", "run_transfer"]


@dataclass(frozen=True)
class Transfer:
    """What a transfer left.

    Attributes:
        model: folder of the result; None if no point of the sweep recovers anything within the limit.
        evaluation: what ``evaluate --json`` writes.
        results: the table of it, and what was moved.
        judgement: a sentence.
        is_worth_it: whether something came back, at no more than the loss that is allowed.
    """

    model: Path | None
    evaluation: Mapping[str, Any]
    results: str
    judgement: str
    is_worth_it: bool


def describe_transfer(path: Path, out: Path, settings: TransferSettings) -> str:
    """The commands of a transfer, and what they take; nothing is written.

    Raises:
        FileNotFoundError: as ``run_transfer``.
        OSError: likewise.
        ValueError: likewise.
    """
    planned = TransferPlan(path, load_abilities(path), out, settings)
    planned.check()
    last = upload(planned)
    commands = "\n".join(f"$ {step}" for step in (*list_steps(planned), *([last] if last else [])))
    return "\n\n".join(filter(None, (commands, what_is_left_out(), planned.describe_needs())))


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
        FileExistsError: the folder has files of something else.
        BlockingIOError: another transfer is at work in the folder.
        OSError: the disk is too small.
        ValueError: the models are one, there are too few held-out rows, the folder is of another transfer, or the Hub
            does not let the result be uploaded.
    """
    planned = TransferPlan(path, load_abilities(path), out, settings)
    planned.check()
    out = planned.out
    check_writable(out)
    with claimed(out / "transfer.json"):
        _claim(planned)
        if settings.push_to_hub:
            make_repository(settings.push_to_hub)
        device = torch.device(usable_device(settings.device)).type
        steps = Steps(out / "transfer.json", run, echo, device=device, of=_described(planned))
        planned.write_inputs()
        for step in list_steps(planned):
            if step.name == "merge" and not planned.config.exists():
                break  # no point of the sweep is good enough
            steps.take(step)
        if planned.tuned.exists() and not settings.finetune:
            echo(f"\n{escape(planned.tuned)} is of an earlier run, with --finetune")
        result, last = _result(planned), upload(planned)
        echo("\n" + "\n\n".join(filter(None, (what_is_left_out(), result.results, result.judgement))))
        if last is not None and result.is_worth_it:
            echo(f"\n$ {last}")
            run(last.command)  # every time: what the Hub has is not sent again
        elif last is not None and result.model is not None:
            echo(f"\nNot uploaded, as it is not worth it. This would:\n$ {last}")
    return result


def _result(planned: TransferPlan) -> Transfer:
    """What the steps have left."""
    if not planned.config.exists():
        words = "No point of the sweep recovers anything within the limit: there is nothing to publish."
        return Transfer(None, {}, "", words, is_worth_it=False)
    evaluation = json.loads(planned.evaluation.read_text(encoding="utf-8"))
    names = {planned.target: "target", planned.ability_model: "ability model", str(planned.merged): "merged"}
    names |= {str(planned.tuned): "tuned"} if planned.settings.finetune else {}
    text, is_worth_it = judge(evaluation, planned.ability_model, str(planned.result), planned.settings.keep_within)
    table = f"{list_results(evaluation, names)}\n\n{_moved(planned)}"
    return Transfer(planned.result, evaluation, table, text, is_worth_it)


def _moved(planned: TransferPlan) -> str:
    """What the merge takes from the ability model, a line."""
    s = planned.settings
    options = MergeOptions(lora_merge_cache=s.lora_merge_cache, trust_remote_code=s.trust_remote_code)
    with muted("mergekit_act.checking"):
        merge = check_config(planned.config, options)
    moved, parameters = (sum(getattr(kind, name) for kind in merge.kinds) for name in ("moved", "parameters"))
    (weights,) = merge.weights.values()
    fitted = "fit" in read_yaml(planned.config, "merge config")["models"][0]["parameters"]
    return (
        f"moved: {percent(merge.selected, merge.channels)} of the channels, {percent(moved, parameters)} of the "
        f"parameters, weight {weights[0]:g}{', fitted' if fitted else ''}"
    )


def _claim(planned: TransferPlan) -> None:
    """See that a folder is of this transfer, or of none.

    Raises:
        FileExistsError: it has files of something else.
        ValueError: it is of another pair, or of another abilities file.
    """
    out, own = planned.out, _described(planned)
    if not (out / "transfer.json").exists():
        if any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise FileExistsError(f"{escape(out)} has files of something else; name another folder")
        return
    before = read_state(out / "transfer.json")["of"]
    is_same_file = before["file"] == own["file"] or before["abilities"] == own["abilities"]
    if not is_same_file or any(before[model] != own[model] for model in ("target", "ability_model")):
        raise ValueError(
            f"{escape(out)} is of a transfer from {before['ability_model']} into {before['target']} by "
            f"{before['file']}; name another folder"
        )


def _described(planned: TransferPlan) -> dict[str, Any]:
    """What a folder is of, for ``transfer.json``."""
    content = planned.file.model_dump(mode="json")
    models = {"target": planned.target, "ability_model": planned.ability_model}
    return models | {"file": str(planned.path.resolve()), "abilities": content["abilities"]}
