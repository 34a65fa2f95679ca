"""From an abilities file to a trained model: what the command ``finetune`` does."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from mergekit_act.abilities import AbilitiesFile, AbilitySamples, Tokenizers, collect_samples
from mergekit_act.checkpoints import Checkpoint, open_checkpoint
from mergekit_act.files import check_writable, remove_leftovers, write_atomically
from mergekit_act.finetuning.recipe import Recipe, choose_device
from mergekit_act.finetuning.saving import Saving, bytes_needed, check_room
from mergekit_act.finetuning.trainer import DivergedError, all_finite, build_settings, build_trainer, writing
from mergekit_act.models import broken_weight, check_samples_fit, load_model
from mergekit_act.runs.folders import claimed, lock_of
from mergekit_act.runs.processes import rank_and_count
from mergekit_act.runs.settings import has_settings, keep_settings
from mergekit_act.versions import installed_versions
from mergekit_act.wording import as_csv, one_line

__all__ = ["FineTuned", "TrainingSettings", "finetune"]

_RECIPE = "finetune.json"
_CHECKPOINTS = "checkpoints"  # there as long as the model is not finished
_FINISHED = ".finished"  # what becomes of them
_SAVING = ".saving"


@dataclass(frozen=True)
class TrainingSettings:
    """Where a training runs and how often it is kept: what the trained weights do not depend on.

    Attributes:
        save_steps: updates between two checkpoints; 0 keeps none.
        device: ``cpu``, to leave an accelerator alone; None takes the accelerator if there is one.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the model's own code from the Hub.
        quiet: show no progress.
    """

    save_steps: int = 200
    device: str | None = None
    lora_merge_cache: str | None = None
    trust_remote_code: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model.

    Attributes:
        out: its folder, with ``finetune.json``, all settings, and ``loss.csv``.
        checkpoint: the model that was trained.
        abilities: the samples it was trained on.
        recipe: how.
        is_new: whether it was trained now; else it was finished before.
    """

    out: Path
    checkpoint: Checkpoint
    abilities: Sequence[AbilitySamples]
    recipe: Recipe
    is_new: bool

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every update."""
        table = self.out / "loss.csv"
        lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(lines)]


def finetune(
    model: str,
    file: AbilitiesFile,
    out: Path,
    recipe: Recipe | None = None,
    settings: TrainingSettings | None = None,
    *,
    names: Sequence[str] = (),
    overwrite: bool = False,
) -> FineTuned:
    """Full-parameter fine-tuning on the samples of an abilities file, on their answer tokens only.

    The same call goes on from the last checkpoint that is complete. Processes that ``accelerate launch`` or
    ``torchrun`` started share each update's samples.

    Args:
        model: reference of the model to train.
        file: the abilities file; all of its abilities take part, those to keep too.
        out: folder for the model and ``loss.csv``.
        recipe: how.
        settings: where.
        names: which abilities; none for all.
        overwrite: discard what another run has left in ``out``.

    Raises:
        FileNotFoundError: the model or a data set does not exist.
        FileExistsError: ``out`` holds something else; or it is finished, and other processes wait for something to do.
        BlockingIOError: another run is at work in it.
        ValueError: TRL is not installed, the batch can't be divided, ``out`` is of a run with other settings, memory
            does not suffice, or the loss became NaN or infinite; the last good checkpoint stays.
        OSError: something could not be written; the last complete checkpoint stays.
    """
    settings = settings or TrainingSettings()
    device = choose_device(settings.device)
    recipe = (recipe or Recipe()).resolved(device)
    if find_spec("trl") is None:
        raise ValueError('fine-tuning needs TRL: pip install "mergekit-act[finetune]"')
    rank, world = rank_and_count()
    recipe.accumulate(world)  # can the batch be divided?
    check_writable(out)
    if settings.quiet:
        disable_progress_bar()
    file.check_names(names)
    checkpoint = open_checkpoint(
        model, lora_merge_cache=settings.lora_merge_cache, trust_remote_code=settings.trust_remote_code
    )
    if out.resolve() == checkpoint.folder.resolve():
        raise ValueError(f"{out} is the model itself; choose another folder for the trained one")
    tokenizers = Tokenizers(file.target, file.ability_model, settings.trust_remote_code)
    abilities = [collect_samples(file, name, tokenizers) for name in dict.fromkeys(names or file.abilities)]
    for ability in abilities:
        check_samples_fit(checkpoint, ability, tokenizers.target.backend_tokenizer)
    training = _Training(checkpoint, abilities, out, recipe, tokenizers)
    with claimed(out / _RECIPE) if rank == 0 else nullcontext():
        is_new = rank > 0 or _claim(out, _identity(checkpoint, abilities, recipe), overwrite)
        if is_new:
            training.run(replace(settings, device=device))
        elif world > 1:  # the other processes would wait for this one
            raise FileExistsError(f"{out} is finished already; if its card or picture is missing, start one process")
        return FineTuned(out, checkpoint, abilities, recipe, is_new)


@dataclass(frozen=True)
class _Training:
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

    @cached_property
    def saving(self) -> Saving:
        """What the trained model is saved with."""
        return Saving(self.checkpoint, self.tokenizer)

    def run(self, settings: TrainingSettings) -> None:
        """Train the model and write it."""
        rank, world = rank_and_count()
        built = build_settings(
            self.recipe,
            self.checkpoints,
            accumulate=self.recipe.accumulate(world),
            save_steps=settings.save_steps,
            device=settings.device or "",
            quiet=settings.quiet,
        )
        dtype = getattr(torch, self.recipe.master_dtype)
        loaded = load_model(self.checkpoint, dtype=dtype, trust_remote_code=settings.trust_remote_code)
        broken = broken_weight(loaded)
        if broken is not None:
            raise ValueError(
                f'{self.checkpoint.reference} has broken weights: "{broken}" has values that are NaN or infinite'
            )
        if rank == 0:
            self.try_saving(loaded, settings.save_steps)
        trainer = build_trainer(loaded, self.padding_tokenizer(), built, self.abilities, self.kept)
        try:
            trainer.train(resume_from_checkpoint=self.last_checkpoint())
            self.save(trainer)
        except BaseException as error:
            if rank == 0:
                with suppress(OSError):  # what stopped the run is told
                    self.write_losses(trainer.state.log_history)
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"out of memory on {settings.device}: {one_line(error, 200)}; {self.kept()}. Try "
                "--micro-batch 1, --master-dtype bfloat16, or FSDP on several GPUs"
            ) from error

    def try_saving(self, model: Any, save_steps: int) -> None:
        """See that what is written at the end can be written, and has room on the disk.

        Raises:
            ValueError: it can't be made; a folder that holds no checkpoint is as before.
            OSError: it can't be written.
        """
        samples = sum(len(ability.samples) for ability in self.abilities)
        updates = math.ceil(math.ceil(samples / self.recipe.batch_size) * self.recipe.epochs)
        self.last_checkpoint()  # what a kill has left of others goes
        needed = bytes_needed(sum(weight.numel() for weight in model.parameters()), self.recipe, updates, save_steps)
        try:
            check_room(self.checkpoints, needed)
            self.saving.try_out(model, self.out / _SAVING)
        except (ValueError, OSError):
            if self.last_checkpoint() is None:  # what is mended may be another model to the recipe
                (self.out / _RECIPE).unlink(missing_ok=True)
                with suppress(OSError):
                    self.checkpoints.rmdir()
                    self.out.rmdir()
            raise

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
            elif rank_and_count()[0] == 0:
                shutil.rmtree(folder, ignore_errors=True)
        return str(found[max(found)]) if found else None

    def kept(self) -> str:
        """What is there of the work so far, in words."""
        last = self.last_checkpoint()
        return "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"

    def save(self, trainer: Any) -> None:
        """Write the model, in the dtype that it came in, and its tokenizer; then remove the checkpoints."""
        if not all_finite(trainer.model):
            raise DivergedError(f"the trained weights are NaN or infinite; {self.kept()}. Lower the --learning-rate")
        if trainer.is_fsdp_enabled:  # each process's part alone would be no model
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        saving = self.out / _SAVING
        with writing(str(self.out), self.kept):
            if trainer.is_world_process_zero():
                shutil.rmtree(saving, ignore_errors=True)
            trainer.accelerator.wait_for_everyone()
            trainer.save_model(str(saving))  # of all processes, if they share the weights
            if not trainer.is_world_process_zero():
                return
            self.saving.complete(saving)
            self.write_losses(trainer.state.log_history)
            for path in (*self.out.glob("*.safetensors*"), self.out / "README.md"):  # of an earlier model
                path.unlink(missing_ok=True)
            for path in sorted(saving.iterdir()):
                os.replace(path, self.out / path.name)
            saving.rmdir()
            # As long as this folder is there, the run is not finished; half of it would look like no checkpoint at all.
            os.replace(self.checkpoints, self.out / _FINISHED)
        shutil.rmtree(self.out / _FINISHED, ignore_errors=True)

    def write_losses(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write down the loss of every update so far.

        Raises:
            OSError: it could not be written.
        """
        rows = [entry for entry in history if "loss" in entry]
        if not rows:
            return
        cells = [[row["step"], row["loss"], row["learning_rate"], row.get("grad_norm")] for row in rows]
        content = as_csv([["step", "loss", "learning_rate", "grad_norm"], *cells])
        write_atomically(self.out / "loss.csv", content.encode(), overwrite=True)


