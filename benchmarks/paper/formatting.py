"""How numbers are shown on the page of results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scoring import Interval

__all__ = ["markdown", "percentages", "spread", "with_interval"]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; its first column has names."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def spread(values: Sequence[float]) -> str:
    """The mean, and the smallest and the largest if there are several."""
    if not values or math.isnan(values[0]):
        return ""
    shown = f"{np.mean(values):.2f}"
    return f"{shown} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else shown


def with_interval(value: float, interval: Interval) -> str:
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def percentages(shares: np.ndarray, digits: int = 0) -> str:
    """The smallest and the largest."""
    low, high = (f"{100 * share:.{digits}f}" for share in (shares.min(), shares.max()))
    return f"{low} %" if low == high else f"{low} to {high} %"
