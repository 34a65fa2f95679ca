"""Where the hidden states of a chunk wait between segments: on the device, in host memory or in a mapped file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Literal

import numpy
import torch
from torch import Tensor

__all__ = ["HiddenStates", "Place"]

Place = Literal["device", "host", "file"]


class HiddenStates:
    """Tensors by key, each replaced as its micro-batch moves on.

    A file is mapped only while a tensor is copied, so that its pages do not count as the process's memory, and its
    space is reserved first, so that a full disk is an error and no crash. It has no name and goes with the process.

    Args:
        place: where they wait.
        device: where they are needed.
        folder: of the file.
    """

    def __init__(self, place: Place, device: str, folder: Path | None = None) -> None:
        self.place: Place = place
        self._device = device
        self._tensors: dict[Hashable, Tensor] = {}
        if place == "file" and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder) if place == "file" else None  # noqa: SIM115
        self._end = 0
        self._slots: dict[Hashable, tuple[int, int]] = {}  # key -> offset, bytes
        self._kinds: dict[Hashable, tuple[torch.Size, torch.dtype]] = {}

    def put(self, key: Hashable, hidden: Tensor) -> None:
        """Keep a tensor, in the place of the one that had this key."""
        if self.place == "device":
            self._tensors[key] = hidden
        elif self.place == "host":
            kept = self._tensors.get(key)
            if kept is not None and kept.shape == hidden.shape:
                kept.copy_(hidden)
            else:
                self._tensors[key] = hidden.cpu()
        else:
            flat = hidden.contiguous().view(-1).view(torch.uint8)
            if self._slots.get(key, (0, -1))[1] < len(flat):
                self._slots[key] = (self._reserve(len(flat)), len(flat))
            self._kinds[key] = (hidden.shape, hidden.dtype)
            self._map(key, len(flat)).copy_(flat)

    def take(self, key: Hashable) -> Tensor:
        """The tensor, on the device."""
        if self.place != "file":
            return self._tensors[key].to(self._device)
        shape, dtype = self._kinds[key]
        mapped = self._map(key, shape.numel() * dtype.itemsize)
        return mapped.to(self._device, copy=True).view(dtype).view(shape)

    def has(self, key: Hashable) -> bool:
        """Whether there is a tensor with this key."""
        return key in self._tensors or key in self._slots

    def drop(self, key: Hashable) -> None:
        """Forget a tensor; its part of a file is not used again."""
        self._tensors.pop(key, None)
        self._slots.pop(key, None)

    def close(self) -> None:
        """Forget all tensors and the file."""
        self._tensors.clear()
        if self._file is not None:
            self._file.close()

    def _reserve(self, size: int) -> int:
        assert self._file is not None
        start = self._end
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), start, size)
        else:  # macOS
            os.ftruncate(self._file.fileno(), start + size)
        self._end = start + size
        return start

    def _map(self, key: Hashable, size: int) -> Tensor:
        assert self._file is not None
        return torch.from_numpy(numpy.memmap(self._file, numpy.uint8, "r+", self._slots[key][0], (size,)))
