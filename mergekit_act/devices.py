"""Where and in which dtype models run."""

from __future__ import annotations

import torch

__all__ = ["default_device", "default_dtype", "dtype_name", "sum_dtype", "usable_device"]

_WITHOUT_FLOAT64 = frozenset({"mps"})


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def usable_device(device: str | None, local_rank: int | None = None) -> str:
    """The device, or the default one for None.

    Args:
        device: as PyTorch names it.
        local_rank: of several processes on this machine, each takes the accelerator of this number if ``device``
            names none.

    Raises:
        ValueError: PyTorch can't use it here.
    """
    device = device or default_device()
    try:
        if torch.device(device).type == "cuda" and torch.device(device).index is None:
            device = f"{device}:{torch.cuda.current_device() if local_rank is None else local_rank}"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f'device "{device}" cannot be used here: {reason}; the default is {default_device()}'
        ) from error
    return device


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32: by capability, so runs can be repeated."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.float32


def sum_dtype(device: str) -> torch.dtype:
    """In which sums over many tokens are kept: float64, where the device has it."""
    return torch.float32 if torch.device(device).type in _WITHOUT_FLOAT64 else torch.float64


def dtype_name(dtype: torch.dtype) -> str:
    """As files and options write it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
