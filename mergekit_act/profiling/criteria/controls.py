"""Scores without data, as controls for the activation scores (paper, finding 5): weight change and chance."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_act.artifacts import Profile
from mergekit_act.channels import Layout
from mergekit_act.checkpoints import Checkpoint
from mergekit_act.profiling.pair import ModelPair

__all__ = ["profile_without_data"]


def profile_without_data(pair: ModelPair, criterion: str, *, random_seed: int = 0) -> Profile:
    """A profile by a criterion that needs no samples and no forward pass.

    Args:
        pair: the models.
        criterion: ``weight``: the l2 norm of the change of all that a channel owns, read tensor by tensor;
            ``random``: uniform numbers, so that a mask is a random set of channels.
        random_seed: for ``random``.

    Raises:
        ValueError: another criterion, or a tensor is missing from a checkpoint.
    """
    layout = pair.layout
    if criterion == "weight":
        scores = {module: _weight_change(pair, module) for module in layout.modules}
    elif criterion == "random":
        generator = torch.Generator().manual_seed(random_seed)
        scores = {module: torch.rand(layout.channel_shape(module), generator=generator) for module in layout.modules}
        for module, rows in pair.shared_rows.items():
            scores[module][rows:] = 0
    else:
        raise ValueError(f"criterion is {criterion}; expected weight or random")
    return Profile(
        scores=scores,
        layout=layout,
        criterion=criterion,
        ability=criterion,
        target=pair.target.describe(),
        ability_model=pair.ability_model.describe(),
        data=({"random_seed": random_seed} if criterion == "random" else {})
        | ({"exclude": list(pair.exclude)} if pair.exclude else {}),
        shared_rows=pair.shared_rows,
    )


def _weight_change(pair: ModelPair, module: str) -> Tensor:
    """The l2 norm of each channel's change, float32 ``[channels]`` (``[experts, channels]``)."""
    squares: Tensor | None = None
    of_experts = len(pair.layout.channel_shape(module)) == 2
    for name, axis in pair.layout.parameters[module]:
        target = _read(pair.target, pair.layout, name)
        ability_model = _read(pair.ability_model, pair.ability_layout, name)
        rows = min(len(target), len(ability_model))
        change = ability_model[:rows].to(torch.float32, copy=True).sub_(target[:rows]).square_()
        kept = {0, axis} if of_experts else {axis}
        other = [dimension for dimension in range(change.ndim) if dimension not in kept]
        part = change.sum(dim=other, dtype=torch.float64) if other else change.double()
        if not of_experts and len(part) < target.shape[axis]:
            part = torch.nn.functional.pad(part, (0, target.shape[axis] - len(part)))
        squares = part if squares is None else squares + part
    if squares is None:
        raise ValueError(f'module "{module}" owns no parameters')
    return squares.sqrt().float()


def _read(checkpoint: Checkpoint, layout: Layout, name: str) -> Tensor:
    """A tensor by any of the names that the model ties together."""
    tensor = checkpoint.read(*layout.tied_names(name))
    if tensor is None:
        raise ValueError(f'{checkpoint.reference} has no tensor "{name}"')
    return tensor
