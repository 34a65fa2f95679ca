"""The demo's tokenizer, and how its tiny models are trained and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from mergekit_act.demo.tasks import LANGUAGES, Row

__all__ = ["build_model", "build_tokenizer", "exact_match", "train"]

_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
_BATCH = 128


def build_tokenizer() -> Any:
    """Qwen2's own kind of tokenizer, with one token per digit, and a chat template."""
    digits = [*"+?!", *(digit for digits in LANGUAGES.values() for digit in digits)]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [to_bytes.pre_tokenize_str(digit)[0][0] for digit in digits]
    symbols = dict.fromkeys([*_SPECIAL, *"".join(spelled), *spelled])
    return Qwen2Tokenizer(
        vocab={symbol: place for place, symbol in enumerate(symbols)},
        merges=[tuple(letters) for letters in spelled if len(letters) == 2],
        pad_token="<|pad|>",
        unk_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(_SPECIAL[2:]),
        chat_template=_TEMPLATE,
    )


def build_model(tokenizer: Any, *, rope_theta: float, seed: int = 0) -> Any:
    """An untrained Qwen2 of 0.8 M parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def train(
    model: Any, tokenizer: Any, rows: Sequence[Row], steps: Collection[int], *, learning_rate: float, seed: int
) -> None:
    """Train on random rows, as many of each domain, answer tokens only, a batch per step; changes the model."""
    ids, labels = _encode(tokenizer, rows)
    counts = Counter(row.domain for row in rows)
    weights = torch.tensor([1 / counts[row.domain] for row in rows])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(steps), pct_start=0.1)
    model.train()
    for _ in steps:
        batch = torch.multinomial(weights, _BATCH, replacement=True, generator=generator)
        loss = model(input_ids=ids[batch], labels=labels[batch]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


@torch.inference_mode()
def exact_match(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Share of the rows, all of one domain, whose greedy answer is exactly right."""
    # All prompts of a domain have one length, so they need no padding.
    prompts = [_chat(tokenizer, row, prompt=True) for row in rows]
    ids = torch.tensor(tokenizer(prompts, add_special_tokens=False)["input_ids"])
    longest = max(len(row.answer) for row in rows) + 1
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False, use_cache=True
    )
    answers = tokenizer.batch_decode(output[:, ids.shape[1] :])
    pairs = zip(answers, rows, strict=True)
    right = [answer.partition("<|end|>")[:2] == (row.answer, "<|end|>") for answer, row in pairs]
    return right.count(True) / len(right)


def _chat(tokenizer: Any, row: Row, *, prompt: bool) -> str:
    turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.answer}]
    text: str = tokenizer.apply_chat_template(
        turns[:1] if prompt else turns, tokenize=False, add_generation_prompt=prompt
    )
    return text


def _encode(tokenizer: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = [tokenizer(_chat(tokenizer, row, prompt=False), add_special_tokens=False)["input_ids"] for row in rows]
    length = max(map(len, encoded))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for place, (row, tokens) in enumerate(zip(rows, encoded, strict=True)):
        ids[place, : len(tokens)] = torch.tensor(tokens)
        answer = len(row.answer) + 1
        labels[place, len(tokens) - answer : len(tokens)] = torch.tensor(tokens[-answer:])
    return ids, labels
