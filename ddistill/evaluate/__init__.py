"""How close samples are to data, and how varied: distances of sets, precision and recall, density and coverage."""

from ddistill.evaluate.diversity import condition_diversity, density_coverage
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
    "condition_diversity",
    "density_coverage",
    "fit_digit_classifier",
    "frechet",
    "frechet_gaussians",
    "precision_recall",
    "sliced_wasserstein",
]
