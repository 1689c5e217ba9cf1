"""The evidence of a classification: curvature at the network, or a quadratic expansion of the loss there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ntkgp.checkpoint import moved_to
from ntkgp.evidence.blocks import apply_factor, apply_factor_transpose
from ntkgp.evidence.newton import DualMode, NewtonSystem, dual_mode
from ntkgp.evidence.objective import ClassificationObjective, Evaluation
from ntkgp.evidence.problem import NoiseModel, SoftmaxEvidence
from ntkgp.evidence.system import linear_system
from ntkgp.likelihoods import curvature_factor, log_likelihood, whitened_targets


class SoftmaxObjective(ClassificationObjective):
    r"""Evidence of a classification at theta_star with the curvature H frozen at given logits.

    .. math:: M = \sum_n \log p(y_n | h_n) - \tfrac12 \|\theta_\star\|^2_\Lambda - \tfrac12 \log\det(I + S^\top
    K_\Lambda S)

    The gradient is exact: theta_star is profiled out (envelope theorem) and S does not depend on x.
    Cost: per evaluation one or two damped Newton steps, (N (C-1))^3/3 each, and one Cholesky factorisation with inverse
    of size N (C-1); memory: 7 (N C)^2 besides the Grams, of which no projection is kept.

    :param problem: the classification.
    :param bounds: smallest and largest ratio rho_g.
    :param curvature_at: logits (N, C) at which H is evaluated (default: those of the network).

    >>> import torch
    >>> zeros = torch.zeros(2, 2)
    >>> problem = SoftmaxEvidence(torch.eye(4)[None], zeros, zeros, torch.tensor([0, 1]))
    >>> round(SoftmaxObjective(problem).evaluate(torch.ones(1)).value, 6)
    -1.456379
    """

    problem: SoftmaxEvidence

    def __init__(
        self, problem: SoftmaxEvidence, bounds: tuple[float, float] = (1e-10, 1e10), curvature_at: Tensor | None = None
    ) -> None:
        """Project the Grams on the factor of the curvature."""
        super().__init__(problem, 1.0, _no_noise(problem), bounds)
        self.factor = curvature_factor(problem.logits if curvature_at is None else curvature_at)
        noise = NoiseModel.known(torch.ones_like(self.factor[:, 0]).reshape(-1))
        self.system = linear_system(problem.stack, self._whitened_targets(), noise, self.factor)
        self._last: DualMode | None = None

    def _whitened_targets(self) -> Tensor | None:
        """Targets of the linear system: none, because theta_star is not a linear solve."""
        return None

    def dual_mode(self, x: Tensor, gram: Tensor | None = None) -> DualMode:
        """Solve for theta_star at x, warm-started from the previous evaluation; `gram` is K there, where it exists."""
        gram = self._gram(x) if gram is None else gram
        alpha, system = (None, None) if self._last is None else (self._last.alpha, self._last.system)
        self._last = dual_mode(gram, self.problem.offset, self.problem.labels, alpha, system=system)
        return self._last

    def warm_start(self) -> dict[str, Any] | None:
        """What the next evaluation starts from, as tensors and plain values."""
        if self._last is None:
            return None
        system = self._last.system
        return {**vars(self._last), "system": None if system is None else dict(vars(system))}

    def set_warm_start(self, state: dict[str, Any] | None) -> None:
        """Inverse of :meth:`warm_start`."""
        if state is None:
            self._last = None
            return
        moved = moved_to(state, self.problem.offset.device)
        self._last = DualMode(**{**moved, "system": moved["system"] and NewtonSystem(**moved["system"])})

    def _gram(self, x: Tensor) -> Tensor:
        """Prior covariance K of the logits at x."""
        return self.problem.stack.weighted_sum(self.split(x)[0].reciprocal())

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the evidence at x."""
        precision, _ = self.split(x)
        gram = self._gram(x)
        curvature, star = self.solution(x, gram), self.dual_mode(x, gram)
        quadratic = self.problem.stack.quadratic(star.alpha) / precision
        return self.at_star(curvature, star.log_likelihood, quadratic, quadratic / precision, star.gap)

    @property
    def curvature_point(self) -> Tensor:
        """Logits at which the curvature is taken at first."""
        return self.problem.logits

    def mode_point(self, x: Tensor) -> Tensor:
        """Logits at theta_star."""
        return self.dual_mode(x).logits

    def logit_change(self, new: Tensor, old: Tensor) -> tuple[float, float]:
        """Largest change of a logit between two points of curvature, and largest logit at the first."""
        return float((new - old).abs().max()), float(new.abs().max())

    def frozen_at(self, point: Tensor) -> SoftmaxObjective:
        """The objective with its curvature at a point."""
        return SoftmaxObjective(self.problem, self.bounds, curvature_at=point)

    def mode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and S^T J (theta_star - theta_map); see the base class."""
        star = self.dual_mode(x)
        return star.alpha, apply_factor_transpose(self.factor, (star.logits - self.problem.logits).reshape(-1))

    def likelihood_at_map(self, x: Tensor) -> tuple[float, Tensor, float]:
        """Return the data fit at the trained weights; see the base class."""
        return float(log_likelihood(self.problem.logits, self.problem.labels).sum()), x[self.num_groups :], math.nan


class QuadraticObjective(SoftmaxObjective):
    r"""Classification with the log-likelihood replaced by its second-order expansion at the trained weights.

    A Gaussian problem with unit noise in the N (C-1) whitened rows, :math:`\hat z = S^\top J\tilde\theta + q`, S q =
    onehot - p:

    .. math:: M = \log p(y|f) + \tfrac12 \|q\|^2 + \tfrac{N(C-1)}{2} \log 2\pi
        + \log N(\hat z; 0, S^\top K_\Lambda S + I)

    The constant is the one that makes M the evidence of the expansion itself, so that values are comparable with the
    other variants (completing the square of log p(y|f) + r^T d - d^T B d / 2, d = J (theta - theta_map)).
    Unlike a log-likelihood the expansion is not bounded by zero: for a network that is confidently wrong on its
    training data (large q) the evidence can ask for an unlimited prior variance, which the bounds then stop.

    Cost: as a Gaussian problem of size N (C-1).
    """

    def _whitened_targets(self) -> Tensor:
        """Targets of the whitened Gaussian problem."""
        problem = self.problem
        whitened = whitened_targets(problem.logits, problem.labels, problem.offset)
        tangent = (problem.logits - problem.offset).reshape(-1)
        self._targets, self._surrogate = whitened.targets.reshape(-1), float(whitened.constant)
        self._tangent = apply_factor_transpose(self.factor, tangent)
        return self._targets

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the evidence at x."""
        # The Gaussian density of the whitened targets has its own 2 pi, which the surrogate's constant offsets.
        normaliser = 0.5 * self._targets.numel() * math.log(2.0 * math.pi)
        return self.of_expansion(x, self._surrogate - normaliser)

    def mode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and S^T J (theta_star - theta_map); see the base class."""
        reduced = self.system.alpha(*self._scaled(x))
        # S^T J theta_star = z - alpha because the noise is one.
        return apply_factor(self.factor, reduced), self._targets - reduced - self._tangent


def _no_noise(problem: SoftmaxEvidence) -> NoiseModel:
    """Noise model of a classification: nothing to learn."""
    return NoiseModel.known(torch.ones_like(problem.logits).reshape(-1))
