"""The engine: a chunk of micro-batches goes through models of a pair segment by segment.

What is done with the outputs of a segment's modules is the criterion's: ``profiling/criteria`` has an engine for each.
Hidden states wait between segments, so a segment is needed once per chunk, however many micro-batches that has. Sums
are added to in the order of the micro-batches, whatever the chunks are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_act.abilities.batches import MicroBatch
from mergekit_act.channels import Layout
from mergekit_act.profiling.inputs import InputSample, TokenPlaces
from mergekit_act.profiling.sums import ChannelSums
from mergekit_act.streaming.hidden import HiddenStates
from mergekit_act.streaming.outputs import OutputForms
from mergekit_act.streaming.segments import Carried, Observer
from mergekit_act.streaming.weights import HeadSlice, PairWeights, Piece, synchronize

__all__ = ["Engine", "ForwardEngine", "Work", "working_bytes"]

# Logits are computed in blocks of rows of at most this many bytes for each model, whatever fits.
_CPU_LOGITS = 1 << 26
_DEVICE_LOGITS = 1 << 28
_PROBED_IDS = 64

Step = Callable[["Work", Sequence[Any]], Sequence[Tensor] | None]


@dataclass
class Work:
    """A micro-batch on its way.

    Attributes:
        batch: the micro-batch, on the device.
        sums: those of its ability.
        calls: what the decoder layers of each model receive besides the hidden state, if that is kept.
        finite: bool ``[batch]``: samples whose effects are neither NaN nor infinite; None if none were seen.
        inputs: where inputs of the target's modules are kept, and those of which tokens.
    """

    batch: MicroBatch
    sums: ChannelSums
    calls: list[list[Any]] = field(default_factory=lambda: [[], []])
    finite: Tensor | None = None
    inputs: tuple[InputSample, TokenPlaces] | None = None


class Engine(ABC):
    """Runs models of a pair over micro-batches.

    Args:
        weights: of the pair, settled.
        layout: the channels.
        vocabulary: token ids below this one are valid.
        device: where the models run.
        tokens: of the largest micro-batch, padding included.
        center_logits: take off each token's mean over the vocabulary where differences of logits are scored.

    Attributes:
        runs: how many of the models run: the target, or both.
        kinds: how many sums a channel has.
        logits: how many numbers a logit takes, in the models' dtype.
        by_differences: whether the second model has the differences of the weights in place of its own.
        scores_loss: whether the whole head is needed, for a loss.
    """

    runs: ClassVar[int] = 2
    kinds: ClassVar[int] = 1
    logits: ClassVar[int] = 2
    by_differences: ClassVar[bool] = False
    scores_loss: ClassVar[bool] = False

    def __init__(
        self,
        weights: PairWeights,
        layout: Layout,
        vocabulary: int,
        device: str,
        tokens: int,
        *,
        center_logits: bool = False,
    ) -> None:
        self.weights, self.layout, self.device = weights, layout, device
        self.models = [model.segmented for model in weights.models]
        self.target = self.models[0]
        self.head = self.target.head_name
        self._vocabulary = vocabulary
        prefixes = [f"{name}." for name in self.target.layer_names]
        self._layers = [tuple(m for m in layout.modules if m.startswith(prefix)) for prefix in prefixes]
        inside = {self.head, *(module for layer in self._layers for module in layer)}
        self._outside = tuple(module for module in layout.modules if module not in inside)
        self.observed = tuple(module for module in layout.modules if module != self.head)
        self.forms = OutputForms(self.target.name, layout, vocabulary, device)
        self._learnt: set[int | None] = set()
        self._shape: tuple[int, ...] = ()  # of a token's hidden state
        self._probed: dict[torch.Size, list[Any]] = {}  # what the layers receive for the token ids they are probed with
        self.keeps_calls = False  # of every micro-batch: they can't be found again from token ids
        # As many rows of logits as fit the limit, whatever the micro-batch: sums depend on it.
        channels = slice_channels(weights)
        self.rows = logit_rows(device, weights.models[0].dtype, channels)
        self.center = self._centers() if center_logits and self.head in layout.parameters else None
        self.prepare(min(self.rows, tokens), channels)

    def prepare(self, rows: int, channels: int) -> None:  # noqa: B027
        """Make what the criterion needs, given the most rows and channels of logits."""

    @staticmethod
    def route(pieces: Sequence[Piece]) -> Sequence[int]:
        """Places of the pieces in the order in which a chunk needs them."""
        return range(len(pieces))

    @classmethod
    def states(cls, layers: int) -> int:
        """How many hidden states of a token wait, of all models that run."""
        return cls.runs

    @classmethod
    def numbers(cls, kept: int, widest: int, hidden: int) -> int:
        """How many numbers a token has in memory, at most, while a layer runs; hidden states that wait excluded.

        Args:
            kept: channels of the layer's modules.
            widest: of these.
            hidden: width of a hidden state.
        """
        # The target's outputs wait; the ability model computes its widest part, from its input and the residual.
        return kept + 3 * widest + 4 * hidden

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Within, the models' outputs are seen, and no gradients are made but where they are asked for."""
        with torch.no_grad(), ExitStack() as stack:  # not inference mode, in which tensors don't count their changes
            for model in self.models[: self.runs]:
                stack.enter_context(model.observing(self.observed))
            yield

    @abstractmethod
    def run(
        self,
        chunk: Sequence[Work],
        hidden: HiddenStates,
        *,
        more: bool = False,
        on_progress: Callable[[float], Any] = lambda tokens: None,
    ) -> None:
        """Add up the sums of a chunk of micro-batches; ``observing`` has to be around it.

        Args:
            chunk: the micro-batches.
            hidden: where their hidden states wait.
            more: whether another chunk follows.
            on_progress: told the tokens that are done, in small parts.

        Raises:
            ValueError: a module's output can't be observed or read.
        """

    @abstractmethod
    def observers(self, work: Work) -> Sequence[Observer]:
        """What sees the outputs of each model that runs, the target's first."""

    def watchers(self, work: Work) -> list[Observer]:
        """The observers; the target's also takes inputs that are to be kept."""
        observers = list(self.observers(work))
        if work.inputs is not None:
            sample, places = work.inputs
            axes, model = self.forms.token_axes, self.target.model
            observers[0] = sample.watching(model, axes, work.batch, places, observers[0])
        return observers

    def take_head_inputs(self, work: Work, normalised: Tensor) -> None:
        """Keep what the target's head receives, ``[batch, tokens, hidden]``, if inputs are to be kept."""
        if work.inputs is not None and self.head in self.layout.parameters:
            sample, places = work.inputs
            sample.take_rows(self.head, normalised, places)

    def offsets(self, *hidden: Tensor) -> Tensor | None:
        """The mean over the vocabulary of what the second head's logits have beyond the first's, if they are centred.

        Args:
            hidden: ``[rows, hidden]`` for each head, or one if the second is the difference.

        Returns:
            float32 ``[rows, 1]``.
        """
        if self.center is None:
            return None
        means = [rows.float() @ mean[:-1, None] + mean[-1] for rows, mean in zip(hidden, self.center, strict=True)]
        return means[-1] - means[0] if len(means) == 2 else means[0]

    def _centers(self) -> list[Tensor]:
        """Mean rows of the heads, float32 ``[hidden + 1]``, the mean bias behind; of their difference just one."""
        rows = max(piece.rows.stop for piece in self.weights.pieces if piece.rows)
        means = [model.mean_head_row(rows).to(self.device) for model in self.weights.models]
        return [means[1] - means[0]] if self.by_differences else means

    @contextmanager
    def embeddings_of(self, chunk: Sequence[Work]) -> Iterator[None]:
        """Have what a chunk needs of the token embeddings in the models; the forms of outputs are learnt before."""
        probed = torch.arange(min(_PROBED_IDS, self._vocabulary), device=self.device)
        with self.weights.embeddings_of([probed, *(work.batch.input_ids.flatten() for work in chunk)]):
            self.learn(None)
            yield

    def learn(self, layer: int | None) -> None:
        """Learn the forms of a layer's outputs, or of those outside of layers, when it is first there."""
        if layer in self._learnt:
            return
        target = self.target

        def run_outside(ids: Tensor, observer: Observer) -> None:
            embedded = target.embed(ids, observer)
            self._shape = embedded.hidden.shape[2:]
            self.keeps_calls = any(not model.calls_follow_ids(ids) for model in self.models[: self.runs])
            self._probed[ids.shape] = embedded.calls if self.keeps_calls else []
            target.normalise(ids, embedded.hidden, observer)

        def run_layer(ids: Tensor, observer: Observer) -> None:
            # The same for the tokens of a shorter batch.
            samples, length = ids.shape
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(length, samples, *self._shape, generator=generator).transpose(0, 1).contiguous()
            hidden = hidden.to(device=self.device, dtype=self.weights.models[0].dtype)
            target.layer(layer or 0, ids, Carried(hidden, self._probed.get(ids.shape, [])), observer)

        modules, run = (self._outside, run_outside) if layer is None else (self._layers[layer], run_layer)
        self.forms.learn(modules, run)
        self._learnt.add(layer)


