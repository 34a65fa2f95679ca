"""Sums of absolute activation differences per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_act.channels import Layout

__all__ = ["DifferenceSums"]

# Numbers whose differences are computed together: on a CPU they should stay in its cache.
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 27


class DifferenceSums:
    """Sums and counts, kept apart: float64 sums in one vector in layout order, and how many rows each module had.

    Args:
        layout: the channels.
        device: where the sums are kept and the differences computed.
    """

    def __init__(self, layout: Layout, device: str) -> None:
        sizes = [layout.channel_count([module]) for module in layout.modules]
        self.vector = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.sums = dict(zip(layout.modules, torch.split(self.vector, sizes), strict=True))
        self.counts = dict.fromkeys(layout.modules, 0)
        self._block = max(_CPU_BLOCK if device == "cpu" else _DEVICE_BLOCK, *sizes)
        self._scratch = torch.empty(self._block, device=device)

    def add(self, module: str, target: Sequence[Tensor], ability_model: Sequence[Tensor]) -> None:
        """Add abs(ability_model − target), in parts of ``[rows, channels]``; of two vocabularies what both have."""
        for ours, theirs in zip(target, ability_model, strict=True):
            channels = min(ours.shape[-1], theirs.shape[-1])
            block = max(1, self._block // channels)
            for some, others in zip(torch.split(ours, block), torch.split(theirs, block), strict=True):
                difference = self._scratch[: len(some) * channels].view(len(some), channels)
                if others.dtype == torch.float32:
                    torch.sub(others[:, :channels], some[:, :channels], out=difference)
                else:  # subtracting into a float32 tensor would round to the narrow dtype first
                    difference.copy_(others[:, :channels]).sub_(some[:, :channels])
                self.sums[module][:channels] += difference.abs_().sum(0)
            self.counts[module] += len(ours)

    def means(self) -> dict[str, Tensor]:
        """module -> float32 ``[channels]``, on the CPU."""
        return {m: (total / self.counts[m]).float().cpu() for m, total in self.sums.items()}
