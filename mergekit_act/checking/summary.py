"""What a merge would do, told from its config and the headers of its files: no weights are read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import click
import torch
import yaml
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.registry import get, registered_methods
from mergekit.options import MergeOptions, add_merge_options
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_act.channels import kind_pattern
from mergekit_act.checking.configs import path_remarks
from mergekit_act.checking.headers import only_headers
from mergekit_act.checking.loads import CONVERTED
from mergekit_act.checking.planning import check_before_planning, plan_merge
from mergekit_act.checking.plans import PlanCheck, PlannedTensor
from mergekit_act.checkpoints import TensorHeader
from mergekit_act.merging import TensorSelection, channels_along, is_ours
from mergekit_act.merging.mapped import PAGE, private_bytes
from mergekit_act.merging.methods import METHOD

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
        written = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        config = MergeConfiguration.model_validate(written)
    except yaml.composer.ComposerError as error:
        raise ValueError(f"{path} holds several configs, as for mergekit-multi; check takes one") from error
    except (yaml.YAMLError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no merge config: {' '.join(str(error).split())}") from error
    if not is_ours(config.merge_method):
        ours = sorted(method.spec.name for method in registered_methods() if is_ours(method.spec.name))
        close = difflib.get_close_matches(config.merge_method, ours, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"expected {', '.join(ours)}"
        raise ValueError(f'{path} uses merge_method "{config.merge_method}"; mergekit-act does not check it ({hint})')
    if config.base_model is not None and Path(config.base_model.model.path).is_file():
        raise ValueError(f"{path} names weight files, as for mergekit-pytorch; check takes configs of mergekit-yaml")
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


def _summarize(check: PlanCheck, remarks: list[str]) -> CheckSummary:
    kinds: dict[str, list[PlannedTensor]] = {}
    for tensor in check.tensors:
        kinds.setdefault(kind_pattern(tensor.name), []).append(tensor)
    counted = tuple(_count(kind, tensors, check) for kind, tensors in kinds.items())
    modules = _count_channels(check)
    selected = sum(module.selected for module in modules)
    if not selected:
        remarks.append("nothing will be moved: no channel with a weight is selected")
    return CheckSummary(
        merge_method=check.spec.name,
        target=", ".join(map(str, check.bases)),
        ability_models=tuple(map(str, check.models)),
        kinds=counted,
        modules=modules,
        masks=tuple(UsedMask(str(model), setting, density) for model, setting, density in check.masks),
        weights={str(model): _weights(check, model) for model in check.models},
        channels=sum(module.channels for module in modules),
        selected=selected,
        bytes_read=sum(_bytes_read(tensor, check) for tensor in check.tensors),
        bytes_written=sum(_bytes_written(tensor, check) for tensor in check.tensors),
        peak_memory=_peak_memory(check),
        remarks=(*remarks, *check.remarks(), *_untrimmed(check)),
    )


def _count(kind: str, tensors: Sequence[PlannedTensor], check: PlanCheck) -> TensorKind:
    owned = {name for layout in check.layouts for name in layout.owned_names}
    owned |= {tied for layout in check.layouts for name in owned for tied in layout.tied_names(name)}
    return TensorKind(
        kind,
        tensors=len(tensors),
        transferred=sum(bool(tensor.selections) for tensor in tensors),
        has_channels=any(tensor.sources & owned for tensor in tensors),
        parameters=sum(math.prod(_shape(tensor)) for tensor in tensors),
        moved=sum(_cells(tensor) for tensor in tensors),
    )


def count_moved(check: PlanCheck) -> tuple[int, int]:
    """How many channels are selected, and how many numbers they own in the output."""
    return sum(module.selected for module in _count_channels(check)), sum(_cells(tensor) for tensor in check.tensors)


def _weights(check: PlanCheck, model: ModelReference) -> tuple[float, ...]:
    found = {tensor.settings[model].get("weight") for tensor in check.tensors if model in tensor.settings}
    return tuple(sorted(float(weight) for weight in found if weight is not None))


def _count_channels(check: PlanCheck) -> tuple[ModuleSelection, ...]:
    """Channels of the output's modules, and how many of them are selected."""
    tensor_of: dict[str, list[PlannedTensor]] = {}
    for tensor in check.tensors:
        for name in tensor.sources:
            tensor_of.setdefault(name, []).append(tensor)
    found: list[tuple[int, ModuleSelection]] = []
    order = {tensor.name: place for place, tensor in enumerate(check.tensors)}
    names: set[str] = set()
    owned = {module: (layout, names[0]) for layout in check.layouts for module, names in layout.parameters.items()}
    for module, (layout, (name, axis)) in owned.items():
        for tensor in next((tensor_of[tied] for tied in (name, *layout.tied_names(name)) if tied in tensor_of), ()):
            shape, chosen = _shape(tensor), _union(tensor).get(axis)
            channels = math.prod(channels_along(axis, shape, 2 if len(shape) == 3 else 1))
            # A tied matrix is one tensor and two modules; a slice's layer has another number than its source.
            own = module if name not in tensor.sources else tensor.name.removesuffix(name.removeprefix(module))
            own = module if own in names else own
            names.add(own)
            selection = ModuleSelection(own, channels, 0 if chosen is None else int(chosen.sum()))
            found.append((order[tensor.name], selection))
    return tuple(selection for _, selection in sorted(found, key=lambda placed: placed[0]))


