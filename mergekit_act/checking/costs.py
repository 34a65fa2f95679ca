"""What a planned merge costs: bytes read and written, memory; all estimated from headers."""

from __future__ import annotations

import math
from functools import reduce

import torch
from mergekit.common import dtype_from_name
from torch import Tensor

from mergekit_act.checking.loads import CONVERTED
from mergekit_act.checking.plans import PlanCheck, PlannedTensor
from mergekit_act.checkpoints import TensorHeader
from mergekit_act.merging import TensorSelection
from mergekit_act.merging.mapped import PAGE, private_bytes
from mergekit_act.merging.methods import METHOD

__all__ = ["bytes_read", "bytes_written", "peak_memory", "shape_of", "union_of"]


def union_of(tensor: PlannedTensor) -> dict[int, Tensor]:
    """Axis -> what any ability model selects along it."""
    found: dict[int, Tensor] = {}
    for selection in tensor.selections.values():
        for axis, chosen in selection.slices.items():
            found[axis] = found[axis] | chosen if axis in found else chosen
    return found


def _target(tensor: PlannedTensor) -> TensorHeader:
    header = next(iter(tensor.headers.values()))
    if header is None:  # the plan's check has refused it
        raise ValueError(f'the target has no "{tensor.name}"')
    return header


def shape_of(tensor: PlannedTensor) -> tuple[int, ...]:
    """Of the target's tensor, and so of the output's."""
    return _target(tensor).shape


def bytes_written(tensor: PlannedTensor, check: PlanCheck) -> int:
    """Of an output tensor, in the dtype that it is written in."""
    dtype = dtype_from_name(check.config.out_dtype) or _work_dtype(tensor, check)
    return math.prod(shape_of(tensor)) * dtype.itemsize


def _work_dtype(tensor: PlannedTensor, check: PlanCheck) -> torch.dtype:
    """In which a tensor is computed."""
    stored = [header.torch_dtype for header in tensor.headers.values() if header is not None]
    return dtype_from_name(check.config.dtype) or reduce(torch.promote_types, filter(None, stored))


def bytes_read(tensor: PlannedTensor, check: PlanCheck) -> int:
    """The target's tensor, and of the ability models' what is selected: by rows, in pages; by columns, all of it."""
    _, *others = tensor.headers.items()
    total = _target(tensor).size
    if _is_aligned(tensor, check):
        return sum(header.size for header in tensor.headers.values() if header is not None)
    for model, header in others:
        if header is not None and model in tensor.selections:
            selection = tensor.selections[model]
            whole = not selection.by_rows or check.spec.name != METHOD or not header.file.endswith(".safetensors")
            chosen = next(iter(selection.slices.values()))
            pages = int(chosen.sum()) * (header.size // chosen.numel() + PAGE)
            total += header.size if whole else min(header.size, pages)
    return total


def _is_aligned(tensor: PlannedTensor, check: PlanCheck) -> bool:
    """Whether mergekit makes a vocabulary tensor anew for a tokenizer."""
    has_tokenizer = check.config.tokenizer is not None or check.config.tokenizer_source is not None
    return bool(has_tokenizer and tensor.by_tokens)


def peak_memory(check: PlanCheck) -> int:
    """What is computed stays in memory until its shard is full and written; what is copied stays in its file."""
    kept = [_allocated(tensor, check) for tensor in check.tensors]
    options = check.options
    shards = 1 + (options.write_threads if options.async_write else 0)
    held = min(sum(kept), options.out_shard_size * shards) if options.out_shard_size > 0 else sum(kept)
    largest = max((bytes_written(tensor, check) for tensor in check.tensors if tensor.selections), default=0)
    # mergekit's own methods stack the models' differences.
    return held + largest * (1 if check.spec.name == METHOD else 2 + 2 * len(check.models))


def _allocated(tensor: PlannedTensor, check: PlanCheck) -> int:
    """What an output tensor needs besides the target's file."""
    whole, union = bytes_written(tensor, check), union_of(tensor)
    if _is_cast(tensor, check) or check.options.clone_tensors or _is_aligned(tensor, check):
        return whole
    if not union:
        return 0
    if check.spec.name != METHOD or not TensorSelection(union).by_rows:
        return whole
    (chosen,) = union.values()
    return private_bytes(int(chosen.sum()), chosen.numel(), whole)


def _is_cast(tensor: PlannedTensor, check: PlanCheck) -> bool:
    header = _target(tensor)
    written = dtype_from_name(check.config.out_dtype) or _work_dtype(tensor, check)
    return header.file == CONVERTED or header.torch_dtype != written
