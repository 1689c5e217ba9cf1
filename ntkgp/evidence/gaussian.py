"""The evidence of a regression at theta_star."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ntkgp.evidence.objective import Evaluation, EvidenceObjective
from ntkgp.evidence.problem import GaussianEvidence
from ntkgp.evidence.system import linear_system


class GaussianObjective(EvidenceObjective):
    r"""Evidence of a Gaussian problem at theta_star: log N(t; 0, K_Lambda + D) (laws B4 and B16).

    Cost: for one group with one noise variance, or known noise, one eigendecomposition and then O(n) per evaluation;
    otherwise n^3 + O(G n^2) per evaluation, memory 4 n^2 besides the Grams.

    >>> import torch
    >>> from ntkgp.evidence import GaussianEvidence, NoiseModel
    >>> noise = NoiseModel.homoscedastic(2, 1.0)
    >>> objective = GaussianObjective(GaussianEvidence(torch.eye(2)[None], torch.ones(2), noise))
    >>> round(objective.evaluate(torch.ones(1)).value, 6)  # two independent N(1; 0, 2)
    -3.031024
    """

    problem: GaussianEvidence

    def __init__(self, problem: GaussianEvidence, bounds: tuple[float, float] = (1e-10, 1e10)) -> None:
        """Scale the targets and prepare the linear system."""
        scale = float(problem.targets.square().mean()) or 1.0
        super().__init__(problem, scale, problem.noise, bounds)
        noise = replace(problem.noise, fixed=problem.noise.fixed / scale)
        self.system = linear_system(problem.stack, problem.targets / math.sqrt(scale), noise)

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the evidence at x."""
        precision, noise = self.split(x)
        found = self.solution(x)
        variance = noise / self.scale
        return Evaluation(
            value=self.constant(found) - 0.5 * found.fit,
            pull=torch.cat([found.dimension, variance * found.alpha_squares]),
            push=torch.cat([found.quadratic, variance * found.inverse_diagonal]),
            effective_dimension=found.dimension,
            squared_norms=found.quadratic / precision,
            sse=found.sse * self.scale,
            jitter=found.jitter * self.scale,
            rounding=found.rounding,
        )

    def mode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and the whitened J (theta_star - theta_map); see the base class."""
        _, noise = self.split(x)
        alpha = self.system.alpha(*self._scaled(x)) / math.sqrt(self.scale)
        variance = self.noise.diagonal(noise)
        return alpha, self.problem.residual / variance.sqrt() - variance.sqrt() * alpha

    def likelihood_at_map(self, x: Tensor) -> tuple[float, Tensor, float]:
        """Return the data fit at the trained weights; see the base class."""
        _, noise = self.split(x)
        residual = self.problem.residual
        weighted = residual / self.noise.diagonal(noise)
        pull = noise * self.noise.sum_per_component(weighted.square())
        return -0.5 * float(residual @ weighted), pull, float(residual.square().sum())
