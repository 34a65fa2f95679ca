"""What a transfer came to: a table, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_act.wording import enumerate_some, table

__all__ = ["judge", "list_results"]

_FEW = 30  # samples


def list_results(evaluation: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A table of abilities: nats per answer token of each model, the last one's change with its interval.

    Args:
        evaluation: as ``evaluate --json`` writes it; its first model is the target.
        names: model -> what the table calls it, in the order of the columns.
    """
    by_ability = _by_ability(evaluation)
    with_answers = all(one["exact_match"] for own in by_ability.values() for one in own.values())
    lines = []
    for ability, own in by_ability.items():
        *_, last = (own[model] for model in names)
        low, high = last["nll"]["difference_interval"]
        change = f"{last['nll']['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        line = [
            f"{ability}, to {last['role']}",
            f"{last['samples']}",
            *(f"{own[model]['nll']['value']:.2f}" for model in names),
            change,
        ]
        if with_answers:
            line += [" / ".join(f"{100 * own[model]['exact_match']['value']:.0f} %" for model in names)]
        lines.append(line)
    header = ["nats per answer token (less is better)", "samples", *names.values(), "change (95 %)"]
    return table([*header, *([f"right: {' / '.join(names.values())}"] if with_answers else [])], lines)


def judge(evaluation: Mapping[str, Any], ability_model: str, result: str, keep_within: float) -> tuple[str, bool]:
    """One sentence: what came back, and what it cost; and whether it is worth it.

    Args:
        evaluation: as ``evaluate --json`` writes it; its first model is the target.
        ability_model: a model's name there.
        result: likewise.
        keep_within: share of the likelihood of a kept answer token that may be lost.
    """
    by_ability = _by_ability(evaluation)
    recovered = {name: own for name, own in by_ability.items() if own[result]["role"] == "recover"}
    better = [name for name, own in recovered.items() if own[result]["nll"]["difference_interval"][1] < 0]
    swapped = [name for name, own in recovered.items() if own[ability_model]["nll"]["difference_interval"][0] > 0]
    if not better:
        why = f" The ability model is worse than the target on {enumerate_some(swapped)}." if swapped else ""
        return f"It recovers nothing that is beyond chance: do not publish.{why}", False
    shares = []
    for name in better:
        own = recovered[name][ability_model]["nll"]
        won = -recovered[name][result]["nll"]["difference"]
        is_far = own["difference_interval"][1] < 0  # or a share of the distance would say nothing
        share = f"{100 * won / -own['difference']:.0f} % of the nats" if is_far else f"{won:.2f} nats"
        shares.append(f"{share} of {name}")
    parts = [f"It recovers {enumerate_some(shares)}"]
    worse = [name for name, own in recovered.items() if own[result]["nll"]["difference_interval"][0] > 0]
    rest = [name for name in recovered if name not in (*better, *worse)]
    parts += [f"nothing beyond chance of {enumerate_some(rest)}"] if rest else []
    parts += [f"{name} is worse by {recovered[name][result]['nll']['difference']:.2f} nats" for name in worse]
    too_bad = bool(worse)
    for name, own in by_ability.items():
        if own[result]["role"] == "keep":
            low, high = own[result]["nll"]["difference_interval"]
            change = own[result]["nll"]["difference"]
            is_sure, is_too_much = low > 0 or high < 0, low > 0 and 1 - math.exp(-change) > keep_within
            too_bad |= is_too_much
            how = f"is {'worse' if change > 0 else 'better'} by {abs(change):.2f} nats"
            how += ", which is more than allowed" if is_too_much else ""
            parts.append(f"{name} {how if is_sure else 'has not changed beyond chance'}")
    silent = [name for name in better if _gains(recovered[name][ability_model]) and not _gains(recovered[name][result])]
    told = f" No more whole answers of {enumerate_some(silent)} are right than before, beyond chance."
    answers = told if silent else ""
    few = [f"{own[result]['samples']} of {name}" for name, own in by_ability.items() if own[result]["samples"] < _FEW]
    caution = f" These are few samples: {enumerate_some(few)}." if few else ""
    return "; ".join(parts) + (": do not publish." if too_bad else ".") + answers + caution, not too_bad


def _gains(one: Mapping[str, Any]) -> bool:
    """Whether more answers are right than the target's; True where answers were not generated."""
    return one["exact_match"] is None or one["exact_match"]["difference_interval"][0] > 0


def _by_ability(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    results: Sequence[Mapping[str, Any]] = evaluation["results"]
    for one in results:
        found.setdefault(one["ability"], {})[one["model"]] = one
    return found
