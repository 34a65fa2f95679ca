"""How a pair is profiled: settings, resolved once for the machine they are used on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mergekit_act.abilities import AbilitySamples
from mergekit_act.criteria import WITHOUT_DATA
from mergekit_act.devices import default_device, default_dtype, dtype_name, usable_device
from mergekit_act.profiling.pair import ModelPair
from mergekit_act.runs.processes import Processes
from mergekit_act.versions import installed_versions

__all__ = ["ProfilingSettings"]


@dataclass(frozen=True)
class ProfilingSettings:
    """How channels are scored.

    Attributes:
        criterion: what scores are: ``activation`` differences (the paper); ``local`` changes of a channel's own output;
            ``attribution``, the changes of the loss they make; ``weight`` change, or ``random``.
        device: where the models run; None takes the accelerator if there is one.
        dtype: name of the dtype in which they run; None takes bfloat16 where the device multiplies it natively, else
            float32.
        batch_tokens: tokens in a micro-batch, padding included.
        memory_budget: bytes of the device's memory to use; None takes what is free, with a margin. What of the models
            does not fit is loaded once per chunk of micro-batches. The profiles do not depend on it.
        save_every: seconds after which the state is saved, at the end of a chunk.
        points: for ``attribution``: how many points on the line from the target to the ability model are averaged.
        center_logits: take off each token's mean over the vocabulary from differences of logits, which softmax ignores.
            None does so for the criterion ``local``; it is not for ``attribution``.
        inputs: keep a sample of the inputs of the target's modules too, which a fit is solved with.
        random_seed: for the criterion ``random``.
        exclude: globs of modules that get no scores.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the models' own code from the Hub.
        quiet: show no progress.
    """

    criterion: str = "activation"
    device: str | None = None
    dtype: str | None = None
    batch_tokens: int = 4096
    memory_budget: int | None = None
    save_every: float = 60.0
    points: int = 1
    center_logits: bool | None = None
    inputs: bool = False
    random_seed: int = 0
    exclude: Sequence[str] = ()
    lora_merge_cache: str | None = None
    trust_remote_code: bool = False
    quiet: bool = False

    def resolved(self, processes: Processes) -> ProfilingSettings:
        """With the device and dtype that None stands for in this process.

        Raises:
            ValueError: PyTorch can't use the device here, or a setting belongs to another criterion.
        """
        if self.points != 1 and self.criterion != "attribution":
            raise ValueError(f"points belong to the criterion attribution, not to {self.criterion}")
        if self.inputs and (self.points != 1 or self.criterion in WITHOUT_DATA):
            raise ValueError(
                "inputs are the target's on samples: they are kept with activation, local, and attribution of 1 point"
            )
        if self.center_logits is not None and self.criterion not in ("activation", "local"):
            raise ValueError(f"logits are centered for the criteria activation and local, not for {self.criterion}")
        device = usable_device(self.device, processes.local_rank if processes.count > 1 else None)
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
        center = self.criterion == "local" if self.center_logits is None else self.center_logits
        dtype = self.dtype or dtype_name(default_dtype(device))
        return replace(self, device=device, dtype=dtype, center_logits=center or None)

    @property
    def line_points(self) -> tuple[float, ...]:
        """Where on the line from the target (0) to the ability model (1) the gradients are taken."""
        return (0.0,) if self.points == 1 else tuple((n + 0.5) / self.points for n in range(self.points))

    def of_criterion(self) -> dict[str, Any]:
        """What a profile records of how its criterion was measured."""
        settings = {"center_logits": True} if self.center_logits else {}
        return settings | ({"points": self.points} if self.criterion == "attribution" else {})

    @property
    def place(self) -> str:
        """The device, once it is resolved."""
        return self.device or default_device()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype, once it is resolved."""
        dtype: torch.dtype = getattr(torch, self.dtype or "float32")
        return dtype

    def identity(self, pair: ModelPair, abilities: Sequence[AbilitySamples], processes: Processes) -> dict[str, Any]:
        """All that sums depend on: a run that is continued must have the same."""
        return {
            "criterion": self.criterion,
            **self.of_criterion(),
            "target": pair.target.fingerprint,
            "ability_model": pair.ability_model.fingerprint,
            "exclude": list(pair.exclude),
            "abilities": {ability.name: ability.data for ability in abilities},
            "order": [ability.name for ability in abilities],
            "device": torch.device(self.place).type,
            "dtype": self.dtype,
            "batch_tokens": self.batch_tokens,
            "processes": processes.count,
            "versions": installed_versions("mergekit", "torch", "transformers"),
        }
