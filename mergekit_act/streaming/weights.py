"""The weights of a pair: what fits stays, the rest comes piece by piece, the next one while the current one is used.

A piece is what is needed at one time: a decoder layer of both models, or a slice of their heads' rows. Pieces that do
not stay are copied into buffers that are used again, so that memory neither grows nor falls apart; files are closed
after each, so that their mapped pages do not stay either.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_act.streaming.loading import ModelWeights, Stored
from mergekit_act.streaming.memory import MemoryPlan
from mergekit_act.streaming.segments import replaced_forward

__all__ = ["HeadSlice", "PairWeights", "Piece", "synchronize"]

# Rows of the heads that are compared together, whatever fits: sums must not depend on the memory.
HEAD_ROWS = 1 << 14
_ALIGNMENT = 512  # as PyTorch's own allocations on CUDA
_AT_ONCE = 1 << 22  # numbers whose difference is taken at a time


@dataclass(frozen=True)
class HeadSlice:
    """Some rows of a head: ``weight [rows, hidden]``, perhaps ``bias [rows]``, and which row is the ``first``."""

    weight: Tensor
    bias: Tensor | None
    first: int


@dataclass(frozen=True)
class Piece:
    """A decoder layer of both models, or some rows of both heads."""

    layer: int | None
    rows: slice | None = None


class PairWeights:
    """The weights of two models, present when they are needed.

    Args:
        models: the target's and the ability model's.
        head_rows: number of the heads' rows that are needed: those both have, or all of the target's.
        point: if it is given, the second model gets the differences of the two models' weights in place of its own,
            and the first one its own weights plus so much of the differences.

    Attributes:
        pieces: layers, then slices of the heads.
        route: places of the pieces in the order in which a chunk needs them; in order, each once, if not set.
        waited: seconds for which pieces were waited for.
    """

    def __init__(self, models: tuple[ModelWeights, ModelWeights], head_rows: int, point: float | None = None) -> None:
        self.models = models
        self._point = point
        layers = [Piece(index) for index in range(len(models[0].layers))]
        starts = range(0, head_rows, HEAD_ROWS)
        slices = [Piece(None, slice(start, min(start + HEAD_ROWS, head_rows))) for start in starts]
        self.pieces = (*layers, *slices)
        self.route: Sequence[int] = range(len(self.pieces))
        self.waited = 0.0
        self._copier = models[0].copier
        self._everything = False
        self._kept: dict[int, list[HeadSlice]] = {}  # slices of the heads that stay
        self._order: list[int] = []  # places of the pieces that are streamed
        self._free: list[Tensor] = []
        self._pending: tuple[int, Tensor, Future[list[tuple[int, Stored, Tensor]]]] | None = None
        # All files are read by this one thread: mergekit patches PyTorch while it opens a pickle.
        self._worker = ThreadPoolExecutor(1, "weights", initializer=_use, initargs=(models[0].device,))

    @property
    def whole(self) -> int:
        """Bytes that all weights of both models take."""
        return sum(model.bytes_of(model.stored) for model in self.models)

    @property
    def outside(self) -> int:
        """Bytes of what is in no piece and always stays; token embeddings are looked up in their files."""
        return sum(model.bytes_of(model.outside) for model in self.models)

    def size(self, piece: Piece) -> int:
        """Bytes that a piece takes in a buffer."""
        return sum(_padded(shape.numel() * dtype.itemsize) for _, _, shape, dtype in self._parts(piece))

    def settle(self, plan: MemoryPlan) -> None:
        """Load what stays, and make the buffers for the rest."""
        if plan.everything:
            for model in self.models:
                model.load()
                model.checkpoint.flush()
            self._everything = True
            self._take_differences(self.models[0].stored)
            return
        device = self.models[0].device
        for model in self.models:
            model.load(model.outside)
            model.checkpoint.flush()
        self._take_differences(self.models[0].outside)
        for place, piece in enumerate(self.pieces):
            if place in plan.streamed:
                self._order.append(place)
            else:
                loaded = self._load(piece, torch.empty(self.size(piece), dtype=torch.uint8, device=device))
                heads = self._put(piece, loaded)
                if heads:
                    self._kept[place] = heads
        largest = max(self.size(self.pieces[place]) for place in self._order)
        self._free = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(plan.buffers)]

    @contextmanager
    def present(self, step: int, *, more: bool) -> Iterator[list[HeadSlice]]:
        """Have a piece's weights in the models.

        Args:
            step: of the route.
            more: whether the route's first piece will be needed again after the last one.

        Yields:
            For a piece of the heads both slices.
        """
        place = self.route[step]
        piece = self.pieces[place]
        if place not in self._order:
            yield self._kept.get(place) or (self._slices(piece) if piece.rows is not None else [])
            return
        started = time.perf_counter()
        if self._pending is None:
            self.fetch(place)
        assert self._pending is not None
        fetched, buffer, future = self._pending
        assert fetched == place
        loaded = future.result()
        self._pending = None
        self.waited += time.perf_counter() - started
        following = self._following(step, more)
        if following is not None and self._free:
            self.fetch(following)
        try:
            yield self._put(piece, loaded)
        finally:
            synchronize(self.models[0].device)
            for side, stored, _ in loaded if piece.rows is None else ():
                stored.put(self.models[side].segmented.model, stored.original)
            self._free.append(buffer)
        if following is not None and self._pending is None:
            self.fetch(following)

    def fetch(self, place: int | None = None) -> None:
        """Begin to load a piece that is streamed, by default the route's first, unless one is on its way."""
        if self._pending is None and self._order:
            place = self._next(0) if place is None else place
            assert place is not None
            buffer = self._free.pop()
            self._pending = (place, buffer, self._worker.submit(self._load, self.pieces[place], buffer))

    @contextmanager
    def embeddings_of(self, parts: Sequence[Tensor]) -> Iterator[None]:
        """Have the token embeddings' rows for these token ids, int64 ``[tokens]`` each, in the models."""
        if self._everything:
            yield
            return
        token_ids = torch.unique(torch.cat(tuple(parts)))
        looked = [self._worker.submit(_rows, model, token_ids).result() for model in self.models]
        self._take_difference(*looked)
        with ExitStack() as stack:
            for model, rows in zip(self.models, looked, strict=True):
                embedding: Any = model.segmented.embedding
                lookup = embedding.forward
                # A padding index, which matters in training alone, has to be one of the rows.
                padding = getattr(embedding, "padding_idx", None)
                stack.callback(setattr, embedding, "padding_idx", padding)
                embedding.padding_idx = None
                stack.callback(embedding._parameters.__setitem__, "weight", embedding.weight)
                embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)

                def forward(input_ids: Tensor, lookup: Any = lookup) -> Tensor:
                    looked_up: Tensor = lookup(torch.searchsorted(token_ids, input_ids))
                    return looked_up

                stack.enter_context(replaced_forward(embedding, forward))
            yield

    def close(self) -> None:
        """End the loading of what is on its way."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        for model in self.models:
            model.checkpoint.flush()

    def _following(self, step: int, more: bool) -> int | None:
        following = self._next(step + 1)
        return self._next(0) if following is None and more else following

    def _next(self, step: int) -> int | None:
        """The next piece that is streamed, from a step of the route on."""
        return next((place for place in self.route[step:] if place in self._order), None)

    def _parts(self, piece: Piece) -> Iterator[tuple[int, Stored, torch.Size, torch.dtype]]:
        """(which model, parameter, shape of what the piece has of it, dtype)."""
        for side, model in enumerate(self.models):
            if piece.layer is not None:
                parts = model.layers[piece.layer]
            else:
                parts = [one for one in (model.head, model.head_bias) if one is not None]
            for stored in parts:
                shape = stored.original.shape
                if piece.rows is not None:  # of the shorter of two vocabularies perhaps none
                    rows = max(0, min(piece.rows.stop, shape[0]) - piece.rows.start)
                    shape = torch.Size((rows, *shape[1:]))
                yield side, stored, shape, stored.dtype(model.dtype)

    def _load(self, piece: Piece, buffer: Tensor) -> list[tuple[int, Stored, Tensor]]:
        """Copy a piece into a buffer, tensor by tensor."""
        loaded, end, open_side = [], 0, 0
        for side, stored, shape, dtype in self._parts(piece):
            if side != open_side:
                self.models[open_side].checkpoint.flush()
                open_side = side
            size = shape.numel() * dtype.itemsize
            into = buffer[end : end + size].view(dtype).view(shape)
            end += _padded(size)
            tensor = self.models[side].read(stored)
            self._copier.copy(into, tensor if piece.rows is None else tensor[piece.rows])
            loaded.append((side, stored, into))
        self.models[open_side].checkpoint.flush()
        self._copier.finish()
        return loaded

    def _put(self, piece: Piece, loaded: list[tuple[int, Stored, Tensor]]) -> list[HeadSlice]:
        if self._point is not None:
            theirs = {stored.names[0]: tensor for side, stored, tensor in loaded if side == 1}
            pairs = [(model.head, model.head_bias) for model in self.models]
            heads = {id(ours): other for ours, other in zip(*pairs, strict=True)}
            for _, stored, tensor in (one for one in loaded if one[0] == 0 and one[1].is_parameter):
                other = heads.get(id(stored)) or stored
                self._take_difference(tensor, theirs[other.names[0]])
        if piece.rows is not None:
            by_stored = {(side, id(stored)): tensor for side, stored, tensor in loaded}
            return [
                HeadSlice(by_stored[side, id(model.head)], by_stored.get((side, id(model.head_bias))), piece.rows.start)
                for side, model in enumerate(self.models)
            ]
        for side, stored, tensor in loaded:
            stored.put(self.models[side].segmented.model, tensor)
        return []

    def _take_differences(self, stored: Sequence[Stored]) -> None:
        """Take differences of parameters that are in both models, where that is wanted."""
        if self._point is None:
            return
        target, ability_model = (model.segmented.model for model in self.models)
        for one in stored:
            if not one.is_parameter:
                continue
            theirs = next(other for other in self.models[1].stored if one.names[0] in other.names)
            tensor = ability_model.get_parameter(one.names[0]).data
            if theirs.names != one.names:  # tied there, and two matrices here
                tensor = tensor.clone()
                replace(theirs, names=one.names).put(ability_model, tensor)
            self._take_difference(target.get_parameter(one.names[0]).data, tensor)

    def _take_difference(self, target: Tensor, ability_model: Tensor) -> None:
        """Put the difference in the place of the second, and move the first; rows that one of them lacks have none."""
        if self._point is None:
            return
        if not target.ndim:
            target, ability_model = target.view(1), ability_model.view(1)
        rows = min(len(target), len(ability_model))
        ours, theirs = target[:rows].view(-1), ability_model[:rows].view(-1)
        for some, others in zip(torch.split(ours, _AT_ONCE), torch.split(theirs, _AT_ONCE), strict=True):
            others.copy_(others.float().sub_(some.float()))
            if self._point:
                some.copy_(some.float().add_(others.float(), alpha=self._point))
        ability_model[rows:] = 0

    def _slices(self, piece: Piece) -> list[HeadSlice]:
        """The slices of heads that are present as a whole."""
        rows = piece.rows
        assert rows is not None
        heads = [model.segmented.head for model in self.models]
        return [
            HeadSlice(head.weight[rows], None if head.bias is None else head.bias[rows], rows.start) for head in heads
        ]


def _rows(model: ModelWeights, token_ids: Tensor) -> Tensor:
    """The token embedding's rows for some ids, on the device."""
    rows = model.read(model.embedding)[token_ids.cpu()].to(device=model.device, dtype=model.dtype)
    model.checkpoint.flush()
    return rows


def _use(device: str) -> None:
    """Make a GPU this thread's; it would open the first one otherwise."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)


def synchronize(device: str) -> None:
    """Wait until a device has done what it was told."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
