"""What one observation contributes to a variational objective, given a Gaussian over the outputs at its input."""

from __future__ import annotations

import math

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor
from torch.nn.functional import logsigmoid

from ntkgp.likelihoods import curvature_factor
from ntkgp.likelihoods.curvature import log_likelihood, residual
from ntkgp.models.noise import is_classification
from ntkgp.models.posterior import without_rounding

_LOG_2PI = math.log(2 * math.pi)
# Smaller α: the α form differs from its limit, the ELBO, by less than its rounding.
_LEAST_POWER = 1e-8


def noise_block(likelihood: Likelihood, num_outputs: int) -> Tensor:
    """Covariance of the noise of the outputs of one input, (C, C)."""
    shape = torch.Size((1,) if num_outputs == 1 else (1, num_outputs))
    return likelihood._shaped_noise_covar(shape).to_dense().to(torch.float64).reshape(num_outputs, num_outputs)


def gaussian_term(residuals: Tensor, covariance: Tensor, noise: Tensor, power: float) -> Tensor:
    r"""ELBO (``power=0``): :math:`\mathbb E_q \log N(y; f, D)`; else the α form,

    .. math:: \tfrac1\alpha\log\mathbb E_q N(y; f, D)^\alpha = \tfrac1\alpha\Big[\log N(y; m, V + D/\alpha)
        + \tfrac12\log\det(2\pi D/\alpha) - \tfrac\alpha2\log\det(2\pi D)\Big].

    :param residuals: y − m, (B, C).
    :param covariance: V, (B, C, C).
    :param noise: D, (C, C).
    """
    c = residuals.shape[-1]
    factor = torch.linalg.cholesky(noise)
    logdet = 2 * factor.diagonal().log().sum() + c * _LOG_2PI
    if power < _LEAST_POWER:
        scaled = torch.linalg.solve_triangular(factor, residuals.mT, upper=False).square().sum(0)
        inverse = torch.cholesky_inverse(factor)
        return -0.5 * (logdet + scaled + (inverse * covariance).sum((-1, -2)))
    total, failed = torch.linalg.cholesky_ex(covariance + noise / power)
    if bool(failed.any()):  # the noise is below the rounding of the covariance
        total = torch.linalg.cholesky(without_rounding(covariance) + noise / power)
    scaled = torch.linalg.solve_triangular(total, residuals.unsqueeze(-1), upper=False).square().sum((-1, -2))
    density = -0.5 * (2 * total.diagonal(dim1=-2, dim2=-1).log().sum(-1) + c * _LOG_2PI + scaled)
    return (density + 0.5 * (logdet - c * math.log(power)) - 0.5 * power * logdet) / power


def curvature_term(logits: Tensor, labels: Tensor, covariance: Tensor, shift: Tensor | None) -> Tensor:
    r"""Expected second-order expansion of the log-likelihood at the network's logits f (the GGN pseudo-Gaussian).

    .. math:: \log p(y \mid f) + r^\top s - \tfrac12 s^\top B s - \tfrac12 \operatorname{tr}(B V)

    :param shift: s = m − f, (B, C), or None for a mean that is the network's output.
    """
    factor = curvature_factor(logits)
    value = log_likelihood(logits, labels) - 0.5 * ((covariance @ factor) * factor).sum((-1, -2))
    if shift is None:
        return value
    whitened = torch.einsum("ncr,nc->nr", factor, shift)
    return value + (residual(logits, labels) * shift).sum(-1) - 0.5 * whitened.square().sum(-1)


def probit_term(mean: Tensor, labels: Tensor, covariance: Tensor) -> Tensor:
    """Log predictive probability of the labels under the probit link: the objective of VaLLA's code for α = 1."""
    scaled = mean / (1 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0)).sqrt()
    return _label_log_probability(scaled, labels)


def sampled_term(mean: Tensor, labels: Tensor, covariance: Tensor, power: float, draws: Tensor) -> Tensor:
    r"""Monte Carlo of :math:`\mathbb E_q\log p(y|f)` (``power=0``), or :math:`\tfrac1\alpha\log\mathbb E_q p^\alpha`.

    :param draws: standard normal numbers, (S, B, C).
    """
    c = mean.shape[-1]
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12).detach()
    jitter = 1e-9 * scale[:, None, None] * torch.eye(c, dtype=mean.dtype, device=mean.device)
    root = torch.linalg.cholesky(0.5 * (covariance + covariance.mT) + jitter)
    values = _label_log_probability(mean + torch.einsum("ncr,snr->snc", root, draws), labels.expand(draws.shape[:2]))
    if power < _LEAST_POWER:
        return values.mean(0)
    return ((power * values).logsumexp(0) - math.log(len(draws))) / power


def _label_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[-1] == 1:
        return logsigmoid(logits.squeeze(-1) * (2 * labels - 1))
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def curvature_rows(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """S with S Sᵀ = B, the curvature of the negative log-likelihood at the network's outputs, (B, C, R)."""
    if is_classification(likelihood):
        return curvature_factor(outputs)
    noise = noise_block(likelihood, outputs.shape[-1]).detach()
    root = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(noise)))
    return root.expand(len(outputs), *root.shape)
