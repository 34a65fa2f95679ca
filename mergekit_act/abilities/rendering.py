"""Conversations as text, and where in that text the answer starts and the assistant's turn ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Rendering", "render_chat", "render_plain"]

Conversation = Sequence[dict[str, str]]

# Stands in for an answer, to see what the template writes behind one.
_PROBE = "mergekitactprobe"


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        text: all of it.
        answer_start: the character at which the answer starts.
        end_of_turn: the character at which the end-of-turn token starts (chat), or the text's length (plain).
    """

    text: str
    answer_start: int
    end_of_turn: int


def render_chat(
    name: str, conversations: Sequence[Conversation], tokenizer: Any, *, system: str | None, options: Mapping[str, Any]
) -> list[Rendering]:
    """Render with the tokenizer's chat template.

    The answer starts where the rendering of the prompt, with its generation prompt, ends.

    Args:
        name: the ability's name, for messages.
        conversations: each ends with the assistant's turn that is the answer.
        tokenizer: the target's.
        system: put before conversations that have no system turn; None leaves that to the template.
        options: more variables for the template.

    Raises:
        ValueError: there is no template, it can't render a conversation, a prompt is not a prefix of the full
            rendering, or the assistant's turn ends with no special token.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f'ability "{name}": the target\'s tokenizer has no chat template; say "template: plain" or give it one'
        )

    def render(conversation: Conversation, place: int, *, prompt: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt, **options)
            )
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())
            raise ValueError(f'ability "{name}": the chat template cannot render sample {place}: {reason}') from error

    renderings = []
    ending: str | None = None
    for place, turns in enumerate(conversations):
        conversation = _with_system(turns, system)
        prompt = render(conversation[:-1], place, prompt=True)
        text = render(conversation, place, prompt=False)
        if not text.startswith(prompt):
            at = next((i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(text))
            raise ValueError(
                f'ability "{name}": sample {place}\'s prompt is not a prefix of the full conversation: they part at '
                f'"…{prompt[max(0, at - 20) : at + 20]}"; the answer can\'t be located. Mend the template, or give '
                "input_ids and labels"
            )
        if ending is None or not text.endswith(ending):
            probe = [*conversation[:-1], {**conversation[-1], "content": _PROBE}]
            ending = render(probe, place, prompt=False).rpartition(_PROBE)[2]
        turn_end = len(text) - len(ending)
        offset = _end_of_turn(tokenizer, ending) if text.endswith(ending) else None
        if offset is None or turn_end < len(prompt):
            raise ValueError(
                f'ability "{name}": the chat template ends the answer of sample {place} with "{ending}", in which '
                "there is no end-of-turn token; mend the template, or give input_ids and labels"
            )
        renderings.append(Rendering(text, len(prompt), turn_end + offset))
    return renderings


def render_plain(
    name: str, conversations: Sequence[Conversation], tokenizer: Any, *, system: str | None
) -> list[Rendering]:
    """Prompt, newline, answer; the end-of-sequence token is added when it is tokenised.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f'ability "{name}": the target\'s tokenizer has no end-of-sequence token, which ends answers')
    renderings = []
    for turns in conversations:
        *before, answer = (turn["content"] for turn in _with_system(turns, system))
        prompt = "\n".join(before) + "\n"
        renderings.append(Rendering(prompt + answer, len(prompt), len(prompt) + len(answer)))
    return renderings


def _with_system(turns: Conversation, system: str | None) -> list[dict[str, str]]:
    if system is None or (turns and turns[0]["role"] == "system"):
        return list(turns)
    return [{"role": "system", "content": system}, *turns]


def _end_of_turn(tokenizer: Any, ending: str) -> int | None:
    """Where in what the template writes behind an answer the end-of-turn token starts; None if there is none."""
    encoded = tokenizer(ending, add_special_tokens=False, return_offsets_mapping=True)
    tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    marks = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token, (start, _) in tokens:
        if token in marks:
            return int(start)
    visible = [(start, end) for _, (start, end) in tokens if ending[start:end].strip()]
    return int(visible[0][0]) if len(visible) == 1 else None
