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
        name: as in ``FOLDER/measured``.
        family: experiments of one family differ in the order of the rows that their models were trained on.
        files: abilities files of one target, one for each ability model.
        others: abilities files whose held-out samples are scored besides, of abilities neither recovered nor kept.
        recipe: of the fine-tuning behind every method; None for none.
        prepare: makes the models that are missing.
    """

    name: str
    family: str
    files: tuple[Path, ...]
    others: tuple[Path, ...] = ()
    recipe: Recipe | None = None
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Setting:
    """Experiments of one kind.

    Attributes:
        name: of the setting.
        about: what it is, in a few sentences of Markdown.
        experiments: for table 3; the first is also that of figure 5 and of the controls.
        specialists: for table 4: light specialists of one base, to be merged into it.
        pairs: for the findings: files that name the same abilities for several pairs.
        exclude: modules that all rules but the paper's leave out.
        dtype: in which all is computed.
        device: likewise.
        short: whether answers are so short that a whole one can be right.
    """

    name: str
    about: str
    experiments: tuple[Experiment, ...]
    specialists: Experiment | None
    pairs: tuple[Experiment, ...]
    exclude: tuple[str, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
    short: bool = True
