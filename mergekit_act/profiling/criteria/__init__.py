"""What channels are scored by: an engine per criterion that needs samples; the controls need none."""

from mergekit_act.profiling.criteria.activation import ActivationEngine
from mergekit_act.profiling.criteria.attribution import AttributionEngine
from mergekit_act.profiling.criteria.controls import profile_without_data
from mergekit_act.profiling.criteria.local import LocalEngine
from mergekit_act.profiling.engine import Engine

__all__ = ["ENGINES", "profile_without_data"]

#: Criterion -> what runs the models and scores.
ENGINES: dict[str, type[Engine]] = {
    "activation": ActivationEngine,
    "local": LocalEngine,
    "attribution": AttributionEngine,
}
