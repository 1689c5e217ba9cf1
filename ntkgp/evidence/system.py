"""Linear systems A = sum_g w_g K_g + D: log-determinant, traces and quadratic forms for every evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ntkgp.evidence.blocks import apply_factor, expand, project
from ntkgp.evidence.problem import NoiseModel
from ntkgp.evidence.stack import GramStack

EIGENVALUE_CUT = 1e-10
_EPSILON = torch.finfo(torch.float64).eps
_NO_TARGETS = "targets are needed for alpha, got None"
_JITTERS = (0.0, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6)


@dataclass(frozen=True)
class Solution:
    r"""What one value of the weights gives, with :math:`A = \sum_g w_g K_g + D` and :math:`\alpha = A^{-1} t`.

    :param logdet: log det A.
    :param dimension: :math:`w_g \mathrm{tr}(A^{-1} K_g)`, shape (G,).
    :param inverse_diagonal: diagonal of A^-1 summed over the rows of each noise component, shape (S,).
    :param jitter: what was added to the diagonal of A.
    :param rounding: estimate of the rounding error of `logdet` and `fit`.
    :param fit: :math:`t^\top A^{-1} t`; zero without targets, like the following three.
    :param quadratic: :math:`w_g \alpha^\top K_g \alpha`, shape (G,).
    :param alpha_squares: squares of alpha summed over the rows of each noise component, shape (S,).
    :param sse: squared error :math:`|D\alpha|^2 = |t - J\theta_\star|^2`.
    """

    logdet: float
    dimension: Tensor
    inverse_diagonal: Tensor
    jitter: float
    rounding: float
    fit: float
    quadratic: Tensor
    alpha_squares: Tensor
    sse: float


class LinearSystem(Protocol):
    """A stack of Grams prepared for many values of the weights and the noise."""

    eigenvalues_cut: int

    def solve(self, weights: Tensor, noise: Tensor, total: Tensor | None = None) -> Solution:
        """Factorise and solve at `weights` (G,) and learned variances `noise` (S,).

        `total` is the weighted sum of the Grams, where the caller has it.
        """

    def alpha(self, weights: Tensor, noise: Tensor) -> Tensor:
        """A^-1 t alone, shape (n,)."""


def linear_system(
    stack: GramStack, targets: Tensor | None, noise: NoiseModel, factor: Tensor | None = None
) -> LinearSystem:
    """Prepare the system: one eigendecomposition where it suffices, else a Cholesky factorisation per value.

    With a block-diagonal `factor` S the Grams are S^T K_g S, of which no stack is made: tr(S^T K_g S A^-1) =
    tr(K_g S A^-1 S^T).
    """
    if stack.shape[0] == 1 and (noise.is_uniform or noise.num_learned == 0):
        gram = stack.weighted_sum(torch.ones(1, dtype=torch.float64, device=stack.device))
        return SpectralSystem(gram if factor is None else project(gram, factor), targets, noise)
    return DenseSystem(stack, targets, noise, factor)


def cholesky_with_jitter(matrix: Tensor) -> tuple[Tensor, float]:
    """Cholesky factor of a symmetric matrix and the jitter that it needed, tried relative to the mean diagonal."""
    mean = float(matrix.diagonal().mean())
    added = 0.0
    for relative in _JITTERS:
        matrix.diagonal().add_(relative * mean - added)
        added = relative * mean
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return factor, added
    raise ValueError(
        f"grams: the kernel matrix is not positive definite even with jitter {added:.1e} ({_JITTERS[-1]:.0e} of its "
        "mean diagonal); Grams must be symmetric positive semi-definite"
    )


class DenseSystem:
    """Any number of groups and any diagonal noise: one Cholesky factorisation and one inverse per value.

    Cost per value: n^3 + O(G n^2), the Grams being read three times; memory 4 n^2 besides them.
    """

    eigenvalues_cut = 0

    def __init__(
        self, stack: GramStack, targets: Tensor | None, noise: NoiseModel, factor: Tensor | None = None
    ) -> None:
        """Keep views of the Grams."""
        self.stack, self.targets, self.noise, self.factor = stack, targets, noise, factor

    def _factorise(
        self, weights: Tensor, noise: Tensor, total: Tensor | None
    ) -> tuple[Tensor, Tensor, float, float, Tensor | None]:
        """Diagonal of the noise, Cholesky factor, jitter and trace of A, and alpha."""
        diagonal = self.noise.diagonal(noise)
        matrix = self.stack.weighted_sum(weights) if total is None else total
        if self.factor is not None:
            matrix = project(matrix, self.factor)
        elif total is not None:
            matrix = matrix.clone()
        matrix.diagonal().add_(diagonal)
        trace = float(matrix.diagonal().sum())
        factor, jitter = cholesky_with_jitter(matrix)
        alpha = None if self.targets is None else torch.cholesky_solve(self.targets[:, None], factor)[:, 0]
        return diagonal, factor, jitter, trace, alpha

    def solve(self, weights: Tensor, noise: Tensor, total: Tensor | None = None) -> Solution:
        """Factorise and solve; see :class:`Solution`."""
        diagonal, factor, jitter, trace, alpha = self._factorise(weights, noise, total)
        logdet = 2.0 * float(factor.diagonal().log().sum())
        inverse = torch.cholesky_inverse(factor)
        del factor
        dimension = weights * self.stack.inner(inverse if self.factor is None else expand(inverse, self.factor))
        inverse_diagonal = self.noise.sum_per_component(inverse.diagonal())
        # A backward error E of A changes logdet A by tr(A^-1 E) and t^T A^-1 t by alpha^T E alpha.
        sensitivity = inverse.diagonal().sum() + (0.0 if alpha is None else alpha.square().sum())
        rounding = _EPSILON * trace * float(sensitivity)
        if alpha is None or self.targets is None:
            return _without_targets(logdet, dimension, inverse_diagonal, jitter, rounding)
        rows = alpha if self.factor is None else apply_factor(self.factor, alpha)
        return Solution(
            logdet,
            dimension.clamp_min(0.0),
            inverse_diagonal,
            jitter,
            rounding,
            fit=float(self.targets @ alpha),
            quadratic=(weights * self.stack.quadratic(rows)).clamp_min(0.0),
            alpha_squares=self.noise.sum_per_component(alpha.square()),
            sse=float((diagonal * alpha).square().sum()),
        )

    def alpha(self, weights: Tensor, noise: Tensor) -> Tensor:
        """A^-1 t alone, shape (n,)."""
        alpha = self._factorise(weights, noise, None)[-1]
        if alpha is None:
            raise ValueError(_NO_TARGETS)
        return alpha


class SpectralSystem:
    """One group with noise that is one learned variance, or known: one eigendecomposition, then O(n) per value.

    Known variances D are whitened once: A = D^1/2 (w D^-1/2 K D^-1/2 + I) D^1/2. Eigenvalues below 1e-10 of the
    largest are set to zero and counted.
    """

    def __init__(self, gram: Tensor, targets: Tensor | None, noise: NoiseModel) -> None:
        """Decompose the Gram."""
        self.noise = noise
        self.whitening = noise.fixed.sqrt() if noise.num_learned == 0 else None
        if self.whitening is not None:
            gram = gram / self.whitening[:, None] / self.whitening
            targets = None if targets is None else targets / self.whitening
        values, self.vectors = torch.linalg.eigh(gram)
        negligible = values <= EIGENVALUE_CUT * values[-1].clamp_min(0.0)
        self.eigenvalues_cut = int(negligible.sum())
        self.values = torch.where(negligible, torch.zeros_like(values), values)
        self.coordinates = None if targets is None else self.vectors.mT @ targets

    def solve(self, weights: Tensor, noise: Tensor, total: Tensor | None = None) -> Solution:
        """Combine the eigenvalues; see :class:`Solution`."""
        variance = noise if self.whitening is None else torch.ones_like(self.values[:1])
        prior = weights * self.values
        total = prior + variance
        logdet = float(total.log().sum())
        if self.whitening is not None:
            logdet += 2.0 * float(self.whitening.log().sum())
        dimension = (prior / total).sum().reshape(1)
        inverse_diagonal = total.reciprocal().sum().reshape(1)[: self.noise.num_learned]
        if self.coordinates is None:
            return _without_targets(logdet, dimension, inverse_diagonal, 0.0, 0.0)
        reduced = self.coordinates / total
        error = variance * reduced
        if self.whitening is not None:
            error = self.whitening * (self.vectors @ error)
        return Solution(
            logdet,
            dimension,
            inverse_diagonal,
            0.0,
            0.0,
            fit=float((self.coordinates * reduced).sum()),
            quadratic=(prior * reduced.square()).sum().reshape(1),
            alpha_squares=reduced.square().sum().reshape(1)[: self.noise.num_learned],
            sse=float(error.square().sum()),
        )

    def alpha(self, weights: Tensor, noise: Tensor) -> Tensor:
        """A^-1 t alone, shape (n,)."""
        if self.coordinates is None:
            raise ValueError(_NO_TARGETS)
        variance = noise if self.whitening is None else torch.ones_like(self.values[:1])
        alpha = self.vectors @ (self.coordinates / (weights * self.values + variance))
        return alpha if self.whitening is None else alpha / self.whitening


def _without_targets(
    logdet: float, dimension: Tensor, inverse_diagonal: Tensor, jitter: float, rounding: float
) -> Solution:
    """Solution of a system that has no targets."""
    zero_groups, zero_noise = torch.zeros_like(dimension), torch.zeros_like(inverse_diagonal)
    return Solution(
        logdet,
        dimension.clamp_min(0.0),
        inverse_diagonal,
        jitter,
        rounding,
        0.0,
        zero_groups,
        zero_noise,
        0.0,
    )
