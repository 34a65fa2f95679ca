"""A report as files: one self-contained page, and its figures and tables each by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from tqdm import tqdm

from mergekit_act import __version__
from mergekit_act.files import check_free, check_writable, write_atomically
from mergekit_act.report.canvas import DARK, can_draw, for_page, save_figure
from mergekit_act.report.comparison import Comparison, load_comparison
from mergekit_act.report.parts import Picture, Section
from mergekit_act.report.sections import make_sections
from mergekit_act.wording import as_csv, escape, percent, shown_density

__all__ = ["WrittenReport", "write_report"]

PAGE = "report.html"


@dataclass(frozen=True)
class WrittenReport:
    """A report.

    Attributes:
        page: report.html.
        files: its figures and tables beside it.
        warnings: what the page warns of.
    """

    page: Path
    files: tuple[Path, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Drawn:
    """A figure as part of the page; a wide one has a row of its own."""

    svg: Markup
    wide: bool


def write_report(
    paths: Sequence[Path],
    out_dir: Path,
    *,
    density: float = 0.01,
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    quiet: bool = False,
) -> WrittenReport:
    """Compare profiles and write report.html, each figure as svg and png, each table as csv.

    Args:
        paths: of profiles of one backbone.
        out_dir: where the files go.
        density: at which masks are compared.
        exclude: globs of modules that take no part.
        overwrite: replace a report that exists; those of its figures and tables that the new one lacks are removed.
        quiet: show no progress.

    Raises:
        FileExistsError: there is a report already and ``overwrite`` is false.
        ValueError: as ``load_comparison``; or matplotlib is not installed.
    """
    if not can_draw():
        raise ValueError('a report is drawn with matplotlib, which is not installed: pip install "mergekit-act[plots]"')
    check_writable(out_dir)
    check_free([out_dir / PAGE], overwrite=overwrite)  # before anything is read
    comparison = load_comparison(paths, density, exclude=exclude)
    sections = make_sections(comparison)
    if not sections:
        raise ValueError("there is nothing to report of random scores alone; name profiles of activations or weights")
    every = list(_walk(sections))
    pictures = [picture for section in every for picture in section.pictures]
    tables = [made for section in every for made in section.tables]
    names = [f"{p.name}{suffix}" for p in pictures for suffix in (".svg", ".png")] + [f"{t.name}.csv" for t in tables]
    check_free([out_dir / name for name in names], overwrite=overwrite)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in _files_of(out_dir / PAGE) - set(names):
        (out_dir / name).unlink(missing_ok=True)
    shown = tqdm(pictures, desc="drawing", unit="figure", disable=quiet or None)
    drawn = {picture.name: _draw(picture, out_dir) for picture in shown}
    for made in tables:
        write_atomically(
            out_dir / f"{made.name}.csv", as_csv([made.csv_header, *made.csv_rows]).encode(), overwrite=True
        )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mergekit_act", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    warnings = [warning for section in every for warning in section.warnings]
    page = environment.get_template("report.html.jinja").render(
        title=_title(comparison), facts=_facts(comparison), sections=sections, svgs=drawn, dark=DARK
    )
    write_atomically(out_dir / PAGE, page.encode(), overwrite=True)
    return WrittenReport(out_dir / PAGE, tuple(out_dir / name for name in names), tuple(warnings))


def _files_of(page: Path) -> set[str]:
    """The figures and tables of a report that is to be replaced."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    return set(re.findall(r'href="([^"/]+\.(?:svg|png|csv))"', text))


def _walk(sections: Sequence[Section]) -> Iterator[Section]:
    for section in sections:
        yield section
        yield from _walk([*section.folded, *section.parts])


def _draw(picture: Picture, out_dir: Path) -> _Drawn:
    svg, _ = save_figure(picture.draw(), out_dir / picture.name)
    text = for_page(svg.read_text(encoding="utf-8"), picture.name, picture.caption)
    return _Drawn(Markup(text), "min-width" in text.partition(">")[0])


def _title(comparison: Comparison) -> str:
    return "ACT profiles: " + "; ".join(pair.label for pair in comparison.pairs)


def _facts(comparison: Comparison) -> list[str]:
    layout, n = comparison.layout, comparison.taking_part
    everything = layout.channel_count()
    facts = [
        f"{everything:,} channels in {len(layout.modules):,} modules, {layout.parameter_count():,} parameters. Masks "
        f"are the top {shown_density(comparison.density)}: {comparison.top_count(comparison.density):,} channels per "
        "ability."
    ]
    if n < everything:
        left_out = [module for module in layout.modules if module not in comparison.modules]
        shown = ", ".join(left_out[:5]) + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
        facts.append(f"Excluded: {shown}; {n:,} channels take part ({percent(n, everything)}).")
    for pair in comparison.pairs:
        first = (*pair.abilities, *pair.controls)[0].profile
        models = (_model(first.ability_model), _model(first.target))
        facts.append(f"From {models[0]} (ability model) into {models[1]} (target).")
    facts.append(f"Made by mergekit-act {__version__}.")
    return facts


def _model(model: Mapping[str, Any]) -> str:
    revision = model.get("revision")
    return escape(f"{model.get('model')}" + (f" at revision {revision}" if revision else ""))
