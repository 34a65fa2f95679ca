"""The merge methods that mergekit gets: ``act``, and ``act_<method>`` for those of its own that a mask can guide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)
from mergekit.merge_methods.registry import register, registered_methods
from pydantic import AfterValidator, Field
from torch import Tensor

from mergekit_act.merging.fit import FitSetting, fitted_selection
from mergekit_act.merging.kernel import TensorSelection, transfer
from mergekit_act.merging.masks import load_mask_files

__all__ = ["ActMerge", "MaskedMerge", "is_ours", "refuse_to_run", "register_methods"]

METHOD = "act"
PAPER = "https://arxiv.org/abs/2601.09398"

# Methods with a base in which an ability model's tensor that is the target's in most cells makes no sense: they
# interpolate whole tensors, or derive one factor for all of it.
LEFT_OUT = frozenset({"slerp", "nearswap", "arcee_fusion", "model_stock"})

#: Defaults of a fit.
FIT_KEEP, FIT_RIDGE = 0.3, 0.001


def _at_least_0(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value:g}; expected a number of at least 0")
    return value


def _above_0(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value:g}; expected a number above 0")
    return value


_MASK_PARAMETERS = (
    ParameterSpec(
        "mask",
        str | None,
        ParameterScope.NON_BASE,
        default=None,
        description="masks or profiles: paths, globs or hf:// references, separated by commas",
    ),
    ParameterSpec(
        "mask_density",
        float | None,
        ParameterScope.NON_BASE,
        default=None,
        description="for profiles: the fraction of channels each keeps",
    ),
    ParameterSpec(
        "fit",
        str | None,
        ParameterScope.NON_BASE,
        default=None,
        description="inputs of the target's modules, as profile --inputs writes them, to fit selected rows to",
    ),
    ParameterSpec(
        "fit_keep",
        Annotated[float, AfterValidator(partial(_at_least_0, "fit_keep"))],
        ParameterScope.NON_BASE,
        default=FIT_KEEP,
        description="how much a change on inputs to keep weighs against what is missing on those to recover",
    ),
    ParameterSpec(
        "fit_ridge",
        Annotated[float, AfterValidator(partial(_above_0, "fit_ridge"))],
        ParameterScope.NON_BASE,
        default=FIT_RIDGE,
        description="damping, as a share of the mean square of an input to recover",
    ),
)


class ActMerge(MergeMethod):  # type: ignore[misc]
    """θ_trg + Σ weight · (θ_abl − θ_trg) ⊙ M for one tensor (paper eq. 4 and 5).

    Each ability model's ``mask`` is what it selects of this very tensor (``TensorSelection``): the planner seam has
    put that in the place of file names. In-memory merges pass the setting itself; there the names that the mask's own
    model ties are taken for one matrix.
    """

    spec = MergeMethodSpec(
        name=METHOD,
        pretty_name="ACT",
        reference_url=PAPER,
        parameters=(
            ParameterSpec(
                "weight",
                Annotated[float, Field(allow_inf_nan=False)] | None,
                ParameterScope.NON_BASE,
                default=None,
                description="factor on the ability model's task vector; required",
            ),
            *_MASK_PARAMETERS,
        ),
        contract=InputContract(base=BasePolicy.REQUIRED),
        uses_accelerator=False,
    )

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        """Merge group by group. Only what is selected of the ability models' tensors is cast to the input dtype."""
        return tuple(
            self._merge(group, settings, dtype, out_dtype)
            for group, settings, dtype in zip(groups, parameters, input_dtypes, strict=True)
        )

    def _merge(
        self,
        group: TensorGroup,
        settings: Mapping[str, Any],
        dtype: torch.dtype | None,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        base = _base(group)
        contributions = []
        for entry, selection in _selections(group, settings):
            factor = settings["weight"][entry.id]
            if factor is None:
                raise ValueError(f'{entry.id} has no "weight", the factor on its changes')
            if selection is not None and factor != 0:
                contributions.append((entry.tensor, factor, selection))
        merged = transfer(base, contributions, dtype)
        return merged if out_dtype is None else merged.to(out_dtype)


class MaskedMerge(GroupMergeMethod):  # type: ignore[misc]
    """A merge method of mergekit's whose changes stay inside the masks.

    It sees each ability model's tensor as where(M, θ_abl, θ_trg). Outside the union of the masks the result is the
    target's, bit for bit, whatever the method makes of differences that are zero.
    """

    def __init__(self, inner: MergeMethod) -> None:
        self.inner = inner
        inner_spec = inner.spec
        self.spec = replace(
            inner_spec,
            name=f"{METHOD}_{inner_spec.name}",
            pretty_name=f"ACT with {inner_spec.pretty_name or inner_spec.name}",
            reference_url=PAPER,
            parameters=(*inner_spec.parameters, *_MASK_PARAMETERS),
        )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor; the base itself if nothing of it is selected."""
        base = _base(group)
        own = {spec.name: parameters.pop(spec.name) for spec in _MASK_PARAMETERS}
        union: Tensor | None = None
        entries: dict[Any, TensorEntry] = {entry.id: entry for entry in group.entries}
        for entry, selection in _selections(group, own):
            if selection is None or not selection.any():
                entries[entry.id] = replace(entry, tensor=base)
                continue
            cells = selection.cells(base.ndim).to(base.device)
            moved = entry.tensor if selection.fit is None else transfer(base, [(entry.tensor, 1.0, selection)])
            entries[entry.id] = replace(entry, tensor=torch.where(cells, moved, base))
            union = cells if union is None else union | cells
        if union is None:
            return base
        (merged,) = self.inner([replace(group, entries=tuple(entries.values()))], parameters=parameters)
        return torch.where(union, merged.to(base.dtype), base)


def is_ours(method_name: str) -> bool:
    """Whether a merge method's name is one of ours."""
    return any(method.spec.name == method_name for method in _our_methods())


def refuse_to_run(reason: str) -> None:
    """Make our methods refuse every merge: without the planner's checks they could do silent damage."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError(
            f"mergekit {version('mergekit')} does not fit mergekit-act: {reason}. mergekit 0.1.5 works; install "
            '"mergekit>=0.1.5,<0.2"'
        )

    for method in _our_methods():
        method.validate_inputs = refuse


def register_methods() -> None:
    """Make ``act`` and its family known to mergekit; only what is not known yet is added."""
    known = {method.spec.name for method in registered_methods()}
    ours: list[Any] = [ActMerge(), *(MaskedMerge(method) for method in registered_methods() if _can_be_masked(method))]
    for method in ours:
        if method.spec.name not in known:
            register(method)


def _can_be_masked(method: MergeMethod) -> bool:
    """Whether a method works on the differences from a base, as its contract tells, and is none of ours."""
    is_masked = isinstance(method, (ActMerge, MaskedMerge))
    return not is_masked and method.spec.contract.base == BasePolicy.REQUIRED and method.spec.name not in LEFT_OUT


def _our_methods() -> list[Any]:
    return [method for method in registered_methods() if isinstance(method, (ActMerge, MaskedMerge))]


def _base(group: TensorGroup) -> Tensor:
    if group.base is None:
        raise ValueError("act needs the target as base_model")
    base: Tensor = group.base.tensor
    return base


def _selections(
    group: TensorGroup, settings: Mapping[str, Mapping[Any, Any]]
) -> list[tuple[TensorEntry, TensorSelection | None]]:
    """What each ability model's mask selects of this tensor, fitted to its shape; None if nothing."""
    found = []
    for entry in group.non_base:
        mask, density, fit, keep, ridge = (settings[spec.name][entry.id] for spec in _MASK_PARAMETERS)
        if isinstance(mask, str):
            files = load_mask_files(mask, density)
            names = files.layout.tied_names(group.metadata.name or "")
            mask = files.selection(names, group.metadata.vocabulary_axis)
            if fit is not None and mask is not None:
                mask = fitted_selection(mask, names, FitSetting(fit, keep, ridge))
        selection = mask if isinstance(mask, TensorSelection) else None
        if selection is not None:
            selection = selection.fitted(group.metadata.name, entry.tensor.shape)
        found.append((entry, selection))
    return found
