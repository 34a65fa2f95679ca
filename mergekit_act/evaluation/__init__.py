"""Evaluation on held-out samples: likelihood of the answers, exact match of generated ones, bootstrap intervals."""

from mergekit_act.evaluation.answers import NotFiniteError, generate_answers, score_answers
from mergekit_act.evaluation.held_out import HeldOut, collect_held_out
from mergekit_act.evaluation.run import Evaluated, Evaluation, EvaluationSettings, run_evaluation
from mergekit_act.evaluation.statistics import Measure

__all__ = [
    "Evaluated",
    "Evaluation",
    "EvaluationSettings",
    "HeldOut",
    "Measure",
    "NotFiniteError",
    "collect_held_out",
    "generate_answers",
    "run_evaluation",
    "score_answers",
]
