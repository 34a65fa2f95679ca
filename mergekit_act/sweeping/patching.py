"""A model in memory whose selected slices are set to those of a merge, and set back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_act.merging.kernel import TensorSelection, changed_slices, leading, selected_slices
from mergekit_act.planning import Plan, PlannedTensor

__all__ = ["PatchedModel"]


@dataclass(frozen=True)
class _Saved:
    """Slices of a parameter as the target has them, and what is to be added to them.

    Attributes:
        parameter: of the model.
        axis: along which the slices lie.
        index: which slices these are.
        slices: the target's.
        changes: ability model, its tensor, what is selected of it.
    """

    parameter: Tensor
    axis: int
    index: tuple[Tensor, ...]
    slices: Tensor
    changes: Sequence[tuple[ModelReference, Tensor, TensorSelection]]


class PatchedModel:
    """The target, loaded once; any merge of one plan can be put into it and taken out again.

    What is put in is bit for bit what ``mergekit-yaml`` writes: selections come from its plan, and values from the
    function that merges. Ability models' slices are read from their files when they are needed; of the target those
    that will change are kept, on the model's device.

    Args:
        model: the target, in memory.
        dtype: in which the merge is computed and written.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._saved: list[_Saved] = []

    @torch.no_grad()
    def take(self, plan: Plan) -> None:
        """Take another plan: which slices of which tensors change.

        Args:
            plan: of a merge with ``act``.

        Raises:
            ValueError: a tensor of the plan is no parameter of the model, or of another shape.
        """
        self._saved = []
        done: set[int] = set()
        for tensor in plan.tensors:
            if not tensor.selections:
                continue
            parameter = self._parameter(tensor)
            if id(parameter) in done:  # a tied head: the plan has it under both names
                continue
            done.add(id(parameter))
            changes = []
            loaded = tensor.task.gather()
            for model, selection in tensor.selections.items():
                theirs = loaded[model]
                if theirs.shape != parameter.shape:
                    raise ValueError(
                        f'"{tensor.name}" is {list(parameter.shape)} in the target, {list(theirs.shape)} in {model}; '
                        "a sweep needs vocabularies of one length"
                    )
                changes.append((model, theirs, selection.fitted(tensor.name, theirs.shape)))
            selections = [selection for _, _, selection in changes]
            for axis in sorted({axis for selection in selections for axis in selection.slices}):
                for index in selected_slices(axis, parameter, selections):
                    placed = tuple(part.to(parameter.device) for part in index)
                    slices = leading(parameter, axis, len(placed))[placed]
                    own = [(model, theirs, _fitted_once(selection)) for model, theirs, selection in changes]
                    self._saved.append(_Saved(parameter, axis, placed, slices, own))

    @contextmanager
    def patched(self, weights: Mapping[ModelReference, float]) -> Iterator[Any]:
        """The model with a merge's weights, for the duration of a block.

        Args:
            weights: of each ability model.
        """
        try:
            self._put(weights)
            yield self.model
        finally:
            self._restore()

    @torch.no_grad()
    def _put(self, weights: Mapping[ModelReference, float]) -> None:
        for saved in self._saved:
            contributions = [(tensor, weights[model], selection) for model, tensor, selection in saved.changes]
            changed = changed_slices(saved.axis, saved.index, saved.slices.to(self.dtype), contributions)
            leading(saved.parameter, saved.axis, len(saved.index))[saved.index] = changed.to(saved.parameter.dtype)

    @torch.no_grad()
    def _restore(self) -> None:
        for saved in self._saved:
            leading(saved.parameter, saved.axis, len(saved.index))[saved.index] = saved.slices

    def _parameter(self, tensor: PlannedTensor) -> Tensor:
        for name in (tensor.name, *sorted(tensor.names)):
            if name in self._parameters:
                return self._parameters[name]
        raise ValueError(f'"{tensor.name}" is no parameter of {type(self.model).__name__}; a sweep cannot change it')


def _fitted_once(selection: TensorSelection) -> TensorSelection:
    """A selection whose fit is kept: slices that are saved are the same for every weight."""
    fit, kept = selection.fit, list[Tensor]()
    if fit is None:
        return selection

    def once(changes: Tensor, index: Sequence[Tensor]) -> Tensor:
        if not kept:
            kept.append(fit(changes, index))
        return kept[0].clone()

    return replace(selection, fit=once)
