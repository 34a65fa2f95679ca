"""Sums per channel, on their way to scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergekit_act.channels import Layout
from mergekit_act.devices import sum_dtype
from mergekit_act.runs.processes import Processes
from mergekit_act.streaming.experts import ExpertOutput

__all__ = ["ChannelSums", "scratch_bytes"]

# Numbers whose differences are computed together: on a CPU they should stay in its cache.
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 26


def scratch_bytes(layout: Layout, device: str) -> int:
    """Device memory that the differences need besides the sums."""
    return 4 * _block(layout, device)


class ChannelSums:
    """Sums and counts, kept apart: sums in one tensor in layout order, and how many rows each module had.

    Args:
        layout: the channels.
        device: where the sums are kept and the differences computed.
        scratch: where differences are computed, float32; sums that are added to in turn can share it.
        kinds: how many sums a channel has.

    Attributes:
        vector: ``[kinds, channels]``, float64 where the device has it.
        sums: module -> its part of the first kind, ``[channels]``.
    """

    def __init__(self, layout: Layout, device: str, scratch: Tensor | None = None, kinds: int = 1) -> None:
        self._layout = layout
        self._sizes = [layout.channel_count([module]) for module in layout.modules]
        self._starts = dict(zip(layout.modules, itertools.accumulate(self._sizes, initial=0), strict=False))
        self.vector = torch.zeros(kinds, sum(self._sizes), dtype=sum_dtype(device), device=device)
        self.sums = self.by_module(self.vector[0])
        self.counts = dict.fromkeys(layout.modules, 0)
        self.expert_tokens: dict[str, list[int]] = {}  # module -> answer tokens that the target routed to each
        self.scratch = torch.empty(_block(layout, device), device=device) if scratch is None else scratch

    def by_module(self, channels: Tensor) -> dict[str, Tensor]:
        """What each module has of ``[channels]``."""
        return dict(zip(self._layout.modules, torch.split(channels, self._sizes), strict=True))

    def add(
        self,
        module: str,
        target: Sequence[Tensor],
        ability_model: Sequence[Tensor],
        *,
        first: int = 0,
        offsets: Tensor | None = None,
    ) -> None:
        """Add abs(ability_model − target).

        Args:
            module: whose channels they are.
            target: the target's output, in parts of ``[rows, channels]``.
            ability_model: the ability model's; of two vocabularies both have what they share, in front.
            first: the module's channel that these begin with. Its rows are counted with channel 0.
            offsets: float32 ``[rows, 1]``, taken off the differences of the only part.
        """
        for ours, theirs in zip(target, ability_model, strict=True):
            channels = min(ours.shape[-1], theirs.shape[-1])
            total = self.sums[module][first : first + channels]
            block = max(1, len(self.scratch) // channels)
            for start in range(0, len(ours), block):
                some, others = ours[start : start + block], theirs[start : start + block]
                difference = self.scratch[: len(some) * channels].view(len(some), channels)
                if others.dtype == torch.float32:
                    torch.sub(others[:, :channels], some[:, :channels], out=difference)
                else:  # subtracting into a float32 tensor would round to the narrow dtype first
                    difference.copy_(others[:, :channels]).sub_(some[:, :channels])
                if offsets is not None:
                    difference -= offsets[start : start + block]
                total += difference.abs_().sum(0)
            if first == 0:
                self.counts[module] += len(ours)

    def add_changes(
        self, module: str, changes: Sequence[Tensor], *, first: int = 0, offsets: Tensor | None = None
    ) -> None:
        """Add the absolute values of what is a difference already; arguments as of ``add``."""
        zeros = [part.new_zeros(1, part.shape[-1]).expand_as(part) for part in changes]
        self.add(module, zeros, changes, first=first, offsets=offsets)

    def add_expert_changes(self, module: str, changes: ExpertOutput, *, answers: int) -> None:
        """The same for a projection of experts.

        Args:
            module: the projection.
            changes: differences at answer tokens.
            answers: number of answer tokens, routed to an expert or not.
        """
        sums = self.sums[module].view(len(changes.ends), -1)
        for total, start, end in zip(sums, (0, *changes.ends), changes.ends, strict=False):
            total += changes.rows[start:end].float().abs_().sum(0)
        self._count_experts(module, changes, answers)

    def add_effects(self, module: str, effects: Tensor, *, first: int = 0) -> None:
        """Add first-order effects on the loss of some samples: what the loss falls by, and half their squares.

        Args:
            module: whose channels they are.
            effects: float32 ``[samples, channels]``: how much a sample's loss rises, to first order, when the channel
                moves; of experts ``[samples, experts × channels]``.
            first: the module's channel that these begin with.
        """
        start = self._starts[module] + first
        own = self.vector[:, start : start + effects.shape[1]]
        wide = effects.to(self.vector.dtype)
        own[0] -= wide.sum(0)
        own[1] += wide.square().sum(0).mul_(0.5)

    def add_experts(self, module: str, target: ExpertOutput, ability_model: ExpertOutput, *, answers: int) -> None:
        """Add the differences of one projection of experts; an expert's activation for a token not routed to it is 0.

        Args:
            module: the projection.
            target: the target's output at answer tokens.
            ability_model: the ability model's; it may route other tokens to an expert.
            answers: number of answer tokens, routed or not.
        """
        sums = self.sums[module].view(len(target.ends), -1)
        # Both come by expert, then by token: each (expert, token) of either gets one row.
        keys, other_keys = (output.keys(answers) for output in (target, ability_model))
        joined = torch.unique(torch.cat([keys, other_keys]))
        differences = torch.zeros(len(joined), sums.shape[1], device=sums.device)
        differences[torch.searchsorted(joined, other_keys)] = ability_model.rows.float()
        differences[torch.searchsorted(joined, keys)] -= target.rows.float()
        behind = torch.arange(1, len(sums) + 1, device=joined.device) * answers
        ends = torch.searchsorted(joined, behind).tolist()
        for total, start, end in zip(sums, (0, *ends), ends, strict=False):
            total += differences[start:end].abs_().sum(0)
        self._count_experts(module, target, answers)

    def _count_experts(self, module: str, output: ExpertOutput, answers: int) -> None:
        self.counts[module] += answers
        experts, _, projection = module.rpartition(".")
        if projection == "down_proj":  # every projection sees the same tokens
            self.see_experts(experts, output)

    def see_experts(self, experts: str, output: ExpertOutput) -> None:
        """Count the answer tokens that each expert of a module gets."""
        seen = self.expert_tokens.setdefault(experts, [0] * len(output.ends))
        self.expert_tokens[experts] = [sum(pair) for pair in zip(seen, output.counts(), strict=True)]

    def add_up(self, processes: Processes) -> None:
        """Replace sums and counts by those over all processes.

        Raises:
            ConnectionError: another process has ended.
        """
        if processes.count == 1:
            return
        self.vector.copy_(processes.add(self.vector))
        counted = processes.gather((self.counts, self.expert_tokens))
        self.counts = {module: sum(counts[module] for counts, _ in counted) for module in self.counts}
        experts = {module for _, tokens in counted for module in tokens}
        self.expert_tokens = {
            module: [sum(column) for column in zip(*(t[module] for _, t in counted if module in t), strict=True)]
            for module in sorted(experts)
        }

    def remember(self) -> Callable[[], None]:
        """A function that sets sums and counts to what they are now."""
        before, counts, tokens = self.vector.clone(), dict(self.counts), dict(self.expert_tokens)

        def undo() -> None:
            self.vector.copy_(before)
            self.counts, self.expert_tokens = counts, tokens

        return undo

    def means(self, kind: int = 0) -> dict[str, Tensor]:
        """module -> float32 ``[channels]`` (``[experts, channels]``), on the CPU."""
        return {
            module: (total / self.counts[module]).float().cpu().view(self._layout.channel_shape(module))
            for module, total in self.by_module(self.vector[kind]).items()
        }


def _block(layout: Layout, device: str) -> int:
    sizes = [layout.channel_count([module]) for module in layout.modules if len(layout.channel_shape(module)) == 1]
    return max(_CPU_BLOCK if torch.device(device).type == "cpu" else _DEVICE_BLOCK, *sizes)
