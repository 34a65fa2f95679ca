"""What an experiment is made of; each setting says its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_act.finetuning import Recipe

__all__ = ["Experiment", "Setting"]


@dataclass(frozen=True)
class Experiment:
    """A target, ability models, and what is scored.

    Attributes:
        name: what the target was trained on, and the seed, as ``arithmetic-0``.
        files: abilities files of one target, one for each ability model.
        others: an abilities file whose held-out samples are scored besides, of abilities neither recovered nor kept.
        recipe: of the fine-tuning behind every method; None for none.
        prepare: makes the models that are missing.
    """

    name: str
    files: tuple[Path, ...]
    others: Path | None = None
    recipe: Recipe | None = None
    prepare: Callable[[], object] = lambda: None

    @property
    def family(self) -> str:
        return self.name.rpartition("-")[0]


@dataclass(frozen=True)
class Setting:
    """Experiments of one kind.

    Attributes:
        name: of the setting.
        about: what it is, in a sentence or two of Markdown.
        experiments: for table 3; the first is also that of figure 5 and of the controls.
        specialists: for table 4: light specialists of one base, to be merged into it.
        pairs: for the findings: files that name the same abilities for several pairs.
        exclude: modules that all rules but the paper's leave out.
        dtype: in which all is computed.
        device: likewise.
    """

    name: str
    about: str
    experiments: tuple[Experiment, ...]
    specialists: Experiment | None
    pairs: tuple[Experiment, ...]
    exclude: tuple[str, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
