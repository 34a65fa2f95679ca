"""Tensors in safetensors files, mapped into memory: what is not touched is not read, what is not changed not copied."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mergekit_act.checkpoints import TensorHeader

__all__ = ["PAGE", "copy_on_write", "map_tensor", "private_bytes", "will_need"]

PAGE = mmap.ALLOCATIONGRANULARITY
_CHUNK = 1 << 20  # Linux reads no more than about this ahead for one request


@dataclass(frozen=True)
class _Mapping:
    """A range of a file in memory; pages that are written to become private."""

    path: Path
    header: TensorHeader
    pages: mmap.mmap
    offset: int


_MAPPINGS: Any = WeakTensorKeyDictionary()


def map_tensor(path: Path, header: TensorHeader) -> Tensor | None:
    """Map a tensor of a safetensors file.

    Safetensors' own loader reads megabytes ahead for every tensor; this reads nothing until it is touched.

    Returns:
        The tensor, backed by the file; None if its place in the file does not allow that.
    """
    dtype, start = header.torch_dtype, header.start
    if start is None or dtype is None or start % dtype.itemsize or not header.size:
        return None
    offset = start % PAGE
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), offset + header.size, access=mmap.ACCESS_COPY, offset=start - offset)
    count = header.size // dtype.itemsize
    tensor = torch.frombuffer(pages, dtype=dtype, count=count, offset=offset).view(header.shape)
    _MAPPINGS[tensor] = _Mapping(path, header, pages, offset)
    return tensor


def copy_on_write(tensor: Tensor) -> Tensor | None:
    """What the file holds once more, sharing all pages that are not written to; None if the tensor is not mapped."""
    mapping = _mapping(tensor)
    return None if mapping is None else map_tensor(mapping.path, mapping.header)


def private_bytes(rows: int, of: int, nbytes: int) -> int:
    """Memory that a copy of so many bytes needs if some of its rows are changed.

    That is the changed rows' pages if the copy shares the others with a file, which pays for less than half, else all.
    """
    pages = rows * (nbytes // of + PAGE)  # a row seldom begins where a page does
    return pages if pages < nbytes // 2 else nbytes


def will_need(tensor: Tensor, rows: Sequence[int] | None = None, of: int = 1) -> None:
    """Let the system read some rows of a mapped tensor, and only those, or all of it, while other work goes on.

    Args:
        tensor: any tensor; nothing is done for one that is not mapped.
        rows: which of its rows, ascending; None for the whole tensor.
        of: how many rows of equal size it consists of.
    """
    mapping = _mapping(tensor)
    if mapping is None or not hasattr(mmap, "MADV_WILLNEED"):
        return
    pages, length = mapping.pages, mapping.header.size
    if rows is None or length <= _CHUNK:
        ranges = [(start, min(_CHUNK, length - start)) for start in range(0, length, _CHUNK)]
    else:
        pages.madvise(mmap.MADV_RANDOM)
        size = length // of
        ranges = [(row * size, size) for row in rows]
    for start, size in ranges:
        first = (mapping.offset + start) // PAGE * PAGE
        pages.madvise(mmap.MADV_WILLNEED, first, mapping.offset + start + size - first)


def _mapping(tensor: Tensor) -> _Mapping | None:
    found: _Mapping | None = _MAPPINGS.get(tensor, None)
    return found
