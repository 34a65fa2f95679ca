"""The merge config that a sweep varies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
from mergekit_act.sweeping.grid import Point

__all__ = ["SweptConfig", "read_swept_config"]

_DTYPES = ("float32", "float16", "bfloat16")


class SweptConfig:
    """A merge config with ``act``, whose densities and weights are the grid's.

    Attributes:
        models: the ability models, as the config writes them.
        target: the base model.
        profiles: profile file -> SHA-256.
        criteria: for each ability model criterion -> its profiles, as a ``mask`` setting.
        layout: of the models, as a profile says.
    """

    def __init__(
        self,
        path: Path,
        written: dict[str, Any],
        profiles: dict[str, str],
        criteria: Sequence[dict[str, str]],
        layout: Layout,
    ) -> None:
        self.path, self._written, self.profiles, self.layout = path, written, profiles, layout
        self.criteria = criteria
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
        for model, weight, masks in zip(_ability_models(written), point.weights, self.criteria, strict=True):
            own: dict[str, Any] = {"weight": weight, "mask_density": point.density}
            own |= {"mask": masks[point.criterion]} if point.criterion else {}
            own |= {"fit": point.fit} if point.fit else {}
            model["parameters"] = (model.get("parameters") or {}) | own
        return written

    @property
    def fits(self) -> list[str]:
        """SHA-256 of the files of inputs that the config itself names."""
        owners = [self._written, *_ability_models(self._written)]
        named = [fit for owner in owners if (fit := (owner.get("parameters") or {}).get("fit"))]
        return [file_hash(file) for setting in named for file in find_mask_files(setting)]

    def check(self, criteria: Sequence[str], *, fits: bool) -> None:
        """See that there are profiles by these criteria; by one if none is named.

        Args:
            criteria: of the grid.
            fits: whether the grid has files of inputs.

        Raises:
            ValueError: an ability model has none by one of them, or some by several; or both the grid and the config
                have a fit.
        """
        if fits and self.fits:
            raise ValueError(f'{self.path} sets "fit" itself; leave it out, --fit sets it')
        for model, masks in zip(self.models, self.criteria, strict=True):
            missing = [criterion for criterion in criteria if criterion not in masks]
            if missing:
                raise ValueError(f"{self.path}: no profile of {model} is by {missing[0]}; there are {', '.join(masks)}")
            if not criteria and len(masks) > 1:
                raise ValueError(
                    f"{self.path}: the profiles of {model} are by {' and '.join(masks)}; choose with --criterion"
                )

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
    criteria: list[dict[str, str]] = []
    for model in models:
        by_criterion: dict[str, list[str]] = {}
        parameters = {**(written.get("parameters") or {}), **(model.get("parameters") or {})}
        for key in ("weight", "mask", "mask_density", "fit"):
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
            by_criterion.setdefault(artifact.criterion, []).append(str(file))
        criteria.append({criterion: ",".join(files) for criterion, files in by_criterion.items()})
    return SweptConfig(path, written, profiles, criteria, layouts[0])


def _ability_models(written: dict[str, Any]) -> list[dict[str, Any]]:
    return [model for model in written["models"] if _reference(model["model"]) != _reference(written["base_model"])]


def _reference(written: Any) -> str:
    """A model as ``user/repo@revision+lora``; configs may also spell it out as a mapping."""
    return str(ModelReference.model_validate(written))
