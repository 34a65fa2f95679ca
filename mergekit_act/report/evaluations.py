"""What evaluations and sweeps found, for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_act.wording import table

if TYPE_CHECKING:
    from mergekit_act.evaluation import Evaluated, Measure
    from mergekit_act.evaluation.statistics import Interval
    from mergekit_act.sweeping.run import SweepResult

__all__ = ["list_evaluation", "list_sweep"]


def list_evaluation(results: Sequence[Evaluated]) -> str:
    """Every model on every ability, with 95 % intervals, and the difference to the first model."""
    models = list(dict.fromkeys(result.model for result in results))
    abilities = list(dict.fromkeys((result.role, result.ability) for result in results))
    by_key = {(result.model, result.ability): result for result in results}
    several = len(models) > 1
    generated = any(result.exact_match for result in results)
    header = ["ability", "model", "samples", "nll", "95 %", *(["to first", "95 %"] if several else [])]
    header += ["exact", "95 %", *(["to first", "95 %"] if several else [])] if generated else []
    rows = []
    for _, ability in abilities:
        for model in models:
            result = by_key[model, ability]
            row = [ability if model == models[0] else "", model, f"{result.samples:,}", *_cells(result.nll, several)]
            rows.append(row + (_cells(result.exact_match, several) if result.exact_match else []))
    for role in dict.fromkeys(role for role, _ in abilities):
        of_role = [ability for its_role, ability in abilities if its_role == role]
        label = f"mean of {len(of_role)} to {role}"
        for model in models if len(of_role) > 1 else ():
            found = [by_key[model, ability] for ability in of_role]
            measures = [[r.nll.value for r in found], [r.exact_match.value for r in found if r.exact_match]]
            blank = [""] * (3 if several else 1)
            means = (cell for values in measures if values for cell in (f"{statistics.fmean(values):.3f}", *blank))
            rows.append([label if model == models[0] else "", model, "", *means])
    return table(header, rows)


def _cells(found: Measure, several: bool) -> list[str]:
    cells = [f"{found.value:.3f}", _interval(found.interval)]
    if several:
        shown = "" if found.difference is None else f"{found.difference:+.3f}"
        cells += [shown, _interval(found.difference_interval, signed=True)]
    return cells


def _interval(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return ""
    low, high = (f"{end:+.3f}" if signed else f"{end:.3f}" for end in interval)
    return f"{low} to {high}"


def list_sweep(result: SweepResult) -> str:
    """The target, the points on the frontier, and which of them is the best."""
    generated = bool(result.exact_match)
    several = any(score.point and len(set(score.point.weights)) > 1 for score in result.scores)
    named = any(score.point and (score.point.criterion or score.point.fit) for score in result.scores)
    header = ["density", "weights" if several else "weight", "channels", "parameters", "recover", "keep"]
    header += ["exact, recover", "exact, keep"] if generated else []
    rows = []
    for score in [result.target, *result.frontier]:
        point = score.point
        weights = () if point is None else point.weights if several else point.weights[:1]
        rule = "" if point is None else " ".join(filter(None, (point.criterion, point.fit and "fitted")))
        row = ["target" if point is None else f"{point.density:g}", " ".join(f"{weight:g}" for weight in weights)]
        row += [f"{score.channels / result.channels:.2%}", f"{score.parameters / result.parameters:.2%}"]
        row += [f"{score.recover:.3f}", "" if score.keep is None else f"{score.keep:.3f}"]
        if generated:
            recover, keep = result.roles.of(result.exact_match[point])
            row += [f"{recover:.3f}", "" if keep is None else f"{keep:.3f}"]
        rows.append([*([rule] if named else []), *row, "<- best.yml" if score is result.best else ""])
    return table([*(["by"] if named else []), *header, ""], rows)
