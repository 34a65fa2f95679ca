"""Files on disk: written whole or not at all, never over another without being told."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mergekit_act.wording import enumerate_some, escape

__all__ = [
    "check_free",
    "check_regular",
    "check_writable",
    "file_hash",
    "file_state",
    "remove_leftovers",
    "write_atomically",
]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: str | Path) -> tuple[int, ...]:
    """What differs when a file has been written again, even at once, in the same size, or with its old date."""
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def check_free(paths: Iterable[str | Path], *, overwrite: bool) -> None:
    """Raise FileExistsError if an output file exists, before any work is done for it; a folder can't be replaced.

    A link counts as a file, wherever it leads: it is what a new file would replace.
    """
    paths = list(paths)
    folders = [escape(path) for path in paths if Path(path).is_dir() and not Path(path).is_symlink()]
    if folders:
        raise IsADirectoryError(f"{enumerate_some(folders)}: a folder, which no file can replace; choose another name")
    taken = [escape(path) for path in paths if os.path.lexists(path)]
    if taken and not overwrite:
        verb = "exists" if len(taken) == 1 else "exist"
        raise FileExistsError(f"{enumerate_some(taken)} {verb}. Choose another name or say --overwrite.")


def check_regular(path: str | Path) -> None:
    """Raise an OSError if something is there that is no regular file, such as a pipe, a device or a folder."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{escape(path)} is {'a folder' if path.is_dir() else 'no regular file'}; name a file")


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files that a killed ``write_atomically`` has left beside a path."""
    path = Path(path)
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write a file so that no one ever sees half of it: temporary file beside it, fsync, rename.

    A link in its place is replaced, not what it leads to; a pipe, device or folder is not.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is false.
        OSError: it can't be written; the message names it.
    """
    path = Path(path)
    check_free([path], overwrite=overwrite)
    check_regular(path)
    try:
        _write(path, content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"{escape(path)} could not be written: {reason}. Mend that and give the same command again"
        ) from error


def check_writable(folder: str | Path) -> None:
    """Raise NotADirectoryError or PermissionError if a folder can't be made or written to; it is not made."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is no folder; choose another output folder than {folder}")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{existing} cannot be written to; choose another output folder than {folder}")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
