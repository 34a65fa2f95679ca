"""Rules that say what is moved, and models that are merged by them."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from experiment import Experiment, Setting
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_act.abilities import Tokenizers, collect_samples, load_abilities
from mergekit_act.artifacts import Mask, Profile, load_profile, save_mask, save_profile
from mergekit_act.checkpoints import open_checkpoint
from mergekit_act.data.schema import AbilitiesFile
from mergekit_act.models import load_model
from mergekit_act.planning import plan_merge
from mergekit_act.profiling import ProfilingSettings, open_pair, profile_pair, write_profiles
from mergekit_act.selection import Retention, excluded_modules, make_mask, rank_channels
from mergekit_act.sweeping import PatchedModel

__all__ = [
    "CONTROLS",
    "PAPER",
    "QUICK",
    "RULES",
    "SHARES",
    "Merges",
    "Point",
    "Rule",
    "make_profiles",
    "points",
    "without_damage",
]

SHARES = (0.01, 0.05, 0.2, 0.5)
FEW = (0.05, 0.2)
WEIGHTS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.15, 0.1)


@dataclass(frozen=True)
class Rule:
    """What is moved.

    Attributes:
        name: in tables.
        criterion: of the profiles by which channels are ranked; None takes all.
        exclude: whether the setting's modules are left out.
        retain: whether what the kept abilities would lose is taken into account.
        fit: whether rows are fitted.
        method: mergekit's.
        shares: of what is moved; densities of mergekit's methods.
        of: shares are of the ``parameters``, of the ``channels``, or densities of ``each`` ability, as the paper's.
        weights: tried from the largest on, until the kept abilities keep enough.
    """

    name: str
    criterion: str | None = None
    exclude: bool = True
    retain: bool = False
    fit: bool = False
    method: str = "act"
    shares: Sequence[float] = SHARES
    of: str = "parameters"
    weights: Sequence[float] = WEIGHTS


PAPER = Rule("ACT, as in the paper", "activation", exclude=False)
RULES = (
    Rule("task arithmetic", method="task_arithmetic", shares=(1.0,)),
    Rule("TIES", method="ties", shares=(0.2, 0.5)),
    Rule("DARE", method="dare_linear", shares=(0.2, 0.5)),
    Rule("DELLA", method="della_linear", shares=(0.2, 0.5)),
    PAPER,
    Rule("local", "local"),
    Rule("attribution", "attribution"),
    Rule("attribution, fitted", "attribution", fit=True),
    Rule("attribution over damage", "attribution", retain=True),
    Rule("attribution over damage, fitted", "attribution", retain=True, fit=True),
    Rule("all rows, fitted", fit=True, shares=(1.0,)),
)
QUICK = [  # to see that everything runs: mergekit's methods, the paper's rule, and the one that does most
    replace(rule, shares=rule.shares[-1:], weights=(0.5,))
    for rule in RULES
    if rule.method != "act" or rule == PAPER or (rule.retain and rule.fit)
]
CONTROLS = (
    Rule("random", "random", shares=FEW),
    Rule("weight change", "weight", shares=FEW),
    Rule("activation, head and embedding left out", "activation", shares=FEW),
    Rule("activation, centered logits", "centered", exclude=False, shares=FEW),
    Rule("activation over all tokens", "all-tokens", exclude=False, shares=FEW),
    Rule("activation, equal shares of every module", "per-module", exclude=False, shares=FEW),
    *(Rule(f"attribution of {n} samples", f"attribution-{n}", shares=(0.05,)) for n in (2, 8)),
    Rule("activation, equal channels", "activation", exclude=False, shares=FEW, of="channels"),
    Rule("attribution, equal channels", "attribution", shares=FEW, of="channels"),
    Rule("random, equal channels", "random", shares=FEW, of="channels"),
    Rule("activation, 1 % of each, weight 0.4", "activation", exclude=False, shares=(0.01,), of="each", weights=(0.4,)),
    Rule("activation, 9 % of each, weight 0.7", "activation", exclude=False, shares=(0.09,), of="each", weights=(0.7,)),
)


def without_damage(rules: Sequence[Rule]) -> list[Rule]:
    """The rules for merges that have nothing to keep: more is moved, up to the paper's 90 % and about its 0.6."""
    return [
        replace(
            rule,
            shares=(0.2, 0.5, 0.9) if len(rule.shares) > 1 else rule.shares,
            weights=tuple(sorted({*rule.weights, 0.6}, reverse=True)) if len(rule.weights) > 1 else rule.weights,
        )
        for rule in rules
        if not rule.retain
    ]


@dataclass(frozen=True)
class Point:
    """A merge: by which rule, of which share, with which weight."""

    rule: Rule
    share: float
    weight: float

    @property
    def key(self) -> str:
        return f"{self.rule.name} {self.share:g} {self.weight:g}"


