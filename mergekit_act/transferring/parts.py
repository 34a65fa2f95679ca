"""Held-out rows in two parts: those that choose density and weight, and those that measure what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_act.data.filling import column_values
from mergekit_act.data.rows import load_rows, select_rows
from mergekit_act.data.schema import AbilitiesFile, Ability

__all__ = ["split_held_out"]

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
        ValueError: an ability has fewer than two held-out rows (with ``balance``, of each value).
    """
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, ability in file.abilities.items():
        offset, count, kinds = _held_out_rows(name, ability.held_out())
        first = max(1, round(_CHOOSE * count / kinds)) * kinds
        rest = (count - first) // kinds * kinds
        if rest < kinds or count < 2 * kinds:
            raise ValueError(
                f'ability "{name}" has {max(count, 0)} held-out rows; some choose density and weight and others '
                f'measure, so {2 * kinds} or more are needed ("samples" and "evaluate" say which rows are what)'
            )
        own = written["abilities"][name]
        for part, begin, samples in ((parts[0], offset, first), (parts[1], offset + first, rest)):
            part[name] = own | {"evaluate": own.get("evaluate", {}) | {"offset": begin, "samples": samples}}
    choose, measure = (dict(written) | {"abilities": part} for part in parts)
    return choose, measure


def _held_out_rows(name: str, held_out: Ability) -> tuple[int, int, int]:
    """Where they begin, how many there are, and of how many values of ``balance`` there have to be equally many."""
    rows = load_rows(name, held_out)
    every = held_out.model_copy(update={"balance": None})
    matching, _ = select_rows(name, every, rows, offset=0, samples=len(rows))
    kinds = 1
    if held_out.balance is not None:
        kinds = len(set(map(str, column_values(name, held_out, matching, held_out.balance))))
    offset = held_out.offset + -held_out.offset % kinds
    return offset, min(held_out.samples, len(matching) - offset), kinds
