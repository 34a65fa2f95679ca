"""What a layout, a profile or a mask holds, for people to read."""

from mergekit_act.report.evaluations import list_evaluation, list_sweep
from mergekit_act.report.figures import can_draw, draw_losses, draw_sweep
from mergekit_act.report.listings import list_channels, list_check, list_expert_tokens, list_mask, table

__all__ = [
    "can_draw",
    "draw_losses",
    "draw_sweep",
    "list_channels",
    "list_check",
    "list_evaluation",
    "list_expert_tokens",
    "list_mask",
    "list_sweep",
    "table",
]
