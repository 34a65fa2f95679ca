"""How a model is fine-tuned, and where."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mergekit_act.devices import default_device, default_dtype, dtype_name

__all__ = ["Recipe", "choose_device"]


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned; the defaults are the paper's (appendix A) where it says something.

    Attributes:
        learning_rate: of Adam.
        epochs: passes over the samples.
        batch_size: samples of one update, over all processes.
        scheduler: how the learning rate goes on, as Transformers names it. The paper names none.
        micro_batch: samples that one process computes at once; the result does not depend on it.
        dtype: in which forward and backward passes compute; None takes bfloat16 where the device multiplies it
            natively, else float32.
        master_dtype: in which the weights and Adam's means are kept.
        gradient_checkpointing: compute activations twice instead of keeping them.
        random_seed: of the order of the samples.
    """

    learning_rate: float = 2e-5
    epochs: float = 1.0
    batch_size: int = 16
    scheduler: str = "linear"
    micro_batch: int = 1
    dtype: str | None = None
    master_dtype: str = "float32"
    gradient_checkpointing: bool = True
    random_seed: int = 0

    def resolved(self, device: str) -> Recipe:
        """With the dtype that None stands for on a device."""
        return replace(self, dtype=self.dtype or dtype_name(default_dtype(device)))

    def accumulate(self, processes: int) -> int:
        """Micro-batches of each process in one update.

        Raises:
            ValueError: the update's samples can't be divided.
        """
        accumulate, rest = divmod(self.batch_size, self.micro_batch * processes)
        if rest or not accumulate:
            raise ValueError(
                f"an update of {self.batch_size} samples cannot be divided into micro-batches of {self.micro_batch} in "
                f"{processes} processes; expected a multiple of {self.micro_batch * processes}"
            )
        return accumulate


def choose_device(device: str | None) -> str:
    """The CPU or this process's accelerator.

    Raises:
        ValueError: it is another one; which accelerator a process takes, its launcher says.
    """
    accelerator = default_device()
    if device not in (None, "cpu", accelerator):
        raise ValueError(
            f'device "{device}" cannot be chosen for fine-tuning; expected "cpu" or nothing, which takes {accelerator} '
            "(CUDA_VISIBLE_DEVICES says which one)"
        )
    return device or accelerator
