"""Second, plain implementations that the package is compared with: whole forwards and hooks, loops and float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

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


def plain_attribution(
    target: Path,
    ability: Path,
    samples: Sequence[tuple[list[int], list[bool]]],
    layout: Layout,
    point: float = 0.0,
    model_class: Any = transformers.AutoModelForCausalLM,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Attribution and damage by gradients of the weights: a whole model, untied, one sample at a time.

    Moving the weights that a channel owns by Δ changes the loss to first order by the product of Δ and their gradient.
    """
    model, other = (model_class.from_pretrained(folder, dtype=torch.float32).eval() for folder in (target, ability))
    theirs = {name: parameter.detach() for name, parameter in other.named_parameters(remove_duplicate=False)}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        own = torch.nn.Parameter(parameter.detach().clone())
        setattr(model.get_submodule(owner), attribute, own)
    changes = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = min(len(parameter), len(theirs[name]))
            changes[name] = torch.zeros_like(parameter)
            changes[name][:rows] = theirs[name][:rows] - parameter[:rows]
            parameter += point * changes[name]
    gains: dict[str, torch.Tensor] = {}
    damages: dict[str, torch.Tensor] = {}
    answers = 0
    for ids, is_answer in samples:
        places = [t for t, answer in enumerate(is_answer) if answer and t > 0]
        answers += len(places)
        tokens = torch.tensor([ids])
        logits = model(input_ids=tokens, use_cache=False).logits[0]
        loss = -logits.float().log_softmax(-1)[[t - 1 for t in places], [ids[t] for t in places]].sum()
        model.zero_grad()
        loss.backward()
        for module in layout.modules:
            effect: torch.Tensor | float = 0.0
            for name, axis in layout.parameters[module]:
                gradient = model.get_parameter(name).grad
                product = (gradient * changes[name]).double()
                kept = {0, axis} if len(layout.channel_shape(module)) == 2 else {axis}
                others = [d for d in range(product.ndim) if d not in kept]
                effect = effect + (product.sum(others) if others else product)
            gains[module] = gains.get(module, 0) - effect
            damages[module] = damages.get(module, 0) + effect**2 / 2
    return {m: g / answers for m, g in gains.items()}, {m: d / answers for m, d in damages.items()}


def plain_local(
    target: Path, ability: Path, samples: Sequence[tuple[list[int], list[bool]]], modules: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Mean absolute difference of both models' modules for the inputs that the target's receive, at answer tokens."""
    model, other = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (target, ability)
    )
    sums: dict[str, torch.Tensor] = {}
    is_answer: list[bool] = []

    def compare(_module, arguments, keywords, output, *, name):
        with torch.no_grad():
            changed = other.get_submodule(name).double()(*_doubled(arguments), **_doubled(keywords))
            same = model.get_submodule(name).double()(*_doubled(arguments), **_doubled(keywords))
            model.get_submodule(name).float()
        if name == "lm_head":
            changed, same = changed - changed.mean(-1, keepdim=True), same - same.mean(-1, keepdim=True)
        rows = _at((changed - same).abs(), len(is_answer), [t for t, answer in enumerate(is_answer) if answer])
        sums[name] = sums.get(name, 0) + rows.sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    counts: dict[str, int] = {}
    busy: set[str] = set()
    for name in modules:

        def hook(module, arguments, keywords, output, name=name):
            if name not in busy:
                busy.add(name)
                compare(module, arguments, keywords, output, name=name)
                busy.remove(name)

        model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for ids, is_answer[:] in samples:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    return {name: total / counts[name] for name, total in sums.items()}


def plain_local_experts(
    target: Path, ability: Path, samples: Sequence[tuple[list[int], list[bool]]]
) -> dict[str, torch.Tensor]:
    """The same of experts and routers: every expert's change for every token, 0 where the target did not choose it."""
    model, other = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (target, ability)
    )
    found: dict[str, list[torch.Tensor]] = {}
    answers: list[int] = []

    def at_experts(module, inputs, *, name):
        hidden, index, _ = inputs
        theirs = other.get_submodule(name)
        transposed = getattr(module, "is_transposed", False)
        sizes = [module.gate_up_proj.shape[2 if transposed else 1], module.down_proj.shape[2 if transposed else 1]]
        up, down = (torch.zeros(len(hidden), len(module.down_proj), size) for size in sizes)
        for t, chosen in enumerate(index.tolist()):
            for e in chosen:
                raw = _expert(module, "gate_up_proj", e, hidden[t])
                between = module._apply_gate(raw[None])[0]
                up[t, e] = _expert(theirs, "gate_up_proj", e, hidden[t]) - raw
                down[t, e] = _expert(theirs, "down_proj", e, between) - _expert(module, "down_proj", e, between)
        found.setdefault(f"{name}.gate_up_proj", []).append(up[answers])
        found.setdefault(f"{name}.down_proj", []).append(down[answers])

    def at_router(module, inputs, *, name):
        hidden = inputs[0].reshape(-1, module.weight.shape[1])
        ours, theirs = (hidden @ one.weight.T + getattr(one, "bias", 0) for one in (module, other.get_submodule(name)))
        found.setdefault(name, []).append((theirs - ours)[answers])

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda m, i, name=name: at_experts(m, i, name=name))
        elif type(module).__name__.lower().endswith("router"):
            module.register_forward_pre_hook(lambda m, i, name=name: at_router(m, i, name=name))
    with torch.no_grad():
        for ids, is_answer in samples:
            answers[:] = [t for t, answer in enumerate(is_answer) if answer]
            model(input_ids=torch.tensor([ids]), use_cache=False)
    return {name: torch.cat(parts).double().abs().mean(0) for name, parts in found.items()}


def _expert(module, weight: str, expert: int, vector: torch.Tensor) -> torch.Tensor:
    matrix = getattr(module, weight)[expert]
    output = (matrix.T if getattr(module, "is_transposed", False) else matrix) @ vector
    return output + getattr(module, f"{weight}_bias")[expert] if hasattr(module, f"{weight}_bias") else output


def _doubled(values):
    if isinstance(values, dict):
        return {name: _doubled(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(map(_doubled, values))
    return values.double() if isinstance(values, torch.Tensor) and values.is_floating_point() else values


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
