"""Lines, heat maps and bars, drawn with matplotlib (extra ``plots``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_act.report.canvas import COLOURS, INK, MUTED, RIGHT, SMALL, WIDTH, new_canvas

__all__ = ["Line", "draw_bars", "draw_heat_map", "draw_lines"]

_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
# Depth: from blue to orange by way of mauve, as light in the middle as at the ends.
_DEPTH = ("#2f6fdd", "#a06aa8", "#e07b1a")
_HEAT = "cividis"


@dataclass(frozen=True)
class Line:
    """A line of a picture.

    Attributes:
        label: in the legend; empty for a line that a colour bar explains.
        x: its points.
        y: likewise.
        depth: 0 to 1, for lines that are coloured by their order; None for a colour of its own.
        strong: whether it is drawn in ink, above the others.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    depth: float | None = None
    strong: bool = False


def draw_lines(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    mark: tuple[float, str] | None = None,
    depths: tuple[str, str] | None = None,
) -> Any:
    """Lines over logarithmic axes, with a legend below.

    Args:
        lines: what to draw.
        x_label: of the axis.
        y_label: of the axis.
        mark: a height to mark, and what it is.
        depths: what the colours of lines with a depth begin and end with.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    shown = [line for line in lines if line.label]
    columns = max(1, min(len(shown), int(4.4 / (0.42 + 0.068 * max((len(line.label) for line in shown), default=0)))))
    legend = 0.08 + 0.165 * -(-len(shown) // columns) if len(shown) > 1 else 0.0
    figure, axes = new_canvas(2.75, below=0.52 + legend, right=0.62 if depths else RIGHT)
    gradient = LinearSegmentedColormap.from_list("depth", _DEPTH)
    deep = [(np.column_stack([line.x, line.y]), gradient(line.depth)) for line in lines if line.depth is not None]
    points, colours = [curve for curve, _ in deep], [colour for _, colour in deep]
    axes.add_collection(LineCollection(points, colors=colours, linewidths=0.9, zorder=3))
    for place, line in enumerate(line for line in lines if line.depth is None):
        style = _style(place, strong=line.strong, inked=bool(depths))
        (drawn,) = axes.plot(line.x, line.y, label=_plain(line.label) or "_", **style)
        drawn.set_gid(f"line:{line.label}")
    axes.autoscale_view()
    drawable = any(len(line.x) for line in lines)  # no score exceeds a threshold where all are 0
    if drawable:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    if mark is not None:
        axes.axhline(mark[0], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=2)
        where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(mark[1], (0.99, mark[0]), **where, color=MUTED, fontsize=SMALL)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if legend:
        _legend_below(figure, axes, columns)
    if depths:
        _depth_bar(figure, gradient, depths)
    return figure


def _legend_below(figure: Any, axes: Any, columns: int) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="lower left",
        bbox_to_anchor=(0.02, 0.0),
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
        handlelength=1.9,
        columnspacing=1.0,
        labelcolor=INK,
        labelspacing=0.25,
        borderaxespad=0.1,
    )


def _style(place: int, *, strong: bool, inked: bool) -> dict[str, Any]:
    """Of a line by its place; beside a gradient it is inked, for a colour would be taken for a depth."""
    if strong:
        return {"color": INK, "linewidth": 1.9, "zorder": 5}
    if inked:
        return {"color": INK, "linewidth": 1.4, "linestyle": _DASHES[(place + 1) % len(_DASHES)], "zorder": 5}
    dashes = _DASHES[place // len(COLOURS) % len(_DASHES)]
    return {"color": COLOURS[place % len(COLOURS)], "linewidth": 1.1, "linestyle": dashes, "zorder": 4}


def _plain(text: str) -> str:
    """A label as it is: matplotlib hides those that begin with "_", and takes "$" for a formula."""
    text = text.replace("$", "\\$")
    return f"\N{HAIR SPACE}{text}" if text.startswith("_") else text


def _plain_ticks(axis: Any) -> None:
    """Plain text at the powers of ten: matplotlib would typeset each as a formula, which takes long."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_tick)


