"""Several processes that share the samples, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed

from mergekit_act.profiling.sums import DifferenceSums

__all__ = ["Processes", "join_processes"]


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    Attributes:
        rank: its number.
        count: of all of them.
        local_rank: its number on this machine.
        local_count: how many there are on this machine.
        group: in which they wait for each other.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    group: Any = None

    def add_up(self, every_sums: Sequence[DifferenceSums]) -> None:
        """Replace sums and counts by those over all processes.

        Raises:
            ConnectionError: another process has ended.
        """
        for sums in every_sums if self.count > 1 else ():
            vector = sums.vector.cpu()
            counted: list[Any] = [None] * self.count
            with _others_alive():
                distributed.all_reduce(vector, group=self.group)
                distributed.all_gather_object(counted, (sums.counts, sums.expert_tokens), group=self.group)
            sums.vector.copy_(vector)
            sums.counts = {module: sum(counts[module] for counts, _ in counted) for module in sums.counts}
            experts = {module for _, tokens in counted for module in tokens}
            sums.expert_tokens = {
                module: [sum(column) for column in zip(*(t[module] for _, t in counted if module in t), strict=True)]
                for module in sorted(experts)
            }

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            with _others_alive():
                distributed.barrier(group=self.group)


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that the launcher's environment variables tell of; without them this one is alone.

    Sums are few and are reduced in host memory, once, so gloo serves GPUs as well.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    # One that is done early waits for the others; one that dies closes its connection, which ends the wait.
    distributed.init_process_group("gloo")
    patient = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    rank = distributed.get_rank()
    try:
        yield Processes(
            rank,
            distributed.get_world_size(),
            int(os.environ.get("LOCAL_RANK", rank)),
            int(os.environ.get("LOCAL_WORLD_SIZE", count)),
            patient,
        )
    finally:
        distributed.destroy_process_group()


@contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "another process ended before all were done; what it says is the reason, and the same command goes on"
        ) from error
