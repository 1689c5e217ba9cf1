"""The collapsed Gaussian model of Nyström features: every formula from sums over the data, none from the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkgp.solvers.decompositions import thin_svd

_EPSILON = torch.finfo(torch.float64).eps
# Singular values of A^1/2 T below this fraction of the largest are rounding of T.
_RANK = 1e-7


@dataclass(frozen=True)
class Sums:
    r"""Sums over n rows of data with features :math:`\psi` and targets t, by noise component c = 1 … S.

    :param second: :math:`\sum \psi\psi^\top`, shape (S, R, R).
    :param cross: :math:`\sum \psi t`, shape (S, R).
    :param squares: :math:`\sum t^2`, shape (S,).
    :param counts: numbers of rows, shape (S,).
    :param traces: :math:`\sum \|J_g\|^2`, shape (S, G).
    """

    second: Tensor
    cross: Tensor
    squares: Tensor
    counts: Tensor
    traces: Tensor


class Collapsed:
    r"""The model :math:`t = \varphi w + \varepsilon`, :math:`w \sim N(0, I)`, at one :math:`(\Lambda, \sigma^2)`.

    Features :math:`\varphi = \psi A^{1/2} Q` with :math:`A = \Lambda^{-1}`, Q an orthonormal basis of the range of
    :math:`A^{1/2} T` (see :class:`~ntkgp.linearization.nystrom.LandmarkFeatures`), so that :math:`\varphi\varphi^\top`
    is the Nyström kernel. With :math:`M_c = \sum_{rows\ of\ c} \varphi^\top\varphi` the posterior precision of w is
    :math:`B = I + \sum_c M_c/\sigma_c^2`.

    :param sums: sums over the data.
    :param group: group of each feature, shape (R,).
    :param stacked: T, shape (R, K).
    :param precision: :math:`\lambda_g`, shape (G,).
    :param noise: :math:`\sigma_c^2`, shape (S,).

    Cost: O(R K² + S R² K) time, that is O(G² M³) at most; no data.
    """

    def __init__(self, sums: Sums, group: Tensor, stacked: Tensor, precision: Tensor, noise: Tensor) -> None:
        self.sums, self.group, self.noise = sums, group, noise
        self.variance = precision.reciprocal()
        self.root = self.variance.sqrt()[group]  # shape: (R,)
        left, values = thin_svd(self.root[:, None] * stacked)
        keep = values > _RANK * values[0]
        self.dropped = int((~keep).sum())
        self.basis = left[:, keep]  # Q, shape: (R, r)
        scaled = self.root[:, None] * self.basis
        self.pushed = self.root[:, None] * (sums.second @ scaled)  # A^1/2 S_c A^1/2 Q, shape: (S, R, r)
        self.moments = self.basis.mT @ self.pushed  # M_c, shape: (S, r, r)
        self.moments = 0.5 * (self.moments + self.moments.mT)
        self.total = (self.moments / noise[:, None, None]).sum(0)
        self.precision_factor = torch.linalg.cholesky(
            self.total + torch.eye(len(self.total), dtype=self.total.dtype, device=self.total.device)
        )
        self.pulled = sums.cross * self.root  # A^1/2 b_c, shape: (S, R)
        self.weighted = (self.pulled / noise[:, None]).sum(0)
        self.projected = self.basis.mT @ self.weighted
        self.mean = torch.cholesky_solve(self.projected[:, None], self.precision_factor)[:, 0]  # of w, shape: (r,)

    def features(self, psi: Tensor) -> Tensor:
        """φ of ψ: (..., R) -> (..., r)."""
        return psi @ (self.root[:, None] * self.basis)

    def covariance_root(self, phi: Tensor) -> Tensor:
        """R with R Rᵀ = φ B⁻¹ φᵀ: (m, r) -> (m, r)."""
        return torch.linalg.solve_triangular(self.precision_factor, phi.mT, upper=False).mT

    @property
    def logdet(self) -> float:
        """The log-determinant of Q_nn + D."""
        return 2.0 * float(self.precision_factor.diagonal().log().sum()) + float(self.sums.counts @ self.noise.log())

    @property
    def fit(self) -> float:
        """tᵀ(Q_nn + D)⁻¹t."""
        return max(float((self.sums.squares / self.noise).sum() - self.mean @ self.projected), 0.0)

    @property
    def log_density(self) -> float:
        """The log-density log N(t; 0, Q_nn + D): the evidence of the Nyström model itself (DTC)."""
        return -0.5 * (self.logdet + self.fit + float(self.sums.counts.sum()) * math.log(2.0 * math.pi))

    @property
    def left_over(self) -> Tensor:
        """tr(K − Q_nn) over the rows of each component, shape (S,)."""
        whole = self.sums.traces @ self.variance
        return (whole - self.moments.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp_min(0.0)

    @property
    def sse(self) -> Tensor:
        """Squared error of φ times the mean of w, shape (S,)."""
        first = self.pulled @ (self.basis @ self.mean)
        second = torch.einsum("k,ckl,l->c", self.mean, self.moments, self.mean)
        return (self.sums.squares - 2.0 * first + second).clamp_min(0.0)

    @property
    def coordinates(self) -> Tensor:
        r"""Q E[w]: :math:`\theta_{\star g} = \lambda_g^{-1/2} D_g^\top e_g`, shape (R,)."""
        return self.basis @ self.mean

    def per_group(self, rows: Tensor) -> Tensor:
        """Sum over the features of each group: (R,) -> (G,)."""
        return rows.new_zeros(len(self.variance)).index_add(0, self.group, rows)

    @property
    def inverse_trace(self) -> Tensor:
        """σ²_c times the trace of (Q_nn + D)⁻¹ over the rows of each component, shape (S,)."""
        inverse = torch.cholesky_inverse(self.precision_factor)
        explained = (self.moments * inverse).sum((-2, -1)) / self.noise
        return (self.sums.counts - explained).clamp_min(0.0)

    def dimensions(self) -> Tensor:
        """Effective dimension of each group: what the data take off the prior variance of Q w, shape (G,)."""
        solved = torch.cholesky_solve(self.basis.mT, self.precision_factor).mT
        return self.per_group(((self.basis - solved) * self.basis).sum(-1)).clamp_min(0.0)

    def slopes(self, dimensions: Tensor) -> tuple[Tensor, Tensor]:
        r"""Twice the gradient in :math:`\log\lambda_g` of the density, and of minus half the weighted trace, each (G,).

        With P = Q Qᵀ and E_g the coordinates of group g the kernel moves by
        :math:`A^{1/2}(E_g P + P E_g - P E_g P)A^{1/2}` per unit of :math:`\log a_g`.
        """
        pushed = (self.pushed / self.noise[:, None, None]).sum(0)  # H Q, H = A^1/2 S A^1/2 / σ², shape: (R, r)
        solved = torch.cholesky_solve(pushed.mT, self.precision_factor).mT
        determinant = 2.0 * self.per_group((solved * self.basis).sum(-1)) - dimensions
        e = self.coordinates
        v = self.weighted - pushed @ self.mean
        squares = self.per_group(2.0 * v * e - e.square())
        known = 2.0 * (pushed * self.basis).sum(-1) - ((self.basis @ self.total) * self.basis).sum(-1)
        whole = self.variance * (self.sums.traces / self.noise[:, None]).sum(0)
        return determinant - squares, (whole - self.per_group(known)).clamp_min(0.0)

    def rounding(self) -> float:
        """Estimate of the rounding error of one evaluation of the density and the trace.

        Without that of the sums themselves, which is the same for all hyper-parameters and only moves the optimum.
        """
        size = float(self.total.diagonal().sum() + (self.sums.squares / self.noise).sum())
        whole = float(((self.sums.traces @ self.variance) / self.noise).sum())
        return _EPSILON * (size + whole)

    def bounds(self) -> tuple[float, float]:
        r"""Lower and upper bound of the exact log N(t; 0, K + D).

        With c the trace of :math:`D^{-1}(K - Q)` (laws C11, C12, C18): logdet(K + D) lies between logdet(Q + D) and
        that plus n log(1 + c/n) ≤ c, and the quadratic form between those of Q + (1 + c) D and of Q + D.
        """
        rows = float(self.sums.counts.sum())
        whole = float(((self.sums.traces @ self.variance) / self.noise).sum())
        left = float((self.left_over / self.noise).sum()) + 8.0 * _EPSILON * whole
        lower = self.log_density - 0.5 * rows * math.log1p(left / rows)
        inflated = self.total + (1.0 + left) * torch.eye(len(self.total), dtype=self.total.dtype).to(self.total)
        solved = torch.cholesky_solve(self.projected[:, None], torch.linalg.cholesky(inflated))[:, 0]
        quadratic = (float((self.sums.squares / self.noise).sum()) - float(self.projected @ solved)) / (1.0 + left)
        upper = -0.5 * (self.logdet + max(quadratic, 0.0) + rows * math.log(2.0 * math.pi))
        return lower, max(upper, lower)
