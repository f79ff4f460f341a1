"""Evaluation: objective metrics, win rates and rankings, and the page that shows them."""

from .metrics import clip_metrics, distinct_ngrams, diversity, frechet_distance
from .report import EvaluateJob, evaluate_models, evaluate_votes, run_evaluate
from .win_rates import (
    MeanScore,
    Rating,
    Strength,
    WinRate,
    bradley_terry,
    mean_opinion_scores,
    wilcoxon_signed_rank,
    win_rate,
    win_rate_matrix,
)

__all__ = [
    "EvaluateJob",
    "MeanScore",
    "Rating",
    "Strength",
    "WinRate",
    "bradley_terry",
    "clip_metrics",
    "distinct_ngrams",
    "diversity",
    "evaluate_models",
    "evaluate_votes",
    "frechet_distance",
    "mean_opinion_scores",
    "run_evaluate",
    "wilcoxon_signed_rank",
    "win_rate",
    "win_rate_matrix",
]
