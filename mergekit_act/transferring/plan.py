"""What a transfer is to do, its files, and what is to be known before its first command."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.constants import HF_HUB_CACHE

from mergekit_act.abilities import AbilitiesFile, Tokenizers
from mergekit_act.checkpoints import parse_reference, read_config
from mergekit_act.devices import default_dtype, usable_device
from mergekit_act.evaluation import collect_held_out
from mergekit_act.files import write_atomically
from mergekit_act.finetuning.recipe import choose_device
from mergekit_act.logs import muted
from mergekit_act.selection import validate_density
from mergekit_act.sweeping import Grid
from mergekit_act.transferring.needs import estimate_needs, estimate_seconds
from mergekit_act.transferring.parts import check_apart, split_held_out
from mergekit_act.wording import escape, show_bytes, show_seconds
from mergekit_act.yaml_files import read_yaml

__all__ = ["DENSITIES", "TransferPlan", "TransferSettings"]

DENSITIES = (0.01, 0.05, 0.2, 0.5)
_TRAINED = 16  # bytes a parameter: weights, gradients, and Adam's two moments, of four bytes each


@dataclass(frozen=True)
class TransferSettings:
    """How an ability is transferred.

    Attributes:
        criterion: by which channels are scored.
        density: of each profile; None lets a sweep choose, as for the weight.
        weight: on the changes.
        keep_within: share of the likelihood of a kept answer token that may be lost.
        finetune: whether the merged model is fine-tuned on the profiled samples.
        push_to_hub: the repository that the result is uploaded to; None for none.
        device: where models run; None takes the accelerator if there is one.
        dtype: in which they are profiled and evaluated; None as the commands choose.
        batch_tokens: tokens in a micro-batch.
        memory_budget: bytes of the device's memory that profiling may use.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the models' own code from the Hub.
    """

    criterion: str = "attribution"
    density: float | None = None
    weight: float | None = None
    keep_within: float = 0.05
    finetune: bool = False
    push_to_hub: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch_tokens: int = 4096
    memory_budget: int | None = None
    lora_merge_cache: str | None = None
    trust_remote_code: bool = False


class TransferPlan:
    """Models, settings, and the files between the commands.

    Args:
        path: of the abilities file.
        file: its content.
        out: folder for everything.
        settings: how.

    Attributes:
        target: the target, as the commands name it.
        ability_model: likewise.
        config: the merge config that is merged.
        merged: the merged model.
        tuned: that one, fine-tuned.
        result: the one of both that is wanted.
        evaluation: what is measured of all models.
    """

    def __init__(self, path: Path, file: AbilitiesFile, out: Path, settings: TransferSettings) -> None:
        path, out = _seen_from_here(path), _seen_from_here(out)  # one folder, however it is written
        self.path, self.out = path, out
        self.file, self.settings = file, settings
        self.target, self.ability_model = map(_unmistakable, (file.target, file.ability_model))
        self.swept = settings.density is None
        # Fitting rows spares what is kept where many move; whether that is better here, the sweep finds out.
        kept = any(one.role == "keep" for one in file.abilities.values())
        self.fitted = self.swept and kept and settings.criterion == "attribution"
        self.inputs = out / "profiles" / "fit" / "inputs.safetensors"
        self.profiles = {name: out / "profiles" / f"{name}.safetensors" for name in file.abilities}
        self.recovered = [self.profiles[name] for name, one in file.abilities.items() if one.role == "recover"]
        self.config = out / "sweep" / "best.yml" if self.swept else out / "merge.yml"
        self.measured = out / "measure.yml" if self.swept else path
        self.merged, self.tuned = out / "merged", out / "tuned"
        self.evaluation = out / "evaluation.json"
        self.result = self.tuned if settings.finetune else self.merged

    def check(self) -> None:
        """What would fail after hours is told now."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is no folder; name another OUT")
        if (self.settings.density is None) != (self.settings.weight is None):
            raise ValueError("density and weight go together: give both, or neither to let a sweep choose")
        if self.settings.density is not None:
            validate_density(self.settings.density)
        if self.settings.weight is not None and not (math.isfinite(self.settings.weight) and self.settings.weight):
            raise ValueError(f"weight is {self.settings.weight}; expected a finite number other than 0")
        if not self.recovered:
            raise ValueError(f'{self.path}: no ability has "role: recover", so there is nothing to transfer')
        if _places_of(self.target) == _places_of(self.ability_model):
            raise ValueError(f"{self.path}: target and ability_model are the same model")
        if self.settings.finetune and find_spec("trl") is None:
            raise ValueError('fine-tuning needs TRL: pip install "mergekit-act[finetune]"')
        for model in (self.target, self.ability_model):
            read_config(model, trust_remote_code=self.settings.trust_remote_code)
        usable_device(self.settings.device)
        if self.settings.finetune:
            choose_device(self.settings.device)
            if self.settings.dtype not in (None, "float32", "bfloat16"):
                raise ValueError(f"{self.settings.dtype} is no dtype to fine-tune in; expected float32 or bfloat16")
        written = read_yaml(self.path, "abilities file")
        parts = split_held_out(self.file, written) if self.swept else (written, written)
        tokenizers = Tokenizers(self.target, self.ability_model, self.settings.trust_remote_code)
        with muted("mergekit_act"):  # the steps tell what there is to tell
            choose, measure = (collect_held_out(AbilitiesFile(**part), tokenizers) for part in parts)
            for one in (*choose, *measure):
                one.check(generate=True)
        for few in (one for one in measure if len(one.samples) < 2):
            raise ValueError(
                f'ability "{few.ability}" has a single sample that measures; two are needed for an interval'
            )
        if self.swept:
            check_apart(choose, measure)
        self._parts = parts
        s = self.settings
        self.needs = estimate_needs(
            self.file,
            fitted=self.fitted,
            finetune=s.finetune,
            lora_merge_cache=s.lora_merge_cache,
            trust=s.trust_remote_code,
        )
        if not (self.result / "config.json").exists():
            self._check_disk()

    def _check_disk(self) -> None:
        wanted: dict[int, tuple[Path, int]] = {}  # of each device
        for folder, size in ((self.out, self.needs.disk), (Path(HF_HUB_CACHE), self.needs.fetched)):
            existing = next(one for one in (folder.resolve(), *folder.resolve().parents) if one.exists())
            device = existing.stat().st_dev
            place, before = wanted.get(device, (existing, 0))
            wanted[device] = (place, before + size)
        for place, size in wanted.values():
            free = shutil.disk_usage(place).free
            if size > free:
                has, needed = show_bytes(free), show_bytes(size)
                raise OSError(f"{escape(place)} has {has} free, and {needed} are needed; choose another place")

    def describe_needs(self) -> str:
        """Time, memory and disk, for people."""
        s = self.settings
        choose, measure = (AbilitiesFile.model_validate(part) for part in self._parts)
        seconds = estimate_seconds(
            self.needs,
            (self.file, choose, measure),
            points=len(Grid(densities=DENSITIES).points(1)) * (2 if self.fitted else 1) if self.swept else 0,
            finetune=s.finetune,
            criterion=s.criterion,
            device=s.device,
            dtype=s.dtype,
            trust=s.trust_remote_code,
        )
        device = usable_device(s.device)
        width = (getattr(torch, s.dtype) if s.dtype else default_dtype(device)).itemsize
        minutes = ", ".join(f"{name} {show_seconds(value)}" for name, value in seconds.items() if value)
        memory = f"{show_bytes(self.needs.parameters * width)} for the target in an evaluation"
        if self.swept:
            most = self.needs.parameters * max(DENSITIES)
            memory += f", {show_bytes((self.needs.parameters + most) * width)} with the rows that a sweep moves"
            memory += f" (and of the machine's {show_bytes(most * 4)} for fitted ones)" if self.fitted else ""
        if s.finetune:
            memory += f", {show_bytes(self.needs.parameters * _TRAINED)} to fine-tune"
        lines = [
            f"time: about {show_seconds(sum(seconds.values()))} on {device} ({minutes}), and what loading models and "
            "generating answers takes",
            f"memory: {memory}; a profile takes what is free, down to a layer of both models",
            f"disk: {show_bytes(self.needs.disk)}",
        ]
        return "\n".join([*lines, *self.needs.remarks])

    def write_inputs(self) -> None:
        """Files that the steps read and nobody else writes."""
        _write_yaml(self.out / "choose.yml", self._parts[0])
        _write_yaml(self.out / "measure.yml", self._parts[1])
        own: dict[str, Any] = {"weight": 1.0 if self.swept else self.settings.weight}
        own["mask"] = ",".join(map(str, self.recovered)) if self.swept else str(self.out / "mask.safetensors")
        own |= {"mask_density": 0.01} if self.swept else {}
        models = [{"model": self.ability_model, "parameters": own}]
        config = {"merge_method": "act", "base_model": self.target, "models": models}
        _write_yaml(self.out / "merge.yml", config)


def _seen_from_here(path: Path) -> Path:
    """Relative to the working directory, if it lies in there."""
    whole, here = Path(os.path.abspath(path)), Path.cwd()
    return whole.relative_to(here) if whole.is_relative_to(here) else whole


def _unmistakable(model: str) -> str:
    """A folder's name, always the same one, that mergekit cannot take for one of the Hub."""
    if not Path(model).is_dir():
        return model
    seen = _seen_from_here(Path(model))
    return str(seen) if seen.is_absolute() else f"./{seen}"


def _places_of(model: str) -> list[str]:
    """What tells a reference from another one, however its folders are written."""
    parsed = parse_reference(model)
    parts = [part for part in (parsed.model, parsed.lora) if part is not None]
    return [str(Path(one.path).resolve()) if Path(one.path).is_dir() else repr(one) for one in parts]


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode(), overwrite=True)
