"""The files that ``mask`` settings name, on disk or on the Hub, and the channels they select together."""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from mergekit_act.artifacts import Mask, Profile, load_artifact
from mergekit_act.channels import Layout
from mergekit_act.files import file_state
from mergekit_act.merging.hub import HUB, fetch_mask_files
from mergekit_act.merging.kernel import TensorSelection
from mergekit_act.selection import check_one_criterion, select_channels, unite, validate_density

__all__ = ["MaskFiles", "find_mask_files", "load_mask_files"]

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class MaskFiles:
    """The union of the masks that one ``mask`` setting names, and what the files say of their models."""

    channels: Mapping[str, Tensor]
    layout: Layout
    files: tuple[Path, ...]
    pairs: tuple[tuple[str | None, str | None], ...]

    def selection(self, names: Sequence[str], vocabulary_axis: int | None = None) -> TensorSelection | None:
        """What is selected of a tensor, by any of its names; None if nothing is."""
        slices: dict[int, Tensor] = {}
        for module, owned in self.layout.parameters.items():
            for name, axis in owned:
                if name in names and module in self.channels:
                    slices[axis] = slices[axis] | self.channels[module] if axis in slices else self.channels[module]
        return TensorSelection(slices, vocabulary_axis) if slices else None

    def names_of(self, module: str) -> list[str]:
        """All names of the parameters that a module's channels own slices of."""
        return [tied for name, _ in self.layout.parameters[module] for tied in self.layout.tied_names(name)]


def find_mask_files(setting: str, key: str = "mask") -> tuple[Path, ...]:
    """The files that a ``mask`` setting names: paths, globs or ``hf://`` references, separated by commas.

    Args:
        setting: what it is set to.
        key: the setting's name, for errors.

    Raises:
        ValueError: a Hub reference is malformed.
        FileNotFoundError: a path does not exist or a glob matches nothing.
    """
    parts = [piece.strip() for piece in setting.split(",") if piece.strip()]
    if not parts:
        raise FileNotFoundError(f"{key} is empty; name {'a mask or profile' if key == 'mask' else 'a file'}")
    found: dict[Path, None] = {}
    for part in parts:
        files = fetch_mask_files(part) if part.startswith(HUB) else _local_files(part, key)
        if not files:
            raise FileNotFoundError(f'{key} "{part}" matches no file')
        found.update(dict.fromkeys(files))
    return tuple(found)


def _local_files(part: str, key: str) -> list[Path]:
    is_glob = glob.has_magic(part) and not Path(part).exists()
    matches = sorted(glob.glob(part, recursive=True)) if is_glob else [part]
    files = [Path(match) for match in matches if Path(match).is_file()]
    if not files and Path(part).is_dir():
        remedy = f'name a file, such as "{part}/fit/inputs.safetensors"'
        remedy = remedy if key == "fit" else f'write "{part}/*.safetensors" for all in it'
        raise FileNotFoundError(f'{key} "{part}" is a folder; {remedy}')
    if not files:
        what = "matches no file" if is_glob else "does not exist"
        raise FileNotFoundError(f'{key} "{part}" {what} (relative to {Path.cwd()})')
    return files


def load_mask_files(setting: str, density: float | None) -> MaskFiles:
    """Load what a ``mask`` setting names and unite it (paper eq. 3).

    Args:
        setting: paths or globs of masks or profiles, separated by commas.
        density: for profiles, the fraction of channels each keeps; None for masks.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a profile without density, a mask with one, a density outside (0, 1], files of different models.
        ArtifactError: a file is not valid.
    """
    files = find_mask_files(setting)
    states = tuple(map(file_state, files))
    return _load_mask_files(files, states, density)


@lru_cache(maxsize=64)
def _load_mask_files(files: tuple[Path, ...], _states: tuple[tuple[int, ...], ...], density: float | None) -> MaskFiles:
    selections, artifacts = [], []
    for path in files:
        artifact = load_artifact(path)
        artifacts.append(artifact)
        if isinstance(artifact, Profile):
            if density is None:
                raise ValueError(f"{path} is a profile; add mask_density, the fraction of channels to keep (0.01: 1 %)")
            validate_density(density)
            selections.append(select_channels(artifact, density))
        elif density is not None:
            raise ValueError(f"{path} is a mask; its density was chosen when it was made. Remove mask_density")
        else:
            selections.append(dict(artifact.channels))
    try:
        check_one_criterion([artifact for artifact in artifacts if isinstance(artifact, Profile)])
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, files))}: {error}") from error
    layout = artifacts[0].layout
    for path, artifact in zip(files[1:], artifacts[1:], strict=True):
        if not layout.fits(artifact.layout):
            raise ValueError(f"{files[0]} and {path} are of models with different modules; a mask is for one model")
    pairs = tuple(pair for artifact in artifacts for pair in _pairs(artifact))
    union = unite(selections)
    if not union:
        LOG.warning("%s selects no channels: nothing will be transferred", ", ".join(map(str, files)))
    return MaskFiles(union, layout, files, pairs)


def _pairs(artifact: Mask | Profile) -> list[tuple[str | None, str | None]]:
    """Fingerprints of the target and ability model that a file was made from, as far as it says."""
    if isinstance(artifact, Profile):
        return [(artifact.target.get("fingerprint"), artifact.ability_model.get("fingerprint"))]
    return [
        ((source.get("target") or {}).get("fingerprint"), (source.get("ability_model") or {}).get("fingerprint"))
        for source in artifact.sources
    ]
