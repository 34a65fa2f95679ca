"""From rows to samples: rendered, tokenised once, cut to length, their answer tokens marked."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from mergekit_act.abilities.rendering import Rendering, render_chat, render_plain
from mergekit_act.abilities.rows import fill_template, load_rows, select_rows
from mergekit_act.abilities.schema import AbilitiesFile, Ability
from mergekit_act.adapters import adapter_problem
from mergekit_act.checkpoints import parse_reference

__all__ = ["AbilitySamples", "Sample", "Tokenizers", "collect_samples"]

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


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of a pair, loaded when the first text has to be tokenised.

    Attributes:
        target_reference: model reference of the target.
        ability_reference: model reference of the ability model.
        trust_remote_code: allow the models' own code from the Hub.
    """

    target_reference: str
    ability_reference: str
    trust_remote_code: bool = False

    @cached_property
    def target(self) -> Any:
        """The target's tokenizer."""
        return _load_tokenizer(self.target_reference, self.trust_remote_code)

    @cached_property
    def ability_model(self) -> Any | None:
        """The ability model's tokenizer, or None if it is the same and can't give other token ids."""
        theirs = _load_tokenizer(self.ability_reference, self.trust_remote_code)
        same = theirs.backend_tokenizer.to_str() == self.target.backend_tokenizer.to_str()
        return None if same and theirs.eos_token_id == self.target.eos_token_id else theirs


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
    if ability.prompt is None and {"input_ids", "labels"} <= set(chosen.column_names):
        samples = [_ready_sample(name, place, row) for place, row in enumerate(chosen)]
    else:
        samples = _tokenise(file, name, _conversations(name, ability, chosen), tokenizers)
    kept, cut, dropped = _fit(samples, file.max_length)
    if cut:
        LOG.warning('ability "%s": %d prompts were cut from the left to %d tokens', name, cut, file.max_length)
    if dropped:
        LOG.warning('ability "%s": %d samples dropped, their answers exceed %d tokens', name, dropped, file.max_length)
    if not kept:
        raise ValueError(f'ability "{name}" has no samples: all {dropped} answers exceed max_length {file.max_length}')
    empty = sum(not bool(sample.is_answer.any()) for sample in kept)
    if empty:
        raise ValueError(f'ability "{name}": {empty} of {len(kept)} samples have no answer tokens')
    settings = ability.model_dump(exclude={"role", "evaluate"}) | {
        "on_hub": not Path(ability.dataset).exists(),
        "max_length": file.max_length,
        "template": file.template,
        "system": file.system,
        "template_kwargs": file.template_kwargs,
        "prompts_cut": cut,
        "samples_dropped": dropped,
        "fingerprint": _fingerprint(kept),
    }
    # They end up in JSON, after all the work; YAML makes dates of some values.
    return AbilitySamples(name, tuple(kept), json.loads(json.dumps(settings, default=str)))


def _load_tokenizer(reference: str, trust_remote_code: bool) -> Any:
    model = parse_reference(reference).model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises errors of many kinds for missing or foreign files
        reason = " ".join(str(error).split())[:200]
        adapter = adapter_problem(model.path)
        if adapter is not None:
            raise ValueError(adapter) from error
        raise ValueError(f"{reference} has no tokenizer that Transformers can load: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{reference} has a slow tokenizer; expected a fast one (tokenizer.json), it knows offsets")
    return tokenizer


def _conversations(name: str, ability: Ability, rows: datasets.Dataset) -> list[list[dict[str, str]]]:
    """Each row as a conversation that ends with the assistant's turn that is the answer."""
    if ability.prompt is not None and ability.answer is not None:
        prompts = fill_template(name, ability, rows, ability.prompt)
        answers = fill_template(name, ability, rows, ability.answer)
        return [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    if "messages" not in rows.column_names:
        raise ValueError(
            f'ability "{name}": {ability.dataset} has neither a "messages" column nor "input_ids" and "labels"; give '
            f"prompt and answer. Its columns are {', '.join(rows.column_names)}"
        )
    return [_answered_part(name, place, messages) for place, messages in enumerate(rows["messages"][:])]


def _answered_part(name: str, place: int, messages: Any) -> list[dict[str, str]]:
    """The turns up to the last one of the assistant, which is the answer."""
    where = f'ability "{name}": sample {place}'
    turns = messages if isinstance(messages, list) else []
    if not turns or not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns):
        raise ValueError(f'{where} has no list of turns with "role" and "content" in "messages"')
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f'{where} has no assistant turn in "messages"')
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns[: last + 1]]
    if not all(isinstance(turn.get("content"), str) for turn in turns):
        raise ValueError(f'{where} has a turn in "messages" whose content is not a text')
    return turns


