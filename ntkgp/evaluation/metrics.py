"""Scores of predictive distributions, in float64, each defined once.

Regression functions take the mean and the *total* predictive variance (latent plus noise) in the units in which the
score is wanted; :func:`original_units` undoes a standardisation of the targets. Classification functions take
probabilities ``(N, C)``; for a binary model stack ``[1 - p, p]``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ntkgp.evaluation.checks import as_float64, same_shape

__all__ = [
    "Coverage",
    "ReliabilityBins",
    "accuracy",
    "brier_score",
    "categorical_nll",
    "centered_quantile_metric",
    "coverage",
    "coverage_curve",
    "expected_calibration_error",
    "gaussian_crps",
    "gaussian_nll",
    "ood_auc",
    "original_units",
    "predictive_entropy",
    "reliability_bins",
    "rmse",
]


class Coverage(NamedTuple):
    """Fraction of targets inside the central interval, and the mean width of that interval."""

    fraction: Tensor
    width: Tensor


class ReliabilityBins(NamedTuple):
    """Points, mean confidence and accuracy per confidence bin; empty bins hold ``nan``."""

    points: Tensor
    confidence: Tensor
    accuracy: Tensor


def original_units(
    mean: Tensor, variance: Tensor, target_mean: Tensor | float, target_std: Tensor | float
) -> tuple[Tensor, Tensor]:
    """
    Undo the standardisation of the targets: ``m·s_y + m_y`` and ``v·s_y²``.

    :param mean: predictive mean, ``(N,)`` or ``(N, C)``, of standardised targets.
    :param variance: predictive variance, same shape.
    :param target_mean: m_y, a number or ``(C,)``.
    :param target_std: s_y, a number or ``(C,)``, positive.
    :return: mean and variance in the units of the targets, float64.

    Cost: O(N·C).

    Example:
        >>> original_units(torch.tensor([1.0]), torch.tensor([0.25]), 150.0, 80.0)
        (tensor([230.], dtype=torch.float64), tensor([1600.], dtype=torch.float64))
    """
    mean, variance = _gaussian(mean, variance)
    shift = torch.as_tensor(target_mean, dtype=torch.float64)
    scale = torch.as_tensor(target_std, dtype=torch.float64)
    if not bool((scale > 0).all()) or not bool(torch.isfinite(scale).all()):
        raise ValueError(f"target_std: expected positive finite numbers, got {target_std}")
    return mean * scale + shift, variance * scale.square()


def gaussian_nll(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    r"""
    Mean negative log-likelihood of independent Gaussians,

    .. math:: \frac1N \sum_n \tfrac12\left[\log 2\pi s_n^2 + (y_n - m_n)^2 / s_n^2\right].

    :param mean: predictive mean, ``(N,)`` or ``(N, C)``.
    :param variance: total predictive variance s², latent plus noise, same shape, positive.
    :param target: observed values, same shape.
    :return: a float64 scalar, in nats per target.
    :raises ValueError: shapes that differ, values that are not finite, a variance that is not positive.

    Cost: O(N·C).

    Example:
        >>> gaussian_nll(torch.zeros(1), torch.ones(1), torch.zeros(1))
        tensor(0.9189, dtype=torch.float64)
    """
    mean, variance, target = _gaussian(mean, variance, target)
    return 0.5 * (math.log(2 * math.pi) + variance.log() + (target - mean).square() / variance).mean()


def rmse(mean: Tensor, target: Tensor) -> Tensor:
    """
    Root mean squared error of a point prediction.

    :param mean: prediction, ``(N,)`` or ``(N, C)``.
    :param target: observed values, same shape.
    :return: a float64 scalar, in the units of the targets.
    :raises ValueError: shapes that differ, values that are not finite.

    Cost: O(N·C).

    Example:
        >>> rmse(torch.tensor([1.0, 1.0]), torch.tensor([4.0, 5.0]))
        tensor(3.5355, dtype=torch.float64)
    """
    mean, target = same_shape(mean=mean, target=target)
    return (mean - target).square().mean().sqrt()


def gaussian_crps(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    r"""
    Mean continuous ranked probability score of Gaussians,

    .. math:: s\left[z(2\Phi(z) - 1) + 2\varphi(z) - 1/\sqrt\pi\right], \qquad z = (y - m)/s,

    (Gneiting and Raftery, 2007, eq. 21, with the sign that makes small good).

    :param mean: predictive mean, ``(N,)`` or ``(N, C)``.
    :param variance: total predictive variance, same shape, positive.
    :param target: observed values, same shape.
    :return: a float64 scalar, in the units of the targets.
    :raises ValueError: shapes that differ, values that are not finite, a variance that is not positive.

    Cost: O(N·C).

    Example:
        >>> gaussian_crps(torch.zeros(1), torch.ones(1), torch.zeros(1))
        tensor(0.2337, dtype=torch.float64)
    """
    mean, variance, target = _gaussian(mean, variance, target)
    scale = variance.sqrt()
    z = (target - mean) / scale
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return (scale * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))).mean()


def coverage(mean: Tensor, variance: Tensor, target: Tensor, level: float = 0.95) -> Coverage:
    """
    Fraction of targets inside the central interval ``m ± Φ⁻¹(½ + level/2)·s`` (also called PICP), and its mean width.

    :param mean: predictive mean, ``(N,)`` or ``(N, C)``.
    :param variance: total predictive variance, same shape, positive.
    :param target: observed values, same shape.
    :param level: probability of the interval, in (0, 1).
    :return: :class:`Coverage` with fields ``fraction`` and ``width``, float64 scalars.
    :raises ValueError: shapes that differ, values that are not finite, a variance or level out of range.

    Cost: O(N·C).

    Example:
        >>> coverage(torch.zeros(4), torch.ones(4), torch.tensor([0.0, 1.0, -1.5, 3.0])).fraction
        tensor(0.7500, dtype=torch.float64)
    """
    mean, variance, target = _gaussian(mean, variance, target)
    half = _half_width(level) * variance.sqrt()
    inside = (target - mean).abs() <= half
    return Coverage(inside.double().mean(), 2 * half.mean())


def coverage_curve(mean: Tensor, variance: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    """
    Observed coverage c(a) of the central intervals of probability a; the identity for a calibrated model.

    :param mean: predictive mean, ``(N,)`` or ``(N, C)``.
    :param variance: total predictive variance, same shape, positive.
    :param target: observed values, same shape.
    :param levels: interval probabilities a, ``(L,)``, each in [0, 1]; c(0) = 0 and c(1) = 1.
    :return: ``(L,)``, float64.
    :raises ValueError: shapes that differ, values that are not finite, a variance or level out of range.

    Cost: O(N·C·(log N·C + L)).

    Example:
        >>> coverage_curve(torch.zeros(3), torch.ones(3), torch.tensor([0.1, 1.0, 2.0]), torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.3333, 1.0000], dtype=torch.float64)
    """
    mean, variance, target = _gaussian(mean, variance, target)
    levels = torch.as_tensor(levels, dtype=torch.float64)
    if levels.dim() != 1 or not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(f"levels: expected a vector of numbers in [0, 1], got {levels.tolist()}")
    z = ((target - mean).abs() / variance.sqrt()).flatten().sort().values
    half = math.sqrt(2) * torch.erfinv(levels)
    inside = torch.searchsorted(z, half, right=True).double() / len(z)
    return torch.where(levels == 0, torch.zeros_like(inside), inside)


def centered_quantile_metric(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """
    Area between the coverage curve and the identity: the trapezoid rule for ``|c(a) − a|`` on a = 0, 0.1, …, 1.

    Both ends are zero, so the value is ``0.1·Σ |c(a) − a|`` over a = 0.1, …, 0.9 (Ortega, Rodríguez-Santana and
    Hernández-Lobato, ICML 2024, where it is called CQM).

    :param mean: predictive mean, ``(N,)`` or ``(N, C)``.
    :param variance: total predictive variance, same shape, positive.
    :param target: observed values, same shape.
    :return: a float64 scalar; 0 is calibrated, 0.45 is the value of useless intervals.
    :raises ValueError: shapes that differ, values that are not finite, a variance that is not positive.

    Cost: O(N·C·log N·C).

    Example:
        >>> centered_quantile_metric(torch.zeros(5), torch.ones(5), torch.full((5,), 100.0))
        tensor(0.4500, dtype=torch.float64)
    """
    levels = torch.arange(1, 10, dtype=torch.float64) / 10
    return 0.1 * (coverage_curve(mean, variance, target, levels) - levels).abs().sum()


def accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """
    Fraction of points whose most probable class is the label.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :return: a float64 scalar.
    :raises ValueError: rows that are no probabilities, labels out of range.
    :raises TypeError: labels that are not integers.

    Cost: O(N·C).

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        tensor(0.5000, dtype=torch.float64)
    """
    probabilities, labels = _categorical(probabilities, labels)
    return (probabilities.argmax(-1) == labels).double().mean()


def categorical_nll(probabilities: Tensor, labels: Tensor) -> Tensor:
    """
    Mean of ``−log p_y``; infinite when a label has probability zero.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :return: a float64 scalar, in nats per point.
    :raises ValueError: rows that are no probabilities, labels out of range.
    :raises TypeError: labels that are not integers.

    Cost: O(N).

    Example:
        >>> categorical_nll(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
        tensor(0.6931, dtype=torch.float64)
    """
    probabilities, labels = _categorical(probabilities, labels)
    return -probabilities.gather(-1, labels.unsqueeze(-1)).log().mean()


def brier_score(probabilities: Tensor, labels: Tensor) -> Tensor:
    """
    Mean over points of ``Σ_c (p_c − 1{y = c})²``, summed (not averaged) over the classes.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :return: a float64 scalar in [0, 2].
    :raises ValueError: rows that are no probabilities, labels out of range.
    :raises TypeError: labels that are not integers.

    Cost: O(N·C).

    Example:
        >>> brier_score(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        tensor(0.1250, dtype=torch.float64)
    """
    probabilities, labels = _categorical(probabilities, labels)
    hot = torch.nn.functional.one_hot(labels, probabilities.shape[-1])
    return (probabilities - hot).square().sum(-1).mean()


def reliability_bins(probabilities: Tensor, labels: Tensor, bins: int = 15) -> ReliabilityBins:
    """
    Points, mean confidence and accuracy in equal bins ``(lo, hi]`` of the largest probability.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :param bins: number of bins on [0, 1].
    :return: :class:`ReliabilityBins`, each field ``(bins,)`` in float64; confidence and accuracy of an empty bin are
        ``nan``.
    :raises ValueError: rows that are no probabilities, labels out of range, ``bins < 1``.
    :raises TypeError: labels that are not integers.

    Cost: O(N·(C + log bins)).

    Example:
        >>> reliability_bins(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]), bins=2)
        ReliabilityBins(points=tensor([1., 1.], dtype=torch.float64),
            confidence=tensor([0.5000, 0.7500], dtype=torch.float64),
            accuracy=tensor([0., 1.], dtype=torch.float64))
    """
    probabilities, labels = _categorical(probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins: expected a positive integer, got {bins}")
    confidence, predicted = probabilities.max(-1)
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    index = (torch.bucketize(confidence, edges, right=False) - 1).clamp(0, bins - 1)
    zeros = torch.zeros(bins, dtype=torch.float64)
    count = zeros.index_add(0, index, torch.ones_like(confidence))
    mean_confidence = zeros.index_add(0, index, confidence) / count
    return ReliabilityBins(count, mean_confidence, zeros.index_add(0, index, (predicted == labels).double()) / count)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """
    Expected calibration error ``Σ_b (n_b/N)·|accuracy_b − confidence_b|`` over equal bins of the largest probability.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :param bins: number of bins ``(lo, hi]`` on [0, 1].
    :return: a float64 scalar in [0, 1].
    :raises ValueError: rows that are no probabilities, labels out of range, ``bins < 1``.
    :raises TypeError: labels that are not integers.

    Cost: O(N·(C + log bins)). Source: Guo et al., ICML 2017, eq. 3.

    Example:
        >>> expected_calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        tensor(0.2500, dtype=torch.float64)
    """
    count, confidence, correct = reliability_bins(probabilities, labels, bins)
    return (count / count.sum() * (correct - confidence).abs()).nan_to_num(nan=0.0).sum()


def predictive_entropy(probabilities: Tensor) -> Tensor:
    """
    Entropy ``−Σ_c p_c log p_c`` of each predictive distribution.

    :param probabilities: ``(N, C)``, rows sum to one.
    :return: ``(N,)``, float64, in nats.
    :raises ValueError: rows that are no probabilities.

    Cost: O(N·C).

    Example:
        >>> predictive_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    return torch.special.entr(_probabilities(probabilities)).sum(-1)


