"""The profiler: both models segment by segment over the same micro-batches, differences summed per channel."""

from mergekit_act.devices import default_device, default_dtype
from mergekit_act.profiling.activation import profile_pair
from mergekit_act.profiling.controls import profile_without_data
from mergekit_act.profiling.pair import ModelPair, open_pair
from mergekit_act.profiling.run import write_profiles

__all__ = [
    "ModelPair",
    "default_device",
    "default_dtype",
    "open_pair",
    "profile_pair",
    "profile_without_data",
    "write_profiles",
]
