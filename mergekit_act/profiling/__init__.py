"""The profiler: models of a pair segment by segment over the same micro-batches, a score per channel."""

from mergekit_act.profiling.criteria import profile_without_data
from mergekit_act.profiling.pair import ModelPair, open_pair
from mergekit_act.profiling.run import WrittenProfiles, write_profiles
from mergekit_act.profiling.scoring import profile_pair
from mergekit_act.profiling.settings import ProfilingSettings

__all__ = [
    "ModelPair",
    "ProfilingSettings",
    "WrittenProfiles",
    "open_pair",
    "profile_pair",
    "profile_without_data",
    "write_profiles",
]
