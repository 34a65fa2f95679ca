"""What a planned tensor loads: no model that gives nothing to it, and one matrix for both names of a tied head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor
from torch import Tensor

from mergekit_act.checkpoints import TensorHeader, read_headers
from mergekit_act.merging.mapped import map_tensor
from mergekit_act.merging.methods import METHOD

__all__ = ["load_less"]


def load_less(
    task: Any,
    selections: Collection[ModelReference],
    ties: Callable[[ModelReference], bool],
    headers: Sequence[TensorHeader | None],
) -> Any:
    """The task, loading only what its result depends on.

    Args:
        task: executes a merge method for one tensor.
        selections: the ability models of which something is selected of it.
        ties: whether a model ties its head to its embedding. Where something moves both names are then loaded as the
            embedding, so that an output that stores both holds one matrix.
        headers: of all models' tensors, to see which dtype they are promoted to.
    """
    gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
    if not isinstance(gather, GatherTensors):  # mergekit-pytorch's
        return task
    sources = {
        model: _embedding(source) if selections and source.tied_names and ties(model) else source
        for model, source in gather.weight_info.items()
    }
    if gather is not task.gather_tensors:  # vocabulary alignment looks at all models' rows
        aligned = task.gather_tensors.model_copy(update={"gather_tensors": _gather(gather, sources, gather.dtype)})
        return task.model_copy(update={"gather_tensors": aligned})
    dtype = task.output_weight.force_dtype or gather.dtype or _promoted(headers)
    if dtype is None or (task.method_name != METHOD and selections):
        return task.model_copy(update={"gather_tensors": _gather(gather, sources, gather.dtype)})
    # ``act`` casts what it moves, and the target while it is copied: mergekit would cast whole tensors before.
    needed = {model: source for model, source in sources.items() if model == task.base_model or model in selections}
    return task.model_copy(
        update={
            "method_name": METHOD,
            "gather_tensors": _GatherMapped(**dict(_gather(gather, needed, None))),
            "model_order": tuple(model for model in task.model_order if model in needed),
            "dtype": dtype,
            "parameters": task.parameters if task.method_name == METHOD else ImmutableMap({}),
        }
    )


class _LoadMapped(LoadTensor):  # type: ignore[misc]
    """Loads as mergekit does, but maps what it can, so that no more is read than is used."""

    def execute(self) -> Tensor | None:
        loader = LoaderCache().get(self.model)
        name = self._resolve_name(loader)
        if name is not None and loader.index.is_safetensors and self.device in (None, "cpu") and self.dtype is None:
            path = Path(loader.index.base_path) / loader.index.tensor_paths[name]
            tensor = map_tensor(path, _headers(path, path.stat().st_mtime_ns)[name])
            if tensor is not None:
                return tensor
        loaded: Tensor | None = super().execute()
        return loaded


class _GatherMapped(GatherTensors):  # type: ignore[misc]
    """Gathers what ``_LoadMapped`` loads."""

    def arguments(self) -> dict[str, Any]:
        return {key: _LoadMapped(**dict(load)) for key, load in super().arguments().items()}


@lru_cache(maxsize=256)
def _headers(path: Path, _changed: int) -> Mapping[str, TensorHeader]:
    return read_headers(path)


def _gather(gather: GatherTensors, sources: Mapping[ModelReference, WeightInfo], dtype: str | None) -> GatherTensors:
    return gather.model_copy(update={"weight_info": ImmutableMap(dict(sources)), "dtype": dtype})


def _embedding(head: WeightInfo) -> WeightInfo:
    """Where a tied head's matrix is: under the embedding's name, or its own if a file stores only that."""
    first, *others = head.tied_names
    return head.model_copy(update={"name": first, "tied_names": (*others, head.name)})


def _promoted(headers: Sequence[TensorHeader | None]) -> str | None:
    """The dtype to which mergekit promotes tensors if the config names none; None where that can't be told."""
    found: torch.dtype | None = None
    for header in headers:
        dtype = None if header is None else header.torch_dtype
        if dtype is None:
            return None
        found = dtype if found is None else torch.promote_types(found, dtype)
    return None if found is None else str(found).removeprefix("torch.")
