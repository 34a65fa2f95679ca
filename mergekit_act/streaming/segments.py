"""Run a causal language model one segment at a time: embeddings, each decoder layer, final norm, head.

A segment is run by calling the model's own forward. While it embeds or finishes, the decoder layers' forwards are
replaced by ones that record the exact arguments each layer receives and pass the hidden state on, so every
architecture keeps its own masks, position tables and scalings. Nothing here knows an architecture by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_act.channels import is_expert_weight, is_fused_experts, is_router, kind_pattern
from mergekit_act.streaming.experts import can_observe_experts, observed_forward, router_logits

__all__ = ["Carried", "Observer", "SegmentedModel"]

# Called with a module's name, its output and its input: (arguments, keywords), of experts the rows. What it returns, if
# anything, takes the output's place; that of experts and routers can't be replaced.
Observer = Callable[[str, Any, Any], Any]

_REFUSED_EXPERTS = (
    '{}: the experts of "{}" do not show their outputs; it cannot be profiled with them. '
    "Leave them out with --exclude '{}'"
)


@dataclass
class Carried:
    """What one micro-batch carries from segment to segment.

    Attributes:
        hidden: the hidden state ``[batch, tokens, hidden]`` that the next segment receives.
        calls: for each decoder layer the other arguments it receives. Where they follow from the token ids, they need
            not be kept.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class _Interrupt(Exception):  # noqa: N818
    """Leaves a model's forward where the segment ends."""


