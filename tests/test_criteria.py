"""Scores beyond the paper's against plain implementations: whole models, weight gradients, one sample at a time."""

from __future__ import annotations

import pytest
import torch
from oracle import plain_attribution, plain_local
from samples import ARCHITECTURES, as_ability, random_samples

from mergekit_act.profiling import ProfilingSettings, open_pair, profile_pair

EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss")


def settings(criterion: str, **changes) -> ProfilingSettings:
    return ProfilingSettings(**{"criterion": criterion, "device": "cpu", "dtype": "float32"} | changes)


def assert_near(found, expected, tolerance=1e-4):
    """Relative to the largest of a module: single products of gradients may cancel out to nothing."""
    for module, values in expected.items():
        largest = values.abs().max().item()
        torch.testing.assert_close(found[module].double(), values.double(), rtol=1e-3, atol=tolerance * largest)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *EXPERTS])
def test_attribution_and_damage_equal_gradients_of_the_weights(pair_of, name):
    target, ability = pair_of(name)
    pair = open_pair(str(target), str(ability))
    samples = random_samples()
    batch_tokens = {"qwen2": 1, "llama": 64, "gpt2": 70}.get(name, 4096)
    (profile,) = profile_pair(pair, [as_ability(samples)], settings("attribution", batch_tokens=batch_tokens))
    gains, damages = plain_attribution(target, ability, samples, pair.layout)
    assert_near(profile.scores, gains)
    assert_near(profile.damage, damages)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_local_scores_equal_both_models_modules_on_the_targets_inputs(pair_of, name):
    target, ability = pair_of(name)
    pair = open_pair(str(target), str(ability))
    samples = random_samples()
    (profile,) = profile_pair(pair, [as_ability(samples)], settings("local"))
    assert_near(profile.scores, plain_local(target, ability, samples, pair.layout.modules))
