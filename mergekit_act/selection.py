"""From scores to masks: ranking, density, union, exclusion, overlap. Pure functions."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from mergekit_act.artifacts import Mask, Profile
from mergekit_act.channels import Layout, kind_pattern

__all__ = [
    "excluded_modules",
    "make_mask",
    "overlap",
    "select_channels",
    "selected_count",
    "selected_parameters",
    "unite",
    "validate_density",
]

Selection = Mapping[str, Tensor]


def validate_density(density: float) -> Fraction:
    """The density as the exact fraction that its decimal writing names (0.29 is 29/100).

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not (isinstance(density, int | float) and math.isfinite(density) and 0 < density <= 1):
        raise ValueError(f"density is {density}; expected a fraction in (0, 1], such as 0.01 for the top 1 %")
    return Fraction(repr(float(density)))


def select_channels(profile: Profile, density: float, *, exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    """Select the top channels of a profile, ranked over all modules together (paper 4.1).

    k is the floor of density × the number of channels that take part, at least 1. Of equal scores the channel that
    comes first in the layout wins. Vocabulary rows that the ability model does not have are never selected.

    Args:
        profile: the scores.
        density: fraction of the channels to keep, in (0, 1].
        exclude: globs of modules that take no part, neither in the ranking nor in the count.

    Returns:
        module -> bool ``[channels]`` (or ``[experts, channels]``), for modules with a selected channel.

    Raises:
        ValueError: the density is not in (0, 1], a glob matches no module, or no module is left.
    """
    fraction = validate_density(density)
    excluded = excluded_modules(profile.layout, exclude)
    modules = [module for module in profile.layout.modules if module not in excluded]
    if not modules:
        raise ValueError(f"no module is left after excluding {', '.join(exclude)}")
    scores = torch.cat([profile.scores[module].flatten() for module in modules])
    sizes = [profile.scores[module].numel() for module in modules]
    k = max(1, math.floor(fraction * scores.numel()))

    eligible = torch.ones_like(scores, dtype=torch.bool)
    for module, part in zip(modules, torch.split(eligible, sizes), strict=True):
        part[profile.shared_rows.get(module, part.numel()) :] = False
    ranked = torch.where(eligible, scores, -1.0)
    threshold = torch.topk(ranked, k).values[-1].clamp(min=0)
    above = ranked > threshold
    level = torch.nonzero(ranked == threshold).flatten()[: k - int(above.sum())]
    above[level] = True

    parts = zip(modules, torch.split(above, sizes), strict=True)
    return {module: part.reshape(profile.scores[module].shape).clone() for module, part in parts if part.any()}


def excluded_modules(layout: Layout, exclude: Sequence[str]) -> set[str]:
    """The modules that match any of the globs.

    Raises:
        ValueError: a glob matches no module.
    """
    excluded: set[str] = set()
    for glob in exclude:
        matched = fnmatch.filter(layout.modules, glob)
        if not matched:
            kinds = ", ".join(dict.fromkeys(kind_pattern(module) for module in layout.modules))
            raise ValueError(f'no module matches "{glob}"; there are {kinds}')
        excluded.update(matched)
    return excluded


def unite(selections: Iterable[Selection]) -> dict[str, Tensor]:
    """The union of selections (paper eq. 3); the inputs are not changed.

    Raises:
        ValueError: one module has different shapes.
    """
    union: dict[str, Tensor] = {}
    for selection in selections:
        for module, chosen in selection.items():
            if module not in union:
                union[module] = chosen.clone()
            elif union[module].shape != chosen.shape:
                shapes = f"{list(union[module].shape)} and {list(chosen.shape)}"
                raise ValueError(f'module "{module}" has channels {shapes}: these are masks of different models')
            else:
                union[module] |= chosen
    return union


def overlap(first: Selection, second: Selection) -> float:
    """|first ∩ second| / |first|: the share of the first one's channels that are in the second as well."""
    common = sum(int((first[module] & second[module]).sum()) for module in first.keys() & second.keys())
    return common / selected_count(first)


def selected_count(selection: Selection) -> int:
    """Number of selected channels."""
    return sum(int(chosen.sum()) for chosen in selection.values())


def selected_parameters(selection: Selection, layout: Layout, modules: Iterable[str] | None = None) -> int:
    """Number of parameters that the selected channels own; a cell of a tied matrix is counted once.

    Args:
        selection: the channels.
        layout: what they own; it must know the parameters' shapes.
        modules: count only what these modules' channels own.
    """
    matrices: dict[str, dict[int, tuple[int, int]]] = {}  # parameter -> channel axis -> (selected, all)
    for module in selection if modules is None else modules:
        for name, axis in layout.parameters[module]:
            matrix = matrices.setdefault(layout.tied_names(name)[0], {})
            matrix[axis] = (int(selection[module].sum()), selection[module].numel())
    shapes = layout.shapes or {}
    total = 0
    for name, axes in matrices.items():
        cells = math.prod(length for _, length in axes.values())
        untouched = math.prod(length - selected for selected, length in axes.values())
        total += (cells - untouched) * (math.prod(shapes[name]) // cells)
    return total


def make_mask(
    profiles: Sequence[Profile],
    density: float,
    *,
    exclude: Sequence[str] = (),
    hashes: Sequence[str] | None = None,
) -> Mask:
    """The union of the top channels of each profile (paper eq. 3).

    Args:
        profiles: profiles of models with the same layout.
        density: fraction of the channels that each ability keeps.
        exclude: globs of modules that take no part.
        hashes: SHA-256 of the profiles' files, for the record.

    Raises:
        ValueError: as ``select_channels``; or the profiles are of different models.
    """
    layout = profiles[0].layout
    for other in profiles[1:]:
        if not layout.fits(other.layout):
            raise ValueError(
                f'the profiles of "{profiles[0].ability}" and "{other.ability}" are of models with different modules; '
                "a mask is for one model"
            )
    union = unite(select_channels(profile, density, exclude=exclude) for profile in profiles)
    union = {module: union[module] for module in layout.modules if module in union}
    excluded = excluded_modules(layout, exclude)
    counts = {
        "channels": selected_count(union),
        "channels_total": sum(scores.numel() for scores in profiles[0].scores.values()),
        "channels_taking_part": sum(s.numel() for module, s in profiles[0].scores.items() if module not in excluded),
    }
    if layout.shapes is not None:
        counts["parameters"] = selected_parameters(union, layout)
        counts["parameters_total"] = layout.parameter_count()
    sources = tuple(
        {
            "ability": profile.ability,
            "criterion": profile.criterion,
            "density": density,
            "exclude": list(exclude),
            "target": dict(profile.target),
            "ability_model": dict(profile.ability_model),
        }
        | ({"sha256": hashes[place]} if hashes else {})
        for place, profile in enumerate(profiles)
    )
    return Mask(channels=union, layout=layout, sources=sources, operation="union", counts=counts)
