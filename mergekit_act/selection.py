"""From scores to masks: ranking, density, union, exclusion, what selections share."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_act.artifacts import Mask, Profile, load_profile
from mergekit_act.channels import Layout, kind_pattern
from mergekit_act.files import file_hash
from mergekit_act.wording import shown_density

__all__ = [
    "Retention",
    "check_one_criterion",
    "common_counts",
    "describe_selection",
    "excluded_modules",
    "make_mask",
    "mask_of_files",
    "predicted_effects",
    "rank_channels",
    "select_channels",
    "selected_count",
    "selected_parameters",
    "unite",
    "validate_density",
]

Selection = Mapping[str, Tensor]


@dataclass(frozen=True)
class Retention:
    """Abilities of the target that a transfer should spare; not in the paper.

    Attributes:
        profiles: of these abilities, for the same pair.
        hashes: SHA-256 of the profiles' files, for the record.
        ranking: what channels are ranked by, s being their score on the ability to recover and r the largest on one of
            these, of attributions the largest damage: ``difference`` s − strength · r; ``ratio`` s / (r + ε), ε the
            median of the positive r of these abilities; ``score`` s alone, as in the paper. None is the ratio for
            attributions, else the difference.
        strength: of the ranking by difference.
        density: each of these abilities' own top channels, of this density, are not selected; None excludes none.
    """

    profiles: Sequence[Profile]
    hashes: Sequence[str] = ()
    ranking: Literal["difference", "ratio", "score"] | None = None
    strength: float = 0.5
    density: float | None = None

    @property
    def rule(self) -> Literal["difference", "ratio", "score"]:
        """The ranking that None stands for."""
        return self.ranking or ("ratio" if self.profiles[0].criterion == "attribution" else "difference")

    @classmethod
    def of_files(cls, paths: Sequence[Path], **settings: Any) -> Retention:
        """Of profiles' files; settings are the class's own.

        Raises:
            FileNotFoundError: a profile is not there.
            ArtifactError: one is not valid.
        """
        return cls([load_profile(path) for path in paths], [file_hash(path) for path in paths], **settings)


def validate_density(density: float) -> Fraction:
    """The density as the exact fraction that its decimal writing names (0.29 is 29/100).

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not (isinstance(density, int | float) and math.isfinite(density) and 0 < density <= 1):
        raise ValueError(f"density is {density}; expected a fraction in (0, 1], such as 0.01 for the top 1 %")
    return Fraction(repr(float(density)))


def select_channels(
    profile: Profile, density: float, *, exclude: Sequence[str] = (), retain: Retention | None = None
) -> dict[str, Tensor]:
    """Select the top channels of a profile, ranked over all modules together (paper 4.1).

    k is the floor of density × the number of channels that take part, at least 1. Of equal scores the channel that
    comes first in the layout wins. Vocabulary rows that the ability model does not have are never selected, nor are
    channels whose attribution is not positive, if the scores are attributions: they may be fewer than k.

    Args:
        profile: the scores.
        density: fraction of the channels to keep, in (0, 1].
        exclude: globs of modules that take no part, neither in the ranking nor in the count.
        retain: abilities to spare.

    Returns:
        module -> bool ``[channels]`` (or ``[experts, channels]``), for modules with a selected channel.

    Raises:
        ValueError: the density is not in (0, 1], a glob matches no module, no module is left, no attribution is
            positive, or a profile to retain is of another model.
    """
    fraction = validate_density(density)
    excluded = excluded_modules(profile.layout, exclude)
    sizes = [profile.scores[module].numel() for module in profile.layout.modules]
    pairs = list(zip(profile.layout.modules, sizes, strict=True))
    taking_part = sum(size for module, size in pairs if module not in excluded)
    if not taking_part:
        raise ValueError(f"no module is left after excluding {', '.join(exclude)}")
    k = max(1, math.floor(fraction * taking_part))
    ranks = rank_channels(profile, exclude=exclude, retain=retain)
    left = int((ranks < len(ranks)).sum())
    if not left and profile.criterion == "attribution":
        raise ValueError(f'no channel of "{profile.ability}" has a positive attribution: moving none helps it')
    if retain is not None and retain.density is not None and left < k and profile.criterion != "attribution":
        raise ValueError(
            f"only {left:,} channels are left beside those of the abilities to retain; the density asks for {k:,}. "
            "Lower --density or --retain-density"
        )
    parts = zip(profile.layout.modules, torch.split(ranks < k, sizes), strict=True)
    return {module: part.reshape(profile.scores[module].shape).clone() for module, part in parts if part.any()}