def _tick(value: float, _place: int) -> str:
    """0.01 to 1,000 as they are, others as a power of ten.

    >>> _tick(0.01, 0), _tick(1e-5, 0)
    ('0.01', '10⁻⁵')
    """
    if 0.009 < value < 10_001:
        return f"{value:,g}"
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _depth_bar(figure: Any, gradient: Any, ends: tuple[str, str]) -> None:
    width, _ = figure.get_size_inches()
    bar = figure.add_axes(((width - 0.42) / width, 0.35, 0.1 / width, 0.5))
    bar.pcolormesh(np.array([0, 1]), np.linspace(0, 1, 29), np.linspace(0, 1, 28)[:, None], cmap=gradient)
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.set_yticks([0, 1], ends)
    bar.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    bar.set_title("layer", fontsize=SMALL, color=INK)
    for side in bar.spines.values():
        side.set_visible(False)


def draw_heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Any,
    *,
    label: str,
    top: float | None = None,
    numbers: bool = True,
    x_label: str = "",
) -> Any:
    """A heat map of percentages.

    Args:
        rows: their names, from the top.
        columns: their names.
        values: ``[rows, columns]``, fractions; NaN where there is none.
        label: of the colour bar.
        top: the fraction of the last colour; by default the largest value.
        numbers: whether each cell says its percentage.
        x_label: of the columns.
    """
    values = 100 * np.asarray(values, dtype=float)
    top = 100 * top if top is not None else max(float(np.nanmax(values)), 1e-9)
    left = 0.15 + 0.074 * max(map(len, rows))
    cell = 0.36 if numbers else 0.2
    width = max(WIDTH, left + cell * len(columns) + 0.75)
    upright = max(map(len, columns)) > (3 if numbers else 2)
    below = (0.15 + (0.068 * max(map(len, columns)) if upright else 0.15)) + (0.2 if x_label else 0)
    figure, axes = new_canvas(0.24 * len(rows), below=below, left=left, right=0.75, width=width, grid=False)
    mesh = axes.pcolormesh(values, cmap=_HEAT, vmin=0, vmax=top, linewidth=0.4, edgecolors="#8884", zorder=2)
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(columns)) + 0.5, [_plain(name) for name in columns], rotation=90 if upright else 0)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [_plain(name) for name in rows])
    if x_label:
        axes.set_xlabel(x_label)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for (row, column), value in np.ndenumerate(values) if numbers else ():
        if not np.isnan(value):
            text = f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}"
            light = value > 0.55 * top
            axes.text(
                column + 0.5,
                row + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=SMALL,
                color="#101418" if light else "#fdfdfd",
                zorder=4,
            )
    wide, high = figure.get_size_inches()
    bar = figure.add_axes(((wide - 0.55) / wide, below / high, 0.1 / wide, 0.24 * len(rows) / high))
    drawn = figure.colorbar(mesh, cax=bar)
    drawn.outline.set_visible(False)
    bar.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    bar.set_title("%", fontsize=SMALL, color=INK)
    figure.suptitle(_plain(label), fontsize=9.5, color=INK, x=0.02, ha="left", y=1 - 0.05 / high)
    return figure


def draw_bars(names: Sequence[str], groups: Sequence[tuple[str, Sequence[float]]], *, label: str, mark: float) -> Any:
    """Horizontal bars of percentages, some per name, and a mark.

    Args:
        names: from the top.
        groups: a label, and a fraction per name (NaN where there is none).
        label: of the axis.
        mark: a fraction, that of a random mask.
    """
    left = 0.2 + 0.074 * max(map(len, names))
    legend = 0.2 * len(groups) + 0.2
    height = 0.12 + len(names) * (0.1 + 0.15 * len(groups))
    figure, axes = new_canvas(height, below=0.5 + legend, left=left, width=max(WIDTH, left + 3))
    for place, (name, values) in enumerate(groups):
        offset = 0.8 * ((place + 0.5) / len(groups) - 0.5)
        bars = axes.barh(
            np.arange(len(names)) + offset,
            100 * np.asarray(values),
            height=0.8 / len(groups),
            color=COLOURS[place % len(COLOURS)],
            label=_plain(name),
            zorder=3,
        )
        axes.bar_label(bars, fmt="{:.0f}", fontsize=SMALL, color=INK, padding=2)
    axes.axvline(100 * mark, color=INK, linewidth=1, linestyle=(0, (2, 2)), label="random", zorder=4)
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel(label)
    figure.legend(loc="lower left", fontsize=SMALL, frameon=False, labelcolor=INK, borderaxespad=0.1)
    return figure
