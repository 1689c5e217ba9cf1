"""Scores of Gaussian predictions of numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ntkgp.evaluation.checks import same_shape
from ntkgp.evaluation.metrics.inputs import gaussian


class Coverage(NamedTuple):
    """Fraction of targets inside the central interval, and the mean width of that interval."""

    fraction: Tensor
    width: Tensor


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
    :raises ValueError: shapes that differ, values that are not finite, a negative variance, a ``target_std`` that is
        not positive.

    Cost: O(N·C).

    Example:
        >>> original_units(torch.tensor([1.0]), torch.tensor([0.25]), 150.0, 80.0)
        (tensor([230.], dtype=torch.float64), tensor([1600.], dtype=torch.float64))
    """
    mean, variance = gaussian(mean, variance)
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
    mean, variance, target = gaussian(mean, variance, target)
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
    mean, variance, target = gaussian(mean, variance, target)
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
    mean, variance, target = gaussian(mean, variance, target)
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


def _half_width(level: float) -> float:
    """Half the width of the central interval of a standard normal."""
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
