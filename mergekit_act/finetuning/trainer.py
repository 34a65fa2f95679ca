"""TRL's trainer with a recipe: it stops before weights go bad, and says so when a disk is full."""

from __future__ import annotations

import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback

from mergekit_act.abilities import AbilitySamples
from mergekit_act.finetuning.recipe import Recipe
from mergekit_act.wording import one_line

__all__ = ["DivergedError", "all_finite", "build_settings", "build_trainer", "writing"]


class DivergedError(ValueError):
    """The loss or the weights are NaN or infinite."""


def build_settings(recipe: Recipe, folder: Path, *, accumulate: int, save_steps: int, device: str, quiet: bool) -> Any:
    """TRL's ``SFTConfig``. It has to exist before the model is loaded: DeepSpeed's settings change how that is done."""
    from trl import SFTConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that Transformers 6 will no longer know
        settings = SFTConfig(
            output_dir=str(folder),
            learning_rate=recipe.learning_rate,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.micro_batch,
            gradient_accumulation_steps=accumulate,
            lr_scheduler_type=recipe.scheduler,
            optim="adamw_torch",
            weight_decay=0.0,  # Adam
            bf16=recipe.dtype == "bfloat16",
            fp16=False,
            gradient_checkpointing=recipe.gradient_checkpointing,
            max_length=None,
            packing=False,
            seed=recipe.random_seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps" if save_steps else "no",
            save_steps=save_steps or 500,
            save_total_limit=2,  # should the last one turn out to have diverged
            report_to="none",
            disable_tqdm=quiet or not sys.stderr.isatty(),
            use_cpu=device == "cpu",
            dataloader_pin_memory=device != "cpu",
        )
    if settings.n_gpu > 1:  # several accelerators in one process would share, and so multiply, each micro-batch
        settings._n_gpu = 1
    return settings


def build_trainer(
    model: Any, tokenizer: Any, settings: Any, abilities: Sequence[AbilitySamples], kept: Callable[[], str]
) -> Any:
    """The trainer.

    Args:
        model: to train, changed in place.
        tokenizer: with a padding token; only micro-batches are padded, and padding has no labels.
        settings: what ``build_settings`` has made.
        abilities: the samples.
        kept: tells what is there of the work so far.
    """
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for sample in (sample for ability in abilities for sample in ability.samples):
        columns["input_ids"].append(sample.input_ids.tolist())
        columns["labels"].append(torch.where(sample.is_answer, sample.input_ids, -100).tolist())
    trainer = _trainer_class()(
        model=model, args=settings, train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer
    )
    trainer.kept = kept
    for printing in (PrinterCallback, ProgressCallback):  # a line for every update
        trainer.remove_callback(printing)
    if not settings.disable_tqdm:
        trainer.add_callback(_Bar)
    return trainer


def all_finite(model: Any) -> bool:
    """Whether all weights are finite; of a model that FSDP shares, each process looks at its own part."""
    parts = (getattr(weight, "to_local", weight.detach)() for weight in model.parameters())
    return all(bool(torch.isfinite(part).all()) for part in parts)


@contextmanager
def writing(what: str, kept: Callable[[], str]) -> Iterator[None]:
    """Tell in a sentence that something could not be written, and what is there all the same.

    Raises:
        OSError: in place of what safetensors, PyTorch and the system raise.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = one_line(error, 200)
        raise OSError(
            f"{what} could not be written ({reason}); {kept()}. Make room and give the same command again"
        ) from error


class _Bar(ProgressCallback):  # type: ignore[misc]
    """A progress bar that shows the loss."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=logs["loss"])


def _trainer_class() -> Any:
    """TRL's trainer, which has to be imported late: it takes seconds, and is an extra."""
    from trl import SFTTrainer

    class Trainer(SFTTrainer):  # type: ignore[misc]
        kept: Callable[[], str]

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            if not math.isfinite(float(loss)):
                self._stop(f"the loss is {float(loss)}")
            return loss

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if not all_finite(self.model):
                self._stop("weights are NaN or infinite")
            with writing(f"checkpoint-{self.state.global_step}", self.kept):
                super()._save_checkpoint(*args, **kwargs)

        def _stop(self, what: str) -> None:
            step, total = self.state.global_step + 1, self.state.max_steps
            # What was saved after the last update already had the weights that give this loss.
            shutil.rmtree(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            raise DivergedError(
                f"{what} at step {step} of {total}; {self.kept()}. Train with a --learning-rate below "
                f"{self.args.learning_rate:g}, into another folder or with --overwrite"
            )

    return Trainer
