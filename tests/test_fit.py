"""Fitted rows against the formula written down: whole matrices in float64, row by row."""

from __future__ import annotations

import pytest
import torch
import transformers
from merges import act_config, merged, random_mask
from samples import as_ability, random_samples

from mergekit_act.abilities import AbilitySamples
from mergekit_act.artifacts import Inputs, save_inputs
from mergekit_act.channels import Layout
from mergekit_act.profiling import ProfilingSettings, open_pair
from mergekit_act.profiling.scoring import measure_pair

SETTINGS = {"device": "cpu", "dtype": "float32", "batch_tokens": 40, "quiet": True}
ROLES = {"one": "recover", "two": "keep"}


def two_abilities() -> list[AbilitySamples]:
    return [as_ability(random_samples(), "one"), as_ability(random_samples(1), "two")]


def inputs_of(target, ability, **changes) -> Inputs:
    pair = open_pair(str(target), str(ability))
    return measure_pair(pair, two_abilities(), ProfilingSettings(**SETTINGS | changes), roles=ROLES)[1]


def parameters_of(folder) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters(remove_duplicate=False))


def plain_fit(change: torch.Tensor, recovered: torch.Tensor, kept: torch.Tensor, keep: float, ridge: float):
    """δ = ΔW G_rec (G_rec + μ G_keep + λ)⁻¹ for rows ``[rows, width]``."""
    recovered, kept = recovered.double(), kept.double()
    first, second = (x.T @ x / max(1, len(x)) for x in (recovered, kept))
    damping = ridge * first.diagonal().mean() * torch.eye(len(first), dtype=torch.float64)
    return change.double() @ first @ torch.linalg.inv(first + keep * second + damping)


def expected_change(
    inputs: Inputs, layout: Layout, module: str, name: str, change: torch.Tensor, keep: float, ridge: float
) -> torch.Tensor:
    """What all of a parameter changes by, were all of its channels selected."""
    axis = dict(layout.parameters[module])[name]
    source = inputs.sources[module]
    recovered, kept = (inputs.tensors[f"{role}.{source}"].double() for role in ("recover", "keep"))
    if name.endswith("bias"):
        return change.double() / (1 + keep + ridge)
    if recovered.ndim == 1:
        shares = recovered / (recovered + keep * kept + ridge * recovered.mean())
        return change.double() * (shares if change.ndim == 1 else shares[:, None])
    if change.ndim == 3:
        which = [inputs.tensors[f"{role}.{source}.expert"] for role in ("recover", "keep")]
        rows = change.movedim(axis, 1)
        fitted = torch.stack(
            [
                plain_fit(rows[e], recovered[which[0] == e], kept[which[1] == e], keep, ridge)
                if (which[0] == e).any()
                else torch.zeros_like(rows[e]).double()
                for e in range(len(rows))
            ]
        )
        return fitted.movedim(1, axis)
    return plain_fit(change.movedim(axis, 0), recovered, kept, keep, ridge).movedim(0, axis)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_fitted_merges_equal_the_formula_row_by_row(pair_of, tmp_path, name, keep):
    target, ability = pair_of(name)
    tied = name in ("gpt2", "gemma2")
    options = {"exclude": ["lm_head"]} if tied else {}
    mask = random_mask(target, ability, tmp_path / "m.safetensors", **options)
    inputs = inputs_of(target, ability)
    save_inputs(inputs, tmp_path / "inputs.safetensors")
    settings = {"weight": 0.7, "mask": str(tmp_path / "m.safetensors"), "fit": str(tmp_path / "inputs.safetensors")}
    settings |= {"fit_keep": keep, "fit_ridge": 0.1}
    merged(act_config(target, (ability, settings)), tmp_path / "out")
    ours, theirs, result = map(parameters_of, (target, ability, tmp_path / "out"))
    seen = 0
    for module, chosen in mask.channels.items():
        for parameter, axis in mask.layout.parameters[module]:
            change = theirs[parameter] - ours[parameter]
            fitted = expected_change(inputs, mask.layout, module, parameter, change, keep, 0.1)
            shape = [1] * change.ndim
            shape[axis] = chosen.shape[-1]
            if chosen.ndim == 2:
                shape[0] = len(chosen)
            cells = chosen.reshape(shape).expand(change.shape)
            expected = torch.where(cells, ours[parameter].double() + 0.7 * fitted, ours[parameter].double())
            largest = fitted.abs().max().item()
            torch.testing.assert_close(result[parameter].double(), expected, rtol=1e-5, atol=1e-4 * largest, msg=module)
            assert torch.equal(result[parameter][~cells], ours[parameter][~cells])
            seen += 1
    assert seen > 10
