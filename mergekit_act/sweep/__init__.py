"""Find density and weight: every point of a grid is patched into the target in memory and scored."""

from mergekit_act.sweep.grid import Grid, Point
from mergekit_act.sweep.patching import PatchedModel
from mergekit_act.sweep.run import SweepResult, SweepSettings, run_sweep

__all__ = ["Grid", "PatchedModel", "Point", "SweepResult", "SweepSettings", "run_sweep"]
