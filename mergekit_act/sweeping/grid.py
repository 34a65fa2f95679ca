"""The points of a sweep: densities and weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mergekit_act.files import file_hash
from mergekit_act.selection import validate_density

__all__ = ["Grid", "Point"]

DENSITIES = (0.01, 0.02, 0.05, 0.1)
WEIGHTS = (0.2, 0.4, 0.7, 1.0)
# Appendix A of the paper: steps of 1 % up to 10 %, of 5 % beyond; λ from 0.1 to 0.9.
PAPER_DENSITIES = tuple(percent / 100 for percent in (*range(1, 11), *range(15, 101, 5)))
PAPER_WEIGHTS = tuple(tenths / 10 for tenths in range(1, 10))


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        density: what each profile keeps.
        weights: of each ability model, in the config's order.
        criterion: of the profiles, if the config names some by several.
        fit: the file of inputs that selected rows are fitted to; none if empty.
        fit_hash: of that file, so that scores are of what it holds.
    """

    density: float
    weights: tuple[float, ...]
    criterion: str = ""
    fit: str = ""
    fit_hash: str = ""

    @property
    def mask(self) -> tuple[float, str, str]:
        """All but the weights: points that agree in it have one plan."""
        return self.density, self.criterion, self.fit

    @property
    def fit_key(self) -> str:
        """The file and its hash, as scores are kept under it."""
        return f"{self.fit}#{self.fit_hash}" if self.fit else ""


@dataclass(frozen=True)
class Grid:
    """Which points are made.

    Attributes:
        kind: ``default`` (4 × 4) or ``paper`` (28 × 9).
        densities: in place of the kind's.
        weights: likewise.
        per_model: every combination of weights, instead of one weight for all models.
        criteria: of the profiles that the config names, each by itself; none takes all as they are.
        fits: files of inputs: each point also with its rows fitted to each of these.
    """

    kind: Literal["default", "paper"] = "default"
    densities: Sequence[float] = ()
    weights: Sequence[float] = ()
    per_model: bool = False
    criteria: Sequence[str] = ()
    fits: Sequence[str] = ()

    def points(self, models: int) -> list[Point]:
        """All points for so many ability models, mask by mask.

        Raises:
            ValueError: a density is not in (0, 1], or a weight is 0 or not finite.
            FileNotFoundError: a file of inputs does not exist.
        """
        densities = tuple(self.densities) or (PAPER_DENSITIES if self.kind == "paper" else DENSITIES)
        weights = tuple(self.weights) or (PAPER_WEIGHTS if self.kind == "paper" else WEIGHTS)
        for density in densities:
            validate_density(density)
        for weight in weights:
            if not math.isfinite(weight) or weight == 0:
                raise ValueError(f"weight is {weight}; expected a number other than 0, such as 0.4")
        for fit in self.fits:
            if not Path(fit).is_file():
                raise FileNotFoundError(f"{fit} is no file; profile --inputs writes such files, fit/inputs.safetensors")
        hashes = {"": "", **{fit: file_hash(Path(fit))[:16] for fit in self.fits}}
        alike = ((weight,) * models for weight in weights)
        shared = sorted(dict.fromkeys(itertools.product(weights, repeat=models) if self.per_model else alike))
        return [
            Point(density, some, criterion, fit, hashes[fit])
            for criterion in dict.fromkeys(self.criteria or ("",))
            for fit in dict.fromkeys(("", *self.fits))
            for density in sorted(set(densities))
            for some in shared
        ]
