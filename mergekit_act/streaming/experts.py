"""Fused experts and routers (Transformers 5), whose outputs module hooks do not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ExpertOutput", "can_observe_experts", "observed_forward", "project", "router_logits"]

Show = Callable[[str, "ExpertOutput", Tensor], None]


@dataclass(frozen=True)
class ExpertOutput:
    """What one projection of all experts puts out, for the (expert, token) pairs that the router has chosen.

    Attributes:
        rows: ``[pairs, channels]``, with bias, before activation function and routing weight; by expert, then by token.
        tokens: int64 ``[pairs]``: which token each row is for, as its place in the flattened batch.
        ends: for each expert the place behind its last row.
    """

    rows: Tensor
    tokens: Tensor
    ends: tuple[int, ...]

    def at(self, places: Tensor) -> ExpertOutput:
        """The pairs of some tokens only.

        Args:
            places: int64 ``[tokens]``: each token's new place, −1 for those that are left out.
        """
        moved = places[self.tokens]
        chosen = (moved >= 0).nonzero().flatten()
        behind = torch.tensor(self.ends, device=chosen.device)
        ends = torch.searchsorted(chosen, behind).tolist()
        return ExpertOutput(self.rows[chosen], moved[chosen], tuple(ends))

    def keys(self, tokens: int) -> Tensor:
        """int64 ``[pairs]``, ascending: expert × ``tokens`` + token, for tokens below ``tokens``."""
        counts = torch.tensor(self.counts(), device=self.tokens.device)
        experts = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        return experts * tokens + self.tokens

    def counts(self) -> list[int]:
        """Number of tokens of each expert."""
        return [end - start for start, end in zip((0, *self.ends), self.ends, strict=False)]


def can_observe_experts(module: nn.Module) -> bool:
    """Whether a module of fused experts says how it is laid out, as those of ``use_experts_implementation`` do."""
    said = all(
        hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
    )
    return said and module.has_gate and not getattr(module, "has_post_expert_norm", False)  # type: ignore[return-value]


def observed_forward(experts: Any, name: str, show: Show) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A forward for a module of fused experts that computes the same and shows what each projection puts out.

    Args:
        experts: the module, for which ``can_observe_experts`` holds.
        name: its name in the model.
        show: called with (projection's name, output, the rows of its input ``[pairs, …]``).
    """

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.shape[-1]
        order = torch.sort(top_k_index.flatten(), stable=True).indices
        tokens = order // chosen
        ends = tuple(torch.bincount(top_k_index.flatten(), minlength=experts.num_experts).cumsum(0).tolist())
        rows = hidden_states[tokens]
        raw = project(experts, "gate_up_proj", rows, ends)
        show(f"{name}.gate_up_proj", ExpertOutput(raw, tokens, ends), rows)
        rows = experts._apply_gate(raw)
        raw = project(experts, "down_proj", rows, ends)
        show(f"{name}.down_proj", ExpertOutput(raw, tokens, ends), rows)
        weighted = raw * top_k_weights.flatten()[order].unsqueeze(-1)
        unsorted = torch.empty_like(weighted).index_copy_(0, order, weighted)
        mixed: Tensor = unsorted.reshape(-1, chosen, unsorted.shape[-1]).sum(1).to(hidden_states.dtype)
        return mixed

    return forward


def router_logits(router: Any, hidden: Tensor, output: Any) -> Tensor | None:
    """The part of a router's output that is its logits, before softmax, as it is; None if there is none.

    Args:
        router: holds ``weight`` ``[experts, hidden]`` and perhaps ``bias``.
        hidden: its input ``[…, hidden]``.
        output: a tensor or a tuple.
    """
    bias = getattr(router, "bias", None)
    wide = None if bias is None else bias.float()
    expected = functional.linear(hidden.reshape(-1, hidden.shape[-1]).float(), router.weight.float(), wide)
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 0.05
    for part in output if isinstance(output, tuple) else (output,):
        if not (isinstance(part, Tensor) and part.is_floating_point() and part.numel() == expected.numel()):
            continue
        if torch.allclose(part.reshape(expected.shape).float(), expected, rtol=tolerance, atol=tolerance):
            return part
    return None


def project(experts: Any, projection: str, hidden: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Each expert's projection of its own rows, with bias.

    Args:
        experts: the module.
        projection: its weight's name.
        hidden: ``[pairs, …]``, by expert.
        ends: for each expert the place behind its last row.

    Returns:
        ``[pairs, channels]``.
    """
    weight = getattr(experts, projection)
    bias = getattr(experts, f"{projection}_bias") if experts.has_bias else None
    parts = []
    for expert, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        if start < end:
            matrix = weight[expert].T if experts.is_transposed else weight[expert]
            parts.append(functional.linear(hidden[start:end], matrix, None if bias is None else bias[expert]))
    return torch.cat(parts)
