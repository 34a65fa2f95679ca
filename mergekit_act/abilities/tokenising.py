"""The tokenizers of a pair: both models get the same token ids, or none."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mergekit_act.checkpoints import parse_reference
from mergekit_act.checkpoints.adapters import adapter_problem
from mergekit_act.wording import one_line

__all__ = ["Tokenizers", "tokenise"]

LOG = logging.getLogger(__name__)


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

    @cached_property
    def _told(self) -> set[str]:
        return set()

    def tell(self, sentence: str) -> None:
        """Warn of what holds for all abilities, once."""
        if sentence not in self._told:
            self._told.add(sentence)
            LOG.warning("%s", sentence)


def tokenise(
    name: str, tokenizers: Tokenizers, texts: Sequence[str], *, special: bool
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of texts, the same for both models, and each token's (start, end) characters.

    Args:
        name: the ability's name, for messages.
        tokenizers: of the pair.
        texts: whole samples.
        special: add the tokenizer's own tokens at both ends.

    Raises:
        ValueError: the tokenizers give other ids.
    """
    tokenizer = tokenizers.target
    encoded = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    offsets = _offsets(tokenizer, texts, special)
    if tokenizers.ability_model is not None:
        _compare_ids(name, tokenizer, encoded, tokenizers.ability_model, texts, special)
    return zip(encoded, offsets, strict=True)


def _load_tokenizer(reference: str, trust_remote_code: bool) -> Any:
    model = parse_reference(reference).model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises errors of many kinds for missing or foreign files
        reason = one_line(error, 200)
        adapter = adapter_problem(model.path)
        if adapter is not None:
            raise ValueError(adapter) from error
        raise ValueError(f"{reference} has no tokenizer that Transformers can load: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{reference} has a slow tokenizer; expected a fast one (tokenizer.json), it knows offsets")
    return tokenizer


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
