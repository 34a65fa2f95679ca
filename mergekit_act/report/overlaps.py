"""Overlaps of masks: between abilities, with masks made without data, and of an ability between pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mergekit_act.report.comparison import Comparison, Pair, Scored
from mergekit_act.report.figures import draw_bars, draw_heat_map
from mergekit_act.report.parts import Picture, Section
from mergekit_act.report.tables import Cell, Row, Table
from mergekit_act.selection import common_counts
from mergekit_act.wording import percent, shown_density

__all__ = ["describe_consistency", "describe_controls", "describe_overlap"]


def describe_overlap(comparison: Comparison, pair: Pair, suffix: str) -> Section:
    """Overlap between the abilities of a pair (tables 1 and 5, figure 20).

    Args:
        comparison: all profiles.
        pair: the one described.
        suffix: of the files' names.
    """
    labels = [scored.label for scored in pair.abilities]
    selected = comparison.selections(pair.abilities)
    common = common_counts(selected)
    counts = np.maximum(np.diag(common), 1)
    unions = dict(_unions([scored.profile.ability for scored in pair.abilities], selected))
    top = shown_density(comparison.density)
    picture = Picture(
        f"overlap{suffix}",
        "Percent of a row's channels that are in a column's too, for all pairs of abilities and for the union of all "
        f"others; of a random mask: {percent(counts[0], comparison.taking_part)}.",
        lambda: draw_heat_map(
            labels,
            [*labels, "all others"],
            np.column_stack([common / counts[:, None], np.array(unions[_OTHERS][0]) / counts]),
            label=f"overlap of top {top} masks",
            top=1.0,
        ),
    )
    return Section(
        "Overlap between abilities",
        "Abilities that share few channels can be moved one without the other. Overlap of A with B is |A ∩ B| / |A|, "
        "A the row.",
        [picture],
        [_overlap_table(comparison, labels, common, unions, suffix)],
    )


def _overlap_table(
    comparison: Comparison,
    labels: Sequence[str],
    common: NDArray[np.int64],
    unions: Mapping[str, tuple[list[int], list[int]]],
    suffix: str,
) -> Table:
    """The layout of the paper's table 1."""
    counts, n = np.diag(common).tolist(), comparison.taking_part
    rows: list[Row] = []
    csv_rows: list[list[object]] = []
    for i, label in enumerate(labels):
        cells: Row = [label]
        numbers: list[object] = [label]
        for j, shared in enumerate(common[i].tolist()):
            cells.append(_share(shared, counts[i]) if j <= i else None)
            numbers += [shared / counts[i], shared]
        for shares, sizes in unions.values():
            cells += [_share(shares[i], counts[i]), f"{100 * sizes[i] / n:.1f} %"]
            numbers += [shares[i] / counts[i], shares[i], sizes[i] / n]
        rows.append(cells)
        csv_rows.append(numbers)
    random: Row = [_expected(count, n) for count in counts]
    rows.append(["random", *random, *([None] * 2 * len(unions))])
    csv_rows.append(["random", *(v for count in counts for v in (count / n, count * count / n))])
    csv_header = ["ability", *(part for label in labels for part in (label, f"{label} channels"))]
    csv_header += [part for name in unions for part in (name, f"{name} channels", f"{name} random")]
    endings = (
        " A name's beginning and ending are what stands before and after its last hyphen, such as domain and language."
    )
    return Table(
        f"overlap{suffix}",
        f"Share of a row's top {shown_density(comparison.density)} that are in a column's too, and how many channels "
        f"(table 1 of the paper). «Random» is what a random set of the column's size would share."
        + (endings if len(unions) > 1 else ""),
        ["ability", *labels, *(part for name in unions for part in (name, "random"))],
        rows,
        csv_header,
        csv_rows,
    )


def _share(part: int, whole: int) -> Cell:
    return Cell(f"{100 * part / whole:.1f} %", f"({part:,})")


def _expected(count: int, channels: int) -> Cell:
    """What a set of so many channels shares with a random one of its size."""
    return Cell(f"{100 * count / channels:.1f} %", f"({count * count / channels:,.0f})")


_OTHERS = "union of the others"


