"""What a transfer takes: disk, memory and, by a short probe of the device, time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from mergekit.options import MergeOptions

from mergekit_act.abilities import AbilitiesFile, Tokenizers, collect_samples
from mergekit_act.checkpoints import parse_reference
from mergekit_act.devices import default_dtype, usable_device
from mergekit_act.finetuning import Recipe, TrainingSettings
from mergekit_act.finetuning.saving import bytes_needed
from mergekit_act.planning import only_headers
from mergekit_act.planning.models import open_loaded

__all__ = ["Needs", "estimate_needs", "estimate_seconds"]

# Work for a token, in forwards of one model.
_PROFILE = {"activation": 2.0, "local": 2.0, "attribution": 5.0}
_TRAINING = 4.0  # forward, again for the gradient checkpoints, backward twice that
_INPUTS = 0.1  # at most, of the target's bytes
_OF_MATRIX_RATE = 0.5  # assumed: what a model's forward reaches of the rate of a large product of matrices


@dataclass(frozen=True)
class Needs:
    """What is to be had before a transfer begins.

    Attributes:
        disk: bytes that are written.
        fetched: bytes that the Hub's cache gets.
        parameters: of the target.
        remarks: what is fetched first, a sentence each.
    """

    disk: int
    fetched: int
    parameters: int
    remarks: Sequence[str]


def estimate_needs(
    file: AbilitiesFile, *, fitted: bool, finetune: bool, lora_merge_cache: str | None, trust: bool
) -> Needs:
    """Look at the headers of both models' files.

    Raises:
        FileNotFoundError: a model has no weights, or the Hub is out of reach.
    """
    target, ability_model = (parse_reference(model) for model in (file.target, file.ability_model))
    options = MergeOptions(lora_merge_cache=lora_merge_cache, trust_remote_code=trust)
    with only_headers({target, ability_model}, options) as remarks:
        opened = [open_loaded(model, trust_remote_code=trust) for model in (target, ability_model)]
        sizes = [sum(header.size for header in one.headers.values()) for one in opened]
        parameters = sum(torch.Size(header.shape).numel() for header in opened[0].headers.values())
        fetched = sum(size for one, size in zip(opened, sizes, strict=True) if not one.folder.exists())
    settings = TrainingSettings()
    samples = sum(one.samples for one in file.abilities.values())
    training = bytes_needed(parameters, Recipe(), ceil(samples / Recipe().batch_size), settings.save_steps)
    inputs = 2 * _INPUTS * sizes[0] if fitted else 0  # the profile's, and a copy for the card
    merged = sum(size for one, size in zip((target, ability_model), sizes, strict=True) if one.lora is not None)
    return Needs(int(sizes[0] + inputs) + merged + (training if finetune else 0), fetched, parameters, remarks)


def estimate_seconds(
    needs: Needs,
    files: tuple[AbilitiesFile, AbilitiesFile, AbilitiesFile],
    points: int,
    *,
    finetune: bool,
    criterion: str,
    device: str | None,
    dtype: str | None,
    trust: bool,
) -> Mapping[str, float]:
    """Step -> seconds, without loading files and generating answers.

    Args:
        needs: of the transfer.
        files: with the samples that are profiled, and as held-out ones those that choose and those that measure.
        points: of the sweep; 0 without one.
        finetune: whether the result is.
        criterion: of the profile.
        device: where models run; None for the default one.
        dtype: in which; None likewise.
        trust: allow the models' own code from the Hub.
    """
    used = usable_device(device)
    rate = _matrix_rate(used, getattr(torch, dtype) if dtype else default_dtype(used)) * _OF_MATRIX_RATE
    file, choose, measure = files
    tokenizers = Tokenizers(file.target, file.ability_model, trust)
    profiled, chosen, measured = (
        _tokens(one, tokenizers) for one in (file, _only_held_out(choose), _only_held_out(measure))
    )
    forward = 2 * needs.parameters / rate  # of a token
    return {
        "profile": _PROFILE[criterion] * forward * profiled,
        "sweep": (points + 1) * forward * chosen if points else 0.0,
        "finetune": _TRAINING * Recipe().epochs * forward * profiled if finetune else 0.0,
        "evaluate": (4 if finetune else 3) * forward * measured,
    }


def _only_held_out(file: AbilitiesFile) -> AbilitiesFile:
    return file.model_copy(update={"abilities": {name: one.held_out() for name, one in file.abilities.items()}})


def _tokens(file: AbilitiesFile, tokenizers: Tokenizers) -> int:
    every = (collect_samples(file, name, tokenizers).samples for name in file.abilities)
    return sum(len(sample.input_ids) for samples in every for sample in samples)


def _matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a product of matrices, the best of some tries."""
    size = 1024 if torch.device(device).type == "cpu" else 4096
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
