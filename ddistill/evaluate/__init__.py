"""How close samples are to data, and how varied: distances of sets, precision and recall, density and coverage."""

from ddistill.evaluate.diversity import condition_diversity
from ddistill.evaluate.kernels import clip_score, cmmd, inception_score, kid
from ddistill.evaluate.metrics import (
    classifier_accuracy,
    fit_digit_classifier,
    frechet,
    frechet_gaussians,
    sliced_wasserstein,
)
from ddistill.evaluate.moments import Moments, moments_of
from ddistill.evaluate.neighbours import density_coverage, manifold, precision_recall

__all__ = [
    "Moments",
    "classifier_accuracy",
    "clip_score",
    "cmmd",
    "condition_diversity",
    "density_coverage",
    "fit_digit_classifier",
    "frechet",
    "frechet_gaussians",
    "inception_score",
    "kid",
    "manifold",
    "moments_of",
    "precision_recall",
    "sliced_wasserstein",
]
