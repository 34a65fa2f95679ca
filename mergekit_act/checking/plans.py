"""What is wrong with a plan: tensors that are not there, masks that do not fit, rows that would go astray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mergekit.common import ModelReference

from mergekit_act.merging import FitSetting, channels_along, load_fit_file
from mergekit_act.planning import Plan, PlannedTensor
from mergekit_act.planning.models import ties
from mergekit_act.wording import enumerate_some

__all__ = ["left_out_problems", "plan_problems"]


def plan_problems(plan: Plan) -> list[str]:
    """Why a merge would fail, or do something else than it says; a sentence each."""
    found = [*_homeless(plan), *(f"{setting.model}: {why}" for setting, why in plan.unreadable.items())]
    for tensor in plan.tensors:
        found += [*_shapes(tensor), *_dtype(tensor, plan), *_selections(tensor, plan)]
    return [*found, *_models(plan), *_missing(plan), *_masks_without_tensors(plan), *_tensors_of_one_model(plan)]


def left_out_problems(plan: Plan) -> list[str]:
    """``mergekit-pytorch`` plans the tensors of the listed models only; what just the target has would be lost."""
    left_out = sorted(set(plan.checkpoints[plan.target].headers) - plan.names_of(plan.target))
    if not left_out:
        return []
    return [
        f"{len(left_out)} tensors of {plan.target} are in no ability model and would be left out, such as "
        f'"{left_out[0]}"; say --tensor-intersection if that is meant'
    ]


def _homeless(plan: Plan) -> Iterator[str]:
    if plan.homeless:
        yield (
            f"{len(plan.homeless)} tensors of {plan.target} lie behind its layers and have no place among the slices, "
            f'such as "{plan.homeless[0]}"; merge without slices'
        )


def _shapes(tensor: PlannedTensor) -> Iterator[str]:
    """Models of one backbone have tensors of one shape, but for the length of the vocabulary."""
    shapes = {}
    for model in tensor.sources:
        header = tensor.headers[model]
        if header is not None:
            shape = list(header.shape)
            if tensor.by_tokens and shape:
                shape.pop(tensor.weight.vocabulary_axis)
            shapes[model] = shape
    if any(shape != next(iter(shapes.values())) for shape in shapes.values()):
        shown = ", ".join(f"{shape} in {model}" for model, shape in shapes.items())
        yield f'"{tensor.name}" is {shown}; ACT needs models of one backbone'


def _dtype(tensor: PlannedTensor, plan: Plan) -> Iterator[str]:
    """mergekit copies what are no floating-point numbers, but writes them in ``out_dtype`` as well."""
    header, out_dtype = tensor.headers[plan.target], plan.config.out_dtype
    if out_dtype and header is not None and header.torch_dtype is None:
        yield (
            f'"{tensor.name}" is {header.dtype}: out_dtype would make {out_dtype} of it; say "dtype: {out_dtype}" '
            "instead"
        )


def _selections(tensor: PlannedTensor, plan: Plan) -> Iterator[str]:
    header, source = tensor.headers[plan.target], tensor.sources[plan.target]
    for model, selection in tensor.chosen.items():
        if tensor.sources[model].name != source.name:
            yield (
                f'"{tensor.name}" is made of "{source.name}" of {plan.target} and "{tensor.sources[model].name}" of '
                f"{model}; channels can only be moved between the same layers"
            )
        for axis, chosen in selection.slices.items():
            if header is not None and not _fits(axis, chosen, header.shape):
                files = next(files for setting, files in plan.masks.items() if _is_of(setting, tensor, model))
                yield (
                    f'mask {", ".join(map(str, files.files))} has {chosen.numel()} channels for "{tensor.name}"; the '
                    f"target's tensor is {list(header.shape)} (axis {axis}). Profile this pair again with "
                    "mergekit-act profile"
                )
            if axis == tensor.weight.vocabulary_axis and chosen.any():
                yield from _vocabulary(tensor, plan)


def _is_of(setting: Any, tensor: PlannedTensor, model: ModelReference) -> bool:
    own = tensor.settings[model]
    return (setting.model, setting.mask, setting.density) == (model, own["mask"], own["mask_density"])


def _fits(axis: int, chosen: Any, shape: tuple[int, ...]) -> bool:
    return axis < len(shape) and tuple(chosen.shape) == channels_along(axis, shape, chosen.ndim)


def _vocabulary(tensor: PlannedTensor, plan: Plan) -> Iterator[str]:
    """Row i of a vocabulary tensor has to be the target's token id i."""
    tokenizer = plan.config.tokenizer
    source = tokenizer.source if tokenizer is not None else plan.config.tokenizer_source
    if source not in (None, "base"):
        yield (
            f'rows of "{tensor.name}" are selected and the tokenizer\'s source is "{source}", which moves rows; '
            'expected "source: base", or a mask made with --exclude for this module'
        )
    if tokenizer is not None and tokenizer.pad_to_multiple_of:
        yield f'rows of "{tensor.name}" are selected and pad_to_multiple_of refills rows with a mean; leave one out'


