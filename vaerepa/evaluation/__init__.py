"""Evaluation: how good a model is, by its loss on validation images and by the images that it generates.

validation_loss: the denoising loss of validation images. For generated images: samples (seeded, resumable) -> extractor
(Inception features) -> statistics (mean, covariance, Fréchet distance) -> reference (those of real images, cached) ->
metrics (FID and others) -> evaluator (all of it in one call, and its report). `python -m vaerepa.evaluate` and
`--eval_steps` (in_training) use the same code.
"""

from vaerepa.evaluation.evaluator import Evaluator, Report, check, open_evaluator
from vaerepa.evaluation.in_training import TrainingEvaluation, newest_report, open_evaluation
from vaerepa.evaluation.metrics import NAMES
from vaerepa.evaluation.validation_loss import validation_loss

__all__ = [
    "NAMES",
    "Evaluator",
    "Report",
    "TrainingEvaluation",
    "check",
    "newest_report",
    "open_evaluation",
    "open_evaluator",
    "validation_loss",
]
