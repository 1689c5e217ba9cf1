"""Everything a posterior needs of the training data, computed once per set of hyper-parameters."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor

from ntkgp.evidence.newton import dual_mode
from ntkgp.evidence.system import cholesky_with_jitter
from ntkgp.likelihoods import curvature_factor, residual

logger = logging.getLogger("ntkgp")

_LOST = 1e-3


def _check_rounding(signal: Tensor, noise: Tensor, jitter: float) -> None:
    """Posterior variances are differences of prior variances: say so where little but rounding is left of them."""
    error = float((torch.finfo(torch.float64).eps * signal.max() + jitter) / noise[noise > 0].min())
    if error > _LOST:
        logger.warning(
            "posterior variances near the training inputs have a relative rounding error of about %.0e: prior "
            "variances of up to %.1e hide the noise variance. Raise the precisions or the noise",
            error,
            float(signal.max()),
        )


def _square_root(matrix: Tensor) -> Tensor:
    """R with R Rᵀ = a positive semi-definite matrix."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class GaussianFactors:
    r"""Conditioning on :math:`t = J\theta + \varepsilon`, :math:`\varepsilon \sim N(0, D)`.

    :param cholesky: L with L Lᵀ = K + D, shape (n, n).
    :param noise_root: square root of D: its diagonal (n,), or a Cholesky factor (n, n).
    :param alpha: (K + D)⁻¹ t, shape (n,): θ⋆ = Λ⁻¹Jᵀα.
    :param jitter: what was added to the diagonal of K + D.
    """

    cholesky: Tensor
    noise_root: Tensor
    alpha: Tensor
    jitter: float

    @classmethod
    def build(cls, gram: Tensor, noise: LinearOperator, targets: Tensor) -> GaussianFactors:
        """Factorise; O(n³) time, two n × n matrices."""
        matrix = gram.clone()
        diagonal = noise.diagonal(dim1=-1, dim2=-2).detach().to(gram)
        if isinstance(noise, DiagLinearOperator):
            matrix.diagonal().add_(diagonal)
            root = diagonal.sqrt()
        else:
            dense = noise.to_dense().detach().to(gram)
            matrix += dense
            root = _square_root(dense)
        cholesky, jitter = cholesky_with_jitter(matrix)
        _check_rounding(gram.diagonal(), diagonal, jitter)
        alpha = torch.cholesky_solve(targets.unsqueeze(-1), cholesky).squeeze(-1)
        return cls(cholesky, root, alpha, jitter)

    def root(self, cross: Tensor) -> Tensor:
        """R with R Rᵀ = what the data take off the prior covariance; `cross` K(x, X), shape (m, n) -> (m, n)."""
        return torch.linalg.solve_triangular(self.cholesky, cross.mT, upper=False).mT

    def pathwise(self, prior: Tensor, generator: torch.Generator | None) -> Tensor:
        """Dual weights v of Matheron's rule for prior draws J w, shape (S, n): w + Λ⁻¹Jᵀv is a posterior draw."""
        noise = torch.randn(prior.shape, generator=generator, dtype=prior.dtype, device=prior.device)
        noise = noise * self.noise_root if self.noise_root.ndim == 1 else noise @ self.noise_root.mT
        return -torch.cholesky_solve((prior + noise).mT, self.cholesky).mT


@dataclass(frozen=True)
class SoftmaxFactors:
    r"""Laplace–GGN conditioning with the full C × C curvature :math:`B = SS^\top`, never its inverse or diagonal.

    :param curvature: S, shape (N, C, R) with R = C − 1 (1 for one logistic output).
    :param cholesky: L with L Lᵀ = I + SᵀKS, shape (N·R, N·R).
    :param alpha: dual weights of θ⋆ = Λ⁻¹Jᵀα, shape (N·C,).
    :param jitter: what was added to the diagonal of I + SᵀKS.
    """

    curvature: Tensor
    cholesky: Tensor
    alpha: Tensor
    jitter: float

    @classmethod
    def build(cls, gram: Tensor, logits: Tensor, offset: Tensor, labels: Tensor, variant: str) -> SoftmaxFactors:
        """Factorise, and solve for θ⋆; O((N·C)³) time a Newton step."""
        alpha: Tensor | None = None
        curvature = curvature_factor(logits)
        if variant == "full":
            # θ⋆ minimises the true convex loss: it does not depend on where the curvature is taken.
            mode = dual_mode(gram, offset, labels)
            alpha, curvature = mode.alpha, curvature_factor(mode.logits)
        inner = _reduce(_reduce(gram, curvature).mT, curvature)
        inner = 0.5 * (inner + inner.mT)
        signal = inner.diagonal().clone()
        inner.diagonal().add_(1.0)
        cholesky, jitter = cholesky_with_jitter(inner)
        _check_rounding(signal, torch.ones_like(signal), jitter)
        if variant == "quadratic":
            shift = (logits - offset).unsqueeze(-1)
            linear = (residual(logits, labels).unsqueeze(-1) + curvature @ (curvature.mT @ shift)).reshape(-1)
            solved = torch.cholesky_solve(_reduce((gram @ linear).unsqueeze(0), curvature).mT, cholesky).mT
            alpha = linear - _expand(solved, curvature)[0]
        elif alpha is None:
            alpha = dual_mode(gram, offset, labels).alpha
        return cls(curvature, cholesky, alpha, jitter)

    def root(self, cross: Tensor) -> Tensor:
        """R with R Rᵀ = what the data take off the prior covariance; `cross` K(x, X), shape (m, N·C) -> (m, N·R)."""
        return torch.linalg.solve_triangular(self.cholesky, _reduce(cross, self.curvature).mT, upper=False).mT

    def pathwise(self, prior: Tensor, generator: torch.Generator | None) -> Tensor:
        """As for a Gaussian likelihood, of the pseudo-data SᵀJθ + ε with unit noise."""
        reduced = _reduce(prior, self.curvature)
        noise = torch.randn(reduced.shape, generator=generator, dtype=prior.dtype, device=prior.device)
        return -_expand(torch.cholesky_solve((reduced + noise).mT, self.cholesky).mT, self.curvature)


def _reduce(rows: Tensor, curvature: Tensor) -> Tensor:
    """Multiply by the block-diagonal S from the right: (m, N·C) -> (m, N·R)."""
    points, outputs, _ = curvature.shape
    return torch.einsum("mnc,ncr->mnr", rows.reshape(-1, points, outputs), curvature).flatten(1)


def _expand(rows: Tensor, curvature: Tensor) -> Tensor:
    """Multiply by Sᵀ from the right: (m, N·R) -> (m, N·C)."""
    points, _, rank = curvature.shape
    return torch.einsum("mnr,ncr->mnc", rows.reshape(-1, points, rank), curvature).flatten(1)
