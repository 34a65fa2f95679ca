"""The paper's findings: how activation differences are spread, and how masks of the top 1 % overlap."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from experiment import Setting
from rules import make_profiles

from mergekit_act.abilities import load_abilities
from mergekit_act.artifacts import Profile
from mergekit_act.groups import Groups
from mergekit_act.selection import common_counts, select_channels

__all__ = ["Found", "find"]

TOP = 0.01


@dataclass(frozen=True)
class Found:
    """What profiles of some pairs show; the top are 1 % of the channels.

    Attributes:
        pairs: names of the pairs.
        abilities: names of the abilities.
        held: ``[pairs, abilities]``: the top's share of the sum of all scores.
        head: likewise: how many of the top are the head's.
        kinds: likewise: the module kind that has most of the top, its share of the top, and its share of all channels.
        layers: likewise, of layers.
        overlap: ``[pairs, abilities, pairs, abilities]`` of tops, |A ∩ B| / |A| (tables 1 and 5, figures 3 and 20).
        weights: ``[pairs, abilities]``, with the largest changes of weights (table 2).
    """

    pairs: Sequence[str]
    abilities: Sequence[str]
    held: np.ndarray
    head: np.ndarray
    kinds: list[list[Fullest]]
    layers: list[list[Fullest]]
    overlap: np.ndarray
    weights: np.ndarray


Fullest = tuple[str, float, float]


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
    tops = np.stack([np.stack([_top(profile, exclude) for profile in some]) for some in profiles])
    by_weight = np.stack([_top(profile, exclude) for profile in weights])
    size = tops[0, 0].sum()
    groups = Groups(list(profiles[0][0].scores))
    with_tops = [list(zip(*both, strict=True)) for both in zip(profiles, tops, strict=True)]
    shares = [[_shares(profile, top) for profile, top in some] for some in with_tops]
    return Found(
        pairs=[pair.name for pair in setting.pairs],
        abilities=list(load_abilities(setting.pairs[0].files[0]).abilities),
        held=np.array([[_held(profile, top) for profile, top in some] for some in with_tops]),
        head=np.array([[of.get("lm_head", (0.0, 0.0))[0] for of in some] for some in shares]),
        kinds=[[_fullest(groups.kinds, of) for of in some] for some in shares],
        layers=[[_fullest(groups.layers, of) for of in some] for some in shares],
        overlap=common_counts(tops.reshape(-1, tops.shape[-1])).reshape(2 * tops.shape[:2]) / size,
        weights=(tops & by_weight[:, None]).sum(-1) / size,
    )


def _top(profile: Profile, exclude: Sequence[str]) -> np.ndarray:
    """bool ``[channels]``: the first 1 % of those that take part."""
    chosen = select_channels(profile, TOP, exclude=exclude)
    parts = [chosen[m].flatten() if m in chosen else torch.zeros(s.numel()) for m, s in profile.scores.items()]
    return torch.cat(parts).bool().numpy()


def _held(profile: Profile, top: np.ndarray) -> float:
    scores = np.concatenate([scores.flatten().numpy() for scores in profile.scores.values()]).astype(np.float64)
    return float(scores[top].sum() / scores.sum())


def _shares(profile: Profile, top: np.ndarray) -> dict[str, tuple[float, float]]:
    """Module -> its share of the top, and of all channels."""
    sizes = [scores.numel() for scores in profile.scores.values()]
    parts = np.split(top, np.cumsum(sizes)[:-1])
    return {
        module: (float(part.sum() / top.sum()), len(part) / len(top))
        for module, part in zip(profile.scores, parts, strict=True)
    }


def _fullest(groups: Mapping[str, Sequence[str]], shares: Mapping[str, tuple[float, float]]) -> Fullest:
    """Of groups of modules the one with most of the top: its name, its share of the top, and of all channels."""
    found = [(name, *np.sum([shares[module] for module in modules], axis=0)) for name, modules in groups.items()]
    name, of_top, of_all = max(found, key=lambda one: one[1])
    return name, float(of_top), float(of_all)
