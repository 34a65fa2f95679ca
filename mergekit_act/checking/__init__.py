"""Is a merge what its config says, what would it move, what does it cost? Pure functions over configs and plans."""

from mergekit_act.checking.guards import guard_flat_planner, guard_merge, guard_multimerge, guard_planner

__all__ = ["guard_flat_planner", "guard_merge", "guard_multimerge", "guard_planner"]
