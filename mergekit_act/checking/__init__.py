"""The planner seam: what can be known before the first tensor is read is checked, all problems in one message."""

from mergekit_act.checking.configs import MergeConfigError
from mergekit_act.checking.seam import wrap_flat_planner, wrap_merge, wrap_multimerge, wrap_planner

__all__ = ["MergeConfigError", "wrap_flat_planner", "wrap_merge", "wrap_multimerge", "wrap_planner"]
