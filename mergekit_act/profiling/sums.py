"""Sums of absolute activation differences per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_act.channels import Layout
from mergekit_act.profiling.experts import ExpertOutput

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
        self._layout = layout
        sizes = [layout.channel_count([module]) for module in layout.modules]
        self.vector = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.sums = dict(zip(layout.modules, torch.split(self.vector, sizes), strict=True))
        self.counts = dict.fromkeys(layout.modules, 0)
        self.expert_tokens: dict[str, list[int]] = {}  # module -> answer tokens that the target routed to each
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

    def add_experts(self, module: str, target: ExpertOutput, ability_model: ExpertOutput, *, answers: int) -> None:
        """Add the differences of one projection of experts; an expert's activation for a token not routed to it is 0.

        Args:
            module: the projection.
            target: the target's output at answer tokens.
            ability_model: the ability model's; it may route other tokens to an expert.
            answers: number of answer tokens, routed or not.
        """
        sums = self.sums[module].view(len(target.ends), -1)
        for expert, total in enumerate(sums):
            tokens, rows = target.of_expert(expert)
            other_tokens, other_rows = ability_model.of_expert(expert)
            both, others_both = torch.isin(tokens, other_tokens), torch.isin(other_tokens, tokens)
            total += (other_rows[others_both].float() - rows[both].float()).abs_().sum(0)
            total += rows[~both].float().abs_().sum(0)
            total += other_rows[~others_both].float().abs_().sum(0)
        self.counts[module] += answers
        experts, _, projection = module.rpartition(".")
        if projection == "down_proj":  # every projection sees the same tokens
            seen = self.expert_tokens.setdefault(experts, [0] * len(sums))
            self.expert_tokens[experts] = [sum(pair) for pair in zip(seen, target.counts(), strict=True)]

    def means(self) -> dict[str, Tensor]:
        """module -> float32 ``[channels]`` (``[experts, channels]``), on the CPU."""
        return {
            module: (total / self.counts[module]).float().cpu().view(self._layout.channel_shape(module))
            for module, total in self.sums.items()
        }
