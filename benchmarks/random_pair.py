"""Make a pair of checkpoints with the shapes of a known model and random weights, to measure with.

    python benchmarks/random_pair.py qwen2.5-0.5b FOLDER [--dtype bfloat16]

writes FOLDER/target and FOLDER/ability (the target plus small changes), one safetensors file per few layers.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
import transformers
from safetensors.torch import save_file

from mergekit_act.abilities import AbilitySamples, Sample
from mergekit_act.channels import build_skeleton

SHARD_BYTES = 1 << 30


def qwen2(hidden: int, layers: int, heads: int, groups: int, intermediate: int, vocabulary: int, *, tied: bool):
    return transformers.Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        architectures=["Qwen2ForCausalLM"],
    )


CONFIGS = {
    "100m": lambda: qwen2(768, 8, 12, 12, 2304, 32000, tied=False),
    "qwen2.5-0.5b": lambda: qwen2(896, 24, 14, 2, 4864, 151936, tied=True),
    "qwen2.5-1.5b": lambda: qwen2(1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2.5-7b": lambda: qwen2(3584, 28, 28, 4, 18944, 152064, tied=False),
}


def make_pair(name: str, folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """Write both checkpoints; returns their folders."""
    config = CONFIGS[name]()
    config.dtype = dtype
    skeleton = build_skeleton(config)
    folders = (folder / "target", folder / "ability")
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for parameter_name, parameter in skeleton.named_parameters():
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][parameter_name] = parameter.shape
        size += parameter.numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for place, shard in enumerate(shards):
        file = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        for parameter_name, shape in shard.items():
            scale, offset = (0.1, 1.0) if "norm" in parameter_name else (0.02, 0.0)
            target = torch.randn(shape, generator=generator) * scale + offset
            ability = target + torch.randn(shape, generator=generator) * scale * 0.1
            for state, tensor in zip(tensors, (target, ability), strict=True):
                state[parameter_name] = tensor.to(dtype)
            index[parameter_name] = file
        for path, state in zip(folders, tensors, strict=True):
            path.mkdir(parents=True, exist_ok=True)
            save_file(state, path / file, metadata={"format": "pt"})
    for path in folders:
        config.save_pretrained(path)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folders


def pair_in(folder: Path, name: str) -> list[str]:
    """The folders of a bfloat16 pair, made there unless an earlier run has."""
    if not (folder / "ability" / "model.safetensors.index.json").exists():
        make_pair(name, folder, torch.bfloat16)
    return [str(folder / "target"), str(folder / "ability")]


def random_ability(samples: int, tokens: int, vocabulary: int) -> AbilitySamples:
    """Samples of equal length whose second half is the answer."""
    generator = torch.Generator().manual_seed(0)
    is_answer = torch.arange(tokens) >= tokens // 2
    ids = torch.randint(0, vocabulary, (samples, tokens), generator=generator)
    return AbilitySamples("x", tuple(Sample(row, is_answer) for row in ids), {})


@click.command()
@click.argument("name", type=click.Choice(list(CONFIGS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
def main(name: str, folder: Path, dtype: str) -> None:
    print(*make_pair(name, folder, getattr(torch, dtype)))


if __name__ == "__main__":
    main()
