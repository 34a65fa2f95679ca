"""A profile or a mask in a few lines, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_act.artifacts import Mask, load_artifact
from mergekit_act.groups import Groups, total
from mergekit_act.report.comparison import Comparison, load_comparison
from mergekit_act.report.listings import head_warning
from mergekit_act.selection import describe_selection, predicted_effects
from mergekit_act.wording import escape, percent, shown_density

__all__ = ["list_essentials"]

_SHOWN = 5  # module kinds and layers


def list_essentials(path: Path, *, density: float = 0.01, exclude: Sequence[str] = ()) -> str:
    """What a profile or mask is, how its scores are distributed, and where its channels sit.

    Args:
        path: of the file.
        density: of a profile's mask.
        exclude: globs of modules of a profile that take no part.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is no valid profile or mask.
        ValueError: the density is not in (0, 1], or a glob matches no module.
    """
    artifact = load_artifact(path)
    if isinstance(artifact, Mask):
        lines = _mask_lines(path, artifact)
    else:
        lines = _profile_lines(load_comparison([path], density, exclude=exclude))
    return "\n".join(map(escape, lines))


def _mask_lines(path: Path, mask: Mask) -> list[str]:
    layout, counts = mask.layout, mask.counts
    sources = [f"{source.get('ability')} ({describe_selection(source)})" for source in mask.sources]
    selected = {module: int(mask.channels[module].sum()) if module in mask.channels else 0 for module in layout.modules}
    channels = sum(selected.values())
    lines = [f"{path}: mask" + (f" of {', '.join(sources)}" if sources else "")]
    pairs = {_pair(source.get("ability_model"), source.get("target")) for source in mask.sources}
    lines += [f"  {pair}" for pair in sorted(pairs)]
    if layout.shapes is None:
        return [*lines, f"  {channels:,} channels"]
    everything = layout.channel_count()
    parameters = layout.parameters_owned(selected)
    lines.append(
        f"  {channels:,} of {everything:,} channels ({percent(channels, everything)}), {parameters:,} of "
        f"{layout.parameter_count():,} parameters ({percent(parameters, layout.parameter_count())})"
    )
    lines += [f"  {line}" for line in predicted_effects(mask.sources)]
    taking_part = counts.get("channels_taking_part", everything)
    if taking_part != everything:
        lines.append(f"  {percent(channels, taking_part)} of the {taking_part:,} channels that were not excluded")
    remedy = "mergekit-act mask with --exclude {head} makes one without them."
    return lines + _places(Groups(layout.modules), selected, head_warning(layout, "the mask", selected, remedy))


def _profile_lines(comparison: Comparison) -> list[str]:
    (pair,) = comparison.pairs
    (scored,) = (*pair.abilities, *pair.controls)
    profile, layout, n = scored.profile, comparison.layout, comparison.taking_part
    what = f'profile of "{profile.ability}"' if pair.abilities else f"profile by {profile.criterion}"
    lines = [f"{scored.path}: {what}", f"  {_pair(profile.ability_model, profile.target)}"]
    if profile.samples:
        lines.append(
            f"  {profile.samples:,} samples, {profile.answer_tokens:,} answer tokens of "
            f"{profile.data.get('dataset', 'an unnamed data set')}, in {profile.dtype}"
        )
    scores = [f"{scored.score_at(level):.3g} ({name})" for level, name in ((0.5, "median"), (0.1, "top 10 %"))]
    scores += [f"{scored.score_at(0.01):.3g} (top 1 %)", f"{float(scored.ordered[-1]):.3g} (largest)"]
    lines.append(f"  {'attributions' if len(scored.damage) else 'scores'} from {', '.join(scores)}")
    if len(scored.damage):
        helping = scored.ordered[scored.ordered > 0]
        lines.append(
            f"  {percent(len(helping), n)} of the channels help, by {float(helping.sum()):.3g} nats per "
            f"answer token in all to first order; damage {float(scored.damage.sum()):.3g} in all"
        )
    selection = comparison.selections([scored])[0]
    selected = comparison.per_module(selection)
    parameters = layout.parameters_owned(selected)
    top = f"the top {shown_density(comparison.density)}"
    excluded = "" if n == layout.channel_count() else f" that are not excluded, {layout.channel_count():,} in all"
    channels, share = sum(selected.values()), percent(parameters, layout.parameter_count())
    lines.append(f"  {top}: {channels:,} of {n:,} channels{excluded}, {share} of the parameters")
    remedy = "--exclude {head} leaves them out, here and in mergekit-act mask."
    return lines + _places(comparison.groups, selected, head_warning(layout, top, selected, remedy))


def _places(groups: Groups, selected: Mapping[str, int], warning: str) -> list[str]:
    """Where most of the selected channels sit."""
    everything = sum(selected.values())
    lines = []
    for what, named in (("module kinds", groups.kinds), ("layers", groups.layers)):
        counts = {group: total(selected, modules) for group, modules in named.items()}
        first = sorted(counts, key=lambda group: -counts[group])[:_SHOWN]
        shown = ", ".join(f"{group} ({_percent(counts[group] / everything)})" for group in first if counts[group])
        rest = len([group for group in counts if counts[group] and group not in first])
        lines.append(f"  {what}: {shown or 'none'}" + (f", {rest} more" if rest else ""))
    return [*lines, *([f"  warning: {warning}"] if warning else [])]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "<1 %"


def _pair(ability_model: Any, target: Any) -> str:
    source, into = ((model or {}).get("model", "an unnamed model") for model in (ability_model, target))
    return f"from {source} (ability model) into {into} (target)"