def _models(plan: Plan) -> Iterator[str]:
    if not plan.models:
        yield f"the config names no ability model; {plan.spec.name} needs one besides the target"
    masked = {setting.model for setting in (*plan.masks, *plan.unreadable)}
    for model in plan.models:
        settings = [tensor.settings[model] for tensor in plan.tensors if model in tensor.settings]
        if model not in masked:
            yield f'{model} has no "mask"; name a mask or profile under its "parameters:"'
        fits = {(own["fit"], own["fit_keep"], own["fit_ridge"]) for own in settings if own.get("fit") is not None}
        for fit in sorted(fits):
            yield from _inputs_of_another_target(FitSetting(*fit), plan)
        if any(own.get("weight", 0) is None for own in settings):
            yield f'{model} has no "weight"; give the factor on its changes under its "parameters:"'
        if ties(plan.checkpoints[plan.target]) and not ties(plan.checkpoints[model]):
            yield (
                f"{plan.target} ties its head to its embedding and {model} does not; there is no one matrix to "
                "transfer to. Untie the target first"
            )


def _inputs_of_another_target(setting: FitSetting, plan: Plan) -> Iterator[str]:
    try:
        theirs = load_fit_file(setting).target
    except (ValueError, OSError):
        return  # told already
    ours = plan.checkpoints[plan.target].fingerprint
    if theirs.get("fingerprint") not in (None, ours):
        yield (
            f'fit "{setting.inputs}" has inputs of another target, {theirs.get("model")}; make them for {plan.target} '
            "with mergekit-act profile --inputs"
        )


def _missing(plan: Plan) -> Iterator[str]:
    """Tensors that a model lacks: the target any, an ability model those that are needed."""
    missing: dict[ModelReference, list[str]] = {}
    for tensor in plan.tensors:
        for model, source in tensor.sources.items():
            absent = tensor.headers[model] is None
            if absent and (model == plan.target or not tensor.weight.optional or model in tensor.chosen):
                missing.setdefault(model, []).append(f'"{source.name}"')
    for model, names in missing.items():
        named = enumerate_some(names, most=3)
        if plan.of_files:
            yield f"{model} has no tensor {named}, which another model has; say --tensor-intersection to leave it out"
        else:
            yield (
                f"{model} has no tensor {named}, which its config asks for; fetch or save it again, or it is of "
                "another backbone"
            )


def _masks_without_tensors(plan: Plan) -> Iterator[str]:
    """Every module that a mask selects has to be somewhere in the output."""
    outputs = set().union(*(tensor.names for tensor in plan.tensors))
    for setting, files in plan.masks.items():
        unmatched = [module for module in files.channels if not outputs & set(files.names_of(module))]
        if unmatched:
            named = enumerate_some((f'"{module}"' for module in unmatched), most=3)
            options = enumerate_some((f"--exclude '{module}'" for module in unmatched), " ", most=3)
            yield (
                f'mask "{setting.mask}" of {setting.model}: no output tensor matches {named}. If that is left out on '
                f"purpose, make the mask with {options}"
            )


def _tensors_of_one_model(plan: Plan) -> Iterator[str]:
    """What just the ability model has of a module would be missing beside the rows that are moved."""
    for setting, files in plan.masks.items():
        checkpoint = plan.checkpoints[setting.model]
        theirs = set(checkpoint.headers) - set(plan.checkpoints[plan.target].headers)
        if not theirs:
            continue
        names = sorted({checkpoint.parameter_name(stored) for stored in theirs} - files.layout.owned_names)
        lone = [name for name in names if name.rpartition(".")[0] in files.channels]
        if lone:
            yield (
                f'{setting.model} has {len(lone)} tensors that the target lacks, such as "{lone[0]}": rows of their '
                "modules are selected and would be moved without them; ACT needs models of one backbone"
            )