class SegmentedModel:
    """A model that can be run by segments, showing what its modules put out.

    Samples are padded on the right and no attention mask is passed: in a causal model the tokens of a sample never
    see what stands behind them, so padding changes nothing at their positions.

    Args:
        model: a causal language model in eval mode. Hooks are added while ``observing``; it is not changed otherwise.

    Raises:
        ValueError: the model's decoder layers or head are not found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name = type(model).__name__
        names = {id(module): name for name, module in model.named_modules()}
        self.layers = _decoder_layers(model)
        self.layer_names = tuple(names[id(layer)] for layer in self.layers)
        self.embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            raise ValueError(f"{self.name} has no linear head; it cannot be profiled")
        self.head = head
        self.head_name = names[id(head)]
        self._returns_tuple: bool | None = None
        self._finishes: bool | None = None
        self._observer: Observer | None = None

    @contextmanager
    def observing(self, modules: tuple[str, ...]) -> Iterator[None]:
        """Hook these modules; what they put out goes to the observer that a segment is run with.

        A projection of fused experts puts out an ``ExpertOutput``, a router its logits, all others a tensor.

        Raises:
            ValueError: the model's experts do not say how they are laid out.
        """
        experts = {name: self._experts(name) for name in dict.fromkeys(map(_owner, modules)) if self._is_experts(name)}
        plain = [name for name in modules if _owner(name) not in experts]
        for name in plain:
            if is_expert_weight(self.model.get_submodule(name)):
                raise ValueError(_REFUSED_EXPERTS.format(self.name, name, kind_pattern(name)))
        handles = [
            self.model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True) for name in plain
        ]
        try:
            with ExitStack() as stack:
                for name, module in experts.items():
                    stack.enter_context(replaced_forward(module, observed_forward(module, name, self._show)))
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _show(self, name: str, output: Any, inputs: Any) -> None:
        if self._observer is not None:
            self._observer(name, output, inputs)

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any, Any], Any]:
        def show(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
            if self._observer is None:
                return None
            whole = isinstance(output, Tensor)
            if not whole:
                output = router_logits(module, arguments[0], output) if is_router(module) else None
            if output is None:
                raise ValueError(f'{self.name}: the output of "{name}" is not one tensor, nor a router\'s logits')
            replaced = self._observer(name, output, (arguments, keywords))
            return replaced if whole else None

        return show

    def _is_experts(self, name: str) -> bool:
        return is_fused_experts(self.model.get_submodule(name))

    def _experts(self, name: str) -> nn.Module:
        module = self.model.get_submodule(name)
        if not can_observe_experts(module):
            raise ValueError(_REFUSED_EXPERTS.format(self.name, name, f"{kind_pattern(name)}.*"))
        return module

    def embed(self, input_ids: Tensor, observer: Observer | None = None) -> Carried:
        """The first segment: all that comes before the decoder layers.

        Args:
            input_ids: int64 ``[batch, tokens]``.
            observer: sees what modules put out.

        Raises:
            ValueError: the model changes the hidden state between decoder layers, or skips one.
        """
        attempts = (False, True) if self._returns_tuple is None else (self._returns_tuple,)
        for returns_tuple in attempts:
            carried = self._record(input_ids, observer, returns_tuple)
            if carried is not None:
                self._returns_tuple = returns_tuple
                return carried
            observer = None  # what the first attempt showed is right
        raise ValueError(
            f"{self.name} does more with the hidden state between decoder layers than pass it on; it cannot be profiled"
        )

    def calls_follow_ids(self, input_ids: Tensor) -> bool:
        """Whether the layers' other arguments follow from the token ids without their embeddings."""
        carried = self.embed(input_ids)
        with self._without_lookup(carried.hidden):
            again = self.embed(input_ids)
        pairs = zip(_tensors(carried.calls), _tensors(again.calls), strict=True)
        return all(torch.equal(first, second) for first, second in pairs)

    def layer(self, index: int, input_ids: Tensor, carried: Carried, observer: Observer | None = None) -> Tensor:
        """Run decoder layer ``index`` on ``carried.hidden``.

        Returns:
            Its output ``[batch, tokens, hidden]``; ``carried`` is not changed.
        """
        calls = carried.calls
        if not calls:
            with self._without_lookup(carried.hidden):
                calls = self.embed(input_ids).calls
        arguments, keywords = calls[index]
        with self._shown_to(observer):
            output = self.layers[index](carried.hidden, *arguments, **keywords)
        self._returns_tuple = isinstance(output, tuple)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def normalise(self, input_ids: Tensor, hidden: Tensor, observer: Observer | None = None) -> Tensor:
        """The segment between the last decoder layer and the head.

        Returns:
            The head's input ``[batch, tokens, hidden]``.
        """
        captured: list[Tensor] = []
        last = len(self.layers) - 1

        def pass_on(index: int) -> Callable[..., Any]:
            def forward(*_args: Any, **_kwargs: Any) -> Any:
                if index == last:
                    self._observer = observer
                return (hidden,) if self._returns_tuple else hidden

            return forward

        def capture(normalised: Tensor) -> Tensor:
            captured.append(normalised)
            raise _Interrupt

        with (
            self._replaced([pass_on(index) for index in range(last + 1)]),
            replaced_forward(self.head, capture),
            self._without_lookup(hidden),
        ):
            self._run(input_ids)
        return captured[0]

    def finish(self, logits: Tensor) -> Tensor:
        """What the model makes of its head's outputs, channel by channel: softcapping, scaling; mostly nothing.

        Args:
            logits: ``[rows, channels]``, of any channels.

        Returns:
            The logits of the model; ``logits`` itself if they are the same.
        """
        if self._finishes is None:
            probed = torch.linspace(-100, 100, 8, device=logits.device, dtype=logits.dtype).view(2, 4)
            self._finishes = not torch.equal(self._finished(probed).to(probed.dtype), probed)
        return self._finished(logits) if self._finishes else logits

    def _finished(self, logits: Tensor) -> Tensor:
        ids = torch.zeros(1, 1, dtype=torch.long, device=logits.device)
        width = self.model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        hidden = logits.new_zeros(1, 1, width)

        def pass_on(*_args: Any, **_kwargs: Any) -> Any:
            return (hidden,) if self._returns_tuple else hidden

        with (
            self._replaced([pass_on] * len(self.layers)),
            replaced_forward(self.head, lambda _: logits[None]),
            self._without_lookup(hidden),
        ):
            finished: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return finished

    @contextmanager
    def _without_lookup(self, like: Tensor) -> Iterator[None]:
        """The token embedding puts out zeros, so that the model's forward needs none of its rows."""
        width = self.embedding.weight.shape[-1]

        def forward(input_ids: Tensor) -> Tensor:
            return like.new_zeros(*input_ids.shape, width)

        with replaced_forward(self.embedding, forward):
            yield

    def _record(self, input_ids: Tensor, observer: Observer | None, returns_tuple: bool) -> Carried | None:
        """Embed and record the layers' arguments; None if the layers don't get what the one before returned."""
        carried = Carried(torch.empty(0))
        last = len(self.layers) - 1

        def record(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                self._observer = None
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if index == 0:
                    carried.hidden = hidden
                mixes = any(tensor is hidden for tensor in _tensors((args[1:], kwargs)))
                if hidden is not carried.hidden or index != len(carried.calls) or mixes:
                    raise _Interrupt
                carried.calls.append((args[1:], kwargs))
                if index == last:
                    raise _Interrupt
                return (hidden,) if returns_tuple else hidden

            return forward

        with self._replaced([record(index) for index in range(last + 1)]), self._shown_to(observer):
            try:
                self._run(input_ids)
            except (AttributeError, IndexError, TypeError, ValueError):
                # A tensor where the model unpacks a tuple, or the other way round.
                if not carried.calls:
                    raise
        return carried if len(carried.calls) == len(self.layers) else None

    def _run(self, input_ids: Tensor) -> None:
        try:
            self.model(input_ids=input_ids, use_cache=False)
        except _Interrupt:
            pass
        finally:
            self._observer = None

    @contextmanager
    def _shown_to(self, observer: Observer | None) -> Iterator[None]:
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    @contextmanager
    def _replaced(self, forwards: list[Callable[..., Any]]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, forward in zip(self.layers, forwards, strict=True):
                stack.enter_context(replaced_forward(layer, forward))
            yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _owner(name: str) -> str:
    """The module that a layout's name stands in: of ``mlp.experts.down_proj`` the experts."""
    return name.rpartition(".")[0]


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost list of modules that is as long as the config says there are layers."""
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    find: Any = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    # A vision tower's list can be as long as the decoder's.
    for module in (decoder if isinstance(decoder, nn.Module) else model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers; it cannot be profiled")