def _union(tensor: PlannedTensor) -> dict[int, Tensor]:
    """Axis -> what any ability model selects along it."""
    found: dict[int, Tensor] = {}
    for selection in tensor.selections.values():
        for axis, chosen in selection.slices.items():
            found[axis] = found[axis] | chosen if axis in found else chosen
    return found


def _cells(tensor: PlannedTensor) -> int:
    """Numbers of a tensor that lie in a selected slice."""
    outside = 1.0
    for chosen in _union(tensor).values():
        outside *= 1 - int(chosen.sum()) / chosen.numel()
    return round(math.prod(_shape(tensor)) * (1 - outside))


def _target(tensor: PlannedTensor) -> TensorHeader:
    header = next(iter(tensor.headers.values()))
    if header is None:  # the plan's check has refused it
        raise ValueError(f'the target has no "{tensor.name}"')
    return header


def _shape(tensor: PlannedTensor) -> tuple[int, ...]:
    return _target(tensor).shape


def _bytes_written(tensor: PlannedTensor, check: PlanCheck) -> int:
    dtype = dtype_from_name(check.config.out_dtype) or _work_dtype(tensor, check)
    return math.prod(_shape(tensor)) * dtype.itemsize


def _work_dtype(tensor: PlannedTensor, check: PlanCheck) -> torch.dtype:
    """In which a tensor is computed."""
    stored = [header.torch_dtype for header in tensor.headers.values() if header is not None]
    return dtype_from_name(check.config.dtype) or reduce(torch.promote_types, filter(None, stored))


def _bytes_read(tensor: PlannedTensor, check: PlanCheck) -> int:
    """The target's tensor, and of the ability models' what is selected: by rows, in pages; by columns, all of it."""
    _, *others = tensor.headers.items()
    total = _target(tensor).size
    if _is_aligned(tensor, check):
        return sum(header.size for header in tensor.headers.values() if header is not None)
    for model, header in others:
        if header is not None and model in tensor.selections:
            selection = tensor.selections[model]
            whole = not selection.by_rows or check.spec.name != METHOD or not header.file.endswith(".safetensors")
            chosen = next(iter(selection.slices.values()))
            pages = int(chosen.sum()) * (header.size // chosen.numel() + PAGE)
            total += header.size if whole else min(header.size, pages)
    return total


def _is_aligned(tensor: PlannedTensor, check: PlanCheck) -> bool:
    """Whether mergekit makes a vocabulary tensor anew for a tokenizer."""
    has_tokenizer = check.config.tokenizer is not None or check.config.tokenizer_source is not None
    return bool(has_tokenizer and tensor.by_tokens)


def _peak_memory(check: PlanCheck) -> int:
    """What is computed stays in memory until its shard is full and written; what is copied stays in its file."""
    kept = [_allocated(tensor, check) for tensor in check.tensors]
    options = check.options
    shards = 1 + (options.write_threads if options.async_write else 0)
    held = min(sum(kept), options.out_shard_size * shards) if options.out_shard_size > 0 else sum(kept)
    largest = max((_bytes_written(tensor, check) for tensor in check.tensors if tensor.selections), default=0)
    # mergekit's own methods stack the models' differences.
    return held + largest * (1 if check.spec.name == METHOD else 2 + 2 * len(check.models))


def _allocated(tensor: PlannedTensor, check: PlanCheck) -> int:
    """What an output tensor needs besides the target's file."""
    whole, union = _bytes_written(tensor, check), _union(tensor)
    if _is_cast(tensor, check) or check.options.clone_tensors or _is_aligned(tensor, check):
        return whole
    if not union:
        return 0
    if check.spec.name != METHOD or not TensorSelection(union).by_rows:
        return whole
    (chosen,) = union.values()
    return private_bytes(int(chosen.sum()), chosen.numel(), whole)


def _is_cast(tensor: PlannedTensor, check: PlanCheck) -> bool:
    header = _target(tensor)
    written = dtype_from_name(check.config.out_dtype) or _work_dtype(tensor, check)
    return header.file == CONVERTED or header.torch_dtype != written


def _untrimmed(check: PlanCheck) -> list[str]:
    """How a method's trimming, which counts over whole tensors, meets what is selected of them."""
    trims = getattr(getattr(get(check.spec.name), "inner", None), "sparsification_method", None)
    found = []
    for model in check.models:
        tensors = [tensor for tensor in check.tensors if model in tensor.selections]
        shares = [_selected_by(tensor, model) / math.prod(_shape(tensor)) for tensor in tensors]
        settings = [tensor.settings[model] for tensor in tensors]
        pairs = list(zip(shares, settings, strict=True))
        if trims == SparsificationMethod.magnitude:
            idle = sum(share <= own["density"] < 1 for share, own in pairs)
            if idle:
                found.append(
                    f"{check.spec.name} trims nothing of {model} in {idle} of {len(tensors)} tensors: its density "
                    "counts over the whole tensor, and less than that is selected there"
                )
        if trims == SparsificationMethod.magnitude_outliers:
            lost = sum(share <= own["gamma"] and own["density"] < 1 for share, own in pairs)
            if lost:
                found.append(
                    f"{check.spec.name} moves nothing of {model} in {lost} of {len(tensors)} tensors: its gamma takes "
                    "the largest changes of the whole tensor for outliers, and no more than that is selected there"
                )
    return found


def _selected_by(tensor: PlannedTensor, model: ModelReference) -> int:
    return _cells(replace(tensor, selections={model: tensor.selections[model]}))
