"""The whole path from an abilities file to a merged model, step by step, each step a command that a user could give."""

from mergekit_act.transferring.plan import TransferSettings
from mergekit_act.transferring.run import Transfer, describe_transfer, run_transfer

__all__ = ["Transfer", "TransferSettings", "describe_transfer", "run_transfer"]
