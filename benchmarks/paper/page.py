"""A setting's section of the page of results: tables, figures, and what they say of the paper's claims."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiment import Setting
from findings import TOP, Found
from rules import PAPER
from tables import KEPT, Row

__all__ = ["draw_grid", "section", "write_section"]

Rows = Mapping[str, Sequence[Row]]  # experiment -> its rows


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
    rows: Rows,
    controls: Sequence[Row],
    merged: Sequence[Row],
    found: tuple[Found, Found],
    facts: str,
    images: str,
) -> str:
    """The section.

    Args:
        rows: of table 3.
        controls: of its first experiment.
        merged: of table 4.
        found: of all channels, and without those that the better rules leave out.
        facts: how it was run, a line.
        images: where the figures lie, as the page names them.
    """
    first = next(iter(rows))
    parts = [
        f"## Setting `{setting.name}`\n\n{setting.about}\n\n{facts}",
        f"### What is recovered, and what is kept (the paper's table 3)\n\n{_CHOSEN}\n\n{_overview(rows)}",
        *(f"{_title(name)}\n\n{_table3(some)}" for name, some in rows.items()),
        f"### At equal shares of the parameters\n\n{_SHARES}\n\n{_by_share(rows)}",
        f"### Density and weight (figure 5)\n\n{_FIGURE}\n\n![]({images}-grid.png)",
        f"### Controls\n\nOf `{first}`.\n\n{_controls(controls, rows[first])}",
        f"### Specialists merged into their base (table 4)\n\n{_table4(merged)}" if merged else "",
        *_findings(found, images),
        f"### Which claims hold here\n\n{_claims(rows, merged, found)}",
    ]
    return "\n\n".join(part for part in parts if part)


_CHOSEN = f"""Of each rule the density and the weight that recover most on validation samples (two fifths of those held
out) while the kept abilities have {KEPT:.0%} of the likelihood that the target gives to their answers. Told are the
other samples, with 95 % bootstrap intervals: *kept*, the share of right answers of the kept abilities; *nats*, the
negative log-likelihood of an answer token of what is to be recovered; *right*, the share of its answers that are right
as a whole; *others*, nats of abilities that are neither. Behind the arrow: after the same short fine-tuning on the
profiled samples."""
_SHARES = """Nats of what is to be recovered, on test samples, mean over the experiments (range); the weight is again
the largest that keeps enough."""
_FIGURE = """On validation samples of the first experiment: shares of the parameters with weight 0.5, and weights with
the smallest share; of task arithmetic all parameters."""


def _title(name: str) -> str:
    return f"`{name}`"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _with_interval(scores: Mapping[str, Any] | None, name: str) -> str:
    if scores is None or math.isnan(scores[name]):
        return ""
    low, high = scores["intervals"][name]
    return f"{scores[name]:.2f} ({low:.2f} to {high:.2f})"


def _then(row: Row, name: str) -> str:
    before = _with_interval(row.scores, name)
    return f"{before} → {row.tuned[name]:.2f}" if row.tuned is not None and before else before


def _best(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.share is None]


def _chosen(row: Row) -> str:
    if row.scores is None:
        return "none keeps enough"
    return f"{row.parameters:.1%}, weight {row.point.weight:g}" if row.point else ""


def _table3(rows: Sequence[Row]) -> str:
    names = ("kept", "nll", "exact", "others")
    lines = [[row.name, _chosen(row), *(_then(row, name) for name in names)] for row in _best(rows)]
    return _markdown(["", "parameters", "kept", "nats", "right", "others"], lines)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    shown = f"{np.mean(values):.2f}"
    return f"{shown} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else shown


def _overview(rows: Rows) -> str:
    """Means over the experiments of a family, and their range."""
    families: dict[str, list[Sequence[Row]]] = {}
    for name, some in rows.items():
        families.setdefault(name.rpartition("-")[0], []).append(_best(some))
    header, lines = [""], []
    for family, runs in families.items():
        seeds = f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
        header += [f"{family} ({seeds}): kept", "nats", "nats, fine-tuned", "right"]
    for place, row in enumerate(next(iter(families.values()))[0]):
        line = [row.name]
        for runs in families.values():
            own = [run[place] for run in runs]
            scores, tuned = [r.scores for r in own if r.scores], [r.tuned for r in own if r.tuned]
            if len(scores) < len(own):
                line += ["none keeps enough", "", "", ""]
                continue
            line += [_mean([s["kept"] for s in scores]), _mean([s["nll"] for s in scores])]
            line += [_mean([s["nll"] for s in tuned]), _mean([s["exact"] for s in scores])]
        lines.append(line)
    return _markdown(header, lines)


def _by_share(rows: Rows) -> str:
    found: dict[str, dict[float, list[float]]] = {}
    for some in rows.values():
        for row in some:
            if row.share is not None:
                values = found.setdefault(row.name, {}).setdefault(row.share, [])
                values += [row.scores["nll"]] if row.scores else []
    shares = sorted({share for own in found.values() for share in own})
    lines = [[name, *(_mean(own.get(share, [])) for share in shares)] for name, own in found.items()]
    return _markdown(["", *(f"{share:.0%}" for share in shares)], lines)


def _controls(controls: Sequence[Row], rows: Sequence[Row]) -> str:
    own = [row for row in rows if row.share is not None and row.name in (PAPER.name, "attribution")]
    lines = []
    for row in (*own, *(row for row in controls if row.share is not None or row.name.startswith("attribution of"))):
        if row.point:
            moved = [f"{row.channels:.1%}", f"{row.parameters:.1%}", f"{row.point.weight:g}"]
            lines.append([row.name, *moved, _with_interval(row.scores, "kept"), _with_interval(row.scores, "nll")])
    return _markdown(["", "channels", "parameters", "weight", "kept", "nats"], lines)


def _table4(rows: Sequence[Row]) -> str:
    """Abilities of one name up to its first hyphen (a domain in several languages) are one column."""
    abilities = list(rows[0].scores["abilities"]) if rows[0].scores else []
    domains = list(dict.fromkeys(ability.partition("-")[0] for ability in abilities))
    lines = []
    for row in (row for row in _best(rows) if row.scores):
        own = row.scores["abilities"].items()
        right = [f"{np.mean([score for name, score in own if name.startswith(d)]):.2f}" for d in domains]
        means = (_with_interval(row.scores, "exact"), _with_interval(row.scores, "nll"))
        lines.append([row.name, _chosen(row), *right, *means])
    return _markdown(["", "parameters of each", *(f"{d}: right" for d in domains), "right, mean", "nats, mean"], lines)


def _findings(found: tuple[Found, Found], images: str) -> Iterator[str]:
    every, without = found
    yield f"### Findings\n\nMasks of the top {TOP:.0%} of all channels, by the paper's score; chance is {TOP:.0%}."
    more = ["largest changes of weights", "share of all scores", "in the head", "in the fullest layer"]
    for n, pair in enumerate(every.pairs):
        lines = []
        for m, ability in enumerate(every.abilities):
            shares = (every.weights[n, m], every.held[n, m], every.in_head[n, m], every.layers[n, m])
            lines.append([ability, *(f"{100 * share:.0f} %" for share in (*every.overlap[n, m], *shares))])
        yield f"Tables 1, 2 and 5, figure 20:\n\n{_markdown([f'`{pair}`', *every.abilities, *more], lines)}"
    pairs = [(n, m) for n in range(len(every.pairs)) for m in range(n)]
    lines = [
        [f"`{every.pairs[m]}`, `{every.pairs[n]}`"]
        + [
            f"{100 * every.across[m, n, k]:.0f} % ({100 * without.across[m, n, k]:.0f} %)"
            for k in range(len(every.abilities))
        ]
        for n, m in pairs
    ]
    shown = "Figure 3, one ability by two pairs (in brackets: without the modules that the better rules leave out):"
    yield f"{shown}\n\n{_markdown(['', *every.abilities], lines)}"
    yield f"Figure 1, the first pair:\n\n![]({images}-distribution.png)"


def _claims(rows: Rows, merged: Sequence[Row], found: tuple[Found, Found]) -> str:
    """Each claim, the numbers it hangs on, and whether it holds by the measure that is named."""
    claims = [*_findings_hold(*found), _recovers_more(rows), _fine_tunes_better(rows), _merges_as_well(merged)]
    return "\n".join(
        f"- {claim}: **{'holds' if held else 'does not hold'}**. {why[0].upper()}{why[1:]}."
        for claim, held, why in (one for one in claims if one)
    )


_Claim = tuple[str, bool, str]  # claim, whether it holds, why
_STOCK = ("task arithmetic", "TIES", "DARE", "DELLA")


def _findings_hold(every: Found, without: Found) -> Iterator[_Claim]:
    yield (
        "1. Large differences are in few channels",
        bool(every.held.min() > 0.1),
        f"the top 1 % hold {_range(every.held)} of the sum of all scores (holds if all hold over 10 %)",
    )
    yield (
        "2. No layer or module dominates",
        bool(max(every.in_head.max(), every.layers.max()) < 0.5),
        f"the head has {_range(every.in_head)} of the top 1 %, the fullest layer {_range(every.layers)} (holds if all "
        "have less than half)",
    )
    apart = ~np.eye(len(every.abilities), dtype=bool)
    yield (
        "3. Masks of different abilities are different ones",
        bool(every.overlap[:, apart].mean() < 0.36),
        f"overlaps are {_range(every.overlap[:, apart])}, without the head and the embedding "
        f"{_range(without.overlap[:, apart])} (holds if below 36 % in the mean, the most that the paper has across "
        "languages)",
    )
    across = np.array([every.across[m, n] for n in range(len(every.pairs)) for m in range(n)])
    if len(across):
        yield (
            "4. An ability has the same channels in other pairs",
            bool(across.mean() > 0.36),
            f"overlaps are {_range(across)} (holds if above 36 % in the mean)",
        )
    yield (
        "5. These are not the channels whose weights changed most",
        bool(every.weights.max() < 0.1),
        f"overlaps are {_range(every.weights)}, chance is 1 % (holds if all are below 10 %)",
    )


def _recovers_more(rows: Rows) -> _Claim:
    gains: dict[str, list[float]] = {}
    for some in rows.values():
        before = some[0].scores["nll"]
        for row in _best(some):
            gains.setdefault(row.name, []).append(before - row.scores["nll"] if row.scores else 0.0)
    strongest = max((name for name in _STOCK if name in gains), key=lambda name: np.mean(gains[name]))
    ours, theirs = gains[PAPER.name], gains[strongest]
    ahead = sum(a > b for a, b in zip(ours, theirs, strict=True))
    return (
        "ACT recovers more than merging methods that keep as much",
        ahead == len(ours),
        f"it gains {_mean(ours)} nats, {strongest} {_mean(theirs)}; more in {ahead} of {len(ours)} experiments",
    )


def _fine_tunes_better(rows: Rows) -> _Claim | None:
    gains = []
    for some in rows.values():
        ours = next(row for row in _best(some) if row.name == PAPER.name)
        if ours.tuned and some[0].tuned:
            gains.append(some[0].tuned["nll"] - ours.tuned["nll"])
    if not gains:
        return None
    return "Fine-tuned it is better than the target fine-tuned", min(gains) > 0, f"by {_mean(gains)} nats"


def _merges_as_well(merged: Sequence[Row]) -> _Claim | None:
    scores = {row.name: row.scores for row in _best(merged) if row.scores}
    if PAPER.name not in scores:
        return None
    best = min((name for name in _STOCK if name in scores), key=lambda name: scores[name]["nll"])
    return (
        "It merges specialists as well as the others",
        scores[PAPER.name]["nll"] <= scores[best]["intervals"]["nll"][1],
        f"{_with_interval(scores[PAPER.name], 'nll')} nats, {best} {_with_interval(scores[best], 'nll')} (holds within "
        "the interval of the best)",
    )


def _range(values: np.ndarray) -> str:
    low, high = (f"{100 * value:.0f}" for value in (values.min(), values.max()))
    return f"{low} %" if low == high else f"{low} to {high} %"


def draw_grid(grid: Mapping[str, Sequence[tuple[float, float, Mapping[str, Any]]]], out: Path) -> None:
    """Figure 5: likelihood kept and nats to recover, over shares and over weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    smallest = min(share for some in grid.values() for share, _, _ in some)
    for name, some in grid.items():
        for column, (measure, label) in enumerate((("likelihood", "likelihood kept"), ("nll", "nats to recover"))):
            for row, x, chosen in (
                (0, 0, [one for one in some if one[1] == 0.5]),
                (1, 1, [one for one in some if one[0] in (smallest, 1.0)]),
            ):
                axes[row, column].plot(
                    [one[x] for one in chosen], [one[2][measure] for one in chosen], "o-", label=name
                )
                axes[row, column].set_xlabel(
                    ("share of the parameters, weight 0.5", f"weight, {smallest:.0%} of the parameters")[row]
                )
                axes[row, column].set_ylabel(label)
    axes[0, 0].legend(fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
