"""What a planned merge costs: bytes read and written, memory; all estimated from headers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce

import torch
from mergekit.common import ModelReference, dtype_from_name
from torch import Tensor

from mergekit_act.checkpoints import TensorHeader
from mergekit_act.merging import TensorFit, TensorSelection
from mergekit_act.merging.mapped import PAGE, private_bytes
from mergekit_act.merging.methods import METHOD
from mergekit_act.planning import Plan, PlannedTensor
from mergekit_act.planning.models import CONVERTED

__all__ = ["bytes_read", "bytes_written", "fit_costs", "fitted_tensors", "peak_memory", "shape_of", "union_of"]


def union_of(selections: Iterable[TensorSelection]) -> dict[int, Tensor]:
    """Axis -> what any of them selects along it."""
    found: dict[int, Tensor] = {}
    for selection in selections:
        for axis, chosen in selection.slices.items():
            found[axis] = found[axis] | chosen if axis in found else chosen
    return found


def _target(tensor: PlannedTensor) -> TensorHeader:
    header = next(iter(tensor.headers.values()))
    if header is None:  # checked before
        raise ValueError(f'the target has no "{tensor.name}"')
    return header


def shape_of(tensor: PlannedTensor) -> tuple[int, ...]:
    """Of the target's tensor, and so of the output's."""
    return _target(tensor).shape


def bytes_written(tensor: PlannedTensor, plan: Plan) -> int:
    """Of an output tensor, in the dtype that it is written in."""
    dtype = dtype_from_name(plan.config.out_dtype) or _work_dtype(tensor, plan)
    return math.prod(shape_of(tensor)) * dtype.itemsize


def _work_dtype(tensor: PlannedTensor, plan: Plan) -> torch.dtype:
    """In which a tensor is computed."""
    stored = [header.torch_dtype for header in tensor.headers.values() if header is not None]
    return dtype_from_name(plan.config.dtype) or reduce(torch.promote_types, filter(None, stored))


def bytes_read(tensor: PlannedTensor, plan: Plan) -> int:
    """The target's tensor, and of the ability models' what is selected: by rows, in pages; by columns, all of it."""
    _, *others = tensor.headers.items()
    total = _target(tensor).size
    if _is_aligned(tensor, plan):
        return sum(header.size for header in tensor.headers.values() if header is not None)
    for model, header in others:
        if header is not None and model in tensor.selections:
            selection = tensor.selections[model]
            whole = not selection.by_rows or plan.spec.name != METHOD or not header.file.endswith(".safetensors")
            chosen = next(iter(selection.slices.values()))
            pages = int(chosen.sum()) * (header.size // chosen.numel() + PAGE)
            total += header.size if whole else min(header.size, pages)
    return total


def _is_aligned(tensor: PlannedTensor, plan: Plan) -> bool:
    """Whether mergekit makes a vocabulary tensor anew for a tokenizer."""
    return plan.has_tokenizer and tensor.by_tokens


def peak_memory(plan: Plan) -> int:
    """What is computed stays in memory until its shard is full and written; what is copied stays in its file."""
    kept = [_allocated(tensor, plan) for tensor in plan.tensors]
    options = plan.options
    shards = 1 + (options.write_threads if options.async_write else 0)
    held = min(sum(kept), options.out_shard_size * shards) if options.out_shard_size > 0 else sum(kept)
    largest = max((bytes_written(tensor, plan) for tensor in plan.tensors if tensor.selections), default=0)
    # mergekit's own methods stack the models' differences.
    return held + largest * (1 if plan.spec.name == METHOD else 2 + 2 * len(plan.models)) + fit_costs(plan)[1]


def fitted_tensors(plan: Plan) -> dict[ModelReference, list[TensorFit]]:
    """Ability model -> the fits of its tensors."""
    found: dict[ModelReference, list[TensorFit]] = {}
    for tensor in plan.tensors:
        for model, selection in tensor.selections.items():
            if isinstance(selection.fit, TensorFit):
                found.setdefault(model, []).append(selection.fit)
    return found


def fit_costs(plan: Plan) -> tuple[int, int]:
    """(bytes of inputs that are read, memory that the largest fit needs), of all fits."""
    fits = [fit for some in fitted_tensors(plan).values() for fit in some]
    used = {(id(fit.inputs), name): fit.inputs.tensors[name] for fit in fits for name in fit.names}
    memory = 0
    for fit in fits:
        matrices = [tensor for name in fit.names if (tensor := fit.inputs.tensors[name]).ndim == 2]
        if matrices:
            rows, width = sum(map(len, matrices)), matrices[0].shape[1]
            memory = max(memory, 8 * (3 * rows * width + 2 * min(rows, width) ** 2))
    return sum(tensor.nbytes for tensor in used.values()), memory


def _allocated(tensor: PlannedTensor, plan: Plan) -> int:
    """What an output tensor needs besides the target's file."""
    whole, union = bytes_written(tensor, plan), union_of(tensor.selections.values())
    if _is_cast(tensor, plan) or plan.options.clone_tensors or _is_aligned(tensor, plan):
        return whole
    if not union:
        return 0
    if plan.spec.name != METHOD or not TensorSelection(union).by_rows:
        return whole
    (chosen,) = union.values()
    return private_bytes(int(chosen.sum()), chosen.numel(), whole)


def _is_cast(tensor: PlannedTensor, plan: Plan) -> bool:
    header = _target(tensor)
    written = dtype_from_name(plan.config.out_dtype) or _work_dtype(tensor, plan)
    return header.file == CONVERTED or header.torch_dtype != written
