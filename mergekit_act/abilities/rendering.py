"""Conversations as text, and where in that text the answer starts and the assistant's turn ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_act.abilities.conversations import Conversation, Turn
from mergekit_act.abilities.omissions import Answered, find_omissions
from mergekit_act.abilities.templates import ChatTemplate, call_forms

__all__ = ["ChatRenderer", "PlainRenderer", "Rendering", "render_chat"]

Tools = Sequence[Any] | None

# Stand in for an answer and for what comes after it, to see what the template writes around them.
_PROBE = "mergekitactprobe"
_NEXT = "mergekitactnext"


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        text: all of it.
        answer_start: the character at which the answer starts.
        end_of_turn: the character at which the end-of-turn token starts (chat), or the text's length (plain).
        remarks: what the template leaves out or adds, as ``omissions`` names it.
    """

    text: str
    answer_start: int
    end_of_turn: int
    remarks: frozenset[str] = frozenset()


def render_chat(
    name: str,
    conversations: Sequence[Sequence[Turn]],
    tokenizer: Any,
    *,
    system: str | None,
    options: Mapping[str, Any],
) -> list[Rendering]:
    """Render conversations without tools with the tokenizer's chat template; see ``ChatRenderer``."""
    renderer = ChatRenderer(ChatTemplate(name, tokenizer, options=options), tokenizer, system)
    return [renderer.render(place, Conversation(list(turns))) for place, turns in enumerate(conversations)]


