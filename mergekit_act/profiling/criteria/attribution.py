"""How the loss of an ability changes when a channel moves: to first order, and for abilities to keep to second order.

With y the output of a channel and L the negative log-likelihood of a sample's answer tokens in the target, moving the
channel's weights by ΔW, Δb changes L to first order by Σ_t ∂L/∂y_t · (ΔW x_t + Δb), over all tokens (attribution
patching). The sum over samples is the attribution, with its sign turned: what the loss falls by. Half the sum of
squares is the damage: with the empirical Fisher information for the Hessian, what the loss of an ability that the
target has rises by. Both are divided by the number of answer tokens.

The backward pass goes segment by segment. Hidden states of the forward pass are kept; from the head down each layer
runs again with gradients of its activations only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergekit_act.profiling.changes import Changes
from mergekit_act.profiling.engine import Engine, Work
from mergekit_act.streaming.experts import ExpertOutput
from mergekit_act.streaming.hidden import HiddenStates
from mergekit_act.streaming.segments import Carried, Observer
from mergekit_act.streaming.weights import HeadSlice, Piece, synchronize

__all__ = ["AttributionEngine"]

_GRADIENT = "gradient"  # key of a micro-batch's, among its hidden states
# Products of gradients and changes are computed for so many numbers at a time.
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 26


@dataclass
class _Answers:
    """Where a micro-batch's answer tokens are predicted.

    Attributes:
        samples: int64 ``[answers]``: the sample of each.
        places: int64 ``[answers]``: the position before it, which predicts it.
        labels: int64 ``[answers]``: its token id.
        hidden: ``[answers, hidden]``: what the head receives there.
        total: float32 ``[answers]``: log of the sum of the exponentials of all logits so far.
        gradient: float32 ``[answers, hidden]``: of the loss, for ``hidden``.
    """

    samples: Tensor
    places: Tensor
    labels: Tensor
    hidden: Tensor
    total: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, work: Work, normalised: Tensor) -> _Answers:
        """Of a micro-batch whose head receives ``[batch, tokens, hidden]``."""
        batch = work.batch
        predicted = batch.position_of > 0
        samples, positions = batch.sample_of[predicted], batch.position_of[predicted]
        hidden = normalised[samples, positions - 1]
        return cls(
            samples,
            positions - 1,
            batch.input_ids[samples, positions],
            hidden,
            torch.full((len(samples),), -torch.inf, device=hidden.device),
            torch.zeros_like(hidden, dtype=torch.float32),
        )


class AttributionEngine(Engine):
    """The target, or a point on the line from it to the ability model, runs forward and backward."""

    runs = 1
    kinds = 2
    logits = 12
    by_differences = True
    scores_loss = True

    @staticmethod
    def route(pieces: Sequence[Piece]) -> Sequence[int]:
        """Layers upwards, the head twice, layers downwards."""
        layers = [place for place, piece in enumerate(pieces) if piece.layer is not None]
        heads = [place for place, piece in enumerate(pieces) if piece.layer is None]
        return [*layers, *heads, *heads, *reversed(layers)]

    @classmethod
    def states(cls, layers: int) -> int:
        """Those between all layers, the answers' and two gradients."""
        return layers + 4

    @classmethod
    def numbers(cls, kept: int, widest: int, hidden: int) -> int:
        """A layer with its graph: inputs, outputs, and what activation functions and attention keep."""
        return 3 * kept + 6 * widest + 10 * hidden

    def prepare(self, rows: int, channels: int) -> None:
        """Make what computes changes."""
        self._changes = Changes(self.models[1].model)
        self._block = _CPU_BLOCK if torch.device(self.device).type == "cpu" else _DEVICE_BLOCK
        self._reached: set[str] = set()

    def run(
        self,
        chunk: Sequence[Work],
        hidden: HiddenStates,
        *,
        more: bool = False,
        on_progress: Callable[[float], Any] = lambda tokens: None,
    ) -> None:
        """Add up attribution and damage of a chunk of micro-batches; ``observing`` has to be around it.

        Raises:
            ValueError: a module's output can't be observed or read, no gradient reaches it, or the layers receive
                something that depends on the token embeddings besides the hidden state.
        """
        pieces, route = self.weights.pieces, self.weights.route
        layers = sum(piece.layer is not None for piece in pieces)
        heads = len(pieces) - layers
        share = 1 / (4 * layers + 2 * heads + 4)
        answers: list[_Answers] = []

        def advance(step: Callable[[int, Work], None], steps: int = 1) -> None:
            for place, work in enumerate(chunk):
                step(place, work)
                on_progress(work.batch.tokens * share * steps)

        self.weights.fetch()
        with self.embeddings_of(chunk):
            if self.keeps_calls:
                raise ValueError(
                    f"{self.target.name}: its layers receive something that depends on the token embeddings besides "
                    "the hidden state, which attribution does not follow. Use --criterion local"
                )
            keeps = len(chunk) == 1
            advance(partial(self._keep_embedded, hidden, keeps))
            synchronize(self.device)
            for step in range(layers):
                with self.weights.present(step, more=more):
                    self.learn(pieces[route[step]].layer)
                    advance(partial(self._keep_layer, hidden, step))
            advance(lambda place, work: answers.append(self._find_answers(hidden, layers, place, work)))
            for step in range(layers, layers + heads):
                with self.weights.present(step, more=more) as slices:
                    advance(partial(self._add_exponentials, answers, slices[0]))
            for step in range(layers + heads, layers + 2 * heads):
                with self.weights.present(step, more=more) as slices:
                    advance(partial(self._attribute_head, answers, slices))
            advance(lambda place, work: self._back_through_norm(hidden, layers, place, work, answers[place]))
            answers.clear()
            for step in range(layers + 2 * heads, len(route)):
                with self.weights.present(step, more=more):
                    advance(partial(self._back_through_layer, hidden, pieces[route[step]].layer or 0), 3)
            advance(partial(self._back_through_embedding, hidden))
            synchronize(self.device)
        unreached = [module for module in self.observed if module not in self._reached]
        if unreached:
            raise ValueError(
                f"{self.target.name}: no gradient of the loss reaches {len(unreached)} modules, the first is "
                f'"{unreached[0]}"; leave them out with --exclude, or use --criterion local'
            )

    def observers(self, work: Work) -> Sequence[Observer]:
        """One that adds a module's effects up as soon as the gradient of its output is known."""
        batch = work.batch

        def see(module: str, output: Tensor | ExpertOutput, inputs: Any) -> Tensor | None:
            if isinstance(output, ExpertOutput):
                attribute_experts = partial(self._attribute_experts, work, module, output, inputs.detach())
                output.rows.register_hook(attribute_experts)  # type: ignore[no-untyped-call]
                return None
            replaced = None
            if not output.requires_grad:  # an embedding: the graph begins here, for each sample by itself
                samples = len(batch.input_ids)
                alone = output.detach()
                if alone.shape[0] == 1 or self.forms.token_axes[module] == 0:
                    alone = (alone if alone.shape[0] == 1 else alone[None]).expand(samples, *alone.shape[1:])
                output = replaced = alone.clone().requires_grad_().clone()
            versions = [tensor._version for tensor in _tensors(inputs)]

            def attribute(gradient: Tensor) -> None:
                if versions != [tensor._version for tensor in _tensors(inputs)]:
                    raise ValueError(
                        f'module "{module}": the model changes its input in place; leave it out with --exclude, or use '
                        "--criterion local"
                    )
                self._attribute(work, module, inputs, gradient)

            output.register_hook(attribute)  # type: ignore[no-untyped-call]
            return replaced

        return (see,)

    def _keep_embedded(self, hidden: HiddenStates, keeps: bool, place: int, work: Work) -> None:
        carried = self.target.embed(work.batch.input_ids)
        if keeps:
            work.calls = [carried.calls]
        hidden.put((place, 0), carried.hidden)

    def _keep_layer(self, hidden: HiddenStates, layer: int, place: int, work: Work) -> None:
        state = hidden.taken((place, layer)).clone()  # a layer may change its input
        hidden.put((place, layer + 1), self._run_layer(layer, work, state))

    def _run_layer(self, layer: int, work: Work, state: Tensor, observer: Observer | None = None) -> Tensor:
        calls = work.calls[0] if work.calls else []
        return self.target.layer(layer, work.batch.input_ids, Carried(state, calls), observer)

    def _find_answers(self, hidden: HiddenStates, layers: int, place: int, work: Work) -> _Answers:
        state = hidden.taken((place, layers)).clone()
        normalised = self.target.normalise(work.batch.input_ids, state)
        self.take_head_inputs(work, normalised)
        return _Answers.of(work, normalised)

    def _add_exponentials(self, every: Sequence[_Answers], head: HeadSlice, place: int, _: Work) -> None:
        answers = every[place]
        for start in range(0, len(answers.labels), self.rows):
            some = slice(start, start + self.rows)
            logits = functional.linear(answers.hidden[some], head.weight, head.bias)
            finished = self.target.finish(logits).float()
            answers.total[some] = torch.logaddexp(answers.total[some], finished.logsumexp(1))

    def _attribute_head(self, every: Sequence[_Answers], heads: Sequence[HeadSlice], place: int, work: Work) -> None:
        """The gradient for some of the logits, what it says of these channels and what it adds to the input's."""
        answers, (head, changes) = every[place], heads
        shared = len(changes.weight)
        effects = torch.zeros(len(work.batch.input_ids), shared, device=answers.hidden.device)
        for start in range(0, len(answers.labels), self.rows):
            some = slice(start, start + self.rows)
            rows, labels = answers.hidden[some], answers.labels[some] - head.first
            logits = functional.linear(rows, head.weight, head.bias)
            gradient = self._loss_gradient(logits, labels, answers.total[some])
            answers.gradient[some] += (gradient.to(head.weight.dtype) @ head.weight).float()
            if shared and self.head in self.layout.parameters:
                changed = functional.linear(rows, changes.weight, changes.bias).float()
                effects.index_add_(0, answers.samples[some], changed.mul_(gradient[:, :shared]))
        if shared and self.head in self.layout.parameters:
            self._add(work, self.head, effects, first=head.first)

    def _loss_gradient(self, logits: Tensor, labels: Tensor, total: Tensor) -> Tensor:
        """float32 ``[rows, channels]``: of the negative log-likelihood of labels, for some of the head's outputs.

        Args:
            logits: these outputs, ``[rows, channels]``.
            labels: which of them is the right one; out of their range if none is.
            total: of all logits.
        """
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            finished = self.target.finish(logits)
        probabilities = (finished.detach().float() - total[:, None]).exp_()
        here = ((labels >= 0) & (labels < logits.shape[1])).nonzero().flatten()
        probabilities[here, labels[here]] -= 1
        if finished is logits:
            return probabilities
        (gradient,) = torch.autograd.grad(finished, logits, probabilities.to(finished.dtype))
        return gradient.float()

    def _back_through_norm(self, hidden: HiddenStates, layers: int, place: int, work: Work, answers: _Answers) -> None:
        state = hidden.taken((place, layers))
        hidden.drop((place, layers))
        with torch.enable_grad():
            leaf = state.detach().clone().requires_grad_()
            normalised = self.target.normalise(work.batch.input_ids, leaf.clone(), self.watchers(work)[0])
            rows = normalised[answers.samples, answers.places]
        hidden.put((place, _GRADIENT), *torch.autograd.grad(rows, leaf, answers.gradient.to(rows.dtype)))
        for module in self.layout.modules:
            work.sums.counts[module] += len(answers.labels)

    def _back_through_layer(self, hidden: HiddenStates, layer: int, place: int, work: Work) -> None:
        state = hidden.taken((place, layer))
        hidden.drop((place, layer))
        with torch.enable_grad():
            leaf = state.detach().clone().requires_grad_()
            output = self._run_layer(layer, work, leaf.clone(), self.watchers(work)[0])
        hidden.put((place, _GRADIENT), *torch.autograd.grad(output, leaf, hidden.taken((place, _GRADIENT))))

    def _back_through_embedding(self, hidden: HiddenStates, place: int, work: Work) -> None:
        with torch.enable_grad():
            embedded = self.target.embed(work.batch.input_ids, self.watchers(work)[0]).hidden
        if embedded.requires_grad:  # not if all embeddings are excluded
            torch.autograd.backward(embedded, hidden.taken((place, _GRADIENT)))
        hidden.drop((place, _GRADIENT))

    def _attribute(self, work: Work, module: str, inputs: Any, gradient: Tensor) -> None:
        batch, channels = len(work.batch.input_ids), gradient.shape[-1]
        changed = self._changes.of(module, inputs)
        if changed.numel() < gradient.numel():  # one output for all samples
            changed = changed.expand_as(gradient)
        ours, theirs = (tensor.reshape(batch, -1, channels) for tensor in (gradient, changed))
        effects = torch.empty(batch, channels, device=gradient.device)
        at_once = max(1, self._block // (ours.shape[1] * channels))
        for start in range(0, batch, at_once):
            some = slice(start, start + at_once)
            effects[some] = (ours[some].float() * theirs[some].float()).sum(1)
        self._add(work, module, effects)

    def _attribute_experts(
        self, work: Work, module: str, output: ExpertOutput, inputs: Tensor, gradient: Tensor
    ) -> None:
        batch, length = work.batch.input_ids.shape
        changed = self._changes.of_experts(module, output, inputs).rows
        experts, channels = len(output.ends), gradient.shape[1]
        # By (expert, token), and so by (expert, sample).
        samples = output.keys(batch * length) // length
        effects = torch.zeros(experts * batch, channels, device=gradient.device)
        effects.index_add_(0, samples, changed.float().mul_(gradient.float()))
        self._add(work, module, effects.view(experts, batch, channels).transpose(0, 1).reshape(batch, -1))
        if module.endswith(".down_proj"):
            work.sums.see_experts(module.rpartition(".")[0], output.at(work.batch.answer_places))

    def _add(self, work: Work, module: str, effects: Tensor, *, first: int = 0) -> None:
        self._reached.add(module)
        work.sums.add_effects(module, effects, first=first)
        finite = effects.isfinite().all(1)
        work.finite = finite if work.finite is None else work.finite & finite


def _tensors(inputs: Any) -> list[Tensor]:
    arguments, keywords = inputs
    return [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
