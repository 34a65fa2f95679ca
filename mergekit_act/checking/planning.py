"""A merge's plan, made as ``mergekit-yaml`` makes it, without running it."""

from __future__ import annotations

from typing import Any

from mergekit.io.tasks import LoaderCache
from mergekit.merge import MergePlanner, _model_out_config, get_architecture_info
from mergekit.merge_methods.registry import get

from mergekit_act.checking.configs import MergeConfigError, config_problems, model_problems, plain
from mergekit_act.checking.plans import PlanCheck

__all__ = ["check_before_planning", "plan_merge"]


def check_before_planning(config: Any, options: Any) -> None:
    """Check what needs no model.

    Raises:
        MergeConfigError: the merge would fail; all problems in one message.
    """
    problems = config_problems(plain(config), get(config.merge_method).spec)
    problems += model_problems(config.referenced_models(), options)
    if problems:
        raise MergeConfigError(problems)


def plan_merge(config: Any, options: Any) -> PlanCheck:
    """Plan a merge with one of our methods; the planner seam checks and resolves it.

    Args:
        config: mergekit's ``MergeConfiguration``.
        options: mergekit's ``MergeOptions``.

    Raises:
        MergeConfigError: the merge would fail; all problems in one message.
    """
    LoaderCache().setup(options=options)
    architecture = get_architecture_info(config, options)
    out_config = _model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
    planner = MergePlanner(config, architecture, options=options, out_model_config=out_config)
    planner.plan_to_disk(out_path="")
    check: PlanCheck = planner.mergekit_act_check
    return check
