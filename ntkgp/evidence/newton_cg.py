"""The mode theta_star of a classification by Newton's method with conjugate gradients, and how far it is from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ntkgp.likelihoods import curvature_factor, log_likelihood, residual
from ntkgp.solvers import WhitenedSystem, solve

# Accuracy of a mode at which the curvature is taken.
CURVATURE_TOLERANCE = 1e-10
_MAX_STEPS = 60
_MAX_HALVINGS = 30
_ROUNDING = 64.0 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class IterativeMode:
    r"""An approximate mode, :math:`\theta_\star = \Lambda^{-1}J^\top\alpha`, with the interval of the optimal value.

    :param alpha: shape (N·C,).
    :param logits: m0 + Kα, shape (N, C).
    :param gap: largest entry of :math:`|\alpha - (\mathrm{onehot}(y) - p)|`, zero at the mode.
    :param lower: :math:`\log p(y|h) - \tfrac12\|\theta\|^2_\Lambda` here, at most its maximum.
    :param upper: Fenchel's dual value :math:`\alpha^\top m_0 + \tfrac12\alpha^\top K\alpha - \sum_n H(p_n)` at
        :math:`\alpha = \mathrm{onehot}(y) - p`, at least that maximum.
    :param steps: Newton steps.
    :param distance: upper bound of :math:`\|\theta - \theta_\star\|_\Lambda`: the objective is strongly convex, so that
        it is at most the norm of the gradient, and the root of twice the gap of the values.
    """

    alpha: Tensor
    logits: Tensor
    gap: float
    lower: float
    upper: float
    steps: int
    distance: float

    def curvature_slack(self, blocks: Tensor) -> float:
        r"""R with :math:`e^{-r}B \preceq B_\star \preceq e^rB`, B the curvature at these logits, B⋆ that at the mode.

        No logit is further from its value at the mode than d, the distance times the root of its prior variance, and
        the curvature of a softmax changes by a factor of at most :math:`e^{2d}` on the way.

        :param blocks: K(x_n, x_n), shape (N, C, C).
        """
        return 2.0 * self.distance * math.sqrt(float(blocks.diagonal(dim1=-2, dim2=-1).max()))


def iterative_mode(
    system: WhitenedSystem,
    offset: Tensor,
    labels: Tensor,
    *,
    tolerance: float = 1e-8,
    max_iterations: int = 200,
    nystrom_points: int | None = None,
    seed: int = 0,
    start: Tensor | None = None,
) -> IterativeMode:
    r"""Maximise :math:`\log p(y | m_0 + J\theta) - \tfrac12\|\theta\|_\Lambda^2` in data space.

    Damped Newton steps :math:`(I + SS^\top K)^{-1}(\mathrm{onehot}(y) - p - \alpha)`, each by preconditioned conjugate
    gradients on :math:`I + S^\top KS` to an accuracy that follows the gap. Undamped steps cycle.

    :param system: K with its columns; its factor is not used.
    :param offset: m0, shape (N, C); C = 1 is one logistic output.
    :param labels: shape (N,).
    :param tolerance: accepted gap.
    :param max_iterations: of conjugate gradients per step.
    :param start: α to start from, shape (N·C,).

    Cost: per step, the products with K of conjugate gradients and two more.

    >>> K, points = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, 1, dtype=torch.float64)
    >>> system = WhitenedSystem(lambda v: K @ v, lambda i: K[:, i], points, points)
    >>> mode = iterative_mode(system, torch.zeros(2, 1), torch.tensor([1, 0]))
    >>> mode.upper - mode.lower < 1e-8
    True
    """
    offset = offset.to(torch.float64)
    points = system.landmarks(nystrom_points, seed)
    columns = system.columns(points)

    def k(v: Tensor) -> Tensor:
        return system.product(v.unsqueeze(-1)).squeeze(-1)

    alpha = torch.zeros(offset.numel(), dtype=torch.float64, device=offset.device) if start is None else start.clone()
    image = torch.zeros_like(alpha) if start is None else k(alpha)
    steps = 0
    while True:
        logits = offset + image.reshape(offset.shape)
        missing = residual(logits, labels).reshape(-1) - alpha
        gap = float(missing.abs().max())
        if gap <= tolerance or steps >= _MAX_STEPS:
            break
        here = replace(system, factor=curvature_factor(logits), columns=lambda _: columns)
        pushed = k(missing)
        inner = solve(
            here, here.reduce(pushed.unsqueeze(-1)), preconditioner=here.preconditioner(points),
            tolerance=max(1e-10, min(1e-2, 0.1 * gap)), max_iterations=max_iterations,
        ).solution  # fmt: skip
        correction = here.expand(inner).squeeze(-1)
        direction, bend = missing - correction, pushed - k(correction)
        size = _step_size(alpha, image, direction, bend, missing, offset, labels)
        if size == 0.0:
            break
        alpha, image, steps = alpha + size * direction, image + size * bend, steps + 1
    # The updates of the image have drifted by rounding; bounds need the true one.
    image = k(alpha)
    logits = offset + image.reshape(offset.shape)
    dual = residual(logits, labels).reshape(-1)
    lower = torch.stack([log_likelihood(logits, labels).sum(), -0.5 * (alpha @ image)])
    upper = torch.stack([dual @ offset.reshape(-1), 0.5 * (dual @ k(dual)), -_entropy(logits)])
    slack = [_ROUNDING * float(terms.abs().sum()) for terms in (lower, upper)]
    missing = dual - alpha
    least, most = float(lower.sum()) - slack[0], float(upper.sum()) + slack[1]
    distance = math.sqrt(max(min(2.0 * (most - least), float(missing @ k(missing))), 0.0))
    return IterativeMode(alpha, logits, float(missing.abs().max()), least, most, steps, distance)


def _step_size(
    alpha: Tensor, image: Tensor, direction: Tensor, bend: Tensor, missing: Tensor, offset: Tensor, labels: Tensor
) -> float:
    """The largest of 1, ½, ¼, … by which the loss falls, 0 where rounding allows none."""

    def loss(size: float) -> float:
        a, ka = alpha + size * direction, image + size * bend
        return float(0.5 * a @ ka - log_likelihood(offset + ka.reshape(offset.shape), labels).sum())

    slope, before, size = -float(bend @ missing), loss(0.0), 1.0
    if slope >= 0.0:
        return 0.0
    for _ in range(_MAX_HALVINGS):
        if loss(size) <= before + 1e-4 * size * slope + 1e-14 * (1.0 + abs(before)):
            return size
        size *= 0.5
    return 0.0


def _entropy(logits: Tensor) -> Tensor:
    """Sum of the entropies of the predictions."""
    if logits.shape[-1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], -1)
        log_p = torch.cat([logsigmoid(-logits[:, 1:]), logsigmoid(logits[:, 1:])], -1)
    else:
        log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum()