def _claim(out: Path, settings: Mapping[str, Any], overwrite: bool) -> bool:
    """See that a folder is empty or of this recipe, and mark it as unfinished.

    Returns:
        Whether there is something to train; a finished model of this recipe needs nothing.
    """
    recipe, checkpoints = out / _RECIPE, out / _CHECKPOINTS
    remove_leftovers(recipe)
    if overwrite and not has_settings(recipe, settings):
        shutil.rmtree(checkpoints, ignore_errors=True)
        # There before the recipe, so that an earlier model is never taken for this recipe's.
        checkpoints.mkdir(parents=True)
        recipe.unlink(missing_ok=True)
    elif not recipe.exists():
        others = (path for path in out.iterdir() if path != lock_of(recipe)) if out.is_dir() else ()
        if any(path != checkpoints or any(path.iterdir()) for path in others):
            raise FileExistsError(
                f"{out} holds something else than a fine-tuning; name another folder, or say --overwrite"
            )
        checkpoints.mkdir(parents=True, exist_ok=True)
    keep_settings(recipe, settings)
    shutil.rmtree(out / _FINISHED, ignore_errors=True)
    if not any(out.glob("*.safetensors")):
        checkpoints.mkdir(exist_ok=True)
    return checkpoints.exists()


def _identity(checkpoint: Checkpoint, abilities: Sequence[AbilitySamples], recipe: Recipe) -> dict[str, Any]:
    """All that the trained weights depend on."""
    return {
        "model": checkpoint.describe(),
        "abilities": {ability.name: ability.data for ability in abilities},
        "recipe": {name: value for name, value in vars(recipe).items() if name != "micro_batch"},
        "versions": installed_versions("torch", "transformers", "trl"),
    }


def _steps_of(folder: Path) -> int | None:
    """How many updates a checkpoint has; None if it is not complete: this file is written last."""
    try:
        return int(json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
