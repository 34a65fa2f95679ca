"""What a merge would do, told from its config and the headers of its files: no weights are read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.registry import get, registered_methods
from mergekit.options import MergeOptions, add_merge_options
from mergekit.sparsify import SparsificationMethod

from mergekit_act.channels import kind_pattern
from mergekit_act.checking.configs import path_remarks, read_merge_config
from mergekit_act.checking.costs import (
    bytes_read,
    bytes_written,
    fit_costs,
    fitted_tensors,
    peak_memory,
    shape_of,
    union_of,
)
from mergekit_act.checking.guards import check_before_planning
from mergekit_act.checking.remarks import plan_remarks
from mergekit_act.merging import channels_along, is_ours
from mergekit_act.merging.hub import look_again
from mergekit_act.planning import Plan, PlannedTensor, only_headers, plan_merge
from mergekit_act.yaml_files import SeveralDocumentsError

__all__ = [
    "CheckSummary",
    "ModuleSelection",
    "TensorKind",
    "UsedMask",
    "check_config",
    "count_moved",
    "parse_check_arguments",
]


@dataclass(frozen=True)
class TensorKind:
    """All output tensors of one kind.

    Attributes:
        kind: their name, indices replaced by ``*``.
        tensors: how many there are.
        transferred: of how many something is transferred; the others are copied from the target.
        has_channels: whether channels own slices of them; what has none is never transferred.
        parameters: numbers in them.
        moved: how many of these are transferred.
    """

    kind: str
    tensors: int
    transferred: int
    has_channels: bool
    parameters: int
    moved: int


@dataclass(frozen=True)
class ModuleSelection:
    """A module of the output.

    Attributes:
        module: its name.
        channels: how many it has.
        selected: how many of these are selected, by any ability model.
    """

    module: str
    channels: int
    selected: int


@dataclass(frozen=True)
class UsedMask:
    """A mask setting of the config, as it reaches the method.

    Attributes:
        model: the ability model.
        mask: the files, as the config names them.
        mask_density: of profiles.
    """

    model: str
    mask: str
    mask_density: float | None


@dataclass(frozen=True)
class CheckSummary:
    """What a merge would do.

    Attributes:
        merge_method: its name.
        target: the base model.
        ability_models: in the config's order.
        kinds: of the output's tensors, in its order.
        modules: of the output that have channels.
        masks: that are used, in the config's order.
        weights: ability model -> the different weights it has over tensors, ascending; empty for methods without.
        channels: of the output's modules.
        selected: how many of these are selected, by any ability model.
        bytes_read: from the files of all models, estimated.
        bytes_written: of tensors.
        peak_memory: bytes that the merge allocates besides Python and PyTorch, estimated. Files that are mapped into
            memory do not count, nor what is done before: a LoRA's merge, a tokenizer's.
        remarks: what is no mistake but worth knowing.
    """

    merge_method: str
    target: str
    ability_models: tuple[str, ...]
    kinds: tuple[TensorKind, ...]
    modules: tuple[ModuleSelection, ...]
    masks: tuple[UsedMask, ...]
    weights: dict[str, tuple[float, ...]]
    channels: int
    selected: int
    bytes_read: int
    bytes_written: int
    peak_memory: int
    remarks: tuple[str, ...]


def check_config(path: str | Path, options: MergeOptions) -> CheckSummary:
    """Plan a merge without running it.

    Args:
        path: the config, as for ``mergekit-yaml``.
        options: what mergekit-yaml would be given.

    Raises:
        FileNotFoundError: there is no such file.
        MergeConfigError: the merge would fail; all problems in one message.
        ValueError: the file is no merge config with one of our methods.
    """
    try:
        written, config = read_merge_config(path)
    except SeveralDocumentsError as error:
        raise ValueError(f"{path} holds several configs, as for mergekit-multi; check takes one") from error
    if not is_ours(config.merge_method):
        ours = sorted(method.spec.name for method in registered_methods() if is_ours(method.spec.name))
        close = difflib.get_close_matches(config.merge_method, ours, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"expected {', '.join(ours)}"
        raise ValueError(f'{path} uses merge_method "{config.merge_method}"; mergekit-act does not check it ({hint})')
    if config.base_model is not None and Path(config.base_model.model.path).is_file():
        raise ValueError(f"{path} names weight files, as for mergekit-pytorch; check takes configs of mergekit-yaml")
    look_again()
    check_before_planning(config, options)
    ignored = [
        f'mergekit ignores the key "{key}"' for key in sorted(set(written) - set(MergeConfiguration.model_fields))
    ]
    ignored += path_remarks(m.model.path for m in config.referenced_models() if Path(m.model.path).exists())
    with only_headers(config.referenced_models(), options) as remarks:
        return _summarize(plan_merge(config, options), [*ignored, *remarks])


def parse_check_arguments(arguments: Sequence[str]) -> tuple[str, MergeOptions]:
    """A config's path and mergekit's merge options, from a command line.

    Raises:
        click.UsageError: mergekit-yaml has no such option, or there is not one config.
    """

    @click.command()
    @click.argument("config_file", metavar="CONFIG.yml")
    @add_merge_options  # type: ignore[untyped-decorator]
    def command(config_file: str, merge_options: MergeOptions) -> tuple[str, MergeOptions]:
        return config_file, merge_options

    found: tuple[str, MergeOptions] = command.main(
        list(arguments), prog_name="mergekit-act check", standalone_mode=False
    )
    return found


def _summarize(plan: Plan, remarks: list[str]) -> CheckSummary:
    kinds: dict[str, list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        kinds.setdefault(kind_pattern(tensor.name), []).append(tensor)
    counted = tuple(_count(kind, tensors, plan) for kind, tensors in kinds.items())
    modules = _count_modules(plan)
    selected = sum(module.selected for module in modules)
    if not selected:
        remarks.append("nothing will be moved: no channel with a weight is selected")
    return CheckSummary(
        merge_method=plan.spec.name,
        target=str(plan.target),
        ability_models=tuple(map(str, plan.models)),
        kinds=counted,
        modules=modules,
        masks=tuple(UsedMask(str(setting.model), setting.mask, setting.density) for setting in plan.masks),
        weights={str(model): _weights(plan, model) for model in plan.models},
        channels=sum(module.channels for module in modules),
        selected=selected,
        bytes_read=sum(bytes_read(tensor, plan) for tensor in plan.tensors) + fit_costs(plan)[0],
        bytes_written=sum(bytes_written(tensor, plan) for tensor in plan.tensors),
        peak_memory=peak_memory(plan),
        remarks=(*remarks, *plan_remarks(plan), *_untrimmed(plan), *_fits(plan)),
    )


def _count(kind: str, tensors: Sequence[PlannedTensor], plan: Plan) -> TensorKind:
    owned = {name for layout in plan.layouts for name in layout.owned_names}
    owned |= {tied for layout in plan.layouts for name in owned for tied in layout.tied_names(name)}
    return TensorKind(
        kind,
        tensors=len(tensors),
        transferred=sum(bool(tensor.selections) for tensor in tensors),
        has_channels=any(tensor.names & owned for tensor in tensors),
        parameters=sum(math.prod(shape_of(tensor)) for tensor in tensors),
        moved=sum(_cells(tensor) for tensor in tensors),
    )


def count_moved(plan: Plan) -> tuple[int, int]:
    """How many channels are selected, and how many numbers they own in the output."""
    return sum(module.selected for module in _count_modules(plan)), sum(_cells(tensor) for tensor in plan.tensors)


def _weights(plan: Plan, model: ModelReference) -> tuple[float, ...]:
    found = {tensor.settings[model].get("weight") for tensor in plan.tensors if model in tensor.settings}
    return tuple(sorted(float(weight) for weight in found if weight is not None))


def _count_modules(plan: Plan) -> tuple[ModuleSelection, ...]:
    """Channels of the output's modules, and how many of them are selected."""
    tensor_of: dict[str, list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        for name in tensor.names:
            tensor_of.setdefault(name, []).append(tensor)
    found: list[tuple[int, ModuleSelection]] = []
    order = {tensor.name: place for place, tensor in enumerate(plan.tensors)}
    names: set[str] = set()
    owned = {module: (layout, names[0]) for layout in plan.layouts for module, names in layout.parameters.items()}
    for module, (layout, (name, axis)) in owned.items():
        for tensor in next((tensor_of[tied] for tied in (name, *layout.tied_names(name)) if tied in tensor_of), ()):
            shape, chosen = shape_of(tensor), union_of(tensor.selections.values()).get(axis)
            channels = math.prod(channels_along(axis, shape, 2 if len(shape) == 3 else 1))
            # A tied matrix is one tensor and two modules; a slice's layer has another number than its source.
            own = module if name not in tensor.names else tensor.name.removesuffix(name.removeprefix(module))
            own = module if own in names else own
            names.add(own)
            selection = ModuleSelection(own, channels, 0 if chosen is None else int(chosen.sum()))
            found.append((order[tensor.name], selection))
    return tuple(selection for _, selection in sorted(found, key=lambda placed: placed[0]))


def _fits(plan: Plan) -> list[str]:
    """What is solved of each ability model."""
    found = []
    for model, fits in fitted_tensors(plan).items():
        roles = " and ".join(f"{said.get('rows', 0):,} inputs to {role}" for role, said in fits[0].inputs.roles.items())
        found.append(f"the selected rows of {len(fits)} tensors of {model} are fitted, with {roles}")
    return found


def _untrimmed(plan: Plan) -> list[str]:
    """How a method's trimming, which counts over whole tensors, meets what is selected of them."""
    trims = getattr(getattr(get(plan.spec.name), "inner", None), "sparsification_method", None)
    found = []
    for model in plan.models:
        tensors = [tensor for tensor in plan.tensors if model in tensor.selections]
        shares = [_cells(tensor, model) / math.prod(shape_of(tensor)) for tensor in tensors]
        settings = [tensor.settings[model] for tensor in tensors]
        pairs = list(zip(shares, settings, strict=True))
        if trims == SparsificationMethod.magnitude:
            idle = sum(share <= own["density"] < 1 for share, own in pairs)
            if idle:
                found.append(
                    f"{plan.spec.name} trims nothing of {model} in {idle} of {len(tensors)} tensors: its density "
                    "counts over the whole tensor, and less than that is selected there"
                )
        if trims == SparsificationMethod.magnitude_outliers:
            lost = sum(share <= own["gamma"] and own["density"] < 1 for share, own in pairs)
            if lost:
                found.append(
                    f"{plan.spec.name} moves nothing of {model} in {lost} of {len(tensors)} tensors: its gamma takes "
                    "the largest changes of the whole tensor for outliers, and no more than that is selected there"
                )
    return found


def _cells(tensor: PlannedTensor, *models: ModelReference) -> int:
    """Numbers of a tensor that lie in a slice that some ability models select, by default any."""
    outside = 1.0
    for chosen in union_of(tensor.selections[model] for model in models or tensor.selections).values():
        outside *= 1 - int(chosen.sum()) / chosen.numel()
    return round(math.prod(shape_of(tensor)) * (1 - outside))
