"""Conversations: turns and tools of rows, what chat templates make of them, and what they leave out."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from tiny import make_tokenizer, tiny_config
from tokenizers import AddedToken

from mergekit_act.abilities import AbilitiesFile, Tokenizers, collect_samples, load_abilities
from mergekit_act.abilities import templates as template_module
from mergekit_act.abilities.conversations import Conversation
from mergekit_act.abilities.rendering import ChatRenderer
from mergekit_act.abilities.templates import ChatTemplate
from mergekit_act.artifacts import Mask
from mergekit_act.cards.instructions import Instructions
from mergekit_act.cards.masks import MaskFile
from mergekit_act.channels import Layout
from mergekit_act.evaluation import collect_held_out
from mergekit_act.evaluation.answers import end_tokens

# Short forms of the templates of well-known models, with what matters here.
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
DEEPSEEK_R1 = CHATML.replace(
    "{{ '<|im_start|>' + m.role + '\n' + m.content",
    "{%- set content = m.content.split('</think>')[-1] -%}{{ '<|im_start|>' + m.role + '\n' + content",
)
DEEPSEEK_R1_THINKS = DEEPSEEK_R1.replace(
    "'<|im_start|>assistant\n' }}{%- endif", "'<|im_start|>assistant\n<think>\n' }}{%- endif"
)
QWEN3 = (
    "{%- set ns = namespace(last=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- set content, reasoning = (m.content if m.content is string else ''), '' -%}"
    "{%- if m.reasoning_content is string -%}{%- set reasoning = m.reasoning_content -%}{%- elif '</think>' in content -%}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or reasoning) -%}"
    "{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{%- endif -%}{{ content }}"
    "{%- for c in m.tool_calls or [] -%}{{ '\n<tool_call>\n' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson) + '\n</tool_call>' }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
)
QWEN2 = (
    "{%- if tools -%}{{ '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'Help.') + '\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}"
    "{%- elif messages[0].role != 'system' -%}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{%- endif -%}"
    "{%- for m in messages -%}{%- if not (tools and m.role == 'system') -%}{{ '<|im_start|>' + m.role }}{%- if m.content -%}{{ '\n' + m.content }}{%- endif -%}"
    "{%- for c in m.tool_calls or [] -%}{{ '\n<tool_call>\n' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson) + '\n</tool_call>' }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
HERMES = QWEN2.replace("{%- if m.content -%}", "{%- if m.content and not m.tool_calls -%}").replace(
    "{{ '<|im_start|>' + m.role }}", "{{ '<|im_start|>' + m.role + ('\n' if m.tool_calls else '') }}"
)
DEEPSEEK_V3 = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<|user|>' + m.content }}{%- elif m.role == 'tool' -%}"
    "{{ '<|tool|>' + m.content }}{%- elif m.tool_calls -%}{{ '<|assistant|>' + m.content }}{%- for c in m.tool_calls -%}"
    "{{ '<|call|>' + c.function.name + '\n' + c.function.arguments + '<|end|>' }}{%- endfor -%}{{ '<|im_end|>' }}"
    "{%- else -%}{{ '<|assistant|>' + m.content + '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
LLAMA3 = (
    "{%- if not date_string is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
    "{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}"
    "{{ '<s><|im_start|>system\nToday: ' + date_string + '\n\n' + system + '<|im_end|>' }}"
    "{%- for m in messages if m.role != 'system' -%}{{ '<|im_start|>' + ('ipython' if m.role == 'tool' else m.role) + '\n' }}"
    "{%- if m.tool_calls -%}{%- set c = m.tool_calls[0].function -%}{{ ({'name': c.name, 'parameters': c.arguments} | tojson) + '<|im_end|>' }}"
    "{%- else -%}{{ (m.content | trim) + '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
MISTRAL = (
    "{{ '<s>' }}{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' -%}"
    "{%- for m in messages if m.role != 'system' -%}{%- if m.role == 'user' -%}{{ '<|user|>' + (system if loop.first else '') + m.content + '<|end|>' }}"
    "{%- elif m.tool_calls -%}{%- for c in m.tool_calls -%}{%- if c.id is not defined or c.id | length != 9 -%}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif -%}"
    "{{ '<|call|>' + (c.function | tojson) + c.id }}{%- endfor -%}{{ '<|im_end|>' }}"
    "{%- else -%}{{ ' ' + m.content + '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
)
GEMMA = (
    "{{ '<s>' }}{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' -%}"
    "{%- for m in messages if m.role != 'system' -%}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (system if loop.first else '') + (m.content | trim) + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>model\n' }}{%- endif -%}"
)
SMOLLM3 = "{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}" + CHATML
GPT_OSS = (
    "{{ '<|im_start|>system\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{%- for m in messages -%}{%- if m.tool_calls -%}"
    "{{ '<|im_start|>assistant to=' + m.tool_calls[0].function.name + '<|user|>' + (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}"
    "{%- elif m.role == 'assistant' and loop.last and not add_generation_prompt -%}"
    "{%- if m.thinking -%}{{ '<|im_start|>assistant analysis ' + m.thinking + '<|end|>' }}{%- endif -%}{{ '<|im_start|>assistant final ' + m.content + '<|im_end|>' }}"
    "{%- else -%}{{ '<|im_start|>' + m.role + ' ' + m.content + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant' }}{%- endif -%}"
)
PHI3 = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ '<|im_end|>' }}{%- endif -%}"
)
COHERE = CHATML.replace(
    "'<|im_end|>\n' }}{%- endfor", "('<|end|>' if m.role == 'assistant' else '') + '<|im_end|>\n' }}{%- endfor"
)
GRANITE = "{{ '<|im_start|>system\n' + strftime_now('%B %d, %Y') + '<|im_end|>\n' }}" + CHATML

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASK = {"role": "user", "content": "weather in Oslo?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}
RESULT = {"role": "tool", "content": '{"degrees": 3}'}
ANSWER = {"role": "assistant", "content": "Three."}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    tokenizer = make_tokenizer(template=False)
    special = ("<s>", "<|end|>", "<|call|>", "<|user|>", "<|system|>", "<|assistant|>", "<|tool|>")
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    added = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    tokenizer.bos_token = "<s>"
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def collect(tokenizer_folder, tmp_path):
    """Samples of rows with a template: their texts, their answers, and their data."""
    tokenizers = Tokenizers(str(tokenizer_folder), str(tokenizer_folder))

    def get(rows: list[dict | str], own: str | None = CHATML, ability: dict | None = None, **top):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        if own is not None:
            (tmp_path / "own.jinja").write_text(own)
            top = {"chat_template": str(tmp_path / "own.jinja")} | top
        abilities = {"x": {"dataset": str(data), "samples": len(rows)} | (ability or {})}
        file = AbilitiesFile(target="t", ability_model="a", abilities=abilities, **top)
        found = collect_samples(file, "x", tokenizers)
        decode = tokenizers.target.decode
        texts = [decode(sample.input_ids.tolist()) for sample in found.samples]
        answers = [decode(sample.input_ids[sample.is_answer].tolist()) for sample in found.samples]
        return texts, answers, found.data

    return get


def chat(*turns: dict, **more) -> dict:
    return {"messages": list(turns)} | more


def warnings(caplog) -> str:
    return " ".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def refusal(collect, *arguments, **named) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        collect(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


# The rows


def test_sharegpt_is_a_conversation(collect, caplog):
    turns = [
        {"from": "human", "value": "weather in Oslo?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": '{"degrees": 3}'},
        {"from": "gpt", "value": "Three.", "weight": None},
        {"from": "human", "value": "Thanks"},
    ]
    row = {"conversations": turns, "system": "Be brief.", "tools": json.dumps([WEATHER["function"]])}
    (text,), (answer,), _ = collect([row], QWEN2)
    assert text.startswith("<|im_start|>system\nBe brief.\nTools: [" + json.dumps(WEATHER["function"]))
    assert f'assistant\n{CALLED}<|im_end|>\n<|im_start|>tool\n{{"degrees": 3}}<|im_end|>' in text
    assert answer == "Three.<|im_end|>"
    assert not warnings(caplog)
    assert 'turn 0 is from "nobody"; expected one of human' in refusal(
        collect, [{"conversations": [{"from": "nobody", "value": "x"}]}]
    )
    bad = [{"from": "human", "value": "x"}, {"from": "function_call", "value": "weather()"}]
    assert "turn 1 is a function_call whose value is no JSON" in refusal(collect, [{"conversations": bad}])


def test_sharegpt_columns_may_have_turns_of_roles(collect):
    _, (answer,), _ = collect([{"conversations": [ASK, ANSWER]}])
    assert answer == "Three.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "ability"),
    [
        ({"prompt": [{"role": "system", "content": "s"}, ASK], "completion": [ANSWER]}, None),
        ({"p": [{"role": "system", "content": "s"}, ASK], "a": "Three."}, {"prompt": "p", "answer": "{a}"}),
        ({"q": "weather in Oslo?", "c": [ANSWER], "s": "s"}, {"prompt": "{q}", "answer": "{c}"}),
    ],
)
def test_conversational_prompts_and_completions(collect, row, ability):
    (text,), (answer,), _ = collect([row], ability=ability)
    assert text.endswith("<|im_start|>user\nweather in Oslo?<|im_end|>\n<|im_start|>assistant\nThree.<|im_end|>")
    assert text.startswith("<|im_start|>system\ns") == ("s" not in row)
    assert answer == "Three.<|im_end|>"


def test_texts_in_columns_of_these_names_are_not_guessed_at(collect):
    message = refusal(collect, [{"prompt": "a", "completion": "b"}])
    assert "give prompt and answer. Its columns are prompt, completion" in message


def test_content_in_parts_is_their_text(collect):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?", "image": None}]
    (text,), _, _ = collect(
        [
            chat(
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            )
        ]
    )
    assert "user\nWhat is this?<|im_end|>" in text
    image = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "this?"}]
    message = refusal(collect, [chat({"role": "user", "content": image}, {"role": "assistant", "content": image[1:]})])
    assert 'ability "x": sample 0, turn 0 ("user"): part 0 of its content is a part of type "image"' in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat({"role": "user", "content": None}, ANSWER), 'sample 0, turn 0 ("user"): its content is not there; expected a text'),
        (chat({"role": "user", "content": 3}, {"role": "assistant", "content": 4}), 'sample 0, turn 0 ("user"): its content is a int'),
        (chat(ASK, {"role": "assistant", "content": None, "tool_calls": []}), "its content is not there"),
        (chat(ASK, {"role": "model", "content": "x"}), 'no assistant turn in "messages"; the roles in it are user, model'),
        (chat(ASK, {"role": "assistant", "tool_calls": [{"id": "1"}]}), "a tool call has no name"),
        (chat(ASK, ANSWER, tools="weather"), 'sample 0 has no list of objects in "tools"'),
        (chat(ASK, ANSWER, tools=[1]), 'sample 0 has no list of objects in "tools"'),
        ({"conversations": [{"from": "gpt", "value": None}]}, "its content is not there"),
    ],
)  # fmt: skip
def test_rows_that_are_no_conversations(collect, row, message):
    assert message in refusal(collect, [row])


def test_tools_beside_texts_may_be_anything(collect):
    ability = {"prompt": "q", "answer": "a"}
    for tools, found in (([WEATHER], True), (["hammer"], False), ("hammer", False), (None, False)):
        (text,), _, _ = collect([{"q": "1", "a": "2", "tools": tools}], QWEN2, ability)
        assert ("weather" in text) == found


# Reasoning


def test_reasoning_that_the_template_strips_is_told(collect, caplog):
    rows = [{"q": "2+2", "a": "<think>two and two</think>4"}, {"q": "1+1", "a": "2"}]
    _, answers, data = collect(rows, DEEPSEEK_R1, {"prompt": "q", "answer": "a"})
    assert sorted(answers) == ["2<|im_end|>", "4<|im_end|>"]
    assert 'ability "x": the template leaves out the reasoning in the answers of 1 of 2 samples' in warnings(caplog)
    assert data["remarks"] == {"reasoning": 1}
    caplog.clear()
    _, answers, data = collect(rows, CHATML, {"prompt": "q", "answer": "a"})
    assert "<think>two and two</think>4<|im_end|>" in answers
    assert data["remarks"] == {}
    assert not warnings(caplog)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_key_of_its_own(collect, caplog, key):
    if key != "reasoning_content" and Version(transformers.__version__) < Version("5.21"):
        pytest.skip("Transformers hands templates this key under its own name only; that is told")
    row = chat(ASK, ANSWER | {key: "Oslo is cold."})
    _, (answer,), _ = collect([row], QWEN3)
    assert answer == "<think>\nOslo is cold.\n</think>\n\nThree.<|im_end|>"
    assert not warnings(caplog)
    collect([row], CHATML)
    assert "leaves out the reasoning in the answers of 1 of 1 samples (the first is sample 0)" in warnings(caplog)


def test_generation_prompts_that_begin_the_reasoning(collect, caplog):
    message = refusal(collect, [chat(ASK, ANSWER)], DEEPSEEK_R1_THINKS)
    assert 'they part at "…' in message
    assert "Mend the template (chat_template: FILE)" in message
    own = CHATML.replace("'<|im_start|>assistant\n' }}{%- endif", "'<|im_start|>assistant\n<think>\n' }}{%- endif")
    _, (answer,), _ = collect([chat(ASK, {"role": "assistant", "content": "<think>\ncold\n</think>\nThree."})], own)
    assert answer == "cold\n</think>\nThree.<|im_end|>"
    _, (answer,), _ = collect([chat(ASK, {"role": "assistant", "content": "<think>\ncold"})], own)
    assert answer == "cold<|im_end|>"
    assert not warnings(caplog)


def test_empty_thinking_is_told_with_its_remedy(collect, caplog):
    row = chat(
        ASK,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nWhere?"},
        {"role": "user", "content": "There"},
        ANSWER,
    )
    (text,), (answer,), data = collect([row], QWEN3)
    assert "hm" not in text
    assert answer == "<think>\n\n</think>\n\nThree.<|im_end|>"
    assert data["remarks"] == {"empty thinking": 1}
    assert "writes an empty <think></think> into the answers of 1 of 1 samples" in warnings(caplog)
    assert '"template_kwargs: {enable_thinking: false}" puts it into the prompts' in warnings(caplog)
    caplog.clear()
    (same,), (answer,), data = collect([row], QWEN3, template_kwargs={"enable_thinking": False})
    assert (same, answer, data["remarks"]) == (text, "Three.<|im_end|>", {})
    assert not warnings(caplog)
    caplog.clear()
    collect([row], QWEN3.replace("enable_thinking", "thinking"))
    assert "a template without it can be given" in warnings(caplog)
    caplog.clear()
    _, (answer,), _ = collect([chat(ASK, {"role": "assistant", "content": "<think>\n\n</think>\n\nThree."})], QWEN3)
    assert answer == "<think>\n\n</think>\n\nThree.<|im_end|>"  # as it is written
    assert not warnings(caplog)
    with_reasoning = chat(ASK, ANSWER | {"reasoning_content": "Oslo is cold."})
    message = refusal(collect, [with_reasoning], QWEN3, template_kwargs={"enable_thinking": False})
    assert 'set "template_kwargs: {enable_thinking: …}" otherwise' in message


# Tool calls


@pytest.mark.parametrize("content", [None, "", ...])
def test_tool_calls_are_whole_answers(collect, caplog, content):
    call = {key: value for key, value in CALL.items() if key != "content"} | (
        {} if content is ... else {"content": content}
    )
    rows = [chat(ASK, call, tools=[WEATHER]), chat(ASK, ANSWER)]
    _, answers, _ = collect(rows, QWEN2)
    assert sorted(answers) == [f"{CALLED}<|im_end|>", "Three.<|im_end|>"]
    assert not warnings(caplog)
    _, answers, _ = collect(rows[:1], QWEN2)
    assert answers == [f"{CALLED}<|im_end|>"]


def test_tool_calls_before_the_answer_need_no_content(collect, caplog):
    (text,), (answer,), _ = collect([chat(ASK, CALL, RESULT, ANSWER)], QWEN2)
    assert f'{CALLED}<|im_end|>\n<|im_start|>tool\n{{"degrees": 3}}<|im_end|>' in text
    assert answer == "Three.<|im_end|>"
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("template", "written"), [(QWEN2, '"arguments": '), (LLAMA3, '"parameters": '), (DEEPSEEK_V3, "weather\n")]
)
def test_numbers_in_tool_calls_stay_as_written(collect, template, written):
    """Also where the template wants the arguments as a JSON text."""
    arguments = '{"a": 1.50, "b": [1e5, 12345678901234567890, 1.0, -0], "c": null, "d": []}'
    call = f'{{"function": {{"name": "weather", "arguments": {arguments}}}}}'
    turns = f'[{json.dumps(ASK)}, {{"role": "assistant", "content": "", "tool_calls": [{call}]}}]'
    (_,), (answer,), _ = collect([f'{{"messages": {turns}}}'], template)
    assert written + arguments in answer


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (QWEN2, f"{CALLED}<|im_end|>"),
        (LLAMA3, '{"name": "weather", "parameters": {"city": "Oslo"}}<|im_end|>'),
        (DEEPSEEK_V3, '<|call|>weather\n{"city": "Oslo"}<|end|><|im_end|>'),
        (GPT_OSS, ' to=weather<|user|>{"city": "Oslo"}<|call|>'),
    ],
)
def test_arguments_are_given_as_the_template_takes_them(collect, template, answer, arguments):
    """Objects, as Transformers has them, or JSON texts, as OpenAI and DeepSeek have them."""
    call = {"role": "assistant", "tool_calls": json.dumps([{"name": "weather", "arguments": arguments}])}
    _, answers, data = collect([chat(ASK, call)], template)
    assert answers == [answer]
    assert data["remarks"] == {}


def test_texts_that_json_escapes_are_not_left_out(collect):
    call = {"role": "assistant", "tool_calls": [{"name": "say", "arguments": {"text": 'a "b"\nc'}}]}
    row = chat(ASK, call, tools=[json.dumps(WEATHER)])
    (text,), (answer,), data = collect([row], QWEN2)
    assert json.dumps('a "b"\nc') in answer
    assert f"Tools: [{json.dumps(WEATHER)}]" in text
    assert data["remarks"] == {}


def test_arguments_need_not_be_json(collect):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": "{'city': Oslo"}}]}
    _, (answer,), data = collect([chat(ASK, call)], QWEN2)
    assert '"arguments": "{\'city\': Oslo"' in answer
    assert data["remarks"] == {}


@pytest.mark.parametrize(
    ("template", "row", "remarks"),
    [
        (HERMES, chat(ASK, CALL | {"content": "Let me look."}), {"content": 1}),
        (HERMES, chat(ASK, CALL | {"content": "Let me look."}, RESULT, ANSWER), {"assistant turns": 1}),
        (LLAMA3, chat(ASK, CALL | {"content": "Let me look."}), {"content": 1}),
        (CHATML, chat(ASK, CALL | {"content": "Let me look."}), {"tool calls": 1}),
        (CHATML, chat(ASK, ANSWER, tools=[WEATHER]), {"tools": 1}),
        (CHATML.replace("for m in messages", "for m in messages if m.role != 'system'"), chat({"role": "system", "content": "Be brief."}, ASK, ANSWER), {"system turn": 1}),
        (PHI3.replace("for m in messages", "for m in messages if m.role != 'tool'"), chat(ASK, ANSWER, RESULT, ANSWER), {"tool results": 1}),
        (GEMMA, chat(ASK, {"role": "assistant", "content": "  Three,\n perhaps. \n"}), {}),
    ],
)  # fmt: skip
def test_what_templates_leave_out_is_told(collect, caplog, template, row, remarks):
    _, _, data = collect([row], template)
    assert data["remarks"] == remarks
    for kind in remarks:
        part = "answers" if kind in ("content", "tool calls") else "prompts"
        assert f'ability "x": the template leaves out the {kind} in the {part} of 1 of 1 samples' in warnings(caplog)
    assert bool(warnings(caplog)) == bool(remarks) or template == LLAMA3


def test_ids_that_mistral_wants(collect):
    message = refusal(collect, [chat(ASK, CALL)], MISTRAL)
    assert (
        'ability "x": the chat template cannot render sample 0: Tool call IDs should be alphanumeric strings' in message
    )
    assert "Leave such rows out, or give a template that takes them (chat_template: FILE)" in message
    call = CALL | {"tool_calls": [CALL["tool_calls"][0] | {"id": "abcdefghi"}]}
    _, (answer,), _ = collect([chat(ASK, call)], MISTRAL)
    assert answer == '<|call|>{"name": "weather", "arguments": {"city": "Oslo"}}abcdefghi<|im_end|>'


def test_the_answer_ends_with_the_turn_and_not_behind_it(collect):
    """Phi-3 writes an end of sequence behind the last turn, Command R two tokens at the end of each."""
    row = chat(ASK, ANSWER)
    for template, answer in (
        (PHI3, "Three.<|end|>"),
        (COHERE, "Three.<|end|><|im_end|>"),
        (GPT_OSS, " final Three.<|im_end|>"),
        (MISTRAL, " Three.<|im_end|>"),
        (GEMMA, "Three.<|im_end|>"),
    ):
        assert collect([row], template)[1] == [answer]
    thinks = chat(ASK, ANSWER | {"thinking": "cold"})
    assert collect([thinks], GPT_OSS)[1] == [" analysis cold<|end|><|im_start|>assistant final Three.<|im_end|>"]


def test_generation_ends_where_any_right_answer_ends(tokenizer_folder, tmp_path):
    (tmp_path / "own.jinja").write_text(GPT_OSS)
    asked = [ASK | {"content": f"Weather on day {day}?"} for day in range(4)]
    rows = [chat(ask, answer) for ask, answer in zip(asked, (CALL, ANSWER) * 2, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ability = {"dataset": str(tmp_path / "rows.jsonl"), "samples": 1, "evaluate": {"samples": 3}}
    file = AbilitiesFile(
        target="t", ability_model="a", chat_template=str(tmp_path / "own.jinja"), abilities={"x": ability}
    )
    (held_out,) = collect_held_out(file, Tokenizers(str(tokenizer_folder), str(tokenizer_folder)))
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("qwen2"))
    known = held_out.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|call|>"])
    assert set(known) <= set(end_tokens(model, held_out))
    assert 'to=weather{"city": "Oslo"}' in held_out.references


# The date


@pytest.mark.parametrize(
    ("template", "fixed", "given"),
    [
        (LLAMA3, "26 Jul 2024", "03 Feb 2021"),
        (GPT_OSS, "2024-07-26", "2021-02-03"),
        (SMOLLM3, "26 July 2024", "03 February 2021"),
        (GRANITE, "July 26, 2024", "February 03, 2021"),
    ],
)
def test_dates_are_fixed_and_told_once(collect, caplog, template, fixed, given):
    row = chat(ASK, ANSWER)
    (text,), _, data = collect([row], template)
    assert fixed in text
    assert data["date"] == "2024-07-26"
    collect([row], template)
    assert warnings(caplog).count("the chat template writes the date: it is 2024-07-26 in all samples") == 1
    (text,), _, data = collect([row], template, template_kwargs={"strftime_now": "2021-02-03"})
    assert given in text
    assert data["date"] == "2021-02-03"


def test_a_date_that_the_template_is_given_is_nothing_to_tell(collect, caplog):
    (text,), _, data = collect([chat(ASK, ANSWER)], LLAMA3, template_kwargs={"date_string": "1 Jan 2020"})
    assert "Today: 1 Jan 2020" in text
    assert data["date"] is None
    assert not warnings(caplog)


def test_dates_are_written_as_python_writes_them(tokenizer_folder):
    formats = "%A %d %B %Y|%a %b %j|%H:%M:%S %p|%y-%m|100%%|%D"
    tokenizer = make_tokenizer()
    template = ChatTemplate(
        "x", tokenizer, text="{{ strftime_now('" + formats + "') }}", options={"strftime_now": "2021-02-03"}
    )
    assert template.render(0, [ASK], None) == datetime.datetime(2021, 2, 3).strftime(formats)


def test_dates_in_the_file_are_texts(tmp_path):
    path = tmp_path / "abilities.yml"
    text = "target: t\nability_model: a\ntemplate_kwargs: {strftime_now: %s}\nabilities: {x: {dataset: d}}"
    path.write_text(text % "2021-02-03")
    assert load_abilities(path).template_kwargs == {"strftime_now": "2021-02-03"}
    path.write_text(text % "tomorrow")
    with pytest.raises(ValueError, match="expected one like 2024-07-26, got 'tomorrow'"):
        load_abilities(path)


# A template of one's own


def test_a_template_from_a_file(collect, tmp_path):
    _, _, data = collect([chat(ASK, ANSWER)], CHATML)
    assert data["chat_template"] == str(tmp_path / "own.jinja")
    assert data["chat_template_sha256"] == hashlib.sha256(CHATML.encode()).hexdigest()
    message = refusal(collect, [chat(ASK, ANSWER)], None)
    assert (
        'has no chat template; say "template: plain" (transfer has --template plain) or give it one (chat_template: FILE)'
        in message
    )
    assert "no.jinja does not exist (relative to" in refusal(
        collect, [chat(ASK, ANSWER)], None, chat_template="no.jinja"
    )
    assert "own.jinja is empty" in refusal(collect, [chat(ASK, ANSWER)], " ")
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    assert "is no text in UTF-8" in refusal(
        collect, [chat(ASK, ANSWER)], None, chat_template=str(tmp_path / "latin.jinja")
    )
    message = refusal(collect, [chat(ASK, ANSWER)], "{% if %}")
    assert 'ability "x": the chat template cannot render sample 0' in message
    with pytest.raises(ValueError, match='"template: plain" has no use for chat_template'):
        AbilitiesFile(
            target="t", ability_model="a", template="plain", chat_template="x", abilities={"x": {"dataset": "d"}}
        )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages[9].content + '' }}", "cannot render sample 0"),
        ("{{ 'x' * 10 ** 15 }}", "cannot render sample 0: MemoryError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it has not come to an end in 0.2 seconds"),
    ],
)  # fmt: skip
def test_templates_that_fail_or_do_not_end(collect, monkeypatch, template, reason):
    monkeypatch.setattr(template_module, "SECONDS", 0.2)
    assert reason in refusal(collect, [chat(ASK, ANSWER)], template)


def test_plain_writes_contents_and_nothing_else(collect, caplog):
    row = chat(ASK, ANSWER | {"reasoning_content": "cold"}, tools=[WEATHER])
    (text,), (answer,), data = collect([row], None, template="plain")
    assert (text, answer) == ("weather in Oslo?\nThree.<|im_end|>", "Three.<|im_end|>")
    assert data["remarks"] == {"reasoning": 1, "tools": 1}
    assert 'sample 0 has a turn ("assistant") without a text' in refusal(
        collect, [chat(ASK, CALL)], None, template="plain"
    )


# Length

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("template", "turns", "kept"),
    [
        (CHATML, [SYSTEM], "<|im_start|>system\nBe brief.<|im_end|>\n"),
        (CHATML, [], ""),
        ("{{ '<s>' }}" + CHATML, [], "<s>"),
        ("{{ '<s>' }}" + CHATML, [SYSTEM], "<s><|im_start|>system\nBe brief.<|im_end|>\n"),
        (QWEN2, [], "<|im_start|>system\nHelp.<|im_end|>\n"),
        (LLAMA3, [SYSTEM], "<s><|im_start|>system\nToday: 26 Jul 2024\n\nBe brief.<|im_end|>"),
        (GPT_OSS, [], "<|im_start|>system\nCurrent date: 2024-07-26<|end|>"),
        (GEMMA, [SYSTEM], "<s><|im_start|>user\nBe brief.\n\n"),
        (GEMMA, [], "<s>"),
        (MISTRAL, [SYSTEM], "<s><|user|>Be brief.\n\n"),
        (PHI3, [SYSTEM], "<|system|>\nBe brief.<|end|>\n"),
        ("{{ '<s>' }}{%- if messages[-1].content != 'Three.' %}{{ raise_exception('no') }}{% endif %}" + CHATML.replace("'\n' + m.content", "(m.content | upper)"), [SYSTEM], None),
    ],
)  # fmt: skip
def test_cut_prompts_keep_their_beginning(collect, caplog, template, turns, kept):
    row = chat(*turns, {"role": "user", "content": "abcdefghij" * 20}, ANSWER)
    if kept is None:
        assert "cannot render sample 0: no" in refusal(collect, [row], template)
        return
    (whole,), (answer,), _ = collect([row], template)
    (text,), (same,), data = collect([row], template, max_length=120)
    assert data["prompts_cut"] == 1
    assert text.startswith(kept)
    assert same == answer
    assert whole.endswith(text[len(kept) :])
    assert not whole.endswith(text[max(0, len(kept) - 4) :]) or not kept
    assert "1 prompts were cut from the left to 120 tokens" in warnings(caplog)


def test_a_cut_sample_has_the_length_asked_for(collect, tokenizer_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    row = chat(SYSTEM, {"role": "user", "content": "abcdefghij" * 20}, ANSWER)
    kept = len(tokenizer("<|im_start|>system\nBe brief.<|im_end|>\n", add_special_tokens=False)["input_ids"])
    answer = len("Three.") + 1
    (text,), _, _ = collect([row], max_length=kept + answer + 3)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\nnt\nThree.<|im_end|>"
    (text,), _, _ = collect([row], max_length=kept + answer)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\nThree.<|im_end|>"
    short = chat({"role": "user", "content": "a"}, ANSWER)
    (text,), _, data = collect([row, short], max_length=kept + answer - 1)
    assert data["samples_dropped"] == 1
    assert text.endswith("\na<|im_end|>\n<|im_start|>assistant\nThree.<|im_end|>")
    message = refusal(collect, [row], max_length=kept + answer - 1)
    assert (
        "all 1 answers, with what stays before them (beginning of sequence, system turn), exceed max_length" in message
    )


def test_cut_plain_prompts_keep_their_system_text(collect):
    row = chat({"role": "user", "content": "abcdefghij" * 20}, ANSWER)
    (text,), _, _ = collect([row], None, template="plain", system="Be brief.", max_length=30)
    assert text == "Be brief.\nijabcdefghij\nThree.<|im_end|>"


def test_templates_that_take_no_other_conversations_keep_the_beginning_of_sequence(collect):
    """Where a system turn ends is seen by rendering others; a template may refuse those."""
    strict = (
        "{{ '<s>' }}{%- for m in messages if 'mergekitactnext' in m.content %}{{ raise_exception('no') }}{% endfor %}"
        + CHATML
    )
    row = chat(SYSTEM, {"role": "user", "content": "abcdefghij" * 20}, ANSWER)
    (text,), (answer,), _ = collect([row], strict, max_length=40)
    assert text.startswith("<s>")
    assert "Be brief" not in text
    assert answer == "Three.<|im_end|>"


def test_ready_made_samples_are_cut_as_before(collect):
    rows = [{"input_ids": list(range(3, 23)), "labels": [-100] * 18 + [21, 22]}]
    texts, _, data = collect(rows, None, max_length=5)
    assert data["prompts_cut"] == 1
    assert len(texts[0]) == 5


def test_a_card_names_the_template_that_others_need():
    data = {
        "dataset": "a/b",
        "on_hub": True,
        "chat_template": "own.jinja",
        "chat_template_sha256": "0" * 64,
        "samples": 8,
    }
    source = {
        "criterion": "activation",
        "ability": "x",
        "data": data,
        "target": {"model": "t"},
        "ability_model": {"model": "a"},
    }
    artifact = Mask({}, Layout({}, {}, {}), (source,))
    recipe = Instructions([MaskFile("m", None, Path("m"), "masks/m", "", artifact)], "./t", ["./a"])
    assert recipe.local == ["./t", "./a", "own.jinja"]
    assert "chat_template: own.jinja\n" in recipe.files["abilities.yml"]


def test_one_rendering_serves_all_uses(tokenizer_folder):
    """The prompt that is generated from is the beginning of what is scored."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    template = ChatTemplate("x", tokenizer, text=QWEN2, options={})
    rendering = ChatRenderer(template, tokenizer, None).render(
        0, Conversation([ASK, CALL | {"content": ""}], [WEATHER])
    )
    assert rendering.text[: rendering.answer_start] == template.render(0, [ASK], [WEATHER], prompt=True)
    assert rendering.text[rendering.answer_start : rendering.end_of_turn] == CALLED
