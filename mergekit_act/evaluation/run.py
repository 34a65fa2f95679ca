"""Measure models one after another on held-out samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mergekit_act.checkpoints import Checkpoint
from mergekit_act.evaluation.answers import Generated, generate_answers, score_answers
from mergekit_act.evaluation.held_out import HeldOut
from mergekit_act.evaluation.statistics import Measure, measure
from mergekit_act.files import write_atomically
from mergekit_act.models import check_samples_fit, load_model
from mergekit_act.versions import installed_versions
from mergekit_act.wording import as_csv

__all__ = ["Evaluated", "Evaluation", "Outputs", "Settings", "evaluate_models"]


@dataclass(frozen=True)
class Settings:
    """How models are run and compared.

    Attributes:
        device: where they run; ``auto`` spreads them over what there is.
        dtype: in which they run.
        batch_tokens: tokens in a micro-batch, padding included.
        generate: whether answers are generated; else only likelihoods are measured.
        random_seed: of the bootstrap.
        trust_remote_code: allow the models' own code from the Hub.
        quiet: show no progress.
    """

    device: str
    dtype: torch.dtype
    batch_tokens: int = 4096
    generate: bool = True
    random_seed: int = 0
    trust_remote_code: bool = False
    quiet: bool = False


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
class Evaluation:
    """What was measured.

    Attributes:
        results: of each model and ability, in the order in which they were measured.
        held_out: the samples of each ability.
        settings: how the models were run.
    """

    results: Sequence[Evaluated]
    held_out: Sequence[HeldOut]
    settings: Settings

    def json(self) -> str:
        """Everything that was measured, and with what."""
        content = {
            "format_version": 1,
            "versions": installed_versions("mergekit", "torch", "transformers"),
            "settings": {
                "device": self.settings.device,
                "dtype": str(self.settings.dtype).removeprefix("torch."),
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


@dataclass(frozen=True)
class Outputs:
    """Files that are written anew after each model, so that nothing is lost if a later one fails.

    Attributes:
        json: everything.
        csv: a row per model and ability.
        predictions: a JSON line per model, ability and sample, with the generated text.
    """

    json: Path | None = None
    csv: Path | None = None
    predictions: Path | None = None

    def paths(self) -> list[Path]:
        """The files that are named."""
        return [path for path in (self.json, self.csv, self.predictions) if path is not None]


@dataclass
class _Raw:
    """What was measured of one model on one ability, sample by sample."""

    losses: list[float]
    tokens: list[int]
    generated: list[Generated] | None


def evaluate_models(
    checkpoints: Sequence[Checkpoint],
    held_out: Sequence[HeldOut],
    settings: Settings,
    outputs: Outputs | None = None,
) -> Iterator[Evaluation]:
    """Score models one after another; each is compared with the first on the same samples.

    Yields after each model what is measured so far.

    Args:
        checkpoints: the models.
        held_out: of each ability.
        settings: how they are run.
        outputs: files to write; none by default.

    Raises:
        ValueError: a model can't be loaded, has no such token ids, or gives values that are NaN or infinite.
    """
    outputs = outputs or Outputs()
    names = [str(checkpoint.reference) for checkpoint in checkpoints]
    for one in held_out:  # told before anything is loaded
        one.check(generate=settings.generate)
        for checkpoint in checkpoints:
            check_samples_fit(checkpoint, one.data, one.tokenizer.backend_tokenizer)
    raw: list[dict[str, _Raw]] = []
    results: list[Evaluated] = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        model = load_model(
            checkpoint, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
        )
        measured = _measure_model(model, name, held_out, settings)
        del model
        raw.append(measured)
        first = raw[0] if len(raw) > 1 else None
        results += [_compare(name, one, measured, first, settings) for one in held_out]
        evaluation = Evaluation(tuple(results), held_out, settings)
        _write(outputs, evaluation, dict(zip(names, raw, strict=False)))
        yield evaluation


def _measure_model(model: Any, name: str, held_out: Sequence[HeldOut], settings: Settings) -> dict[str, _Raw]:
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
            found[one.ability] = _Raw(losses.tolist(), tokens.tolist(), generated)
    return found


def _compare(
    name: str, one: HeldOut, measured: dict[str, _Raw], first: dict[str, _Raw] | None, settings: Settings
) -> Evaluated:
    own = measured[one.ability]
    other = None if first is None else first[one.ability]
    seed = settings.random_seed
    matches = None
    if own.generated is not None:
        base = None if other is None else _matches(other)
        matches = measure(_matches(own), [1] * len(one.samples), base, seed=seed)
    nll = measure(own.losses, own.tokens, None if other is None else other.losses, seed=seed)
    return Evaluated(name, one.ability, one.role, len(one.samples), sum(own.tokens), nll, matches)


def _matches(raw: _Raw) -> list[float]:
    return [float(generated.is_right) for generated in raw.generated or ()]


def _write(outputs: Outputs, evaluation: Evaluation, raw: dict[str, dict[str, _Raw]]) -> None:
    writers: list[tuple[Path | None, Callable[[], str]]] = [
        (outputs.json, evaluation.json),
        (outputs.csv, evaluation.csv),
        (outputs.predictions, lambda: "".join(_predictions(raw, evaluation.held_out))),
    ]
    for path, content in writers:
        if path is not None:
            write_atomically(path, content().encode(), overwrite=True)


def _flat(found: Measure) -> list[float | None]:
    none: tuple[None, None] = (None, None)
    return [found.value, *(found.interval or none), found.difference, *(found.difference_interval or none)]


def _predictions(raw: dict[str, dict[str, _Raw]], held_out: Sequence[HeldOut]) -> Iterator[str]:
    for name, measured in raw.items():
        for one in held_out:
            own = measured[one.ability]
            for place, prompt in enumerate(one.prompts):
                line: dict[str, Any] = {"model": name, "ability": one.ability, "sample": place}
                line |= {"prompt": one.tokenizer.decode(prompt), "nll": own.losses[place], "tokens": own.tokens[place]}
                if own.generated is not None:
                    line |= {"reference": one.references[place]} | asdict(own.generated[place])
                yield json.dumps(line, ensure_ascii=False) + "\n"
