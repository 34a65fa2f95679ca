"""How far a run is, and what it has so far: kept in a file, from which it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_act.profiling.inputs import InputSample
from mergekit_act.profiling.sums import ChannelSums
from mergekit_act.runs.state import StateFile

__all__ = ["Gathered"]

_INPUTS = "inputs."  # stands before the names of inputs' buffers


@dataclass(frozen=True)
class Gathered:
    """What a run adds up.

    Attributes:
        sums: of each ability.
        inputs: those of the target's modules that are kept; None if none are.
    """

    sums: Sequence[ChannelSums]
    inputs: InputSample | None = None

    def store(self, state: StateFile, done: int, total: int) -> None:
        """Save it, with so many micro-batches done of all there are."""
        begun = {str(place): sums for place, sums in enumerate(self.sums) if any(sums.counts.values())}
        buffers, known = ({}, {}) if self.inputs is None else self.inputs.state()
        state.save(
            {name: sums.vector.cpu() for name, sums in begun.items()} | {_INPUTS + n: b for n, b in buffers.items()},
            done=done,
            total=total,
            counts={name: list(sums.counts.values()) for name, sums in begun.items()},
            expert_tokens={name: sums.expert_tokens for name, sums in begun.items()},
            **({"inputs": known} if known else {}),
        )

    def restore(self, state: StateFile) -> int:
        """Take what was saved, if anything was.

        Returns:
            How many micro-batches are done.

        Raises:
            ValueError: it is the state of a run with other settings.
        """
        loaded = state.load()
        if loaded is None:
            return 0
        tensors, progress = loaded
        buffers = {name.removeprefix(_INPUTS): t for name, t in tensors.items() if name.startswith(_INPUTS)}
        if self.inputs is not None:
            self.inputs.resume(buffers, progress["inputs"])
        for name, counts in progress["counts"].items():
            sums = self.sums[int(name)]
            sums.vector.copy_(tensors[name])
            sums.counts = dict(zip(sums.counts, counts, strict=True))
            sums.expert_tokens = progress["expert_tokens"][name]
        return int(progress["done"])
