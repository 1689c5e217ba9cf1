"""Continuous ranked probability score of Gaussians, of mixtures of Gaussians and of samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntkgp.evaluation.metrics.inputs import draws, gaussian, mixture


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
    mean, variance, target = gaussian(mean, variance, target)
    scale = variance.sqrt()
    return (_mean_absolute(target - mean, scale) - scale / math.sqrt(math.pi)).mean()


def mixture_crps(means: Tensor, variances: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""
    Mean continuous ranked probability score of mixtures of Gaussians (a deep ensemble), in closed form,

    .. math:: \sum_k w_k A(y - m_k, s_k^2) - \tfrac12 \sum_{k,l} w_k w_l A(m_k - m_l, s_k^2 + s_l^2), \qquad
        A(m, s^2) = m\,(2\Phi(m/s) - 1) + 2 s\,\varphi(m/s) = \mathrm{E}|\mathcal N(m, s^2)|

    (Grimit, Gneiting, Berrocal and Johnson, 2006).

    :param means: m, one row per component, ``(K, N)`` or ``(K, N, C)``.
    :param variances: total variance s² of each component, latent plus noise, same shape, positive.
    :param target: observed values, ``(N,)`` or ``(N, C)``.
    :param weights: w, ``(K,)``, non-negative, summing to one; default 1/K each.
    :return: a float64 scalar, in the units of the targets.
    :raises ValueError: shapes that do not fit, values that are not finite, variances or weights out of range.

    Cost: O(K²·N·C) time, O(K·N·C) memory.

    Example:
        >>> mixture_crps(torch.zeros(3, 1), torch.ones(3, 1), torch.zeros(1))  # three times the same Gaussian
        tensor(0.2337, dtype=torch.float64)
    """
    means, variances, target, share = mixture(means, variances, target, weights)
    total = (share * _mean_absolute(target - means, variances.sqrt())).sum(0)
    for mean, variance, weight in zip(means, variances, share, strict=True):
        total -= 0.5 * weight * (share * _mean_absolute(mean - means, (variance + variances).sqrt())).sum(0)
    return total.mean()


def sample_crps(samples: Tensor, target: Tensor, *, fair: bool = True) -> Tensor:
    r"""
    Mean continuous ranked probability score of predictions that are given by samples,

    .. math:: \frac1S \sum_i |x_i - y| - \frac{1}{2 S D} \sum_{i,j} |x_i - x_j|,
        \qquad D = S - 1 \text{ (fair)} \text{ or } S.

    The fair form is an unbiased estimate of the score of the distribution that the samples come from, and may fall
    below zero; the other is the score of the samples' own distribution function, larger by
    ``E|x − x′|/(2S)`` on average (Ferro, 2014; Zamo and Naveau, 2018).

    :param samples: draws of the *observation* (latent plus noise), ``(S, N)`` or ``(S, N, C)``.
    :param target: observed values, ``(N,)`` or ``(N, C)``.
    :param fair: without the bias from few samples; needs S ≥ 2.
    :return: a float64 scalar, in the units of the targets.
    :raises ValueError: shapes that do not fit, values that are not finite, too few samples.

    Cost: O(N·C·S·log S) time, O(S·N·C) memory.

    Example:
        >>> sample_crps(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0]), fair=False)
        tensor(0.5000, dtype=torch.float64)
    """
    samples, target = draws(samples, target, least=2 if fair else 1)
    count = len(samples)
    ordered = samples.sort(0).values
    # Σ_{i,j} |x_i − x_j| = 2 Σ_k (2k − S − 1) x_(k).
    weight = 2 * torch.arange(1, count + 1, dtype=torch.float64) - count - 1
    spread = torch.tensordot(weight, ordered, dims=1) / (count * (count - 1 if fair else count))
    return ((samples - target).abs().mean(0) - spread).mean()


def _mean_absolute(mean: Tensor, scale: Tensor) -> Tensor:
    """E|x| of a Gaussian with this mean and standard deviation."""
    z = mean / scale
    return mean * torch.erf(z / math.sqrt(2)) + scale * math.sqrt(2 / math.pi) * torch.exp(-0.5 * z.square())