class ChatRenderer:
    """Renders with a chat template.

    The answer starts where the rendering of the prompt, with its generation prompt, ends, and is all that the template
    makes of the assistant's turn: reasoning, content, tool calls.

    Args:
        template: the chat template.
        tokenizer: the target's.
        system: put before conversations that have no system turn; None leaves that to the template.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Any, system: str | None) -> None:
        self._template, self._tokenizer, self._system = template, tokenizer, system
        # What stands behind an answer, and where in it the end-of-turn token starts.
        self._ending: tuple[str, int | None] | None = None

    def render(self, place: int, conversation: Conversation) -> Rendering:
        """Render one conversation.

        Args:
            place: which sample it is, for messages.
            conversation: ends with the answer.

        Raises:
            ValueError: the template can't render it, the prompt is not a prefix of the full rendering, or the
                assistant's turn ends with no special token.
        """
        turns, prompt, text = self._render_both(place, conversation)
        if not text.startswith(prompt):
            raise ValueError(self._not_a_prefix(place, text, prompt))
        end_of_turn = self._end_of_turn(place, turns, conversation.tools, text, len(prompt))

        def render(before: Sequence[Turn], tools: Tools) -> str | None:
            try:
                return self._template.render(place, before, tools)
            except ValueError:
                return None

        answered = Answered(turns, conversation.tools, prompt, text[len(prompt) : end_of_turn])
        return Rendering(text, len(prompt), end_of_turn, find_omissions(answered, render))

    def writes_date(self, conversations: Sequence[Conversation]) -> bool:
        """Whether a text would be another one on another day; one of each kind is tried."""
        kinds: dict[tuple[str, bool], int] = {}
        for place, conversation in enumerate(conversations):
            kinds.setdefault((conversation.turns[0]["role"], bool(conversation.tools)), place)
        for place in kinds.values():
            turns, _, _ = self._render_both(place, conversations[place])
            if self._template.writes_date(place, turns, conversations[place].tools):
                return True
        return False

    def keep_until(self, place: int, conversation: Conversation, text: str) -> int:
        """The character up to which a prompt that is cut keeps its beginning: that of its system turn's end.

        Zero where the template does not let that be seen.
        """
        turns, tools = _with_system(conversation.turns, self._system), conversation.tools
        first = next((at for at, turn in enumerate(turns[:-1]) if turn["role"] not in ("system", "developer")), None)
        header = None if first is None else self._user_header(place, turns[:first], tools)
        if first is None or header is None:
            return 0
        try:
            probed = [*turns[:first], {"role": "user", "content": _PROBE}, {"role": "assistant", "content": _NEXT}]
            before, found, _ = self._template.render(place, probed, tools).partition(_PROBE)
        except ValueError:
            return 0
        if not found or not text.startswith(before):
            return 0
        end = before.rfind(header)
        inside = "".join(turn["content"] for turn in turns[:first])
        # Some templates write the system turn into the first one of the user.
        return len(before) if end < 0 or inside.strip() not in before[:end] else end

    def _render_both(self, place: int, conversation: Conversation) -> tuple[list[Turn], str, str]:
        """The turns in the first form that the template takes, the prompt, and all of it."""
        failure: ValueError | None = None
        for turns in call_forms(_with_system(conversation.turns, self._system)):
            try:
                text = self._template.render(place, turns, conversation.tools)
                prompt = self._template.render(place, turns[:-1], conversation.tools, prompt=True)
            except ValueError as error:
                failure = failure or error
            else:
                return turns, prompt, text
        raise failure or ValueError("a conversation has no form")  # the latter can't be

    def _end_of_turn(self, place: int, turns: Sequence[Turn], tools: Tools, text: str, start: int) -> int:
        """Where the token starts that ends the assistant's turn."""
        for attempt in ("as before", "anew"):
            if self._ending is None or attempt == "anew":
                self._ending = self._probe_ending(place, turns, tools)
            ending, offset = self._ending
            turn_end = len(text) - len(ending)
            if offset is not None and text.endswith(ending) and turn_end >= start:
                return turn_end + offset
        # Calls may end otherwise: gpt-oss's with <|call|>.
        visible = text.rstrip()
        tail = max(start, len(visible) - 100)
        marks = self._marks(visible[tail:], special=True)
        if marks and tail + marks[-1][1] == len(visible):
            return tail + marks[-1][0]
        raise ValueError(
            f'ability "{self._template.name}": the chat template ends the answer of sample {place} with '
            f"{json.dumps(text[start:][-60:], ensure_ascii=False)}, in which there is no end-of-turn token; mend the "
            "template (chat_template: FILE), or give input_ids and labels"
        )

    def _probe_ending(self, place: int, turns: Sequence[Turn], tools: Tools) -> tuple[str, int | None]:
        probe = [*turns[:-1], {"role": "assistant", "content": _PROBE}]
        try:
            _, found, ending = self._template.render(place, probe, tools).rpartition(_PROBE)
        except ValueError:
            return "", None
        marks = self._marks(ending) if found else []
        if len(marks) > 1:
            # The turn's own are those that are there too when the conversation goes on.
            shared = _shared(ending, self._between(place, probe, tools) or "")
            return ending, [start for start, end in marks if end <= shared or start == marks[0][0]][-1]
        return ending, marks[0][0] if marks else None

    def _between(self, place: int, turns: Sequence[Turn], tools: Tools) -> str | None:
        """What the template writes between an answer and the user's next turn; None if that can't be seen."""
        try:
            text = self._template.render(place, [*turns, {"role": "user", "content": _NEXT}], tools)
        except ValueError:
            return None
        before, found, _ = text.partition(_NEXT)
        _, also, between = before.rpartition(_PROBE)
        return between if found and also else None

    def _user_header(self, place: int, before: Sequence[Turn], tools: Tools) -> str | None:
        """What the template writes at the beginning of a user's turn; None if that can't be seen."""
        turns = [*before, {"role": "user", "content": _NEXT[::-1]}, {"role": "assistant", "content": _PROBE}]
        ending, offset = self._probe_ending(place, turns, tools)
        between = self._between(place, turns, tools)
        if offset is None or between is None:
            return None
        marks, count = self._marks(between), sum(start <= offset for start, _ in self._marks(ending))
        return between[marks[count - 1][1] :].lstrip() or None if 0 < count <= len(marks) else None

    def _marks(self, text: str, *, special: bool = False) -> list[tuple[int, int]]:
        """Where special and added tokens are in a text; where none is, the only visible token."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        added = self._tokenizer.added_tokens_decoder
        known = set(self._tokenizer.all_special_ids) | {t for t, token in added.items() if token.special or not special}
        marks = [(int(start), int(end)) for token, (start, end) in tokens if token in known]
        if marks or special:
            return marks
        visible = [(int(start), int(end)) for _, (start, end) in tokens if text[start:end].strip()]
        return visible if len(visible) == 1 else []

    def _not_a_prefix(self, place: int, text: str, prompt: str) -> str:
        at = _shared(text, prompt)
        shown = json.dumps("…" + prompt[max(0, at - 20) : at + 20], ensure_ascii=False)
        thinking = self._template.mentions("enable_thinking")
        switch = ', set "template_kwargs: {enable_thinking: …}" otherwise' if thinking else ""
        return (
            f'ability "{self._template.name}": sample {place}\'s prompt is not a prefix of the full conversation: they '
            f"part at {shown}; the answer can't be located. Mend the template (chat_template: FILE){switch}, or give "
            "input_ids and labels"
        )


class PlainRenderer:
    """Prompt, newline, answer; the end-of-sequence token is added when it is tokenised.

    Args:
        name: the ability's name, for messages.
        tokenizer: the target's.
        system: put before conversations that have no system turn; None leaves it out.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, name: str, tokenizer: Any, system: str | None) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f'ability "{name}": the target\'s tokenizer has no end-of-sequence token, which ends answers'
            )
        self._name, self._system = name, system

    def render(self, place: int, conversation: Conversation) -> Rendering:
        """Render one conversation.

        Raises:
            ValueError: a turn has no text.
        """
        turns = _with_system(conversation.turns, self._system)
        for turn in turns:
            if "content" not in turn:
                raise ValueError(
                    f'ability "{self._name}": sample {place} has a turn ("{turn["role"]}") without a text; "template: '
                    'plain" writes nothing else. Use a chat template, or leave such rows out'
                )
        *before, answer = (turn["content"] for turn in turns)
        prompt = "\n".join(before) + "\n"
        answered = Answered(turns, conversation.tools, prompt, answer)
        remarks = find_omissions(answered, lambda *_: prompt)
        return Rendering(prompt + answer, len(prompt), len(prompt) + len(answer), remarks)

    def keep_until(self, place: int, conversation: Conversation, text: str) -> int:
        """The character up to which a prompt that is cut keeps its beginning: its system turn and the newline."""
        first = _with_system(conversation.turns, self._system)[0]
        return len(first["content"]) + 1 if first["role"] == "system" else 0


def _shared(one: str, other: str) -> int:
    """How many characters are the same at the beginning."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def _with_system(turns: Sequence[Turn], system: str | None) -> list[Turn]:
    if system is None or (turns and turns[0]["role"] == "system"):
        return list(turns)
    return [{"role": "system", "content": system}, *turns]
