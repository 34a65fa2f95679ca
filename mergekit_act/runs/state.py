"""The state of an unfinished run: what a rerun needs to go on, and what it must have in common with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mergekit_act.files import remove_leftovers, write_atomically
from mergekit_act.runs.settings import changed_settings

__all__ = ["StateFile", "check_settings", "is_complete"]

_KEY = "mergekit_act"
_FORMAT_VERSION = 1


class StateFile:
    """A file that holds what an unfinished run has computed.

    A safetensors file, replaced as a whole; its metadata are the settings and the progress.

    Args:
        path: of the file.
        settings: all that the content depends on.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = settings
        self._saved: int | None = None  # steps that are done in the file

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the progress as they were saved; None if there is no file.

        Raises:
            ValueError: it is the state of a run with other settings.
        """
        remove_leftovers(self.path)
        if not self.path.exists():
            return None
        check_settings(self.path, self._settings)
        metadata = _read_metadata(self.path)
        self._saved = int(metadata["done"])
        return load_file(self.path), metadata

    def save(self, tensors: Mapping[str, Tensor], *, done: int, total: int, **progress: Any) -> None:
        """Write the state, unless the file has it already.

        Args:
            tensors: what has been computed.
            done: how many of the steps are done.
            total: how many there are.
            progress: what else is needed to go on, as JSON can write it.
        """
        if done == self._saved:
            return
        metadata = {
            "kind": "state",
            "format_version": _FORMAT_VERSION,
            "settings": self._settings,
            "done": done,
            "total": total,
        }
        content = save(dict(tensors), metadata={_KEY: json.dumps(metadata | progress, sort_keys=True)})
        write_atomically(self.path, content, overwrite=True)
        self._saved = done


def check_settings(path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """See that the run whose state a file is had these settings; with ``overwrite`` remove it otherwise.

    Raises:
        ValueError: it had others, which are named, or the file is no such state.
    """
    try:
        changed = changed_settings(_read_metadata(path)["settings"], settings)
        if changed:
            raise ValueError(
                f"{path} keeps an unfinished run with other settings: {changed}. Go on with the settings it had, "
                "or say --overwrite to start anew"
            )
    except ValueError:
        if not overwrite:
            raise
        path.unlink()


def is_complete(path: Path) -> bool:
    """Whether all steps of a state are done, so that only the result was not written."""
    try:
        metadata = _read_metadata(path)
    except ValueError:
        return False
    return bool(metadata["done"] == metadata["total"])


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_KEY, "{}"))
        if metadata.get("kind") == "state" and metadata.get("format_version") == _FORMAT_VERSION:
            return dict(metadata)
        found = f'"{metadata.get("kind")}" of version {metadata.get("format_version")}'
    except (SafetensorError, json.JSONDecodeError) as error:
        found = str(error)
    raise ValueError(
        f"{path} is not the state of a run of this mergekit-act ({found}); delete it or say --overwrite to start anew"
    )
