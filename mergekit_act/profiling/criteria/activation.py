"""The paper's score: how far the activations of two models differ (eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mergekit_act.profiling.engine import ForwardEngine, Work
from mergekit_act.streaming.experts import ExpertOutput
from mergekit_act.streaming.outputs import KeptOutput
from mergekit_act.streaming.segments import Observer
from mergekit_act.streaming.weights import HeadSlice

__all__ = ["ActivationEngine"]


class ActivationEngine(ForwardEngine):
    """For a segment, the target's modules put out their activations, which are kept at the answer tokens.

    Then the ability model's do, and both are reduced to one sum per channel and dropped.
    """

    def prepare(self, rows: int, channels: int) -> None:
        """Make the memory that logits are computed into, again and again."""
        size = rows * channels
        self._logits = [torch.empty(size, dtype=model.dtype, device=model.device) for model in self.weights.models]

    def observers(self, work: Work) -> Sequence[Observer]:
        """One that keeps the target's outputs, and one that compares the ability model's with them."""
        kept: dict[str, list[KeptOutput]] = {}
        batch, sums, forms = work.batch, work.sums, self.forms

        def keep(module: str, output: Tensor | ExpertOutput, _: object) -> None:
            kept.setdefault(module, []).append(forms.keep(module, output, batch))

        def compare(module: str, output: Tensor | ExpertOutput, _: object) -> None:
            rows = kept[module].pop(0).read(module)
            if isinstance(output, ExpertOutput):
                sums.add_experts(module, rows, output.at(batch.answer_places), answers=len(batch.sample_of))
            else:
                sums.add(module, rows, batch.answer_rows(output, forms.token_axes[module]))

        return keep, compare

    def score_head(self, work: Work, heads: Sequence[HeadSlice], hidden: Sequence[Tensor]) -> None:
        """Compare logits."""
        ours, theirs = (_logits(*each) for each in zip(hidden, heads, self._logits, strict=True))
        work.sums.add(self.head, [ours], [theirs], first=heads[0].first, offsets=self.offsets(*hidden))


def _logits(hidden: Tensor, head: HeadSlice, into: Tensor) -> Tensor:
    """``[rows, channels]``, in memory that is used again."""
    if head.bias is not None:
        return functional.linear(hidden, head.weight, head.bias)
    shape = (len(hidden), len(head.weight))
    return torch.mm(hidden, head.weight.T, out=into[: shape[0] * shape[1]].view(shape))
