"""A model's weights: which tensors of its checkpoint a skeleton needs, and how they come to the device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_act.checkpoints import Checkpoint
from mergekit_act.streaming.segments import SegmentedModel
from mergekit_act.wording import enumerate_some

__all__ = ["Copier", "ModelWeights", "Stored"]

LOG = logging.getLogger(__name__)

_STAGING_BYTES = 1 << 25
_MAPPED_BYTES = 1 << 28
_SERIAL = 32_000
_ROWS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Stored:
    """A parameter or saved buffer of a skeleton.

    Attributes:
        names: all its names; several if the model ties them.
        original: what the skeleton has in its place.
    """

    names: tuple[str, ...]
    original: Tensor

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, not a buffer."""
        return isinstance(self.original, nn.Parameter)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which it is needed, in a model that runs in ``dtype``."""
        return dtype if self.is_parameter else self.original.dtype

    def put(self, model: nn.Module, tensor: Tensor) -> None:
        """Set it in the model, under all its names."""
        value = nn.Parameter(tensor, requires_grad=False) if self.is_parameter else tensor
        for name in self.names:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            (module._parameters if self.is_parameter else module._buffers)[attribute] = value  # type: ignore[assignment]


class ModelWeights:
    """A skeleton, and the checkpoint that its weights come from.

    Args:
        segmented: the skeleton, as ``build_skeleton`` makes it. It is given its weights, and moved to ``device``.
        checkpoint: where they come from.
        dtype: in which the model runs.
        device: where it runs.

    Raises:
        ValueError: a tensor is missing or of another shape; all are listed. Told from headers alone.
    """

    def __init__(self, segmented: SegmentedModel, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
        self.segmented, self.checkpoint, self.dtype, self.device = segmented, checkpoint, dtype, device
        self.copier = Copier(device)
        model = segmented.model
        named: dict[int, list[str]] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            named.setdefault(id(parameter), []).append(name)
        stored = [Stored(tuple(names), parameters[names[0]]) for names in named.values()]
        buffers = [name for name in model.state_dict() if name not in parameters]
        self.stored = self._checked([*stored, *(Stored((name,), model.get_buffer(name)) for name in buffers)])
        by_name = {name: one for one in self.stored for name in one.names}
        prefixes = tuple(f"{name}." for name in segmented.layer_names)
        self.layers = [[one for one in self.stored if one.names[0].startswith(prefix)] for prefix in prefixes]
        self.embedding = next(one for one in self.stored if one.original is segmented.embedding.weight)
        self.head = by_name[f"{segmented.head_name}.weight"]
        self.head_bias = by_name.get(f"{segmented.head_name}.bias")
        apart = [*(one for layer in self.layers for one in layer), self.embedding, self.head, self.head_bias]
        self.outside = [one for one in self.stored if all(one is not other for other in apart)]
        for module in model.modules():  # rotary tables and the like
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def bytes_of(self, stored: Sequence[Stored]) -> int:
        """Device memory that these take."""
        return sum(one.original.numel() * one.dtype(self.dtype).itemsize for one in stored)

    def load(self, stored: Sequence[Stored] | None = None) -> None:
        """Give the skeleton these weights for good, or all.

        They are copied on a CPU too: a file's tensors begin anywhere, and for some shapes products of matrices differ
        in their last digits with where the numbers begin.
        """
        mapped = 0
        for one in self.stored if stored is None else stored:
            tensor, dtype = self.read(one), one.dtype(self.dtype)
            mapped += tensor.nbytes
            if mapped > _MAPPED_BYTES:
                self.checkpoint.flush()
                mapped = 0
            if torch.device(self.device).type == "cpu":
                one.put(self.segmented.model, tensor.to(dtype, copy=True, memory_format=torch.contiguous_format))
            else:
                into = torch.empty(tensor.shape, dtype=dtype, device=self.device)
                self.copier.copy(into, tensor)
                one.put(self.segmented.model, into)
        self.copier.finish()

    def read(self, stored: Stored) -> Tensor:
        """What the checkpoint has of it."""
        tensor = self.checkpoint.read(*stored.names)
        if tensor is None:  # it was there when its header was read
            raise ValueError(f'{self.checkpoint.reference} has no "{stored.names[0]}" any more; was it written to?')
        return tensor

    def mean_head_row(self, rows: int) -> Tensor:
        """The mean of the head's first rows, float32 ``[hidden + 1]``, that of their biases behind."""
        weight = self.read(self.head)[:rows]
        total = torch.zeros(weight.shape[1] + 1, dtype=torch.float64)
        for some in torch.split(weight, _ROWS_AT_ONCE):
            total[:-1] += some.to(self.dtype).sum(0, dtype=torch.float64)
        if self.head_bias is not None:
            total[-1] = self.read(self.head_bias)[:rows].to(self.dtype).sum(dtype=torch.float64)
        self.checkpoint.flush()
        return (total / len(weight)).float()

    def _checked(self, stored: list[Stored]) -> list[Stored]:
        present, problems = [], []
        for one in stored:
            shape, expected = self.checkpoint.shape(*one.names), tuple(one.original.shape)
            if shape is None and not one.is_parameter:
                LOG.warning(
                    '%s has no "%s"; it stays as the model class makes it', self.checkpoint.reference, one.names[0]
                )
            elif shape is None:
                problems.append(f'"{one.names[0]}" is missing')
            elif shape != expected:
                problems.append(f'"{one.names[0]}" is {list(shape)}, the config says {list(expected)}')
            else:
                present.append(one)
        if problems:
            shown = enumerate_some(sorted(problems), "; ")
            raise ValueError(f"{self.checkpoint.reference} does not fit its config: {shown}")
        return present


class Copier:
    """Copies tensors in host memory to the device: on CUDA through two pinned buffers, on a stream of its own."""

    def __init__(self, device: str) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._turn = 0
        if torch.device(device).type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
            self._pinned = [torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]

    def copy(self, into: Tensor, tensor: Tensor) -> None:
        """Begin to copy, in the dtype of ``into``."""
        flat, source = into.view(-1), tensor.reshape(-1)
        if self._stream is None:
            # In parts that PyTorch copies with one thread: more would take the cores from those that compute.
            for some, others in zip(torch.split(flat, _SERIAL), torch.split(source, _SERIAL), strict=True):
                some.copy_(others)
            return
        for some, others in zip(
            torch.split(flat, _STAGING_BYTES // into.itemsize),
            torch.split(source, _STAGING_BYTES // into.itemsize),
            strict=True,
        ):
            event, pinned = self._events[self._turn], self._pinned[self._turn]
            event.synchronize()  # what was in this buffer has been copied
            waiting = pinned[: some.nbytes].view(into.dtype)
            waiting.copy_(others)
            with torch.cuda.stream(self._stream):
                some.copy_(waiting, non_blocking=True)
                event.record(self._stream)
            self._turn ^= 1

    def finish(self) -> None:
        """Wait until all is copied."""
        if self._stream is not None:
            self._stream.synchronize()
