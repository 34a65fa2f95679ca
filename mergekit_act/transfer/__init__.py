"""The whole path from an abilities file to a merged model, step by step, each step a command that a user could give."""

from mergekit_act.transfer.plan import TransferSettings
from mergekit_act.transfer.run import Transfer, run_transfer

__all__ = ["Transfer", "TransferSettings", "run_transfer"]
