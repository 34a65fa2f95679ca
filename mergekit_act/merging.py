"""The merge method ``act``: move the selected channels of task vectors into the target (paper eq. 3 to 5)."""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method
from mergekit.merge_methods.registry import register, registered_methods
from pydantic import Field
from torch import Tensor

from mergekit_act import autoload
from mergekit_act.artifacts import Mask, Profile, load_artifact
from mergekit_act.channels import Layout
from mergekit_act.selection import select_channels, unite, validate_density

__all__ = [
    "MaskFiles",
    "TensorSelection",
    "channels_along",
    "find_mask_files",
    "is_ours",
    "load_mask_files",
    "refuse_to_run",
    "register_methods",
    "transfer",
]

METHOD = "act"
LOG = logging.getLogger(__name__)

PAPER = "https://arxiv.org/abs/2601.09398"


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, as mergekit's tasks need it
class TensorSelection:
    """Which slices of one tensor are selected.

    Attributes:
        slices: channel axis -> bool ``[channels]``, or ``[experts, channels]`` for a 3-D tensor. A tied matrix has
            two axes: a cell is selected if its row or its column is.
        vocabulary_axis: the axis of token ids, along which the tensor may be shorter than the mask.
    """

    slices: Mapping[int, Tensor]
    vocabulary_axis: int | None = None

    def fitted(self, name: str | None, shape: Sequence[int]) -> TensorSelection:
        """The same selection without the vocabulary rows that the tensor does not have, which is told.

        Raises:
            ValueError: the tensor has other channels than the mask.
        """
        slices = dict(self.slices)
        axis = self.vocabulary_axis
        if axis in slices and len(slices[axis]) > shape[axis]:
            lost = int(slices[axis][shape[axis] :].sum())
            LOG.warning('"%s" has %d rows: %d selected rows behind them are dropped', name, shape[axis], lost)
            slices[axis] = slices[axis][: shape[axis]]
        for its_axis, chosen in slices.items():
            if its_axis >= len(shape) or tuple(chosen.shape) != channels_along(its_axis, shape, chosen.ndim):
                raise ValueError(
                    f'the mask has {list(chosen.shape)} channels for "{name}"; the tensor is {list(shape)} (axis '
                    f"{its_axis}). Profile this pair again with mergekit-act profile"
                )
        return TensorSelection(slices)


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


def is_ours(method_name: str) -> bool:
    """Whether a merge method's name is one of ours."""
    return method_name == METHOD


