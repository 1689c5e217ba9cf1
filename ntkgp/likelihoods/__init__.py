"""Likelihoods: softmax and logistic with their links, one Gaussian noise for many outputs, and their curvature."""

from ntkgp.likelihoods.classification import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    bridge_log_concentration,
    point_covariances,
)
from ntkgp.likelihoods.curvature import (
    WhitenedTargets,
    curvature_factor,
    log_likelihood,
    residual,
    validate_labels,
    whitened_targets,
)
from ntkgp.likelihoods.gaussian import MultioutputGaussianLikelihood

__all__ = [
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "MultioutputGaussianLikelihood",
    "WhitenedTargets",
    "bridge_log_concentration",
    "curvature_factor",
    "log_likelihood",
    "point_covariances",
    "residual",
    "validate_labels",
    "whitened_targets",
]
