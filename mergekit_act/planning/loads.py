"""What a planned tensor loads, and where it is merged.

No model is loaded that gives nothing to it, nothing twice for both names of a tied head. Loads, merge and result are
one task on the CPU, wherever mergekit is told to load, compute or keep tensors: adding to a few rows costs less than
moving whole tensors of all models, mapped files stay mapped, and a merge has the same bytes with every device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task
from torch import Tensor

from mergekit_act.checkpoints import TensorHeader, read_headers
from mergekit_act.files import file_state
from mergekit_act.merging.mapped import map_tensor
from mergekit_act.merging.methods import METHOD
from mergekit_act.planning.internals import (
    BuildTokenizer,
    FinalizeModel,
    GatherTensors,
    LoaderCache,
    LoadTensor,
    PermutedVocabulary,
    SaveTensor,
    TruncatedVocabulary,
    stored_name,
)
from mergekit_act.planning.models import CONVERTED

__all__ = ["CopyOf", "MergeTensor", "load_less", "take_held"]


def load_less(task: Any, selections: Collection[ModelReference], headers: Sequence[TensorHeader | None]) -> MergeTensor:
    """The task with its loads, loading only what its result depends on.

    Args:
        task: executes a merge method for one tensor.
        selections: the ability models of which something is selected of it.
        headers: of all models' tensors, to see which dtype they are promoted to.
    """
    gather = task.gather_tensors
    if isinstance(gather, (PermutedVocabulary, TruncatedVocabulary)):  # all models' rows are looked at
        on_cpu = gather.gather_tensors.model_copy(update={"device": None})
        gather = gather.model_copy(update={"gather_tensors": on_cpu})
        return MergeTensor(merge=task.model_copy(update={"gather_tensors": gather}))
    if not isinstance(gather, GatherTensors):  # of mergekit-pytorch
        return MergeTensor(merge=task)
    own = dict(gather) | {
        "device": None,
        "target": task.base_model,
        "vocabulary_axis": task.output_weight.vocabulary_axis,
    }
    dtype = task.output_weight.force_dtype or gather.dtype or _promoted(headers)
    if dtype is None or (task.method_name != METHOD and selections):
        return MergeTensor(merge=task.model_copy(update={"gather_tensors": _GatherMapped(**own)}))
    # ``act`` casts what it moves, and the target while it is copied: mergekit would cast whole tensors before.
    sources = gather.weight_info.items()
    needed = {model: source for model, source in sources if model == task.base_model or model in selections}
    update = {"weight_info": ImmutableMap(needed), "dtype": None}
    return MergeTensor(
        merge=task.model_copy(
            update={
                "method_name": METHOD,
                "gather_tensors": _GatherMapped(**own | update),
                "model_order": tuple(model for model in task.model_order if model in needed),
                "dtype": dtype,
                "parameters": task.parameters if task.method_name == METHOD else ImmutableMap({}),
            }
        )
    )


@dataclass(frozen=True, eq=False)
class Held:
    """A result as mergekit's executor leaves it alone: tensors it would move to where it keeps results."""

    tensor: Tensor | None


class _OnWorkers(Task[None]):  # type: ignore[misc]
    """Nothing: for mergekit's executor for several devices, which runs what its workers need before they begin."""

    def arguments(self) -> dict[str, Any]:
        return {}

    def execute(self) -> None:
        pass


class MergeTensor(Task[Held]):  # type: ignore[misc]
    """One tensor's merge with all that it loads.

    With several devices it runs behind mergekit's workers, tensor by tensor as with one: files, and random numbers, are
    the same, and nothing depends on results that these may lose.

    Attributes:
        merge: mergekit's task that executes a merge method.
    """

    merge: Any

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def arguments(self) -> dict[str, Any]:
        """What is not of this tensor alone: the tokenizer that a vocabulary is aligned to."""
        gather = self.merge.gather_tensors
        tokenizer = {"tokenizer": gather.tokenizer_task} if isinstance(gather, PermutedVocabulary) else {}
        return {"begun": _OnWorkers(), **tokenizer}

    def main_thread_only(self) -> bool:
        """As all that comes after."""
        return True

    def group_label(self) -> str | None:
        """So that tensors are merged in the order in which mergekit would."""
        label: str | None = self.merge.group_label()
        return label

    def execute(self, begun: None = None, tokenizer: Any = None) -> Held:
        """Load and merge."""
        return Held(self.merge.execute(tensors=self.gather(tokenizer)))

    def gather(self, tokenizer: Any = None) -> dict[ModelReference, Tensor]:
        """Load what the merge is given."""
        gathered: dict[ModelReference, Tensor] = _run(self.merge.gather_tensors, tokenizer)
        return gathered


