"""The state of an unfinished run: what a rerun needs to go on, and what it must have in common with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mergekit_act.files import remove_leftovers, write_atomically
from mergekit_act.profiling.sums import DifferenceSums
from mergekit_act.runs.settings import changed_settings

__all__ = ["RunState", "check_settings", "is_complete"]

_KEY = "mergekit_act"
_FORMAT_VERSION = 1


class RunState:
    """A file that holds the sums of an unfinished run.

    A safetensors file, replaced as a whole: one float64 vector per ability that has begun, and as metadata the
    settings, the counts, and how many micro-batches are done.

    Args:
        path: of the file.
        settings: all that the sums depend on.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = settings
        self.saved: int | None = None  # micro-batches that are done in the file

    def resume(self, every_sums: Sequence[DifferenceSums]) -> int:
        """Set sums and counts to what the file has, if there is one.

        Returns:
            How many micro-batches are done.

        Raises:
            ValueError: it is the state of a run with other settings.
        """
        remove_leftovers(self.path)
        if not self.path.exists():
            return 0
        check_settings(self.path, self._settings)
        metadata = _read_metadata(self.path)
        with safe_open(self.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                sums = every_sums[int(name)]
                sums.vector.copy_(file.get_tensor(name))
                sums.counts = dict(zip(sums.counts, metadata["counts"][name], strict=True))
                sums.expert_tokens = metadata["expert_tokens"][name]
        self.saved = int(metadata["done"])
        return self.saved

    def save(self, every_sums: Sequence[DifferenceSums], done: int, total: int) -> None:
        """Write the state, unless the file has it already: ``done`` of ``total`` micro-batches are added up."""
        if done == self.saved:
            return
        begun = {str(place): sums for place, sums in enumerate(every_sums) if any(sums.counts.values())}
        metadata = {
            "kind": "state",
            "format_version": _FORMAT_VERSION,
            "settings": self._settings,
            "done": done,
            "total": total,
            "counts": {name: list(sums.counts.values()) for name, sums in begun.items()},
            "expert_tokens": {name: sums.expert_tokens for name, sums in begun.items()},
        }
        content = save(
            {name: sums.vector.cpu() for name, sums in begun.items()},
            metadata={_KEY: json.dumps(metadata, sort_keys=True)},
        )
        write_atomically(self.path, content, overwrite=True)
        self.saved = done


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
    """Whether a state has all micro-batches, so that only the profiles were not written."""
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
