"""Scores of predictive distributions, in float64, each defined once.

Regression functions take the mean and the *total* predictive variance (latent plus noise) in the units in which the
score is wanted; :func:`original_units` undoes a standardisation of the targets. Classification functions take
probabilities ``(N, C)``; for a binary model stack ``[1 - p, p]``. Divergences between joint Gaussians are in
:mod:`ntkgp.evaluation.divergence`.
"""

from ntkgp.evaluation.metrics.calibration import (
    ReliabilityBins,
    adaptive_calibration_error,
    adaptive_reliability_bins,
    classwise_calibration_error,
    expected_calibration_error,
    reliability_bins,
)
from ntkgp.evaluation.metrics.classification import accuracy, brier_score, categorical_nll, predictive_entropy
from ntkgp.evaluation.metrics.crps import gaussian_crps, mixture_crps, sample_crps
from ntkgp.evaluation.metrics.detection import (
    OODDetection,
    RiskCoverage,
    aurc,
    ood_auc,
    ood_aupr,
    ood_detection,
    ood_fpr,
    risk_coverage,
    total_variance,
)
from ntkgp.evaluation.metrics.joint import (
    categorical_joint_nll,
    dyadic_tuples,
    gaussian_joint_nll,
    gaussian_samples,
    sampled_joint_nll,
)
from ntkgp.evaluation.metrics.pit import gaussian_pit, mixture_pit, pit_distance, sample_pit
from ntkgp.evaluation.metrics.regression import (
    Coverage,
    centered_quantile_metric,
    coverage,
    coverage_curve,
    gaussian_nll,
    original_units,
    rmse,
)

__all__ = [
    "Coverage",
    "OODDetection",
    "ReliabilityBins",
    "RiskCoverage",
    "accuracy",
    "adaptive_calibration_error",
    "adaptive_reliability_bins",
    "aurc",
    "brier_score",
    "categorical_joint_nll",
    "categorical_nll",
    "centered_quantile_metric",
    "classwise_calibration_error",
    "coverage",
    "coverage_curve",
    "dyadic_tuples",
    "expected_calibration_error",
    "gaussian_crps",
    "gaussian_joint_nll",
    "gaussian_nll",
    "gaussian_pit",
    "gaussian_samples",
    "mixture_crps",
    "mixture_pit",
    "ood_auc",
    "ood_aupr",
    "ood_detection",
    "ood_fpr",
    "original_units",
    "pit_distance",
    "predictive_entropy",
    "reliability_bins",
    "risk_coverage",
    "rmse",
    "sample_crps",
    "sample_pit",
    "sampled_joint_nll",
    "total_variance",
]
