"""How close samples are to data: distances between sample sets, precision and recall, class accuracy."""

from ddistill.evaluate.metrics import (
    classifier_accuracy,
    fit_digit_classifier,
    frechet,
    frechet_gaussians,
    precision_recall,
    sliced_wasserstein,
)

__all__ = [
    "classifier_accuracy",
    "fit_digit_classifier",
    "frechet",
    "frechet_gaussians",
    "precision_recall",
    "sliced_wasserstein",
]