def ood_auc(inside: Tensor, outside: Tensor) -> Tensor:
    """
    Area under the ROC curve of a score that should be larger out of distribution (entropy or latent variance).

    The probability that a random point outside scores higher than a random point inside, ties counted as one half.

    :param inside: scores of in-distribution points, ``(N,)``.
    :param outside: scores of out-of-distribution points, ``(M,)``.
    :return: a float64 scalar in [0, 1]; 0.5 is chance.
    :raises ValueError: an empty vector, ``nan`` scores.

    Cost: O((N + M) log N).

    Example:
        >>> ood_auc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor(0.8750, dtype=torch.float64)
    """
    scores = {}
    for name, score in (("inside", inside), ("outside", outside)):
        scores[name] = as_float64(name, score, finite=False).contiguous()
        if score.dim() != 1 or len(score) == 0:
            raise ValueError(f"{name}: expected a vector of at least one score, got shape {tuple(score.shape)}")
        if bool(scores[name].isnan().any()):
            raise ValueError(f"{name}: expected no nan among the scores")
    ordered = scores["inside"].sort().values
    below = torch.searchsorted(ordered, scores["outside"], right=False)
    not_above = torch.searchsorted(ordered, scores["outside"], right=True)
    return (below + not_above).double().mean() / (2 * len(ordered))


