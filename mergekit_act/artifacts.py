"""Profiles, masks and inputs: what is in them, and how they are written, read and validated.

All are safetensors files with one metadata key, ``mergekit_act``, whose JSON says all that a merge needs. Version 2 of
the format adds a checksum over the tensors; version 1 is read as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mergekit_act import __version__
from mergekit_act.channels import Layout
from mergekit_act.files import check_regular, write_atomically
from mergekit_act.validation import (
    FORMAT_VERSIONS,
    KINDS,
    checksum,
    inputs_problems,
    mask_problems,
    metadata_problems,
    parse_metadata,
    profile_problems,
)
from mergekit_act.versions import installed_versions
from mergekit_act.wording import enumerate_some, escape, shorten

__all__ = [
    "ArtifactError",
    "ForeignFileError",
    "Inputs",
    "Mask",
    "Profile",
    "load_artifact",
    "load_inputs",
    "load_mask",
    "load_metadata",
    "load_profile",
    "save_inputs",
    "save_mask",
    "save_profile",
]

_KEY = "mergekit_act"
_DAMAGE = "damage."  # stands before a module's name
EXPERT = ".expert"  # stands behind the name of a source in inputs, for what says whose input a row is
_OTHER_TENSORS = "its tensors are not those that were written, their checksum is another"


class ArtifactError(ValueError):
    """A profile or mask that cannot be used; the message names the file, what is wrong and what to do."""


class ForeignFileError(ArtifactError):
    """A file that mergekit-act did not write, such as a model's weights."""


@dataclass(frozen=True)
class Profile:
    """The scores of every channel for one pair of models and one ability.

    Attributes:
        scores: module -> float32 ``[channels]`` (``[experts, channels]`` for fused experts), in module order. Of
            ``activation``: the mean over all answer tokens of the absolute difference of the two models' activations
            (paper eq. 2); of ``attribution``, signed: what the loss falls by, to first order, in nats per answer token.
        layout: what each channel owns.
        criterion: ``activation``, ``local``, ``attribution``, ``weight`` or ``random``.
        ability: the ability's name.
        target: the target model: ``model``, ``revision``, ``fingerprint``.
        ability_model: the ability model, likewise.
        samples: number of samples.
        answer_tokens: number of answer tokens.
        dtype: in which the forward passes ran.
        data: resolved data settings and the fingerprint of the token ids.
        shared_rows: module -> number of its leading channels that both models have, for vocabularies of different
            length. The channels behind are never selected.
        damage: of ``attribution``, likewise: what the loss rises by, to second order, where the target is good.
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
    damage: Mapping[str, Tensor] = field(default_factory=dict)

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


@dataclass(frozen=True, eq=False)  # hashed by identity
class Inputs:
    """A sample of the inputs that the target's modules receive, by role of the abilities.

    Attributes:
        tensors: ``<role>.<source>`` -> float8_e4m3fn ``[rows, width]``, some of a source's inputs;
            ``<role>.<source>.scale``, float32 ``[rows]``, scales and weighs them, so that the mean of their squares is
            that over all inputs. Of a norm float32 ``[channels]``, mean squares of what its weights multiply; of an
            embedding float32 ``[rows]``, the share of tokens that take each row. Of experts
            ``<role>.<source>.expert``, int32 ``[rows]``, says whose each is.
        layout: what the modules' channels own.
        sources: module -> the name of its source; modules that share their input share it.
        target: the target model: ``model``, ``revision``, ``fingerprint``.
        roles: ``recover`` and ``keep`` -> ``abilities``, their ``data`` settings, ``samples``, ``tokens`` and ``rows``
            taken of these.
    """

    tensors: Mapping[str, Tensor]
    layout: Layout
    sources: Mapping[str, str]
    target: Mapping[str, Any]
    roles: Mapping[str, Mapping[str, Any]]

    def rows(self, name: str) -> Tensor:
        """A tensor as float32, scaled."""
        rows = self.tensors[name].float()
        scale = self.tensors.get(f"{name}.scale")
        return rows if scale is None else rows * scale[:, None]


_PROVENANCE = {
    "inputs": tuple(n for n in Inputs.__dataclass_fields__ if n not in ("tensors", "layout")),
    "profile": tuple(n for n in Profile.__dataclass_fields__ if n not in ("scores", "damage", "layout")),
    "mask": tuple(n for n in Mask.__dataclass_fields__ if n not in ("channels", "layout")),
}


def save_profile(profile: Profile, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a profile. Equal content gives equal bytes.

    Raises:
        ArtifactError: a score is missing, of the wrong shape, negative, NaN or infinite; or what is said of the scores
            contradicts them.
        FileExistsError: the file exists and ``overwrite`` is false.
    """
    scores, damage = profile.scores, profile.damage
    _check(profile_problems(scores, damage, profile.layout, profile.criterion, profile.shared_rows), path)
    tensors = dict(scores) | {_DAMAGE + module: tensor for module, tensor in damage.items()}
    _save("profile", profile, tensors, path, overwrite)