def _tokenise(
    file: AbilitiesFile, name: str, conversations: Sequence[list[dict[str, str]]], tokenizers: Tokenizers
) -> list[Sample]:
    tokenizer = tokenizers.target
    renderings: list[Rendering]
    if file.template == "chat":
        renderings = render_chat(name, conversations, tokenizer, system=file.system, options=file.template_kwargs)
    else:
        renderings = render_plain(name, conversations, tokenizer, system=file.system)
    special = file.template == "plain"
    texts = [rendering.text for rendering in renderings]
    encoded = tokenizer(texts, add_special_tokens=special)["input_ids"]
    offsets_of = _offsets(tokenizer, texts, special)
    if tokenizers.ability_model is not None:
        _compare_ids(name, tokenizer, encoded, tokenizers.ability_model, texts, special)
    samples: list[Sample] = []
    for rendering, ids, offsets in zip(renderings, encoded, offsets_of, strict=True):
        if special and ids and ids[-1] == tokenizer.eos_token_id:
            ids, offsets = ids[:-1], offsets[:-1]  # a tokenizer that ends sequences itself
        answer = [start >= rendering.answer_start for start, _ in offsets]
        # A tokenizer that does not know a character may leave it out without a word.
        written = rendering.text[rendering.answer_start : rendering.end_of_turn].strip()
        if written and not any(rendering.answer_start < end <= rendering.end_of_turn for _, end in offsets):
            raise ValueError(f'ability "{name}": the tokenizer makes no tokens of the answer of sample {len(samples)}')
        if special:
            ids, answer = [*ids, tokenizer.eos_token_id], [*answer, True]
        else:
            end = next(place for place, (_, end) in enumerate(offsets) if end > rendering.end_of_turn)
            ids, answer = ids[: end + 1], answer[: end + 1]
        samples.append(Sample(torch.tensor(ids, dtype=torch.int64), torch.tensor(answer, dtype=torch.bool)))
    return samples


def _offsets(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[tuple[int, int]]]:
    """Each token's (start, end) characters, with the white space in front of it, which some tokenizers leave out."""
    settings = tokenizer.backend_tokenizer.to_str()
    if '"trim_offsets":true' not in settings:
        offsets: list[list[tuple[int, int]]] = tokenizer(
            list(texts), add_special_tokens=special, return_offsets_mapping=True
        )["offset_mapping"]
        return offsets
    whole = Tokenizer.from_str(settings.replace('"trim_offsets":true', '"trim_offsets":false'))
    whole.no_padding()
    whole.no_truncation()
    return [encoding.offsets for encoding in whole.encode_batch(list(texts), add_special_tokens=special)]


def _compare_ids(name: str, ours: Any, ids: Any, theirs: Any, texts: Sequence[str], special: bool) -> None:
    if special and ours.eos_token_id != theirs.eos_token_id:
        raise ValueError(
            f'ability "{name}": the tokenizers disagree on the end of sequence: {ours.eos_token_id} for the target, '
            f"{theirs.eos_token_id} for the ability model; both models must get the same token ids"
        )
    for place, (mine, other) in enumerate(
        zip(ids, theirs(list(texts), add_special_tokens=special)["input_ids"], strict=True)
    ):
        if mine != other:
            shorter = min(len(mine), len(other))
            at = next((i for i in range(shorter) if mine[i] != other[i]), shorter)
            raise ValueError(
                f'ability "{name}": the tokenizers disagree on sample {place}, token {at}: '
                f"{mine[at : at + 1]} for the target, {other[at : at + 1]} for the ability model; both models must get "
                "the same token ids"
            )


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


def _fit(samples: Sequence[Sample], max_length: int) -> tuple[list[Sample], int, int]:
    """Cut over-long prompts from the left; drop samples whose answer alone is too long."""
    kept, cut, dropped = [], 0, 0
    for sample in samples:
        length = len(sample.input_ids)
        first = int(sample.is_answer.nonzero().min()) if sample.is_answer.any() else 0
        if length <= max_length:
            kept.append(sample)
        elif length - first > max_length:
            dropped += 1
        else:
            cut += 1
            kept.append(Sample(sample.input_ids[-max_length:].clone(), sample.is_answer[-max_length:].clone()))
    return kept, cut, dropped


def _fingerprint(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.input_ids).to_bytes(8, "little"))
        digest.update(sample.input_ids.numpy().astype("<i8").tobytes())
        digest.update(sample.is_answer.numpy().tobytes())
    return digest.hexdigest()
