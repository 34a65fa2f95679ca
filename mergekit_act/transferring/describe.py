"""An abilities file from what a command line says: models, data sets and two columns."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_act.data.rows import load_rows
from mergekit_act.data.schema import Ability
from mergekit_act.runs.settings import changed_settings
from mergekit_act.yaml_files import read_yaml

__all__ = ["check_replaceable", "describe_abilities", "write_described"]

_PROFILED, _HELD_OUT = 1500, 500  # at most; of fewer rows half


def describe_abilities(
    target: str,
    ability_model: str,
    recover: Sequence[str],
    keep: Sequence[str],
    prompt: str,
    answer: str,
    template: str | None = None,
) -> dict[str, Any]:
    """What ``abilities.yml`` would say.

    Args:
        target: the model to improve.
        ability_model: the model that has the ability.
        recover: data sets, as ``DATA`` or ``DATA:split``: files, folders or names of the Hub.
        keep: likewise.
        prompt: the column with the prompt, or a format string of columns.
        answer: likewise.
        template: of prompts, ``chat`` or ``plain``; None leaves it out.

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
    whole = {"template": template} if template else {}
    return {"target": target, "ability_model": ability_model, **whole, "abilities": abilities}


def write_described(content: Mapping[str, Any]) -> str:
    """The file's text, whose first line knows the others."""
    return _signed(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def _signed(body: str) -> str:
    digest = hashlib.sha256(body.encode()).hexdigest()[:8]
    return f"# By mergekit-act transfer, from its options ({digest}); edited, it goes in place of them.\n{body}"


def check_replaceable(path: Path, content: Mapping[str, Any], *, begun: bool) -> None:
    """See that a file was written from options and not edited, and is of the same transfer if that has begun.

    Args:
        path: of the file that is there.
        content: that it is to have.
        begun: whether a transfer by it has begun; then only the numbers of rows may be others, of data that has grown.

    Raises:
        ValueError: it is another file, and how it differs.
    """
    before = read_yaml(path, "abilities file")
    changed = changed_settings(_without_counts(before), _without_counts(content))
    text = path.read_text(encoding="utf-8")
    is_edited = text != _signed(text.partition("\n")[2])
    if (changed and (begun or is_edited)) or (is_edited and before != content):
        told = changed or "it was edited"
        raise ValueError(
            f"{path} says something else than the options ({told}); give {path} in place of them, or name another OUT"
        )


def _without_counts(content: Any) -> Any:
    if not isinstance(content, Mapping):
        return content
    return {name: _without_counts(value) for name, value in content.items() if name != "samples"}


def _split_of(data: str) -> tuple[str, str]:
    """A data set and its split, which stands behind a colon."""
    dataset, colon, split = data.rpartition(":")
    return (dataset, split) if colon and not os.path.exists(data) else (data, "train")
