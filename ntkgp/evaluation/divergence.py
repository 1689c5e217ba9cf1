"""Kullback–Leibler divergences between Gaussians."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ntkgp.evaluation.checks import same_shape

__all__ = ["GaussianKL", "gaussian_kl"]


class GaussianKL(NamedTuple):
    """KL divergences in nats between two Gaussians 0 and 1, both ways, joint and summed over the marginals."""

    forward: Tensor
    reverse: Tensor
    marginal_forward: Tensor
    marginal_reverse: Tensor


def gaussian_kl(
    covariance_0: Tensor, covariance_1: Tensor, mean_0: Tensor | None = None, mean_1: Tensor | None = None
) -> GaussianKL:
    r"""
    Kullback–Leibler divergences between two joint Gaussians over the same n numbers, both ways,

    .. math:: \mathrm{KL}(0\|1) = \tfrac12\left[\operatorname{tr}\Sigma_1^{-1}\Sigma_0 - n
        + \log\det\Sigma_1 - \log\det\Sigma_0 + (m_1 - m_0)^\top\Sigma_1^{-1}(m_1 - m_0)\right].

    Compare *predictive* covariances: latent plus the same σ²I on both sides. No jitter is added here; the latent KL of
    a rank-deficient approximation says more about the jitter than about the approximation.

    :param covariance_0: Σ0, ``(n, n)``, positive definite.
    :param covariance_1: Σ1, ``(n, n)``, positive definite.
    :param mean_0: m0, ``(n,)``; without it the means are taken as equal.
    :param mean_1: m1, ``(n,)``; given together with ``mean_0``.
    :return: :class:`GaussianKL`: ``forward`` KL(0‖1), ``reverse`` KL(1‖0), and the sums over the n marginals.
    :raises ValueError: shapes that differ, values that are not finite, a covariance that is not positive definite,
        one mean without the other.

    Cost: O(n³).

    Example:
        >>> gaussian_kl(torch.eye(2), 2 * torch.eye(2)).forward
        tensor(0.1931, dtype=torch.float64)
    """
    first, second = same_shape(covariance_0=covariance_0, covariance_1=covariance_1)
    if first.dim() != 2 or first.shape[0] != first.shape[1]:
        raise ValueError(f"covariance_0: expected a square matrix, got shape {tuple(first.shape)}")
    difference = torch.zeros(len(first), dtype=torch.float64)
    if (mean_0 is None) != (mean_1 is None):
        raise ValueError("mean_0, mean_1: expected both or none")
    if mean_0 is not None and mean_1 is not None:
        start, end = same_shape(mean_0=mean_0, mean_1=mean_1)
        if start.shape != difference.shape:
            raise ValueError(f"mean_0: expected shape ({len(first)},), got {tuple(start.shape)}")
        difference = end - start
    factors = []
    for name, matrix in (("covariance_0", first), ("covariance_1", second)):
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            raise ValueError(f"{name}: not positive definite; add the noise variance to the diagonal of both")
        factors.append(factor)
    marginals = [matrix.diagonal() for matrix in (first, second)]
    return GaussianKL(
        _kl(factors[0], factors[1], difference),
        _kl(factors[1], factors[0], difference),
        _marginal_kl(marginals[0], marginals[1], difference),
        _marginal_kl(marginals[1], marginals[0], difference),
    )


def _kl(factor_p: Tensor, factor_q: Tensor, difference: Tensor) -> Tensor:
    """KL(p‖q) from the Cholesky factors of both covariances."""
    ratio = torch.linalg.solve_triangular(factor_q, factor_p, upper=False)
    shift = torch.linalg.solve_triangular(factor_q, difference.unsqueeze(-1), upper=False)
    logdet = factor_q.diagonal().log().sum() - factor_p.diagonal().log().sum()
    return 0.5 * (ratio.square().sum() - len(factor_p) + shift.square().sum()) + logdet


def _marginal_kl(variance_p: Tensor, variance_q: Tensor, difference: Tensor) -> Tensor:
    """Sum over the coordinates of KL(p_i‖q_i)."""
    ratio = variance_p / variance_q
    return 0.5 * (ratio - 1 - ratio.log() + difference.square() / variance_q).sum()
