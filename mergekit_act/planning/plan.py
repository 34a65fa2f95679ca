"""A merge's plan: which tensors of which models make each output tensor, and what the masks select of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.merge_methods.registry import get

from mergekit_act.channels import Layout
from mergekit_act.checkpoints import Checkpoint, TensorHeader
from mergekit_act.merging import FitSetting, MaskFiles, TensorSelection, fitted_selection, load_mask_files
from mergekit_act.planning.completion import plan_left_out, record_calls
from mergekit_act.planning.internals import planned, planner_of, sources_of
from mergekit_act.planning.loads import CopyOf, load_less
from mergekit_act.planning.models import Checkpoints, header_of, locate, ties
from mergekit_act.planning.outputs import drop_quantisation, follow_layers, name_dtype

__all__ = ["MaskSetting", "Plan", "PlannedTensor", "complete_plan", "make_plan", "plan_merge"]


@dataclass(frozen=True)
class MaskSetting:
    """A ``mask`` setting of a config, as it reaches the method.

    Attributes:
        model: the ability model.
        mask: the files, as the config names them.
        density: of profiles.
    """

    model: ModelReference
    mask: str
    density: float | None


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor.

    Attributes:
        weight: mergekit's description of it.
        sources: model -> which of its tensors goes into it.
        names: all names that a mask may have for the target's tensor.
        headers: of each model's tensor, the target's first; None where a model lacks it.
        settings: ability model -> the method's parameters for this tensor, as the config has them.
        chosen: ability model -> what its mask selects of it, where its mask knows it.
        task: what mergekit runs to make it, with the selections in the place of file names.
    """

    weight: WeightInfo
    sources: Mapping[ModelReference, WeightInfo]
    names: frozenset[str]
    headers: Mapping[ModelReference, TensorHeader | None]
    settings: Mapping[ModelReference, Mapping[str, Any]]
    chosen: Mapping[ModelReference, TensorSelection]
    task: Any

    @property
    def name(self) -> str:
        """In the output."""
        return str(self.weight.name)

    @property
    def by_tokens(self) -> bool:
        """Whether one of its axes is token ids."""
        return self.weight.vocabulary_axis is not None

    @property
    def selections(self) -> dict[ModelReference, TensorSelection]:
        """Ability model -> what is moved of it, where anything is."""
        return {
            model: selection
            for model, selection in self.chosen.items()
            if selection.any() and self.settings[model].get("weight") != 0
        }


@dataclass(frozen=True)
class Plan:
    """What a merge with one of our methods will do.

    Attributes:
        config: mergekit's ``MergeConfiguration``, or that of ``mergekit-pytorch``.
        options: mergekit's ``MergeOptions``.
        target: the base model.
        checkpoints: of all models.
        masks: what the settings name, loaded.
        unreadable: settings that could not be loaded, and why.
        tensors: of the output, in its order.
        homeless: tensors of the target that have no place in the output.
    """

    config: Any
    options: Any
    target: ModelReference
    checkpoints: Mapping[ModelReference, Checkpoint]
    masks: Mapping[MaskSetting, MaskFiles]
    unreadable: Mapping[MaskSetting, str]
    tensors: Sequence[PlannedTensor]
    homeless: Sequence[str] = field(default_factory=tuple)

    @property
    def spec(self) -> Any:
        """What mergekit knows of the method."""
        return get(self.config.merge_method).spec

    @cached_property
    def models(self) -> tuple[ModelReference, ...]:
        """The ability models, in the config's order."""
        return tuple(dict.fromkeys(model for tensor in self.tensors for model in tensor.settings))

    @property
    def layouts(self) -> list[Layout]:
        """Of the masks' models."""
        return [files.layout for files in self.masks.values()]

    @property
    def of_files(self) -> bool:
        """Whether the models are weight files, without configs."""
        return self.checkpoints[self.target].config is None

    @property
    def has_tokenizer(self) -> bool:
        """Whether mergekit makes vocabulary tensors anew for a tokenizer."""
        return not self.of_files and (self.config.tokenizer is not None or self.config.tokenizer_source is not None)

    def names_of(self, model: ModelReference) -> set[str]:
        """All names of the target's tensors to which a model gives something."""
        return set().union(*(tensor.names for tensor in self.tensors if model in tensor.sources))

    def dtypes(self) -> tuple[torch.dtype, torch.dtype] | None:
        """The dtype of most of the target's numbers, and the one that they are promoted to if the config names none.

        None if the target has no floating-point tensor.
        """
        found: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
        for tensor in self.tensors:
            first, *others = tensor.headers.values()
            if first is None or first.torch_dtype is None:
                continue
            promoted = first.torch_dtype
            for dtype in (other.torch_dtype for other in others if other is not None):
                promoted = promoted if dtype is None else torch.promote_types(promoted, dtype)
            found[first.torch_dtype, promoted] += first.size
        return found.most_common(1)[0][0] if found else None


