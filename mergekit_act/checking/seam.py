"""Where mergekit's planners are wrapped, so that merges with our methods are checked as a whole.

A merge method sees one tensor at a time and only the output's name. mergekit's planners know the rest: which source
tensor of which model becomes which output. So the config is checked before models are fetched, and the plan before a
tensor is read; each tensor's ``mask`` setting is then replaced by what the masks select of that very tensor.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from mergekit.merge_methods.registry import get

from mergekit_act import merging
from mergekit_act.checking.configs import MergeConfigError, missing_files, setting_problems, unknown_parameters
from mergekit_act.checking.plans import PlanCheck
from mergekit_act.merging import is_ours

__all__ = ["wrap_flat_planner", "wrap_merge", "wrap_planner"]


def wrap_merge() -> None:
    """Complete ``mergekit.merge``: what a config alone tells is checked before models are fetched."""
    module: Any = sys.modules["mergekit.merge"]
    get_architecture_info = module.get_architecture_info

    @functools.wraps(get_architecture_info)
    def checked_architecture(config: Any, options: Any) -> Any:
        if not is_ours(config.merge_method):
            return get_architecture_info(config, options)
        written = config.model_dump(mode="json")
        problems = unknown_parameters(written, get(config.merge_method).spec) + missing_files(written)
        kinds = {m: m.config(options.trust_remote_code).architectures for m in config.referenced_models()}
        if len({tuple(names or ()) for names in kinds.values()}) > 1 and not options.allow_crimes:
            shown = ", ".join(sorted(f"{model} is {' '.join(names or ())}" for model, names in kinds.items()))
            problems.append(f"the models differ in architecture: {shown}; ACT needs models of one backbone")
        if problems:
            raise MergeConfigError(problems)
        return get_architecture_info(config, options)

    module.get_architecture_info = checked_architecture


def wrap_planner() -> None:
    """Complete ``mergekit.plan.MergePlanner``: check and resolve plans that use one of our methods."""
    planner = sys.modules["mergekit.plan"].MergePlanner
    if not hasattr(planner, "_plan"):
        merging.refuse_to_run("mergekit.plan.MergePlanner has no method _plan")
        return
    plan = planner._plan

    @functools.wraps(plan)
    def checked_plan(self: Any) -> None:
        if not is_ours(self.config.merge_method):
            plan(self)
            return
        try:
            plan(self)
        except Exception as error:  # what mergekit says of a wrong value comes as many kinds of error
            raise MergeConfigError([f"mergekit cannot plan this merge: {error}"]) from error
        check = PlanCheck(self.config, self.options)
        self._tensors = [(weight, check.resolve(weight, task)) for weight, task in self._tensors]
        check.finish()

    planner._plan = checked_plan


def wrap_flat_planner() -> None:
    """Complete ``mergekit.scripts.merge_raw_pytorch``: check its configs that use one of our methods."""
    module: Any = sys.modules["mergekit.scripts.merge_raw_pytorch"]
    if not hasattr(module, "plan_flat_merge"):
        merging.refuse_to_run("mergekit.scripts.merge_raw_pytorch has no function plan_flat_merge")
        return
    plan = module.plan_flat_merge

    @functools.wraps(plan)
    def checked_plan(config: Any, *args: Any, **kwargs: Any) -> Any:
        if is_ours(config.merge_method):
            problems = unknown_parameters(config.model_dump(mode="json"), get(config.merge_method).spec)
            for model in config.models:
                if model.model != config.base_model:
                    settings = {**(config.parameters or {}), **(model.parameters or {})}
                    problems += setting_problems(model.model, settings.get("mask"), settings.get("mask_density"))
            if problems:
                raise MergeConfigError(problems)
        return plan(config, *args, **kwargs)

    module.plan_flat_merge = checked_plan
