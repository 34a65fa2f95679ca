"""Tensors of the target that mergekit's definition of its architecture leaves out: planned as well, so none is lost.

mergekit knows names by architecture. Biases that only some checkpoints have, vision towers, experts behind dense layers
and layers for multi-token prediction are in files and not in its definitions; its own methods drop them without a word.
Ours need only the target's own tensors, so what is in its files can always be copied, and transferred where a mask
selects it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference

from mergekit_act.checkpoints import Checkpoint
from mergekit_act.planning.internals import infer_vocabulary_axes, planned

__all__ = ["PlannedCall", "plan_left_out", "record_calls"]

_LAYER = re.compile(r"(?<![^.])(\d+)(?=\.)")  # the first index in a tensor's name


@dataclass(frozen=True)
class PlannedCall:
    """What mergekit's planner was asked to plan: one output tensor, planned or skipped as optional.

    Attributes:
        weight: the output tensor.
        sources: model -> which of its tensors goes into it.
        reader: of the parameters that the config has for it.
    """

    weight: WeightInfo
    sources: dict[ModelReference, WeightInfo]
    reader: Any


@contextmanager
def record_calls(
    planner: Any, locate: Callable[[ModelReference, WeightInfo], WeightInfo]
) -> Iterator[list[PlannedCall]]:
    """While it is entered, every tensor that a ``MergePlanner`` plans or skips is written down.

    Args:
        planner: the planner.
        locate: gives a model's tensor the name under which the model's files have it, as an alias.
    """
    calls: list[PlannedCall] = []
    plan_tensor = planner.plan_tensor

    def recorded(
        weight: WeightInfo, weights_in: list[WeightInfo], models: list[ModelReference], cfg_reader: Any
    ) -> None:
        # Not strict: mergekit gives the last tensors of a config with slices the sources of the first slice.
        sources = {model: locate(model, source) for model, source in zip(models, weights_in, strict=False)}
        call = PlannedCall(weight, sources, cfg_reader)
        calls.append(call)
        if weight.optional and any(source.aliases for source in sources.values()):
            return  # mergekit cannot look for it; it is planned with what has been left out
        plan_tensor(weight, list(sources.values()), models, cfg_reader)

    planner.plan_tensor = recorded
    try:
        yield calls
    finally:
        del planner.plan_tensor


def plan_left_out(
    planner: Any, calls: Sequence[PlannedCall], base: ModelReference, checkpoint: Checkpoint
) -> list[str]:
    """Plan what the target has and the plan lacks.

    Args:
        planner: a ``MergePlanner`` that has planned; tensors are added to it.
        calls: what it was asked to plan.
        base: the target.
        checkpoint: the target's files.

    Returns:
        Tensors that have no place, where slices change the number of layers.
    """
    plan = _Planned(calls, base, checkpoint)
    done = {weight.name for weight, _ in planned(planner)}
    for call in calls:
        source = call.sources.get(base)
        if source is None or call.weight.name in done:
            continue
        if checkpoint.sources(source.name, *(source.aliases or ())):
            # Skipped, because its name is not in the files: there it has the names of an older layout.
            _plan(planner, call.weight, call.sources, call)
    left_out = set(checkpoint.headers) - plan.used()
    if not left_out:
        return []
    converted = plan.conversions(left_out)
    left_out -= {source for sources in converted.values() for source in sources}
    lost = []
    for name in (*converted, *sorted(left_out)):
        places = plan.places(name)
        if places is None:
            lost.append(name)
        for out_name, sources, call in places or ():
            weight = WeightInfo(name=out_name, optional=True, vocabulary_axis=plan.vocabulary_axis(name))
            _plan(planner, weight, sources, call)
    return lost


def _plan(planner: Any, weight: WeightInfo, sources: dict[ModelReference, WeightInfo], call: PlannedCall) -> None:
    # It is there: mergekit would look for an optional one under fewer names, and skip it.
    there = weight.model_copy(update={"optional": False})
    planner.plan_tensor(there, list(sources.values()), list(sources), call.reader)
    _, task = planned(planner).pop()
    planned(planner).append((weight, task.model_copy(update={"output_weight": weight})))


class _Planned:
    """What a plan takes from the target's files, and where in the output its layers are."""

    def __init__(self, calls: Sequence[PlannedCall], base: ModelReference, checkpoint: Checkpoint) -> None:
        self.calls = [call for call in calls if base in call.sources]
        self.base = base
        self.checkpoint = checkpoint
        self._stored = {id(call): self._sources_of(call) for call in self.calls}

    def sources_of(self, call: PlannedCall) -> tuple[str, ...]:
        """The stored tensors of the target that a planned tensor is made of."""
        return self._stored.get(id(call), ())

    def _sources_of(self, call: PlannedCall) -> tuple[str, ...]:
        source = call.sources[self.base]
        names = (source.name, *(source.aliases or ()), *(source.tied_names or ()))
        return self.checkpoint.sources(*names)

    def used(self) -> set[str]:
        """Stored tensors that are in the plan."""
        return {name for sources in self._stored.values() for name in sources}

    def conversions(self, left_out: set[str]) -> dict[str, tuple[str, ...]]:
        """Parameters of Transformers' model that are made of several of these tensors -> which."""
        skeleton = self.checkpoint.skeleton
        found = {}
        for name in () if skeleton is None else dict(skeleton.named_parameters()):
            sources = self.checkpoint.sources(name)
            if len(sources) > 1 and set(sources) <= left_out:
                found[name] = sources
        return found

    def vocabulary_axis(self, name: str) -> int | None:
        """The axis of token ids of a tensor that the plan lacks."""
        return self._axes.get(self.checkpoint.parameter_name(name))

    def places(self, name: str) -> list[tuple[str, dict[ModelReference, WeightInfo], PlannedCall]] | None:
        """Where a tensor goes: (output's name, each model's tensor, a planned tensor beside it).

        Nowhere if the slices leave its layer out; None if it lies behind the layers and these change.
        """
        match = _LAYER.search(name)
        prefix = name[: match.start()] if match else ""
        if match is None or not any(known == prefix for known, _ in self._layers):
            return [(name, {model: WeightInfo(name=name, optional=True) for model in self._loose.sources}, self._loose)]
        layer, rest = int(match[1]), name[match.end() :]
        if (prefix, layer) in self._layers:
            return [self._beside(call, name, rest) for call in self._layers[prefix, layer]]
        if self._keeps_layers(prefix):
            return [(name, {model: WeightInfo(name=name, optional=True) for model in self._loose.sources}, self._loose)]
        return [] if layer < self._layer_count else None

    def _beside(self, call: PlannedCall, name: str, rest: str) -> Any:
        """A tensor of the same layer as a planned one; files may lack a prefix that the plan's names have."""
        sources = {
            model: WeightInfo(
                name=_layer_of(source.name) + rest,
                optional=True,
                aliases=(re.sub(_LAYER, _index_of(source.name), name, count=1),),
            )
            for model, source in call.sources.items()
        }
        return _layer_of(call.weight.name) + rest, sources, call

    @cached_property
    def _loose(self) -> PlannedCall:
        """A tensor that is in no layer."""
        return next((call for call in self.calls if not _LAYER.search(call.weight.name)), self.calls[0])

    @cached_property
    def _layers(self) -> dict[tuple[str, int], list[PlannedCall]]:
        """(name in front of the index, the target's layer) -> a planned tensor of each output layer made of it."""
        found: dict[tuple[str, int], dict[str, PlannedCall]] = {}
        for call in self.calls:
            for name in {call.sources[self.base].name, *self.sources_of(call)}:
                match, out = _LAYER.search(name), _LAYER.search(call.weight.name)
                if match and out:
                    places = found.setdefault((name[: match.start()], int(match[1])), {})
                    places.setdefault(_layer_of(call.weight.name), call)
        return {layer: list(places.values()) for layer, places in found.items()}

    def _keeps_layers(self, prefix: str) -> bool:
        """Whether the target's layers are the output's, each in its place."""
        layers = {layer: calls for (known, layer), calls in self._layers.items() if known == prefix}
        kept = all([int(_index_of(call.weight.name)) for call in calls] == [layer] for layer, calls in layers.items())
        return kept and set(range(self._layer_count)) <= set(layers)

    @cached_property
    def _layer_count(self) -> int:
        return int(getattr(self.checkpoint.config.get_text_config(), "num_hidden_layers", 0))

    @cached_property
    def _axes(self) -> dict[str, int]:
        skeleton = self.checkpoint.skeleton
        return {} if skeleton is None else dict(infer_vocabulary_axes(skeleton))


def _layer_of(name: str) -> str:
    """A tensor's name up to its layer's index, that included."""
    match = _LAYER.search(name)
    return name[: match.end()] if match else ""


def _index_of(name: str) -> str:
    match = _LAYER.search(name)
    return match[1] if match else ""
