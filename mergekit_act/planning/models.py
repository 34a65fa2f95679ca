"""The models of a merge, each opened once: as mergekit's loader has it, or as the one file of ``mergekit-pytorch``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference

from mergekit_act.channels import Layout
from mergekit_act.checkpoints import Checkpoint, TensorHeader, read_headers
from mergekit_act.planning.headers import HeaderLoader
from mergekit_act.planning.internals import LoaderCache, can_convert_checkpoint_keys

__all__ = ["CONVERTED", "Checkpoints", "header_of", "locate", "open_loaded", "open_weight_file", "ties"]

CONVERTED = "several tensors"  # in place of a file's name


class Checkpoints(dict[ModelReference, Checkpoint]):
    """Model -> its files, opened when they are first asked for.

    Args:
        open_model: opens a model.
    """

    def __init__(self, open_model: Callable[[ModelReference], Checkpoint]) -> None:
        super().__init__()
        self._open = open_model

    def __missing__(self, model: ModelReference) -> Checkpoint:
        self[model] = opened = self._open(model)
        return opened


def open_loaded(model: ModelReference, *, trust_remote_code: bool) -> Checkpoint:
    """A model's files as mergekit's loader has opened them."""
    loader = LoaderCache().get(model)
    if isinstance(loader, HeaderLoader):
        return loader.checkpoint
    return Checkpoint(model, Path(loader.index.base_path), model.config(trust_remote_code))


def open_weight_file(model: ModelReference) -> Checkpoint:
    """A model that is one weight file: it has no config, so names and layouts are the file's own."""
    file = Path(model.model.path)
    return _WeightFile(model, file.parent, None, file.name)


@dataclass(frozen=True)
class _WeightFile(Checkpoint):
    """A checkpoint that is one file."""

    file: str = ""

    @cached_property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Name -> header of every stored tensor."""
        return read_headers(self.folder / self.file)


def ties(checkpoint: Checkpoint, layout: Layout | None = None) -> bool:
    """Whether a model's head is its embedding.

    A weight file that holds a name that a mask's model ties holds that matrix, under one of its names or both.

    Args:
        checkpoint: of the model.
        layout: of a mask's model.
    """
    if checkpoint.config is None:
        return layout is not None and any(set(group) & set(checkpoint.headers) for group in layout.tied)
    # Transformers asks the outer config of a vision-language model.
    return bool(getattr(checkpoint.config, "tie_word_embeddings", False))


def locate(checkpoint: Checkpoint, source: WeightInfo, *, is_target: bool) -> WeightInfo:
    """A model's tensor, with the name under which its files have it among its aliases, if that is another one."""
    if any(name in checkpoint.headers for name in _names(source)):
        return source
    stored = checkpoint.stored_name(source.name)
    if stored is None and not is_target:
        stored = checkpoint.tied_name(source.name)
    if stored is None:
        return source
    return source.model_copy(update={"aliases": (*(source.aliases or ()), stored)})


def header_of(checkpoint: Checkpoint, source: WeightInfo) -> TensorHeader | None:
    """What a model has of a tensor, once mergekit has converted it from an older layout; None if it lacks it."""
    headers = checkpoint.headers
    found = next((headers[name] for name in _names(source) if name in headers), None)
    if found is not None or checkpoint.config is None:
        return found
    if not can_convert_checkpoint_keys(checkpoint.config.model_type, set(headers), source.name):
        return None
    shape = checkpoint.shape(source.name)
    largest = max(headers.values(), key=lambda header: header.size)
    return None if shape is None else TensorHeader(largest.dtype, shape, CONVERTED)


def _names(source: Any) -> tuple[str, ...]:
    return (source.name, *(source.aliases or ()), *(source.tied_names or ()))
