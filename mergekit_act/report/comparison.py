"""What several profiles of one backbone say together, as numbers: distributions, overlaps, composition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_act.artifacts import Profile, load_profile
from mergekit_act.channels import Layout
from mergekit_act.criteria import WITHOUT_DATA
from mergekit_act.groups import Groups
from mergekit_act.report.parts import file_name
from mergekit_act.selection import excluded_modules, rank_channels, validate_density
from mergekit_act.wording import escape

__all__ = ["DENSITIES", "Comparison", "Pair", "Scored", "load_comparison"]

DENSITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
_STEPS = 100  # thresholds of a distribution


@dataclass(frozen=True, eq=False)
class Scored:
    """One profile of a comparison.

    Attributes:
        label: names it within its pair.
        stem: names its files, within the report.
        path: of its file.
        profile: what the file says, without its scores.
        ranks: int32 ``[channels]``, as ``rank_channels``; all modules one behind the other.
        ordered: float32 ``[channels]``, the scores of the channels that take part, ascending.
        thresholds: float32 ``[thresholds]``, ascending; the same for all profiles of one criterion.
        exceeding: int64 ``[modules, thresholds]``: how many of a module's channels have a score above a threshold.
        damage: of attributions float32 ``[channels]``, that of the channels that take part, ascending; else empty.
    """

    label: str
    stem: str
    path: Path
    profile: Profile
    ranks: NDArray[np.int32]
    ordered: NDArray[np.float32]
    thresholds: NDArray[np.float32]
    exceeding: NDArray[np.int64]
    damage: NDArray[np.float32]

    def score_at(self, density: float) -> float:
        """The smallest score of the top channels of a density."""
        return float(self.ordered[-max(1, math.floor(validate_density(density) * len(self.ordered)))])


@dataclass(frozen=True, eq=False)
class Pair:
    """All profiles of one target and one ability model by one criterion, and those without data.

    Attributes:
        label: names both models, and the criterion if it is not the only one or not the paper's.
        abilities: the profiles that were made by samples, of one criterion.
        controls: those without data, by criterion: ``weight`` and ``random``.
    """

    label: str
    abilities: tuple[Scored, ...]
    controls: tuple[Scored, ...]

    @property
    def criterion(self) -> str:
        """Of the abilities."""
        return self.abilities[0].profile.criterion if self.abilities else "activation"

    @property
    def weights(self) -> tuple[Scored, ...]:
        """Those by weight change."""
        return tuple(scored for scored in self.controls if scored.profile.criterion == "weight")


class Comparison:
    """Profiles of one backbone, ranked once, so that any density can be asked of them.

    Attributes:
        layout: of all of them.
        modules: the modules that take part.
        taking_part: number of their channels.
        pairs: the profiles by pair, in the order given.
        density: at which masks are compared.
        groups: the modules that take part, by kind and layer.
    """

    def __init__(self, layout: Layout, modules: Sequence[str], pairs: Sequence[Pair], density: float) -> None:
        self.layout, self.modules, self.pairs, self.density = layout, tuple(modules), tuple(pairs), density
        self.sizes = np.array([math.prod(layout.channel_shape(module)) for module in layout.modules])
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.taking_part = layout.channel_count(self.modules)
        self.groups = Groups(self.modules, layout.modules)

    def top_count(self, density: float) -> int:
        """How many channels an ability keeps."""
        return max(1, math.floor(validate_density(density) * self.taking_part))

    def selections(self, abilities: Sequence[Scored]) -> NDArray[np.bool_]:
        """The top channels of each ability: ``[abilities, channels]``."""
        k = self.top_count(self.density)
        return np.stack([scored.ranks < k for scored in abilities])

    def per_module(self, selection: NDArray[np.bool_]) -> dict[str, int]:
        """Module -> how many of its channels are selected, of a selection ``[channels]``."""
        counts = np.add.reduceat(selection, self._starts, dtype=np.int64)
        return dict(zip(self.layout.modules, map(int, counts), strict=True))

    def moved(self, ranks: NDArray[np.int32]) -> list[tuple[int, int]]:
        """(channels, parameters) that each of ``DENSITIES`` selects.

        Args:
            ranks: of an ability; or the smallest of several abilities', for their union.
        """
        limits = [self.top_count(density) for density in DENSITIES]
        level = np.searchsorted(limits, ranks, side="right")
        module = np.repeat(np.arange(len(self.sizes)), self.sizes)
        width = len(limits) + 1
        counts = np.bincount(module * width + level, minlength=len(self.sizes) * width).reshape(-1, width)
        reached = np.cumsum(counts, axis=1)[:, :-1]
        counted = (dict(zip(self.layout.modules, column.tolist(), strict=True)) for column in reached.T)
        return [(sum(counts.values()), self.layout.parameters_owned(counts)) for counts in counted]

    def above(self, scored: Scored, modules: Iterable[str]) -> NDArray[np.float64]:
        """The fraction of these modules' channels with a score above each threshold."""
        rows = [self._place[module] for module in modules]
        return np.asarray(scored.exceeding[rows].sum(0) / self.sizes[rows].sum())

    @cached_property
    def _place(self) -> dict[str, int]:
        return {module: place for place, module in enumerate(self.layout.modules)}


