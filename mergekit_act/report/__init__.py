"""What channels, profiles, masks, evaluations and sweeps look like: listings, figures, a page."""

from mergekit_act.report.canvas import can_draw
from mergekit_act.report.composition import draw_moved
from mergekit_act.report.curves import check_drawing, draw_losses, draw_sweep
from mergekit_act.report.essentials import list_essentials
from mergekit_act.report.evaluations import list_evaluation, list_sweep
from mergekit_act.report.listings import list_channels, list_check, list_expert_tokens, list_mask

__all__ = [
    "can_draw",
    "check_drawing",
    "draw_losses",
    "draw_moved",
    "draw_sweep",
    "list_channels",
    "list_check",
    "list_essentials",
    "list_evaluation",
    "list_expert_tokens",
    "list_mask",
    "list_sweep",
]
