"""Held-out rows in two parts: those that choose density and weight, and those that measure what was chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_act.data.filling import column_values
from mergekit_act.data.rows import load_rows, select_rows
from mergekit_act.data.schema import AbilitiesFile, Ability
from mergekit_act.evaluation import HeldOut

__all__ = ["check_apart", "split_held_out"]

LOG = logging.getLogger(__name__)

_CHOOSE = 0.4  # of the held-out rows


def split_held_out(file: AbilitiesFile, written: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two abilities files that differ from one only in the rows that they hold out.

    Args:
        file: the abilities file.
        written: its content, as YAML has it.

    Returns:
        The file whose held-out rows choose, two fifths of all, and the one with the others.

    Raises:
        FileNotFoundError: a data set does not exist.
        ValueError: an ability has fewer than three held-out rows (with ``balance``, two of each value).
    """
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, ability in file.abilities.items():
        offset, count, kinds, matching = _held_out_rows(name, ability.held_out())
        first = max(1, round(_CHOOSE * count / kinds)) * kinds
        rest = (count - first) // kinds * kinds
        needed = max(3, 2 * kinds)
        if rest < kinds or count < needed:
            raise ValueError(
                f'ability "{name}" has {max(count, 0)} held-out rows of {matching}; some choose density and weight and '
                f'others measure, so {needed} or more are needed. "samples: {ability.samples}" says how many are '
                'profiled, "evaluate" which are held out'
            )
        own = written["abilities"][name]
        for part, begin, samples in ((parts[0], offset, first), (parts[1], offset + first, rest)):
            part[name] = own | {"evaluate": own.get("evaluate", {}) | {"offset": begin, "samples": samples}}
    choose, measure = (dict(written) | {"abilities": part} for part in parts)
    return choose, measure


def check_apart(choose: Sequence[HeldOut], measure: Sequence[HeldOut]) -> None:
    """Warn of samples that choose and measure, because rows stand twice in the data.

    Raises:
        ValueError: of an ability all that measure do.
    """
    for first, second in zip(choose, measure, strict=True):
        chosen = {sample.input_ids.numpy().tobytes() for sample in first.samples}
        both = sum(sample.input_ids.numpy().tobytes() in chosen for sample in second.samples)
        told = f'ability "{second.ability}": of {len(second.samples)} samples that measure, {both} also choose'
        if both == len(second.samples):
            raise ValueError(f"{told}: rows stand twice in the data")
        if both:
            LOG.warning("%s: rows stand twice in the data", told)


def _held_out_rows(name: str, held_out: Ability) -> tuple[int, int, int, int]:
    """Where they begin, how many there are, of how many values of ``balance`` equally many; and of how many rows."""
    rows = load_rows(name, held_out)
    every = held_out.model_copy(update={"balance": None})
    matching, _ = select_rows(name, every, rows, offset=0, samples=len(rows))
    kinds = 1
    if held_out.balance is not None:
        kinds = len(set(map(str, column_values(name, held_out, matching, held_out.balance))))
    offset = held_out.offset + -held_out.offset % kinds
    return offset, min(held_out.samples, len(matching) - offset), kinds, len(matching)
