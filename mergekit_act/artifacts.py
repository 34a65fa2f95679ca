"""Profiles and masks: what is in them, and how they are written, read and validated.

Both are safetensors files with one metadata key, ``mergekit_act``, whose JSON says all that a merge needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mergekit_act import __version__
from mergekit_act.channels import Layout
from mergekit_act.files import write_atomically

__all__ = [
    "ArtifactError",
    "Mask",
    "Profile",
    "load_artifact",
    "load_mask",
    "load_metadata",
    "load_profile",
    "save_mask",
    "save_profile",
]

FORMAT_VERSION = 1
_KEY = "mergekit_act"


class ArtifactError(ValueError):
    """A profile or mask that cannot be used; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class Profile:
    """The scores of every channel for one pair of models and one ability.

    Attributes:
        scores: module -> float32 ``[channels]`` (``[experts, channels]`` for fused experts): the mean over all answer
            tokens of the absolute difference of the two models' activations (paper eq. 2), in module order.
        layout: what each channel owns.
        criterion: ``activation``, ``weight`` or ``random``.
        ability: the ability's name.
        target: the target model: ``model``, ``revision``, ``fingerprint``.
        ability_model: the ability model, likewise.
        samples: number of samples.
        answer_tokens: number of answer tokens.
        dtype: in which the forward passes ran.
        data: resolved data settings and the fingerprint of the token ids.
        shared_rows: module -> number of its leading channels that both models have, for vocabularies of different
            length. The channels behind are never selected.
    """

    scores: Mapping[str, Tensor]
    layout: Layout
    criterion: str
    ability: str
    target: Mapping[str, Any]
    ability_model: Mapping[str, Any]
    samples: int = 0
    answer_tokens: int = 0
    dtype: str = "float32"
    data: Mapping[str, Any] = field(default_factory=dict)
    shared_rows: Mapping[str, int] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Where it comes from, as masks record it: models, samples, data settings."""
        return {
            "ability": self.ability,
            "criterion": self.criterion,
            "target": dict(self.target),
            "ability_model": dict(self.ability_model),
            "samples": self.samples,
            "answer_tokens": self.answer_tokens,
            "dtype": self.dtype,
            "data": {key: value for key, value in self.data.items() if key != "expert_tokens"},
        }


@dataclass(frozen=True)
class Mask:
    """A set of channels.

    Attributes:
        channels: module -> bool ``[channels]`` (``[experts, channels]``), for modules with a selected channel.
        layout: what each channel owns.
        sources: for each profile its file's ``sha256``, ``ability``, ``density``, models, samples and data settings.
        operation: how the sources were put together.
        counts: of channels and parameters, selected and in all.
    """

    channels: Mapping[str, Tensor]
    layout: Layout
    sources: tuple[Mapping[str, Any], ...] = ()
    operation: str = "union"
    counts: Mapping[str, int] = field(default_factory=dict)


_PROVENANCE = {
    "profile": tuple(n for n in Profile.__dataclass_fields__ if n not in ("scores", "layout")),
    "mask": tuple(n for n in Mask.__dataclass_fields__ if n not in ("channels", "layout")),
}


def save_profile(profile: Profile, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a profile. Equal content gives equal bytes.

    Raises:
        ArtifactError: a score is missing, of the wrong shape, negative, NaN or infinite.
        FileExistsError: the file exists and ``overwrite`` is false.
    """
    _check(_profile_problems(profile), path)
    _save("profile", profile, profile.scores, path, overwrite)


