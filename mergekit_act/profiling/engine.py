"""The engine: a chunk of micro-batches goes through both models segment by segment, differences are added up.

For a segment, the target's modules put out their activations, which are kept at the answer tokens; then the ability
model's do, and both are reduced to one sum per channel and dropped. Hidden states wait between segments, so a segment
is needed once per chunk, however many micro-batches that has. Sums are added to in the order of the micro-batches,
whatever the chunks are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergekit_act.abilities.batches import MicroBatch
from mergekit_act.channels import Layout
from mergekit_act.profiling.sums import DifferenceSums
from mergekit_act.streaming.experts import ExpertOutput
from mergekit_act.streaming.hidden import HiddenStates
from mergekit_act.streaming.outputs import KeptOutput, OutputForms
from mergekit_act.streaming.segments import Carried, Observer
from mergekit_act.streaming.weights import HeadSlice, PairWeights, synchronize

__all__ = ["Engine", "Work", "activation_bytes"]

# Logits are compared in blocks of rows of at most this many bytes for each model, whatever fits.
_CPU_LOGITS = 1 << 26
_DEVICE_LOGITS = 1 << 28
_PROBED_IDS = 64

Hidden = tuple[Tensor, Tensor]


@dataclass
class Work:
    """A micro-batch on its way.

    Attributes:
        batch: the micro-batch, on the device.
        sums: those of its ability.
        calls: what the decoder layers of both models receive besides the hidden state, if that is kept.
    """

    batch: MicroBatch
    sums: DifferenceSums
    calls: tuple[list[Any], list[Any]] = field(default_factory=lambda: ([], []))


class Engine:
    """Runs a pair over micro-batches.

    Args:
        weights: of the pair, settled.
        layout: the channels.
        vocabulary: token ids below this one are valid.
        device: where the models run.
        tokens: of the largest micro-batch, padding included.
    """

    def __init__(self, weights: PairWeights, layout: Layout, vocabulary: int, device: str, tokens: int) -> None:
        self._weights, self._vocabulary, self._device = weights, vocabulary, device
        self._target, self._ability_model = (model.segmented for model in weights.models)
        self._head = self._target.head_name
        prefixes = [f"{name}." for name in self._target.layer_names]
        self._layers = [tuple(m for m in layout.modules if m.startswith(prefix)) for prefix in prefixes]
        inside = {self._head, *(module for layer in self._layers for module in layer)}
        self._outside = tuple(module for module in layout.modules if module not in inside)
        self._observed = tuple(module for module in layout.modules if module != self._head)
        self._forms = OutputForms(self._target.name, layout, vocabulary, device)
        self._learnt: set[int | None] = set()
        self._shape: tuple[int, ...] = ()  # of a token's hidden state
        self._probed: dict[torch.Size, list[Any]] = {}  # what the layers receive for the token ids they are probed with
        self._keeps_calls = False  # of every micro-batch: they can't be found again from token ids
        # As many rows of logits as fit the limit, whatever the micro-batch: sums depend on it.
        channels = max(piece.rows.stop - piece.rows.start for piece in weights.pieces if piece.rows)
        self._rows = _logit_rows(device, weights.models[0].dtype, channels)
        size = min(self._rows, tokens) * channels
        self._logits = [torch.empty(size, dtype=model.dtype, device=device) for model in weights.models]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Within, the models' outputs are seen, and no gradients are made."""
        # Not inference mode, in which tensors don't count their changes.
        with torch.no_grad(), self._target.observing(self._observed), self._ability_model.observing(self._observed):
            yield

    def run(
        self,
        chunk: Sequence[Work],
        hidden: HiddenStates,
        *,
        more: bool = False,
        on_progress: Callable[[float], Any] = lambda tokens: None,
    ) -> None:
        """Add up the differences of a chunk of micro-batches; ``observing`` has to be around it.

        Args:
            chunk: the micro-batches.
            hidden: where their hidden states wait.
            more: whether another chunk follows.
            on_progress: told the tokens that are done, in small parts.

        Raises:
            ValueError: a module's output can't be observed or read.
        """
        pieces = self._weights.pieces
        share = 1 / (2 + len(pieces))

        def advance(step: Callable[[Work, Any], Hidden | None]) -> None:
            for place, work in enumerate(chunk):
                keys = ((place, 0), (place, 1))
                moved = step(work, tuple(hidden.take(key) for key in keys))
                for key, tensor in zip(keys, moved or (), strict=False):
                    hidden.put(key, tensor)
                del moved
                on_progress(work.batch.tokens * share)

        self._weights.fetch()
        probed = torch.arange(min(_PROBED_IDS, self._vocabulary), device=self._device)
        with self._weights.embeddings_of([probed, *(work.batch.input_ids.flatten() for work in chunk)]):
            self._learn(None)
            advance(partial(self._embed, self._keeps_calls or len(chunk) == 1))
            synchronize(self._device)
        normalised = False
        for place, piece in enumerate(pieces):
            if piece.layer is None and not normalised:
                advance(self._normalise)
                normalised = True
            with self._weights.present(place, more=more) as heads:
                if piece.layer is None:
                    advance(partial(self._compare_heads, heads))
                else:
                    self._learn(piece.layer)
                    advance(partial(self._layer, piece.layer))

    def _learn(self, layer: int | None) -> None:
        """Learn the forms of a layer's outputs, or of those outside of layers, when it is first there."""
        if layer in self._learnt:
            return
        target = self._target

        def run_outside(ids: Tensor, observer: Observer) -> None:
            embedded = target.embed(ids, observer)
            self._shape = embedded.hidden.shape[2:]
            self._keeps_calls = any(not model.calls_follow_ids(ids) for model in (target, self._ability_model))
            self._probed[ids.shape] = embedded.calls if self._keeps_calls else []
            target.normalise(ids, embedded.hidden, observer)

        def run_layer(ids: Tensor, observer: Observer) -> None:
            # The same for the tokens of a shorter batch.
            samples, length = ids.shape
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(length, samples, *self._shape, generator=generator).transpose(0, 1).contiguous()
            hidden = hidden.to(device=self._device, dtype=self._weights.models[0].dtype)
            target.layer(layer or 0, ids, Carried(hidden, self._probed.get(ids.shape, [])), observer)

        modules, run = (self._outside, run_outside) if layer is None else (self._layers[layer], run_layer)
        self._forms.learn(modules, run)
        self._learnt.add(layer)

    def _observers(self, work: Work) -> tuple[Observer, Observer]:
        """One that keeps the target's outputs, and one that compares the ability model's with them."""
        kept: dict[str, list[KeptOutput]] = {}
        batch, sums, forms = work.batch, work.sums, self._forms

        def keep(module: str, output: Tensor | ExpertOutput) -> None:
            kept.setdefault(module, []).append(forms.keep(module, output, batch))

        def compare(module: str, output: Tensor | ExpertOutput) -> None:
            rows = kept[module].pop(0).read(module)
            if isinstance(output, ExpertOutput):
                sums.add_experts(module, rows, output.at(batch.answer_places), answers=len(batch.sample_of))
            else:
                sums.add(module, rows, batch.answer_rows(output, forms.token_axes[module]))

        return keep, compare

    def _embed(self, keeps_calls: bool, work: Work, _: None) -> Hidden:
        ids = work.batch.input_ids
        keep, compare = self._observers(work)
        first, second = self._target.embed(ids, keep), self._ability_model.embed(ids, compare)
        if keeps_calls:
            work.calls = (first.calls, second.calls)
        return first.hidden, second.hidden

    def _layer(self, layer: int, work: Work, pair: Hidden) -> Hidden:
        ids = work.batch.input_ids
        keep, compare = self._observers(work)
        first, second = (Carried(hidden, calls) for hidden, calls in zip(pair, work.calls, strict=True))
        return (
            self._target.layer(layer, ids, first, keep),
            self._ability_model.layer(layer, ids, second, compare),
        )

    def _normalise(self, work: Work, pair: Hidden) -> Hidden:
        ids = work.batch.input_ids
        keep, compare = self._observers(work)
        outputs = (
            self._target.normalise(ids, pair[0], keep),
            self._ability_model.normalise(ids, pair[1], compare),
        )
        first, second = (torch.cat(work.batch.answer_rows(output, 1)) for output in outputs)
        work.calls = ([], [])
        return first, second

    def _compare_heads(self, heads: Sequence[HeadSlice], work: Work, pair: Hidden) -> None:
        for some, others in zip(torch.split(pair[0], self._rows), torch.split(pair[1], self._rows), strict=True):
            logits, other_logits = (
                _logits(hidden, head, into)
                for hidden, head, into in zip((some, others), heads, self._logits, strict=True)
            )
            work.sums.add(self._head, [logits], [other_logits], first=heads[0].first)