@dataclass(frozen=True, eq=False)
class _Loaded:
    path: Path
    profile: Profile
    scores: NDArray[np.float32]
    damage: NDArray[np.float32]
    ranks: NDArray[np.int32]


def load_comparison(paths: Sequence[Path], density: float, *, exclude: Sequence[str] = ()) -> Comparison:
    """Read profiles and rank their channels.

    Args:
        paths: of profiles of one backbone; of any number of pairs, abilities and criteria.
        density: at which their masks are compared.
        exclude: globs of modules that take no part.

    Raises:
        FileNotFoundError: a file does not exist.
        ArtifactError: a file is no valid profile.
        ValueError: a file is named twice, the profiles are of different backbones, do not know the shapes of their
            parameters, or the density is not in (0, 1].
    """
    validate_density(density)
    twice = {path for path in paths if [other.resolve() for other in paths].count(path.resolve()) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(map(str, twice)))}: a profile is named twice")
    loaded: list[_Loaded] = []
    for path in paths:
        profile = load_profile(path)
        first = loaded[0].profile.layout if loaded else profile.layout
        if not profile.layout.fits(first):
            raise ValueError(f"{paths[0]} and {path} are of models with different modules; a report is of one backbone")
        if profile.layout.shapes is None:
            raise ValueError(f"{path} does not know its model's parameter shapes; profile the pair again")
        ranks = rank_channels(profile, exclude=exclude).numpy().astype(np.int32)
        scores, damage = (
            torch.cat([own[module].flatten() for module in first.modules]).numpy() if own else np.empty(0, np.float32)
            for own in (profile.scores, profile.damage)
        )
        bare = replace(profile, layout=first, scores={}, damage={})
        loaded.append(_Loaded(path, bare, scores, damage, ranks))
    layout = loaded[0].profile.layout
    excluded = excluded_modules(layout, exclude)
    modules = [module for module in layout.modules if module not in excluded]
    if not modules:
        raise ValueError(f"no module is left after excluding {', '.join(exclude)}")
    return Comparison(layout, modules, _pairs(loaded, layout, set(modules)), density)


