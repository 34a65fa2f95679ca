"""The abilities file: which keys it has, their defaults, and how mistakes in it are told."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mergekit_act.criteria import WITHOUT_DATA
from mergekit_act.wording import enumerate_some, escape, shorten
from mergekit_act.yaml_files import read_yaml

__all__ = ["AbilitiesFile", "Ability", "Evaluation", "load_abilities"]

# Of a data set of its own: keys of an ability that say which rows, and how they are read.
_OF_A_DATA_SET = ("name", "revision", "prompt", "answer", "where")


class Evaluation(BaseModel):
    """Which held-out rows measure an ability, and how answers are read.

    Without ``split`` and ``offset`` they are the rows behind the profiled ones; in another split, its first. With a
    ``dataset`` of its own they are the first of that one's split ``train``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str | None = None
    name: str | None = None
    revision: str | None = None
    prompt: str | None = None
    answer: str | None = None
    where: dict[str, Any] = Field(default_factory=dict)
    split: str | None = None
    offset: int | None = Field(default=None, ge=0)
    samples: int = Field(default=200, ge=1)
    extract: str | None = None
    max_new_tokens: int = Field(default=256, ge=1)

    @field_validator("extract")
    @classmethod
    def _check_extract(cls, extract: str | None) -> str | None:
        try:
            re.compile(extract or "")
        except re.error as error:
            raise ValueError(f'"{extract}" is no regular expression ({error})') from error
        return extract

    @field_validator("prompt", "answer", mode="before")
    @classmethod
    def _check_quotes(cls, text: Any) -> Any:
        return _quoted(text)

    @model_validator(mode="after")
    def _check(self) -> Evaluation:
        foreign = [key for key in _OF_A_DATA_SET if key in self.model_fields_set]
        if foreign and self.dataset is None:
            raise ValueError(f'{" and ".join(foreign)} of "evaluate" go with a "dataset" of its own; give it too')
        if len({"prompt", "answer"} & self.model_fields_set) == 1 or (self.prompt is None) != (self.answer is None):
            raise ValueError("prompt and answer go together: give both, or neither to keep the ability's")
        return self


