"""Planning a merge without fetching models or merging LoRAs: mergekit's loaders get the headers only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]
from huggingface_hub.errors import NotASafetensorsRepoError as NoSafetensorsError
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader

from mergekit_act.checkpoints import Checkpoint, TensorHeader, merged_model
from mergekit_act.planning.internals import LoaderCache, names_from_loaders, tensor_index
from mergekit_act.wording import one_line, show_bytes

__all__ = ["HeaderLoader", "only_headers"]


class HeaderLoader(LazyTensorLoader):  # type: ignore[misc]
    """Stands for a model in mergekit's planner; it knows the headers and cannot load.

    Attributes:
        checkpoint: the headers.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        paths = {name: header.file for name, header in checkpoint.headers.items()}
        super().__init__(tensor_index(str(checkpoint.folder), paths))
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class _Headers(Checkpoint):
    """A checkpoint of which only the headers are here."""

    headers: Mapping[str, TensorHeader]
    fingerprint: str = ""  # the ends of the files are not here


@contextmanager
def only_headers(models: Iterable[ModelReference], options: Any) -> Iterator[list[str]]:
    """While it is entered, models that are not whole on this machine are planned with by their headers.

    Yields:
        What will be done before such a merge, a sentence each.

    Raises:
        FileNotFoundError: a model on the Hub has no safetensors files, or the Hub is out of reach.
    """
    stood_in = []
    remarks: list[str] = []
    try:
        for model in sorted(models, key=str):
            checkpoint, remark = _without_weights(model, options)
            if checkpoint is not None:
                LoaderCache.loaders[model] = HeaderLoader(checkpoint)
                stood_in.append(model)
                remarks += [remark] if remark else []
        with names_from_loaders():
            yield remarks
    finally:
        for model in stood_in:
            LoaderCache.loaders.pop(model, None)


def _without_weights(model: ModelReference, options: Any) -> tuple[Checkpoint | None, str]:
    """The headers of a model that mergekit would have to fetch or to merge first, and what it would do."""
    unmerged = ModelReference(model=model.model, override_architecture=model.override_architecture)
    folder = _folder(unmerged, options)
    config = model.config(options.trust_remote_code)
    if folder is None:
        fetched, size = _from_hub(unmerged)
        remark = f"{model} is fetched first: {show_bytes(size)}"
        return _Headers(model, Path(model.model.path), config, fetched), remark
    cache, dtype = options.lora_merge_cache or "", options.lora_merge_dtype
    if model.lora is not None and not merged_model(model, cache, dtype).is_current():
        headers = Checkpoint(unmerged, folder, config).headers
        return _Headers(model, folder, config, headers), f"{model} is merged with its LoRA first"
    if not Path(model.model.path).exists():
        return Checkpoint(model, folder, config), ""  # in the client's cache; mergekit would ask for newer files
    return None, ""


def _folder(model: ModelReference, options: Any) -> Path | None:
    """Where a model's files are, if all of them are on this machine."""
    if Path(model.model.path).exists():
        return Path(model.model.path)
    try:
        found = snapshot_download(
            model.model.path,
            revision=model.model.revision,
            cache_dir=options.transformers_cache,
            local_files_only=True,
        )
        _ = Checkpoint(model, Path(found), None).headers
    except (LocalEntryNotFoundError, FileNotFoundError, ValueError):
        return None
    return Path(found)


def _from_hub(model: ModelReference) -> tuple[dict[str, TensorHeader], int]:
    """Headers of a model's files on the Hub, and how many bytes of tensors they hold."""
    try:
        found = HfApi().get_safetensors_metadata(model.model.path, revision=model.model.revision)
    except (HTTPError, NoSafetensorsError, OSError) as error:
        reason = one_line(error)
        raise FileNotFoundError(f"the headers of {model} could not be fetched: {reason}") from error
    headers = {
        name: TensorHeader(tensor.dtype, tuple(tensor.shape), file)
        for file, metadata in found.files_metadata.items()
        for name, tensor in metadata.tensors.items()
    }
    return headers, sum(header.size for header in headers.values())
