"""What a template makes no text of, and what it puts into answers that nobody wrote."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_act.abilities.conversations import REASONING_KEYS, Turn
from mergekit_act.abilities.templates import ChatTemplate

__all__ = ["EMPTY_THINKING", "Answered", "count_remarks", "find_omissions", "tell_omissions"]

LOG = logging.getLogger(__name__)

EMPTY_THINKING = "empty thinking"

# What is left out -> of what it is a part.
_PARTS = {
    "reasoning": "answers",
    "content": "answers",
    "tool calls": "answers",
    "tools": "prompts",
    "system turn": "prompts",
    "user turns": "prompts",
    "assistant turns": "prompts",
    "tool results": "prompts",
}
_TURNS = {
    "system": "system turn",
    "developer": "system turn",
    "user": "user turns",
    "assistant": "assistant turns",
    "tool": "tool results",
}

# <think></think> and the like with nothing between them; the first part may be the generation prompt's.
_THINKING = re.compile(r"\s*(<(think|thinking|reasoning)>|\[THINK\])?\s*(</(think|thinking|reasoning)>|\[/THINK\])")
_REASONING = re.compile(r"(<think>)?(.*?)</think>(.*)", re.DOTALL)

Render = Callable[[Sequence[Turn], Sequence[Any] | None], str | None]


@dataclass(frozen=True)
class Answered:
    """A conversation and what a template made of it.

    Attributes:
        turns: the last is the answer.
        tools: that may be called.
        prompt: the text before the answer.
        answer: the answer's text, without its end of turn.
    """

    turns: Sequence[Turn]
    tools: Sequence[Any] | None
    prompt: str
    answer: str


def find_omissions(answered: Answered, render: Render) -> frozenset[str]:
    """The names of what is left out of a text, or added to its answer. White space does not count.

    Args:
        answered: the conversation and its text.
        render: gives the text of turns and tools, without a generation prompt; None if it can't.
    """
    found = set(_left_out_of_answer(answered, render)) | set(_left_out_of_prompt(answered, render))
    last = answered.turns[-1]
    thinks = any(last.get(key) for key in REASONING_KEYS) or _THINKING.match(last.get("content", ""))
    if not thinks and _THINKING.match(answered.answer):
        found.add(EMPTY_THINKING)
    return frozenset(found)


def count_remarks(remarks: Sequence[frozenset[str]]) -> dict[str, int]:
    """How many samples have each remark."""
    names = sorted({name for some in remarks for name in some})
    return {name: sum(name in some for some in remarks) for name in names}


def tell_omissions(name: str, remarks: Sequence[frozenset[str]], template: ChatTemplate | None) -> None:
    """Warn of each kind with the number of samples that it hits.

    Args:
        name: the ability's.
        remarks: of each sample.
        template: the chat template; None for ``template: plain``.
    """
    for kind, count in count_remarks(remarks).items():
        first = next(place for place, some in enumerate(remarks) if kind in some)
        if kind == EMPTY_THINKING:
            remedy = (
                '"template_kwargs: {enable_thinking: false}" puts it into the prompts'
                if template is not None and template.mentions("enable_thinking")
                else "a template without it can be given (chat_template: FILE)"
            )
            LOG.warning(
                'ability "%s": the template writes an empty <think></think> into the answers of %d of %d samples (the '
                "first is sample %d), whose tokens count as answer tokens; %s",
                name, count, len(remarks), first, remedy,
            )  # fmt: skip
            continue
        remedy = '"template: plain" writes contents only'
        if template is not None:
            remedy = "a template that writes them can be given (chat_template: FILE)"
        LOG.warning(
            'ability "%s": the template leaves out the %s in the %s of %d of %d samples (the first is sample %d), '
            "so the models do not see them; %s",
            name, kind, _PARTS[kind], count, len(remarks), first, remedy,
        )  # fmt: skip


def _left_out_of_answer(answered: Answered, render: Render) -> Iterator[str]:
    last = answered.turns[-1]
    written = _squash(answered.answer)
    missing = [kind for kind, text in _parts(last) if not _is_written(text, written)]
    if missing:
        # What the generation prompt says already, such as <think>, is not in the answer.
        before = render(answered.turns[:-1], answered.tools) if len(answered.turns) > 1 else ""
        if before is not None and answered.prompt.startswith(before):
            written = _squash(answered.prompt[len(before) :] + answered.answer)
        missing = [kind for kind, text in _parts(last) if not _is_written(text, written)]
    yield from missing


def _parts(turn: Turn) -> Iterator[tuple[str, str]]:
    """What an assistant's turn says, in parts that stand together in any template."""
    for key in REASONING_KEYS:
        if isinstance(turn.get(key), str):
            yield "reasoning", turn[key]
    content = turn.get("content", "")
    thought = _REASONING.fullmatch(content.strip())
    if thought:
        yield "reasoning", thought[2]
        content = thought[3]
    yield "content", content
    for call in turn.get("tool_calls", ()):
        for text in _texts(call["function"]):
            yield "tool calls", text


def _left_out_of_prompt(answered: Answered, render: Render) -> Iterator[str]:
    before = answered.turns[:-1]
    written = _squash(answered.prompt)
    for turn in before:
        # Templates leave out earlier reasoning on purpose: the model never sees it in use.
        says = [text for part, text in _parts(turn) if part != "reasoning"]
        if turn["role"] in _TURNS and not all(_is_written(text, written) for text in says):
            yield _TURNS[turn["role"]]
    if answered.tools and before:
        without = render(before, None)
        if without is not None and without == render(before, answered.tools):
            yield "tools"


def _texts(value: Any) -> Iterator[str]:
    """All texts in a tool call: its name, arguments, their values. JSON that is a text is looked into."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key != "type":
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            inner = None
        if isinstance(inner, dict | list):
            yield from _texts(inner)
        else:
            yield value


def _is_written(text: str, written: str) -> bool:
    """Whether a text is in another one without white space, as it is or as JSON writes it."""
    forms = [text] if text.isascii() and not re.search(r'["\\\x00-\x1f]', text) else [
        text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]
    ]  # fmt: skip
    return any(_squash(form) in written for form in forms)


def _squash(text: str) -> str:
    return "".join(text.split())