class ForwardEngine(Engine):
    """Runs the models forward; what their modules put out is scored at once."""

    def run(
        self,
        chunk: Sequence[Work],
        hidden: HiddenStates,
        *,
        more: bool = False,
        on_progress: Callable[[float], Any] = lambda tokens: None,
    ) -> None:
        """Forward, each segment once."""
        pieces = self.weights.pieces
        share = 1 / (2 + len(pieces))

        def advance(step: Step) -> None:
            for place, work in enumerate(chunk):
                keys = [(place, side) for side in range(self.runs)]
                moved = step(work, [hidden.take(key) for key in keys])
                for key, tensor in zip(keys, moved or (), strict=False):
                    hidden.put(key, tensor)
                del moved
                on_progress(work.batch.tokens * share)

        self.weights.fetch()
        with self.embeddings_of(chunk):
            advance(partial(self._embed, self.keeps_calls or len(chunk) == 1))
            synchronize(self.device)
        normalised = False
        for place, piece in enumerate(pieces):
            if piece.layer is None and not normalised:
                advance(self._normalise)
                normalised = True
            with self.weights.present(place, more=more) as heads:
                if piece.layer is None:
                    advance(partial(self._score_heads, heads))
                else:
                    self.learn(piece.layer)
                    advance(partial(self._layer, piece.layer))
        if not normalised:  # the head is excluded
            advance(self._normalise)

    @abstractmethod
    def score_head(self, work: Work, heads: Sequence[HeadSlice], hidden: Sequence[Tensor]) -> None:
        """Score some rows of the head.

        Args:
            work: the micro-batch.
            heads: the slices of both heads.
            hidden: of each model that runs some of the rows ``[rows, hidden]`` that its head receives.
        """

    def _embed(self, keeps_calls: bool, work: Work, _: Sequence[None]) -> Sequence[Tensor]:
        ids = work.batch.input_ids
        embedded = [
            model.embed(ids, observer)
            for model, observer in zip(self.models[: self.runs], self.watchers(work), strict=True)
        ]
        if keeps_calls:
            work.calls = [carried.calls for carried in embedded]
        return [carried.hidden for carried in embedded]

    def _layer(self, layer: int, work: Work, states: Sequence[Tensor]) -> Sequence[Tensor]:
        ids, calls = work.batch.input_ids, work.calls
        return [
            self.models[side].layer(layer, ids, Carried(states[side], calls[side]), observer)
            for side, observer in enumerate(self.watchers(work))
        ]

    def _normalise(self, work: Work, states: Sequence[Tensor]) -> Sequence[Tensor]:
        ids = work.batch.input_ids
        outputs = [
            self.models[side].normalise(ids, states[side], observer)
            for side, observer in enumerate(self.watchers(work))
        ]
        work.calls = [[], []]
        self.take_head_inputs(work, outputs[0])
        return [torch.cat(work.batch.answer_rows(output, 1)) for output in outputs]

    def _score_heads(self, heads: Sequence[HeadSlice], work: Work, states: Sequence[Tensor]) -> None:
        for rows in zip(*(torch.split(state, self.rows) for state in states), strict=True):
            self.score_head(work, heads, rows)