def rank_channels(profile: Profile, *, exclude: Sequence[str] = (), retain: Retention | None = None) -> Tensor:
    """The place of every channel in a profile's ranking; channels of rank below k are the top k.

    Args:
        profile: the scores.
        exclude: globs of modules that take no part.
        retain: abilities to spare.

    Returns:
        int64 ``[channels]``, all modules one behind the other in the layout's order, from 0. Channels that are never
        selected have the number of channels, which no density reaches.

    Raises:
        ValueError: a glob matches no module, or a profile to retain is of another model.
    """
    modules = profile.layout.modules
    excluded = excluded_modules(profile.layout, exclude)
    scores = _flat(profile, modules)
    eligible = torch.ones_like(scores, dtype=torch.bool)
    for module, part in zip(modules, torch.split(eligible, [profile.scores[m].numel() for m in modules]), strict=True):
        part[0 if module in excluded else profile.shared_rows.get(module, part.numel()) :] = False
    if profile.criterion == "attribution":
        eligible &= scores > 0
    if retain is not None:
        scores = _spared(profile, scores, eligible, exclude, retain)
    # The bits of floats sort as the floats do, those of negative ones the other way round; the place settles ties.
    bits = (scores + 0.0).view(torch.int32).numpy().astype(np.int64)
    descending = -np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = np.sort((descending << 32) | np.arange(len(bits))) & 0xFFFFFFFF
    order = order[eligible.numpy()[order]]
    ranks = np.full(len(bits), len(bits))
    ranks[order] = np.arange(len(order))
    return torch.from_numpy(ranks)


def _flat(profile: Profile, modules: Sequence[str]) -> Tensor:
    """float32 ``[channels]``: the scores of modules, one behind the other."""
    return torch.cat([profile.scores[module].flatten() for module in modules])


def _spared(profile: Profile, scores: Tensor, eligible: Tensor, exclude: Sequence[str], retain: Retention) -> Tensor:
    """What channels are ranked by; those that may not be selected are struck from ``eligible``."""
    for other in retain.profiles:
        _check_same_pair(profile, other)
    modules = profile.layout.modules
    kept = [replace(other, scores=other.damage) if other.damage else other for other in retain.profiles]
    if retain.density is not None:
        for other in kept:
            theirs = select_channels(other, retain.density, exclude=exclude)
            nothing = {module: torch.zeros_like(part, dtype=torch.bool) for module, part in other.scores.items()}
            eligible &= ~torch.cat([(nothing | theirs)[module].flatten() for module in modules])
    if retain.rule == "score":
        return scores
    largest = torch.stack([_flat(other, modules) for other in kept]).amax(0)
    if retain.rule == "difference":
        return scores - retain.strength * largest
    excluded = excluded_modules(profile.layout, exclude)
    counted = torch.cat([_flat(other, [m for m in modules if m not in excluded]) for other in kept])
    positive = counted[counted > 0]
    return scores / (largest + (positive.median() if len(positive) else 1.0))


def _check_same_pair(profile: Profile, retained: Profile) -> None:
    both = f'the profiles of "{profile.ability}" and of "{retained.ability}", which is to be retained,'
    if not profile.layout.fits(retained.layout):
        raise ValueError(f"{both} are of models with different modules")
    if profile.criterion != retained.criterion:
        raise ValueError(f"{both} are by different criteria: {profile.criterion} and {retained.criterion}")
    for role in ("target", "ability_model"):
        ours, theirs = getattr(profile, role), getattr(retained, role)
        if None not in (ours.get("fingerprint"), theirs.get("fingerprint")) and (
            ours["fingerprint"] != theirs["fingerprint"]
        ):
            raise ValueError(f"{both} are of different pairs: {ours.get('model')} and {theirs.get('model')}")


def check_one_criterion(profiles: Sequence[Profile]) -> None:
    """That scores may be ranked side by side.

    Raises:
        ValueError: they are by different criteria, or by one with different settings.
    """
    criteria = list(dict.fromkeys(profile.criterion for profile in profiles))
    if len(criteria) > 1:
        raise ValueError(f"the profiles are by different criteria, {' and '.join(criteria)}; a mask is by one")
    for option, default in (("points", 1), ("center_logits", False)):
        values = list(dict.fromkeys(profile.data.get(option, default) for profile in profiles))
        if len(values) > 1:
            shown = " and ".join(map(str, values))
            raise ValueError(f'the profiles were made with different settings, "{option}" {shown}; a mask is by one')


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