def plan_merge(config: Any, options: Any) -> Plan:
    """Plan a merge as ``mergekit-yaml`` does, without running it; the seam checks it.

    Args:
        config: mergekit's ``MergeConfiguration``.
        options: mergekit's ``MergeOptions``.

    Raises:
        MergeConfigError: the merge would fail; all problems in one message.
    """
    plan: Plan = planner_of(config, options).mergekit_act_plan
    return plan


def complete_plan(planner: Any, plan: Callable[[], None], checkpoints: Checkpoints) -> Plan:
    """Let a ``MergePlanner`` plan, and put in its place what our methods need.

    Args:
        planner: mergekit's; its tasks, and the output's config, are ours afterwards.
        plan: plans.
        checkpoints: of the models.
    """
    base = planner.config.base_model
    with record_calls(planner, lambda m, source: locate(checkpoints[m], source, is_target=m == base)) as calls:
        plan()
    homeless = plan_left_out(planner, calls, base, checkpoints[base])
    made = make_plan(planner.config, planner.options, checkpoints, planned(planner), homeless)
    planned(planner)[:] = [(tensor.weight, tensor.task) for tensor in made.tensors]
    follow_layers(planner)
    name_dtype(planner, made.dtypes())
    drop_quantisation(planner)
    return made


def make_plan(
    config: Any,
    options: Any,
    checkpoints: Checkpoints,
    tasks: Iterable[tuple[WeightInfo, Any]],
    homeless: Sequence[str] = (),
) -> Plan:
    """Find out what the masks select of each planned tensor.

    Tensors that the target does not have and its config does not ask for are left out: the output is the target's.

    Args:
        config: of the merge.
        options: likewise.
        checkpoints: of the models.
        tasks: (output tensor, the task that mergekit has planned for it).
        homeless: as ``Plan`` has them.
    """
    described = [_describe(weight, task, checkpoints) for weight, task in tasks]
    present = [tensor for tensor in described if not _is_dispensable(tensor, checkpoints)]
    masks, unreadable = _load_masks(present)
    layouts = [files.layout for files in masks.values()]
    target = present[0].task.base_model if present else config.base_model
    tensors: list[PlannedTensor] = []
    made: dict[str, Any] = {}  # output's name -> the task that makes it
    for tensor in present:
        tensor = replace(tensor, names=_names(tensor.sources[target], checkpoints[target], layouts))
        tensor = replace(tensor, chosen=_choose(tensor, masks, checkpoints[target]))
        tensor = _fitted(tensor, unreadable, layouts if ties(checkpoints[target]) else ())
        tied = _tied_names(tensor.weight, checkpoints[target], layouts)
        twin = next((made[name] for name in sorted(tied) if name in made), None)
        if twin is not None and tensor.selections:
            task = CopyOf(source=twin)
        else:
            task = made[tensor.name] = load_less(
                _with_selections(tensor), tensor.selections, [*tensor.headers.values()]
            )
        tensors.append(replace(tensor, task=task))
    return Plan(config, options, target, checkpoints, masks, unreadable, tensors, homeless)


def _describe(weight: WeightInfo, task: Any, checkpoints: Checkpoints) -> PlannedTensor:
    """What can be told of a planned tensor without the masks."""
    base, sources = task.base_model, sources_of(task)
    headers = {model: header_of(checkpoints[model], sources[model]) for model in dict.fromkeys((base, *sources))}
    given = dict(task.input_parameters.items())
    settings = {model: dict(given[model].items()) for model in task.model_order if model != base and model in given}
    return PlannedTensor(weight, sources, frozenset(), headers, settings, {}, task)


