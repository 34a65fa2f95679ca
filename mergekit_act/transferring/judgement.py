"""What a transfer came to: a table, and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_act.wording import enumerate_some, table

__all__ = ["judge", "list_results"]


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
        line = [f"{ability}, to {last['role']}", *(f"{own[model]['nll']['value']:.2f}" for model in names), change]
        if with_answers:
            line += [" / ".join(f"{100 * own[model]['exact_match']['value']:.0f} %" for model in names)]
        lines.append(line)
    header = ["nats per answer token (less is better)", *names.values(), "change (95 %)"]
    return table([*header, *([f"right: {' / '.join(names.values())}"] if with_answers else [])], lines)


def judge(evaluation: Mapping[str, Any], target: str, ability_model: str, result: str) -> str:
    """One sentence: what came back, and what it cost.

    Args:
        evaluation: as ``evaluate --json`` writes it; its first model is the target.
        target: the model's name there.
        ability_model: likewise.
        result: likewise.
    """
    by_ability = _by_ability(evaluation)
    recovered = {name: own for name, own in by_ability.items() if own[result]["role"] == "recover"}
    better = [name for name, own in recovered.items() if own[result]["nll"]["difference_interval"][1] < 0]
    if not better:
        return "It recovers nothing that is beyond chance: do not publish."
    shares = []
    for name in better:
        lost = recovered[name][target]["nll"]["value"] - recovered[name][ability_model]["nll"]["value"]
        won = -recovered[name][result]["nll"]["difference"]
        shares.append(f"{100 * won / lost:.0f} % of {name}" if lost > 0 else f"{won:.2f} nats of {name}")
    parts = [f"It recovers {enumerate_some(shares)}"]
    rest = [name for name in recovered if name not in better]
    parts += [f"nothing beyond chance of {enumerate_some(rest)}"] if rest else []
    for name, own in by_ability.items():
        if own[result]["role"] == "keep":
            low, high = own[result]["nll"]["difference_interval"]
            change = own[result]["nll"]["difference"]
            sure = low > 0 or high < 0
            how = f"{'worse' if change > 0 else 'better'} by {abs(change):.2f} nats" if sure else "unchanged"
            parts.append(f"{name} is {how}")
    return "; ".join(parts) + "."


def _by_ability(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    results: Sequence[Mapping[str, Any]] = evaluation["results"]
    for one in results:
        found.setdefault(one["ability"], {})[one["model"]] = one
    return found
