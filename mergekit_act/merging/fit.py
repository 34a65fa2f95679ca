"""The fit of selected rows: a change that does on inputs to recover what the ability model does, on others little.

For a row of differences ΔW_i it is the δ_i with the least E_rec|(δ − ΔW_i) x|² + keep · E_keep|δ x|² + λ|δ|², over the
target's inputs x of the module (RegMean, Jin et al. 2023, with two roles):

    δ_i = ΔW_i G_rec (G_rec + keep · G_keep + λ)⁻¹,   G = XᵀX / rows,   λ = ridge · mean of G_rec's diagonal

With few rows X it is solved in the space of the rows: no matrix of the inputs' width squared is made. The weights of
norms and embeddings, and biases, multiply one number each: for these the same formula is a division.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mergekit_act.artifacts import EXPERT, Inputs, load_inputs
from mergekit_act.files import file_state
from mergekit_act.merging.kernel import TensorSelection
from mergekit_act.merging.masks import find_mask_files

__all__ = ["FitSetting", "TensorFit", "fitted_selection", "load_fit_file"]


@dataclass(frozen=True)
class FitSetting:
    """How rows are fitted.

    Attributes:
        inputs: the file of inputs.
        keep: how much a change on inputs to keep weighs against what is missing on those to recover (μ).
        ridge: λ as a share of the mean square of an input to recover.
    """

    inputs: str
    keep: float
    ridge: float


def load_fit_file(setting: FitSetting) -> Inputs:
    """The inputs that a setting names, each file once.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is no file of inputs.
        ValueError: several files match, or the file lacks a role that the setting needs.
    """
    path, *others = find_mask_files(setting.inputs, "fit")
    if others:
        raise ValueError(f'fit "{setting.inputs}" matches {1 + len(others)} files; name one file of inputs')
    inputs = _load(path, file_state(path))
    for role, needed in (("recover", True), ("keep", setting.keep > 0)):
        if needed and role not in inputs.roles:
            remedy = "" if role == "recover" else ", or set fit_keep: 0"
            raise ValueError(
                f'{path} has no inputs of abilities with "role: {role}"; profile --inputs with such an ability{remedy}'
            )
    return inputs


@lru_cache(maxsize=8)
def _load(path: Path, _state: tuple[int, ...]) -> Inputs:
    return load_inputs(path)


@dataclass(frozen=True, eq=False)
class TensorFit:
    """The fit of one tensor's slices.

    Attributes:
        inputs: of the target's modules.
        module: that owns the tensor.
        is_bias: whether the tensor is its bias.
        setting: how.
    """

    inputs: Inputs
    module: str
    is_bias: bool
    setting: FitSetting

    @property
    def names(self) -> list[str]:
        """Of the file's tensors that are used."""
        if self.is_bias:
            return []
        every = [self._name(role, suffix) for role in ("recover", "keep") for suffix in ("", EXPERT)]
        return [name for name in every if name in self.inputs.tensors]

    def __call__(self, changes: Tensor, index: Sequence[Tensor]) -> Tensor:
        """The fitted changes.

        Args:
            changes: ``[selected, …]``, float32 or float64: differences of slices of two models' tensors.
            index: int64 ``[selected]`` for each channel dimension: which these are; of experts (expert, channel).

        Returns:
            A tensor of the same shape.
        """
        keep, ridge = self.setting.keep, self.setting.ridge
        if self.is_bias:
            return changes / (1 + keep + ridge)
        if self.inputs.tensors[self._name("recover")].ndim == 1:
            recovered, kept = self._of("recover", changes), self._of("keep", changes)
            damped = recovered + keep * kept + ridge * recovered.mean()
            factors = recovered / damped.clamp(min=torch.finfo(damped.dtype).tiny)
            # An embedding's slices are columns, whose numbers belong to its rows; a norm's are single numbers.
            return changes * (factors if changes.ndim == 2 else factors[index[0].to(factors.device)])
        if self._name("recover", EXPERT) not in self.inputs.tensors:
            return self._apply(changes)
        fitted = torch.empty_like(changes)
        for expert in sorted(set(index[0].tolist())):
            own = (index[0] == expert).nonzero().flatten().to(changes.device)
            fitted[own] = self._apply(changes[own], expert)
        return fitted

    def _apply(self, changes: Tensor, expert: int | None = None) -> Tensor:
        source = self.inputs.sources[self.module]
        operator = _operator(self.inputs, source, expert, self.setting.keep, self.setting.ridge)
        for factor in operator:
            changes = changes @ factor.to(changes)
        return changes

    def _of(self, role: str, like: Tensor) -> Tensor:
        """Of a norm or an embedding; nothing is to be kept where there is no ability to keep."""
        name = self._name(role)
        found = self.inputs.rows(name) if name in self.inputs.tensors else torch.zeros(())
        return found.to(like)

    def _name(self, role: str, suffix: str = "") -> str:
        return f"{role}.{self.inputs.sources[self.module]}{suffix}"


