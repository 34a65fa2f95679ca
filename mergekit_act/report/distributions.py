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

_SCORE = "score: mean |difference of activations|"
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
            x_label=_SCORE,
            y_label=_ABOVE,
            mark=(comparison.density, f"top {top}"),
        ),
    )
    n, k = comparison.taking_part, comparison.top_count(comparison.density)
    return Section(
        "Distribution of scores",
        f"ACT ranks the {n:,} channels by score, the mean absolute difference of the two models' activations on answer "
        f"tokens; the top {top} are {k:,}. A long tail says that few channels differ much.",
        [overall],
        [_quantiles(comparison, pair, suffix), _curves(comparison, pair, suffix)],
        folded=[_by_layer_and_kind(comparison, scored, suffix, _SCORE) for scored in pair.abilities],
    )


def _quantiles(comparison: Comparison, pair: Pair, suffix: str) -> Table:
    """Samples and scores of every ability."""
    k = comparison.top_count(comparison.density)
    levels = (0.5, 0.1, 0.01, 0.001)
    rows: list[Row] = []
    csv_rows: list[list[object]] = []
    for scored in pair.abilities:
        profile, ordered = scored.profile, scored.ordered
        whole = float(ordered.sum(dtype=np.float64))
        share = float(ordered[-k:].sum(dtype=np.float64)) / whole if whole else 0.0
        quantiles = [scored.score_at(level) for level in levels] + [float(ordered[-1])]
        shown = [f"{value:.3g}" for value in quantiles]
        counts = [f"{profile.samples:,}", f"{profile.answer_tokens:,}"]
        rows.append([scored.label, *counts, *shown, percent(share, 1)])
        csv_rows.append([scored.label, profile.samples, profile.answer_tokens, *quantiles, share])
    named = [f"top {shown_density(level)} from" for level in levels]
    return Table(
        f"distribution{suffix}",
        f"The score from which on a channel is in the top. Last column: what the top "
        f"{shown_density(comparison.density)} hold of the sum of scores.",
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
