"""The repository of the Hub that a result is uploaded to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]

from mergekit_act.wording import one_line

__all__ = ["make_repository", "visibility"]


def visibility(name: str) -> str:
    """Who will see what is uploaded: ``public``, ``private``, or ``new, private``.

    Raises:
        ValueError: the Hub cannot be reached.
    """
    with _told(name):
        try:
            return "private" if HfApi().model_info(name).private else "public"
        except RepositoryNotFoundError:
            return "new, private"


def make_repository(name: str) -> None:
    """Make it, private, if it is not there, and see that this token may write to it, before hours of work.

    Raises:
        ValueError: the Hub does not allow it, or cannot be reached.
    """
    with _told(name):
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().auth_check(name, write=True)


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be written to: {one_line(error)}") from error
