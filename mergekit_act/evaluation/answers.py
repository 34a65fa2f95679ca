"""What a model makes of answers: their likelihood, and those that it generates itself."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mergekit_act.abilities import Sample
from mergekit_act.abilities.batches import MicroBatch, by_length, cut_batches
from mergekit_act.evaluation.held_out import HeldOut
from mergekit_act.models import broken_weight

__all__ = ["Generated", "NotFiniteError", "generate_answers", "score_answers"]

_LOGITS_AT_ONCE = 1 << 26  # 256 MB in float32
_GENERATION = 4  # times the tokens of a micro-batch: there are no logits of whole sequences to hold

Advance = Callable[[int], Any]

LOG = logging.getLogger(__name__)


class NotFiniteError(ValueError):
    """A likelihood is NaN or infinite."""


@dataclass(frozen=True)
class Generated:
    """A generated answer.

    Attributes:
        text: as it was generated.
        answer: what was read from it; None if ``extract`` found nothing.
        is_right: whether that is the reference.
    """

    text: str
    answer: str | None
    is_right: bool


@torch.inference_mode()
def score_answers(
    model: Any, samples: Sequence[Sample], *, batch_tokens: int = 4096, advance: Advance = lambda _: None
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the answers, given all that stands before each of their tokens.

    Args:
        model: a causal language model.
        samples: their token ids and answer marks.
        batch_tokens: tokens in a micro-batch, padding included.
        advance: is told how many samples are done.

    Returns:
        float64 ``[samples]`` in nats, summed over a sample's answer tokens; int64 ``[samples]``, how many these are. A
        sample's very first token has nothing before it and does not count.

    Raises:
        NotFiniteError: a likelihood is NaN or infinite.
        ValueError: a single sample does not fit the device's memory.
    """
    loss = torch.zeros(len(samples), dtype=torch.float64)
    tokens = torch.zeros(len(samples), dtype=torch.int64)
    order = torch.tensor(by_length(samples))
    start = 0
    for batch in cut_batches(samples, batch_tokens):
        places = order[start : start + len(batch.input_ids)]
        start += len(places)
        later = batch.position_of > 0
        counted = places[batch.sample_of[later]]
        loss.index_add_(0, counted, _answer_losses(model, batch).cpu().double())
        tokens.index_add_(0, counted, torch.ones_like(counted))
        advance(len(places))
    if not bool(torch.isfinite(loss).all()):
        raise NotFiniteError(_not_finite(model, int((~torch.isfinite(loss)).nonzero()[0])))
    return loss, tokens


def generate_answers(
    model: Any, held_out: HeldOut, *, batch_tokens: int = 4096, advance: Advance = lambda _: None
) -> list[Generated]:
    """Greedy answers to the held-out prompts, read and compared.

    The model's own generation settings are left out of account, but for its end-of-sequence tokens: a repetition
    penalty, for one, would make of it another model.

    Args:
        model: a causal language model.
        held_out: prompts and references.
        batch_tokens: a quarter of the tokens that are held at once, prompts and new ones, padding included.
        advance: is told how many samples are done.
    """
    prompts, references = held_out.prompts, held_out.references
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    texts = [""] * len(prompts)
    new_tokens = _new_tokens(model, held_out)
    start = 0
    while start < len(order):
        length = len(prompts[order[start]]) + new_tokens
        places = order[start : start + max(1, _GENERATION * batch_tokens // length)]
        start += len(places)
        answers = _generate(model, [prompts[place] for place in places], held_out, new_tokens)
        for place, ids in zip(places, answers, strict=True):
            texts[place] = held_out.decode(ids)
        advance(len(places))
    found = [held_out.read(text) for text in texts]
    return [
        Generated(text, answer, answer == reference)
        for text, answer, reference in zip(texts, found, references, strict=True)
    ]


def _new_tokens(model: Any, held_out: HeldOut) -> int:
    """How long answers may be: one number for all, whatever is generated together."""
    room: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt) for prompt in held_out.prompts)
    if room is None or longest + held_out.max_new_tokens <= room:
        return held_out.max_new_tokens
    if longest >= room:
        raise ValueError(
            f'ability "{held_out.ability}" has a prompt of {longest} tokens; the model has {room} positions'
        )
    _tell_shortened(held_out.ability, held_out.max_new_tokens, room, longest)
    return room - longest