def common_counts(selected: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many channels selections share; over its own number that is the overlap of one with another, |A ∩ B| / |A|.

    Args:
        selected: ``[selections, channels]``.

    Returns:
        ``[selections, selections]``.
    """
    rows = selected[:, selected.any(0)].astype(np.float32)  # exact below 2 ** 24 common channels
    return np.rint(rows.astype(np.float64) @ rows.T if rows.shape[1] >= 1 << 24 else rows @ rows.T).astype(np.int64)


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
    counted = selection if modules is None else modules
    return layout.parameters_owned({module: int(selection[module].sum()) for module in counted})


def make_mask(
    profiles: Sequence[Profile],
    density: float,
    *,
    exclude: Sequence[str] = (),
    hashes: Sequence[str] | None = None,
    retain: Retention | None = None,
) -> Mask:
    """The union of the top channels of each profile (paper eq. 3).

    Args:
        profiles: profiles of models with the same layout.
        density: fraction of the channels that each ability keeps.
        exclude: globs of modules that take no part.
        hashes: SHA-256 of the profiles' files, for the record.
        retain: abilities to spare.

    Raises:
        ValueError: as ``select_channels``; or the profiles are of different models or criteria.
    """
    layout = profiles[0].layout
    for other in profiles[1:]:
        if not layout.fits(other.layout):
            raise ValueError(
                f'the profiles of "{profiles[0].ability}" and "{other.ability}" are of models with different modules; '
                "a mask is for one model"
            )
    check_one_criterion(profiles)
    union = unite(select_channels(profile, density, exclude=exclude, retain=retain) for profile in profiles)
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
        profile.described()
        | {"density": density, "exclude": list(exclude)}
        | ({"sha256": hashes[place]} if hashes else {})
        | ({"gain": _sum_of(profile.scores, union)} if profile.criterion == "attribution" else {})
        | ({} if retain is None else {"retain": _described(retain, union)})
        for place, profile in enumerate(profiles)
    )
    return Mask(channels=union, layout=layout, sources=sources, operation="union", counts=counts)


def mask_of_files(
    profiles: Sequence[Path], density: float, *, exclude: Sequence[str] = (), retain: Retention | None = None
) -> Mask:
    """A mask of profiles' files.

    Args:
        profiles: their paths.
        density: as for ``make_mask``, likewise the others.
        exclude: likewise.
        retain: likewise.

    Raises:
        FileNotFoundError: a profile is not there.
        ArtifactError: a profile is not valid.
        ValueError: as ``make_mask``.
    """
    loaded = [load_profile(path) for path in profiles]
    hashes = [file_hash(path) for path in profiles]
    return make_mask(loaded, density, exclude=exclude, hashes=hashes, retain=retain)


def _described(retain: Retention, union: Selection) -> dict[str, Any]:
    """What a mask records of the abilities that it spares."""
    abilities = [
        profile.described()
        | ({"sha256": retain.hashes[place]} if retain.hashes else {})
        | ({"loss": _sum_of(profile.damage, union)} if profile.damage else {})
        for place, profile in enumerate(retain.profiles)
    ]
    settings = {"ranking": retain.rule, "strength": retain.strength, "density": retain.density}
    return settings | {"abilities": abilities}


def _sum_of(scores: Mapping[str, Tensor], selection: Selection) -> float:
    return float(sum(scores[module][chosen].sum(dtype=torch.float64) for module, chosen in selection.items()))


def describe_selection(source: Mapping[str, Any]) -> str:
    """How channels of a profile were selected, of what a mask records.

    >>> describe_selection({"density": 0.05, "exclude": ["lm_head"]})
    'top 5 % without lm_head'
    """
    density = source.get("density")
    shown = f"top {shown_density(density)}" if isinstance(density, int | float) else "scores"
    if source.get("exclude"):
        shown += f" without {', '.join(source['exclude'])}"
    retain = source.get("retain")
    if retain:
        spared = ", ".join(str(one.get("ability")) for one in retain.get("abilities") or ())
        shown += f", sparing {spared} (not in the paper: ranked by {retain.get('ranking')}"
        has_strength = retain.get("ranking") == "difference" and retain.get("strength") is not None
        shown += f", strength {retain['strength']:g})" if has_strength else ")"
        shown += f" and without the top {shown_density(retain['density'])} of these" if retain.get("density") else ""
    return shown


def predicted_effects(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a mask of attributions is expected to do, in a sentence; nothing if it is none.

    Args:
        sources: as the mask has them.
    """
    gains = {str(source.get("ability")): source["gain"] for source in sources if source.get("gain") is not None}
    kept = [one for source in sources for one in (source.get("retain") or {}).get("abilities") or ()]
    losses = {str(one.get("ability")): one["loss"] for one in kept if one.get("loss") is not None}
    changes = {ability: -gain for ability, gain in gains.items()} | losses
    if not changes:
        return []
    said = (f"{ability} {'rises' if change > 0 else 'falls'} by {_nats(change)}" for ability, change in changes.items())
    return [
        f"expected at weight 1, not fitted: the loss of {', of '.join(said)} nats per answer token; that is the sum of "
        "what each channel does alone, together they do less"
    ]


def _nats(change: float) -> str:
    return f"{abs(change):.3g}" if abs(change) >= 0.001 else "less than 0.001"
