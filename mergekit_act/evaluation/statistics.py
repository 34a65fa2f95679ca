"""Means over samples, with bootstrap intervals; differences between models by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

__all__ = ["RESAMPLES", "Interval", "Measure", "measure"]

RESAMPLES = 10_000
_AT_ONCE = 1000

Interval = tuple[float, float]
Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Measure:
    """A mean over samples.

    Attributes:
        value: the mean.
        interval: its 95 % bootstrap interval; None for a single sample.
        difference: the mean minus the first model's; None for the first model.
        difference_interval: the 95 % interval of that, both models measured on the same resampled samples.
    """

    value: float
    interval: Interval | None
    difference: float | None = None
    difference_interval: Interval | None = None


def measure(sums: Numbers, counts: Numbers, first: Numbers | None = None, *, seed: int = 0) -> Measure:
    """The mean per counted thing, Σ sums / Σ counts, over samples.

    Args:
        sums: ``[samples]``.
        counts: ``[samples]``, such as answer tokens, or ones.
        first: ``[samples]``, the sums of the model to compare with.
        seed: of the resampling.
    """
    sums, counts = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    value, interval = _mean(sums, counts, seed)
    if first is None:
        return Measure(value, interval)
    return Measure(value, interval, *_mean(sums - np.asarray(first, dtype=float), counts, seed))


def _mean(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, Interval | None]:
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return value, None
    found = bootstrap(
        (sums, counts),
        lambda some, of, axis: some.sum(axis=axis) / of.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=_AT_ONCE,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return value, (float(found.low), float(found.high))
