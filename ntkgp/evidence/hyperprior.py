"""Evidence times a prior of the precisions: what is maximised where the evidence alone prunes or collapses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ntkgp.evidence.objective import Evaluation


@runtime_checkable
class HyperPrior(Protocol):
    """A density of the group precisions."""

    def log_density(self, log_precision: Tensor) -> Tensor:
        """Log-density of log λ, shape (G,), up to a constant: a scalar with a graph to its argument."""


class PenalisedObjective:
    r"""An evidence plus the log-density of a hyper-prior: :math:`M(\lambda, \sigma^2) + \log p(\log\lambda)`.

    The prior's gradient g joins the vectors a and b of :mod:`ntkgp.evidence.objective` by its positive and negative
    part, a + 2 max(g, 0) and b + 2 max(−g, 0): the gradient stays (a − b)/2, and the step log(a/b) an ascent direction
    whose fixed points are the stationary points of the sum.

    :param evidence: the objective of the evidence.
    :param prior: with ``log_density(log_precision)``.
    """

    def __init__(self, evidence: Any, prior: HyperPrior) -> None:
        self.evidence, self.prior = evidence, prior

    def __getattr__(self, name: str) -> Any:
        if name in ("evidence", "prior"):
            raise AttributeError(name)
        return getattr(self.evidence, name)

    def frozen_at(self, point: Tensor) -> PenalisedObjective:
        """The same with the curvature of a classification at another point."""
        return PenalisedObjective(self.evidence.frozen_at(point), self.prior)

    def log_prior(self, x: Tensor) -> tuple[float, Tensor]:
        """Log-density at x and its gradient in log λ, shape (G,); minus infinity where it is none.

        :raises ValueError: something else than a scalar, or a gradient that is not finite where the density is.
        """
        with torch.inference_mode(False), torch.enable_grad():
            log_precision = x[: self.evidence.num_groups].detach().clone().requires_grad_()
            value = self.prior.log_density(log_precision)
            if not isinstance(value, Tensor) or value.numel() != 1:
                came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"prior: expected log_density to return a scalar tensor, got {came}")
            found = float(value.detach())
            if not math.isfinite(found):
                return -math.inf, torch.zeros_like(log_precision)
            gradient = None
            if value.requires_grad:
                gradient = torch.autograd.grad(value.reshape(()), log_precision, allow_unused=True)[0]
        gradient = torch.zeros_like(log_precision) if gradient is None else gradient.detach()
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(
                f"prior: the gradient of log_density at log precisions {log_precision.tolist()} is NaN or infinite"
            )
        return found, gradient

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the sum at x."""
        found: Evaluation = self.evidence(x)
        value, gradient = self.log_prior(x)
        groups = len(gradient)
        pull, push = found.pull.clone(), found.push.clone()
        pull[:groups] += 2.0 * gradient.clamp_min(0.0)
        push[:groups] += 2.0 * (-gradient).clamp_min(0.0)
        rounding = found.rounding + (1e-14 * abs(value) if math.isfinite(value) else 0.0)
        return replace(found, value=found.value + value, pull=pull, push=push, rounding=rounding)
