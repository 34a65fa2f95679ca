"""The paper's findings: how activation differences are spread, and how masks of the top 1 % overlap."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from experiment import Setting
from rules import make_profiles

from mergekit_act.abilities import load_abilities
from mergekit_act.artifacts import Profile
from mergekit_act.groups import Groups
from mergekit_act.selection import common_counts, rank_channels

__all__ = ["Found", "find"]

TOP = 0.01


@dataclass(frozen=True)
class Found:
    """What profiles of some pairs show; the top are 1 % of the channels.

    Attributes:
        pairs: names of the pairs.
        abilities: names of the abilities.
        held: ``[pairs, abilities]``: the top's share of the sum of all scores.
        in_head: likewise: how many of the top are the head's.
        layers: likewise: the share of the top in the layer that has most of it.
        overlap: ``[pairs, abilities, abilities]`` of tops, |A ∩ B| / |A| (tables 1 and 5, figure 20).
        weights: ``[pairs, abilities]``, with the largest changes of weights (table 2).
        across: ``[pairs, pairs, abilities]``: of one ability by two pairs (figure 3).
    """

    pairs: Sequence[str]
    abilities: Sequence[str]
    held: np.ndarray
    in_head: np.ndarray
    layers: np.ndarray
    overlap: np.ndarray
    weights: np.ndarray
    across: np.ndarray


def find(setting: Setting, folder: Path, *, exclude: Sequence[str] = ()) -> Found:
    """Profile the pairs where that is still to be done, write a report of the first, and compare."""
    profiles: list[list[Profile]] = []
    weights: list[Profile] = []
    for pair in setting.pairs:
        pair.prepare()
        out = folder / pair.name
        made = make_profiles(setting, pair.files[0], out, ["activation", "weight"])
        profiles.append(made["activation"])
        weights += made["weight"]
        if pair == setting.pairs[0] and not (out / "report").exists():
            names = [f"activation/{profile.ability}" for profile in made["activation"]] + ["weight/weight"]
            files = [str(out / f"{name}.safetensors") for name in names]
            command = [sys.executable, "-m", "mergekit_act", "report", *files, "-o", str(out / "report"), "--quiet"]
            subprocess.run([*command, "--density", str(TOP)], check=True)
    abilities = list(load_abilities(setting.pairs[0].files[0]).abilities)
    tops = np.stack([np.stack([_top(profile, exclude) for profile in some]) for some in profiles])
    by_weight = np.stack([_top(profile, exclude) for profile in weights])
    counts = common_counts(tops.reshape(-1, tops.shape[-1])).reshape(2 * tops.shape[:2])
    size = tops[0, 0].sum()
    places = range(len(profiles))

    def of_each(measure: Callable[[Profile, np.ndarray], float]) -> np.ndarray:
        both = zip(profiles, tops, strict=True)
        return np.array([[measure(p, t) for p, t in zip(some, own, strict=True)] for some, own in both])

    return Found(
        pairs=[pair.name for pair in setting.pairs],
        abilities=abilities,
        held=of_each(_held),
        in_head=of_each(_head_share),
        layers=of_each(_fullest),
        overlap=np.stack([counts[n, :, n] / size for n in places]),
        weights=(tops & by_weight[:, None]).sum(-1) / size,
        across=np.stack([np.stack([np.diagonal(counts[n, :, m]) / size for m in places]) for n in places]),
    )


def _top(profile: Profile, exclude: Sequence[str]) -> np.ndarray:
    """bool ``[channels]``: the first 1 % of those that take part."""
    ranks = rank_channels(profile, exclude=exclude).numpy()
    return ranks < max(1, round(TOP * int((ranks < len(ranks)).sum())))


def _held(profile: Profile, top: np.ndarray) -> float:
    scores = np.concatenate([scores.flatten().numpy() for scores in profile.scores.values()]).astype(np.float64)
    return float(scores[top].sum() / scores.sum())


def _share_by_module(profile: Profile, top: np.ndarray) -> dict[str, float]:
    """Module -> its share of the top."""
    ends = np.cumsum([scores.numel() for scores in profile.scores.values()])
    parts = np.split(top, ends[:-1])
    return {module: float(part.sum() / top.sum()) for module, part in zip(profile.scores, parts, strict=True)}


def _head_share(profile: Profile, top: np.ndarray) -> float:
    return sum(share for module, share in _share_by_module(profile, top).items() if module.endswith("lm_head"))


def _fullest(profile: Profile, top: np.ndarray) -> float:
    shares = _share_by_module(profile, top)
    layers = Groups(list(profile.scores)).layers
    return max(sum(shares[module] for module in modules) for modules in layers.values())
