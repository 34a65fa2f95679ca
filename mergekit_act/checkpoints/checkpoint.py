"""A checkpoint: a model's config, tensor headers, fingerprint, and its weights tensor by tensor."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from safetensors import SafetensorError
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mergekit_act.channels import build_skeleton
from mergekit_act.checkpoints.adapters import MergedModel
from mergekit_act.checkpoints.headers import TensorHeader, read_headers
from mergekit_act.checkpoints.references import local_folder, model_name, parse_reference, read_config
from mergekit_act.wording import enumerate_some, one_line, shorten

__all__ = ["Checkpoint", "merged_model", "open_checkpoint", "quantisation"]

_MIB = 1 << 20
# What holds packed weights; integers of other names are buffers, such as GPT-2's causal masks.
_PACKED = re.compile(r"(weight|_packed|_proj|qzeros|_blocks)$")


@dataclass(frozen=True)
class Checkpoint:
    """A model reference that is opened for reading.

    Attributes:
        reference: as mergekit writes it: ``user/repo@revision``, a path, ``model+lora``.
        folder: where its files are on this machine.
        config: its Transformers config.
    """

    reference: ModelReference
    folder: Path
    config: Any

    @cached_property
    def loader(self) -> LazyTensorLoader:
        """mergekit's loader for the weight files."""
        try:
            index = ShardedTensorIndex.from_disk(str(self.folder))
        except RuntimeError as error:
            raise FileNotFoundError(f"{self.folder} has no model.safetensors or pytorch_model.bin") from error
        except (SafetensorError, UnpicklingError, EOFError) as error:  # pickles may hold more than tensors
            reason = shorten(one_line(error), 500)
            raise ValueError(f"{self.folder} has no complete weight file ({reason}); fetch or save it again") from error
        missing = sorted({file for file in index.tensor_paths.values() if not (self.folder / file).is_file()})
        if missing:
            raise FileNotFoundError(f"{self.folder} lacks {enumerate_some(missing)}, which its index names")
        single = "model.safetensors" if index.is_safetensors else "pytorch_model.bin"
        if (self.folder / single).is_file() and single not in index.tensor_paths.values():
            raise ValueError(
                f"{self.folder} holds two sets of weights: {single}, which Transformers takes, and those that "
                f"{single}.index.json names, which mergekit takes. Remove one"
            )
        # Files of the old pickle format are no archives; only archives can be read tensor by tensor.
        archives = all(zipfile.is_zipfile(self.folder / file) for file in set(index.tensor_paths.values()))
        return LazyTensorLoader(index, lazy_unpickle=archives)

    @cached_property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Name -> header of every stored tensor. No values are read."""
        paths = self.loader.index.tensor_paths
        found: dict[str, TensorHeader] = {}
        for file in sorted(set(paths.values())):
            headers = read_headers(self.folder / file)
            named = {name for name, home in paths.items() if home == file}
            if named != set(headers):
                name = sorted(named ^ set(headers))[0]
                has = "has not" if name in named else "has besides"
                raise ValueError(
                    f'{self.folder}: its index does not fit {file}, which {has} "{name}". Fetch or save it again'
                )
            found |= headers
        return found

    @cached_property
    def _by_layer(self) -> dict[str | None, list[str]]:
        found: dict[str | None, list[str]] = {}
        for name in self.headers:
            found.setdefault(_layer(name), []).append(name)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json, sorted tensor names, dtypes and shapes, and both ends of every weight file."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, header in sorted(self.headers.items()):
            digest.update(f"{name} {header.dtype} {list(header.shape)}\n".encode())
        for file in sorted({header.file for header in self.headers.values()}):
            with open(self.folder / file, "rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                for start in (0, max(0, size - _MIB)):
                    stream.seek(start)
                    digest.update(stream.read(_MIB))
        return digest.hexdigest()

    def describe(self) -> dict[str, str | None]:
        """What a profile records of it: Hub reference and revision, or a local folder's name; and its fingerprint."""
        name, revision = model_name(self.reference.model.path)
        if self.reference.lora is not None:
            name += "+" + model_name(self.reference.lora.path)[0]
        if not os.path.exists(self.reference.model.path):
            revision = model_name(str(self.folder))[1] or self.reference.model.revision
        return {"model": name, "revision": revision, "fingerprint": self.fingerprint}

    def parameter_name(self, stored: str) -> str:
        """The Transformers parameter name of a stored tensor, where a model's files keep older names.

        Vision-language models do: the files of Gemma 3 say ``language_model.model.layers.0``, the model
        ``model.language_model.layers.0``.
        """
        return self._rename(stored)[0]

    def stored_name(self, name: str) -> str | None:
        """The stored tensor that is a parameter, under any of the parameter's names; None if it has to be converted."""
        return self._stored_names.get(self.parameter_name(name))

    @cached_property
    def skeleton(self) -> Any | None:
        """The model without its weights; None where Transformers does not have its class."""
        try:
            return build_skeleton(self.config)
        except Exception:  # a model's own code, which may raise anything, or no config at all
            return None

    def expects(self, name: str) -> bool:
        """Whether the model that the config describes stores this tensor, as far as Transformers knows the model.

        A tied head is not stored beside its embedding.
        """
        if self.skeleton is None:
            return True
        return self.parameter_name(name) in self.skeleton.state_dict() and self.tied_name(name) is None

    def tied_name(self, name: str) -> str | None:
        """The stored tensor that the model ties to this one; None if it ties none."""
        if self.skeleton is None:
            return None
        parameters = dict(self.skeleton.named_parameters(remove_duplicate=False))
        own = parameters.get(self.parameter_name(name))
        twins = [other for other, parameter in parameters.items() if parameter is own and other != name]
        return next(filter(None, map(self.stored_name, twins)), None)

    @cached_property
    def _rename(self) -> Callable[[str], tuple[str, str | None]]:
        """Transformers' own renaming: stored name -> parameter's name, and what converts it besides, if anything does.

        For a model whose class Transformers does not have, names stay as they are.
        """
        if self.skeleton is None:
            return lambda stored: (stored, None)
        transforms = get_model_conversion_mapping(self.skeleton)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        prefix, state = self.skeleton.base_model_prefix, self.skeleton.state_dict()
        return lambda stored: rename_source_key(stored, renamings, converters, prefix, state)

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        """Parameter name -> stored name, for those that are only renamed."""
        renamed = {stored: self._rename(stored) for stored in self.headers}
        return {name: stored for stored, (name, converter) in renamed.items() if converter is None}

    def read(self, *names: str) -> Tensor | None:
        """A tensor by its Transformers parameter name, converted if it is stored in an older layout.

        Args:
            names: the names of one matrix: several if the model ties them, of which a file may hold any.

        Returns:
            The tensor, borrowed from the file where that maps memory; None if the checkpoint does not have it.
        """
        return self._find(names, self.loader.get_tensor)

    def shape(self, *names: str) -> tuple[int, ...] | None:
        """The shape of what ``read`` would return; no values are read."""
        found = self._find(names, lambda key: torch.empty(self.headers[key].shape, device="meta"))
        return None if found is None else tuple(found.shape)

    def sources(self, *names: str) -> tuple[str, ...]:
        """Which stored tensors ``read`` would make a matrix of; none if the checkpoint does not have it."""
        used: list[str] = []

        def noted(key: str) -> Tensor:
            used.append(key)
            return torch.empty(self.headers[key].shape, device="meta")

        return () if self._find(names, noted) is None else tuple(used)

    def flush(self) -> None:
        """Close the file that is open, so that its pages no longer count as this process's memory.

        A pickle of the old format, which can only be read as a whole, stays.
        """
        if self.loader.index.is_safetensors or self.loader.lazy_unpickle:
            self.loader.flush()

    def _find(self, names: tuple[str, ...], get: Callable[[str], Tensor]) -> Tensor | None:
        # Old checkpoints leave out the base model's prefix ("transformer.wte.weight" is "wte.weight").
        for candidate in (*names, *(name.partition(".")[2] for name in names)):
            if candidate in self.headers:
                return get(candidate)
        # All of a large mixture of experts would take as long as a forward pass.
        sources: dict[str, Callable[[], Tensor]] = {
            key: partial(get, key)
            for layer in {_layer(name) for name in names}
            for key in self._by_layer.get(layer, ())
        }
        # Transformers keeps its conversions under the class's name or the model type.
        for family in (*(self.config.architectures or ()), self.config.model_type):
            for name in names:
                converted: Tensor | None = convert_checkpoint_tensors(family, sources, name)
                if converted is not None:
                    return converted
        stored = next(filter(None, map(self.stored_name, names)), None)
        return None if stored is None else get(stored)