def _run(task: Any, tokenizer: Any) -> Any:
    """A task's result, after what it depends on; the tokenizer is at hand."""
    if isinstance(task, BuildTokenizer):
        return tokenizer
    return task.execute(**{name: _run(of, tokenizer) for name, of in task.arguments().items()})


class CopyOf(Task[Held]):  # type: ignore[misc]
    """Another tensor's result once more: a tied head is its embedding, also where a method draws random numbers."""

    source: MergeTensor

    def arguments(self) -> dict[str, Any]:
        """The task whose result it is."""
        return {"held": self.source}

    def group_label(self) -> str | None:
        """So that it runs next to the other."""
        return self.source.group_label()

    def main_thread_only(self) -> bool:
        """As its source."""
        return True

    def execute(self, held: Held) -> Held:
        """Copy: tensors in one file must not share memory."""
        return Held(None if held.tensor is None else held.tensor.clone())


def take_held(tasks: Sequence[Any]) -> list[Any]:
    """mergekit's tasks behind the merges, such that they save what is held; the others as they are.

    Args:
        tasks: that save tensors, and what comes after.
    """
    ours: dict[int, Any] = {id(task): task for task in tasks}
    for task in tasks:
        if isinstance(task, SaveTensor):
            ours[id(task)] = _SaveHeld(**dict(task))
    for task in tasks:
        if isinstance(task, FinalizeModel):
            saved = tuple(ours[id(save)] for save in task.tensor_save_tasks)
            ours[id(task)] = task.model_copy(update={"tensor_save_tasks": saved})
    return [ours[id(task)] for task in tasks]


class _SaveHeld(SaveTensor):  # type: ignore[misc]
    def main_thread_only(self) -> bool:
        return True

    def execute(self, writer: Any, tensor: Held) -> None:
        super().execute(writer, tensor.tensor)


class _LoadMapped(LoadTensor):  # type: ignore[misc]
    """Loads as mergekit does, but maps what it can, so that no more is read than is used."""

    def execute(self) -> Tensor | None:
        loader = LoaderCache().get(self.model)
        name = stored_name(self, loader)
        if name is not None and loader.index.is_safetensors and self.dtype is None:
            path = Path(loader.index.base_path) / loader.index.tensor_paths[name]
            tensor = map_tensor(path, _headers(path, file_state(path))[name])
            if tensor is not None:
                return tensor
        loaded: Tensor | None = super().execute()
        return loaded


class _GatherMapped(GatherTensors):  # type: ignore[misc]
    """Loads what it gathers by itself: mergekit's scheduler takes longer for a task than mapping a tensor does.

    Vocabulary tensors come with the target's number of rows: what another model has behind them is left out, what it
    lacks is the target's own, which no mask changes.
    """

    target: ModelReference | None = None
    vocabulary_axis: int | None = None

    def arguments(self) -> dict[str, Any]:
        return {}

    def group_label(self) -> str | None:
        return max(load.group_label() or "" for load in self._loads.values())

    def execute(self, **_none: Tensor) -> dict[ModelReference, Tensor]:
        loaded = {key: load.execute() for key, load in self._loads.items()}
        gathered: dict[ModelReference, Tensor] = super().execute(**loaded)
        if self.vocabulary_axis is None or self.target not in gathered:
            return gathered
        base = gathered[self.target]
        return {model: _with_rows_of(base, tensor, self.vocabulary_axis) for model, tensor in gathered.items()}

    @cached_property
    def _loads(self) -> dict[str, _LoadMapped]:
        return {key: _LoadMapped(**dict(load)) for key, load in super().arguments().items()}


def _with_rows_of(base: Tensor, tensor: Tensor, axis: int) -> Tensor:
    rows, own = base.shape[axis], tensor.shape[axis]
    if own >= rows:
        return tensor if own == rows else tensor.narrow(axis, 0, rows)
    return torch.cat([tensor, base.narrow(axis, own, rows - own).to(tensor)], axis)


@lru_cache(maxsize=256)
def _headers(path: Path, _state: tuple[int, ...]) -> Mapping[str, TensorHeader]:
    return read_headers(path)


def _promoted(headers: Sequence[TensorHeader | None]) -> str | None:
    """The dtype to which mergekit promotes tensors if the config names none; None where that can't be told."""
    found: torch.dtype | None = None
    for header in headers:
        dtype = None if header is None or header.file == CONVERTED else header.torch_dtype
        if dtype is None:
            return None
        found = dtype if found is None else torch.promote_types(found, dtype)
    return None if found is None else str(found).removeprefix("torch.")