def points(rule: Rule) -> Iterator[list[Point]]:
    """For each share its points, from the largest weight on."""
    for share in rule.shares:
        yield [Point(rule, share, weight) for weight in rule.weights]


def make_profiles(setting: Setting, file: Path, folder: Path, criteria: Sequence[str]) -> dict[str, list[Profile]]:
    """Criterion -> profiles of a file's abilities (one of the pair, for criteria without data); made where missing."""
    kinds: Mapping[str, Mapping[str, Any]] = {
        "random": {"criterion": "random"},
        "weight": {"criterion": "weight"},
        "activation": {},
        "centered": {"center_logits": True},
        "local": {"criterion": "local"},
        "attribution": {"criterion": "attribution", "inputs": True},
    }
    abilities = load_abilities(file)
    found = {}
    for name in criteria:
        out = folder / name
        names = [name] if name in ("random", "weight") else list(abilities.abilities)
        if not all((out / f"{one}.safetensors").exists() for one in names):
            if name in kinds:
                settings = ProfilingSettings(dtype=setting.dtype, device=setting.device, **kinds[name])
                write_profiles(abilities, out, settings)
            elif name == "per-module":
                for profile in make_profiles(setting, file, folder, ["activation"])["activation"]:
                    scores = {module: _ranked(scores) for module, scores in profile.scores.items()}
                    save_profile(
                        replace(profile, scores=scores), out / f"{profile.ability}.safetensors", overwrite=True
                    )
            else:
                _profile_by_other_samples(setting, abilities, name, out)
        found[name] = [load_profile(out / f"{one}.safetensors") for one in names]
    return found


def _ranked(scores: Tensor) -> Tensor:
    """Places in the module, as shares: the largest score gets 1."""
    return (scores.flatten().argsort().argsort().view(scores.shape) + 1) / scores.numel()


def _profile_by_other_samples(setting: Setting, file: AbilitiesFile, name: str, out: Path) -> None:
    """Profiles by all tokens, or by the first samples only."""
    criterion, _, count = name.partition("-")
    pair = open_pair(file.target, file.ability_model)
    tokenizers = Tokenizers(file.target, file.ability_model)
    abilities = []
    for ability in file.abilities:
        samples = collect_samples(file, ability, tokenizers)
        some = samples.samples[: int(count)] if count.isdigit() else samples.samples
        if name == "all-tokens":
            some = tuple(replace(sample, is_answer=torch.ones_like(sample.is_answer)) for sample in some)
        abilities.append(replace(samples, samples=some))
    chosen = "activation" if name == "all-tokens" else criterion
    settings = ProfilingSettings(dtype=setting.dtype, device=setting.device, criterion=chosen)
    for profile in profile_pair(pair, abilities, settings):
        save_profile(profile, out / f"{profile.ability}.safetensors", overwrite=True)


