"""Model references: a checkpoint's config, tensor headers, fingerprint, and its weights tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelPath, ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from safetensors import SafetensorError
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mergekit_act.adapters import MergedModel, adapter_problem
from mergekit_act.channels import build_skeleton
from mergekit_act.wording import shorten

__all__ = [
    "Checkpoint",
    "TensorHeader",
    "local_folder",
    "merged_model",
    "model_name",
    "open_checkpoint",
    "parse_reference",
    "quantisation",
    "read_config",
    "read_headers",
]

_MIB = 1 << 20
# What holds packed weights; integers of other names are buffers, such as GPT-2's causal masks.
_PACKED = re.compile(r"(weight|_packed|_proj|qzeros|_blocks)$")
_FLOATS = {
    **dict.fromkeys(("BF16", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("F16", "float16"), torch.float16),
    **dict.fromkeys(("F32", "float32"), torch.float32),
    **dict.fromkeys(("F64", "float64"), torch.float64),
}


@dataclass(frozen=True)
class TensorHeader:
    """A stored tensor, without its values.

    Attributes:
        dtype: as its file writes it.
        shape: its dimensions.
        file: the file's name.
        start: where its values begin in a safetensors file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The floating-point dtype that mergekit can merge in, None for others."""
        return _FLOATS.get(self.dtype)

    @property
    def size(self) -> int:
        """Bytes of its values."""
        bits = int(re.sub(r"\D", "", self.dtype.partition("_")[0]) or 8)
        return math.prod(self.shape) * bits // 8


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
            reason = shorten(_one_line(error), 500)
            raise ValueError(f"{self.folder} has no complete weight file ({reason}); fetch or save it again") from error
        missing = sorted({file for file in index.tensor_paths.values() if not (self.folder / file).is_file()})
        if missing:
            raise FileNotFoundError(f"{self.folder} lacks {', '.join(missing[:10])}, which its index names")
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


def local_folder(reference: ModelReference, cache_dir: str | None = None) -> Path:
    """Where the files of a reference without LoRA are on this machine, fetched if need be.

    mergekit asks the Hub which files there are, also with ``HF_HUB_OFFLINE=1``.

    Raises:
        FileNotFoundError: the Hub is switched off and its cache does not have the model.
    """
    if os.path.exists(reference.model.path) or not HF_HUB_OFFLINE:
        return Path(reference.local_path(cache_dir=cache_dir))
    try:
        return Path(
            snapshot_download(
                reference.model.path, revision=reference.model.revision, cache_dir=cache_dir, local_files_only=True
            )
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{reference} is not in the Hub's cache, and HF_HUB_OFFLINE is set; unset it, or give a local folder"
        ) from error


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


def parse_reference(reference: str) -> ModelReference:
    """A model reference of the form ``user/repo@revision``, a path, or either with ``+lora``.

    What exists is a path, whatever characters it has; mergekit would split it.

    Raises:
        ValueError: it has no such form, or several.
    """
    if os.path.exists(reference):
        return ModelReference(model=ModelPath(path=reference))
    parts = reference.split("+")
    splits = [("+".join(parts[:place]), "+".join(parts[place:])) for place in range(1, len(parts))]
    if len(splits) > 1:
        splits = [pair for pair in splits if all(map(os.path.exists, pair))]
        if len(splits) != 1:
            raise ValueError(f'"{reference}" cannot be parsed; expected MODEL or MODEL+LORA, paths or Hub ids')
    model, lora = splits[0] if splits else (reference, None)
    return ModelReference(model=_model_path(model), lora=None if lora is None else _model_path(lora))


def _model_path(written: str) -> ModelPath:
    if os.path.exists(written):
        return ModelPath(path=written)
    if not written or written.count("@") > 1:
        raise ValueError(f'"{written}" is no model; expected a path, or a Hub id with at most one @ before a revision')
    path, _, revision = written.partition("@")
    return ModelPath(path=path, revision=revision or None)


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


def model_name(path: str) -> tuple[str, str | None]:
    """A model's name for people, and its revision if the path tells: folders of the Hub's cache do."""
    if not os.path.exists(path):
        return path, None
    folder = Path(path).resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/"), folder.name
    return folder.name, None


def _declared_quantisation(config: Any) -> str | None:
    """The method that a config's ``quantization_config`` names; None if it has none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "unnamed")


def _quantised(reference: str, how: str) -> str:
    return f"{reference} is quantised ({how}); expected float32, float16 or bfloat16 weights"


def read_config(reference: str | ModelReference, *, trust_remote_code: bool = False) -> Any:
    """The config of a model reference; its weights need not be there.

    Raises:
        FileNotFoundError: there is no such model folder, it has no config.json, or is an adapter.
    """
    parsed = parse_reference(reference) if isinstance(reference, str) else reference
    path = Path(parsed.model.path)
    if path.is_dir() and not (path / "config.json").is_file():
        expected = f"{path} has no config.json; expected a model folder as save_pretrained writes it"
        raise FileNotFoundError(adapter_problem(path) or expected)
    if not path.exists() and parsed.model.path.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{parsed.model.path} does not exist (relative to {os.getcwd()}); expected a model folder or a Hub id"
        )
    try:
        return parsed.config(trust_remote_code=trust_remote_code)
    except OSError as error:  # not on the Hub, or the Hub is out of reach
        reason = f"{reference} has no config that can be loaded: {_one_line(error)}"
        raise FileNotFoundError(adapter_problem(parsed.model.path, parsed.model.revision) or reason) from error


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Name -> header of every tensor in a weight file, safetensors or pickle; no values are read.

    Raises:
        ValueError: the file is truncated or holds something else than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors_header(path)
        state = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {
            name: TensorHeader(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), path.name)
            for name, tensor in state.items()
        }
    except (struct.error, ValueError, KeyError, AttributeError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"{path} is not a complete weight file ({shorten(_one_line(error), 500)}); fetch or save it again"
        ) from error


def _read_safetensors_header(path: Path) -> dict[str, TensorHeader]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        size = file.seek(0, os.SEEK_END)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != size:
        raise ValueError(f"{size} bytes, its header says {end}")
    return {
        name: TensorHeader(entry["dtype"], tuple(entry["shape"]), path.name, 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def _layer(name: str) -> str | None:
    """The first index in a tensor's name: its layer's."""
    return next((part for part in name.split(".") if part.isdigit()), None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
