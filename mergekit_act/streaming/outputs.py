"""What modules put out: where token positions are in it, and how it is kept until the other model has run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_act.abilities.batches import MicroBatch
from mergekit_act.channels import Layout, kind_pattern
from mergekit_act.streaming.experts import ExpertOutput
from mergekit_act.streaming.segments import Observer
from mergekit_act.wording import enumerate_some

__all__ = ["KeptOutput", "OutputForms"]

_BATCH = 3
_LENGTHS = (7, 11, 13, 17)


class OutputForms:
    """How each module's output is to be read: learnt from small batches, whose length no other dimension has.

    Args:
        name: the model's, for errors.
        layout: its channels.
        vocabulary: token ids below this one are valid.
        device: where the model runs.

    Attributes:
        token_axes: module -> which dimension of its output are token positions; None if its first one is the batch,
            positions and possibly heads.
        changed_later: modules whose output the model changes in place after they have put it out.
    """

    def __init__(self, name: str, layout: Layout, vocabulary: int, device: str) -> None:
        self.token_axes: dict[str, int | None] = {}
        self.changed_later: set[str] = set()
        self._name, self._layout, self._vocabulary, self._device = name, layout, vocabulary, device

    def learn(self, modules: Sequence[str], run: Callable[[Tensor, Observer], Any]) -> None:
        """Learn the forms of a segment's modules.

        Args:
            modules: its modules that have channels.
            run: runs the segment of the target, which is being observed, given token ids ``[batch, tokens]``.

        Raises:
            ValueError: a module put nothing out, or its positions can't be told from its other dimensions.
        """
        unclear: dict[str, tuple[int, ...]] = {}
        shorter: dict[str, tuple[Any, int]] = {}
        for length in _LENGTHS:
            longest = torch.arange(_BATCH * _LENGTHS[-1], device=self._device).reshape(_BATCH, -1)
            ids = longest[:, :length] % self._vocabulary
            outputs: dict[str, tuple[Any, int]] = {}

            def note(module: str, output: Any, _: Any, into: dict[str, tuple[Any, int]] = outputs) -> None:
                into[module] = (output, 0 if isinstance(output, ExpertOutput) else output._version)

            run(ids, note)
            self._check_seen(modules, outputs)
            axes, unclear = self._axes(outputs, length)
            for module in [
                m for m in unclear if m in shorter and _heads_come_last(shorter[m][0], outputs[m][0], length)
            ]:
                axes[module] = None
                del unclear[module]
            shorter = outputs
            if not unclear:
                self.token_axes |= axes
                self.changed_later |= {m for m in axes if outputs[m][0]._version != outputs[m][1]}
                return
        named = enumerate_some(f'"{module}" {list(shape)}' for module, shape in unclear.items())
        raise ValueError(
            f"{self._name}: the token positions in these outputs cannot be told: {named}. Leave them out with "
            + _exclude_options(list(unclear), self._layout.modules)
        )

    def _check_seen(self, modules: Sequence[str], outputs: dict[str, Any]) -> None:
        kinds = {kind_pattern(module) for module in modules if module not in outputs}
        unseen = [module for module in self._layout.modules if kind_pattern(module) in kinds and module not in outputs]
        if unseen:
            raise ValueError(
                f"{self._name}: {len(unseen)} modules with channels put nothing out that can be observed: "
                f"{enumerate_some(unseen)}. Where text alone does not reach them, leave them out with --exclude, "
                f"such as {_exclude_options(unseen, self._layout.modules)}"
            )

    def _axes(
        self, outputs: dict[str, tuple[Any, int]], length: int
    ) -> tuple[dict[str, int | None], dict[str, tuple[int, ...]]]:
        """module -> its token axis, and the shapes of those where it is unclear."""
        axes: dict[str, int | None] = {}
        unclear = {}
        for module, (output, _) in outputs.items():
            if isinstance(output, ExpertOutput):
                continue
            shape = tuple(output.shape)
            candidates = [axis for axis, size in enumerate(shape[:-1]) if size == length]
            batch_first = len(candidates) == 1 and (shape[0] in (1, _BATCH) if candidates[0] else len(shape) == 2)
            if shape[-1:] != self._layout.channel_shape(module):
                unclear[module] = shape
            elif batch_first:
                axes[module] = candidates[0]
            elif shape[0] == _BATCH * length:
                axes[module] = None
            else:
                unclear[module] = shape
        return axes, unclear

    def keep(self, module: str, output: Tensor | ExpertOutput, batch: MicroBatch) -> KeptOutput:
        """Keep an output at the answer tokens, as it is now."""
        if isinstance(output, ExpertOutput):
            return KeptOutput(output.at(batch.answer_places))
        if output.device.type == "cpu" and module in self.changed_later:
            output = output.clone()
        rows = batch.answer_rows(output, self.token_axes[module])
        # Elsewhere the rows are a copy, and the whole output need not wait.
        return KeptOutput(rows, output, output._version) if output.device.type == "cpu" else KeptOutput(rows)


def _exclude_options(modules: Sequence[str], all_modules: Sequence[str]) -> str:
    """The options that leave modules out: one for a part of the model of which no module stays, else for each kind."""
    kept = [f"{module}." for module in all_modules if module not in modules]
    kinds: list[str] = []
    for module in modules:
        parts = module.split(".")
        prefixes = (".".join(parts[:length]) + "." for length in range(2, len(parts)))
        whole = next((prefix for prefix in prefixes if not any(name.startswith(prefix) for name in kept)), None)
        kinds.append(kind_pattern(module) if whole is None else f"{kind_pattern(whole[:-1])}.*")
    kinds = list(dict.fromkeys(kinds))
    more = f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
    return " ".join(f"--exclude '{kind}'" for kind in kinds[:8]) + more


def _heads_come_last(shorter: Any, output: Any, length: int) -> bool:
    """Whether an output is ``[batch × tokens × heads, channels]``, in this order.

    Seen from the output for the same inputs without the last tokens, which do not change what comes before them.
    """
    if isinstance(output, ExpertOutput) or output.ndim != 2 or output.shape[0] % (_BATCH * length):
        return False
    by_token = output.reshape(_BATCH, length, -1)
    if shorter.numel() % (_BATCH * by_token.shape[2]):
        return False
    before = shorter.reshape(_BATCH, -1, by_token.shape[2]).float()
    same = by_token[:, : before.shape[1]].float()
    return before.shape[1] < length and bool((same - before).abs().mean() < 0.05 * before.abs().mean())


@dataclass(frozen=True)
class KeptOutput:
    """The target's output at the answer tokens, until the ability model's comes.

    Attributes:
        rows: parts of ``[rows, channels]``, borrowed from ``source`` on a CPU; or the ``ExpertOutput`` of experts.
        source: the whole output.
        version: PyTorch's count of its changes when it was kept.
    """

    rows: Any
    source: Tensor | None = None
    version: int = 0

    def read(self, module: str) -> Any:
        """The rows.

        Raises:
            ValueError: they have been changed since.
        """
        if self.source is not None and self.source._version != self.version:
            raise ValueError(f'module "{module}": its output was changed in place, which the first batch did not show')
        return self.rows
