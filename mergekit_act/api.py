"""The commands as functions: paths and settings in, result objects out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_act.artifacts import Profile
    from mergekit_act.checking.summary import CheckSummary
    from mergekit_act.evaluation import Evaluation
    from mergekit_act.sweeping import SweepResult
    from mergekit_act.transferring import Transfer

__all__ = ["evaluate", "merge", "profile", "sweep", "transfer"]

Place = str | Path


def profile(abilities: Place, out: Place, *, overwrite: bool = False, **settings: Any) -> Mapping[str, Profile]:
    """Score every channel of a pair, as ``mergekit-act profile``.

    Args:
        abilities: the abilities file.
        out: folder for the profiles.
        overwrite: replace profiles that exist.
        settings: fields of ``mergekit_act.profiling.ProfilingSettings``, such as ``criterion="attribution"``.

    Returns:
        Ability -> its profile; for a criterion without data, the criterion -> its.
    """
    from mergekit_act.abilities import load_abilities
    from mergekit_act.profiling import ProfilingSettings, write_profiles

    made = write_profiles(load_abilities(abilities), Path(out), ProfilingSettings(**settings), overwrite=overwrite)
    return {path.stem: found for path, found in made.profiles.items()}


def merge(config: Place, out: Place, **options: Any) -> CheckSummary:
    """Merge, as ``mergekit-yaml``.

    Args:
        config: the merge config.
        out: folder for the model.
        options: fields of mergekit's ``MergeOptions``, such as ``lazy_unpickle=True``.

    Returns:
        What was moved, as ``mergekit-act check`` tells.
    """
    from mergekit_act import autoload

    autoload.install()
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from mergekit_act.checking.configs import read_merge_config
    from mergekit_act.checking.summary import check_config

    chosen = MergeOptions(**options)
    summary = check_config(config, chosen)
    _, parsed = read_merge_config(Path(config))
    run_merge(parsed, str(out), chosen, config_source=Path(config).read_text(encoding="utf-8"))
    return summary


def evaluate(models: Sequence[str], abilities: Place, **settings: Any) -> Evaluation:
    """Measure models on held-out samples, as ``mergekit-act evaluate``.

    Args:
        models: folders or names of the Hub; the others are compared with the first.
        abilities: the abilities file.
        settings: fields of ``mergekit_act.evaluation.EvaluationSettings``, such as ``generate=False``.
    """
    from mergekit_act.abilities import load_abilities
    from mergekit_act.evaluation import EvaluationSettings, run_evaluation

    *_, last = run_evaluation(models, load_abilities(abilities), None, EvaluationSettings(**settings))
    return last


def sweep(
    config: Place,
    abilities: Place,
    out: Place,
    *,
    densities: Sequence[float] = (),
    weights: Sequence[float] = (),
    overwrite: bool = False,
    **settings: Any,
) -> SweepResult:
    """Find a good density and weight, as ``mergekit-act sweep``.

    Args:
        config: a merge config whose masks are profiles.
        abilities: the abilities file.
        out: folder for the scores and the best point's config.
        densities: in place of the default ones.
        weights: likewise.
        overwrite: discard what another sweep has left in the folder.
        settings: fields of ``mergekit_act.sweeping.SweepSettings``, such as ``keep_within=0.02``.
    """
    from mergekit_act import autoload

    autoload.install()
    from mergekit_act.abilities import load_abilities
    from mergekit_act.sweeping import Grid, SweepSettings, run_sweep
    from mergekit_act.sweeping.config import read_swept_config

    swept = read_swept_config(Path(config))
    points = Grid(densities=densities, weights=weights).points(len(swept.models))
    file = load_abilities(abilities)
    return run_sweep(swept, file, Path(out), points, SweepSettings(**settings), overwrite=overwrite)


def transfer(abilities: Place, out: Place, **settings: Any) -> Transfer:
    """The whole path, as ``mergekit-act transfer``; commands and what they say are printed.

    Args:
        abilities: the abilities file.
        out: folder for everything.
        settings: fields of ``mergekit_act.transferring.TransferSettings``, such as ``keep_within=0.02``.

    Raises:
        FileNotFoundError: the file, a model or a data set does not exist.
        FileExistsError: the folder has files of something else.
        OSError: the disk is too small.
        ValueError: what is to be done cannot be done; or a command failed.
    """
    from functools import partial

    from mergekit_act import autoload

    autoload.install()
    from mergekit_act.cli.framework import echo
    from mergekit_act.cli.running import run_words
    from mergekit_act.transferring import TransferSettings, run_transfer

    run = partial(run_words, verbose=1)  # commands raise what a function would
    return run_transfer(Path(abilities), Path(out), TransferSettings(**settings), run=run, echo=echo)
