"""Find density and weight: every point of a grid is patched into the target in memory and scored."""

from mergekit_act.sweep.grid import Point, make_grid
from mergekit_act.sweep.patching import PatchedModel
from mergekit_act.sweep.run import run_sweep

__all__ = ["PatchedModel", "Point", "make_grid", "run_sweep"]
