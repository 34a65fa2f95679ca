"""How far a channel's output changes when its own weights move, and nothing else: mean of abs(ΔW x + Δb)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from mergekit_act.profiling.changes import Changes
from mergekit_act.profiling.engine import ForwardEngine, Work
from mergekit_act.streaming.experts import ExpertOutput
from mergekit_act.streaming.segments import Observer
from mergekit_act.streaming.weights import HeadSlice

__all__ = ["LocalEngine"]


class LocalEngine(ForwardEngine):
    """The target runs; what the ability model's modules would add to its outputs is summed at the answer tokens.

    Unlike differences of activations these have no part that comes from the layers below.
    """

    runs = 1
    by_differences = True

    def prepare(self, rows: int, channels: int) -> None:
        """Make what computes changes."""
        self._changes = Changes(self.models[1].model)

    def observers(self, work: Work) -> Sequence[Observer]:
        """One that sums what each module's output would change by."""
        batch, sums = work.batch, work.sums

        def add(module: str, output: Tensor | ExpertOutput, inputs: object) -> None:
            if isinstance(output, ExpertOutput):
                assert isinstance(inputs, Tensor)
                changed = self._changes.of_experts(module, output, inputs).at(batch.answer_places)
                sums.add_expert_changes(module, changed, answers=len(batch.sample_of))
            else:
                changed_rows = self._changes.of(module, inputs).reshape(output.shape)
                sums.add_changes(module, batch.answer_rows(changed_rows, self.forms.token_axes[module]))

        return (add,)

    def score_head(self, work: Work, heads: Sequence[HeadSlice], hidden: Sequence[Tensor]) -> None:
        """Sum what logits would change by."""
        changed = functional.linear(hidden[0], heads[1].weight, heads[1].bias)
        work.sums.add_changes(self.head, [changed], first=heads[0].first, offsets=self.offsets(*hidden))