def _logits(hidden: Tensor, head: HeadSlice, into: Tensor) -> Tensor:
    """``[rows, channels]``, in memory that is used again."""
    if head.bias is not None:
        return functional.linear(hidden, head.weight, head.bias)
    shape = (len(hidden), len(head.weight))
    return torch.mm(hidden, head.weight.T, out=into[: shape[0] * shape[1]].view(shape))


def _logit_rows(device: str, dtype: torch.dtype, channels: int) -> int:
    limit = _CPU_LOGITS if torch.device(device).type == "cpu" else _DEVICE_LOGITS
    return max(1, limit // (channels * dtype.itemsize))


def activation_bytes(weights: PairWeights, layout: Layout, tokens: int, longest: int) -> int:
    """About how much device memory a micro-batch needs while a layer of both models runs, hidden states excluded.

    Args:
        weights: of the pair.
        layout: its channels.
        tokens: of the micro-batch, padding included.
        longest: tokens of the longest sample.
    """
    model = weights.models[0]
    config: Any = model.segmented.model.config
    text = config.get_text_config()
    chosen = max(1, int(getattr(text, "num_experts_per_tok", None) or 1))

    def width(module: str) -> int:
        shape = layout.channel_shape(module)
        return shape[-1] * (2 * chosen if len(shape) == 2 else 1)  # the two models choose other experts

    layers = [[m for m in layout.modules if m.startswith(f"{name}.")] for name in model.segmented.layer_names]
    kept = max(sum(map(width, layer)) for layer in layers)
    widest = max(width(module) for layer in layers for module in layer)
    # The target's outputs wait; the ability model computes its widest part, from its input and the residual.
    numbers = tokens * (kept + 3 * widest + 4 * text.hidden_size)
    scores = 0
    if getattr(text, "_attn_implementation", None) == "eager":
        scores = getattr(text, "num_attention_heads", 1) * tokens * longest * (model.dtype.itemsize + 4)
    channels = max(piece.rows.stop - piece.rows.start for piece in weights.pieces if piece.rows)
    logits = 2 * channels * min(tokens, _logit_rows(model.device, model.dtype, channels))
    return int((logits + numbers) * model.dtype.itemsize + scores)
