"""Classification in weight space: tangent logits visited in passes, and their mode theta_star."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkgp.likelihoods import curvature_factor, log_likelihood, residual, whitened_targets
from ntkgp.linearization.statistics import RowTriangle, add_symmetric

_TOLERANCE = 1e-12
_STEPS_PER_HESSIAN = 25
_MAX_HESSIANS = 20
_MAX_HALVINGS = 40
_HISTORY = 20
_STALLED = 1e-6

Passes = Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]


@dataclass(frozen=True)
class CompressedRows:
    r"""As few rows as reach what all rows reach: :math:`R^\top R = \sum_n J_n^\top B_n J_n`.

    :param root: R, shape (n, P).
    :param targets: what the compression makes of :math:`S^+ r` in whitened rows, shape (n,).
    :param unreached: number of rows that no J reaches.
    """

    root: Tensor
    targets: Tensor
    unreached: int


@dataclass(frozen=True)
class TangentLogits:
    r"""Logits :math:`h(\theta) = f + J(\theta - c)` of the training data, visited in passes of any order.

    :param passes: called, gives one pass over the data: rows J (B, C, P), network outputs f (B, C) and labels (B,).
    :param centre: c, shape (P,): the trained weights, or zero for a prior that is centred there.

    Cost: a value with its gradient is one pass, 4·N·C·P flops; a Hessian one pass, N·(C - 1)·P² flops.
    """

    passes: Passes
    centre: Tensor

    def _visit(self, theta: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows, logits at theta and labels."""
        step = theta - self.centre
        for rows, outputs, labels in self.passes():
            yield rows, outputs + rows @ step, labels

    def value(self, theta: Tensor) -> tuple[float, Tensor]:
        """Log-likelihood at theta and its gradient, shape (P,)."""
        total, gradient = 0.0, torch.zeros_like(theta)
        for rows, logits, labels in self._visit(theta):
            total += float(log_likelihood(logits, labels).sum())
            gradient += residual(logits, labels).reshape(-1) @ rows.flatten(0, 1)
        return total, gradient

    def hessian(self, theta: Tensor) -> Tensor:
        """Sum of J^T B J at theta, shape (P, P), of which the lower triangle counts."""
        out = theta.new_zeros(len(theta), len(theta))
        for rows, logits, _ in self._visit(theta):
            add_symmetric(out, _whiten(rows, curvature_factor(logits)))
        return out

    def compress(self, theta: Tensor) -> CompressedRows:
        """Rows whitened by the curvature at theta, compressed; their targets are those of the expansion there."""
        triangle = RowTriangle(len(theta))
        for rows, logits, labels in self._visit(theta):
            found = whitened_targets(logits, labels, logits)
            triangle.add(_whiten(rows, found.factor), found.targets.reshape(-1))
        root, targets, unreached, _ = triangle.result()
        return CompressedRows(root, targets, unreached)

    def change(self, new: Tensor, old: Tensor) -> tuple[float, float]:
        """Largest change of a logit between two weights, and largest logit at the first."""
        change = largest = 0.0
        for rows, logits, _ in self._visit(new):
            change = max(change, float((rows @ (new - old)).abs().max()))
            largest = max(largest, float(logits.abs().max()))
        return change, largest


def _whiten(rows: Tensor, factor: Tensor) -> Tensor:
    """S^T J of every input: (B, C, P), (B, C, R) -> (B·R, P)."""
    return torch.bmm(factor.mT, rows).flatten(0, 1)


@dataclass(frozen=True)
class PrimalMode:
    r"""Mode of the tangent model in weight space.

    :param theta: theta_star, shape (P,).
    :param log_likelihood: of all data there.
    :param gap: Newton decrement :math:`\sqrt{g^\top (H + \Lambda)^{-1} g}`: half its square is what the objective still
        lacks.
    :param steps: passes over the data for values and gradients.
    :param hessian: the last curvature, (P, P), which a mode close by can start from.
    """

    theta: Tensor
    log_likelihood: float
    gap: float
    steps: int
    hessian: Tensor