def refuse_to_run(reason: str) -> None:
    """Make our methods refuse every merge: without the planner's checks they could do silent damage."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError(
            f"mergekit {version('mergekit')} does not fit mergekit-act: {reason}. mergekit 0.1.5 works; install "
            '"mergekit>=0.1.5,<0.2"'
        )

    act_merge.validate_inputs = refuse


@merge_method(  # type: ignore[untyped-decorator]
    name=METHOD,
    pretty_name="ACT",
    reference_url=PAPER,
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    uses_accelerator=False,
)
def act_merge(
    group: TensorGroup,
    weight: PerNonBase[Annotated[float, Field(allow_inf_nan=False)] | None] = None,
    mask: PerNonBase[str | None] = None,
    mask_density: PerNonBase[float | None] = None,
) -> Tensor:
    """θ_trg + Σ weight · (θ_abl − θ_trg) ⊙ M for one tensor.

    Args:
        group: borrowed tensors of one shape and dtype, the base being the target's.
        weight: factor on each ability model's task vector; required.
        mask: for each ability model the files of its masks. The planner seam has replaced them by what they select
            of this very tensor (``TensorSelection``). In-memory merges pass the setting itself; there the names that
            the mask's own model ties are taken for one matrix.
        mask_density: for profiles, the fraction of channels that each keeps.

    Returns:
        The base tensor itself if nothing of it is selected, else a new tensor.
    """
    if group.base is None:
        raise ValueError("act needs the target as base_model")
    base = group.base.tensor
    contributions = []
    for entry in group.non_base:
        setting: object = mask[entry.id]
        factor = weight[entry.id]
        if factor is None:
            raise ValueError(f'{entry.id} has no "weight", the factor on its changes')
        if isinstance(setting, str):
            files = load_mask_files(setting, mask_density[entry.id])
            names = files.layout.tied_names(group.metadata.name or "")
            setting = files.selection(names, group.metadata.vocabulary_axis)
        if isinstance(setting, TensorSelection) and factor != 0:
            contributions.append((entry.tensor, factor, setting.fitted(group.metadata.name, base.shape)))
    return transfer(base, contributions)


def transfer(base: Tensor, contributions: Sequence[tuple[Tensor, float, TensorSelection]]) -> Tensor:
    """Add weighted differences inside selections.

    Differences are accumulated in float32 (float64 for float64 tensors) in order and rounded once to the dtype.

    Args:
        base: the target's tensor. It is not changed.
        contributions: (ability model's tensor, weight, what is selected of it).

    Returns:
        ``base`` itself if nothing is selected. Otherwise a new tensor that is bit for bit ``base`` outside the union.
    """
    axes = {axis for _, _, selection in contributions for axis in selection.slices}
    if not any(chosen.any() for _, _, selection in contributions for chosen in selection.slices.values()):
        return base
    merged = base.clone()
    # A cell that is selected along two axes is computed in both passes, with all of its contributions in either.
    for axis in sorted(axes):
        _transfer_along(axis, base, merged, contributions)
    return merged


def _transfer_along(
    axis: int, base: Tensor, merged: Tensor, contributions: Sequence[tuple[Tensor, float, TensorSelection]]
) -> None:
    """Compute all slices along ``axis`` that any contribution selects; writes into ``merged``."""
    own = [selection.slices.get(axis) for _, _, selection in contributions]
    union = torch.stack([chosen for chosen in own if chosen is not None]).any(0)
    if not union.any():
        return
    index = tuple(part.to(base.device) for part in union.nonzero(as_tuple=True))
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    target = _leading(base, axis, union)[index].to(wide)  # [selected, …]
    change = torch.zeros_like(target)
    for (tensor, weight, selection), chosen in zip(contributions, own, strict=True):
        other = next((cells for its_axis, cells in selection.slices.items() if its_axis != axis), None)
        inside = torch.zeros_like(index[0], dtype=torch.bool) if chosen is None else chosen.to(base.device)[index]
        if other is None:
            rows = inside.nonzero().flatten()
            some = tuple(part[rows] for part in index)
            difference = _leading(tensor, axis, union)[some].to(wide) - target[rows]
            change[rows] += weight * difference
        else:
            difference = _leading(tensor, axis, union)[index].to(wide) - target
            cells = inside[:, None] | other.to(base.device)[None, :]
            change += torch.where(cells, weight * difference, 0.0)
    _leading(merged, axis, union)[index] = (target + change).to(merged.dtype)


def _leading(tensor: Tensor, axis: int, chosen: Tensor) -> Tensor:
    """A view with the channel dimensions in front, as many as the mask has."""
    return tensor.movedim(axis, chosen.ndim - 1)


def channels_along(axis: int, shape: Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Shape that a mask of so many dimensions has for a tensor: ``[channels]``, or ``[experts, channels]``."""
    return (shape[axis],) if dimensions == 1 else (shape[0], shape[axis])


def find_mask_files(setting: str) -> tuple[Path, ...]:
    """The files that a ``mask`` setting names: paths or globs, separated by commas.

    Raises:
        FileNotFoundError: a path does not exist or a glob matches nothing.
    """
    found: dict[Path, None] = {}
    parts = [piece.strip() for piece in setting.split(",") if piece.strip()]
    if not parts:
        raise FileNotFoundError("mask is empty; name a mask or profile")
    for part in parts:
        is_glob = glob.has_magic(part) and not Path(part).exists()
        matches = sorted(glob.glob(part, recursive=True)) if is_glob else [part]
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            if Path(part).is_dir():
                raise FileNotFoundError(f'mask "{part}" is a folder; write "{part}/*.safetensors" for all in it')
            what = "matches no file" if is_glob else "does not exist"
            raise FileNotFoundError(f'mask "{part}" {what} (relative to {Path.cwd()})')
        found.update(dict.fromkeys(files))
    return tuple(found)


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
    states = tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    return _load_mask_files(files, states, density)


@lru_cache(maxsize=64)
def _load_mask_files(files: tuple[Path, ...], _states: tuple[tuple[int, int], ...], density: float | None) -> MaskFiles:
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


def register_methods() -> None:
    """Make ``act`` known to mergekit, once."""
    if not any(is_ours(method.spec.name) for method in registered_methods()):
        register(act_merge)


register_methods()
autoload.install()  # no merge without the planners' checks, however this module came to be imported
