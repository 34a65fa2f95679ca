"""Light supervised fine-tuning after the transfer (paper 4.3), through TRL."""

from mergekit_act.finetuning.recipe import Recipe
from mergekit_act.finetuning.run import FineTuned, TrainingSettings, finetune

__all__ = ["FineTuned", "Recipe", "TrainingSettings", "finetune"]