def primal_mode(
    logits: TangentLogits, precision: Tensor, hessian: Tensor, start: Tensor, tolerance: float = _TOLERANCE
) -> PrimalMode:
    r"""Minimise :math:`-\log p(y | h(\theta)) + \frac12 \|\theta\|^2_\Lambda` by quasi-Newton steps over passes.

    Newton's metric :math:`H + \Lambda` is kept for as long as it serves: a step costs one pass for value and gradient,
    a new Hessian as much as P/4 of them. Limited-memory updates (Nocedal 1980) correct an old one, steps are halved
    until the objective falls, and after 25 of them the Hessian is made anew where they have led.

    :param precision: diagonal of Lambda, shape (P,).
    :param hessian: curvature at weights close by, (P, P), lower triangle.
    :param start: weights to start from, shape (P,).
    :param tolerance: accepted Newton decrement.

    Cost: per Hessian P³/3 and a pass of N·(C - 1)·P² flops; memory 2·P² numbers.
    """
    run = _Descent(logits, precision.sqrt(), start)
    for count in range(_MAX_HESSIANS):
        if run.descend(hessian, tolerance):
            break
        if count + 1 < _MAX_HESSIANS:
            hessian = logits.hessian(run.theta)
    return PrimalMode(run.theta, run.log_likelihood, run.gap, run.steps, hessian)


class _Descent:
    """Quasi-Newton steps in the variable u = Lambda^(1/2) theta."""

    def __init__(self, logits: TangentLogits, root: Tensor, start: Tensor) -> None:
        self.logits, self.root, self.steps = logits, root, 0
        self.u = start * root
        self.loss, self.log_likelihood, self.gradient = self._value(self.u)
        self.gap = math.inf

    @property
    def theta(self) -> Tensor:
        """Weights of now."""
        return self.u / self.root

    def _value(self, u: Tensor) -> tuple[float, float, Tensor]:
        """Loss, log-likelihood and gradient of the loss."""
        found, gradient = self.logits.value(u / self.root)
        self.steps += 1
        return 0.5 * float(u.square().sum()) - found, found, u - gradient / self.root

    def descend(self, hessian: Tensor, tolerance: float) -> bool:
        """Steps in one metric; False where a new one is wanted."""
        metric = hessian.tril() / self.root
        metric /= self.root.unsqueeze(-1)
        metric.diagonal().add_(1.0)
        factor = torch.linalg.cholesky(metric)
        del metric
        pairs: list[tuple[Tensor, Tensor]] = []
        for _ in range(_STEPS_PER_HESSIAN):
            newton = torch.cholesky_solve(self.gradient.unsqueeze(-1), factor)[:, 0]
            self.gap = math.sqrt(max(float(self.gradient @ newton), 0.0))
            if self.gap <= tolerance:
                return True
            u, gradient = self.u, self.gradient
            if not self._search(_two_loops(gradient, factor, pairs), factor):
                # What rounding leaves is as good as it gets, in whatever metric.
                return self.gap <= _STALLED or not pairs
            pairs = [*pairs[1 - _HISTORY :], (self.u - u, self.gradient - gradient)]
        return False

    def _search(self, direction: Tensor, factor: Tensor) -> bool:
        """Halve the step until the loss falls; False where rounding allows no progress."""
        slope = float(self.gradient @ direction)
        rounding = 1e-14 * (abs(self.loss) + 1.0)
        size = 1.0
        for _ in range(_MAX_HALVINGS):
            u = self.u - size * direction
            loss, likelihood, gradient = self._value(u)
            if abs(loss - self.loss) <= rounding:
                # Below rounding of the loss, only the gradient can still tell progress.
                newton = torch.cholesky_solve(gradient.unsqueeze(-1), factor)[:, 0]
                if float(gradient @ newton) > 0.25 * self.gap**2:
                    return False
            elif loss > self.loss - 1e-4 * size * slope:
                size *= 0.5
                continue
            self.u, self.loss, self.log_likelihood, self.gradient = u, loss, likelihood, gradient
            return True
        return False


def _two_loops(gradient: Tensor, factor: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Two-loop recursion with the factorised metric as the initial Hessian."""
    direction, weights = gradient.clone(), []
    for change, bend in reversed(pairs):
        weight = (change @ direction) / (change @ bend)
        weights.append(weight)
        direction = direction - weight * bend
    direction = torch.cholesky_solve(direction.unsqueeze(-1), factor)[:, 0]
    for (change, bend), weight in zip(pairs, reversed(weights), strict=True):
        direction = direction + (weight - (bend @ direction) / (change @ bend)) * change
    return direction
