"""From an abilities file to a trained model: what the command ``finetune`` does."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from mergekit_act import __version__
from mergekit_act.abilities import AbilitiesFile, AbilitySamples, Tokenizers, collect_samples
from mergekit_act.cards.finetuned import write_finetuned_card
from mergekit_act.checkpoints import Checkpoint, open_checkpoint
from mergekit_act.files import check_writable, write_atomically
from mergekit_act.finetuning.recipe import Recipe
from mergekit_act.finetuning.trainer import DivergedError, all_finite, build_settings, build_trainer, writing
from mergekit_act.models import broken_weight, check_samples_fit, load_model
from mergekit_act.recipes import keep_recipe
from mergekit_act.report import can_draw, draw_losses

__all__ = ["finetune"]

_RECIPE = "finetune.json"
_CHECKPOINTS = "checkpoints"  # there as long as the model is not finished


def finetune(
    model: str,
    file: AbilitiesFile,
    out: Path,
    recipe: Recipe,
    *,
    device: str,
    names: Sequence[str] = (),
    save_steps: int = 200,
    lora_merge_cache: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[Path]:
    """Full-parameter fine-tuning on the samples of an abilities file, on their answer tokens only.

    The same call goes on from the last checkpoint that is complete. Processes that ``accelerate launch`` or
    ``torchrun`` started share each update's samples.

    Args:
        model: reference of the model to train.
        file: the abilities file; all of its abilities take part, those to keep too.
        out: folder for the model, its card, ``loss.csv`` and its picture.
        recipe: how.
        device: as ``choose_device`` returns it.
        names: which abilities; none for all.
        save_steps: updates between two checkpoints; 0 keeps none.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the model's own code from the Hub.
        overwrite: discard what another run has left in ``out``.
        quiet: show no progress.

    Returns:
        What was written; empty in all processes but the first.

    Raises:
        FileNotFoundError: the model or a data set does not exist.
        FileExistsError: ``out`` is finished, or holds something else.
        ValueError: TRL is not installed, the batch can't be divided, ``out`` is of another recipe, the memory does not
            suffice, or the loss became NaN or infinite; the last good checkpoint stays.
        OSError: something could not be written; the last complete checkpoint stays.
    """
    if find_spec("trl") is None:
        raise ValueError('fine-tuning needs TRL: pip install "mergekit-act[finetune]"')
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    accumulate = recipe.accumulate(world)
    check_writable(out)
    if quiet:
        disable_progress_bar()
    file.check_names(names)
    checkpoint = open_checkpoint(model, lora_merge_cache=lora_merge_cache, trust_remote_code=trust_remote_code)
    if out.resolve() == checkpoint.folder.resolve():
        raise ValueError(f"{out} is the model itself; choose another folder for the trained one")
    tokenizers = Tokenizers(file.target, file.ability_model, trust_remote_code)
    abilities = [collect_samples(file, name, tokenizers) for name in names or file.abilities]
    for ability in abilities:
        check_samples_fit(checkpoint, ability, tokenizers.target.backend_tokenizer)
    if rank == 0:
        _claim(out, _settings(checkpoint, abilities, recipe), overwrite)
    run = _Run(checkpoint, abilities, out, recipe, tokenizers)
    settings = build_settings(
        recipe, run.checkpoints, accumulate=accumulate, save_steps=save_steps, device=device, quiet=quiet
    )
    dtype = getattr(torch, recipe.master_dtype)
    loaded = load_model(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    broken = broken_weight(loaded)
    if broken is not None:
        raise ValueError(f'{checkpoint.reference} has broken weights: "{broken}" has values that are NaN or infinite')
    trainer = build_trainer(loaded, run.padding_tokenizer(), settings, abilities, run.kept)
    try:
        trainer.train(resume_from_checkpoint=run.last_checkpoint())
        run.save(trainer)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory on {device}: {' '.join(str(error).split())[:200]}; {run.kept()}. Try --micro-batch 1, "
            "--master-dtype bfloat16, or FSDP on several GPUs"
        ) from error
    finally:
        written = run.write_losses(trainer.state.log_history) if rank == 0 else []
    return [] if rank else [out, *written]


@dataclass(frozen=True)
class _Run:
    """One fine-tuning, in one process: what it is made of, and what is kept of it."""

    checkpoint: Checkpoint
    abilities: Sequence[AbilitySamples]
    out: Path
    recipe: Recipe
    tokenizers: Tokenizers

    @property
    def checkpoints(self) -> Path:
        """Where unfinished work is kept."""
        return self.out / _CHECKPOINTS

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer; that of the abilities file's target if it has none."""
        if (self.checkpoint.folder / "tokenizer.json").is_file():
            return AutoTokenizer.from_pretrained(str(self.checkpoint.folder))
        return self.tokenizers.target

    def padding_tokenizer(self) -> Any:
        """The tokenizer with a padding token, for micro-batches; the model's is saved as it was."""
        tokenizer = deepcopy(self.tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def last_checkpoint(self) -> str | None:
        """The last checkpoint that was written to its end; what a kill or a full disk has left of others is removed."""
        found = {}
        for folder in self.checkpoints.glob("checkpoint-*"):
            step = int(folder.name.rpartition("-")[2])
            if _steps_of(folder) == step:
                found[step] = folder
            elif int(os.environ.get("RANK", "0")) == 0:
                shutil.rmtree(folder, ignore_errors=True)
        return str(found[max(found)]) if found else None

    def kept(self) -> str:
        """What is there of the work so far, in words."""
        last = self.last_checkpoint()
        return "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"

    def save(self, trainer: Any) -> None:
        """Write the model, in the dtype that it came in, its tokenizer and its card; then remove the checkpoints."""
        if not all_finite(trainer.model):
            raise DivergedError(f"the trained weights are NaN or infinite; {self.kept()}. Lower the --learning-rate")
        if trainer.is_fsdp_enabled:  # each process's part alone would be no model
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        saving = self.out / ".saving"
        with writing(str(self.out), self.kept):
            if trainer.is_world_process_zero():
                shutil.rmtree(saving, ignore_errors=True)
            trainer.accelerator.wait_for_everyone()
            trainer.save_model(str(saving))  # of all processes, if they share the weights
            if not trainer.is_world_process_zero():
                return
            self._complete(saving)
            for path in self.out.glob("*.safetensors*"):  # of an earlier model, maybe in more files
                path.unlink()
            for path in sorted(saving.iterdir()):
                os.replace(path, self.out / path.name)
            saving.rmdir()
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write_losses(self, history: Sequence[Mapping[str, Any]]) -> list[Path]:
        """The loss of every update so far, as csv and picture."""
        rows = [entry for entry in history if "loss" in entry]
        if not rows:
            return []
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", "loss", "learning_rate", "grad_norm"])
        writer.writerows([row["step"], row["loss"], row["learning_rate"], row.get("grad_norm", "")] for row in rows)
        written = [self.out / "loss.csv"]
        with suppress(OSError):  # a full disk is told already
            write_atomically(written[0], text.getvalue().encode(), overwrite=True)
            if can_draw():
                steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
                written += draw_losses(steps, losses, self.out / "loss")
        return written

    def _complete(self, saving: Path) -> None:
        """Give what the trainer has saved its dtypes, tokenizer and card."""
        dtypes = {name: header.torch_dtype for name, header in self.checkpoint.headers.items() if header.torch_dtype}
        usual = max(dtypes.values(), key=list(dtypes.values()).count)
        for path in saving.glob("*.safetensors"):
            _cast_file(path, dtypes, usual)
        config = json.loads((saving / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(usual).removeprefix("torch.")
        (saving / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (saving / "training_args.bin").unlink(missing_ok=True)
        self.tokenizer.save_pretrained(saving)
        write_finetuned_card(
            saving / "README.md", self.out.resolve().name, self.checkpoint, self.abilities, self.recipe, _RECIPE
        )


def _claim(out: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """See that a folder is empty, or of this recipe and unfinished, and mark it as unfinished."""
    recipe, checkpoints = out / _RECIPE, out / _CHECKPOINTS
    if overwrite:
        recipe.unlink(missing_ok=True)
        shutil.rmtree(checkpoints, ignore_errors=True)
    elif not recipe.exists() and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds something else than a fine-tuning; name another folder, or say --overwrite")
    if keep_recipe(recipe, settings) and not checkpoints.exists():
        raise FileExistsError(f"{out} is finished already. Choose another folder or say --overwrite.")
    checkpoints.mkdir(exist_ok=True)


def _settings(checkpoint: Checkpoint, abilities: Sequence[AbilitySamples], recipe: Recipe) -> dict[str, Any]:
    """All that the trained weights depend on."""
    return {
        "model": checkpoint.describe(),
        "abilities": {ability.name: ability.data for ability in abilities},
        "recipe": {name: value for name, value in vars(recipe).items() if name != "micro_batch"},
        "versions": {"mergekit-act": __version__} | {name: version(name) for name in ("torch", "transformers", "trl")},
    }


def _steps_of(folder: Path) -> int | None:
    """How many updates a checkpoint has; None if it is not complete: this file is written last."""
    try:
        return int(json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
