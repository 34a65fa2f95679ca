"""Distributions of scores: overall, by layer, by module kind; what each density moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mergekit_act.report.comparison import DENSITIES, Comparison, Pair, Scored
from mergekit_act.report.figures import Line, draw_lines
from mergekit_act.report.parts import UNION, Picture, Section
from mergekit_act.report.tables import Cell, Row, Table
from mergekit_act.wording import percent, shown_density

__all__ = ["describe_distribution", "describe_moved", "describe_weights"]

_SCORES = {
    "activation": "score: mean |difference of activations|",
    "local": "score: mean |change of the channel's own output|",
    "attribution": "attribution: nats per answer token",
}
_MEANINGS = {
    "activation": "the mean absolute difference of the two models' activations on answer tokens",
    "local": "the mean absolute change of the target's own output on answer tokens when the channel's weights move",
    "attribution": "what the loss of the answers falls by, to first order, when the channel's weights move",
}
_CHANGE = "weight change of a channel, l2 norm"
_ABOVE = "fraction of channels above"


def describe_distribution(comparison: Comparison, pair: Pair, suffix: str) -> Section:
    """How scores are distributed, by ability, layer and module kind (figure 1 of the paper).

    Args:
        comparison: all profiles.
        pair: the one described.
        suffix: of the files' names.
    """
    top = shown_density(comparison.density)
    overall = Picture(
        f"distribution{suffix}",
        "The fraction of channels whose score exceeds a threshold, by ability (figure 1a of the paper).",
        lambda: draw_lines(
            [_curve(comparison, scored, comparison.modules, scored.label) for scored in pair.abilities],
            x_label=_SCORES[pair.criterion],
            y_label=_ABOVE,
            mark=(comparison.density, f"top {top}"),
        ),
    )
    n, k = comparison.taking_part, comparison.top_count(comparison.density)
    return Section(
        "Distribution of scores",
        f"ACT ranks the {n:,} channels by score, {_MEANINGS[pair.criterion]}; the top {top} are {k:,}. A long tail "
        "says that few channels matter much.",
        [overall],
        [
            _quantiles(comparison, pair, suffix),
            *([_signs(pair, suffix)] if pair.criterion == "attribution" else []),
            _curves(comparison, pair, suffix),
        ],
        folded=[_by_layer_and_kind(comparison, scored, suffix, _SCORES[pair.criterion]) for scored in pair.abilities],
    )


def _signs(pair: Pair, suffix: str) -> Table:
    """How many channels help an ability, how many harm it, and how its damage is distributed."""
    rows: list[Row] = []
    csv_rows: list[list[object]] = []
    levels = (0.5, 0.1, 0.01)
    for scored in pair.abilities:
        helping, harming = scored.ordered[scored.ordered > 0], scored.ordered[scored.ordered < 0]
        sums = [float(some.sum(dtype=np.float64)) for some in (helping, harming)]
        damage = [float(scored.damage[-max(1, int(level * len(scored.damage)))]) for level in levels]
        numbers = [*sums, *damage, float(scored.damage.sum(dtype=np.float64))]
        shares = [len(some) / len(scored.ordered) for some in (helping, harming)]
        rows.append([scored.label, *(percent(share, 1) for share in shares), *(f"{value:.3g}" for value in numbers)])
        csv_rows.append([scored.label, *shares, *numbers])
    named = [f"damage: top {shown_density(level)} from" for level in levels]
    return Table(
        f"attribution{suffix}",
        "Channels that help an ability when they move and those that harm it, what they add up to in nats per answer "
        "token, to first order; and the damage that moving a channel does where the target is good, to second order.",
        ["ability", "helping", "harming", "sum of helping", "sum of harming", *named, "sum of damage"],
        rows,
        [
            "ability",
            *("share_helping", "share_harming", "sum_helping", "sum_harming"),
            *(f"damage_top_{level:g}" for level in levels),
            "sum_damage",
        ],
        csv_rows,
    )


def _quantiles(comparison: Comparison, pair: Pair, suffix: str) -> Table:
    """Samples and scores of every ability."""
    k = comparison.top_count(comparison.density)
    levels = (0.5, 0.1, 0.01, 0.001)
    rows: list[Row] = []
    csv_rows: list[list[object]] = []
    for scored in pair.abilities:
        profile, ordered = scored.profile, scored.ordered
        whole = float(ordered[ordered > 0].sum(dtype=np.float64))
        share = float(ordered[-k:].clip(min=0).sum(dtype=np.float64)) / whole if whole else 0.0
        quantiles = [scored.score_at(level) for level in levels] + [float(ordered[-1])]
        shown = [f"{value:.3g}" for value in quantiles]
        counts = [f"{profile.samples:,}", f"{profile.answer_tokens:,}"]
        rows.append([scored.label, *counts, *shown, percent(share, 1)])
        csv_rows.append([scored.label, profile.samples, profile.answer_tokens, *quantiles, share])
    named = [f"top {shown_density(level)} from" for level in levels]
    return Table(
        f"distribution{suffix}",
        f"The score from which on a channel is in the top. Last column: what the top "
        f"{shown_density(comparison.density)} hold of the sum of positive scores.",
        ["ability", "samples", "answer tokens", *named, "largest", "share of the sum"],
        rows,
        ["ability", "samples", "answer_tokens", *(f"top_{level:g}" for level in levels), "largest", "share_of_sum"],
        csv_rows,
    )


def _curves(comparison: Comparison, pair: Pair, suffix: str) -> Table:
    """The points of all curves; only as csv."""
    groups: dict[str, Mapping[str, Sequence[str]]] = {"all": {"": comparison.modules}}
    groups |= {"layer": comparison.groups.layers, "kind": comparison.groups.kinds}
    rows = [
        [scored.label, by, name, float(x), float(y)]
        for scored in (*pair.abilities, *pair.weights)
        for by, named in groups.items()
        for name, modules in named.items()
        for x, y in zip(scored.thresholds, comparison.above(scored, modules), strict=True)
    ]
    header = ["ability", "by", "of", "threshold", "fraction_above"]
    return Table(f"distribution-curves{suffix}", "", [], [], header, rows)


def describe_weights(comparison: Comparison, pair: Pair, suffix: str) -> Section:
    """How much the weights changed (figure 22 of the paper).

    Args:
        comparison: all profiles.
        pair: the one described.
        suffix: of the files' names.
    """
    pictures = []
    for scored in pair.weights:
        overall = Picture(
            f"distribution{suffix}-{scored.stem}",
            f"{scored.label}: the fraction of channels whose weights changed by more than a threshold (figure 22 of "
            "the paper).",
            partial(
                draw_lines,
                [_curve(comparison, scored, comparison.modules, "all channels")],
                x_label=_CHANGE,
                y_label=_ABOVE,
                mark=(comparison.density, f"top {shown_density(comparison.density)}"),
            ),
        )
        pictures += [overall, *_by_layer_and_kind(comparison, scored, suffix, _CHANGE).pictures]
    text = "The l2 norm of the change of what a channel owns, between the target and the ability model."
    return Section("Distribution of weight changes", text, pictures)


def _by_layer_and_kind(comparison: Comparison, scored: Scored, suffix: str, x_label: str) -> Section:
    """The two distributions of one ability that the paper has beside the overall one."""
    mark = (comparison.density, f"top {shown_density(comparison.density)}")
    named = comparison.groups.layers
    layers = [name for name in named if name.isdigit()]

    def by_layer() -> Any:
        lines = [
            _curve(comparison, scored, named[name], "", depth=place / max(1, len(layers) - 1))
            for place, name in enumerate(layers)
        ]
        lines += [_curve(comparison, scored, named[name], name) for name in comparison.groups.outside]
        ends = (layers[0], layers[-1]) if layers else None
        return draw_lines(lines, x_label=x_label, y_label=_ABOVE, mark=mark, depths=ends)

    def by_kind() -> Any:
        lines = [_curve(comparison, scored, modules, kind) for kind, modules in comparison.groups.kinds.items()]
        return draw_lines(lines, x_label=x_label, y_label=_ABOVE, mark=mark)

    stem = f"distribution{suffix}-{scored.stem}"
    return Section(
        f"{scored.label}, by layer and by module kind",
        "",
        [
            Picture(
                f"{stem}-layers", f"{scored.label}: a line per decoder layer, and what is outside of them.", by_layer
            ),
            Picture(f"{stem}-kinds", f"{scored.label}: a line per kind of module.", by_kind),
        ],
    )


def _curve(
    comparison: Comparison, scored: Scored, modules: Sequence[str], label: str, depth: float | None = None
) -> Line:
    y = comparison.above(scored, modules)
    reached = y > 0
    return Line(label, scored.thresholds[reached].tolist(), y[reached].tolist(), depth=depth)


def describe_moved(comparison: Comparison, pair: Pair, suffix: str) -> Section:
    """Channels and parameters that densities from 0.1 to 90 % would move.

    Args:
        comparison: all profiles.
        pair: the one described.
        suffix: of the files' names.
    """
    several = len(pair.abilities) > 1
    ranks = {scored.label: scored.ranks for scored in pair.abilities}
    found = {label: comparison.moved(own) for label, own in ranks.items()}
    if several:
        found[UNION] = comparison.moved(np.minimum.reduce(list(ranks.values())))
    n, everything = comparison.taking_part, comparison.layout.parameter_count()
    rows: list[Row] = []
    for place, density in enumerate(DENSITIES):
        cells: Row = [shown_density(density), f"{comparison.top_count(density):,}"]
        for label, moved in found.items():
            channels, parameters = moved[place]
            more = f"{percent(channels, n)} of the channels" if label == UNION else ""
            cells.append(Cell(percent(parameters, everything), more))
        rows.append(cells)
    csv_rows = [
        [label, density, channels, channels / n, parameters, parameters / everything]
        for label, moved in found.items()
        for density, (channels, parameters) in zip(DENSITIES, moved, strict=True)
    ]
    table = Table(
        f"densities{suffix}",
        f"What each density would move: channels of each ability, and the share of the model's {everything:,} "
        "parameters that they own. Percentages of channels are of those that take part.",
        ["density", "channels", *found],
        rows,
        ["ability", "density", "channels", "of_channels", "parameters", "of_parameters"],
        csv_rows,
    )
    picture = Picture(
        f"densities{suffix}",
        "The share of the model's parameters that each density would move.",
        lambda: draw_lines(
            [
                Line(
                    label,
                    [100 * density for density in DENSITIES],
                    [100 * parameters / everything for _, parameters in moved],
                    strong=label == UNION,
                )
                for label, moved in found.items()
            ],
            x_label="density of each ability, %",
            y_label="parameters moved, %",
        ),
    )
    return Section("What each density would move", "", [picture], [table])