def fitted_selection(
    selection: TensorSelection, names: Collection[str], setting: FitSetting, axes: Collection[int] = ()
) -> TensorSelection:
    """A selection of a tensor whose slices are fitted.

    Args:
        selection: what is selected of it.
        names: of the tensor.
        setting: how.
        axes: along which any ability model's slices lie.

    Raises:
        ValueError: rows and columns of the tensor are selected, or the file has no inputs for it.
        FileNotFoundError: there is no such file.
        ArtifactError: it is no file of inputs.
    """
    inputs = load_fit_file(setting)
    owners = [
        (module, name)
        for module, owned in inputs.layout.parameters.items()
        for name, axis in owned
        if name in names and axis in selection.slices
    ]
    shown = min(names, default="")
    if not owners or owners[0][0] not in inputs.sources:
        raise ValueError(
            f'{setting.inputs} has no inputs for "{shown}"; profile --inputs again, without --exclude for it'
        )
    if len({*selection.slices, *axes}) > 1:
        raise ValueError(
            f"rows and columns of \"{shown}\" are selected, the head's and the embedding's; a fit needs one of them "
            f"excluded, as by mergekit-act mask --exclude {owners[0][0]}"
        )
    module, name = owners[0]
    fit = TensorFit(inputs, module, name.endswith("bias"), setting)
    return replace(selection, fit=fit)


@lru_cache(maxsize=8)  # modules that share their input come one behind the other
def _operator(inputs: Inputs, source: str, expert: int | None, weight: float, ridge: float) -> tuple[Tensor, ...]:
    """Matrices float32 that rows of changes ``[rows, width]`` are multiplied with, one after the other.

    Args:
        inputs: of the target's modules.
        source: of the module's.
        expert: whose rows of these are taken; None takes all.
        weight: of those to keep.
        ridge: as ``FitSetting`` has it.
    """
    first, second = (_rows_of(inputs, role, source, expert) for role in ("recover", "keep"))
    square = float(first.square().sum())
    if not square:  # an expert that no input to recover reaches: nothing says how to change it
        return (torch.zeros(first.shape[1], first.shape[1]),)
    damping = ridge * square / first.shape[1]
    both = torch.cat([first, second * weight**0.5])
    if len(both) < both.shape[1]:
        gram = both @ both.T
        gram.diagonal().add_(damping)
        return first.T.float(), torch.linalg.solve(gram, both)[: len(first)].float()
    gram = both.T @ both
    gram.diagonal().add_(damping)
    return (torch.linalg.solve(gram, first.T @ first).T.float(),)


def _rows_of(inputs: Inputs, role: str, source: str, expert: int | None) -> Tensor:
    """float64 ``[samples, width]``, whose products are means over the role's tokens; none without such abilities.

    An expert's inputs are 0 for a token that is not routed to it.
    """
    name = f"{role}.{source}"
    if name not in inputs.tensors:
        return torch.zeros(0, inputs.tensors[f"recover.{source}"].shape[1], dtype=torch.float64)
    rows, scales = inputs.tensors[name], inputs.tensors[f"{name}.scale"]
    if expert is not None:
        taken = (inputs.tensors[name + EXPERT] == expert).nonzero().flatten()
        rows, scales = rows.index_select(0, taken), scales[taken]  # PyTorch 2.9 takes rows of float8 in no other way
    return rows.double() * scales[:, None] / math.sqrt(inputs.roles[role]["rows"])