def _unions(abilities: Sequence[str], selected: NDArray[np.bool_]) -> Iterator[tuple[str, tuple[list[int], list[int]]]]:
    """For each ability what it shares with a union of others, and the union's size.

    Names such as ``math-en`` are of a grid; then also the union of those with another ending (another language) and
    with another beginning (another domain).
    """
    everyone = list(range(len(abilities)))
    split = [name.rpartition("-")[::2] for name in abilities]
    groups: dict[str, Callable[[int, int], bool]] = {_OTHERS: lambda i, j: i != j}
    if all(all(parts) for parts in split) and all(len({parts[at] for parts in split}) > 1 for at in (0, 1)):
        groups["union, other ending"] = lambda i, j: split[i][1] != split[j][1]
        groups["union, other beginning"] = lambda i, j: split[i][0] != split[j][0]
    for name, belongs in groups.items():
        shared, sizes = [], []
        for i in everyone:
            union = selected[[j for j in everyone if belongs(i, j)]].any(0)
            shared.append(int((union & selected[i]).sum()))
            sizes.append(int(union.sum()))
        yield name, (shared, sizes)


def describe_controls(comparison: Comparison, pair: Pair, suffix: str) -> Section:
    """Masks of activations against masks made without data (tables 2 and 6 to 10 of the paper).

    Args:
        comparison: all profiles.
        pair: the one described.
        suffix: of the files' names.
    """
    n, k = comparison.taking_part, comparison.top_count(comparison.density)
    common = common_counts(comparison.selections([*pair.controls, *pair.abilities]))
    rows: list[Row] = []
    csv_rows: list[list[object]] = []
    for place, scored in enumerate(pair.abilities, start=len(pair.controls)):
        shared, count = common[place, : len(pair.controls)].tolist(), int(common[place, place])
        rows.append([scored.label, *(_share(part, count) for part in shared)])
        csv_rows.append([scored.label, *(value for part in shared for value in (part / count, part))])
    controls = [control.label for control in pair.controls]
    rows.append(["random", *(_expected(k, n) for _ in controls)])
    csv_rows.append(["random", *(value for _ in controls for value in (k / n, k * k / n))])
    top = shown_density(comparison.density)
    table = Table(
        f"controls{suffix}",
        f"Share of an ability's top {top} that are in the top {top} by weight change, or of random scores, and how "
        "many channels (tables 2 and 6 to 10 of the paper). «Random» is what is expected of a random mask.",
        ["ability", *controls],
        rows,
        ["ability", *(part for label in controls for part in (label, f"{label} channels"))],
        csv_rows,
    )
    text = "Channels that act most differently need not be those whose weights changed most."
    title = "Activations against weights" if pair.weights else "Activations against random masks"
    return Section(title, text, [], [table])


def describe_consistency(comparison: Comparison) -> Iterator[Section]:
    """The same ability in several pairs (finding 4), or by several criteria."""
    found = {
        (_common_label(first, second), one.label, other.label): common_counts(comparison.selections([first, second]))
        for one, other in itertools.combinations(comparison.pairs, 2)
        for first, second in itertools.product(one.abilities, other.abilities)
        if first.profile.ability == second.profile.ability
    }
    if not found:
        return
    k, n = comparison.top_count(comparison.density), comparison.taking_part
    csv_rows: list[list[object]] = [
        [*names, float(common[0, 1] / common[0, 0]), int(common[0, 1])] for names, common in found.items()
    ]
    rows: list[Row] = [[*names, _share(int(common[0, 1]), int(common[0, 0]))] for names, common in found.items()]
    rows.append(["random", "", "", _expected(k, n)])
    top = shown_density(comparison.density)
    table = Table(
        "consistency",
        f"Share of an ability's top {top} in one pair that are in its top {top} in the other, and how many channels "
        "(figure 3 of the paper).",
        ["ability", "pair", "other pair", "overlap"],
        rows,
        ["ability", "pair", "other_pair", "overlap", "channels"],
        [*csv_rows, ["random", None, None, k / n, k * k / n]],
    )
    abilities = list(dict.fromkeys(ability for ability, _, _ in found))
    groups: dict[str, list[float]] = {}
    for (ability, one, other), common in found.items():
        shares = groups.setdefault(f"{one}, {other}", [float("nan")] * len(abilities))
        shares[abilities.index(ability)] = float(common[0, 1] / common[0, 0])
    picture = Picture(
        "consistency",
        f"Overlap of the same ability's top {top} between pairs; dashed: of random masks.",
        lambda: draw_bars(abilities, list(groups.items()), label=f"overlap of top {top} masks, %", mark=k / n),
    )
    text = "Where the channels of an ability are the same in two pairs, a mask of one may serve the other."
    several = len({pair.criterion for pair in comparison.pairs}) > 1
    title = f"Consistency across pairs{' and criteria' if several else ''}"
    yield Section(title, text, [picture], [table])


def _common_label(first: Scored, second: Scored) -> str:
    """The ability's name; where a pair has several profiles of it, both labels."""
    if first.label == second.label:
        return first.label
    return f"{first.label}, {second.label}"
