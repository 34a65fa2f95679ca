"""Measure models one after another on held-out samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from mergekit_act.abilities import AbilitiesFile, Tokenizers
from mergekit_act.checkpoints import open_checkpoint
from mergekit_act.devices import default_device, default_dtype, dtype_name, usable_device
from mergekit_act.evaluation.answers import Generated, generate_answers, score_answers
from mergekit_act.evaluation.held_out import HeldOut, collect_held_out
from mergekit_act.evaluation.statistics import Measure, measure
from mergekit_act.models import check_samples_fit, load_model
from mergekit_act.versions import installed_versions
from mergekit_act.wording import as_csv

__all__ = ["BySample", "Evaluated", "Evaluation", "EvaluationSettings", "run_evaluation"]


@dataclass(frozen=True)
class EvaluationSettings:
    """How models are run and compared.

    Attributes:
        generate: whether answers are generated; else only likelihoods are measured.
        device: where they run; ``auto`` spreads each over all there is; None takes the accelerator if there is one.
        dtype: name of the dtype in which they run; None takes bfloat16 where the device multiplies it natively, else
            float32.
        batch_tokens: tokens in a micro-batch, padding included.
        random_seed: of the bootstrap.
        lora_merge_cache: folder for merged models, for references of the form ``model+lora``.
        trust_remote_code: allow the models' own code from the Hub.
        quiet: show no progress.
    """

    generate: bool = True
    device: str | None = None
    dtype: str | None = None
    batch_tokens: int = 4096
    random_seed: int = 0
    lora_merge_cache: str | None = None
    trust_remote_code: bool = False
    quiet: bool = False

    def resolved(self) -> EvaluationSettings:
        """With the device and dtype that None stands for here.

        Raises:
            ValueError: PyTorch can't use the device here.
        """
        chosen = default_device() if self.device == "auto" else usable_device(self.device)
        device = "auto" if self.device == "auto" else chosen
        return replace(self, device=device, dtype=self.dtype or dtype_name(default_dtype(chosen)))


@dataclass(frozen=True)
class Evaluated:
    """One model on one ability.

    Attributes:
        model: its reference.
        ability: the ability's name.
        role: ``recover`` or ``keep``.
        samples: number of held-out samples.
        answer_tokens: of all of them.
        nll: negative log-likelihood of the answers per token, in nats.
        exact_match: share of the samples whose greedy answer is right; None if none were generated.
    """

    model: str
    ability: str
    role: str
    samples: int
    answer_tokens: int
    nll: Measure
    exact_match: Measure | None


@dataclass(frozen=True)
class BySample:
    """What was measured of one model on one ability, sample by sample.

    Attributes:
        losses: negative log-likelihood of each answer, in nats.
        tokens: of each answer.
        generated: the greedy answers; None if none were generated.
    """

    losses: Sequence[float]
    tokens: Sequence[int]
    generated: Sequence[Generated] | None


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        results: of each model and ability, in the order in which they were measured.
        held_out: the samples of each ability.
        settings: how the models were run.
        by_sample: model -> ability -> what was measured of each sample.
    """

    results: Sequence[Evaluated]
    held_out: Sequence[HeldOut]
    settings: EvaluationSettings
    by_sample: Mapping[str, Mapping[str, BySample]]

    def json(self) -> str:
        """Everything that was measured, and with what."""
        content = {
            "format_version": 1,
            "versions": installed_versions("mergekit", "torch", "transformers"),
            "settings": {
                "device": self.settings.device,
                "dtype": self.settings.dtype,
                "batch_tokens": self.settings.batch_tokens,
                "random_seed": self.settings.random_seed,
            },
            "abilities": {
                one.ability: one.data.data
                | {"role": one.role, "max_new_tokens": one.max_new_tokens}
                | {"extract": None if one.extract is None else one.extract.pattern}
                for one in self.held_out
            },
            "results": [asdict(result) for result in self.results],
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def csv(self) -> str:
        """A row per model and ability."""
        parts = ("", "_low", "_high", "_difference", "_difference_low", "_difference_high")
        measures = ("nll", "exact_match")
        plain = ("model", "ability", "role", "samples", "answer_tokens")
        rows: list[list[Any]] = [[*plain, *(measured + part for measured in measures for part in parts)]]
        for result in self.results:
            cells: list[Any] = [getattr(result, name) for name in plain]
            for measured in measures:
                found: Measure | None = getattr(result, measured)
                cells += [None] * len(parts) if found is None else _flat(found)
            rows.append(cells)
        return as_csv(rows)

    def predictions(self) -> str:
        """A JSON line per model, ability and sample, with the generated text."""
        lines = []
        for name, measured in self.by_sample.items():
            for one in self.held_out:
                own = measured[one.ability]
                for place, prompt in enumerate(one.prompts):
                    line: dict[str, Any] = {"model": name, "ability": one.ability, "sample": place}
                    line |= {"prompt": one.tokenizer.decode(prompt), "nll": own.losses[place]}
                    line |= {"tokens": own.tokens[place]}
                    if own.generated is not None:
                        line |= {"reference": one.references[place]} | asdict(own.generated[place])
                    lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        return "".join(lines)


def run_evaluation(
    models: Sequence[str],
    file: AbilitiesFile,
    names: Sequence[str] | None = None,
    settings: EvaluationSettings | None = None,
) -> Iterator[Evaluation]:
    """Evaluate models one after another, each compared with the first on the same held-out samples.

    Yields after each model what is measured so far.

    Args:
        models: model references.
        file: the abilities file.
        names: which of its abilities; None for all.
        settings: how.

    Raises:
        FileNotFoundError: a model or data set does not exist.
        ValueError: as ``collect_held_out``; a model is named twice, can't be loaded, has no such token ids, or gives
            values that are NaN or infinite.
    """
    twice = sorted({model for model in models if list(models).count(model) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is named twice")
    settings = (settings or EvaluationSettings()).resolved()
    if settings.quiet:
        disable_progress_bar()
    held_out = collect_held_out(file, Tokenizers(file.target, file.ability_model, settings.trust_remote_code), names)
    checkpoints = [
        open_checkpoint(model, lora_merge_cache=settings.lora_merge_cache, trust_remote_code=settings.trust_remote_code)
        for model in models
    ]
    for one in held_out:  # told before anything is loaded
        one.check(generate=settings.generate)
        for checkpoint in checkpoints:
            check_samples_fit(checkpoint, one.data, one.tokenizer.backend_tokenizer)
    by_sample: dict[str, dict[str, BySample]] = {}
    results: list[Evaluated] = []
    for checkpoint in checkpoints:
        name = str(checkpoint.reference)
        model = load_model(
            checkpoint,
            device=settings.device,
            dtype=getattr(torch, settings.dtype or ""),
            trust_remote_code=settings.trust_remote_code,
        )
        by_sample[name] = _measure_model(model, name, held_out, settings)
        del model
        first = next(iter(by_sample.values())) if len(by_sample) > 1 else None
        results += [_compare(name, one, by_sample[name], first, settings.random_seed) for one in held_out]
        yield Evaluation(tuple(results), held_out, settings, dict(by_sample))


def _measure_model(
    model: Any, name: str, held_out: Sequence[HeldOut], settings: EvaluationSettings
) -> dict[str, BySample]:
    total = sum(len(one.samples) for one in held_out) * (2 if settings.generate else 1)
    found = {}
    with tqdm(total=total, unit="sample", desc=name, disable=settings.quiet or None) as bar:
        for one in held_out:
            try:
                losses, tokens = score_answers(
                    model, one.samples, batch_tokens=settings.batch_tokens, advance=bar.update
                )
            except ValueError as error:
                raise ValueError(f'{name}, ability "{one.ability}": {error}') from error
            generated = None
            if settings.generate:
                generated = generate_answers(model, one, batch_tokens=settings.batch_tokens, advance=bar.update)
            found[one.ability] = BySample(losses.tolist(), tokens.tolist(), generated)
    return found


def _compare(
    name: str, one: HeldOut, measured: dict[str, BySample], first: dict[str, BySample] | None, seed: int
) -> Evaluated:
    own = measured[one.ability]
    other = None if first is None else first[one.ability]
    matches = None
    if own.generated is not None:
        base = None if other is None else _matches(other)
        matches = measure(_matches(own), [1] * len(one.samples), base, seed=seed)
    nll = measure(own.losses, own.tokens, None if other is None else other.losses, seed=seed)
    return Evaluated(name, one.ability, one.role, len(one.samples), sum(own.tokens), nll, matches)


def _matches(own: BySample) -> list[float]:
    return [float(generated.is_right) for generated in own.generated or ()]


def _flat(found: Measure) -> list[float | None]:
    none: tuple[None, None] = (None, None)
    return [found.value, *(found.interval or none), found.difference, *(found.difference_interval or none)]
