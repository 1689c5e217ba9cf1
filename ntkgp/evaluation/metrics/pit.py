"""Probability integral transform: where each target falls in its predictive distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkgp.evaluation.checks import same_shape
from ntkgp.evaluation.metrics.inputs import draws, gaussian, mixture


def gaussian_pit(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """
    Probability integral transform ``Φ((y − m)/s)`` of each target: uniform on [0, 1] for a calibrated prediction.

    :param mean: predictive mean, ``(N,)`` or ``(N, C)``.
    :param variance: total predictive variance s², latent plus noise, same shape, positive.
    :param target: observed values, same shape.
    :return: values in [0, 1], shape of the target, float64.
    :raises ValueError: shapes that differ, values that are not finite, a variance that is not positive.

    Cost: O(N·C). Source: Dawid, 1984; Gneiting, Balabdaoui and Raftery, 2007.

    Example:
        >>> gaussian_pit(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0]))
        tensor([0.5000, 0.8413], dtype=torch.float64)
    """
    mean, variance, target = gaussian(mean, variance, target)
    return torch.special.ndtr((target - mean) / variance.sqrt())


def mixture_pit(means: Tensor, variances: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """
    Probability integral transform ``Σ_k w_k Φ((y − m_k)/s_k)`` of each target under a mixture of Gaussians.

    :param means: m, one row per component, ``(K, N)`` or ``(K, N, C)``.
    :param variances: total variance s² of each component, same shape, positive.
    :param target: observed values, ``(N,)`` or ``(N, C)``.
    :param weights: w, ``(K,)``, non-negative, summing to one; default 1/K each.
    :return: values in [0, 1], shape of the target, float64.
    :raises ValueError: shapes that do not fit, values that are not finite, variances or weights out of range.

    Cost: O(K·N·C).

    Example:
        >>> mixture_pit(torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1), torch.zeros(1))
        tensor([0.5000], dtype=torch.float64)
    """
    means, variances, target, share = mixture(means, variances, target, weights)
    return (share * torch.special.ndtr((target - means) / variances.sqrt())).sum(0)


def sample_pit(samples: Tensor, target: Tensor, *, seed: int | None = None) -> Tensor:
    """
    Probability integral transform of each target under a prediction that is given by S samples,

    ``(#{x < y} + v·(#{x = y} + 1))/(S + 1)``: exactly uniform if target and samples are exchangeable and v is uniform.

    :param samples: draws of the *observation* (latent plus noise), ``(S, N)`` or ``(S, N, C)``.
    :param target: observed values, ``(N,)`` or ``(N, C)``.
    :param seed: of the uniform v, one per target; without it v = ½, the middle of the target's rank.
    :return: values in (0, 1), shape of the target, float64.
    :raises ValueError: shapes that do not fit, values that are not finite, no sample.

    Cost: O(S·N·C). Source: Smith, 1985 (randomised transform); Hamill, 2001 (rank histogram).

    Example:
        >>> sample_pit(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0.5]))
        tensor([0.3750], dtype=torch.float64)
    """
    samples, target = draws(samples, target, least=1)
    position = torch.full_like(target, 0.5)
    if seed is not None:
        position = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    below, equal = (samples < target).sum(0), (samples == target).sum(0)
    return (below + position * (equal + 1)) / (len(samples) + 1)


def pit_distance(values: Tensor) -> Tensor:
    """
    Largest distance ``sup_u |F(u) − u|`` between the distribution function of transformed targets and the uniform one.

    The Kolmogorov–Smirnov statistic; about 1.36/√N is its 95 % point for N independent values of a calibrated model.

    :param values: results of a probability integral transform, any shape, in [0, 1].
    :return: a float64 scalar in [0, 1].
    :raises ValueError: no value, values outside [0, 1].

    Cost: O(N·log N).

    Example:
        >>> pit_distance(torch.tensor([0.25, 0.75]))
        tensor(0.2500, dtype=torch.float64)
    """
    (ordered,) = same_shape(values=values)
    ordered = ordered.flatten().sort().values
    if float(ordered[0]) < 0 or float(ordered[-1]) > 1:
        raise ValueError(f"values: expected numbers in [0, 1], got {float(ordered[0]):.3g} to {float(ordered[-1]):.3g}")
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max()
