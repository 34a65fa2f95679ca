"""Tensors in safetensors files, mapped into memory: what is not touched is not read, what is not changed not copied."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    """Where a tensor's bytes are, in its file and in memory."""

    path: Path
    header: TensorHeader
    address: int
    version: int


_MAPPINGS: Any = WeakTensorKeyDictionary()


def map_tensor(path: Path, header: TensorHeader) -> Tensor | None:
    """Map a tensor of a safetensors file.

    Safetensors' own loader reads megabytes ahead for every tensor; this reads nothing until it is touched. What is
    written to becomes private to this process.

    Returns:
        The tensor, backed by the file; None if its place in the file or the system does not allow that.
    """
    tensor = _map(path, header)
    if tensor is not None:
        _MAPPINGS[tensor] = _Mapping(path, header, tensor.data_ptr(), tensor._version)
    return tensor


def copy_on_write(tensor: Tensor) -> Tensor | None:
    """A copy that shares all pages that are not written to with the file; None for a tensor that is not mapped."""
    mapping = _mapping(tensor)
    return None if mapping is None else _map(mapping.path, mapping.header)


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
    length = mapping.header.size
    if rows is None or length <= _CHUNK:
        ranges = [(start, min(_CHUNK, length - start)) for start in range(0, length, _CHUNK)]
    else:
        _advise(mapping.address, length, mmap.MADV_RANDOM)
        size = length // of
        ranges = [(row * size, size) for row in rows]
    for start, size in ranges:
        _advise(mapping.address + start, size, mmap.MADV_WILLNEED)


def _mapping(tensor: Tensor) -> _Mapping | None:
    """How a tensor is mapped, if it is and still holds what its file does."""
    found: _Mapping | None = _MAPPINGS.get(tensor, None)
    return found if found is not None and found.version == tensor._version else None


def _map(path: Path, header: TensorHeader) -> Tensor | None:
    # Python's own mmap objects keep a file descriptor each, and an output has hundreds of tensors.
    dtype, start = header.torch_dtype, header.start
    if sys.platform == "win32" or start is None or dtype is None or start % dtype.itemsize or not header.size:
        return None
    offset = start % PAGE
    length = offset + header.size
    descriptor = os.open(path, os.O_RDONLY)
    try:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc().mmap(None, length, protection, mmap.MAP_PRIVATE, descriptor, start - offset)
    finally:
        os.close(descriptor)
    if address is None or address == ctypes.c_void_p(-1).value:
        return None
    pages = (ctypes.c_char * length).from_address(address)
    weakref.finalize(pages, _libc().munmap, address, length)
    count = header.size // dtype.itemsize
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=offset).view(header.shape)


def _advise(address: int, size: int, advice: int) -> None:
    first = address // PAGE * PAGE
    _libc().madvise(first, address + size - first, advice)


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
