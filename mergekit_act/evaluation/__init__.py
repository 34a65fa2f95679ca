"""Evaluation on held-out samples: likelihood of the answers, exact match of generated ones, bootstrap intervals."""

from mergekit_act.evaluation.answers import Generated, NotFiniteError, generate_answers, score_answers
from mergekit_act.evaluation.held_out import HeldOut, collect_held_out
from mergekit_act.evaluation.run import Evaluated, Settings, evaluate_models
from mergekit_act.evaluation.statistics import Measure

__all__ = [
    "Evaluated",
    "Generated",
    "HeldOut",
    "Measure",
    "NotFiniteError",
    "Settings",
    "collect_held_out",
    "evaluate_models",
    "generate_answers",
    "score_answers",
]
