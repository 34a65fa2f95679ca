"""Chunks: how many micro-batches go through the models between two loadings of what does not stay in memory."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_act.abilities.batches import MicroBatch
from mergekit_act.streaming.hidden import Place
from mergekit_act.streaming.memory import host_memory

__all__ = ["ChunkCutter"]

_FIRST_TOKENS = 1 << 14
_LONGEST_SECONDS = 300.0
_WAITED_SHARE = 0.05


class ChunkCutter:
    """Cuts chunks: small at first, and larger as long as the models are waited for; scores do not depend on it.

    A chunk that is interrupted is lost, so none is meant to take more than some minutes.

    Args:
        device_room: bytes for hidden states on the device.
        token_bytes: bytes that one token's hidden states take, and a row of the token embeddings, of both models.
        vocabulary: the most rows that a chunk can need.
        on_host: whether host memory is other memory than the device's.
        processes: that share this machine.
    """

    def __init__(self, device_room: int, token_bytes: int, vocabulary: int, *, on_host: bool, processes: int) -> None:
        self._device_room, self._token_bytes, self._vocabulary = device_room, token_bytes, vocabulary
        self._host_room = host_memory(processes) // 2 if on_host else 0
        self._wanted = _FIRST_TOKENS

    def cut(self, batches: Sequence[MicroBatch]) -> tuple[int, Place]:
        """How many of the micro-batches that are left make the next chunk, and where its hidden states wait."""
        rooms: dict[Place, int] = {
            # The rows of the token embeddings are always on the device.
            "device": self._device_room // 2 // self._token_bytes,
            "host": self._host_room // self._token_bytes,
        }
        on_device = self._device_room // self._token_bytes
        if on_device < self._vocabulary:
            rooms = {place: min(room, on_device) for place, room in rooms.items()}
        left = sum(batch.input_ids.numel() for batch in batches)
        wanted = min(self._wanted, left)
        place = next((place for place, room in rooms.items() if room >= wanted), max(rooms, key=lambda p: rooms[p]))
        tokens = min(wanted, rooms[place])
        count = total = 0
        while count < len(batches) and (count == 0 or total + batches[count].input_ids.numel() <= tokens):
            total += batches[count].input_ids.numel()
            count += 1
        return count, place

    def learn(self, seconds: float, waited: float) -> None:
        """Take account of a chunk that took ``seconds``, of which weights were waited for ``waited``."""
        if waited > _WAITED_SHARE * seconds and seconds < _LONGEST_SECONDS / 2:
            self._wanted *= 2
        elif seconds > 2 * _LONGEST_SECONDS:
            self._wanted //= 2