def _is_dispensable(tensor: PlannedTensor, checkpoints: Checkpoints) -> bool:
    (base, header), *_ = tensor.headers.items()
    return header is None and (tensor.weight.optional or not checkpoints[base].expects(tensor.sources[base].name))


def _load_masks(tensors: Iterable[PlannedTensor]) -> tuple[dict[MaskSetting, MaskFiles], dict[MaskSetting, str]]:
    """What all mask settings name, each loaded once; and why some could not be."""
    loaded: dict[MaskSetting, MaskFiles] = {}
    unreadable: dict[MaskSetting, str] = {}
    wanted = [setting for tensor in tensors for model in tensor.settings if (setting := _setting(tensor, model))]
    for setting in dict.fromkeys(wanted):
        try:
            loaded[setting] = load_mask_files(setting.mask, setting.density)
        except (ValueError, OSError) as error:
            unreadable[setting] = str(error)
    return loaded, unreadable


def _setting(tensor: PlannedTensor, model: ModelReference) -> MaskSetting | None:
    own = tensor.settings[model]
    return None if own["mask"] is None else MaskSetting(model, own["mask"], own["mask_density"])


def _names(source: WeightInfo, checkpoint: Checkpoint, layouts: Collection[Layout]) -> frozenset[str]:
    """All names that a mask may have for a tensor of the target."""
    names = frozenset({source.name, *(source.aliases or ())})
    if any(name in (layout.shapes or layout.owned_names) for layout in layouts for name in names):
        return names  # Transformers takes half a second to tell its renamings
    return names | {checkpoint.parameter_name(name) for name in names}


def _choose(
    tensor: PlannedTensor, masks: Mapping[MaskSetting, MaskFiles], checkpoint: Checkpoint
) -> dict[ModelReference, TensorSelection]:
    """What each ability model's mask selects of a tensor."""
    names, target = tensor.names, next(iter(tensor.headers))
    if tensor.name == tensor.sources[target].name:
        names |= _names(tensor.weight, checkpoint, [files.layout for files in masks.values()])
    found = {}
    for model in tensor.settings:
        setting = _setting(tensor, model)
        files = None if setting is None else masks.get(setting)
        if files is None:
            continue
        tied = {other for name in names for other in files.layout.tied_names(name)}
        known = names | tied if ties(checkpoint, files.layout) else names
        selection = files.selection(sorted(known), tensor.weight.vocabulary_axis)
        if selection is not None:
            found[model] = selection
    return found


def _fitted(tensor: PlannedTensor, unreadable: dict[MaskSetting, str], tied: Collection[Layout]) -> PlannedTensor:
    """With the fit of its slices, where one is wanted; why that can't be is noted.

    Args:
        tensor: of the output.
        unreadable: settings that could not be loaded, and why.
        tied: layouts whose tied names are those of one matrix.
    """
    chosen = dict(tensor.chosen)
    names = tensor.names.union(*(layout.tied_names(name) for layout in tied for name in tensor.names))
    axes = {axis for selection in tensor.selections.values() for axis in selection.slices}
    for model, selection in tensor.selections.items():
        own = tensor.settings[model]
        if own.get("fit") is None:
            continue
        try:
            setting = FitSetting(own["fit"], own["fit_keep"], own["fit_ridge"])
            chosen[model] = fitted_selection(selection, names, setting, axes)
        except (ValueError, OSError) as error:
            unreadable.setdefault(MaskSetting(model, own["fit"], None), str(error))
    return replace(tensor, chosen=chosen)


def _tied_names(weight: WeightInfo, checkpoint: Checkpoint, layouts: Iterable[Layout]) -> set[str]:
    """The names under which the same matrix may be planned, if the target ties them."""
    names = set(weight.tied_names or ()) if ties(checkpoint) else set()
    return names.union(*(layout.tied_names(weight.name) for layout in layouts if ties(checkpoint, layout)))


def _with_selections(tensor: PlannedTensor) -> Any:
    """The task with each model's mask setting replaced by what it selects."""
    parameters = dict(tensor.task.input_parameters.items())
    for model, settings in tensor.settings.items():
        parameters[model] = ImmutableMap(dict(settings) | {"mask": tensor.chosen.get(model)})
    return tensor.task.model_copy(update={"input_parameters": ImmutableMap(parameters)})
