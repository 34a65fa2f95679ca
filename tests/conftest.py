"""Tiny, seeded models and their tokenizer, made once for all tests."""

from __future__ import annotations

import os

# Before transformers and datasets are imported, in this process and those that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

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


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Architecture -> (target folder, ability model folder); each pair is made once. The target has its own rope."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = (
                make_model(tiny_config(name), root / "target", seed=1),
                make_model(tiny_config(name), root / "ability", seed=2),
            )
        return made[name]

    return get


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of twenty sums with answers of different lengths."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"q": f"{a}+{b}", "a": str(a + b), "kind": "even" if (a + b) % 2 == 0 else "odd"}
        for a in range(0, 100, 20)
        for b in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def abilities_yml(tmp_path: Path) -> Callable[..., Path]:
    """Write an abilities file: keys of the file, and of its only ability ``sums``."""

    def write(target: Path, ability: Path, dataset: Path, *, top: str = "", ability_keys: str = "") -> Path:
        path = tmp_path / "abilities.yml"
        path.write_text(
            f"target: {target}\nability_model: {ability}\n{top}\n"
            f"abilities:\n  sums:\n    dataset: {dataset}\n    samples: 12\n" + ability_keys
        )
        return path

    return write


@pytest.fixture
def two_abilities(pair_of, tmp_path) -> Path:
    """Two abilities of many small micro-batches."""
    target, ability = pair_of("qwen3")
    rows = [{"q": f"{a}+{b}", "a": str(a + b)} for a in range(100) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset: {tmp_path}/sums.jsonl, prompt: q, answer: a"
    path = tmp_path / "abilities.yml"
    path.write_text(
        f"target: {target}\nability_model: {ability}\nabilities:\n"
        f"  one: {{{data}, samples: 200}}\n  two: {{{data}, samples: 100, seed: 3}}\n"
    )
    return path


@pytest.fixture(autouse=True)
def _fresh_loaders() -> Iterator[None]:
    """mergekit's loader cache lives as long as the process; a path may hold another model in the next test."""
    from mergekit.io.tasks import LoaderCache

    yield
    LoaderCache.loaders.clear()
