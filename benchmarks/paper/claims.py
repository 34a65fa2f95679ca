"""Which of the paper's five findings and of its main claims hold, by bars that are named.

The paper gives no bars; these are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from findings import Found
from formatting import percentages, spread, with_interval
from rules import PAPER
from scoring import Interval, Scores, difference
from tables import KEPT, Row, Table

__all__ = ["Claim", "claims"]

STOCK = ("task arithmetic", "TIES", "DARE", "DELLA")


@dataclass(frozen=True)
class Claim:
    """Of the paper's.

    Attributes:
        text: the claim.
        holds: here; None if that is not decided.
        why: the numbers it hangs on, and the bar.
    """

    text: str
    holds: bool | None
    why: str


def claims(tables: Mapping[str, Table], merged: Table | None, every: Found, without: Found) -> Iterator[Claim]:
    """The claims, in the paper's order.

    Args:
        tables: experiment -> its table 3.
        merged: table 4.
        every: findings, of all channels.
        without: likewise, without the head and the embedding.
    """
    yield _few_channels(every)
    yield _none_dominates(every)
    yield _different_masks(every, without)
    if len(every.pairs) > 1:
        yield _same_in_other_pairs(every, without)
    yield _not_the_weights(every)
    yield _recovers_more(tables)
    if any(_row(table, PAPER.name).tuned for table in tables.values()):
        yield _fine_tunes_better(tables)
        yield _fine_tunes_best(tables)
    if merged is not None:
        yield _merges_as_well(merged)


def _few_channels(found: Found) -> Claim:
    return Claim(
        "1. Large differences are in few channels",
        bool(found.held.min() > 0.1),
        f"the top 1 % hold {percentages(found.held)} of the sum of all scores (bar: over 10 % for all abilities)",
    )


def _none_dominates(found: Found) -> Claim:
    kind, layer = (
        max((one for some in of for one in some), key=lambda one: one[1]) for of in (found.kinds, found.layers)
    )
    return Claim(
        "2. No layer or module dominates",
        max(kind[1], layer[1]) < 0.5,
        f"at most one module kind has {100 * kind[1]:.0f} % of the top ({kind[0]}, {100 * kind[2]:.0f} % of all "
        f"channels), one layer {100 * layer[1]:.0f} % ({layer[0]}, {100 * layer[2]:.0f} %) (bar: less than half)",
    )


def _different_masks(every: Found, without: Found) -> Claim:
    apart = _apart(every)
    overlaps, inner = (np.stack([f.overlap[n, :, n][apart] for n in range(len(f.pairs))]) for f in (every, without))
    return Claim(
        "3. Masks of different abilities are different ones",
        bool(overlaps.mean() < 0.5),
        f"two abilities of a pair share {percentages(overlaps)}, {100 * overlaps.mean():.0f} % in the mean, without "
        f"the head and the embedding {percentages(inner)} (bar: less than half in the mean; the paper's table 1 has "
        "42 %)",
    )


def _same_in_other_pairs(every: Found, without: Found) -> Claim:
    (same, other), (inner, between) = (_across_pairs(found) for found in (every, without))
    return Claim(
        "4. An ability has the same channels in other pairs",
        bool(same - other > 0.1),
        f"one ability's masks by two pairs share {100 * same:.0f} %, masks of different abilities by two pairs "
        f"{100 * other:.0f} %, without the head and the embedding {100 * inner:.0f} % and {100 * between:.0f} % (bar: "
        "10 points more)",
    )


def _across_pairs(found: Found) -> tuple[float, float]:
    """What two pairs' masks share, in the mean: those of one ability, and those of different ones."""
    between = [found.overlap[n, :, m] for m in range(len(found.pairs)) for n in range(m)]
    same, other = (np.mean([one[chosen] for one in between]) for chosen in (~_apart(found), _apart(found)))
    return float(same), float(other)


def _not_the_weights(found: Found) -> Claim:
    return Claim(
        "5. These are not the channels whose weights changed most",
        bool(found.weights.max() < 0.1),
        f"the two share {percentages(found.weights, 1)}, chance is 1 % (bar: less than 10 % for all)",
    )


def _apart(found: Found) -> np.ndarray:
    return ~np.eye(len(found.abilities), dtype=bool)


def _better(text: str, rows: Iterable[tuple[str, Scores | None, Scores | None]]) -> Claim:
    """Whether the paper's rule is better than mergekit's methods.

    Args:
        text: the claim.
        rows: a method, its scores and those of the paper's rule, for every method and run; None where there are none.
    """
    found: dict[str, list[tuple[float, Interval]]] = {}
    for method, theirs, ours in rows:
        if theirs and ours:
            found.setdefault(method, []).append(difference(theirs, ours, "recover"))
    ahead = {method: sum(low > 0 for _, (low, _) in some) for method, some in found.items()}
    parts = (
        f"{method} {spread([gain for gain, _ in some])} ({ahead[method]} of {len(some)} beyond its interval)"
        for method, some in found.items()
    )
    why = "in nats it is better (less than 0: worse) than " + ", ".join(parts)
    why += " (bar: beyond its interval for every method and run)"
    return Claim(text, all(ahead[method] == len(some) for method, some in found.items()), why)


def _recovers_more(tables: Mapping[str, Table]) -> Claim:
    rows = ((m, _row(t, m).scores, _row(t, PAPER.name).scores) for m in STOCK for t in tables.values())
    return _better("ACT recovers more than merging methods that keep as much", rows)


def _fine_tunes_best(tables: Mapping[str, Table]) -> Claim:
    rows = ((m, _row(t, m).tuned, _row(t, PAPER.name).tuned) for m in STOCK for t in tables.values())
    return _better("Fine-tuned it is better than the other methods fine-tuned", rows)


def _fine_tunes_better(tables: Mapping[str, Table]) -> Claim:
    gains: dict[str, list[tuple[float, Interval]]] = {}
    for table in tables.values():
        for row in table.best:
            if row.tuned and table.target.tuned:
                gains.setdefault(row.name, []).append(difference(table.target.tuned, row.tuned, "recover"))
    own = gains.pop(PAPER.name)
    others = ", ".join(f"{name} {np.mean([gain for gain, _ in theirs]):.2f}" for name, theirs in gains.items())
    why = f"by {spread([gain for gain, _ in own])} nats; the others in the mean by {others}"
    why += " (bar: beyond its interval for every run)"
    return Claim("Fine-tuned it is better than the target fine-tuned", all(low > 0 for _, (low, _) in own), why)


def _merges_as_well(merged: Table) -> Claim:
    ours = _row(merged, PAPER.name)
    base = difference(merged.target.scores, ours.scores, "recover")
    others = [*merged.abilities, *(_row(merged, method) for method in STOCK)]
    compared = {row.name: difference(row.scores, ours.scores, "recover") for row in others}
    held = None
    if base[1][0] > 0 and all(low > -KEPT for _, (low, _) in compared.values()):
        held = True
    elif base[1][1] < 0 or any(high < -KEPT for _, (_, high) in compared.values()):
        held = False
    why = f"in nats it is better (less than 0: worse) than the base by {with_interval(*base)}" + "".join(
        f", than {name} by {with_interval(*one)}" for name, one in compared.items()
    )
    why += f" (bar: the base's interval lies above 0, and none of the others' reaches -{KEPT})"
    return Claim("It merges specialists as well as the others", held, why)


def _row(table: Table, name: str) -> Row:
    return next(row for row in table.best if row.name == name)
