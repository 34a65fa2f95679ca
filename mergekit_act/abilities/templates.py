"""A chat template as it is used here: the target's or one from a file, with a fixed date, in limited time."""

from __future__ import annotations

import copy
import datetime
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_act.abilities.conversations import Turn
from mergekit_act.data.table import render_as_written
from mergekit_act.wording import one_line

__all__ = ["FIXED_DATE", "ChatTemplate", "read_template"]

# Templates that write today's date would give other samples every day, and nothing could go on tomorrow. This is what
# Llama 3's templates write where there is no clock.
FIXED_DATE = "2024-07-26"

# Templates come from the Hub, and a loop in one may be endless.
SECONDS = 20.0

_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"


class ChatTemplate:
    """Renders conversations.

    Args:
        name: the ability's name, for messages.
        tokenizer: the target's.
        text: of the template; None takes the tokenizer's own.
        options: more variables for it; ``strftime_now`` is the date that it writes, and no variable.

    Raises:
        ValueError: there is no template.
    """

    def __init__(self, name: str, tokenizer: Any, *, text: str | None = None, options: Mapping[str, Any]) -> None:
        if not text and not tokenizer.chat_template:
            raise ValueError(
                f'ability "{name}": the target\'s tokenizer has no chat template; say "template: plain" (transfer has '
                "--template plain) or give it one (chat_template: FILE)"
            )
        self.name = name
        self._tokenizer, self._text = tokenizer, text
        self._options = dict(options)
        self.date = str(self._options.pop("strftime_now", FIXED_DATE))
        self._tools = self._options.pop("tools", None)

    def mentions(self, word: str) -> bool:
        """Whether a word is in the template; some tokenizers have several."""
        return word in (self._text or str(self._tokenizer.chat_template))

    def render(self, place: int, turns: Sequence[Turn], tools: Sequence[Any] | None, *, prompt: bool = False) -> str:
        """The text of turns; with ``prompt`` and what comes before an answer.

        Raises:
            ValueError: the template does not take them, or does not come to an end.
        """
        return self._render(place, turns, tools, self.date, prompt=prompt)

    def writes_date(self, place: int, turns: Sequence[Turn], tools: Sequence[Any] | None) -> bool:
        """Whether the text would be another one on another day."""
        if not self.mentions("strftime_now"):
            return False
        texts = {self._render(place, turns, tools, date, prompt=False) for date in ("2001-02-03", "2014-10-25")}
        return len(texts) > 1

    def _render(
        self, place: int, turns: Sequence[Turn], tools: Sequence[Any] | None, date: str, *, prompt: bool
    ) -> str:
        try:
            source = self._text or str(self._tokenizer.get_chat_template(tools=tools or self._tools))
            if "strftime_now" in source:
                source = _fixed_clock(date, source) + source
            with _limited_time():
                return render_as_written(
                    [list(turns), list(tools or self._tools or []) or None],
                    lambda said: str(
                        self._tokenizer.apply_chat_template(
                            said[0],
                            tools=said[1],
                            chat_template=source,
                            tokenize=False,
                            add_generation_prompt=prompt,
                            **self._options,
                        )
                    ),
                )
        except Exception as error:  # templates raise what they like
            reason = one_line(error, 300)
            raise ValueError(
                f'ability "{self.name}": the chat template cannot render sample {place}: {reason}. Leave such rows '
                "out, or give a template that takes them (chat_template: FILE)"
            ) from error


def read_template(path: str) -> str:
    """The text of a template's file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty or no text.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"chat_template {path} does not exist (relative to {os.getcwd()})")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template {path} is no text in UTF-8 ({error}); expected a Jinja template") from error
    if not text.strip():
        raise ValueError(f"chat_template {path} is empty; expected a Jinja template")
    return text


def call_forms(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    """The same turns in the ways that templates want tool calls: most take what others fail at.

    Arguments are objects, as Transformers has them, or else JSON texts, as OpenAI and DeepSeek have them; a turn that
    only calls has no content, or else an empty one.
    """
    if not any("tool_calls" in turn for turn in turns):
        yield list(turns)
        return
    for change in (_as_object, _as_text):
        changed = [_with_arguments(turn, change) for turn in turns]
        yield changed
        if any("content" not in turn for turn in turns):
            yield [{"content": "", **turn} for turn in changed]


def _with_arguments(turn: Turn, change: Any) -> Turn:
    if "tool_calls" not in turn:
        return turn
    turn = copy.deepcopy(turn)
    for call in turn["tool_calls"]:
        if "arguments" in call["function"]:
            call["function"]["arguments"] = change(call["function"]["arguments"])
    return turn


def _as_object(arguments: Any) -> Any:
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments  # what a model wrote need not be JSON
    return read if isinstance(read, dict) else arguments


def _as_text(arguments: Any) -> Any:
    if isinstance(arguments, str):
        return arguments
    return render_as_written(arguments, lambda said: json.dumps(said, ensure_ascii=False))


def _fixed_clock(date: str, source: str) -> str:
    """A macro that stands in for the function ``strftime_now`` of Transformers, whose date can't be given.

    It replaces the directives that the template's text has.
    """
    day = datetime.datetime.fromisoformat(date)
    values = {f"%{letter}": day.strftime(f"%{letter}") for letter in _DIRECTIVES}
    for letter in "dHIjmMSwy":  # without padding
        values |= {f"%{flag}{letter}": values[f"%{letter}"].lstrip("0") or "0" for flag in "-#"}
    used = {key: value for key, value in values.items() if key in source}
    replaced = "".join(f" | replace({json.dumps(key)}, {json.dumps(value)})" for key, value in used.items())
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + ' | replace("%%", "%") }}{%- endmacro %}\n'


@contextmanager
def _limited_time() -> Iterator[None]:
    """End what takes too long, where Python can: in the main thread, if nobody else uses the timer."""
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not usable or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it has not come to an end in {SECONDS:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
