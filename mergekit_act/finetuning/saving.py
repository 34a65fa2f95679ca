"""What a trained model is saved with, all tried before the training: what fails then costs minutes, not hours."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mergekit_act.checkpoints import Checkpoint
from mergekit_act.finetuning.recipe import Recipe
from mergekit_act.wording import one_line, show_bytes

__all__ = ["Saving", "bytes_needed", "check_room"]

LOG = logging.getLogger(__name__)

_GENERATION = "generation_config.json"
_CHECKPOINTS_AT_ONCE = 3  # two are kept, while a third is written


@dataclass
class Saving:
    """What is saved beside the weights.

    Attributes:
        checkpoint: the model that is trained.
        tokenizer: what is saved with it.
        generation: the model's generation config, if Transformers would not save it.
    """

    checkpoint: Checkpoint
    tokenizer: Any
    generation: GenerationConfig | None = None

    def try_out(self, model: Any, folder: Path) -> None:
        """Save everything but the weights and the card, which a rerun makes if it is missing, and remove it again.

        A generation config that Transformers would not write is taken from the model; its file will be copied.

        Args:
            model: the loaded model; its generation config may be changed.
            folder: for what is written; it is removed.

        Raises:
            ValueError: something can't be made, and what.
            OSError: something can't be written.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._set_generation_aside(model)
        parts: dict[str, Callable[[], Any]] = {
            "config": lambda: model.config.save_pretrained(folder),
            "generation config": lambda: model.generation_config.save_pretrained(folder),
            "weights": lambda: _names_as_saved(model),
            "tokenizer": lambda: self.tokenizer.save_pretrained(folder),
        }
        try:
            for what, save in parts.items():
                _try(f"the {what} of {self.checkpoint.reference}", save)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def complete(self, folder: Path) -> None:
        """Give what the trainer has saved its dtypes and tokenizer."""
        dtypes = {name: header.torch_dtype for name, header in self.checkpoint.headers.items() if header.torch_dtype}
        usual = max(dtypes.values(), key=list(dtypes.values()).count)
        for path in folder.glob("*.safetensors"):
            _cast_file(path, dtypes, usual)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(usual).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self._put_generation_back(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)
        self.tokenizer.save_pretrained(folder)

    def _set_generation_aside(self, model: Any) -> None:
        """Let a model have a generation config that Transformers saves: it refuses a few of those that it reads."""
        own = model.generation_config
        try:
            own.validate(strict=True)
        except ValueError as error:
            reason = one_line(error, 200)
            LOG.warning(
                "Transformers would not save how %s generates (%s); it is copied as it is",
                self.checkpoint.reference,
                reason,
            )
            self.generation = own
            model.generation_config = GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id)

    def _put_generation_back(self, folder: Path) -> None:
        source = self.checkpoint.folder / _GENERATION
        if self.generation is not None and source.is_file():
            shutil.copyfile(source, folder / _GENERATION)
        elif self.generation is not None:  # older models say it in their config.json
            self.generation.to_json_file(str(folder / _GENERATION))


def bytes_needed(parameters: int, recipe: Recipe, updates: int, save_steps: int) -> int:
    """What a training has on the disk at most: the model, and checkpoints with Adam's two means for each weight."""
    dtype: torch.dtype = getattr(torch, recipe.master_dtype)
    weights = parameters * dtype.itemsize
    checkpoints = min(_CHECKPOINTS_AT_ONCE, math.ceil(updates / save_steps)) if save_steps else 0
    return weights + checkpoints * 3 * weights


def check_room(folder: Path, needed: int) -> None:
    """See that a disk has room.

    Args:
        folder: of the training; what it already holds of checkpoints counts as room.
        needed: bytes.

    Raises:
        OSError: it has not.
    """
    held = sum(path.stat().st_size for path in folder.rglob("checkpoint-*/*") if path.is_file())
    free = shutil.disk_usage(folder).free + held
    if free < needed:
        raise OSError(
            f"{folder} has room for {show_bytes(free)}; the model and its checkpoints take up to {show_bytes(needed)}. "
            "Make room, choose another folder, or keep fewer checkpoints (--save-steps 0 keeps none)"
        )


def _try(what: str, save: Callable[[], Any]) -> None:
    try:
        save()
    except OSError:
        raise
    except Exception as error:  # Transformers, tokenizers, templates and a model's own code raise any kind
        reason = one_line(error, 500)
        raise ValueError(
            f"{what} could not be saved after the training ({reason}); mend it, then give the "
            "same command again. Nothing was trained"
        ) from error


def _names_as_saved(model: Any) -> list[str]:
    """The names under which the weights are saved, found without their values."""
    kept = remove_tied_weights_from_state_dict(model.state_dict(), model)
    return list(revert_weight_conversion(model, {name: tensor.to("meta") for name, tensor in kept.items()}))


def _cast_file(path: Path, dtypes: Mapping[str, torch.dtype], usual: torch.dtype) -> None:
    """Give each tensor of a file the dtype that the model's own files have for it."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    cast = {name: tensor.to(dtypes.get(name, usual)) for name, tensor in tensors.items() if tensor.is_floating_point()}
    if all(tensor.dtype == tensors[name].dtype for name, tensor in cast.items()):
        return
    temporary = path.with_suffix(".tmp")
    save_file(tensors | cast, temporary, metadata=metadata)
    os.replace(temporary, path)
