"""Second, plain implementations that the package is compared with: whole forwards and hooks, loops and float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
import transformers

from mergekit_act.artifacts import Mask, Profile
from mergekit_act.channels import Layout


def plain_profile(
    target: Path,
    ability: Path,
    samples: Sequence[tuple[list[int], list[bool]]],
    modules: Sequence[str],
    *,
    pad_left: int = 0,
) -> dict[str, torch.Tensor]:
    """Mean absolute difference of every module's output at answer positions, one sample at a time (paper eq. 2).

    Args:
        target: folder of the target.
        ability: folder of the ability model.
        samples: (token ids, whether each is an answer token).
        modules: names of the modules to observe.
        pad_left: tokens of padding put in front of every sample, masked out.
    """
    outputs = []
    for folder in (target, ability):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        seen: list[dict[str, torch.Tensor]] = []
        for name in modules:
            model.get_submodule(name).register_forward_hook(
                # A clone: some models change a module's output in place afterwards.
                lambda _m, _i, output, name=name, seen=seen: seen[-1].__setitem__(name, output.clone())
            )
        with torch.no_grad():
            for ids, _ in samples:
                seen.append({})
                padded = torch.tensor([[0] * pad_left + ids])
                attention = torch.tensor([[0] * pad_left + [1] * len(ids)])
                positions = (attention.cumsum(1) - 1).clamp(min=0)
                model(input_ids=padded, attention_mask=attention, position_ids=positions, use_cache=False)
        outputs.append(seen)
    scores = {}
    for name in modules:
        total, count = 0.0, 0
        for first, second, (ids, is_answer) in zip(*outputs, samples, strict=True):
            length = pad_left + len(ids)
            positions = [pad_left + t for t, answer in enumerate(is_answer) if answer]
            rows = [_at(output[name], length, positions) for output in (first, second)]
            total = total + (rows[1] - rows[0]).abs().sum(0)
            count += len(rows[0])
        scores[name] = total / count
    return scores


def plain_experts(
    target: Path, ability: Path, samples: Sequence[tuple[list[int], list[bool]]]
) -> dict[str, torch.Tensor]:
    """The scores of experts and routers: every expert's outputs for every token, 0 where it was not chosen."""
    dense: list[dict[str, list[torch.Tensor]]] = []
    for folder in (target, ability):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found: dict[str, list[torch.Tensor]] = {}
        answers: list[int] = []

        def at_experts(module, inputs, *, name, found=found, answers=answers):
            hidden, index, _ = inputs
            transposed = getattr(module, "is_transposed", False)
            up = torch.zeros(len(hidden), *module.gate_up_proj.shape[:: 2 if transposed else 1][:2])
            down = torch.zeros(len(hidden), *module.down_proj.shape[:: 2 if transposed else 1][:2])
            for t, chosen in enumerate(index.tolist()):
                for e in chosen:
                    for into, weight, vector in (
                        (up, "gate_up_proj", lambda t=t: hidden[t]),
                        (down, "down_proj", lambda t=t, e=e: module._apply_gate(up[t, e][None])[0]),
                    ):
                        matrix = getattr(module, weight)[e]
                        into[t, e] = (matrix.T if transposed else matrix) @ vector()
                        if hasattr(module, f"{weight}_bias"):
                            into[t, e] += getattr(module, f"{weight}_bias")[e]
            found.setdefault(f"{name}.gate_up_proj", []).append(up[answers])
            found.setdefault(f"{name}.down_proj", []).append(down[answers])

        def at_router(module, inputs, *, name, found=found, answers=answers):
            hidden = inputs[0].reshape(-1, module.weight.shape[1])
            logits = hidden @ module.weight.T + getattr(module, "bias", 0)
            found.setdefault(name, []).append(logits[answers])

        for name, module in model.named_modules():
            if name.endswith(".experts"):
                module.register_forward_pre_hook(lambda m, i, name=name, do=at_experts: do(m, i, name=name))
            elif type(module).__name__.lower().endswith("router"):
                module.register_forward_pre_hook(lambda m, i, name=name, do=at_router: do(m, i, name=name))
        with torch.no_grad():
            for ids, is_answer in samples:
                answers[:] = [t for t, answer in enumerate(is_answer) if answer]
                model(input_ids=torch.tensor([ids]), use_cache=False)
        dense.append(found)
    return {
        name: (torch.cat(dense[1][name]).double() - torch.cat(parts).double()).abs().mean(0)
        for name, parts in dense[0].items()
    }


def _at(output: torch.Tensor, length: int, positions: list[int]) -> torch.Tensor:
    if length not in output.shape[:-1]:  # batch, positions and heads are one dimension
        output = output.reshape(length, -1, output.shape[-1])
    axis = list(output.shape[:-1]).index(length)
    rows = output.double().index_select(axis, torch.tensor(positions))
    return rows.reshape(-1, output.shape[-1])


def plain_merge(
    target: dict[str, torch.Tensor], others: Sequence[tuple[dict[str, torch.Tensor], float, Mask]], *, tied: bool
) -> dict[str, torch.Tensor]:
    """θ_trg + Σ weight · (θ_abl − θ_trg) ⊙ M, cell by cell with boolean masks over whole tensors (paper eq. 4, 5)."""
    merged = {}
    for name, base in target.items():
        change = torch.zeros(base.shape, dtype=torch.float32)
        touched = torch.zeros(base.shape, dtype=torch.bool)
        for state, weight, mask in others:
            cells = torch.zeros(base.shape, dtype=torch.bool)
            for module, chosen in mask.channels.items():
                for owned, axis in mask.layout.parameters[module]:
                    names = mask.layout.tied_names(owned) if tied else (owned,)
                    if name in names:
                        shape = [1] * base.ndim
                        shape[axis] = chosen.shape[-1]
                        if chosen.ndim == 2:  # [experts, channels]
                            shape[0] = len(chosen)
                        cells |= chosen.reshape(shape).expand(base.shape)
            change += torch.where(cells, weight * (state[name].float() - base.float()), torch.zeros(()))
            touched |= cells
        merged[name] = torch.where(touched, (base.float() + change).to(base.dtype), base)
    return merged


def plain_top(profile: Profile, density: float) -> set[tuple[str, int]]:
    """The top channels of a profile: (module, place in it), by Python's sort over all of them; for distinct scores."""
    cells = [(s, m, place) for m, scores in profile.scores.items() for place, s in enumerate(scores.flatten().tolist())]
    k = max(1, len(cells) * Fraction(str(density)) // 1)
    return {(module, place) for _, module, place in sorted(cells, reverse=True)[:k]}


def plain_parameters(channels: set[tuple[str, int]], layout: Layout) -> int:
    """How many numbers channels own, cell by cell; a cell of a tied matrix counts once."""
    cells: set[tuple[str, int]] = set()
    for name, shape in (layout.shapes or {}).items():
        numbers = torch.arange(math.prod(shape)).reshape(shape)
        matrix = min(layout.tied_names(name))
        for module, owned in layout.parameters.items():
            places = [place for its, place in channels if its == module]
            for other, axis in owned:
                if other == name and places:
                    front = numbers.movedim((0, axis), (0, 1)) if len(layout.channel_shape(module)) == 2 else None
                    rows = numbers.movedim(axis, 0) if front is None else front.flatten(0, 1)
                    cells |= {(matrix, cell) for cell in rows[places].flatten().tolist()}
    return len(cells)
