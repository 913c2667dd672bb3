"""Evaluation: how good a model is, by its loss on held-out images and by the images that it draws.

held_out (the loss); samples (seeded images, resumable) -> extractor (their Inception features) -> statistics (mean and
covariance, Fréchet distance) -> reference (those of real images, cached) -> metrics (FID and its like) -> evaluator (all
of it in one call) and report (what is said about it). `python -m vaerepa.evaluate` and `--eval_steps` measure alike.
"""

from vaerepa.evaluation.evaluator import Evaluator, Report, check, open_evaluator
from vaerepa.evaluation.held_out import held_out_loss
from vaerepa.evaluation.in_training import TrainingEvaluation, newest_report, open_evaluation
from vaerepa.evaluation.metrics import NAMES

__all__ = [
    "NAMES",
    "Evaluator",
    "Report",
    "TrainingEvaluation",
    "check",
    "held_out_loss",
    "newest_report",
    "open_evaluation",
    "open_evaluator",
]
