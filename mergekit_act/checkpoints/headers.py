"""Tensor headers: names, dtypes and shapes of weight files, read without their values."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch

from mergekit_act.wording import one_line, shorten

__all__ = ["TensorHeader", "read_headers"]

_FLOATS = {
    **dict.fromkeys(("BF16", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("F16", "float16"), torch.float16),
    **dict.fromkeys(("F32", "float32"), torch.float32),
    **dict.fromkeys(("F64", "float64"), torch.float64),
}


@dataclass(frozen=True)
class TensorHeader:
    """A stored tensor, without its values.

    Attributes:
        dtype: as its file writes it.
        shape: its dimensions.
        file: the file's name.
        start: where its values begin in a safetensors file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The floating-point dtype that mergekit can merge in, None for others."""
        return _FLOATS.get(self.dtype)

    @property
    def size(self) -> int:
        """Bytes of its values."""
        bits = int(re.sub(r"\D", "", self.dtype.partition("_")[0]) or 8)
        return math.prod(self.shape) * bits // 8


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Name -> header of every tensor in a weight file, safetensors or pickle; no values are read.

    Raises:
        ValueError: the file is truncated or holds something else than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors_header(path)
        state = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {
            name: TensorHeader(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), path.name)
            for name, tensor in state.items()
        }
    except (struct.error, ValueError, KeyError, AttributeError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"{path} is not a complete weight file ({shorten(one_line(error), 500)}); fetch or save it again"
        ) from error


def _read_safetensors_header(path: Path) -> dict[str, TensorHeader]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        size = file.seek(0, os.SEEK_END)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != size:
        raise ValueError(f"{size} bytes, its header says {end}")
    return {
        name: TensorHeader(entry["dtype"], tuple(entry["shape"]), path.name, 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
