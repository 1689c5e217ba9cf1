"""Linear systems A = sum_g w_g K_g + D: log-determinant, traces and quadratic forms for every evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ntkgp.evidence.problem import NoiseModel

EIGENVALUE_CUT = 1e-10
_EPSILON = torch.finfo(torch.float64).eps
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
    :param make_alpha: returns alpha, shape (n,), only where it is asked for.
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
    make_alpha: Callable[[], Tensor]


class LinearSystem(Protocol):
    """A stack of Grams prepared for many values of the weights and the noise."""

    eigenvalues_cut: int

    def solve(self, weights: Tensor, noise: Tensor) -> Solution:
        """Factorise and solve at `weights` (G,) and learned variances `noise` (S,)."""


def linear_system(grams: Tensor, targets: Tensor | None, noise: NoiseModel) -> LinearSystem:
    """Prepare the system: one eigendecomposition where it suffices, else a Cholesky factorisation per value."""
    if grams.shape[0] == 1 and (noise.is_uniform or noise.num_learned == 0):
        return SpectralSystem(grams[0], targets, noise)
    return DenseSystem(grams, targets, noise)


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

    Cost per value: n^3 + O(G n^2); memory 3 n^2 besides the Grams.
    """

    eigenvalues_cut = 0

    def __init__(self, grams: Tensor, targets: Tensor | None, noise: NoiseModel) -> None:
        """Keep views of the Grams."""
        self.grams, self.targets, self.noise = grams, targets, noise
        self.flat = grams.reshape(grams.shape[0], -1)

    def solve(self, weights: Tensor, noise: Tensor) -> Solution:
        """Factorise and solve; see :class:`Solution`."""
        size = self.grams.shape[-1]
        diagonal = self.noise.diagonal(noise)
        matrix = (weights @ self.flat).reshape(size, size)
        matrix.diagonal().add_(diagonal)
        trace = float(matrix.diagonal().sum())
        factor, jitter = cholesky_with_jitter(matrix)
        logdet = 2.0 * float(factor.diagonal().log().sum())
        alpha = None
        if self.targets is not None:
            alpha = torch.cholesky_solve(self.targets[:, None], factor)[:, 0]
        inverse = torch.cholesky_inverse(factor)
        dimension = weights * (self.flat @ inverse.reshape(-1))
        inverse_diagonal = self.noise.sum_per_component(inverse.diagonal())
        # A backward error E of A changes logdet A by tr(A^-1 E) and t^T A^-1 t by alpha^T E alpha.
        sensitivity = inverse.diagonal().sum() + (0.0 if alpha is None else alpha.square().sum())
        rounding = _EPSILON * trace * float(sensitivity)
        if alpha is None or self.targets is None:
            return _without_targets(logdet, dimension, inverse_diagonal, jitter, rounding)
        quadratic = weights * torch.stack([alpha @ (gram @ alpha) for gram in self.grams])
        return Solution(
            logdet,
            dimension.clamp_min(0.0),
            inverse_diagonal,
            jitter,
            rounding,
            fit=float(self.targets @ alpha),
            quadratic=quadratic.clamp_min(0.0),
            alpha_squares=self.noise.sum_per_component(alpha.square()),
            sse=float((diagonal * alpha).square().sum()),
            make_alpha=lambda: alpha,
        )


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

    def solve(self, weights: Tensor, noise: Tensor) -> Solution:
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
            make_alpha=lambda: self._alpha(reduced),
        )

    def _alpha(self, reduced: Tensor) -> Tensor:
        """Return alpha in the rows of the problem."""
        alpha = self.vectors @ reduced
        return alpha if self.whitening is None else alpha / self.whitening


def _no_alpha() -> Tensor:
    """Refuse alpha where there are no targets."""
    raise ValueError("targets are needed for alpha, got None")


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
        _no_alpha,
    )