def open_checkpoint(
    reference: str,
    *,
    lora_merge_cache: str | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a model reference as mergekit takes it, fetching it from the Hub if it is not a local folder.

    A ``quantization_config`` that stands beside plain weights is taken out of the config.

    Raises:
        FileNotFoundError: the folder has no config or no weights.
        ValueError: the weights are quantised, or a LoRA reference comes without ``lora_merge_cache``.
    """
    parsed = parse_reference(reference)
    if parsed.lora is not None and lora_merge_cache is None:
        raise ValueError(f"{reference} has a LoRA; say --lora-merge-cache FOLDER, where the merged model is kept")
    config = read_config(reference, trust_remote_code=trust_remote_code)
    method = _declared_quantisation(config)
    if method is not None and not (Path(parsed.model.path).is_dir() or HF_HUB_OFFLINE):
        raise ValueError(_quantised(reference, f"{method}, by its config"))
    if parsed.lora is None or lora_merge_cache is None:
        folder = local_folder(parsed)
    else:
        folder = merged_model(parsed, lora_merge_cache).make(trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint(parsed, folder, config)
    found = quantisation(checkpoint)
    if found is not None:
        raise ValueError(_quantised(reference, found))
    if method is not None:
        del config.quantization_config
    return checkpoint


def merged_model(reference: ModelReference, cache: str, dtype: str | None = None) -> MergedModel:
    """The model that a reference's adapter is merged into, as it is kept in a folder.

    Args:
        reference: with an adapter.
        cache: the folder.
        dtype: name of the dtype that the base is loaded in; None for its own.
    """
    model = reference.model
    if Path(model.path).exists():
        base = Checkpoint(ModelReference(model=model), Path(model.path), None).fingerprint
    else:
        base = Path(hf_hub_download(model.path, "config.json", revision=model.revision)).parent.name
    return MergedModel(reference, Path(cache), base, dtype)


def quantisation(checkpoint: Checkpoint) -> str | None:
    """How a checkpoint's weights are quantised, as its files show it; None for plain weights.

    A config tells nothing: many keep a ``quantization_config`` when their weights were converted back.
    """
    for name, header in sorted(checkpoint.headers.items()):
        kind = header.dtype.lower().removeprefix("torch.")
        few_bits = re.match(r"(f|float)[468]_", kind + "_") is not None
        packed = re.match(r"(u|i|u?int)(8|16|32)$", kind) is not None and _PACKED.search(name) is not None
        if few_bits or packed:
            method = _declared_quantisation(checkpoint.config)
            return f'{method or "no method named"}: "{name}" is {header.dtype}'
    return None


def _declared_quantisation(config: Any) -> str | None:
    """The method that a config's ``quantization_config`` names; None if it has none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "unnamed")


def _quantised(reference: str, how: str) -> str:
    return f"{reference} is quantised ({how}); expected float32, float16 or bfloat16 weights"


def _layer(name: str) -> str | None:
    """The first index in a tensor's name: its layer's."""
    return next((part for part in name.split(".") if part.isdigit()), None)
