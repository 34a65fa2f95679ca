"""Rows as conversations: turns that end with the answer, and the tools that may be called in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_act.data.rows import fill_template
from mergekit_act.data.schema import Ability
from mergekit_act.wording import enumerate_some

__all__ = ["REASONING_KEYS", "Conversation", "Turn", "read_conversations"]

Turn = dict[str, Any]

# Where data sets keep what an assistant thinks before it answers; Transformers gives templates any of them.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# A "messages" column has turns of "role" and "content"; the others have those of ShareGPT, "from" and "value", too.
_COLUMNS = ("messages", "conversations", "conversation")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """What a row says.

    Attributes:
        turns: as templates take them, without keys that are null; the last is the assistant's turn that is the answer.
        tools: descriptions of the tools that may be called; None if there are none.
    """

    turns: list[Turn]
    tools: list[Any] | None = None


def read_conversations(name: str, ability: Ability, rows: Any) -> list[Conversation]:
    """Each row as a conversation.

    Args:
        name: the ability's name, for messages.
        ability: its settings.
        rows: have ``column_names`` and give dicts.

    Raises:
        ValueError: the columns needed are missing, or a row does not hold a conversation with an answer.
    """
    columns = rows.column_names
    if ability.prompt is not None and ability.answer is not None:
        return _join(name, ability, rows, ability.prompt, ability.answer)
    column = next((column for column in _COLUMNS if column in columns), None)
    if column is not None:
        return [_read_row(_where(name, place), row, column) for place, row in enumerate(rows)]
    if _column_of_turns(rows, "prompt") and _column_of_turns(rows, "completion"):
        return _join(name, ability, rows, "prompt", "completion")
    raise ValueError(
        f'ability "{name}": {ability.dataset} has neither a "messages" column nor "input_ids" and "labels"; give '
        f"prompt and answer. Its columns are {enumerate_some(columns)}"
    )


def _join(name: str, ability: Ability, rows: Any, prompt: str, answer: str) -> list[Conversation]:
    prompts = _read_part(name, ability, rows, prompt, "user")
    answers = _read_part(name, ability, rows, answer, "assistant")
    # Beside texts, a column of this name may be anything.
    strict = bool(_column_of_turns(rows, prompt) or _column_of_turns(rows, answer))
    found = []
    for place, (row, before, turns) in enumerate(zip(rows, prompts, answers, strict=True)):
        where = _where(name, place)
        tools = _read_tools(where, row.get("tools"), strict=strict)
        found.append(Conversation([*before, *_answered_part(where, "the answer", turns)], tools))
    return found


def _read_part(name: str, ability: Ability, rows: Any, template: str, role: str) -> list[list[Turn]]:
    """A prompt's or an answer's turns, row by row: those of a column of conversations, or one turn with a text."""
    column = _column_of_turns(rows, template)
    if column is None:
        return [[{"role": role, "content": text}] for text in fill_template(name, ability, rows, template)]
    parts = []
    for place, row in enumerate(rows):
        value = [{"role": role, "content": row[column]}] if isinstance(row[column], str) else row[column]
        parts.append(_read_turns(_where(name, place), column, value))
    return parts


def _column_of_turns(rows: Any, template: str) -> str | None:
    """The column that a template names, if it holds conversations."""
    column = template[1:-1] if template.startswith("{") and template.endswith("}") else template
    if column not in rows.column_names:
        return None
    holds = any(isinstance(row[column], list) and any(map(_present, row[column])) for row in rows)
    return column if holds else None


def _read_row(where: str, row: dict[str, Any], column: str) -> Conversation:
    value, tools = row[column], _read_tools(where, row.get("tools"), strict=True)
    if column != "messages" and isinstance(value, list) and any("from" in _present(turn) for turn in value):
        value = [_from_sharegpt(f"{where}, turn {place}", turn) for place, turn in enumerate(value)]
        system = row.get("system")
        if isinstance(system, str) and system and value[0]["role"] != "system":
            value = [{"role": "system", "content": system}, *value]
    return Conversation(_answered_part(where, f'"{column}"', _read_turns(where, column, value)), tools)


def _answered_part(where: str, what: str, turns: list[Turn]) -> list[Turn]:
    """The turns up to the last one of the assistant, which is the answer."""
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
        raise ValueError(f'{where} has no assistant turn in {what}; the roles in it are {roles}. Expected "assistant"')
    return turns[: last + 1]


def _read_turns(where: str, column: str, value: Any) -> list[Turn]:
    turns = [_present(turn) for turn in value] if isinstance(value, list) else []
    if not turns or not all(isinstance(turn.get("role"), str) for turn in turns):
        raise ValueError(f'{where} has no list of turns with "role" and "content" in "{column}"')
    return [_read_turn(f'{where}, turn {place} ("{turn["role"]}")', turn) for place, turn in enumerate(turns)]


def _read_turn(where: str, turn: Turn) -> Turn:
    content = turn.get("content")
    if isinstance(content, list):
        content = _join_parts(where, content)
    calls = _read_calls(where, turn.get("tool_calls"))
    says_more = turn["role"] == "assistant" and (calls or any(turn.get(key) for key in REASONING_KEYS))
    if not (isinstance(content, str) or (content is None and says_more)):
        found = "is not there" if content is None else f"is a {type(content).__name__}"
        raise ValueError(f"{where}: its content {found}; expected a text")
    found_turn = {key: value for key, value in turn.items() if key not in ("content", "tool_calls")}
    if content is not None:
        found_turn["content"] = content
    if calls:
        found_turn["tool_calls"] = calls
    return found_turn


def _join_parts(where: str, parts: Sequence[Any]) -> str:
    """A content that is written in parts as one text, as templates of vision-language models join them."""
    texts = []
    for place, part in enumerate(map(_present, parts)):
        kind = part.get("type", "text")
        if kind != "text" or not isinstance(part.get("text"), str):
            found = "a text part without text" if kind == "text" else f'a part of type "{kind}"'
            raise ValueError(
                f'{where}: part {place} of its content is {found}; expected {{"type": "text", "text": …}}, since only '
                "text goes through the models. Leave such rows out"
            )
        texts.append(part["text"])
    return "".join(texts)


def _read_calls(where: str, value: Any) -> list[dict[str, Any]]:
    """Tool calls in the form that templates expect: an object "function" with a name and arguments."""
    calls = _parse(value)
    if calls is None:
        return []
    if isinstance(calls, dict):
        calls = [calls]
    read = []
    for call in map(_present, calls if isinstance(calls, list) else [calls]):
        function = _present(call.get("function", call))
        if not isinstance(function.get("name"), str):
            raise ValueError(
                f'{where}: a tool call has no name; expected {{"function": {{"name": …, "arguments": …}}}}'
            )
        if "function" not in call:
            call = {"type": "function"}
        read.append(call | {"function": function})
    return read


def _read_tools(where: str, value: Any, *, strict: bool) -> list[Any] | None:
    """Descriptions of tools: a list of objects, or JSON texts of them; None where others are not asked for strictly."""
    tools = _parse(value)
    if isinstance(tools, list):
        tools = [_parse(tool) for tool in tools]
        if all(isinstance(tool, dict) for tool in tools):
            return tools or None
    if tools in (None, "") or not strict:
        return None
    raise ValueError(f'{where} has no list of objects in "tools"; expected JSON schemas of functions, or nothing')


def _from_sharegpt(where: str, turn: Any) -> Turn:
    turn = _present(turn)
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        raise ValueError(f'{where} is from "{turn.get("from")}"; expected one of {known}')
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if turn["from"] != "function_call":
        return {"role": role, "content": turn.get("value"), **rest}
    calls = _parse(turn.get("value"))
    if not isinstance(calls, dict | list):
        raise ValueError(f'{where} is a function_call whose value is no JSON; expected {{"name": …, "arguments": …}}')
    return {"role": role, "tool_calls": calls, **rest}


def _parse(value: Any) -> Any:
    """What a JSON text says; another value as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _present(value: Any) -> dict[str, Any]:
    """An object without the keys that are null, as tables fill them in; empty if it is no object."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}


def _where(name: str, place: int) -> str:
    return f'ability "{name}": sample {place}'