class Merges:
    """Merges of an experiment, in memory or written.

    Args:
        setting: to which it belongs.
        experiment: whose models are merged.
        folder: for profiles; what is there is used.
        criteria: by which to profile.
    """

    def __init__(self, setting: Setting, experiment: Experiment, folder: Path, criteria: Sequence[str]) -> None:
        self._setting, self._experiment, self._folder, self._criteria = setting, experiment, folder, criteria
        self.files = [load_abilities(path) for path in experiment.files]
        self._ability_models = [ModelReference.parse(file.ability_model) for file in self.files]
        self._planned: tuple[Rule, float] | None = None

    @cached_property
    def profiles(self) -> list[dict[str, list[Profile]]]:
        """Of each file: criterion -> profiles."""
        self._experiment.prepare()
        files = enumerate(self._experiment.files)
        return [make_profiles(self._setting, path, self._folder / str(n), self._criteria) for n, path in files]

    @cached_property
    def _patched(self) -> PatchedModel:
        return PatchedModel(self._load(self.files[0].target), getattr(torch, self._setting.dtype))

    def _load(self, model: str | Path) -> Any:
        self._experiment.prepare()
        dtype = getattr(torch, self._setting.dtype)
        return load_model(open_checkpoint(str(model)), device=self._setting.device, dtype=dtype)

    @contextmanager
    def loaded(self, model: str | Path) -> Iterator[Any]:
        """A model of the experiment, in the setting's dtype and on its device."""
        yield self._load(model)

    @contextmanager
    def of_target(self) -> Iterator[Any]:
        """The target, as it is."""
        yield self._patched.model

    @contextmanager
    def merged(self, point: Point) -> Iterator[Any]:
        """The merged model, in memory."""
        if point.rule.method != "act":
            with tempfile.TemporaryDirectory(dir=self._folder) as out:
                self.write(point, Path(out))
                yield self._load(out)
            return
        if self._planned != (point.rule, point.share):
            with tempfile.TemporaryDirectory() as masks:
                self._patched.take(plan_merge(self._config(point, Path(masks)), MergeOptions()))
            self._planned = (point.rule, point.share)
        with self._patched.patched(dict.fromkeys(self._ability_models, point.weight)) as model:
            yield model

    def write(self, point: Point, out: Path) -> None:
        """What mergekit writes for a point."""
        self._experiment.prepare()
        with tempfile.TemporaryDirectory() as masks:
            device = self._setting.device
            options = MergeOptions(quiet=True, random_seed=0, copy_tokenizer=True, device=device)
            run_merge(self._config(point, Path(masks)), str(out), options)

    def unload(self) -> None:
        """Give the target's memory back; it is loaded again when it is needed."""
        vars(self).pop("_patched", None)
        self._planned = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def moved(self, point: Point) -> dict[str, float]:
        """Shares of the channels and of the parameters that a point moves, mean over the ability models."""
        if point.rule.method != "act":
            return {"channels": point.share, "parameters": point.share}
        counts = [self._mask(point, n).counts for n in range(len(self.files))]
        return {
            kind: sum(one[kind] / one[f"{kind}_total"] for one in counts) / len(counts)
            for kind in ("channels", "parameters")
        }

    def _config(self, point: Point, masks: Path) -> MergeConfiguration:
        models = []
        for n, file in enumerate(self.files):
            own: dict[str, Any] = {"weight": point.weight}
            if point.rule.method != "act":
                own |= {"density": point.share} if point.rule.method != "task_arithmetic" else {}
                if point.rule.method == "della_linear":  # a density plus or minus it has to lie in (0, 1)
                    own["epsilon"] = min(0.1, (1 - point.share) / 2)
            else:
                own["mask"] = str(masks / f"{n}.safetensors")
                if not Path(own["mask"]).exists():
                    save_mask(self._mask(point, n), own["mask"])
            if point.rule.fit:
                own["fit"] = str(self._folder / str(n) / "attribution" / "fit" / "inputs.safetensors")
                if all(ability.role == "recover" for ability in file.abilities.values()):
                    own["fit_keep"] = 0
            models.append({"model": file.ability_model, "parameters": own})
        written = {
            "merge_method": point.rule.method,
            "base_model": self.files[0].target,
            "models": models,
            "dtype": self._setting.dtype,
        }
        if point.rule.method not in ("act", "task_arithmetic"):
            written["parameters"] = {"normalize": False}  # or the weight of a single model would do nothing
        return MergeConfiguration.model_validate(written)

    def _mask(self, point: Point, place: int) -> Mask:
        rule, profiles, file = point.rule, self.profiles[place], self.files[place]
        options: dict[str, Any] = {"exclude": self._setting.exclude if rule.exclude else ()}
        own = profiles[rule.criterion or "weight"]
        if len(own) > 1 or own[0].ability in file.abilities:
            roles = {name: ability.role for name, ability in file.abilities.items()}
            kept = [profile for profile in own if roles[profile.ability] == "keep"]
            own = [profile for profile in own if roles[profile.ability] == "recover"]
            if rule.retain and kept:
                options["retain"] = Retention(kept)
        density = point.share if rule.of == "each" or rule.criterion is None else _density_of(own, point, options)
        return make_mask(own, density, **options)


def _density_of(profiles: Sequence[Profile], point: Point, options: Mapping[str, Any]) -> float:
    """The density per profile with which their union has the point's share of the parameters, or of the channels."""
    layout = profiles[0].layout
    sizes = torch.tensor([profiles[0].scores[module].numel() for module in layout.modules])
    owned = torch.repeat_interleave(torch.tensor([layout.parameters_per_channel(m) for m in layout.modules]), sizes)
    every = layout.parameter_count()
    if point.rule.of == "channels":
        owned, every = torch.ones_like(owned), int(sizes.sum())
    # A channel is in the union of the profiles' first k if its best rank is below k.
    ranks = torch.stack([rank_channels(profile, **options) for profile in profiles]).amin(0)
    ranked = ranks < len(ranks)
    total = torch.zeros(len(ranks), dtype=torch.long)
    total.index_add_(0, ranks[ranked], owned[ranked])
    k = max(1, int((total.cumsum(0) <= point.share * every).sum()))
    excluded = excluded_modules(layout, options.get("exclude", ()))
    taking_part = sum(int(n) for module, n in zip(layout.modules, sizes, strict=True) if module not in excluded)
    return min(1.0, (k + 0.5) / taking_part)
