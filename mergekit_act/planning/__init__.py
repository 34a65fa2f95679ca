"""Mergekit's planner, made ours: all that knows mergekit's inside. Out comes a plan with our selections in it."""

from mergekit_act.planning.headers import only_headers
from mergekit_act.planning.plan import MaskSetting, Plan, PlannedTensor, plan_merge
from mergekit_act.planning.seam import MergeConfigError

__all__ = ["MaskSetting", "MergeConfigError", "Plan", "PlannedTensor", "only_headers", "plan_merge"]
