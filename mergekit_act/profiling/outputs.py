"""What modules put out: where token positions are in it, and how it is kept until the other model has run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_act.channels import Layout
from mergekit_act.profiling.batches import MicroBatch
from mergekit_act.profiling.experts import ExpertOutput
from mergekit_act.profiling.segments import SegmentedModel

__all__ = ["KeptOutput", "OutputForms", "find_output_forms"]

_BATCH = 3
_LENGTHS = (7, 11, 13, 17)


@dataclass(frozen=True)
class OutputForms:
    """How each module's output is to be read.

    Attributes:
        token_axes: module -> which dimension of its output are token positions; None if batch and positions are one.
        changed_later: modules whose output the model changes in place after they have put it out.
    """

    token_axes: dict[str, int | None]
    changed_later: frozenset[str]

    def keep(self, module: str, output: Tensor | ExpertOutput, batch: MicroBatch) -> KeptOutput:
        """Keep an output at the answer tokens, as it is now."""
        if isinstance(output, ExpertOutput):
            return KeptOutput(output.at(batch.answer_places))
        if output.device.type == "cpu" and module in self.changed_later:
            output = output.clone()
        rows = batch.answer_rows(output, self.token_axes[module])
        # Elsewhere the rows are a copy, and the whole output need not wait.
        return KeptOutput(rows, output, output._version) if output.device.type == "cpu" else KeptOutput(rows)


@dataclass(frozen=True)
class KeptOutput:
    """The target's output at the answer tokens, until the ability model's comes.

    Attributes:
        rows: parts of ``[rows, channels]``, borrowed from ``source`` on a CPU; or the ``ExpertOutput`` of experts.
        source: the whole output.
        version: PyTorch's count of its changes when it was kept.
    """

    rows: Any
    source: Tensor | None = None
    version: int = 0

    def read(self, module: str) -> Any:
        """The rows.

        Raises:
            ValueError: they have been changed since.
        """
        if self.source is not None and self.source._version != self.version:
            raise ValueError(f'module "{module}": its output was changed in place, which the first batch did not show')
        return self.rows


@torch.no_grad()
def find_output_forms(model: SegmentedModel, layout: Layout, vocabulary: int, device: str) -> OutputForms:
    """Learn how outputs are to be read from one small batch, whose length no other dimension has.

    Args:
        model: the target, being observed.
        layout: its channels.
        vocabulary: token ids below this one are valid.
        device: where the model is.

    Raises:
        ValueError: a module with channels put nothing out, or its positions can't be told from its other dimensions.
    """
    unclear: dict[str, tuple[int, ...]] = {}
    for length in _LENGTHS:
        outputs = _observe(model, torch.arange(_BATCH * length, device=device).reshape(_BATCH, length) % vocabulary)
        unseen = [module for module in layout.modules if module not in outputs]
        if unseen:
            raise ValueError(
                f"{model.name}: {len(unseen)} modules with channels put nothing out that can be observed: "
                f"{', '.join(unseen[:10])}"
            )
        axes: dict[str, int | None] = {}
        unclear = {}
        for module, (output, _) in outputs.items():
            if isinstance(output, ExpertOutput):
                continue
            shape = tuple(output.shape)
            candidates = [axis for axis, size in enumerate(shape[:-1]) if size == length]
            batch_first = len(candidates) == 1 and (shape[0] in (1, _BATCH) if candidates[0] else len(shape) == 2)
            if shape[-1:] != layout.channel_shape(module):
                unclear[module] = shape
            elif batch_first:
                axes[module] = candidates[0]
            elif shape[0] == _BATCH * length:
                axes[module] = None
            else:
                unclear[module] = shape
        if not unclear:
            plain = {m: entry for m, entry in outputs.items() if m in axes}
            changed = (module for module, (output, version) in plain.items() if output._version != version)
            return OutputForms(axes, frozenset(changed))
    named = ", ".join(f'"{module}" {list(shape)}' for module, shape in list(unclear.items())[:10])
    raise ValueError(f"{model.name}: the token positions in these outputs cannot be told: {named}")


def _observe(model: SegmentedModel, input_ids: Tensor) -> dict[str, tuple[Any, int]]:
    """module -> its output, and how often it had been changed when it was put out."""
    outputs: dict[str, tuple[Any, int]] = {}

    def note(module: str, output: Any) -> None:
        outputs[module] = (output, 0 if isinstance(output, ExpertOutput) else output._version)

    carried = model.embed(input_ids, note)
    for index in range(len(model.layers)):
        model.layer(index, carried, note)
    model.run_head(model.normalise(carried, note), note)
    return outputs
