"""Likelihood and right answers on held-out samples; what is measured is kept in a file, sample by sample."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch
from experiment import Experiment
from scipy.stats import binomtest
from torch import Tensor

from mergekit_act.abilities import Sample, Tokenizers, load_abilities
from mergekit_act.evaluation import collect_held_out

__all__ = ["Interval", "Scorer", "Scores", "difference"]

VALIDATION = 0.4  # of the held-out samples; the others are for test
BATCH_TOKENS = 2048
ROUNDS = 2000

Interval = tuple[float, float]


class Scores:
    """What a model makes of the samples of a part.

    Args:
        samples: role -> ability -> of each sample (loss of its answer, its answer tokens, whether it is right).
    """

    def __init__(self, samples: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> None:
        self._samples = {
            role: {ability: torch.tensor(some, dtype=torch.float64) for ability, some in own.items()}
            for role, own in samples.items()
        }

    def nats(self, role: str) -> float:
        """Negative log-likelihood per answer token, mean over the abilities of a role; NaN if there are none."""
        return float(self._nats(role, None))

    def nats_interval(self, role: str) -> Interval:
        """Its 95 % bootstrap interval, samples drawn anew within each ability."""
        return _interval(self._nats(role, _draws(self, role)))

    def right(self, role: str, begins: str = "") -> float:
        """Share of right answers, mean over the abilities of a role, or those whose name begins so."""
        own = [some[:, 2].mean() for name, some in self._samples.get(role, {}).items() if name.startswith(begins)]
        return float(torch.stack(own).mean()) if own else math.nan

    def right_interval(self, role: str) -> Interval:
        """Its 95 % interval (Wilson), of all samples of the role together."""
        every = torch.cat([some[:, 2] for some in self._samples[role].values()])
        found = binomtest(int(every.sum()), len(every)).proportion_ci(method="wilson")
        return (found.low, found.high)

    def abilities(self, role: str) -> list[str]:
        return list(self._samples.get(role, {}))

    def counts(self) -> dict[str, int]:
        """Role -> its samples."""
        return {role: sum(map(len, own.values())) for role, own in self._samples.items() if own}

    def _nats(self, role: str, draws: Mapping[str, Tensor] | None) -> Tensor:
        """One number, or one for each drawing (ability -> indices ``[rounds, samples]``)."""
        own = []
        for ability, some in self._samples.get(role, {}).items():
            drawn = some if draws is None else some[draws[ability]]
            own.append(drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1))
        return torch.stack(own).mean(0) if own else torch.tensor(math.nan)


def difference(first: Scores, second: Scores, role: str) -> tuple[float, Interval]:
    """By how many nats the second is better, and the 95 % interval of that (paired bootstrap)."""
    draws = _draws(first, role)
    return first.nats(role) - second.nats(role), _interval(first._nats(role, draws) - second._nats(role, draws))


def _draws(scores: Scores, role: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {ability: len(some) for ability, some in scores._samples.get(role, {}).items()}
    return {ability: torch.randint(n, (ROUNDS, n), generator=generator) for ability, n in sizes.items()}


def _interval(values: Tensor) -> Interval:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return (low, high)


class Scorer:
    """Scores models on the held-out samples of an experiment.

    Args:
        experiment: whose samples.
        folder: what is in its ``scores.jsonl`` is not measured again, and needs no model.
        settings: all that the scores depend on and their keys do not name.

    Raises:
        UsageError: what is there was measured with other settings, files or rows.
    """

    def __init__(self, experiment: Experiment, folder: Path, settings: object) -> None:
        self._experiment = experiment
        self._store = folder / "scores.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._store.read_text().splitlines(keepends=True) if self._store.exists() else []
        if lines and not lines[-1].endswith("\n"):  # of a run that was stopped while it wrote
            self._store.write_text("".join(lines[:-1]))
            lines.pop()
        self._known: dict[str, Any] = {one["key"]: one["value"] for one in map(json.loads, lines)}
        digest = _digest(experiment, repr((VALIDATION, experiment.recipe, settings)))
        if self.once("settings", lambda: digest) != digest:
            raise click.UsageError(f"{folder} was measured with other settings or rows; name another folder")

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What is kept under a key, or else made now and kept."""
        return self._known[key] if key in self._known else self._keep(key, make())

    def score(
        self,
        part: str,
        key: str,
        load: Callable[[], AbstractContextManager[Any]],
        enough: Callable[[Scores], bool] | None = None,
    ) -> Scores:
        """A model's scores.

        Args:
            part: ``validation`` or ``test``.
            key: what the model is, for the file.
            load: gives a causal LM; not called if the scores are known.
            enough: told the scores of what is kept, whether the others are wanted.
        """
        name = f"{part} {key}"
        known = self._known.get(name)
        if known is None or (enough is None and "recover" not in known):
            with load() as model:
                known = self._keep(name, self._measured(part, model, enough))
        return Scores(known)

    def _measured(self, part: str, model: Any, enough: Callable[[Scores], bool] | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for role in sorted(self._samples[part]):  # what is kept first
            found[role] = {ability: list(_answers(model, some)) for ability, some in self._samples[part][role].items()}
            if role == "keep" and enough is not None and not enough(Scores(found)):
                break
        return found

    def _keep(self, key: str, value: Any) -> Any:
        self._known[key] = value
        with self._store.open("a") as lines:
            lines.write(json.dumps({"key": key, "value": value}) + "\n")
        return value

    @cached_property
    def _samples(self) -> dict[str, dict[str, dict[str, list[Sample]]]]:
        """Part -> role -> ability -> samples."""
        self._experiment.prepare()
        found: dict[str, dict[str, dict[str, list[Sample]]]] = {"validation": {}, "test": {}}
        for path in (*self._experiment.files, *self._experiment.others):
            file = load_abilities(path)
            for one in collect_held_out(file, Tokenizers(file.target, file.ability_model)):
                role = "others" if path in self._experiment.others else one.role
                cut = round(VALIDATION * len(one.samples))
                found["test"].setdefault(role, {})[one.ability] = list(one.samples[cut:])
                if role != "others":
                    found["validation"].setdefault(role, {})[one.ability] = list(one.samples[:cut])
        return found


def _digest(experiment: Experiment, settings: str) -> str:
    """Of the settings, the abilities files and the rows at hand, wherever they lie."""
    digest = hashlib.sha256(settings.encode())
    for path in (*experiment.files, *experiment.others):
        digest.update(path.read_text(encoding="utf-8").replace(str(path.parent), "").encode())
        for ability in load_abilities(path).abilities.values():
            if Path(ability.dataset).is_file():
                digest.update(Path(ability.dataset).read_bytes())
    return digest.hexdigest()


@torch.inference_mode()
def _answers(model: Any, samples: list[Sample]) -> Iterator[tuple[float, int, float]]:
    """Of each: loss, answer tokens, whether all of them are the most likely, as greedy decoding finds.

    What all samples begin with is computed once.
    """
    device = model.device
    shortest = min(min(len(s.input_ids), int(s.is_answer.nonzero()[0]) - 1) for s in samples)
    first = torch.stack([s.input_ids[:shortest] for s in samples])
    same = int((first == first[0]).all(0).cumprod(0).sum())
    prefix = model(samples[0].input_ids[None, :same].to(device), use_cache=True).past_key_values if same else None
    found: dict[int, tuple[float, int, float]] = {}
    for places in _batches([len(s.input_ids) - same for s in samples]):
        ids = [samples[place].input_ids[same:] for place in places]
        cache = copy.deepcopy(prefix)
        if cache is not None:
            cache.batch_repeat_interleave(len(places))
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        hidden = model.base_model(padded, past_key_values=cache, use_cache=bool(same)).last_hidden_state
        for line, place in enumerate(places):
            answers = samples[place].is_answer.nonzero().flatten()
            logits = model.lm_head(hidden[line, (answers - 1 - same).to(device)]).float()
            labels = samples[place].input_ids[answers].to(device)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            found[place] = (float(loss), len(labels), float((logits.argmax(-1) == labels).all()))
    for place in range(len(samples)):
        yield found[place]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places, shortest first, in batches of no more padded tokens than ``BATCH_TOKENS``, or one."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if batch and (len(batch) + 1) * lengths[place] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
