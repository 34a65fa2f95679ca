"""All sections of a report, in order."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_act.report.comparison import Comparison, Pair
from mergekit_act.report.composition import describe_composition
from mergekit_act.report.distributions import describe_distribution, describe_moved, describe_weights
from mergekit_act.report.overlaps import describe_consistency, describe_controls, describe_overlap
from mergekit_act.report.parts import Section

__all__ = ["make_sections"]


def make_sections(comparison: Comparison) -> list[Section]:
    """All sections of a report, in order."""
    several = len(comparison.pairs) > 1
    sections = []
    for place, pair in enumerate(comparison.pairs):
        suffix = f"-{place + 1}" if several else ""
        parts = list(_pair_sections(comparison, pair, suffix))
        sections += [Section(pair.label, "", parts=parts)] if several else parts
    return [*sections, *describe_consistency(comparison)]


def _pair_sections(comparison: Comparison, pair: Pair, suffix: str) -> Iterator[Section]:
    if pair.abilities:
        yield describe_distribution(comparison, pair, suffix)
    if len(pair.abilities) > 1:
        yield describe_overlap(comparison, pair, suffix)
    if pair.abilities and pair.controls:
        yield describe_controls(comparison, pair, suffix)
    if pair.weights:
        yield describe_weights(comparison, pair, suffix)
    if pair.abilities:
        yield describe_composition(comparison, pair, suffix)
        yield describe_moved(comparison, pair, suffix)