def _pairs(loaded: Sequence[_Loaded], layout: Layout, modules: set[str]) -> list[Pair]:
    sizes = [math.prod(layout.channel_shape(module)) for module in layout.modules]
    takes_part = np.repeat([module in modules for module in layout.modules], sizes)
    module_of = np.repeat(np.arange(len(sizes)), sizes)
    ordered = [np.sort(one.scores[takes_part]) for one in loaded]
    thresholds = _thresholds([one.profile.criterion for one in loaded], ordered)
    groups: dict[tuple[str, str], list[int]] = {}
    for place, one in enumerate(loaded):
        groups.setdefault((_identity(one.profile.target), _identity(one.profile.ability_model)), []).append(place)
    pair_labels = _pair_labels([loaded[places[0]].profile for places in groups.values()])
    pairs, stems = [], set[str]()

    def scored(label: str, place: int) -> Scored:
        one, own = loaded[place], thresholds[loaded[place].profile.criterion]
        exceeding = _exceeding(one.scores, own, module_of, len(sizes))
        damage = np.sort(one.damage[takes_part]) if len(one.damage) else one.damage
        stem = _stem(label, stems)
        return Scored(label, stem, one.path, one.profile, one.ranks, ordered[place], own, exceeding, damage)

    for pair_label, places in zip(pair_labels, groups.values(), strict=True):
        controls = [place for place in places if loaded[place].profile.criterion in WITHOUT_DATA]
        by_criterion: dict[str, list[int]] = {}
        for place in places:
            if place not in controls:
                by_criterion.setdefault(loaded[place].profile.criterion, []).append(place)
        control_labels = _labels([loaded[place] for place in controls])
        without_data = tuple(scored(label, place) for label, place in zip(control_labels, controls, strict=True))
        for criterion, own_places in (by_criterion or {"activation": []}).items():
            labels = _labels([loaded[place] for place in own_places])
            abilities = tuple(scored(label, place) for label, place in zip(labels, own_places, strict=True))
            plain = criterion == "activation" and len(by_criterion) < 2
            pairs.append(Pair(pair_label if plain else f"{pair_label}, {criterion}", abilities, without_data))
    return pairs


def _exceeding(
    scores: NDArray[np.float32], thresholds: NDArray[np.float32], module_of: NDArray[np.int64], modules: int
) -> NDArray[np.int64]:
    """``[modules, thresholds]``: the number of scores above each threshold."""
    width = len(thresholds) + 1
    # bucket b: above b thresholds
    bucket = torch.bucketize(torch.from_numpy(scores), torch.from_numpy(thresholds)).numpy()
    counts = np.bincount(module_of * width + bucket, minlength=modules * width).reshape(modules, width)
    return np.asarray(counts[:, ::-1].cumsum(1)[:, ::-1][:, 1:])


def _thresholds(criteria: Sequence[str], ordered: Sequence[NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
    """For each criterion logarithmic steps from a score that nearly all channels exceed to the largest one."""
    found = {}
    for criterion in dict.fromkeys(criteria):
        own = [scores for its, scores in zip(criteria, ordered, strict=True) if its == criterion]
        positive = [scores[np.searchsorted(scores, 0, side="right") :] for scores in own]
        top = max((float(scores[-1]) for scores in positive if len(scores)), default=1.0)
        low = min((float(scores[len(scores) // 100]) for scores in positive if len(scores)), default=top / 10)
        found[criterion] = np.geomspace(max(low, top * 1e-8), top, _STEPS, dtype=np.float32)
    return found


def _identity(model: Mapping[str, Any]) -> str:
    return str(model.get("fingerprint") or f"{model.get('model')}@{model.get('revision')}")


def _pair_labels(profiles: Sequence[Profile]) -> list[str]:
    """Both models' names without their users; what that leaves ambiguous is numbered."""
    found: list[str] = []
    for profile in profiles:
        source, target = (str(m.get("model")).rpartition("/")[2] for m in (profile.ability_model, profile.target))
        found.append(escape(f"{source} → {target}"))
    return _unique(found)


def _labels(files: Sequence[_Loaded]) -> list[str]:
    """The ability's name; with its file where several have it."""
    names = [one.profile.ability for one in files]
    return _unique(
        [
            escape(name if names.count(name) == 1 else f"{name} ({one.path})")
            for name, one in zip(names, files, strict=True)
        ]
    )


def _stem(label: str, taken: set[str]) -> str:
    """A file name that no other has, not even where case does not count."""
    stem = first = file_name(label)
    for number in itertools.count(2):
        if stem.lower() not in taken:
            break
        stem = f"{first}-{number}"
    taken.add(stem.lower())
    return stem


def _unique(labels: Sequence[str]) -> list[str]:
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[: place + 1].count(label)}"
        for place, label in enumerate(labels)
    ]
