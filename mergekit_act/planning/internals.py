"""Mergekit's inside: every name that is no API and that we depend on, looked at before a merge is let through.

``REQUIRED`` lists them all, those too that rooms below this one use. If one is missing or has another signature, our
methods refuse to run: what they would do then is not known.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mergekit.architecture import WeightInfo, auto
from mergekit.architecture.auto import infer_vocabulary_axes
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import FinalizeModel, GatherTensors, LoaderCache, LoadTensor, SaveTensor
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary

from mergekit_act.logs import muted
from mergekit_act.merging import refuse_to_run

__all__ = [
    "REQUIRED",
    "BuildTokenizer",
    "FinalizeModel",
    "GatherTensors",
    "LoadTensor",
    "LoaderCache",
    "PermutedVocabulary",
    "SaveTensor",
    "TruncatedVocabulary",
    "can_convert_checkpoint_keys",
    "infer_vocabulary_axes",
    "names_from_loaders",
    "planned",
    "planner_of",
    "refuse_unless_known",
    "sources_of",
    "stored_name",
    "tensor_index",
    "unknown",
    "wrap",
]

_MARK = "completed_by_mergekit_act"


@dataclass(frozen=True)
class Name:
    """A name in mergekit.

    Attributes:
        module: that defines it.
        name: in the module, with dots.
        parameters: of a function, those that must come first; it may have more, if they have defaults. None for what is
            no function.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None = None

    def problem(self) -> str | None:
        """What is wrong with it."""
        found: Any = sys.modules.get(self.module)
        for part in self.name.split("."):
            holder, found = found, _attribute(found, part)
            if found is _MISSING:
                return f"{self.module} has no {self.name}" if holder is not None else f"there is no {self.module}"
        if self.parameters is None:
            return None
        try:
            signature = inspect.signature(found).parameters
        except (TypeError, ValueError):
            return f"{self.module}.{self.name} is no function"
        rest = list(signature.values())[len(self.parameters) :]
        if tuple(signature)[: len(self.parameters)] == self.parameters and not any(map(_is_demanded, rest)):
            return None
        return f"{self.module}.{self.name} takes {', '.join(signature)}; expected {', '.join(self.parameters)}"


_MISSING = object()


def _attribute(holder: Any, name: str) -> Any:
    """An attribute, or a field that a class declares without a value."""
    found = inspect.getattr_static(holder, name, _MISSING)
    if found is not _MISSING:
        return getattr(holder, name)
    declared = [inspect.get_annotations(kind) for kind in getattr(holder, "__mro__", ())]
    return next((fields[name] for fields in declared if name in fields), _MISSING)


