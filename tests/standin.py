"""A device that stands in for an accelerator: its tensors are of another device than the CPU's, and computed there.

It is PyTorch's PrivateUse1, in Python. What meets a tensor of the CPU fails as it does with CUDA, and copies between the
two are counted. It has no float64, as Apple's has none. Once it is registered it is the process's accelerator, so tests
run it in a process of its own (``on_a_device.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
DEVICE = f"{NAME}:0"
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class Crossings:
    """What was copied to the device and from it: bytes, and how often."""

    def __init__(self) -> None:
        self.bytes_in = self.bytes_out = self.copies_in = self.copies_out = 0

    def add(self, source: torch.Tensor) -> None:
        size = source.numel() * source.element_size()
        if isinstance(source, OnDevice):
            self.bytes_out, self.copies_out = self.bytes_out + size, self.copies_out + 1
        else:
            self.bytes_in, self.copies_in = self.bytes_in + size, self.copies_in + 1


crossings = Crossings()


class OnDevice(torch.Tensor):
    """A tensor on the device; ``own`` is where its numbers are."""

    own: torch.Tensor

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> OnDevice:
        if own.dtype == torch.float64:
            raise TypeError(f"{NAME} has no float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            own.shape,
            strides=own.stride(),
            storage_offset=own.storage_offset(),
            dtype=own.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.own = own
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.own!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: Any) -> Any:
    if function is torch.ops.aten._copy_from.default:
        source, into = args[:2]
        return copy(into, source)
    if function is torch.ops.aten.copy_.default:
        return copy(args[0], args[1])
    if function is torch.ops.aten._to_copy.default:
        return to_copy(args[0], **kwargs)
    if function is torch.ops.aten._local_scalar_dense.default:
        crossings.add(args[0])
        return args[0].own.item()
    if function is torch.ops.aten.is_pinned.default:
        return False
    if function._can_decompose():  # in inference mode PyTorch leaves that to the device
        return function.decompose(*args, **kwargs)
    given, _ = tree_flatten((args, kwargs))
    if function in INDEXING:  # indices may come from the CPU, as with CUDA; they are copied
        args = (args[0], [None if one is None else one.to(DEVICE) for one in args[1]], *args[2:])
        given, _ = tree_flatten((args, kwargs))
    strangers = [one for one in given if isinstance(one, torch.Tensor) and not isinstance(one, OnDevice) and one.ndim]
    if strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, {function} got one of {list(strangers[0].shape)} on the CPU"
        )
    made_elsewhere = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    kwargs = {name: "cpu" if name == "device" else value for name, value in kwargs.items() if name != "pin_memory"}
    inner_args, inner_kwargs = tree_map_only(OnDevice, lambda one: one.own, (args, kwargs))
    result = function(*inner_args, **inner_kwargs)
    if made_elsewhere:
        return result
    inputs = {id(one.own): one for one in given if isinstance(one, OnDevice)}
    return tree_map_only(torch.Tensor, lambda one: inputs[id(one)] if id(one) in inputs else OnDevice(one), result)


def copy(into: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if isinstance(into, OnDevice) != isinstance(source, OnDevice):
        crossings.add(source)
    inner = [one.own if isinstance(one, OnDevice) else one for one in (into, source)]
    inner[0].copy_(inner[1])
    return into


def to_copy(source: torch.Tensor, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
    own = source.own if isinstance(source, OnDevice) else source
    kwargs.pop("pin_memory", None)
    kwargs.pop("non_blocking", None)
    made = torch.ops.aten._to_copy(own, **kwargs)
    there = isinstance(source, OnDevice) if device is None else torch.device(device).type == NAME
    if there != isinstance(source, OnDevice):
        crossings.add(source)
    return OnDevice(made) if there else made


def register() -> None:
    """Make the device known to PyTorch, as this process's accelerator."""
    _setup_privateuseone_for_python_backend(rename=NAME)
    torch.accelerator.synchronize = lambda device=None: None  # all is computed at once
    register.library = library = torch.library.Library("aten", "IMPL")  # it must live as long as the process

    def made_by(function: Any) -> Any:
        def make(*args: Any, dtype: Any = None, **_options: Any) -> OnDevice:
            return OnDevice(function(*args, dtype=dtype, device="cpu"))

        return make

    # What makes tensors of nothing else; PyTorch makes the rest with these.
    for name in ("arange", "arange.start", "arange.start_step"):
        library.impl(name, made_by(torch.arange), "PrivateUse1")
    library.impl("empty.memory_format", made_by(torch.empty), "PrivateUse1")
    library.impl("empty_strided", made_by(torch.empty_strided), "PrivateUse1")
    library.impl("_copy_from", lambda source, into, non_blocking=False: copy(into, source), "PrivateUse1")
