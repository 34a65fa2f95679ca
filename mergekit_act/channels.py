"""What a channel is: a model's config gives its modules in order, their channels, and what each channel owns."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

__all__ = [
    "Layout",
    "build_skeleton",
    "channel_layout",
    "is_expert_weight",
    "is_fused_experts",
    "is_router",
    "kind_pattern",
    "layout_of_model",
]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The modules of a model that have channels, and what a channel of each owns.

    Attributes:
        parameters: module -> its (parameter name, channel axis) pairs, in ``named_modules()`` order. Channel i of a
            module owns the slice i along that axis of each parameter. Fused experts are one module per projection.
        tied: groups of parameter names that are one matrix.
        shapes: the shape of every parameter of the model, with and without channels. Empty if a file does not say.
    """

    parameters: Mapping[str, tuple[tuple[str, int], ...]]
    tied: tuple[tuple[str, ...], ...] = ()
    shapes: Mapping[str, Shape] | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules with channels, in order."""
        return tuple(self.parameters)

    def channel_shape(self, module: str) -> Shape:
        """Shape of the module's scores: ``[channels]``, or ``[experts, channels]`` for fused experts."""
        name, axis = self.parameters[module][0]
        shape = self._shape(name)
        return (shape[0], shape[axis]) if len(shape) == 3 else (shape[axis],)

    def channel_count(self, modules: Sequence[str] | None = None) -> int:
        """Number of channels of these modules, or of all."""
        return sum(math.prod(self.channel_shape(module)) for module in (self.modules if modules is None else modules))

    def parameters_per_channel(self, module: str) -> int:
        """How many numbers a channel of this module owns."""
        owned = sum(math.prod(self._shape(name)) for name, _ in self.parameters[module])
        return owned // math.prod(self.channel_shape(module))

    def parameters_owned(self, counts: Mapping[str, int]) -> int:
        """How many numbers a selection owns; a cell of a tied matrix is counted once.

        Args:
            counts: module -> how many of its channels are selected.
        """
        matrices: dict[str, dict[int, tuple[int, int]]] = {}  # parameter -> channel axis -> (selected, all)
        for module, count in counts.items():
            for name, axis in self.parameters[module]:
                matrix = matrices.setdefault(self.tied_names(name)[0], {})
                matrix[axis] = (count, math.prod(self.channel_shape(module)))
        total = 0
        for name, axes in matrices.items():
            cells = math.prod(length for _, length in axes.values())
            untouched = math.prod(length - selected for selected, length in axes.values())
            total += (cells - untouched) * (math.prod(self._shape(name)) // cells)
        return total

    @property
    def head(self) -> str | None:
        """The LM head: rows of a matrix that has the shape of an embedding, whose channels are columns."""
        owned = {(module, name, axis) for module, pairs in self.parameters.items() for name, axis in pairs}
        shapes = self.shapes or {}
        embeddings = {shapes[name] for _, name, axis in owned if axis == 1 and len(shapes.get(name, ())) == 2}
        heads = [module for module, name, axis in owned if axis == 0 and shapes.get(name) in embeddings]
        outside = [module for module in heads if not re.search(r"\.\d+(\.|$)", module)]
        return outside[0] if len(outside) == 1 else None

    @property
    def vocabulary_modules(self) -> tuple[str, ...]:
        """The head, and the embedding of its shape."""
        if self.head is None:
            return ()
        shape = self._shape(self.parameters[self.head][0][0])
        return tuple(m for m, owned in self.parameters.items() if shape in [self._shape(name) for name, _ in owned])

    def parameter_count(self) -> int:
        """Number of parameters of the model, a tied matrix counted once."""
        repeated = {name for group in self.tied for name in group[1:]}
        return sum(math.prod(shape) for name, shape in (self.shapes or {}).items() if name not in repeated)

    @property
    def owned_names(self) -> frozenset[str]:
        """All parameters that channels own slices of."""
        return frozenset(name for owners in self.parameters.values() for name, _ in owners)

    def without_channels(self) -> dict[str, Shape]:
        """Parameters that no channel owns: they are never transferred."""
        owned = self.owned_names
        owned |= {name for group in self.tied if owned & set(group) for name in group}
        return {name: shape for name, shape in (self.shapes or {}).items() if name not in owned}

    def without(self, modules: Collection[str]) -> Layout:
        """The same layout without the channels of some modules; their parameters then have none."""
        kept = {module: owned for module, owned in self.parameters.items() if module not in modules}
        return replace(self, parameters=kept)

    def tied_names(self, name: str) -> tuple[str, ...]:
        """All names of the matrix that this parameter is, itself included."""
        return next((group for group in self.tied if name in group), (name,))

    def fits(self, other: Layout) -> bool:
        """Whether another layout has the same modules, and the same shapes as far as both are known."""
        shapes = self.shapes is None or other.shapes is None or dict(self.shapes) == dict(other.shapes)
        return shapes and list(self.parameters.items()) == list(other.parameters.items()) and self.tied == other.tied

    def differences(self, other: Layout, *, ignore_vocabulary: Sequence[str] = ()) -> list[str]:
        """Say, a sentence each, where another layout has other modules or shapes.

        Args:
            other: the layout to compare with.
            ignore_vocabulary: parameters whose first dimension (token ids) may differ in length.
        """
        found = []
        for module in dict.fromkeys((*self.modules, *other.modules)):
            if module not in other.parameters or module not in self.parameters:
                here = "the first" if module in self.parameters else "the second"
                found.append(f'"{module}" is only in {here}')
                continue
            owned = dict.fromkeys((*self.parameters[module], *other.parameters[module]))
            for name, axis in owned:
                mine, theirs = ((layout.shapes or {}).get(name) for layout in (self, other))
                if mine is not None and theirs is not None and name in ignore_vocabulary:
                    mine, theirs = mine[1:], theirs[1:]
                if mine != theirs or any((name, axis) not in layout.parameters[module] for layout in (self, other)):
                    found.append(f'"{name}" is {_sides(mine)} in the first, {_sides(theirs)} in the second')
        return found

    def _shape(self, name: str) -> Shape:
        if not self.shapes or name not in self.shapes:
            raise ValueError(f'the shape of parameter "{name}" is not known: the file it came from does not say')
        return self.shapes[name]


def kind_pattern(module: str) -> str:
    """The module's name with its indices replaced by ``*``: its kind, and a glob that matches all of that kind.

    >>> kind_pattern("model.layers.11.mlp.up_proj")
    'model.layers.*.mlp.up_proj'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def channel_layout(config: Any, *, trust_remote_code: bool = False) -> Layout:
    """The channel layout of a model, from its config alone (no weights are made).

    Args:
        config: a Transformers config.
        trust_remote_code: allow the model's own code from the Hub.
    """
    return layout_of_model(build_skeleton(config, trust_remote_code=trust_remote_code))


def build_skeleton(config: Any, *, trust_remote_code: bool = False) -> Any:
    """A model whose parameters are on the meta device, tied, in eval mode; its buffers (rotary tables) are real.

    It is built in float32, so that buffers are exact whatever dtype its weights come in.

    Args:
        config: a Transformers config.
        trust_remote_code: allow the model's own code from the Hub.
    """
    # The class that the checkpoint names, where it is a plain Transformers class: a vision-language model is no
    # "causal LM" to the auto class.
    architecture = (getattr(config, "architectures", None) or [""])[0]
    model_class = getattr(transformers, architecture, None)
    with init_empty_weights(include_buffers=False), no_init_weights():
        if model_class is not None and hasattr(model_class, "_from_config"):
            model = model_class._from_config(config, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()  # no_init_weights suppresses it
    return model.eval()


def layout_of_model(model: nn.Module) -> Layout:
    """The channel layout of a model that already exists, on any device."""
    parameters: dict[str, tuple[tuple[str, int], ...]] = {}
    for name, module in model.named_modules():
        for suffix, axes in _channel_axes(module):
            full = ".".join(part for part in (name, suffix) if part)
            parameters[full] = tuple((f"{name}.{parameter}" if name else parameter, axis) for parameter, axis in axes)
    shapes: dict[str, Shape] = {}
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        groups.setdefault(id(parameter), []).append(name)
    tied = tuple(tuple(group) for group in groups.values() if len(group) > 1)
    return Layout(parameters, tied, shapes)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether the module holds one 3-D parameter per projection, ``[experts, …, …]`` (Transformers v5)."""
    return any(p.ndim == 3 and name.endswith("_proj") for name, p in module.named_parameters(recurse=False))


def is_expert_weight(module: nn.Module) -> bool:
    """Whether the module is one projection of all experts, ``weight [experts, out, in]`` (JetMoE)."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)


def is_router(module: nn.Module) -> bool:
    """Whether the module holds a router's ``[experts, hidden]`` weight without being a linear layer."""
    weight = getattr(module, "weight", None)
    named = re.search(r"router|gate$", type(module).__name__, re.IGNORECASE)
    return named is not None and isinstance(weight, nn.Parameter) and weight.ndim == 2


def is_norm(module: nn.Module) -> bool:
    """Whether the module multiplies each channel by a weight of its own."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.ndim == 1


def _channel_axes(module: nn.Module) -> Iterator[tuple[str, tuple[tuple[str, int], ...]]]:
    """Yield (name suffix, (parameter, channel axis)s) for each set of channels the module itself has."""
    own = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter is not None}
    weight, bias = own.get("weight"), own.get("bias")
    with_bias = (("bias", 0),) if bias is not None and bias.ndim == 1 else ()
    if isinstance(module, nn.Embedding):
        yield "", (("weight", 1),)
    elif isinstance(module, Conv1D):
        yield "", (("weight", 1), *with_bias)
    elif isinstance(module, nn.Linear) and weight is not None and weight.ndim == 2:
        yield "", (("weight", 0), *with_bias)
    elif is_norm(module) or is_router(module):
        # A router's bias shifts the same logits as its row, so it goes with it.
        yield "", (("weight", 0), *with_bias)
    elif is_expert_weight(module):
        yield "", (("weight", 1),)
    elif is_fused_experts(module):
        axis = 2 if _is_transposed(module, own) else 1
        for name, parameter in own.items():
            if parameter.ndim == 3 and name.endswith("_proj"):
                biases = ((f"{name}_bias", 1),) if f"{name}_bias" in own else ()
                yield name, ((name, axis), *biases)


def _is_transposed(module: nn.Module, own: Mapping[str, nn.Parameter]) -> bool:
    """Whether experts are stored ``[experts, in, out]`` (gpt-oss, llama4) instead of ``[experts, out, in]``."""
    declared = getattr(module, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    down, hidden = own["down_proj"], getattr(module, "hidden_size", None)
    if hidden is None or (down.shape[1] == hidden) == (down.shape[2] == hidden):
        raise ValueError(f"{type(module).__name__} does not say whether its experts' weights are transposed")
    return bool(down.shape[2] == hidden)


def _sides(shape: Shape | None) -> str:
    return "missing" if shape is None else str(list(shape))
