"""From rows to samples: rendered, tokenised once, cut to length, their answer tokens marked."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_act.abilities.conversations import Conversation, read_conversations
from mergekit_act.abilities.omissions import count_remarks, tell_omissions
from mergekit_act.abilities.rendering import ChatRenderer, PlainRenderer, Rendering
from mergekit_act.abilities.templates import ChatTemplate, read_template
from mergekit_act.abilities.tokenising import Tokenizers, tokenise
from mergekit_act.data.rows import load_rows, select_rows
from mergekit_act.data.schema import AbilitiesFile

__all__ = ["AbilitySamples", "Sample", "Tokenizers", "collect_samples", "fingerprint_samples"]

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        input_ids: int64 ``[tokens]``; ends with the last answer token.
        is_answer: bool ``[tokens]``, true at answer tokens (unshifted).
    """

    input_ids: Tensor
    is_answer: Tensor


@dataclass(frozen=True)
class AbilitySamples:
    """The samples of one ability.

    Attributes:
        name: the ability's name.
        samples: in the order of the shuffled rows.
        data: the resolved settings, what was dropped or cut, and a SHA-256 over all token ids and answer marks.
    """

    name: str
    samples: tuple[Sample, ...]
    data: dict[str, Any]

    @property
    def answer_tokens(self) -> int:
        """Number of answer tokens of all samples."""
        return sum(int(sample.is_answer.sum()) for sample in self.samples)


def collect_samples(file: AbilitiesFile, name: str, tokenizers: Tokenizers) -> AbilitySamples:
    """Load, render and tokenise the samples of one ability.

    Args:
        file: the abilities file.
        name: the ability.
        tokenizers: of the file's pair.

    Raises:
        FileNotFoundError: the data set does not exist.
        ValueError: a column is missing, the template does not fit, the tokenizers disagree, no sample or no answer
            token is left.
    """
    ability = file.abilities[name]
    rows = load_rows(name, ability)
    chosen, short = select_rows(name, ability, rows, offset=ability.offset, samples=ability.samples)
    if short:
        LOG.warning('ability "%s": %d of %d samples are there', name, len(chosen), ability.samples)
    made = _Made()
    if ability.prompt is None and {"input_ids", "labels"} <= set(chosen.column_names):
        made.samples = [_ready_sample(name, place, row) for place, row in enumerate(chosen)]
        made.kept_starts = [0] * len(made.samples)
    else:
        made = _make_samples(file, name, read_conversations(name, ability, chosen), tokenizers)
    kept, cut, dropped, crowded = _fit(made, file.max_length)
    if cut:
        LOG.warning('ability "%s": %d prompts were cut from the left to %d tokens', name, cut, file.max_length)
    what = "answers, with what stays before them (beginning of sequence, system turn)," if crowded else "answers"
    if dropped:
        LOG.warning('ability "%s": %d samples dropped, their %s exceed %d tokens', name, dropped, what, file.max_length)
    if not kept:
        raise ValueError(f'ability "{name}" has no samples: all {dropped} {what} exceed max_length {file.max_length}')
    empty = sum(not bool(sample.is_answer.any()) for sample in kept)
    if empty:
        raise ValueError(f'ability "{name}": {empty} of {len(kept)} samples have no answer tokens')
    settings = ability.model_dump(exclude={"role", "evaluate"}) | {
        "on_hub": not Path(ability.dataset).exists(),
        "max_length": file.max_length,
        "template": file.template,
        "chat_template": file.chat_template,
        "chat_template_sha256": made.template_sha256,
        "system": file.system,
        "template_kwargs": file.template_kwargs,
        "date": made.date,
        "remarks": count_remarks(made.remarks),
        "prompts_cut": cut,
        "samples_dropped": dropped,
        "fingerprint": fingerprint_samples(kept),
    }
    # They end up in JSON, after all the work; YAML makes dates of some values.
    return AbilitySamples(name, tuple(kept), json.loads(json.dumps(settings, default=str)))


@dataclass
class _Made:
    """Samples before they are cut to length.

    Attributes:
        samples: of all rows.
        kept_starts: how many tokens of each stay at its beginning when its prompt is cut.
        remarks: what the template leaves out or adds, of each.
        template_sha256: of the text of ``chat_template``; None without one.
        date: which the template writes; None if it writes none.
    """

    samples: list[Sample] = field(default_factory=list)
    kept_starts: list[int] = field(default_factory=list)
    remarks: list[frozenset[str]] = field(default_factory=list)
    template_sha256: str | None = None
    date: str | None = None


