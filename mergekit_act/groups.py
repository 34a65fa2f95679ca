"""A model's modules by kind and by decoder layer, under short names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from mergekit_act.channels import kind_pattern

__all__ = ["Groups", "total"]

_NUMBERED = re.compile(r"(.*?)\.(\d+)(?=\.|$)")


class Groups:
    """Modules in groups.

    Attributes:
        kinds: short name of a module kind -> its modules, such as ``mlp.up_proj`` for ``model.layers.3.mlp.up_proj``.
        layers: number of a decoder layer, or the kind of a module outside of them -> its modules.
        outside: the names in ``layers`` that are no numbers.
    """

    def __init__(self, modules: Sequence[str], everything: Sequence[str] | None = None) -> None:
        """Group modules.

        Args:
            modules: in the model's order.
            everything: all modules of the model, if these are not all.
        """
        self._stack = _decoder_stack(modules if everything is None else everything)
        self._inner = {self._short(module) for module in modules if self._layer(module) is not None}
        self.kinds = _grouped(modules, self._kind)
        self.layers = _grouped(modules, lambda module: self._layer(module) or self._kind(module))
        numbers = iter(sorted((name for name in self.layers if name.isdigit()), key=int))
        self.layers = {own: self.layers[own] for own in (next(numbers) if n.isdigit() else n for n in self.layers)}
        self.outside = [name for name in self.layers if not name.isdigit()]

    def _layer(self, module: str) -> str | None:
        match = _NUMBERED.match(module)
        return match.group(2) if match and match.group(1) == self._stack else None

    def _kind(self, module: str) -> str:
        """A short name; a module outside the layers that would have the name of one inside keeps its own."""
        short = self._short(module)
        return kind_pattern(module) if self._layer(module) is None and short in self._inner else short

    def _short(self, module: str) -> str:
        kind = kind_pattern(module)
        outer = self._stack.rpartition(".")[0]
        for prefix in (f"{self._stack}.*.", f"{outer}."):
            if prefix not in (".*.", ".") and kind.startswith(prefix):
                return kind.removeprefix(prefix)
        return kind


def _decoder_stack(modules: Sequence[str]) -> str:
    """What the names of decoder layers begin with, such as ``model.layers``.

    Of several numbered stacks (a vision tower's blocks) it is the one with most modules right beside it (embedding,
    final norm), and of those the largest.
    """
    matches = [(match.group(1) if (match := _NUMBERED.match(module)) else None, module) for module in modules]
    beside = Counter(module.rpartition(".")[0] for stack, module in matches if stack is None)
    size = Counter(stack for stack, _ in matches if stack is not None)
    return max(size, key=lambda stack: (beside[stack.rpartition(".")[0]], size[stack]), default="")


def _grouped(modules: Iterable[str], name: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(name(module), []).append(module)
    return groups


def total(counts: Mapping[str, int], modules: Iterable[str]) -> int:
    """What these modules have together."""
    return sum(counts.get(module, 0) for module in modules)
