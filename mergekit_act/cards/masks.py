"""The masks and profiles that a merge used, and their copies beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_act.artifacts import Mask, Profile, load_artifact
from mergekit_act.cards.markdown import Source
from mergekit_act.checking.summary import UsedMask
from mergekit_act.files import file_hash
from mergekit_act.merging import find_mask_files

__all__ = ["MaskFile", "find_fits", "find_masks", "map_setting"]


@dataclass(frozen=True)
class MaskFile:
    """A mask or profile that a merge config names.

    Attributes:
        setting: the value of ``mask`` that names it.
        density: of a profile.
        path: where it is.
        copy: its path in the merge's folder.
        sha256: of the file.
        artifact: what is in it.
    """

    setting: str
    density: float | None
    path: Path
    copy: str
    sha256: str
    artifact: Mask | Profile

    @property
    def sources(self) -> Sequence[Source]:
        """The profiles it was made of; a profile is its own source."""
        if isinstance(self.artifact, Mask):
            return self.artifact.sources
        return ({**self.artifact.described(), "density": self.density},)


def find_masks(used: Iterable[UsedMask]) -> list[MaskFile]:
    """All masks and profiles that a merge used.

    Raises:
        FileNotFoundError: one is not there.
        ArtifactError: one is not valid.
    """
    names: dict[str, str] = {}  # copy -> hash
    found: dict[tuple[str, float | None, Path], MaskFile] = {}
    for one in used:
        for path in find_mask_files(one.mask):
            digest = file_hash(path)
            candidates = [path.name, f"{path.parent.name}-{path.name}", f"{digest[:8]}-{path.name}"]
            copy = next(f"masks/{name}" for name in candidates if names.get(f"masks/{name}", digest) == digest)
            names[copy] = digest
            found[one.mask, one.mask_density, path] = MaskFile(
                one.mask, one.mask_density, path, copy, digest, load_artifact(path)
            )
    return list(found.values())


def find_fits(config: Any) -> dict[str, Path]:
    """The ``fit`` settings of a merge config -> the files of inputs they name."""
    found: dict[str, Path] = {}

    def note(setting: str) -> str:
        found[setting] = find_mask_files(setting, "fit")[0]
        return setting

    map_setting(config, "fit", note)
    return found


def map_setting(config: Any, name: str, change: Callable[[str], str]) -> Any:
    """A merge config with every string under a parameter changed, in gradients and filters too."""
    if isinstance(config, list):
        return [map_setting(item, name, change) for item in config]
    if not isinstance(config, dict):
        return config
    found = {key: map_setting(value, name, change) for key, value in config.items()}
    parameters = found.get("parameters")
    if isinstance(parameters, dict) and name in parameters:
        found["parameters"] = parameters | {name: _map_values(parameters[name], change)}
    return found


def _map_values(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_values(item, change) for item in value]
    if isinstance(value, dict) and "value" in value:
        return value | {"value": _map_values(value["value"], change)}
    return value
