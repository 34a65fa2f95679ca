"""Light supervised fine-tuning after the transfer (paper 4.3), through TRL."""

from mergekit_act.finetuning.recipe import Recipe, choose_device
from mergekit_act.finetuning.run import finetune

__all__ = ["Recipe", "choose_device", "finetune"]
