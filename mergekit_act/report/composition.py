"""Where the channels of masks sit, by module kind and layer."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mergekit_act.groups import Groups, total
from mergekit_act.report.canvas import can_draw, files_of
from mergekit_act.report.comparison import Comparison, Pair
from mergekit_act.report.figures import draw_heat_map
from mergekit_act.report.listings import head_warning
from mergekit_act.report.parts import UNION, Picture, Section
from mergekit_act.report.tables import Row, Table
from mergekit_act.wording import percent, shown_density

if TYPE_CHECKING:
    from mergekit_act.checking.summary import CheckSummary

__all__ = ["describe_composition", "draw_moved"]


def describe_composition(comparison: Comparison, pair: Pair, suffix: str) -> Section:
    """Masks by module kind and by layer: each ability's and their union's.

    Args:
        comparison: all profiles.
        pair: the one described.
        suffix: of the files' names.
    """
    labels = [scored.label for scored in pair.abilities]
    selected = comparison.selections(pair.abilities)
    several = len(labels) > 1
    whole: NDArray[np.bool_] = np.asarray(selected.any(0))
    all_rows = [*selected, whole] if several else [whole]
    names = [*labels, UNION] if several else labels
    counts = [comparison.per_module(row) for row in all_rows]
    by_kind = np.array([[total(count, modules) for modules in comparison.groups.kinds.values()] for count in counts])
    by_layer = np.array([[total(count, modules) for modules in comparison.groups.layers.values()] for count in counts])
    totals = by_kind.sum(1, keepdims=True)
    top = shown_density(comparison.density)
    pictures = [
        Picture(
            f"composition{suffix}-kinds",
            "Where each mask's channels sit: percent of the mask, by module kind.",
            lambda: draw_heat_map(
                names, list(comparison.groups.kinds), by_kind / totals, label=f"share of the top {top} by module kind"
            ),
        ),
        Picture(
            f"composition{suffix}-layers",
            "Where each mask's channels sit: percent of the mask, by decoder layer, and what is outside of them.",
            lambda: draw_heat_map(
                names,
                list(comparison.groups.layers),
                by_layer / totals,
                label=f"share of the top {top} by layer",
                numbers=len(comparison.groups.layers) < 16,
                x_label="layer",
            ),
        ),
        Picture(
            f"composition{suffix}",
            f"{names[-1]}: how much of each module is selected, in percent of its channels.",
            lambda: _draw_grid(
                comparison.groups,
                counts[-1],
                dict(zip(comparison.layout.modules, comparison.sizes.tolist(), strict=True)),
                f"{names[-1]}: selected share of a module's channels",
            ),
        ),
    ]
    warnings = [head_warning(comparison.layout, name, count) for name, count in zip(names, counts, strict=True)]
    text = (
        "A mask that sits in one kind of module says more about that module than about the ability. A kind can be left "
        "out with --exclude, here and in mergekit-act mask."
    )
    return Section(
        "Composition",
        text,
        pictures,
        [_composition_table(comparison, counts[-1], names[-1], suffix), _long(comparison, names, counts, suffix)],
        warnings=[warning for warning in warnings if warning],
    )


def _draw_grid(groups: Groups, counts: Mapping[str, int], sizes: Mapping[str, int], label: str) -> Any:
    """A heat map of module kind by layer: the share of each module's channels that is selected.

    Args:
        groups: of the modules.
        counts: module -> how many of its channels are selected.
        sizes: module -> how many it has.
        label: of the picture.
    """
    layers = [layer for layer in groups.layers if layer.isdigit()]
    inside = {module for layer in layers for module in groups.layers[layer]}
    kinds = [kind for kind, modules in groups.kinds.items() if set(modules) <= inside]
    columns = [*layers, "none"] if groups.outside else layers
    values = np.full((len(kinds) + len(groups.outside), len(columns)), np.nan)
    for (i, kind), (j, layer) in itertools.product(enumerate(kinds), enumerate(layers)):
        modules = set(groups.kinds[kind]) & set(groups.layers[layer])
        if modules:
            values[i, j] = total(counts, modules) / total(sizes, modules)
    for i, name in enumerate(groups.outside, start=len(kinds)):
        values[i, -1] = total(counts, groups.layers[name]) / total(sizes, groups.layers[name])
    rows = [*kinds, *groups.outside]
    return draw_heat_map(rows, columns, values, label=label, numbers=len(columns) < 16, x_label="layer")


def _composition_table(comparison: Comparison, counts: Mapping[str, int], name: str, suffix: str) -> Table:
    layout = comparison.layout
    selected, parameters = sum(counts.values()), layout.parameters_owned(counts)
    everything = layout.parameter_count()
    rows: list[Row] = []
    csv_rows: list[list[object]] = []
    for kind, modules in comparison.groups.kinds.items():
        own = {module: counts[module] for module in modules}
        channels, of_kind = sum(own.values()), layout.channel_count(modules)
        owned = layout.parameters_owned(own)
        shares = (percent(channels, selected), percent(channels, of_kind))
        if channels:
            rows.append([kind, f"{channels:,}", *shares, f"{owned:,}", percent(owned, everything)])
        csv_rows.append([kind, channels, channels / selected, channels / of_kind, owned, owned / everything])
    rows.append(
        [
            "total",
            f"{selected:,}",
            "100.00 %",
            percent(selected, comparison.taking_part),
            f"{parameters:,}",
            percent(parameters, everything),
        ]
    )
    csv_rows.append(["total", selected, 1.0, selected / comparison.taking_part, parameters, parameters / everything])
    tied = " Cells of the tied matrix count once in the total." if layout.tied else ""
    left_out = [row[0] for row in csv_rows if not row[1]]
    rest = f" Nothing of {', '.join(map(str, left_out))}." if left_out else ""
    return Table(
        f"composition{suffix}",
        f"{name}: channels and the parameters they own, by module kind. Parameters in percent of the model's."
        f"{tied}{rest}",
        ["module kind", "channels", "of the mask", "of the kind", "parameters", "of the model"],
        rows,
        ["kind", "channels", "of_mask", "of_kind", "parameters", "of_model"],
        csv_rows,
    )


def _long(comparison: Comparison, names: Sequence[str], counts: Sequence[Mapping[str, int]], suffix: str) -> Table:
    """Every mask's channels module by module; only as csv."""
    sizes = dict(zip(comparison.layout.modules, comparison.sizes.tolist(), strict=True))
    rows = [
        [name, module, count[module], sizes[module]]
        for name, count in zip(names, counts, strict=True)
        for module in comparison.modules
    ]
    header = ["mask", "module", "selected", "channels"]
    return Table(f"composition-modules{suffix}", "", [], [], header, rows)


def draw_moved(summary: CheckSummary) -> dict[str, bytes]:
    """Which share of every module of a merge was moved: file name -> content; empty if it can't be drawn."""
    if not can_draw():
        return {}
    sizes, counts = Counter[str](), Counter[str]()
    for module in summary.modules:
        sizes[module.module] += module.channels
        counts[module.module] += module.selected
    figure = _draw_grid(Groups(list(sizes)), counts, sizes, "moved share of a module's channels")
    return files_of(figure, "composition")