def slice_channels(weights: PairWeights) -> int:
    """The most rows of the heads that are present at a time; 1 if they are not needed."""
    return max((piece.rows.stop - piece.rows.start for piece in weights.pieces if piece.rows), default=1)


def logit_rows(device: str, dtype: torch.dtype, channels: int) -> int:
    """How many rows of logits are computed at once."""
    limit = _CPU_LOGITS if torch.device(device).type == "cpu" else _DEVICE_LOGITS
    return max(1, limit // (channels * dtype.itemsize))


def working_bytes(engine: type[Engine], weights: PairWeights, layout: Layout, tokens: int, longest: int) -> int:
    """About how much device memory a micro-batch needs while a layer runs, hidden states that wait excluded.

    Args:
        engine: the criterion's.
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
        return shape[-1] * (2 * chosen if len(shape) == 2 else 1)  # two models choose other experts

    layers = [[m for m in layout.modules if m.startswith(f"{name}.")] for name in model.segmented.layer_names]
    kept = max(sum(map(width, layer)) for layer in layers)
    widest = max((width(module) for layer in layers for module in layer), default=0)
    numbers = tokens * engine.numbers(kept, widest, text.hidden_size)
    scores = 0
    if getattr(text, "_attn_implementation", None) == "eager":
        scores = getattr(text, "num_attention_heads", 1) * tokens * longest * (model.dtype.itemsize + 4)
    channels = slice_channels(weights)
    logits = channels * min(tokens, logit_rows(model.device, model.dtype, channels))
    return int((engine.logits * logits + numbers) * model.dtype.itemsize + scores)