def save_mask(mask: Mask, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a mask. Equal content gives equal bytes.

    Raises:
        ArtifactError: a module is unknown or of the wrong shape.
        FileExistsError: the file exists and ``overwrite`` is false.
    """
    _check(_mask_problems(mask), path)
    selected = {module: chosen for module, chosen in mask.channels.items() if chosen.any()}
    _save("mask", mask, selected, path, overwrite)


def load_profile(path: str | Path) -> Profile:
    """Read and validate a profile.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is not a complete, valid profile of this format version.
    """
    artifact = load_artifact(path)
    if isinstance(artifact, Mask):
        raise ArtifactError(f"{path} is a mask; expected a profile. mergekit-act profile writes profiles.")
    return artifact


def load_mask(path: str | Path) -> Mask:
    """Read and validate a mask.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is not a complete, valid mask of this format version.
    """
    artifact = load_artifact(path)
    if isinstance(artifact, Profile):
        raise ArtifactError(f"{path} is a profile; expected a mask. Make one with mergekit-act mask {path}.")
    return artifact


def load_artifact(path: str | Path) -> Profile | Mask:
    """Read a file that is either a profile or a mask; raises as the two functions for one kind do."""
    path = Path(path)
    metadata, tensors = _read(path)
    layout = _layout_from(metadata, path)
    order = {module: place for place, module in enumerate(layout.parameters)}
    tensors = {module: tensors[module] for module in sorted(tensors, key=lambda module: order.get(module, -1))}
    kind = metadata["kind"]
    known = {name: metadata[name] for name in _PROVENANCE[kind] if name in metadata}
    if kind == "mask":
        sources = known.get("sources", [])
        if not (isinstance(sources, list) and all(isinstance(source, dict) for source in sources)):
            raise _invalid(path, 'its "sources" are no list of objects')
        known["sources"] = tuple(sources)
        mask = Mask(channels=tensors, layout=layout, **known)
        _check(_mask_problems(mask), path)
        return mask
    kinds = {"criterion": str, "ability": str, "target": dict, "ability_model": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(known.get(name), kind)]
    _check([f'its metadata lacks "{name}"' for name in wrong], path)
    profile = Profile(scores=tensors, layout=layout, **known)
    _check(_profile_problems(profile), path)
    return profile


def _save(
    kind: str, artifact: Profile | Mask, tensors: Mapping[str, Tensor], path: str | Path, overwrite: bool
) -> None:
    layout = artifact.layout
    metadata: dict[str, Any] = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "modules": list(layout.modules),
        "parameters": {module: [list(pair) for pair in owned] for module, owned in layout.parameters.items()},
        "tied": [list(group) for group in layout.tied],
        "versions": {
            "mergekit-act": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
    }
    if layout.shapes is not None:
        metadata["shapes"] = {name: list(shape) for name, shape in layout.shapes.items()}
    metadata |= {name: getattr(artifact, name) for name in _PROVENANCE[kind]}
    content = save(
        {module: tensor.contiguous().cpu() for module, tensor in tensors.items()},
        metadata={_KEY: json.dumps(metadata, sort_keys=True)},
    )
    write_atomically(path, content, overwrite=overwrite)


def load_metadata(path: str | Path) -> dict[str, Any]:
    """What a profile or mask says of itself, without its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is no complete file of ours of this format version.
    """
    return _read(Path(path), tensors=False)[0]


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; name the files in it, such as {path}/*.safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. mergekit-act profile and mergekit-act mask write such files.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            # Copies: a tensor that maps the file would change with it.
            read = {name: file.get_tensor(name).clone() for name in (file.keys() if tensors else ())}
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a complete safetensors file ({error}). Make it again.") from error
    if text is None:
        raise ArtifactError(f'{path} is not a profile or mask of mergekit-act: it has no "{_KEY}" metadata.')
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: its metadata is not JSON ({error}). Make it again.") from error
    if not isinstance(metadata, dict):
        raise ArtifactError(f"{path}: its metadata is not a JSON object. Make it again.")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {metadata.get('format_version')!r}; this mergekit-act {__version__} reads "
            f"version {FORMAT_VERSION}. Update mergekit-act or make the file again."
        )
    if metadata.get("kind") not in _PROVENANCE:
        raise ArtifactError(f'{path} is a "{metadata.get("kind")}"; expected a profile or a mask.')
    return metadata, read


def _layout_from(metadata: Mapping[str, Any], path: Path) -> Layout:
    try:
        owners = {
            module: tuple((str(name), int(axis)) for name, axis in metadata["parameters"][module])
            for module in metadata["modules"]
        }
        shapes = metadata.get("shapes")
        layout = Layout(
            parameters=owners,
            tied=tuple(tuple(map(str, group)) for group in metadata["tied"]),
            shapes=None if shapes is None else {name: tuple(map(int, shape)) for name, shape in shapes.items()},
        )
        if shapes is not None:
            layout.channel_count()  # every shape is there and has the axis
        if any(axis not in (0, 1, 2) for owned in owners.values() for _, axis in owned):
            raise ValueError("a channel axis is none of 0, 1, 2")
        return layout
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        why = f'its metadata does not describe its modules ("modules", "parameters", "tied", "shapes"): {error!r}'
        raise _invalid(path, why) from error


def _profile_problems(profile: Profile) -> list[str]:
    found = [f'module "{module}" has no scores' for module in profile.layout.modules if module not in profile.scores]
    if profile.criterion not in ("activation", "weight", "random"):
        found.append(f'criterion "{profile.criterion}" is none of activation, weight, random')
    for module, scores in profile.scores.items():
        found += _tensor_problems(profile.layout, module, scores, torch.float32)
        if scores.dtype == torch.float32 and not torch.isfinite(scores).all():
            found.append(f'module "{module}" has scores that are NaN or infinite')
        elif scores.dtype == torch.float32 and (scores < 0).any():
            found.append(f'module "{module}" has negative scores')
    return found


def _mask_problems(mask: Mask) -> list[str]:
    return [
        problem
        for module, chosen in mask.channels.items()
        for problem in _tensor_problems(mask.layout, module, chosen, torch.bool)
    ]


def _tensor_problems(layout: Layout, module: str, tensor: Tensor, dtype: torch.dtype) -> Iterable[str]:
    if module not in layout.parameters or not layout.parameters[module]:
        yield f'module "{module}" is not in its list of modules'
    elif tensor.dtype != dtype:
        yield f'module "{module}" is {tensor.dtype}, expected {dtype}'
    elif tensor.ndim not in (1, 2):
        yield f'module "{module}" has {tensor.ndim} dimensions, expected [channels] or [experts, channels]'
    elif layout.shapes is not None and tuple(tensor.shape) != layout.channel_shape(module):
        expected = math.prod(layout.channel_shape(module))
        yield f'module "{module}" has {tensor.numel()} channels, its parameters say {expected}'


def _check(problems: list[str], path: str | Path) -> None:
    if problems:
        shown = "; ".join(sorted(problems)[:10])
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise _invalid(path, shown + more)


def _invalid(path: str | Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is not a valid file of mergekit-act: {why}. Make it again.")
