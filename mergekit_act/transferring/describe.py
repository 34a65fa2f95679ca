"""An abilities file from what a command line says: models, data sets and two columns."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_act.data.rows import load_rows
from mergekit_act.data.schema import Ability

__all__ = ["describe_abilities"]

_PROFILED, _HELD_OUT = 1500, 500  # at most; of fewer rows half


def describe_abilities(
    target: str, ability_model: str, recover: Sequence[str], keep: Sequence[str], prompt: str, answer: str
) -> dict[str, Any]:
    """What ``abilities.yml`` would say.

    Args:
        target: the model to improve.
        ability_model: the model that has the ability.
        recover: data sets, as ``DATA`` or ``DATA:split``: files, folders or names of the Hub.
        keep: likewise.
        prompt: the column with the prompt, or a format string of columns.
        answer: likewise.

    Raises:
        FileNotFoundError: a data set does not exist.
        ValueError: two data sets have one name, or one has no such column or fewer than five rows.
    """
    abilities: dict[str, Any] = {}
    for role, named in (("recover", recover), ("keep", keep)):
        for data in named:
            dataset, split = _split_of(data)
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(dataset).name.partition(".")[0]).strip("-.") or "ability"
            if name in abilities:
                raise ValueError(f'two data sets are called "{name}"; write an abilities file, with a name for each')
            own: dict[str, Any] = {"role": role, "dataset": dataset, "split": split, "prompt": prompt, "answer": answer}
            rows = len(load_rows(name, Ability.model_validate(own)))
            if rows < 5:
                raise ValueError(f"{data} has {rows} rows; expected 5 or more")
            samples = min(_PROFILED, rows // 2)
            abilities[name] = own | {"samples": samples, "evaluate": {"samples": min(_HELD_OUT, rows - samples)}}
    return {"target": target, "ability_model": ability_model, "abilities": abilities}


def _split_of(data: str) -> tuple[str, str]:
    """A data set and its split, which stands behind a colon."""
    dataset, colon, split = data.rpartition(":")
    return (dataset, split) if colon and not os.path.exists(data) else (data, "train")