def save_mask(mask: Mask, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a mask. Equal content gives equal bytes.

    Raises:
        ArtifactError: a module is unknown or of the wrong shape, or the counts are not the tensors'.
        FileExistsError: the file exists and ``overwrite`` is false.
    """
    _check(mask_problems(mask.channels, mask.layout, mask.counts), path)
    selected = {module: chosen for module, chosen in mask.channels.items() if chosen.any()}
    _save("mask", mask, selected, path, overwrite)


def save_inputs(inputs: Inputs, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a sample of inputs. Equal content gives equal bytes.

    Raises:
        ArtifactError: a module's inputs are missing or of another width.
        FileExistsError: the file exists and ``overwrite`` is false.
    """
    _check(inputs_problems(inputs.tensors, inputs.layout, inputs.sources, inputs.roles), path)
    _save("inputs", inputs, inputs.tensors, path, overwrite)


def load_inputs(path: str | Path) -> Inputs:
    """Read what a file of inputs says; its tensors are mapped, and read when they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is no complete, valid file of inputs of this format version.
    """
    metadata, tensors = _read(Path(path), copied=False)
    if metadata["kind"] != "inputs":
        raise ArtifactError(
            f"{escape(path)} is a {metadata['kind']}; expected inputs, as mergekit-act profile --inputs writes them."
        )
    inputs = Inputs(tensors, _layout_from(metadata), **{name: metadata[name] for name in _PROVENANCE["inputs"]})
    problems = inputs_problems(tensors, inputs.layout, inputs.sources, inputs.roles)
    if metadata["format_version"] > 1 and metadata["checksum"] != checksum(tensors):
        problems.append(_OTHER_TENSORS)
    _check(problems, path)
    return inputs


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
    layout = _layout_from(metadata)
    if metadata["kind"] == "inputs":
        raise ArtifactError(f"{escape(path)} is a file of inputs; expected a profile or a mask.")
    order = {module: place for place, module in enumerate(layout.parameters)}
    kind = metadata["kind"]
    signed = kind == "profile" and metadata["criterion"] == "attribution"
    damage = {name for name in tensors if signed and name.startswith(_DAMAGE) and name not in order}
    ordered = {module: tensors[module] for module in sorted(set(tensors) - damage, key=lambda m: order.get(m, -1))}
    known = {name: metadata[name] for name in _PROVENANCE[kind] if name in metadata}
    if kind == "mask":
        known["sources"] = tuple(known.get("sources", ()))
        mask = Mask(channels=ordered, layout=layout, **known)
        problems = mask_problems(ordered, layout, mask.counts)
    else:
        known["damage"] = {m: tensors[_DAMAGE + m] for m in order if _DAMAGE + m in damage}
        profile = Profile(scores=ordered, layout=layout, **known)
        problems = profile_problems(ordered, profile.damage, layout, profile.criterion, profile.shared_rows)
        problems += [f'"{name}" is of no module' for name in damage if name.removeprefix(_DAMAGE) not in order]
    if metadata["format_version"] > 1 and metadata["checksum"] != checksum(tensors):
        problems.append(_OTHER_TENSORS)
    _check(problems, path)
    return mask if kind == "mask" else profile


def _save(
    kind: str, artifact: Profile | Mask | Inputs, tensors: Mapping[str, Tensor], path: str | Path, overwrite: bool
) -> None:
    layout = artifact.layout
    metadata: dict[str, Any] = {
        "kind": kind,
        "format_version": FORMAT_VERSIONS[-1],
        "modules": list(layout.modules),
        "parameters": {module: [list(pair) for pair in owned] for module, owned in layout.parameters.items()},
        "tied": [list(group) for group in layout.tied],
        "versions": installed_versions("torch", "transformers"),
    }
    if layout.shapes is not None:
        metadata["shapes"] = {name: list(shape) for name, shape in layout.shapes.items()}
    metadata |= {name: getattr(artifact, name) for name in _PROVENANCE[kind]}
    written = {module: tensor.contiguous().cpu() for module, tensor in tensors.items()}
    metadata["checksum"] = checksum(written)
    content = save(
        written,
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


def _read(path: Path, *, tensors: bool = True, copied: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shown = escape(path)
    if path.is_dir():
        raise FileNotFoundError(f"{shown} is a folder; name the files in it, such as {shown}/*.safetensors")
    if not path.exists():
        raise FileNotFoundError(f"{shown} does not exist. mergekit-act profile and mergekit-act mask write such files.")
    check_regular(path)  # to read from a pipe may never end
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            names = file.keys() if tensors and text else ()
            read = {name: _copied(file.get_tensor(name)) if copied else file.get_tensor(name) for name in names}
    except SafetensorError as error:
        reason = shorten(error, 500)
        raise ArtifactError(f"{shown} is not a complete safetensors file ({reason}). Make it again.") from error
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:  # a dtype that PyTorch lacks
        raise _invalid(path, f"it has tensors that PyTorch cannot read ({shorten(error, 500)})") from error
    if text is None:
        raise ForeignFileError(f'{shown} is not a profile or mask of mergekit-act: it has no "{_KEY}" metadata.')
    try:
        metadata = parse_metadata(text)
    except ValueError as error:
        raise _invalid(path, str(error)) from error
    version_of_it = metadata.get("format_version")
    if isinstance(version_of_it, bool) or version_of_it not in FORMAT_VERSIONS:
        raise ArtifactError(
            f"{shown} has format version {shorten(repr(version_of_it), 100)}; this mergekit-act {__version__} reads "
            f"versions {' and '.join(map(str, FORMAT_VERSIONS))}. Update mergekit-act or make the file again."
        )
    kind = metadata.get("kind")
    if not (isinstance(kind, str) and kind in KINDS):
        named = escape(shorten(kind, 100))
        raise ArtifactError(f'{shown} is a "{named}"; expected a profile, a mask or inputs.')
    _check(metadata_problems(metadata), path)
    return metadata, read


def _copied(tensor: Tensor) -> Tensor:
    """A tensor that does not change with the file it maps; bytes that are no booleans stay what they are."""
    return tensor.view(torch.uint8).clone().view(torch.bool) if tensor.dtype == torch.bool else tensor.clone()


def _layout_from(metadata: Mapping[str, Any]) -> Layout:
    parameters, shapes = metadata["parameters"], metadata.get("shapes")
    return Layout(
        parameters={module: tuple(map(tuple, parameters[module])) for module in metadata["modules"]},
        tied=tuple(map(tuple, metadata["tied"])),
        shapes=None if shapes is None else {name: tuple(shape) for name, shape in shapes.items()},
    )


def _check(problems: list[str], path: str | Path) -> None:
    if problems:
        raise _invalid(path, enumerate_some(sorted(problems), "; "))


def _invalid(path: str | Path, why: str) -> ArtifactError:
    return ArtifactError(f"{escape(path)} is not a valid file of mergekit-act: {escape(why)}. Make it again.")
