"""What a layout, a profile or a mask holds, for people to read."""

from mergekit_act.report.listings import list_channels, list_check, list_expert_tokens, list_mask, table

__all__ = ["list_channels", "list_check", "list_expert_tokens", "list_mask", "table"]
