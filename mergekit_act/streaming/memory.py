"""How much memory there is, and what of a pair stays in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

__all__ = ["MemoryPlan", "free_memory", "host_memory", "parse_bytes", "plan_memory"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class MemoryPlan:
    """What stays in memory.

    Attributes:
        streamed: places of the pieces that are loaded once per chunk; none if everything stays.
        buffers: how many pieces that do not stay are in memory at a time.
        hidden: bytes for hidden states.
    """

    streamed: frozenset[int] = frozenset()
    buffers: int = 0
    hidden: int = 0

    @property
    def everything(self) -> bool:
        """Whether all weights stay."""
        return not self.streamed


def plan_memory(
    pieces: Sequence[int],
    *,
    budget: int,
    whole: int,
    working: int,
    outside: int,
    hidden: int,
    all_hidden: int,
) -> MemoryPlan | int:
    """Decide which pieces stay: all if they fit, else as many as leave room for buffers and hidden states.

    Pieces that do not stay are spread evenly, so that one is fetched while those between are computed with.

    Args:
        pieces: bytes of each piece of both models, in the order in which they are needed.
        budget: bytes that may be used in all.
        whole: bytes of all weights of both models.
        working: bytes that are needed whatever stays: sums, activations of a micro-batch.
        outside: bytes of the weights that are in no piece; they always stay.
        hidden: bytes of the hidden states of one micro-batch, the least that a chunk can be.
        all_hidden: bytes of the hidden states of all samples, the most that a chunk can be.

    Returns:
        The plan, or if the budget does not hold even one piece at a time, how many bytes would.
    """
    if whole + working + hidden <= budget:
        return MemoryPlan(hidden=hidden)
    wanted = min(all_hidden, max(hidden, budget // 5))
    for buffers in (2, 1):
        for room in (wanted, hidden):
            for count in range(1, len(pieces) + 1):
                streamed = frozenset(int((n + 0.5) * len(pieces) / count) for n in range(count))
                kept = sum(size for place, size in enumerate(pieces) if place not in streamed)
                largest = max(pieces[place] for place in streamed)
                if working + outside + room + kept + min(buffers, count) * largest <= budget:
                    return MemoryPlan(streamed, min(buffers, count), room)
    return working + outside + hidden + max(pieces)


def free_memory(device: str, processes: int = 1) -> int:
    """Bytes that can be used on a device: what is free, with a margin, shared by the processes on this machine."""
    kind = torch.device(device)
    if kind.type == "cuda":
        free: int = torch.cuda.mem_get_info(kind)[0]
        return max(0, int(free * 0.95) - 2**28)
    return host_memory(processes)


def host_memory(processes: int = 1) -> int:
    """Bytes of host memory that can be used, likewise; a container's limit counts."""
    free = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            # What the page cache holds of files is given back when memory is needed.
            cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            used = int((group / "memory.current").read_text()) - (int(cached[1]) if cached else 0)
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass  # no control group of version 2
    return max(0, int(free * 0.9) // processes)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``1.5GB``, ``900MB`` or ``8GiB``.

    Raises:
        ValueError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f'"{text}" is no size; expected a number with a unit, such as 1.5GB or 900MB')
    return int(float(match[1]) * _UNITS[match[2].upper()])
