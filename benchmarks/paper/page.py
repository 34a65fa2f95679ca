"""A setting's section of the page of results: tables, figures, and what they say of the paper's claims."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from claims import Claim, claims
from experiment import Setting
from findings import TOP, Found, Fullest
from formatting import markdown, spread, with_interval
from rules import PAPER, Point
from scoring import Scores
from tables import KEPT, Row, Table

__all__ = ["draw_grid", "section", "write_section"]


def write_section(path: Path, setting: Setting, text: str) -> None:
    """Put a section between its marks in a file; other sections stay."""
    first, last = f"<!-- {setting.name} -->", f"<!-- /{setting.name} -->"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    marked = f"{first}\n\n{text.strip()}\n\n{last}"
    pattern = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    after = pattern.sub(lambda _: marked, before) if pattern.search(before) else f"{before.rstrip()}\n\n{marked}\n"
    path.write_text(after.lstrip(), encoding="utf-8")


def section(
    setting: Setting,
    tables: Mapping[str, Table],
    controls: Table,
    merged: Table | None,
    found: tuple[Found, Found],
    facts: str,
    images: str,
) -> str:
    """The section.

    Args:
        tables: experiment -> its table 3.
        controls: of the first of them.
        merged: table 4.
        found: of all channels, and without those that the better rules leave out.
        facts: how it was run, a line.
        images: where the figures lie, as the page names them.
    """
    first = next(iter(tables))
    show = _Show(setting.short)
    parts = [
        f"## Setting `{setting.name}`\n\n{setting.about}\n\n{facts}",
        f"### What is recovered, and what is kept (the paper's table 3)\n\n{_CHOSEN}\n\n{_overview(setting, tables)}",
        _EACH,
        *(f"`{name}`, {_counted(table.target.scores)}:\n\n{show.table3(table)}" for name, table in tables.items()),
        f"### At equal shares of the parameters\n\n{_SHARES}\n\n{_by_share(setting, tables)}",
        f"### Density and weight (figure 5)\n\n{_FIGURE.format(first=first)}\n\n![]({images}-grid.png)",
        f"### Controls\n\n{_CONTROLS.format(first=first)}\n\n{show.controls(controls, tables[first])}",
        f"### Specialists merged into their base (table 4)\n\n{_MERGED}\n\n{_table4(merged)}" if merged else "",
        *_findings(found, images),
        f"### Which claims hold here\n\n{_BARS}\n\n{_listed(claims(tables, merged, *found))}",
    ]
    return "\n\n".join(part for part in parts if part)


_CHOSEN = f"""Of each rule and share the largest weight with which, on validation samples (two fifths of those held
out), an answer token of the kept abilities becomes no more than {KEPT} nats less likely than by the target; of the
shares the one that recovers most there. Where none keeps enough, the target stays as it is. The numbers are of the
other samples (test): *kept*, the share of right answers of the kept abilities; *nats*, the negative log-likelihood of
an answer token of what is to be recovered (less is better). Means over the runs of a kind, in brackets the smallest
and the largest; *tuned*: after the same short fine-tuning of the chosen merge on the profiled samples, those of the
kept abilities too."""
_EACH = """Each run, with 95 % intervals (bootstrap; of shares Wilson's). *Moved* are the parameters' share and the
weight, with a star where it lies at the edge of what was tried and there is more to try; *lost*, nats by which an
answer token of the kept abilities became less likely; *right*, the share of whole answers that came back; *others*,
nats of abilities that are neither recovered nor kept. Behind the arrow: after fine-tuning, without interval."""
_SHARES = """Nats of what is to be recovered, on test samples, mean over the runs (smallest and largest); for each share
the weight is chosen as above, and where none keeps enough it is the target's nats."""
_FIGURE = """`{first}`, on validation samples. Above by share with weight 0.5 (for TIES and DARE it is the density;
task arithmetic has but one), below by weight with the smallest share."""
_CONTROLS = """Of `{first}`. *Equal channels*: the union of the abilities' masks has that share of the channels. Random
rows, changes of weights and attribution leave the head and the embedding out, the other rows only where they say so.
The last two rows are the paper's own settings for its table 3, before fine-tuning and behind it: a density for each
ability, and a weight that is not chosen."""
_MERGED = """Here nothing is to be kept: of three shares, the largest the paper's 90 %, and all weights the point with
the least validation nats, mean over the specialists' abilities."""
_BARS = "The paper gives no bars for its findings; those named here are ours."


def _counted(scores: Scores) -> str:
    names = {"recover": "to recover", "keep": "to keep", "others": "of others"}
    counts = scores.counts()
    return "test samples " + ", ".join(f"{counts[role]} {name}" for role, name in names.items() if role in counts)


def _nats(scores: Scores, role: str) -> str:
    return "" if math.isnan(scores.nats(role)) else with_interval(scores.nats(role), scores.nats_interval(role))


def _right(scores: Scores, role: str) -> str:
    return with_interval(scores.right(role), scores.right_interval(role)) if scores.abilities(role) else ""


def _moved(row: Row) -> str:
    if row.point is None:
        return ""
    point, shares, weights = row.point, row.point.rule.shares, row.point.rule.weights
    more = point.share == shares[-1] and row.parameters > 0.95 * point.share  # or no other row takes part
    share_at_edge = len(shares) > 1 and (more or point.share == shares[0])
    weight_at_edge = len(weights) > 1 and point.weight == weights[-1]
    share = f"{row.parameters:.1%}{'*' if share_at_edge else ''}"
    return f"{share}, {point.weight:g}{'*' if weight_at_edge else ''}"


def _named(row: Row) -> str:
    return f"{row.name}: none keeps enough" if row.point is None else row.name


def _overview(setting: Setting, tables: Mapping[str, Table]) -> str:
    """Means over the experiments of a family, and their range."""
    families = _families(setting, tables)
    header = [""]
    for family, runs in families.items():
        header += [f"{family} ({_runs(runs)}): kept"] if setting.short else []
        with_tuned = sum(table.target.tuned is not None for table in runs)
        header += ["nats" if setting.short else f"{family}: nats"]
        header += (
            ["nats, tuned" if with_tuned == len(runs) else f"nats, tuned ({with_tuned} run)"] if with_tuned else []
        )
    lines = []
    for name, of in [("target", lambda t: t.target), ("ability model", lambda t: t.abilities[0])] + [
        (row.name, lambda t, place=place: t.best[place])
        for place, row in enumerate(next(iter(families.values()))[0].best)
    ]:
        line = [name]
        for runs in families.values():
            rows = [of(table) for table in runs]
            stay = sum(row.point is None for row in rows) if name not in ("target", "ability model") else 0
            tuned = [row.tuned.nats("recover") for row in rows if row.tuned]
            line += [spread([row.scores.right("keep") for row in rows])] if setting.short else []
            nats = spread([row.scores.nats("recover") for row in rows])
            line += [f"{nats}, {stay} of {len(rows)} stay the target" if stay else nats]
            line += [spread(tuned)] if runs[0].target.tuned else []
        lines.append(line)
    return markdown(header, lines)


class _Show:
    """Tables of an experiment.

    Args:
        short: whether shares of right answers mean anything.
    """

    def __init__(self, short: bool) -> None:
        self._short = short

    def table3(self, table: Table) -> str:
        kept = table.target.scores.nats("keep")
        lines = []
        for row in (table.target, *table.abilities, *table.best):
            line = [_named(row) if row in table.best else row.name, _moved(row)]
            line += [_then(row, lambda s: _right(s, "keep"), lambda s: s.right("keep"))] if self._short else []
            line += [f"{row.scores.nats('keep') - kept:+.2f}" if row.point else ""]
            line += [_then(row, lambda s: _nats(s, "recover"), lambda s: s.nats("recover"))]
            line += [_then(row, lambda s: _right(s, "recover"), lambda s: s.right("recover"))] if self._short else []
            line += [_then(row, lambda s: _nats(s, "others"), lambda s: s.nats("others"))]
            lines.append(line)
        kept_and_right = (["kept"], ["right"]) if self._short else ([], [])
        return markdown(["", "moved", *kept_and_right[0], "lost", "nats", *kept_and_right[1], "others"], lines)

    def controls(self, controls: Table, table: Table) -> str:
        own = [row for row in table.rules if row.share is not None and row.name in (PAPER.name, "attribution")]
        one_share = {row.name for row in controls.best} - {row.name for row in controls.rules if row.share is not None}
        lines = []
        for row in (*own, *(row for row in controls.rules if row.share is not None or row.name in one_share)):
            moved = [f"{row.channels:.1%}", f"{row.parameters:.1%}", f"{row.point.weight:g}"] if row.point else [""] * 3
            kept = [_right(row.scores, "keep")] if self._short else []
            nats = _then(row, lambda s: _nats(s, "recover"), lambda s: s.nats("recover"))
            lines.append([_named(row), *moved, *kept, nats])
        return markdown(["", "channels", "parameters", "weight", *(["kept"] if self._short else []), "nats"], lines)


def _then(row: Row, show: Callable[[Scores], str], value: Callable[[Scores], float]) -> str:
    """What is shown of a model, and its value behind the fine-tuning."""
    before = show(row.scores)
    return f"{before} → {value(row.tuned):.2f}" if row.tuned is not None and before else before


def _by_share(setting: Setting, tables: Mapping[str, Table]) -> str:
    """A table for each family of experiments."""
    parts = []
    for family, runs in _families(setting, tables).items():
        found: dict[str, dict[float, list[float]]] = {}
        for row in (row for table in runs for row in table.rules if row.share is not None):
            found.setdefault(row.name, {}).setdefault(row.share, []).append(row.scores.nats("recover"))
        shares = sorted({share for own in found.values() for share in own})
        lines = [[name, *(spread(own[share]) for share in shares)] for name, own in found.items()]
        parts.append(markdown([f"{family} ({_runs(runs)})", *(f"{share:.0%}" for share in shares)], lines))
    return "\n\n".join(parts)


def _families(setting: Setting, tables: Mapping[str, Table]) -> dict[str, list[Table]]:
    """Experiments that differ in their training's seed only are one family."""
    families: dict[str, list[Table]] = {}
    for experiment in setting.experiments:
        families.setdefault(experiment.family, []).append(tables[experiment.name])
    return families


def _runs(tables: Sequence[Table]) -> str:
    return f"{len(tables)} run{'s' * (len(tables) > 1)}"


def _table4(table: Table) -> str:
    """Abilities of one name up to its first hyphen (a domain in several languages) are one column."""
    domains = list(dict.fromkeys(name.partition("-")[0] for name in table.target.scores.abilities("recover")))
    lines = []
    for row in (replace(table.target, name="base"), *table.abilities, *table.best):
        right = [f"{row.scores.right('recover', domain):.2f}" for domain in domains]
        lines.append([row.name, _moved(row), *right, _right(row.scores, "recover"), _nats(row.scores, "recover")])
    return markdown(["", "moved of each", *(f"{d}: right" for d in domains), "right, mean", "nats, mean"], lines)


def _findings(found: tuple[Found, Found], images: str) -> Iterator[str]:
    every, without = found
    yield (
        f"### Findings\n\nMasks of the top {TOP:.0%} of all channels, by the paper's score; chance is {TOP:.0%}. Of "
        "each pair overlaps (tables 1 and 5, figure 20), with the weights' (table 2), and where the top is:"
    )
    more = ["largest changes of weights", "share of all scores", "in the head", "fullest module kind", "fullest layer"]
    for n, pair in enumerate(every.pairs):
        lines = []
        for m, ability in enumerate(every.abilities):
            shares = [*every.overlap[n, m, n], every.weights[n, m], every.held[n, m], every.head[n, m]]
            fullest = (_fullest(every.kinds[n][m]), _fullest(every.layers[n][m]))
            lines.append([ability, *(f"{100 * share:.0f} %" for share in shares), *fullest])
        header = [f"`{pair}`", *every.abilities, *more]
        yield markdown(header, lines)
    lines = [
        [f"`{every.pairs[n]}`, `{every.pairs[m]}`"]
        + [
            f"{100 * every.overlap[n, k, m, k]:.0f} % ({100 * without.overlap[n, k, m, k]:.0f} %)"
            for k in range(len(every.abilities))
        ]
        for m in range(len(every.pairs))
        for n in range(m)
    ]
    shown = "Figure 3, one ability by two pairs (in brackets: without the modules that the better rules leave out):"
    yield f"{shown}\n\n{markdown(['', *every.abilities], lines)}"
    yield f"Figure 1, the first pair:\n\n![]({images}-distribution.png)"


def _fullest(fullest: Fullest) -> str:
    name, of_top, of_all = fullest
    return f"{name}: {100 * of_top:.0f} % (has {100 * of_all:.0f} % of all)"


def _listed(claims: Iterable[Claim]) -> str:
    verdicts = {True: "holds", False: "does not hold", None: "is not decided here"}
    return "\n".join(f"- {one.text}: **{verdicts[one.holds]}**. {one.why[0].upper()}{one.why[1:]}." for one in claims)


def draw_grid(grid: Mapping[str, Sequence[tuple[Point, Scores]]], out: Path) -> None:
    """Figure 5: nats of what is kept and of what is to be recovered, over shares and over weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    smallest = min(point.share for some in grid.values() for point, _ in some)
    labels = ("share of the parameters, weight 0.5", f"weight ({smallest:.0%}; task arithmetic all)")
    for name, some in grid.items():
        by_share = [(point.share, scores) for point, scores in some if point.weight == 0.5]
        by_weight = [(point.weight, scores) for point, scores in some if point.share in (smallest, 1.0)]
        for row, own in enumerate((by_share, by_weight if len(by_weight) > 1 else [])):
            for column, role in enumerate(("keep", "recover")):
                axes[row, column].plot([x for x, _ in own], [s.nats(role) for _, s in own], "o-", label=name)
                axes[row, column].set(xlabel=labels[row], ylabel=f"nats to {role}", yscale="log")
                axes[row, column].yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}")
                axes[row, column].yaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].legend(fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
