"""What is checked where: the seam in mergekit's planners is given these functions, which raise all problems at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit.merge_methods.registry import get

from mergekit_act.checking.configs import (
    config_problems,
    file_problems,
    layer_problems,
    model_problems,
    path_remarks,
    plain,
)
from mergekit_act.checking.plans import left_out_problems, plan_problems
from mergekit_act.checking.remarks import plan_remarks
from mergekit_act.checkpoints import Checkpoint, quantisation
from mergekit_act.merging import is_ours
from mergekit_act.planning import MergeConfigError, Plan, seam

__all__ = ["check_before_planning", "guard_flat_planner", "guard_merge", "guard_multimerge", "guard_planner"]

LOG = logging.getLogger(__name__)


def guard_merge() -> None:
    """For ``mergekit.merge``."""
    seam.wrap_merge(_check_before_fetching)


def guard_multimerge() -> None:
    """For ``mergekit.scripts.multimerge``."""
    seam.wrap_multimerge(_check_all)


def guard_planner() -> None:
    """For ``mergekit.plan``."""
    seam.wrap_planner(_check_models, _check_plan)


def guard_flat_planner() -> None:
    """For ``mergekit.scripts.merge_raw_pytorch``."""
    seam.wrap_flat_planner(_check_flat_config, _check_flat_plan)


def check_before_planning(config: Any, options: Any) -> None:
    """Check what needs no more of the models than their configs and headers, if they are here.

    Raises:
        MergeConfigError: the merge would fail; all problems in one message.
    """
    _raise(_problems(config) + model_problems(config.referenced_models(), options))


def _check_before_fetching(config: Any, options: Any) -> None:
    check_before_planning(config, options)
    _raise(layer_problems(config, options))
    for remark in path_remarks(sorted(m.model.path for m in config.referenced_models() if Path(m.model.path).exists())):
        LOG.warning(remark)


def _check_all(configs: Mapping[str, Any], folder: str, options: Any) -> None:
    made = [str(Path(folder) / name) for name in configs if name]
    for remark in path_remarks(made):
        LOG.warning(remark)
    problems = []
    for name, config in configs.items():
        if is_ours(config.merge_method):
            there = [model for model in config.referenced_models() if str(Path(model.model.path)) not in made]
            found = [
                f'mergekit-multi can\'t write "{model}" down: rename it without spaces and quotes'
                for model in config.referenced_models()
                if set(' "') & set(str(model))
            ]
            found += _problems(config) + model_problems(there, options)
            problems += [f"{name or 'the unnamed merge'}: {problem}" for problem in found]
    _raise(problems)


def _check_models(checkpoints: Iterable[Checkpoint]) -> None:
    """Quantised models have other names and shapes, which would be so many problems more."""
    found = {checkpoint.reference: quantisation(checkpoint) for checkpoint in checkpoints}
    _raise(
        f"{model} is quantised ({how}); expected float32, float16 or bfloat16 weights"
        for model, how in found.items()
        if how is not None
    )


def _check_plan(plan: Plan) -> None:
    _raise(plan_problems(plan))
    for remark in plan_remarks(plan):
        LOG.warning(remark)


def _check_flat_config(config: Any) -> None:
    _raise(_problems(config) + file_problems(config))


def _check_flat_plan(plan: Plan, intersection: bool) -> None:
    _raise(plan_problems(plan) + ([] if intersection else left_out_problems(plan)))


def _problems(config: Any) -> list[str]:
    return config_problems(plain(config), get(config.merge_method).spec)


def _raise(problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        raise MergeConfigError(found)
