"""What channels are scored by: a module per criterion, or per family of them."""

from mergekit_act.profiling.criteria.activation import profile_pair
from mergekit_act.profiling.criteria.controls import profile_without_data

__all__ = ["profile_pair", "profile_without_data"]