def _is_demanded(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variable


def _names(module: str, *written: str) -> tuple[Name, ...]:
    """Names of a module: ``Class``, ``Class.field``, or ``function(parameter, …)``."""
    found = []
    for text in written:
        name, has_parameters, rest = text.partition("(")
        found.append(Name(module, name, tuple(rest.rstrip(")").split(", ")) if has_parameters else None))
    return tuple(found)


# mergekit module that the seam completes -> what has to be as it is in mergekit 0.1.5.
REQUIRED: Mapping[str, tuple[Name, ...]] = {
    "mergekit.plan": (
        # The planner: what it has planned is replaced, and more is planned with it.
        *_names(
            "mergekit.plan",
            "MergePlanner(config, arch_info, options, out_model_config)",
            "MergePlanner.config",
            "MergePlanner.options",
            "MergePlanner.out_model_config",
            "MergePlanner._tensors",
            "MergePlanner._plan(self)",
            "MergePlanner.plan_to_disk(self, out_path)",
            "MergePlanner.plan_tensor(self, weight, weights_in, models, cfg_reader)",
        ),
        # Tasks: read, and copied with other fields.
        *_names(
            "mergekit.merge_methods.task_adapter",
            "ExecuteMergeMethodTask.method_name",
            "ExecuteMergeMethodTask.gather_tensors",
            "ExecuteMergeMethodTask.model_order",
            "ExecuteMergeMethodTask.base_model",
            "ExecuteMergeMethodTask.output_weight",
            "ExecuteMergeMethodTask.parameters",
            "ExecuteMergeMethodTask.input_parameters",
            "ExecuteMergeMethodTask.dtype",
            "ExecuteMergeMethodTask.execute(self, tensors)",
        ),
        *_names(
            "mergekit.io.tasks",
            "GatherTensors.weight_info",
            "GatherTensors.dtype",
            "LoadTensor.model",
            "LoadTensor.dtype",
            "LoadTensor.device",
            "LoadTensor._resolve_name(self, loader)",
            "SaveTensor.tensor_task",
            "SaveTensor.execute(self, writer, tensor)",
            "FinalizeModel.tensor_save_tasks",
        ),
        *_names(
            "mergekit.tokenizer",
            "BuildTokenizer",
            "PermutedVocabulary.gather_tensors",
            "PermutedVocabulary.tokenizer_task",
        ),
        *_names("mergekit.tokenizer.truncate", "TruncatedVocabulary.gather_tensors"),
        # Models: opened by mergekit's cache, or stood in for by their headers.
        *_names(
            "mergekit.io.tasks",
            "LoaderCache.loaders",
            "LoaderCache.get(self, model)",
            "LoaderCache.setup(self, options)",
        ),
        *_names("mergekit.io", "ShardedTensorIndex(base_path, is_safetensors, tensor_paths, shards)"),
        *_names(
            "mergekit.common",
            "ModelReference.local_path(self, cache_dir, ignore_lora)",
            "ModelReference.merged(self, cache_dir, trust_remote_code, lora_merge_dtype)",
            "ModelPath._unique_id(self)",
        ),
        *_names("mergekit.architecture.auto", "get_model_tensor_names(model, options)", "infer_vocabulary_axes(model)"),
        *_names(
            "mergekit.architecture.conversion",
            "can_convert_checkpoint_keys(model_type, source_keys, target_key)",
            "convert_checkpoint_tensors(model_type, source_tensors, target_key)",
        ),
        # Methods: ours are called as mergekit's own are.
        *_names(
            "mergekit.merge_methods.base",
            "MergeMethod._execute(self, groups, parameters, options, input_dtypes)",
            "MergeMethod.validate_inputs(self, input_ids, base_id)",
        ),
    ),
    "mergekit.merge": _names(
        "mergekit.merge",
        "run_merge(merge_config, out_path, options)",
        "get_architecture_info(config, options)",
        "_model_out_config(config, arch_info, trust_remote_code)",
    ),
    "mergekit.scripts.multimerge": _names(
        "mergekit.scripts.multimerge",
        "make_tasks(merge_configs, dependencies, merge_options, intermediate_dir, out_path, lazy)",
    ),
    "mergekit.scripts.merge_raw_pytorch": (
        *_names(
            "mergekit.scripts.merge_raw_pytorch",
            "plan_flat_merge(config, out_path, tensor_union, tensor_intersection, options)",
            "SimpleLoadTensor.tensor_name",
        ),
        *_names("mergekit.merge_methods.task_adapter", "TensorDictWrapper.tensors"),
        *_names(
            "mergekit.io.tasks", "SaveTensor.tensor_name", "SaveTensor.tensor_task", "FinalizeModel.tensor_save_tasks"
        ),
    ),
}


def unknown(module: str) -> list[str]:
    """What is missing or has another signature, of what we need once the seam completes a module."""
    return [problem for name in REQUIRED[module] if (problem := name.problem()) is not None]


def refuse_unless_known(module: str) -> bool:
    """Whether all is there; if not, our methods refuse to run from now on."""
    problems = unknown(module)
    if problems:
        refuse_to_run("; ".join(problems))
    return not problems


def wrap(module: str, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of mergekit by its wrapped self, once.

    Args:
        module: that has it.
        name: in the module, with dots.
        wrapper: makes the new one of the old.
    """
    home: Any = sys.modules[module]
    *owners, attribute = name.split(".")
    for owner in owners:
        home = getattr(home, owner)
    function = getattr(home, attribute)
    if not hasattr(function, _MARK):
        wrapped = wrapper(function)
        setattr(wrapped, _MARK, True)
        setattr(home, attribute, wrapped)


def planned(planner: Any) -> list[tuple[WeightInfo, Any]]:
    """What a ``MergePlanner`` has planned: (output tensor, the task that makes it); what is done to the list counts."""
    tensors: list[tuple[WeightInfo, Any]] = planner._tensors
    return tensors


def planner_of(config: Any, options: Any) -> Any:
    """A ``MergePlanner`` that has planned a merge, as ``mergekit-yaml`` makes it; the seam completes what it plans."""
    from mergekit import merge

    LoaderCache().setup(options=options)
    architecture = merge.get_architecture_info(config, options)
    with muted("transformers.configuration_utils"):  # mergekit names the dtype as Transformers did before
        out_config = merge._model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
    planner = merge.MergePlanner(config, architecture, options=options, out_model_config=out_config)
    planner.plan_to_disk(out_path="")
    return planner


@contextmanager
def names_from_loaders() -> Iterator[None]:
    """For architectures that mergekit infers it fetches the models; while this is entered, it asks their loaders."""

    def ask(model: ModelReference, options: Any) -> list[str]:
        return list(LoaderCache().get(model).index.tensor_paths)

    fetch, auto.get_model_tensor_names = auto.get_model_tensor_names, ask
    try:
        yield
    finally:
        auto.get_model_tensor_names = fetch


def sources_of(task: Any) -> dict[ModelReference, WeightInfo]:
    """model -> which of its tensors goes into what a task makes."""
    gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)  # inside of vocabulary alignment
    if isinstance(gather, GatherTensors):
        return dict(gather.weight_info.items())
    return {model: WeightInfo(name=load.tensor_name) for model, load in gather.tensors.items()}  # mergekit-pytorch


def stored_name(load: LoadTensor, loader: LazyTensorLoader) -> str | None:
    """Under which of its names a file has the tensor that a task loads."""
    name: str | None = load._resolve_name(loader)
    return name


def tensor_index(folder: str, files: dict[str, str]) -> ShardedTensorIndex:
    """An index as mergekit's loaders have it, of tensor -> file."""
    return ShardedTensorIndex(folder, True, files, [])
