"""The training side of an inverse problem too large to factor: products, preconditioned conjugate gradients, draws."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.likelihoods import Likelihood
from linear_operator.operators import LinearOperator
from torch import Tensor

from ntkgp.models.dual import DataSide
from ntkgp.models.inverse.measured import MeasuredNetwork
from ntkgp.models.noise import NoiseLink
from ntkgp.operators import NetworkHandle, NeuralTangentOperator
from ntkgp.solvers import NystromPreconditioner, WhitenedSystem, solve

logger = logging.getLogger("ntkgp")

_TOLERANCE = 1e-8
_MAX_ITERATIONS = 2000
# Right-hand sides of one run of the solver where a diagonal is asked for.
_COLUMNS = 64


@dataclass(frozen=True)
class IterativeFactors:
    r"""Conditioning on :math:`t = AJ\theta + \varepsilon` by solves with :math:`I + D^{-1/2}K_{yy}D^{-1/2}`.

    :param system: the whitened system.
    :param preconditioner: a Nyström approximation of it: low rank plus noise.
    :param alpha: :math:`(K_{yy} + D)^{-1}t`, shape (n,): θ⋆ = Λ⁻¹JᵀAᵀα.
    :param residual: relative residual of the solve for `alpha`.
    """

    system: WhitenedSystem
    preconditioner: NystromPreconditioner
    alpha: Tensor
    residual: float

    def solve(self, rows: Tensor) -> Tensor:
        """(K + D)⁻¹ V, shape (n, k) -> (n, k)."""
        found = solve(
            self.system, self.system.reduce(rows), preconditioner=self.preconditioner, tolerance=_TOLERANCE,
            max_iterations=_MAX_ITERATIONS,
        )  # fmt: skip
        if not found.converged:
            logger.warning("conjugate gradients stopped at a residual of %.1e", float(found.relative_residual.max()))
        return self.system.expand(found.solution)

    def pathwise(self, prior: Tensor, generator: torch.Generator | None) -> Tensor:
        """Dual weights of Matheron's rule for prior draws AJw, shape (S, n); see ``GaussianFactors.pathwise``."""
        noise = torch.randn(prior.shape, generator=generator, dtype=prior.dtype, device=prior.device)
        noise = noise / self.system.factor[:, 0, 0]
        return -self.solve((prior + noise).mT).mT


class IterativeSide(DataSide):
    """What a visit to the measurements leaves behind where no n × n matrix is held; as ``DualSide``.

    :param lin: the measured network.
    :param x: packed indices of the measurements, shape (n, 1).
    :param max_memory: budget for the preconditioner and for vectors in flight.
    """

    form = "matrix_free"

    def __init__(self, lin: MeasuredNetwork, prior_mean: Any, x: Tensor, max_memory: int) -> None:
        self.lin, self.prior_mean, self.x, self.max_memory = lin, prior_mean, x, max_memory
        with torch.no_grad():
            self.outputs = lin(x).to(torch.float64)
            self.offset = prior_mean(x).reshape_as(self.outputs)
        self._blocks: Tensor | None = None  # shape: (G, n, 1, 1)

    def problem(self, likelihood: Likelihood, y: Tensor, curvature: str, targets: str) -> Any:
        """No evidence is evaluated without Grams."""
        raise ValueError(
            f"form: 'matrix_free' with {self.num_data:,} measurements has no exact evidence; use "
            "model.fit_sampled_evidence(), or form='dual' with a larger max_memory"
        )

    def operator(self, x1: Tensor, x2: Tensor, precision: Tensor) -> NeuralTangentOperator:
        """K(x1, x2), never formed: a product is B·jvp(Λ⁻¹·vjp(Aᵀ·))."""
        variance = precision.detach().reciprocal().to(torch.float64)
        return NeuralTangentOperator(x1, x2, variance, NetworkHandle(self.lin, self.max_memory))

    def system(self, precision: Tensor, likelihood: Likelihood) -> WhitenedSystem:
        """I + D^-½ K D^-½."""
        variance = precision.detach().reciprocal().to(torch.float64)
        operator = self.operator(self.x, self.x, precision)
        diagonal = NoiseLink(likelihood, self.num_data, 1).model().diagonal().to(self.x.device)
        if self._blocks is None:
            self._blocks = self.lin.gram_diagonals(self.x)
        return WhitenedSystem(
            operator.matmul,
            lambda points: self.lin._columns(self.x[:, 0].long(), self.x[points][:, 0].long(), variance),
            torch.einsum("g,gncd->ncd", variance, self._blocks),
            diagonal.rsqrt().reshape(-1, 1, 1),
        )

    def condition(self, precision: Tensor, likelihood: Likelihood, targets: Tensor, curvature: str) -> IterativeFactors:
        """Preconditioner and dual weights at hyper-parameters."""
        system = self.system(precision, likelihood)
        preconditioner = system.random_nystrom()
        rows = (targets.reshape(-1) - self.offset.reshape(-1)).unsqueeze(-1)
        found = solve(
            system, system.reduce(rows), preconditioner=preconditioner, tolerance=_TOLERANCE,
            max_iterations=_MAX_ITERATIONS,
        )  # fmt: skip
        if not found.converged:
            logger.warning("conjugate gradients stopped at a residual of %.1e", float(found.relative_residual.max()))
        alpha = system.expand(found.solution)[:, 0]
        return IterativeFactors(system, preconditioner, alpha, float(found.relative_residual.max()))

    def pathwise(
        self, weights: Tensor, precision: Tensor, factors: IterativeFactors, generator: torch.Generator | None
    ) -> Tensor:
        """What Matheron's rule adds to prior draws of the weights, (S, P)."""
        prior = self.lin.jvp(self.x, weights)[..., 0]
        dual = factors.pathwise(prior, generator)
        pulled = self.lin.vjp(self.x, dual.unsqueeze(-1)).to(torch.float64)
        return pulled / self.lin.groups.expand(precision)


class SolvedReduction(LinearOperator):
    r"""What the data take off a prior covariance, :math:`-K_{x X}(K_{XX} + D)^{-1}K_{Xx}`, by solves.

    :param cross: K(x, X), a matrix-free operator.
    :param factors: of the training side.

    Cost: a product with k vectors is k backward and forward passes twice and k solves; the diagonal one solve for each
    row of x.
    """

    def __init__(self, cross: NeuralTangentOperator, factors: IterativeFactors) -> None:
        super().__init__(cross, factors=factors)
        self.cross, self.factors = cross, factors

    def _size(self) -> torch.Size:
        return torch.Size((self.cross.shape[-2], self.cross.shape[-2]))

    def _transpose_nonbatch(self) -> SolvedReduction:
        return self

    def _matmul(self, rhs: Tensor) -> Tensor:
        columns = rhs.unsqueeze(-1) if rhs.ndim == 1 else rhs
        inner = self.cross.mT.matmul(columns)
        return -self.cross.matmul(self.factors.solve(inner)).reshape(rhs.shape)

    def _diagonal(self) -> Tensor:
        parts = []
        for rows in torch.arange(self.shape[-1], device=self.device).split(_COLUMNS):
            inner = self.cross[rows].to_dense().mT  # shape: (n, k)
            parts.append(-(inner * self.factors.solve(inner)).sum(0))
        return torch.cat(parts)

    def to_dense(self) -> Tensor:
        """The matrix, in chunks of columns."""
        inner = self.cross.to_dense().mT
        return torch.cat([-(inner.mT @ self.factors.solve(part)) for part in inner.split(_COLUMNS, dim=-1)], -1)
