"""Likelihood and right answers on held-out samples, with bootstrap intervals; what is measured is kept in a file."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from experiment import Experiment
from torch import Tensor

from mergekit_act.abilities import Sample, Tokenizers, load_abilities
from mergekit_act.evaluation import collect_held_out

__all__ = ["MEASURES", "Scorer"]

VALIDATION = 0.4  # of the held-out samples; the others are for test
BATCH = 40
MEASURES = ("kept", "likelihood", "nll", "later", "exact", "others")


class Scorer:
    """Scores models on the held-out samples of an experiment.

    Args:
        experiment: whose samples.
        store: JSON lines; what is in it is not measured again, and needs no model.
    """

    def __init__(self, experiment: Experiment, store: Path) -> None:
        self._experiment = experiment
        self._store = store
        store.parent.mkdir(parents=True, exist_ok=True)
        lines = store.read_text().splitlines() if store.exists() else []
        self._known: dict[str, dict[str, Any]] = {one["key"]: one for one in map(json.loads, lines)}

    def once(self, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What is kept under a key, or else made now and kept."""
        if key not in self._known:
            self._known[key] = {"key": key, **make()}
            with self._store.open("a") as lines:
                lines.write(json.dumps(self._known[key]) + "\n")
        return self._known[key]

    def score(self, part: str, key: str, load: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
        """The means of a part's samples, of ``test`` with their 95 % bootstrap intervals.

        Args:
            part: ``validation`` or ``test``.
            key: what the model is, for the file.
            load: gives a causal LM; not called if the scores are known.
        """
        return self.once(f"{part} {key}", lambda: self._measured(part, load))

    def _measured(self, part: str, load: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
        with load() as model:
            scores = {
                (role, ability): torch.tensor(list(_answers(model, some)), dtype=torch.float64)
                for (its, role, ability), some in self._samples.items()
                if its == part
            }
        one: dict[str, Any] = {name: float(value) for name, value in _summary(scores).items()}
        one |= {"intervals": _intervals(scores)} if part == "test" else {}
        return one | {"abilities": {ability: float(s[:, 2].mean()) for (_, ability), s in scores.items()}}

    @cached_property
    def _samples(self) -> dict[tuple[str, str, str], list[Sample]]:
        """(part, role, ability) -> samples."""
        self._experiment.prepare()
        found = {}
        others = self._experiment.others
        for path in (*self._experiment.files, *([others] if others else [])):
            file = load_abilities(path)
            for one in collect_held_out(file, Tokenizers(file.target, file.ability_model)):
                role = "others" if path == others else one.role
                cut = round(VALIDATION * len(one.samples))
                found["test", role, one.ability] = list(one.samples[cut:])
                if role != "others":
                    found["validation", role, one.ability] = list(one.samples[:cut])
        return found


@torch.inference_mode()
def _answers(model: Any, samples: list[Sample]) -> Iterator[tuple[float, int, float, float]]:
    """Of each: loss, answer tokens, whether all of them are the most likely (as greedy decoding finds), first loss.

    What all samples begin with is computed once.
    """
    device = model.device
    shortest = min(min(len(s.input_ids), int(s.is_answer.nonzero()[0]) - 1) for s in samples)
    first = torch.stack([s.input_ids[:shortest] for s in samples])
    same = int((first == first[0]).all(0).cumprod(0).sum())
    prefix = model(samples[0].input_ids[None, :same].to(device), use_cache=True).past_key_values if same else None
    order = sorted(range(len(samples)), key=lambda place: len(samples[place].input_ids))
    found: dict[int, tuple[float, int, float, float]] = {}
    for start in range(0, len(order), BATCH):
        some = [samples[place] for place in order[start : start + BATCH]]
        ids = torch.nn.utils.rnn.pad_sequence([s.input_ids[same:] for s in some], batch_first=True).to(device)
        cache = copy.deepcopy(prefix)
        if cache is not None:
            cache.batch_repeat_interleave(len(some))
        hidden = model.base_model(ids, past_key_values=cache, use_cache=bool(same)).last_hidden_state
        for line, place in enumerate(order[start : start + BATCH]):
            answers = samples[place].is_answer.nonzero().flatten()
            logits = model.lm_head(hidden[line, answers - 1 - same]).float().cpu()
            labels = samples[place].input_ids[answers]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            exact = float((logits.argmax(-1) == labels).all())
            found[place] = (float(losses.sum()), len(labels), exact, float(losses[0]))
    for place in range(len(samples)):
        yield found[place]


def _summary(scores: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Means over the abilities of a role; what there is none of is NaN.

    Args:
        scores: (role, ability) -> ``[..., samples, 4]``: as ``_answers`` has them.

    Returns:
        Tensors ``[...]``: ``kept``: share of the kept abilities' answers that are right; ``likelihood``: of their
        tokens; ``nll``: nats per answer token of what is to be recovered; ``later``: likewise, behind the first token;
        ``exact``: share of its answers that are right; ``others``: nats per answer token of the other abilities.
    """

    def mean(role: str, of: Callable[[Tensor], Tensor]) -> Tensor:
        own = [of(s) for (its, _), s in scores.items() if its == role]
        return torch.stack(own).mean(0) if own else torch.tensor(math.nan)

    def nll(s: Tensor) -> Tensor:
        return s[..., 0].sum(-1) / s[..., 1].sum(-1)

    def later(s: Tensor) -> Tensor:
        return (s[..., 0] - s[..., 3]).sum(-1) / (s[..., 1] - 1).sum(-1).clamp(min=1)

    def exact(s: Tensor) -> Tensor:
        return s[..., 2].mean(-1)

    return {
        "kept": mean("keep", exact),
        "likelihood": (-mean("keep", nll)).exp(),
        "nll": mean("recover", nll),
        "later": mean("recover", later),
        "exact": mean("recover", exact),
        "others": mean("others", nll),
    }


def _intervals(scores: Mapping[tuple[str, str], Tensor], rounds: int = 2000) -> dict[str, list[float]]:
    """95 % bootstrap intervals of the same, samples drawn anew within each ability."""
    generator = torch.Generator().manual_seed(0)
    drawn = {key: s[torch.randint(len(s), (rounds, len(s)), generator=generator)] for key, s in scores.items()}
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: values.double().quantile(quantiles).tolist() for name, values in _summary(drawn).items()}
