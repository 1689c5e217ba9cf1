"""The mode theta_star of a softmax or logistic tangent model, in data space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkgp.evidence.blocks import apply_factor, apply_factor_transpose, project
from ntkgp.likelihoods import curvature_factor, log_likelihood, residual

_MAX_STEPS = 100
_MAX_HALVINGS = 40
_SHRINK = 0.25


@dataclass(frozen=True)
class NewtonSystem:
    """I + S^T K S at some logits, factorised; good directions for a while after K or the logits have moved on.

    :param factor: S, shape (N, C, R).
    :param cholesky: lower Cholesky factor, shape (N*R, N*R).
    """

    factor: Tensor
    cholesky: Tensor

    @classmethod
    def build(cls, gram: Tensor, logits: Tensor) -> NewtonSystem:
        """Factorise at logits (N, C)."""
        factor = curvature_factor(logits)
        inner = project(gram, factor)
        inner.diagonal().add_(1.0)
        return cls(factor, torch.linalg.cholesky(inner))

    def direction(self, gram: Tensor, missing: Tensor) -> Tensor:
        """Return (I + S S^T K)^-1 g, Newton's step for g = onehot(y) - p - alpha, shape (N*C,).

        Solved for the step and not for its end, an old factorisation errs in proportion to the step.
        """
        rhs = apply_factor_transpose(self.factor, gram @ missing)
        return missing - apply_factor(self.factor, torch.cholesky_solve(rhs[:, None], self.cholesky)[:, 0])


@dataclass(frozen=True)
class DualMode:
    r"""Mode of the tangent model: :math:`\theta_\star = \Lambda^{-1} J^\top \alpha`.

    :param alpha: dual weights, shape (N*C,); at the mode they equal onehot(y) - p.
    :param logits: :math:`h(\theta_\star) = m_0 + K\alpha`, shape (N, C).
    :param log_likelihood: :math:`\sum_n \log p(y_n | h_n)`.
    :param gap: largest entry of :math:`|\alpha - (onehot(y) - p)|`.
    :param steps: Newton steps, each with a factorisation of its own; steps with an old one are not counted.
    :param system: the last factorisation, which a mode close by can start from.
    """

    alpha: Tensor
    logits: Tensor
    log_likelihood: float
    gap: float
    steps: int
    system: NewtonSystem | None


def dual_mode(
    gram: Tensor,
    offset: Tensor,
    labels: Tensor,
    alpha: Tensor | None = None,
    tolerance: float = 1e-11,
    system: NewtonSystem | None = None,
) -> DualMode:
    r"""Minimise :math:`-\sum_n \log p(y_n | m_0 + K\alpha) + \frac12 \alpha^\top K \alpha` by damped Newton steps.

    Iteratively re-weighted least squares with the rank C - 1 curvature factor S. Undamped steps can
    cycle, so each one is halved until the objective falls. A factorisation is used again for as long as the gap falls
    to a quarter or less in a step: that costs two triangular solves (Shamanskii 1967). Stops when alpha equals
    onehot(y) - p up to `tolerance`, or when rounding allows no further progress (the remaining `gap` is returned).

    Cost: O((N C)^2) per step, and for about one step in three a Cholesky factorisation of size N*(C-1); memory two
    such matrices.

    :param gram: prior covariance K = J Lambda^-1 J^T of the logits, shape (N*C, N*C), float64.
    :param offset: prior mean m_0, shape (N, C).
    :param labels: integer labels, shape (N,).
    :param alpha: start, shape (N*C,) (default zero).
    :param tolerance: largest accepted entry of |alpha - (onehot(y) - p)|.
    :param system: factorisation to start with, for instance that of a mode close by.

    >>> import torch
    >>> mode = dual_mode(torch.eye(4).double(), torch.zeros(2, 2).double(), torch.tensor([0, 1]))
    >>> mode.gap < 1e-11
    True
    """
    alpha = torch.zeros_like(offset).reshape(-1) if alpha is None else alpha
    image = gram @ alpha
    loss = _loss(alpha, image, offset, labels)
    start = torch.zeros_like(alpha)
    if loss > (at_zero := _loss(start, start, offset, labels)):  # a stale warm start must not cost accuracy
        alpha, image, loss = start, torch.zeros_like(image), at_zero
    gap, previous, steps = math.inf, math.inf, 0
    while True:
        logits = offset + image.reshape(offset.shape)
        resid = residual(logits, labels).reshape(-1)
        gap, previous = float((alpha - resid).abs().max()), gap
        if gap <= tolerance or steps == _MAX_STEPS:
            break
        moved = None
        if system is not None and gap <= _SHRINK * previous:
            moved = _step(system, gram, alpha, image, loss, resid, offset, labels)
        if moved is None:
            system, steps = NewtonSystem.build(gram, logits), steps + 1
            moved = _step(system, gram, alpha, image, loss, resid, offset, labels)
        if moved is None:
            break
        alpha, image, loss = moved
    return DualMode(alpha, logits, float(log_likelihood(logits, labels).sum()), gap, steps, system)


def _loss(alpha: Tensor, image: Tensor, offset: Tensor, labels: Tensor) -> float:
    """Negative log joint density at theta = Lambda^-1 J^T alpha, with image = K alpha."""
    return float(0.5 * alpha @ image - log_likelihood(offset + image.reshape(offset.shape), labels).sum())


def _step(
    system: NewtonSystem,
    gram: Tensor,
    alpha: Tensor,
    image: Tensor,
    loss: float,
    resid: Tensor,
    offset: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor, float] | None:
    """One damped step; None when it leads nowhere."""
    direction = system.direction(gram, resid - alpha)
    return _halved_step(alpha, image, loss, direction, gram @ direction, resid, offset, labels)


def _halved_step(
    alpha: Tensor,
    image: Tensor,
    loss: float,
    direction: Tensor,
    direction_image: Tensor,
    resid: Tensor,
    offset: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor, float] | None:
    """Halve the step until the loss falls; None when rounding allows no further progress."""
    slope = float(direction_image @ (alpha - resid))
    if slope >= 0.0:
        return None
    rounding = 1e-14 * (abs(loss) + float(image.abs().max()) + 1.0)
    size = 1.0
    for _ in range(_MAX_HALVINGS):
        new_alpha, new_image = alpha + size * direction, image + size * direction_image
        new_loss = _loss(new_alpha, new_image, offset, labels)
        if new_loss <= loss + 1e-4 * size * slope:
            return new_alpha, new_image, new_loss
        if abs(new_loss - loss) <= rounding:
            # Below rounding of the loss, only the optimality condition can still tell progress.
            new_resid = residual(offset + new_image.reshape(offset.shape), labels).reshape(-1)
            better = (new_alpha - new_resid).abs().max() < 0.5 * (alpha - resid).abs().max()
            return (new_alpha, new_image, new_loss) if bool(better) else None
        size *= 0.5
    return None