def _half_width(level: float) -> float:
    """Half the width of the central interval of a standard normal."""
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))


def _gaussian(mean: Tensor, variance: Tensor, *target: Tensor) -> list[Tensor]:
    """Mean, variance and target in float64, refused unless the variance is positive."""
    named = {"mean": mean, "variance": variance}
    if target:
        named["target"] = target[0]
    converted = same_shape(**named)
    if not bool((converted[1] > 0).all()):
        raise ValueError(f"variance: expected positive numbers, got a minimum of {float(converted[1].min()):.3g}")
    return converted


def _probabilities(probabilities: Tensor) -> Tensor:
    """Probabilities in float64, refused unless each row is a distribution up to single precision."""
    converted = as_float64("probabilities", probabilities)
    if converted.dim() != 2 or converted.numel() == 0:
        raise ValueError(f"probabilities: expected shape (N, C), got {tuple(converted.shape)}")
    if bool((converted < 0).any()) or not torch.allclose(converted.sum(-1), torch.ones(1).double(), atol=1e-4, rtol=0):
        raise ValueError("probabilities: expected rows of non-negative numbers that sum to one")
    return converted


def _categorical(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and labels, refused unless the labels are classes of the rows."""
    converted = _probabilities(probabilities)
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of integers, got {kind}")
    labels = labels.detach().to("cpu", torch.long)
    num_data, num_classes = converted.shape
    if labels.shape != (num_data,):
        raise ValueError(f"labels: expected shape ({num_data},), got {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"labels: expected classes 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    return converted, labels
