"""Pictures, drawn with matplotlib (extra ``plots``), the only module that imports it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_act.sweep.run import SweepResult

__all__ = ["can_draw", "draw_losses", "draw_sweep"]

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_MARKERS = "osD^vP*X"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_sweep(result: SweepResult, out_dir: Path) -> list[Path]:
    """What each point of a sweep keeps and recovers, with the frontier and the best point; sweep.svg and sweep.png."""
    figure, axes = _figure()
    densities = sorted({score.point.density for score in result.scores if score.point})
    for place, density in enumerate(densities):
        some = [score for score in result.scores if score.point and score.point.density == density]
        colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place // len(_COLOURS) % len(_MARKERS)]
        axes.scatter(
            [score.keep or 0 for score in some],
            [score.recover for score in some],
            label=f"density {density:g}",
            color=colour,
            marker=marker,
            zorder=3,
        )
    front = [(score.keep or 0, score.recover) for score in result.frontier]
    axes.plot(*zip(*front, strict=True), color="#888888", linewidth=1, zorder=2, label="frontier")
    axes.scatter(result.target.keep or 0, result.target.recover, color="#888888", marker="x", label="target", zorder=3)
    if result.best is not None and result.best.point is not None:
        x, y = result.best.keep or 0, result.best.recover
        axes.scatter(x, y, s=160, facecolors="none", edgecolors="#D55E00", linewidths=2, zorder=4, label="best.yml")
    axes.set_xlabel("kept: likelihood of an answer token")
    axes.set_ylabel("recovered: likelihood of an answer token")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False, ncols=1 + len(densities) // 12)
    return _save(figure, out_dir / "sweep")


def draw_losses(steps: Sequence[int], losses: Sequence[float], out: Path) -> list[Path]:
    """The training loss over optimizer steps; as svg and png."""
    figure, axes = _figure()
    axes.plot(steps, losses, color=_COLOURS[0], linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    axes.set_ylim(bottom=0)
    return _save(figure, out)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(color="#dddddd", linewidth=0.5, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(suffix) for suffix in (".svg", ".png")]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