class Ability(BaseModel):
    """One ability's samples: the rows of a data set and how a row becomes a prompt and an answer.

    The rows are filtered by ``where``, shuffled by ``seed``; ``offset`` are skipped and ``samples`` taken. With
    ``balance``, both numbers are divided equally among the column's values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    role: Literal["recover", "keep"] = "recover"
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    prompt: str | None = None
    answer: str | None = None
    where: dict[str, Any] = Field(default_factory=dict)
    balance: str | None = None
    samples: int = Field(default=1500, ge=1)
    offset: int = Field(default=0, ge=0)
    seed: int = 0
    evaluate: Evaluation = Field(default_factory=Evaluation)

    @field_validator("prompt", "answer", mode="before")
    @classmethod
    def _check_quotes(cls, text: Any) -> Any:
        return _quoted(text)

    @model_validator(mode="after")
    def _check(self) -> Ability:
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("prompt and answer go together: give both, or neither for messages or input_ids")
        held_out = self.evaluate
        if held_out.dataset is None and held_out.offset is not None and held_out.split in (None, self.split):
            first, last = held_out.offset, held_out.offset + held_out.samples
            if first < self.offset + self.samples and last > self.offset:
                raise ValueError(
                    f"held-out rows {first} to {last - 1} overlap the profiled rows {self.offset} to "
                    f"{self.offset + self.samples - 1}; set evaluate.offset to {self.offset + self.samples} or more"
                )
        return self

    def held_out(self) -> Ability:
        """The same ability with the rows that ``evaluate`` names in place of the profiled ones."""
        held_out = self.evaluate
        written = held_out.model_fields_set & {"samples", "offset"}
        update: dict[str, Any] = {"samples": held_out.samples, "offset": held_out.offset or 0}
        if held_out.dataset is None:
            if held_out.offset is None and held_out.split in (None, self.split):
                update["offset"] = self.offset + self.samples
            update["split"] = held_out.split or self.split
        else:
            update |= {"split": held_out.split or "train", "balance": None, "dataset": held_out.dataset}
            kept = {"prompt", "answer"} - held_out.model_fields_set
            update |= {key: getattr(held_out, key) for key in _OF_A_DATA_SET if key not in kept}
        written |= self.model_fields_set - {"samples", "offset"}
        return Ability.model_construct(_fields_set=written, **(dict(self) | update))


class AbilitiesFile(BaseModel):
    """A pair of models and the abilities to profile, fine-tune, evaluate and sweep with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    ability_model: str
    max_length: int = Field(default=2048, ge=1)
    template: Literal["chat", "plain"] = "chat"
    chat_template: str | None = None
    system: str | None = None
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    abilities: dict[str, Ability] = Field(min_length=1)

    @field_validator("template_kwargs")
    @classmethod
    def _check_date(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Dates that YAML has read are texts again; ``strftime_now`` is the date that a template writes."""
        options = {key: value.isoformat() if isinstance(value, date) else value for key, value in options.items()}
        try:
            date.fromisoformat(options.get("strftime_now", "2000-01-01"))
        except (TypeError, ValueError) as error:
            raise ValueError(
                "strftime_now is the date that templates write; expected one like 2024-07-26, got "
                f"{options['strftime_now']!r}"
            ) from error
        return options

    @model_validator(mode="after")
    def _check_template(self) -> AbilitiesFile:
        if self.template == "plain" and self.chat_template is not None:
            raise ValueError('"template: plain" has no use for chat_template; leave one of them out')
        return self

    @field_validator("abilities")
    @classmethod
    def _check_names(cls, abilities: dict[str, Ability]) -> dict[str, Ability]:
        seen: dict[str, str] = {}
        for name in abilities:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.startswith("."):
                raise ValueError(f'ability name "{name}" has other characters than letters, digits, ".", "_" and "-"')
            if name.lower() in WITHOUT_DATA:
                raise ValueError(f'ability name "{name}" is reserved for the profiles made without data')
            if name.lower() in seen:
                raise ValueError(
                    f'ability names "{seen[name.lower()]}" and "{name}" differ only in case; their files would be one '
                    "on some systems"
                )
            seen[name.lower()] = name
        return abilities

    def check_names(self, names: Sequence[str]) -> None:
        """Raise a ValueError if one of these is no ability of the file."""
        unknown = sorted(set(names) - set(self.abilities))
        if unknown:
            raise ValueError(f'there is no ability "{unknown[0]}"; there are {", ".join(self.abilities)}')


def load_abilities(path: str | Path) -> AbilitiesFile:
    """Read and validate an abilities file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not plain YAML, has an unknown or missing key, or a wrong value; all are listed.
    """
    content = read_yaml(path, "abilities file", "the keys target, ability_model and abilities")
    try:
        return AbilitiesFile.model_validate(content)
    except ValidationError as error:
        problems = sorted(_sentence(detail) for detail in error.errors())
        raise ValueError(f"{escape(path)}: {enumerate_some(problems, '; ')}") from error


def _quoted(text: Any) -> Any:
    """YAML makes a mapping of a format string without quotes that begins with a brace."""
    if isinstance(text, dict | list):
        raise ValueError('a format string that begins with a brace needs quotes in YAML: "{column}"')
    return text


def _sentence(detail: Any) -> str:
    where = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        *parents, key = detail["loc"]
        models: dict[int, type[BaseModel]] = {0: AbilitiesFile, 2: Ability, 3: Evaluation}
        model = models.get(len(parents), Ability)
        close = difflib.get_close_matches(str(key), model.model_fields, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"expected {', '.join(model.model_fields)}"
        return escape(f'unknown key "{shorten(where, 60)}" ({hint})')
    if detail["type"] == "missing":
        return f'key "{where}" is missing'
    message = detail["msg"].removeprefix("Value error, ")
    got = "" if detail["type"] == "value_error" else f"; got {shorten(repr(detail['input']), 60)}"
    return escape(f"{shorten(where, 60)}: {message}{got}")
