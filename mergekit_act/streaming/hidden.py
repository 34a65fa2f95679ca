"""Where the hidden states of a chunk wait between segments: on the device or in host memory."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

from torch import Tensor

__all__ = ["HiddenStates", "Place"]

Place = Literal["device", "host"]


class HiddenStates:
    """Tensors by key, each replaced as its micro-batch moves on.

    Args:
        place: where they wait.
        device: where they are needed.
    """

    def __init__(self, place: Place, device: str) -> None:
        self.place: Place = place
        self._device = device
        self._tensors: dict[Hashable, Tensor] = {}

    def put(self, key: Hashable, hidden: Tensor) -> None:
        """Keep a tensor, in the place of the one that had this key."""
        kept = self._tensors.get(key)
        if self.place == "host" and kept is not None and kept.shape == hidden.shape:
            kept.copy_(hidden)
        else:
            self._tensors[key] = hidden.cpu() if self.place == "host" else hidden

    def take(self, key: Hashable) -> Tensor | None:
        """The tensor, on the device; None if there is none yet."""
        kept = self._tensors.get(key)
        return None if kept is None else kept.to(self._device)

    def taken(self, key: Hashable) -> Tensor:
        """The tensor, which is there, on the device."""
        return self._tensors[key].to(self._device)

    def drop(self, key: Hashable) -> None:
        """Forget a tensor."""
        del self._tensors[key]

    def close(self) -> None:
        """Forget all tensors."""
        self._tensors.clear()
