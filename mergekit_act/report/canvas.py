"""What all pictures share: colours, sizes, files. Only ``report`` imports matplotlib, and only to draw.

Text stays text in SVG files, and colours are few, so that a page can give them another colour in the dark.
"""

from __future__ import annotations

import io
import re
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mergekit_act.files import write_atomically

__all__ = [
    "COLOURS",
    "DARK",
    "INK",
    "MUTED",
    "RIGHT",
    "SMALL",
    "WIDTH",
    "can_draw",
    "files_of",
    "for_page",
    "new_canvas",
    "save_figure",
]

INK, MUTED, GRID = "#24292f", "#6a737d", "#d8dee4"
# Okabe and Ito's colours, which colour-blind readers tell apart, without yellow and black: one is lost on white, the
# other in the dark.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c")
#: The colours of a dark page: of ink, muted ink, grid, and of lines that would be too dark there.
DARK = {
    INK: "#e6edf3",
    MUTED: "#9aa4af",
    GRID: "#373e47",
    "#0072b2": "#3f8fe0",
    "#56b4e9": "#a9ddff",
    "#d55e00": "#ff7b45",
}

WIDTH = 4.8  # inches; a phone shows it at its own size
LEFT, RIGHT, TOP = 0.66, 0.15, 0.12
SMALL = 8.5


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def new_canvas(
    height: float, *, below: float, left: float = LEFT, right: float = RIGHT, width: float = WIDTH, grid: bool = True
) -> tuple[Any, Any]:
    """A figure whose axes are ``height`` inches high, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    top = TOP if grid else 0.42
    total = height + below + top
    figure = Figure(figsize=(width, total))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, below / total, (width - left - right) / width, height / total))
    axes.patch.set_visible(False)
    axes.tick_params(labelsize=9, colors=INK, which="both")
    axes.xaxis.label.set(size=9.5, color=INK)
    axes.yaxis.label.set(size=9.5, color=INK)
    if grid:
        axes.grid(color=GRID, linewidth=0.5, zorder=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(MUTED)
    return figure, axes


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write a figure as STEM.svg and STEM.png, each whole or not at all.

    Raises:
        OSError: a file can't be written; the message names it.
    """
    written = []
    for name, content in files_of(figure, stem.name).items():
        written.append(stem.with_name(name))
        write_atomically(written[-1], content, overwrite=True)
    return written


def files_of(figure: Any, stem: str) -> dict[str, bytes]:
    """A figure as files: STEM.svg and STEM.png, and their content; equal figures give equal bytes."""
    from matplotlib import rc_context

    svg, png = io.BytesIO(), io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mergekit-act"}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    return {f"{stem}.svg": svg.getvalue(), f"{stem}.png": png.getvalue()}


def for_page(svg: str, name: str, label: str) -> str:
    """An SVG file's text as part of a page: names of its own, a description, and colours that follow the page's.

    Args:
        svg: the file's text.
        name: what the names in it are made unique with.
        label: what it shows, for those who cannot see it.
    """
    box = re.search(r'viewBox="([^"]+)"', svg)
    if box is None:
        raise ValueError(f"{name} is no SVG that matplotlib wrote")
    width = float(box.group(1).split()[2])
    svg = svg[svg.index("<g id=") :]
    svg = re.sub(r'<g id="line:([^"]*)">', r'<g class="line"><title>\1</title>', svg)
    svg = re.sub(r'\bid="(?!line:)([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    # The white sheet behind everything.
    svg = re.sub(r'(<g id="[^"]*patch_1">\s*<path [^>]*?)style="[^"]*"', r'\1style="fill: none"', svg, count=1)
    for colour in DARK:
        svg = svg.replace(colour, f"var(--c{colour[1:]})")
    narrowest = f"min-width: {width:.0f}px; " if width > 72 * WIDTH + 1 else ""
    style = f"{narrowest}max-width: {1.6 * width:.0f}px"
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="{box.group(1)}" style="{style}">\n{svg}'
