"""The plans of ``mergekit-pytorch``, walked like all others: each model is one weight file, and there is no config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference

from mergekit_act.checking.plans import PlanCheck
from mergekit_act.checkpoints import Checkpoint, TensorHeader, read_headers
from mergekit_act.merging import MaskFiles

__all__ = ["FlatPlanCheck"]


class FlatPlanCheck(PlanCheck):
    """Walks a plan of ``mergekit-pytorch`` once, collecting problems."""

    def _sources(self, task: Any) -> dict[ModelReference, WeightInfo]:
        return {model: WeightInfo(name=load.tensor_name) for model, load in task.gather_tensors.tensors.items()}

    def _names_of(self, base: ModelReference, source: WeightInfo) -> set[str]:
        return {source.name}

    def _ties(self, model: ModelReference, files: MaskFiles | None = None) -> bool:
        """A file that holds a name that the mask's model ties holds that matrix, under one of its names or both."""
        groups = files.layout.tied if files is not None else ()
        return any(set(group) & set(self.checkpoint_of(model).headers) for group in groups)

    def _converted(self, model: ModelReference, name: str) -> TensorHeader | None:
        return None

    def find_left_out(self) -> None:
        """mergekit-pytorch plans the tensors of the listed models only; what just the target has would be lost."""
        for base in self.bases:
            left_out = sorted(set(self.checkpoint_of(base).headers) - set().union(*self.parameters.values()))
            if left_out:
                self.problems.append(
                    f"{len(left_out)} tensors of {base} are in no ability model and would be left out, such as "
                    f'"{left_out[0]}"; say --tensor-intersection if that is meant'
                )

    def remarks(self) -> list[str]:
        """Nothing: a weight file has neither a config nor a fingerprint that a profile would know."""
        return []

    def _missing_sentence(self, model: ModelReference, names: str) -> str:
        return f"{model} has no tensor {names}, which another model has; say --tensor-intersection to leave it out"

    def checkpoint_of(self, model: ModelReference) -> Checkpoint:
        """The model's one file."""
        if model not in self.checkpoints:
            file = Path(model.model.path)
            self.checkpoints[model] = _WeightFile(model, file.parent, None, file.name)
        return self.checkpoints[model]


@dataclass(frozen=True)
class _WeightFile(Checkpoint):
    """A checkpoint that is one file."""

    file: str = ""

    @cached_property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Name -> header of every stored tensor."""
        return read_headers(self.folder / self.file)
