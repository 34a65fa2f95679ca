"""The merge config that a sweep varies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference

from mergekit_act.artifacts import Mask, load_artifact
from mergekit_act.channels import Layout
from mergekit_act.checking.configs import read_merge_config
from mergekit_act.files import file_hash
from mergekit_act.merging import find_mask_files
from mergekit_act.merging.hub import look_again
from mergekit_act.sweep.grid import Point

__all__ = ["SweptConfig", "read_swept_config"]

_DTYPES = ("float32", "float16", "bfloat16")


class SweptConfig:
    """A merge config with ``act``, whose densities and weights are the grid's.

    Attributes:
        models: the ability models, as the config writes them.
        target: the base model.
        profiles: profile file -> SHA-256.
        layout: of the models, as a profile says.
    """

    def __init__(self, path: Path, written: dict[str, Any], profiles: dict[str, str], layout: Layout) -> None:
        self.path, self._written, self.profiles, self.layout = path, written, profiles, layout
        self.target = _reference(written["base_model"])
        self.models = [_reference(model["model"]) for model in _ability_models(written)]

    @property
    def dtype(self) -> torch.dtype | None:
        """In which the merge is computed and written, if the config says so."""
        name = self._written.get("dtype")
        return None if name is None else getattr(torch, name)

    def at(self, point: Point) -> dict[str, Any]:
        """The config with a point's density and weights, as it may be written to a YAML file."""
        written = copy.deepcopy(self._written)
        for model, weight in zip(_ability_models(written), point.weights, strict=True):
            model["parameters"] = (model.get("parameters") or {}) | {"weight": weight, "mask_density": point.density}
        return written

    def without_point(self) -> dict[str, Any]:
        """What of the config no point changes."""
        written = self.at(Point(0.0, (0.0,) * len(self.models)))
        for model in _ability_models(written):
            del model["parameters"]["weight"], model["parameters"]["mask_density"]
        return written


def read_swept_config(path: Path) -> SweptConfig:
    """Read a merge config and see that it can be swept.

    Raises:
        FileNotFoundError: there is no such file, or a profile does not exist.
        ValueError: it is no config of the method ``act`` with plain models and profiles; what is wrong is told.
    """
    look_again()
    written, config = read_merge_config(path)
    if config.merge_method != "act":
        raise ValueError(f'{path} uses merge_method "{config.merge_method}"; a sweep varies the settings of act')
    if config.base_model is None or not config.models:
        raise ValueError(f'{path} has no "base_model" and "models"; a sweep does not take slices or modules')
    for key in ("tokenizer", "tokenizer_source", "out_dtype"):
        if written.get(key) is not None:
            raise ValueError(
                f'{path} sets "{key}"; a sweep needs models of one vocabulary, and only "dtype". Leave it out'
            )
    if config.dtype is not None and config.dtype not in _DTYPES:
        raise ValueError(f'{path} has dtype "{config.dtype}"; expected {", ".join(_DTYPES)}')
    models = _ability_models(written)
    if not models:
        raise ValueError(f"{path} names no ability model besides its base_model")
    profiles: dict[str, str] = {}
    layouts: list[Layout] = []
    for model in models:
        parameters = {**(written.get("parameters") or {}), **(model.get("parameters") or {})}
        for key in ("weight", "mask", "mask_density"):
            if isinstance(parameters.get(key), list | dict):
                raise ValueError(
                    f'{path}: the "{key}" of {model["model"]} is a gradient or filter; a sweep sets one value'
                )
        if not isinstance(parameters.get("mask"), str):
            raise ValueError(f'{path}: {model["model"]} has no "mask"; name its profiles')
        for file in find_mask_files(parameters["mask"]):
            artifact = load_artifact(file)
            layouts.append(artifact.layout)
            if isinstance(artifact, Mask):
                raise ValueError(
                    f"{file} is a mask, whose density was chosen when it was made; a sweep varies the density and "
                    "needs profiles"
                )
            profiles[str(file)] = file_hash(file)
    return SweptConfig(path, written, profiles, layouts[0])


def _ability_models(written: dict[str, Any]) -> list[dict[str, Any]]:
    return [model for model in written["models"] if _reference(model["model"]) != _reference(written["base_model"])]


def _reference(written: Any) -> str:
    """A model as ``user/repo@revision+lora``; configs may also spell it out as a mapping."""
    return str(ModelReference.model_validate(written))