@lru_cache  # a sweep generates many times
def _tell_shortened(ability: str, wanted: int, room: int, longest: int) -> None:
    LOG.warning(
        'ability "%s": answers end after %d tokens, not %d: the model has %d positions, the longest prompt %d tokens',
        ability, room - longest, wanted, room, longest,
    )  # fmt: skip


def _answer_losses(model: Any, batch: MicroBatch) -> Tensor:
    """float32 ``[answer tokens behind a first position]``: −log p of each."""
    try:
        return _losses(model, batch)
    except torch.OutOfMemoryError as error:
        if len(batch.input_ids) == 1:
            raise ValueError(f"out of memory on {model.device} with a single sample; shorten max_length") from error
    # Behind the block: the error holds what has been allocated until it is left.
    torch.cuda.empty_cache()
    return torch.cat([_answer_losses(model, half) for half in batch.halves()])


def _losses(model: Any, batch: MicroBatch) -> Tensor:
    later = batch.position_of > 0
    sample_of, position_of = batch.sample_of[later], batch.position_of[later]
    before = position_of - 1  # a token's logits are those of the position in front of it
    ids, given = batch.input_ids[sample_of, position_of], batch.input_ids.to(model.device)
    # Padding stands on the right, where causal attention does not see it.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # An index on the CPU is good for hidden states on any device, if the model is spread over several.
        kept, column = torch.unique(before, return_inverse=True)
        logits = model(input_ids=given, use_cache=False, logits_to_keep=kept).logits
    else:
        logits, column = model(input_ids=given, use_cache=False).logits, before
    ids, sample_of, column = (one.to(logits.device) for one in (ids, sample_of, column))
    losses = []
    at_once = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    for some in torch.split(torch.arange(len(ids), device=logits.device), at_once):
        rows = logits[sample_of[some], column[some]].float()
        losses.append(torch.nn.functional.cross_entropy(rows, ids[some], reduction="none"))
    return torch.cat(losses) if losses else logits.new_zeros(0)


def _generate(model: Any, prompts: Sequence[Tensor], held_out: HeldOut, new_tokens: int) -> list[Tensor]:
    """int64 ``[new tokens]`` per prompt, up to its end-of-sequence token."""
    try:
        return _generate_batch(model, prompts, held_out, new_tokens)
    except torch.OutOfMemoryError as error:
        if len(prompts) == 1:
            raise ValueError(f"out of memory on {model.device} with a single prompt; lower max_new_tokens") from error
    torch.cuda.empty_cache()
    halves = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    return [ids for half in halves for ids in _generate(model, half, held_out, new_tokens)]


@torch.inference_mode()
def _generate_batch(model: Any, prompts: Sequence[Tensor], held_out: HeldOut, new_tokens: int) -> list[Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    attended = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, longest - len(prompt) :] = prompt
        attended[place, longest - len(prompt) :] = 1
    ends = end_tokens(model, held_out)
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=ends[0]
    )
    own, model.generation_config = model.generation_config, settings
    try:
        output = model.generate(input_ids=ids.to(model.device), attention_mask=attended.to(model.device))
    finally:
        model.generation_config = own
    is_end = torch.isin(output, torch.tensor(ends, device=output.device))
    found = []
    for row, ended in zip(output[:, longest:].cpu(), is_end[:, longest:].cpu(), strict=True):
        found.append(row[: int(ended.nonzero()[0])] if bool(ended.any()) else row)
    return found


def end_tokens(model: Any, held_out: HeldOut) -> list[int]:
    """What ends an answer: the model's own end-of-sequence tokens, the tokenizer's, and the template's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = list(own) if isinstance(own, list) else [own]
    ends.append(held_out.tokenizer.eos_token_id)
    known = {*held_out.tokenizer.all_special_ids, *held_out.tokenizer.added_tokens_decoder}
    # Tool calls may end otherwise than other answers.
    ends += [last for sample in held_out.samples if (last := int(sample.input_ids[-1])) in known]
    found = list(dict.fromkeys(int(end) for end in ends if end is not None))
    if not found:
        raise ValueError("neither the model nor its tokenizer has an end-of-sequence token, which ends answers")
    return found


def _not_finite(model: Any, place: int) -> str:
    broken = broken_weight(model)
    if broken is not None:
        return f'its weights are broken: "{broken}" has values that are NaN or infinite'
    return f"the likelihood of the answer of sample {place} is NaN or infinite; try --dtype float32"
