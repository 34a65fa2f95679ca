"""What moving a module's weights changes of its output, for inputs that the target's module receives: ΔW x + Δb."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_act.channels import is_norm, is_router
from mergekit_act.streaming.experts import ExpertOutput, project

__all__ = ["Changes", "multiplied"]


class Changes:
    """The modules of a model that has the differences of two models' weights in place of its own.

    Every module with channels is linear in what it owns, but for norms, which may add a constant to their weights.

    Args:
        model: that model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def of(self, module: str, inputs: Any) -> Tensor:
        """What a module's output changes by.

        Args:
            module: its name.
            inputs: (arguments, keywords) of the target's.

        Returns:
            As the module's output; a router's as its logits ``[tokens, experts]``.
        """
        owner: Any = self._model.get_submodule(module)
        arguments, keywords = inputs
        if is_router(owner):
            hidden, bias = arguments[0], getattr(owner, "bias", None)
            return nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), owner.weight, bias)
        if is_norm(owner):
            return _effect(owner, dict(owner.named_parameters(recurse=False)), arguments, keywords)
        changed: Tensor = owner.forward(*arguments, **keywords)
        return changed

    def of_experts(self, module: str, output: ExpertOutput, rows: Tensor) -> ExpertOutput:
        """Likewise of a projection of fused experts, for the target's routing.

        Args:
            module: the projection's name.
            output: the target's.
            rows: its input ``[pairs, …]``.
        """
        owner, _, projection = module.rpartition(".")
        changed = project(self._model.get_submodule(owner), projection, rows, output.ends)
        return ExpertOutput(changed, output.tokens, output.ends)


def multiplied(norm: nn.Module, arguments: Any, keywords: Any) -> Tensor:
    """What a norm's weights multiply: its input, normalised; float32, as its output."""
    ones = {name: torch.full_like(own, name == "weight") for name, own in norm.named_parameters(recurse=False)}
    return _effect(norm, ones, arguments, keywords)


def _effect(norm: Any, weights: Mapping[str, Tensor], arguments: Any, keywords: Any) -> Tensor:
    """What weights add to a norm's output, in which its own may have a constant added to them.

    In float32: norms change little, and less than the last digit of a narrow output.
    """
    wide = {name: parameter.detach().float() for name, parameter in weights.items()}
    none = {name: torch.zeros_like(parameter) for name, parameter in wide.items()}
    arguments, keywords = _widened(arguments), _widened(keywords)
    with torch.no_grad():
        moved, still = (functional_call(norm, own, arguments, keywords) for own in (wide, none))
    difference: Tensor = moved - still
    return difference


def _widened(values: Any) -> Any:
    """Arguments with float32 in the place of narrower floats."""
    if isinstance(values, dict):
        return {name: _widened(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(map(_widened, values))
    return values.float() if isinstance(values, Tensor) and values.is_floating_point() else values
