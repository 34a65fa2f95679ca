"""Listings for the terminal: channels by module kind, and what a mask selects of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergekit_act.artifacts import Mask, Profile
from mergekit_act.channels import Layout, kind_pattern
from mergekit_act.selection import predicted_effects, selected_parameters
from mergekit_act.wording import percent, show_bytes, table

if TYPE_CHECKING:
    from mergekit_act.checking.summary import CheckSummary

__all__ = [
    "head_warning",
    "list_channels",
    "list_check",
    "list_expert_tokens",
    "list_mask",
]


def list_channels(layout: Layout) -> str:
    """A model's channels by module kind, what 1 % of them is, and the parameters without channels."""
    total = layout.channel_count()
    rows = []
    for kind, modules in _by_kind(layout).items():
        channels = layout.channel_count(modules)
        owned = sorted({layout.parameters_per_channel(module) for module in modules})
        shown = f"{owned[0]:,}" if len(owned) == 1 else f"{owned[0]:,} to {owned[-1]:,}"
        rows.append([kind, f"{len(modules):,}", f"{channels:,}", percent(channels, total), shown])
    rows.append(["total", f"{len(layout.modules):,}", f"{total:,}", "100.00 %", ""])
    lines = [table(["module kind", "modules", "channels", "share", "parameters per channel"], rows), ""]
    lines.append(f"1 % of the channels: {total // 100:,}")
    lines += [f"one matrix: {' = '.join(group)}" for group in layout.tied]
    lines.append(_without_channels(layout))
    return "\n".join(lines)


def list_mask(mask: Mask) -> str:
    """What a mask selects, by module kind, and its share of channels and parameters."""
    layout, counts = mask.layout, mask.counts
    selected_total = counts["channels"]
    rows, without = [], []
    for kind, modules in _by_kind(layout).items():
        chosen = [module for module in modules if module in mask.channels]
        selected = sum(int(mask.channels[module].sum()) for module in chosen)
        if not selected:
            without.append(kind)
            continue
        row = [kind, f"{len(chosen):,}", f"{selected:,}", percent(selected, selected_total)]
        if layout.shapes is not None:
            owned = selected_parameters(mask.channels, layout, chosen)
            row += [percent(selected, layout.channel_count(modules)), f"{owned:,}"]
        rows.append(row)
    header = ["module kind", "modules", "selected", "of selected"]
    lines = [table(header + (["of its kind", "parameters"] if layout.shapes is not None else []), rows)]
    lines += [f"nothing of {', '.join(without)}"] if without else []
    lines.append("")
    channels = f"{selected_total:,} of {counts['channels_total']:,} channels"
    lines.append(f"{channels} ({percent(selected_total, counts['channels_total'])})")
    if counts["channels_taking_part"] != counts["channels_total"]:
        taking_part = counts["channels_taking_part"]
        lines.append(f"{percent(selected_total, taking_part)} of the {taking_part:,} channels that were not excluded")
    if "parameters" in counts:
        parameters, everything = counts["parameters"], counts["parameters_total"]
        lines.append(f"{parameters:,} of {everything:,} parameters ({percent(parameters, everything)})")
        lines.append(_without_channels(layout))
    asked = [int(source["density"] * counts["channels_taking_part"]) for source in mask.sources if "gain" in source]
    if len(asked) == 1 and selected_total < asked[0]:
        lines.append(f"the density asks for {asked[0]:,} channels; no others help when they move")
    return "\n".join([*lines, *predicted_effects(mask.sources)])


def head_warning(
    layout: Layout, name: str, counts: Mapping[str, int], remedy: str = "--exclude {head} leaves them out."
) -> str:
    """What to think of a selection that sits in the LM head, and what to do; empty if it does not.

    Args:
        layout: of the model.
        name: of the selection.
        counts: module -> how many of its channels are selected.
        remedy: a sentence, in which "{head}" stands for the head's name.
    """
    head = layout.head
    selected = sum(counts.values())
    if head is None or 2 * counts.get(head, 0) <= selected:
        return ""
    return (
        f"{name}: {percent(counts[head], selected)} of the selected channels are rows of the LM head ({head}), which "
        f"crowd out the decoder layers. {remedy.replace('{head}', head)}"
    )


def list_expert_tokens(profile: Profile) -> str:
    """How many answer tokens the experts of a profile's target had: few make for scores by chance."""
    counts = [count for experts in profile.data["expert_tokens"].values() for count in experts]
    idle = f"; {counts.count(0):,} had none" if 0 in counts else ""
    return (
        f"  answer tokens per expert: {min(counts):,} to {max(counts):,}, median {statistics.median(counts):,.0f}, "
        f"{len(counts):,} experts{idle}"
    )


def list_check(summary: CheckSummary) -> str:
    """What a merge would do, by kind of tensor, and its estimated cost."""
    rows = []
    for kind in summary.kinds:
        fate = "no channels: copied" if not kind.has_channels else "copied" if not kind.transferred else ""
        moved = percent(kind.moved, kind.parameters)
        rows.append([kind.kind, f"{kind.tensors:,}", f"{kind.transferred:,}", f"{kind.parameters:,}", fate or moved])
    parameters, moved_in_all = (sum(getattr(kind, key) for kind in summary.kinds) for key in ("parameters", "moved"))
    lines = [
        f"{summary.merge_method} into {summary.target}",
        *(f"  from {model}" for model in summary.ability_models),
        "",
        table(["tensor kind", "tensors", "transferred", "parameters", "moved"], rows),
        "",
        f"{summary.selected:,} of {summary.channels:,} channels ({percent(summary.selected, summary.channels)})",
        f"{moved_in_all:,} of {parameters:,} parameters ({percent(moved_in_all, parameters)})",
        f"about {show_bytes(summary.bytes_read)} read, {show_bytes(summary.bytes_written)} written, "
        f"{show_bytes(summary.peak_memory)} of memory besides Python and PyTorch",
        *(f"note: {remark}" for remark in summary.remarks),
    ]
    return "\n".join(lines)


def _by_kind(layout: Layout) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for module in layout.modules:
        kinds.setdefault(kind_pattern(module), []).append(module)
    return kinds


def _without_channels(layout: Layout) -> str:
    without = layout.without_channels()
    if not without:
        return "parameters without channels: none"
    kinds = ", ".join(dict.fromkeys(kind_pattern(name) for name in without))
    count = sum(math.prod(shape) for shape in without.values())
    return f"parameters without channels, never transferred: {count:,} ({kinds})"
