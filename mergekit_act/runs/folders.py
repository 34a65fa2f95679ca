"""A run's claim on what it writes: no two runs write to one place at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["claimed", "lock_of"]


def lock_of(path: Path) -> Path:
    """The file that is locked as long as a run claims a path."""
    return path.parent / f".{path.name}.lock"


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Within, no other process claims this path; a process that is killed leaves no claim behind.

    Args:
        path: the file by which a run's work is known, such as its state; its folders are made if need be, and removed
            again if nothing was written to them.

    Raises:
        BlockingIOError: another run claims it.
    """
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_of(path), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"another run is at work on {path}; wait until it has ended, or choose another place"
        ) from None
    try:
        yield
    finally:
        lock_of(path).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
