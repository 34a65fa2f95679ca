"""Pictures of sweeps and of training losses."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_act.report.canvas import COLOURS, MUTED, can_draw, new_canvas, save_figure
from mergekit_act.wording import one_line

if TYPE_CHECKING:
    from mergekit_act.sweeping.run import SweepResult

__all__ = ["check_drawing", "draw_losses", "draw_sweep"]

_MARKERS = "osD^vP*"


def check_drawing() -> None:
    """See, before hours of work, that the picture at their end can be drawn; without matplotlib there will be none.

    Raises:
        ValueError: matplotlib is there and does not work.
    """
    if not can_draw():
        return
    try:
        for kind in ("svg", "png"):
            _figure_of_losses([(1, 1.0), (2, 0.5)]).savefig(io.BytesIO(), format=kind)
    except Exception as error:  # of a broken installation, its settings or its cache
        reason = one_line(error, 300)
        raise ValueError(
            f"matplotlib cannot draw the picture ({type(error).__name__}: {reason}); mend it, or uninstall it to have "
            "no picture"
        ) from error


def draw_sweep(result: SweepResult, out_dir: Path) -> list[Path]:
    """What each point of a sweep keeps and recovers, with the frontier and the best point; sweep.svg and sweep.png."""
    masks = sorted({score.point.mask for score in result.scores if score.point}, key=lambda mask: (*mask[1:], mask[0]))
    legend = 0.2 * -(-(len(masks) + 3) // 3)
    figure, axes = new_canvas(4.2, below=0.62 + legend, width=7)
    for place, own in enumerate(masks):
        density, criterion, fit = own
        some = [score for score in result.scores if score.point and score.point.mask == own]
        colour, marker = COLOURS[place % len(COLOURS)], _MARKERS[place // len(COLOURS) % len(_MARKERS)]
        axes.scatter(
            [score.keep or 0 for score in some],
            [score.recover for score in some],
            label=", ".join(filter(None, (criterion, f"density {density:g}", fit and "fitted"))),
            color=colour,
            marker=marker,
            zorder=3,
        )
    front = [(score.keep or 0, score.recover) for score in result.frontier]
    axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1, zorder=2, label="frontier")
    axes.scatter(result.target.keep or 0, result.target.recover, color=MUTED, marker="x", label="target", zorder=3)
    if result.best is not None and result.best.point is not None:
        x, y = result.best.keep or 0, result.best.recover
        axes.scatter(x, y, s=160, facecolors="none", edgecolors="#d55e00", linewidths=2, zorder=4, label="best.yml")
    axes.set_xlabel("kept: likelihood of an answer token")
    axes.set_ylabel("recovered: likelihood of an answer token")
    figure.legend(loc="lower left", fontsize="small", frameon=False, ncols=3)
    return save_figure(figure, out_dir / "sweep")


def draw_losses(losses: Sequence[tuple[int, float]], out: Path) -> list[Path]:
    """The training loss over optimizer steps; as svg and png."""
    return save_figure(_figure_of_losses(losses), out)


def _figure_of_losses(losses: Sequence[tuple[int, float]]) -> Any:
    figure, axes = new_canvas(4.2, below=0.62, width=7)
    axes.plot(*zip(*losses, strict=True), color=COLOURS[0], linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    axes.set_ylim(bottom=0)
    return figure
