"""What is selected of one tensor, and the transfer of just that (paper eq. 3 to 5)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_act.merging.mapped import copy_on_write, private_bytes, will_need

__all__ = ["TensorSelection", "changed_slices", "channels_along", "leading", "selected_slices", "transfer"]

LOG = logging.getLogger(__name__)

_CELLS_AT_ONCE = 1 << 22  # 16 MB in float32


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, as mergekit's tasks need it
class TensorSelection:
    """Which slices of one tensor are selected.

    Attributes:
        slices: channel axis -> bool ``[channels]``, or ``[experts, channels]`` for a 3-D tensor. A tied matrix has
            two axes: a cell is selected if its row or its column is.
        vocabulary_axis: the axis of token ids, along which the tensor may be of another length than the mask.
        fit: what the differences of its slices become before they are added; None leaves them as they are.
    """

    slices: Mapping[int, Tensor]
    vocabulary_axis: int | None = None
    fit: Callable[[Tensor, Sequence[Tensor]], Tensor] | None = None

    def fitted(self, name: str | None, shape: Sequence[int]) -> TensorSelection:
        """The same selection for a tensor of this shape.

        Vocabulary rows that the tensor does not have are dropped, which is told; rows that only the tensor has (tokens
        that the merge adds behind the target's) are not selected.

        Raises:
            ValueError: the tensor has other channels than the mask.
        """
        slices = dict(self.slices)
        axis = self.vocabulary_axis
        if axis in slices and axis < len(shape):
            chosen, rows = slices[axis], shape[axis]
            lost = int(chosen[rows:].sum())
            if lost:
                LOG.warning('"%s" has %d rows: %d selected rows behind them are dropped', name, rows, lost)
            slices[axis] = torch.cat([chosen[:rows], chosen.new_zeros(max(0, rows - len(chosen)))])
        for its_axis, chosen in slices.items():
            if its_axis >= len(shape) or tuple(chosen.shape) != channels_along(its_axis, shape, chosen.ndim):
                raise ValueError(
                    f'the mask has {list(chosen.shape)} channels for "{name}"; the tensor is {list(shape)} (axis '
                    f"{its_axis}). Profile this pair again with mergekit-act profile"
                )
        return TensorSelection(slices, fit=self.fit)

    @property
    def by_rows(self) -> bool:
        """Whether every selected slice is one piece of memory: rows, of experts too."""
        return all(axis == chosen.ndim - 1 for axis, chosen in self.slices.items())

    def any(self) -> bool:
        """Whether anything is selected."""
        return any(bool(chosen.any()) for chosen in self.slices.values())

    def cells(self, dimensions: int) -> Tensor:
        """Bool that broadcasts to a tensor of so many dimensions: True where its cells are selected."""
        found: Tensor | None = None
        for axis, chosen in self.slices.items():
            leading = (0, axis) if chosen.ndim == 2 else (axis,)
            shape = [1] * dimensions
            for its_axis, length in zip(leading, chosen.shape, strict=True):
                shape[its_axis] = length
            found = chosen.view(shape) if found is None else found | chosen.view(shape)
        return torch.zeros([1] * dimensions, dtype=torch.bool) if found is None else found


Contribution = tuple[Tensor, float, TensorSelection]


def transfer(base: Tensor, contributions: Sequence[Contribution], dtype: torch.dtype | None = None) -> Tensor:
    """Add weighted differences inside selections (paper eq. 5).

    Differences are accumulated in float32 (float64 for float64 tensors) in order and rounded once to the dtype. Only
    selected slices of the ability models' tensors are touched, so what a memory map does not have to read stays unread.

    Args:
        base: the target's tensor. It is not changed.
        contributions: (ability model's tensor, weight, what is selected of it). Tensors may be of another dtype than
            the result; their slices are cast to it first, as mergekit casts whole tensors.
        dtype: of the result; the base's by default.

    Returns:
        ``base`` itself if nothing is selected and it has that dtype. Otherwise a new tensor that is bit for bit
        ``base`` (cast to the dtype) outside the union.
    """
    dtype = base.dtype if dtype is None else dtype
    selected = [contribution for contribution in contributions if contribution[2].any()]
    if not selected:
        return base.to(dtype)
    for tensor, _, selection in selected:
        if selection.by_rows:
            (chosen,) = selection.slices.values()
            will_need(tensor, chosen.flatten().nonzero().flatten().tolist(), chosen.numel())
    will_need(base)
    merged = _writable(base, dtype, selected)
    # A cell that is selected along two axes is computed in both passes, with all of its contributions in either.
    for axis in sorted({axis for _, _, selection in selected for axis in selection.slices}):
        _transfer_along(axis, base, merged, selected)
    return merged


def _writable(base: Tensor, dtype: torch.dtype, contributions: Sequence[Contribution]) -> Tensor:
    """A copy of the target's tensor that can be written to; where few pages will be, it shares the others."""
    if base.dtype == dtype and all(selection.by_rows for _, _, selection in contributions):
        union = torch.stack([chosen for _, _, s in contributions for chosen in s.slices.values()]).any(0)
        few = private_bytes(int(union.sum()), union.numel(), base.nbytes) < base.nbytes
        shared = copy_on_write(base) if few else None
        if shared is not None:
            return shared
    return base.to(dtype, copy=True)


def _transfer_along(axis: int, base: Tensor, merged: Tensor, contributions: Sequence[Contribution]) -> None:
    """Compute all slices along ``axis`` that any contribution selects, some at a time; writes into ``merged``."""
    for index in selected_slices(axis, base, [selection for _, _, selection in contributions]):
        index = tuple(part.to(base.device) for part in index)
        target = leading(base, axis, len(index))[index].to(merged.dtype)
        leading(merged, axis, len(index))[index] = changed_slices(axis, index, target, contributions)


def selected_slices(axis: int, tensor: Tensor, selections: Sequence[TensorSelection]) -> Iterator[tuple[Tensor, ...]]:
    """What any selection selects along an axis: indices of as many slices as are computed at once."""
    own = [selection.slices.get(axis) for selection in selections]
    union = torch.stack([chosen for chosen in own if chosen is not None]).any(0)
    index = union.nonzero(as_tuple=True)
    cells = max(1, tensor.numel() // union.numel())
    at_once = max(1, _CELLS_AT_ONCE // cells)
    for start in range(0, len(index[0]), at_once):
        yield tuple(part[start : start + at_once] for part in index)


def changed_slices(
    axis: int, index: tuple[Tensor, ...], slices: Tensor, contributions: Sequence[Contribution]
) -> Tensor:
    """Slices of the target's tensor with the contributions added.

    Args:
        axis: along which they lie.
        index: int64 ``[selected]`` for each channel dimension: which slices these are.
        slices: ``[selected, …]``, in the dtype of the result.
        contributions: as for ``transfer``.
    """
    dtype, device = slices.dtype, slices.device
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    target = slices.to(wide, copy=True)
    change = torch.zeros_like(target)
    for tensor, weight, selection in contributions:
        chosen = selection.slices.get(axis)
        other = next((cells for its_axis, cells in selection.slices.items() if its_axis != axis), None)
        inside = torch.zeros_like(index[0], dtype=torch.bool) if chosen is None else chosen.to(index[0].device)[index]
        if other is None:
            rows = inside.nonzero().flatten()
            some = tuple(part[rows].to(tensor.device) for part in index)
            rows = rows.to(device)
            theirs = leading(tensor, axis, len(index))[some].to(device)
            difference = theirs.to(dtype).to(wide).sub_(target[rows])
            if selection.fit is not None:
                difference = selection.fit(difference, some)
            change.index_add_(0, rows, difference.mul_(weight))
        else:
            theirs = leading(tensor, axis, len(index))[tuple(part.to(tensor.device) for part in index)].to(device)
            cells = inside.to(device)[:, None] | other.to(device)[None, :]
            change += torch.where(cells, theirs.to(dtype).to(wide).sub_(target).mul_(weight), 0.0)
    return target.add_(change).to(dtype)


def leading(tensor: Tensor, axis: int, dimensions: int) -> Tensor:
    """A view with the channel dimensions in front, as many as the mask has."""
    return tensor.movedim(axis, dimensions - 1)


def channels_along(axis: int, shape: Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Shape that a mask of so many dimensions has for a tensor: ``[channels]``, or ``[experts, channels]``."""
    return (shape[axis],) if dimensions == 1 else (shape[0], shape[axis])
