"""Micro-batches: samples sorted by length, cut by tokens, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergekit_act.abilities.samples import Sample

__all__ = ["MicroBatch", "by_length", "cut_batches"]


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the models together.

    Attributes:
        input_ids: int64 ``[batch, tokens]``, padded on the right with token 0.
        sample_of: int64 ``[answer tokens]``: the sample of each answer token.
        position_of: int64 ``[answer tokens]``: its position in the sample.
        tokens: number of tokens that are not padding.
    """

    input_ids: Tensor
    sample_of: Tensor
    position_of: Tensor
    tokens: int

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on a device."""
        return MicroBatch(
            self.input_ids.to(device), self.sample_of.to(device), self.position_of.to(device), self.tokens
        )

    def halves(self) -> tuple[MicroBatch, MicroBatch]:
        """The first half of its samples, and the others."""
        middle = -(-len(self.input_ids) // 2)
        behind = self.sample_of >= middle
        tokens = self.tokens * middle // len(self.input_ids)
        return (
            MicroBatch(self.input_ids[:middle], self.sample_of[~behind], self.position_of[~behind], tokens),
            MicroBatch(
                self.input_ids[middle:],
                self.sample_of[behind] - middle,
                self.position_of[behind],
                self.tokens - tokens,
            ),
        )

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """(sample, first, last + 1) of every stretch of answer tokens."""
        samples, positions = self.sample_of.tolist(), self.position_of.tolist()
        starts = [
            place
            for place in range(len(samples))
            if place == 0 or (samples[place - 1], positions[place - 1] + 1) != (samples[place], positions[place])
        ]
        ends = [*starts[1:], len(samples)] if starts else []
        return [(samples[a], positions[a], positions[b - 1] + 1) for a, b in zip(starts, ends, strict=True)]

    @cached_property
    def answer_places(self) -> Tensor:
        """int64 ``[batch × tokens]``: the place of each token among the answer tokens, −1 for the others."""
        places = torch.full((self.input_ids.numel(),), -1, device=self.input_ids.device)
        answers = self.sample_of * self.input_ids.shape[1] + self.position_of
        places[answers] = torch.arange(len(answers), device=places.device)
        return places

    def by_token(self, output: Tensor, token_axis: int | None) -> Tensor:
        """A view of a module's output as ``[batch, tokens, …, channels]``; arguments as of ``answer_rows``."""
        batch, length = self.input_ids.shape
        if token_axis is None:
            return output.reshape(batch, length, -1, *output.shape[1:])
        return output.unsqueeze(0) if token_axis == 0 else output.movedim(token_axis, 1)

    def answer_rows(self, output: Tensor, token_axis: int | None) -> list[Tensor]:
        """A module's output at the answer tokens, in parts ``[rows, channels]`` that are the same for both models.

        On the CPU these are views of the output, which reads it once; elsewhere one copy, which is one kernel.

        Args:
            output: the channels are its last dimension.
            token_axis: which dimension of it are token positions; None if its first one is the batch, positions and
                possibly heads.
        """
        by_sample = self.by_token(output, token_axis)
        shared = len(by_sample) == 1 < len(self.input_ids)  # one output for all samples: position embeddings
        if output.device.type == "cpu":
            return [by_sample[0 if shared else sample, a:b].flatten(0, -2) for sample, a, b in self.runs]
        if shared:
            return [by_sample[0].index_select(0, self.position_of).flatten(0, -2)]
        return [by_sample[self.sample_of, self.position_of].flatten(0, -2)]


def by_length(samples: Sequence[Sample]) -> list[int]:
    """The samples' places in the order in which they are cut into micro-batches."""
    return sorted(range(len(samples)), key=lambda place: (-len(samples[place].input_ids), place))


def cut_batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[MicroBatch]:
    """Longest samples first, as many as fit ``batch_tokens`` with their padding, at least one.

    The cut depends on nothing but the samples and ``batch_tokens``, so sums do not either.
    """
    order = by_length(samples)
    start = 0
    while start < len(order):
        length = len(samples[order[start]].input_ids)
        count = max(1, batch_tokens // length)
        yield _batch([samples[place] for place in order[start : start + count]])
        start += count


def _batch(samples: Sequence[Sample]) -> MicroBatch:
    ids = torch.nn.utils.rnn.pad_sequence([sample.input_ids for sample in samples], batch_first=True)
    answers = torch.nn.utils.rnn.pad_sequence([sample.is_answer for sample in samples], batch_first=True)
    sample_of, position_of = answers.nonzero(as_tuple=True)
    return MicroBatch(ids, sample_of, position_of, sum(len(sample.input_ids) for sample in samples))
