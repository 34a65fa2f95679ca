"""Find density and weight: every point of a grid is patched into the target in memory and scored."""

from mergekit_act.sweeping.grid import Grid, Point
from mergekit_act.sweeping.patching import PatchedModel
from mergekit_act.sweeping.run import SweepResult, SweepSettings, run_sweep

__all__ = ["Grid", "PatchedModel", "Point", "SweepResult", "SweepSettings", "run_sweep"]
