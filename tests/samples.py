"""Random samples, and how close profiles have to be."""

from __future__ import annotations

import torch

from mergekit_act.abilities import AbilitySamples, Sample

ARCHITECTURES = [
    "qwen2", "qwen2-tied", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "olmo2", "falcon",
]  # fmt: skip


def random_samples(seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    """Five samples of unlike lengths; the answer of one is in two pieces."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length, answer in (
        (23, range(15, 23)),
        (9, range(5, 9)),
        (31, range(1, 31)),
        (12, range(11, 12)),
        (17, (3, 4, 9, 16)),
    ):
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        samples.append((ids, [t in answer for t in range(length)]))
    return samples


def as_ability(samples, name: str = "x") -> AbilitySamples:
    return AbilitySamples(name, tuple(Sample(torch.tensor(ids), torch.tensor(answer)) for ids, answer in samples), {})


def assert_close(scores, expected, tolerance: float = 1e-5) -> None:
    assert list(scores) == list(expected)
    for module, column in expected.items():
        torch.testing.assert_close(
            scores[module].double(), column, rtol=tolerance, atol=tolerance * float(column.mean()), msg=module
        )