def _make_samples(
    file: AbilitiesFile, name: str, conversations: Sequence[Conversation], tokenizers: Tokenizers
) -> _Made:
    tokenizer, made = tokenizers.target, _Made()
    renderer: ChatRenderer | PlainRenderer
    template = None
    if file.template == "chat":
        text = None if file.chat_template is None else read_template(file.chat_template)
        made.template_sha256 = None if text is None else hashlib.sha256(text.encode()).hexdigest()
        template = ChatTemplate(name, tokenizer, text=text, options=file.template_kwargs)
        renderer = ChatRenderer(template, tokenizer, file.system)
    else:
        renderer = PlainRenderer(name, tokenizer, file.system)
    renderings = [renderer.render(place, conversation) for place, conversation in enumerate(conversations)]
    made.remarks = [rendering.remarks for rendering in renderings]
    tell_omissions(name, made.remarks, template)
    if template is not None and isinstance(renderer, ChatRenderer) and renderer.writes_date(conversations):
        made.date = template.date
        tokenizers.tell(
            f"the chat template writes the date: it is {made.date} in all samples, so that work goes on another day "
            f'("template_kwargs: {{strftime_now: {made.date}}}" sets it)'
        )
    texts = [rendering.text for rendering in renderings]
    tokens = tokenise(name, tokenizers, texts, special=file.template == "plain")
    for place, (rendering, (ids, offsets)) in enumerate(zip(renderings, tokens, strict=True)):
        sample = _mark_answer(name, place, rendering, ids, offsets, tokenizer if file.template == "plain" else None)
        made.samples.append(sample)
        start = 0
        if len(sample.input_ids) > file.max_length:
            until = renderer.keep_until(place, conversations[place], rendering.text)
            start = sum(end <= until for _, end in offsets[: int(sample.is_answer.nonzero().min())])
            start = max(start, int(ids[0] == tokenizer.bos_token_id))
        made.kept_starts.append(start)
    return made


def _mark_answer(
    name: str, place: int, rendering: Rendering, ids: list[int], offsets: list[tuple[int, int]], ends_plain: Any | None
) -> Sample:
    """The sample up to its answer's end; a plain one gets the end of sequence of the tokenizer given."""
    if ends_plain is not None and ids and ids[-1] == ends_plain.eos_token_id:
        ids, offsets = ids[:-1], offsets[:-1]  # a tokenizer that ends sequences itself
    answer = [start >= rendering.answer_start for start, _ in offsets]
    # A tokenizer that does not know a character may leave it out without a word.
    written = rendering.text[rendering.answer_start : rendering.end_of_turn].strip()
    if written and not any(rendering.answer_start < end <= rendering.end_of_turn for _, end in offsets):
        raise ValueError(f'ability "{name}": the tokenizer makes no tokens of the answer of sample {place}')
    if ends_plain is not None:
        ids, answer = [*ids, ends_plain.eos_token_id], [*answer, True]
    else:
        last = next(at for at, (_, end) in enumerate(offsets) if end > rendering.end_of_turn)
        ids, answer = ids[: last + 1], answer[: last + 1]
    return Sample(torch.tensor(ids, dtype=torch.int64), torch.tensor(answer, dtype=torch.bool))


def _ready_sample(name: str, place: int, row: dict[str, Any]) -> Sample:
    for column in ("input_ids", "labels"):
        values = row[column]
        if not (isinstance(values, list) and values and all(type(value) is int for value in values)):
            raise ValueError(f'ability "{name}": sample {place} has no list of whole numbers in "{column}"')
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    if ids.shape != labels.shape:
        raise ValueError(f'ability "{name}": sample {place} has {len(ids)} input_ids and {len(labels)} labels')
    is_answer = labels != -100
    end = int(is_answer.nonzero().max()) + 1 if is_answer.any() else len(ids)
    return Sample(ids[:end].to(torch.int64), is_answer[:end])


def _fit(made: _Made, max_length: int) -> tuple[list[Sample], int, int, bool]:
    """Cut over-long prompts from the left, behind the beginning that stays; drop samples for which that is too long.

    Returns:
        The samples kept, how many were cut, how many dropped, and whether one was dropped for what stays before it.
    """
    kept, cut, dropped, crowded = [], 0, 0, False
    for sample, start in zip(made.samples, made.kept_starts, strict=True):
        length = len(sample.input_ids)
        answer = length - (int(sample.is_answer.nonzero().min()) if sample.is_answer.any() else 0)
        if length <= max_length:
            kept.append(sample)
        elif start + answer > max_length:
            dropped += 1
            crowded |= answer <= max_length
        else:
            cut += 1
            rest = max_length - start
            kept.append(
                Sample(*(torch.cat([part[:start], part[-rest:]]) for part in (sample.input_ids, sample.is_answer)))
            )
    return kept, cut, dropped, crowded


def fingerprint_samples(samples: Sequence[Sample]) -> str:
    """SHA-256 over all token ids and answer marks."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.input_ids).to_bytes(8, "little"))
        digest.update(sample.input_ids.numpy().astype("<i8").tobytes())
        digest.update(sample.is_answer.numpy().tobytes())
    return digest.hexdigest()
