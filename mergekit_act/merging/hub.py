"""Masks and profiles on the Hugging Face Hub, through its own client and cache."""

from __future__ import annotations

import glob
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, parse_hf_uri
from huggingface_hub.errors import HfUriError, HFValidationError, HTTPError  # type: ignore[attr-defined]

from mergekit_act.wording import one_line

__all__ = ["HUB", "fetch_mask_files", "look_again"]

HUB = "hf://"


@lru_cache(maxsize=64)  # one merge sees one state of the Hub
def fetch_mask_files(reference: str) -> list[Path]:
    """Fetch what ``hf://user/repo[@revision]/path`` names; the path may be a glob.

    Files come from the client's cache where it has them; without a network only exact paths can.

    Returns:
        Where they lie on this machine, in the order of their names.

    Raises:
        ValueError: the reference is malformed.
        FileNotFoundError: the repository, the revision or the file is not there, or the Hub is out of reach.
    """
    try:
        parsed = parse_hf_uri(reference)
    except HfUriError as error:
        raise ValueError(f'mask "{reference}": {error}; expected hf://user/repo[@revision]/file.safetensors') from error
    if not parsed.path_in_repo:
        raise ValueError(f'mask "{reference}" names a repository; add a file, or "/*.safetensors" for all in it')
    repo, revision, kind = parsed.id, parsed.revision, parsed.type
    try:
        names = [parsed.path_in_repo]
        if glob.has_magic(parsed.path_in_repo):
            listed = HfApi().list_repo_files(repo, revision=revision, repo_type=kind)
            names = sorted(name for name in listed if _matches(name, parsed.path_in_repo))
        return [Path(hf_hub_download(repo, name, revision=revision, repo_type=kind)) for name in names]
    except (HTTPError, HFValidationError, OSError) as error:  # the client's own errors are of both kinds
        reason = one_line(error)
        raise FileNotFoundError(f'mask "{reference}" could not be fetched: {reason}') from error


def look_again() -> None:
    """Let the next merge of this process see the Hub as it is then."""
    fetch_mask_files.cache_clear()


def _matches(name: str, pattern: str) -> bool:
    """As a local glob: ``*`` stays inside a folder."""
    parts, globs = name.split("/"), pattern.split("/")
    return len(parts) == len(globs) and all(map(fnmatch, parts, globs))
