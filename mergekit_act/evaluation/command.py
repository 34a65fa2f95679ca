"""From model references and an abilities file to measured models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from transformers.utils.logging import disable_progress_bar

from mergekit_act.abilities import AbilitiesFile, Tokenizers
from mergekit_act.checkpoints import open_checkpoint
from mergekit_act.devices import default_device, default_dtype, usable_device
from mergekit_act.evaluation.held_out import collect_held_out
from mergekit_act.evaluation.run import Evaluation, Outputs, Settings, evaluate_models
from mergekit_act.files import check_free, check_writable
from mergekit_act.runs.folders import claimed

__all__ = ["run_evaluation"]


def run_evaluation(
    models: Sequence[str],
    file: AbilitiesFile,
    names: Sequence[str] | None = None,
    *,
    outputs: Outputs | None = None,
    generate: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    batch_tokens: int = 4096,
    random_seed: int = 0,
    lora_merge_cache: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Iterator[Evaluation]:
    """Evaluate models one after another; yields after each what is measured so far.

    Args:
        models: model references; the first is what the others are compared with.
        file: the abilities file.
        names: which of its abilities; None for all.
        outputs: files to write.
        generate: whether answers are generated too.
        device: where models run; None takes the accelerator if there is one.
        dtype: name of the dtype in which they run.
        batch_tokens: tokens in a micro-batch.
        random_seed: of the bootstrap.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the models' own code from the Hub.
        overwrite: replace output files that exist.
        quiet: show no progress.

    Raises:
        FileExistsError: an output file exists and ``overwrite`` is false.
        BlockingIOError: another evaluation is at work on an output file.
        FileNotFoundError: a model or data set does not exist.
        ValueError: as ``collect_held_out`` and ``evaluate_models``; or a model is named twice.
    """
    twice = sorted({model for model in models if list(models).count(model) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is named twice")
    outputs = outputs or Outputs()
    paths = outputs.paths()
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"{', '.join(map(str, paths))}: two outputs would go into one file; name different ones")
    check_free(paths, overwrite=overwrite)
    if quiet:
        disable_progress_bar()
    for path in paths:
        check_writable(path.parent)
    spread = device == "auto"
    chosen = default_device() if spread else usable_device(device)
    settings = Settings(
        device="auto" if spread else chosen,
        dtype=default_dtype(chosen) if dtype is None else getattr(torch, dtype),
        batch_tokens=batch_tokens,
        generate=generate,
        random_seed=random_seed,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    tokenizers = Tokenizers(file.target, file.ability_model, trust_remote_code)
    held_out = collect_held_out(file, tokenizers, names)
    checkpoints = [
        open_checkpoint(model, lora_merge_cache=lora_merge_cache, trust_remote_code=trust_remote_code)
        for model in models
    ]
    with ExitStack() as claims:
        for path in paths:
            claims.enter_context(claimed(path))
        yield from evaluate_models(checkpoints, held_out, settings, outputs)
