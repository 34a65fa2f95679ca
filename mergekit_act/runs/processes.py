"""Several processes that share the samples, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import Tensor, distributed

__all__ = ["Processes", "end_process", "join_processes", "rank_and_count"]


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

    def add(self, vector: Tensor) -> Tensor:
        """The sum of every process's vector, on the CPU.

        Raises:
            ConnectionError: another process has ended.
        """
        total = vector.cpu()
        if self.count > 1:
            with _others_alive():
                distributed.all_reduce(total, group=self.group)
        return total

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks.

        Raises:
            ConnectionError: another process has ended.
        """
        found = [value] * self.count
        if self.count > 1:
            with _others_alive():
                distributed.all_gather_object(found, value, group=self.group)
        return found

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            with _others_alive():
                distributed.barrier(group=self.group)


def end_process() -> None:
    """End this process at once, if it is one of several that have nothing left to do.

    Python's own way ends threads of a process group that is still open, and PyTorch aborts now and then when it does.
    """
    if rank_and_count()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def rank_and_count() -> tuple[int, int]:
    """This process's number among those that a launcher started, and how many they are; 0 and 1 without a launcher."""
    if not os.environ.get("RANK"):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that the launcher's environment variables tell of; without them this one is alone.

    Sums are few and are reduced in host memory, once, so gloo serves GPUs as well.
    """
    _, count = rank_and_count()
    if count == 1:
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
