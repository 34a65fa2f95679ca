"""The samples that measure an ability: rows that profiling did not use."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from mergekit_act.abilities import AbilitiesFile, Ability, AbilitySamples, Sample, Tokenizers, collect_samples
from mergekit_act.abilities.samples import fingerprint_samples
from mergekit_act.logs import muted

__all__ = ["HeldOut", "collect_held_out"]

LOG = logging.getLogger(__name__)

_REMEDY = '; choose another "split" or "offset" under "evaluate", or mend rows that stand twice'


@dataclass(frozen=True)
class HeldOut:
    """The held-out samples of one ability, and how its answers are read.

    Attributes:
        ability: the ability's name.
        role: ``recover`` or ``keep``.
        data: the samples.
        extract: finds the final answer in a text; None compares whole texts.
        max_new_tokens: how long a generated answer may be.
        tokenizer: the target's.
    """

    ability: str
    role: str
    data: AbilitySamples
    extract: re.Pattern[str] | None
    max_new_tokens: int
    tokenizer: Any

    @property
    def samples(self) -> Sequence[Sample]:
        """The samples themselves."""
        return self.data.samples

    @cached_property
    def prompts(self) -> list[Tensor]:
        """int64 ``[tokens]`` per sample: all before its last stretch of answer tokens."""
        return [sample.input_ids[: _answer_start(sample)] for sample in self.samples]

    def check(self, *, generate: bool) -> None:
        """See that there is something to measure, before any model is loaded.

        Args:
            generate: whether answers are to be generated and compared.

        Raises:
            ValueError: all samples were profiled; or, to generate, a sample has no prompt, or ``extract`` finds nothing
                in a right answer.
        """
        if not self.samples:
            raise ValueError(_told(self.ability, self.data.data["duplicates_left_out"], 0, _REMEDY))
        if not generate:
            return
        empty = next((place for place, prompt in enumerate(self.prompts) if not len(prompt)), None)
        if empty is not None:
            raise ValueError(
                f'ability "{self.ability}": sample {empty} has no prompt to answer, all its tokens are labelled; say '
                "--no-generate"
            )
        _ = self.references

    @cached_property
    def references(self) -> list[str]:
        """The right answers as ``read`` reads them.

        Raises:
            ValueError: ``extract`` finds nothing in one, so nothing could ever match it.
        """
        found = []
        for place, sample in enumerate(self.samples):
            text = self.decode(sample.input_ids[_answer_start(sample) :])
            answer = self.read(text)
            if answer is None:
                raise ValueError(
                    f'ability "{self.ability}": extract "{self.extract.pattern if self.extract else None}" finds '
                    f'nothing in the right answer of sample {place}, "{text[:100]}"'
                )
            found.append(answer)
        return found

    def decode(self, ids: Tensor) -> str:
        """Tokens as text, without special tokens and outer white space."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def read(self, text: str) -> str | None:
        """The final answer in a text: the last match of ``extract``, its first group if it has one."""
        if self.extract is None:
            return text
        matches = list(self.extract.finditer(text))
        if not matches:
            return None
        last = matches[-1]
        return (last.group(1) if self.extract.groups else last.group()) or ""


def collect_held_out(file: AbilitiesFile, tokenizers: Tokenizers, names: Sequence[str] | None = None) -> list[HeldOut]:
    """Load the held-out samples of abilities.

    A held-out sample is another one than all profiled samples of its ability: one with the same token ids, as two
    equal rows give, is left out, which is told. If none is left, ``HeldOut.check`` says so.

    Args:
        file: the abilities file.
        tokenizers: of the file's pair.
        names: which abilities; None for all.

    Raises:
        FileNotFoundError: a data set does not exist.
        ValueError: as ``collect_samples``; an ability has no held-out samples, or there is no such ability.
    """
    file.check_names(names or ())
    chosen = list(dict.fromkeys(file.abilities if names is None else names))
    collected = [_collect(file, name, tokenizers) for name in chosen]
    profiled = {name: _profiled(file, name, tokenizers) for name in chosen}
    found = []
    for name, data in zip(chosen, collected, strict=True):
        data = _without_profiled(name, file.abilities[name], data, profiled[name])
        for other in chosen:
            common = sum(_key(sample) in profiled[other] for sample in data.samples)
            if common:
                LOG.warning(
                    'ability "%s": %d of %d held-out samples are among the profiled ones of "%s"',
                    name, common, len(data.samples), other,
                )  # fmt: skip
        settings = file.abilities[name].evaluate
        extract = None if settings.extract is None else re.compile(settings.extract, re.DOTALL)
        found.append(
            HeldOut(name, file.abilities[name].role, data, extract, settings.max_new_tokens, tokenizers.target)
        )
    return found


def _collect(file: AbilitiesFile, name: str, tokenizers: Tokenizers) -> AbilitySamples:
    held_out = file.abilities[name].held_out()
    try:
        return collect_samples(file.model_copy(update={"abilities": {name: held_out}}), name, tokenizers)
    except ValueError as error:
        if "has no samples" not in str(error):
            raise
        raise ValueError(
            f"{error} (held-out samples: {held_out.samples} of split {held_out.split} from {held_out.offset} on; "
            'the keys "split", "offset" and "samples" of "evaluate" say which)'
        ) from error


def _profiled(file: AbilitiesFile, name: str, tokenizers: Tokenizers) -> set[bytes]:
    """The profiled samples of an ability, as keys. What there is to tell of them was told when they were profiled."""
    try:
        with muted(collect_samples.__module__):
            return {_key(sample) for sample in collect_samples(file, name, tokenizers).samples}
    except (FileNotFoundError, ValueError) as error:
        if file.abilities[name].evaluate.dataset is None:
            raise
        LOG.warning('ability "%s": held-out samples were not compared with the profiled ones: %s', name, error)
        return set()


def _key(sample: Sample) -> bytes:
    return sample.input_ids.numpy().tobytes()


def _may_overlap(ability: Ability) -> bool:
    """Whether profiled and held-out rows can be the same: slices of one split, as in ``train[:1000]``."""
    ours, theirs = ability.split, ability.evaluate.split or ability.split
    return ability.evaluate.dataset is None and ours != theirs and ours.partition("[")[0] == theirs.partition("[")[0]


def _told(name: str, common: int, others: int, more: str) -> str:
    return f'ability "{name}": {common} of {common + others} held-out samples are among the profiled ones{more}'


def _without_profiled(name: str, ability: Ability, data: AbilitySamples, profiled: set[bytes]) -> AbilitySamples:
    """The samples that were not profiled, of the data set that ``data`` tells.

    Raises:
        ValueError: some were, and the splits may be slices that overlap.
    """
    kept = tuple(sample for sample in data.samples if _key(sample) not in profiled)
    common = len(data.samples) - len(kept)
    if not common:
        return data
    if _may_overlap(ability):
        raise ValueError(_told(name, common, len(kept), _REMEDY))
    if kept:
        LOG.warning(_told(name, common, len(kept), " and left out"))
    settings = data.data | {"duplicates_left_out": common, "fingerprint": fingerprint_samples(kept)}
    return AbilitySamples(name, kept, settings)


def _answer_start(sample: Sample) -> int:
    """Where the last stretch of answer tokens begins."""
    others = (~sample.is_answer).nonzero().flatten()
    last = int(sample.is_answer.nonzero().max())
    return int(others[others < last].max()) + 1 if bool((others < last).any()) else 0
