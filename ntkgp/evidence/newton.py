"""The mode theta_star of a softmax or logistic tangent model, in data space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntkgp.evidence.blocks import apply_factor, apply_factor_transpose, project
from ntkgp.likelihoods import curvature_factor, log_likelihood, residual

_MAX_STEPS = 100
_MAX_HALVINGS = 40


@dataclass(frozen=True)
class DualMode:
    r"""Mode of the tangent model: :math:`\theta_\star = \Lambda^{-1} J^\top \alpha`.

    :param alpha: dual weights, shape (N*C,); at the mode they equal onehot(y) - p.
    :param logits: :math:`h(\theta_\star) = m_0 + K\alpha`, shape (N, C).
    :param log_likelihood: :math:`\sum_n \log p(y_n | h_n)`.
    :param gap: largest entry of :math:`|\alpha - (onehot(y) - p)|`.
    :param steps: Newton steps taken.
    """

    alpha: Tensor
    logits: Tensor
    log_likelihood: float
    gap: float
    steps: int


def dual_mode(
    gram: Tensor, offset: Tensor, labels: Tensor, alpha: Tensor | None = None, tolerance: float = 1e-11
) -> DualMode:
    r"""Minimise :math:`-\sum_n \log p(y_n | m_0 + K\alpha) + \frac12 \alpha^\top K \alpha` by damped Newton steps.

    Iteratively re-weighted least squares with the rank C - 1 curvature factor S. Undamped steps can
    cycle, so each one is halved until the objective falls. Stops when alpha equals onehot(y) - p up to `tolerance`, or
    when rounding allows no further progress (the remaining `gap` is returned).

    Cost: a Cholesky factorisation of size N*(C-1) and O((N C)^2 C) per step; memory two such matrices.

    :param gram: prior covariance K = J Lambda^-1 J^T of the logits, shape (N*C, N*C), float64.
    :param offset: prior mean m_0, shape (N, C).
    :param labels: integer labels, shape (N,).
    :param alpha: start, shape (N*C,) (default zero).
    :param tolerance: largest accepted entry of |alpha - (onehot(y) - p)|.

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
    gap, steps = float("inf"), 0
    while True:
        resid = residual(offset + image.reshape(offset.shape), labels).reshape(-1)
        gap = float((alpha - resid).abs().max())
        if gap <= tolerance or steps == _MAX_STEPS:
            break
        direction = _newton_direction(gram, image, offset, resid) - alpha
        moved = _halved_step(alpha, image, loss, direction, gram @ direction, resid, offset, labels)
        if moved is None:
            break
        alpha, image, loss = moved
        steps += 1
    logits = offset + image.reshape(offset.shape)
    return DualMode(alpha, logits, float(log_likelihood(logits, labels).sum()), gap, steps)


def _loss(alpha: Tensor, image: Tensor, offset: Tensor, labels: Tensor) -> float:
    """Negative log joint density at theta = Lambda^-1 J^T alpha, with image = K alpha."""
    return float(0.5 * alpha @ image - log_likelihood(offset + image.reshape(offset.shape), labels).sum())


def _newton_direction(gram: Tensor, image: Tensor, offset: Tensor, resid: Tensor) -> Tensor:
    """Return the minimiser in alpha of the second-order expansion at the current logits."""
    factor = curvature_factor(offset + image.reshape(offset.shape))
    inner = project(gram, factor)
    inner.diagonal().add_(1.0)
    linear = apply_factor(factor, apply_factor_transpose(factor, image)) + resid
    rhs = apply_factor_transpose(factor, gram @ linear)
    solved = torch.cholesky_solve(rhs[:, None], torch.linalg.cholesky(inner))[:, 0]
    return linear - apply_factor(factor, solved)


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
