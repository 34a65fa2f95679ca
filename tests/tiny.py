"""Tiny, seeded models, their tokenizer, and a small profile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from mergekit_act.artifacts import Profile
from mergekit_act.channels import Layout

LAYOUT = Layout(
    parameters={"b.linear": (("b.linear.weight", 0), ("b.linear.bias", 0)), "a.norm": (("a.norm.weight", 0),)},
    tied=(),
    shapes={"b.linear.weight": (4, 3), "b.linear.bias": (4,), "a.norm.weight": (3,)},
)


def vision_language_config(*, tied: bool = False) -> transformers.Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = SIZES | {"rope_parameters": rope}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    ids = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


VOCABULARY = 128


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def tiny_config(name: str, **changes: Any) -> Any:
    """A config of two small layers; the name is an architecture's; qwen2 also as qwen2-tied."""
    heads = {"head_dim": 8}
    makers: dict[str, Callable[[], Any]] = {
        "qwen2": lambda: transformers.Qwen2Config(**SIZES | {"tie_word_embeddings": False} | changes),
        "qwen2-tied": lambda: transformers.Qwen2Config(**SIZES | {"tie_word_embeddings": True} | changes),
        "llama": lambda: transformers.LlamaConfig(**SIZES | changes),
        "mistral": lambda: transformers.MistralConfig(**SIZES | changes),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES | heads | changes),
        "gemma2": lambda: transformers.Gemma2Config(**SIZES | heads | {"sliding_window": 8} | changes),
        "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES | heads | {"sliding_window": 8} | changes),
        "gpt2": lambda: transformers.GPT2Config(**GPT2_SIZES | changes),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | changes
        ),
        "phi3": lambda: transformers.Phi3Config(**SIZES | changes),
        "olmo2": lambda: transformers.Olmo2Config(**SIZES | changes),
        "falcon": lambda: transformers.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2, **changes
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **SIZES
            | heads
            | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
            | changes
        ),
        "mixtral": lambda: transformers.MixtralConfig(
            **SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2} | changes
        ),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **SIZES | heads | {"num_local_experts": 4, "num_experts_per_tok": 2} | changes
        ),
    }
    return makers[name]()


def make_tokenizer(*, template: bool = True) -> Any:
    """One token per ASCII character; a turn ends with <|im_end|> and a newline, as Qwen's do.

    It is Qwen2's kind of tokenizer: Transformers takes that class for a qwen2 folder, whatever was saved there.
    """
    symbols = ["<pad>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ", *map(chr, range(33, 127))]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={symbol: i for i, symbol in enumerate(symbols)},
        merges=[],
        pad_token="<pad>",
        unk_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    return tokenizer


def make_model(config: Any, folder: Path, *, seed: int, tokenizer: Any | None = None) -> Path:
    """Save a random model whose every parameter, norms and biases too, differs from seed to seed."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def make_vision_language_model(folder: Path, *, seed: int, tied: bool = False) -> Path:
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(vision_language_config(tied=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def profile(**changes) -> Profile:
    values = {
        "scores": {"b.linear": torch.tensor([4.0, 3.0, 2.0, 1.0]), "a.norm": torch.tensor([0.5, 0.0, 2.5])},
        "layout": LAYOUT,
        "criterion": "activation",
        "ability": "science-en",
        "target": {"model": "t", "revision": None, "fingerprint": "00"},
        "ability_model": {"model": "a", "revision": None, "fingerprint": "11"},
        "samples": 3,
        "answer_tokens": 17,
        "dtype": "bfloat16",
        "data": {"seed": 0},
    }
    return Profile(**values | changes)
