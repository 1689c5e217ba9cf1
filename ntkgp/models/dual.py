"""The training side of an exact Gaussian process in data space: N·C × N·C Grams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.likelihoods import Likelihood
from linear_operator.operators import LinearOperator
from torch import Tensor

from ntkgp.evidence.problem import GaussianEvidence, Problem, SoftmaxEvidence
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.grams import Factors
from ntkgp.linearization.symmetric import SymmetricGrams
from ntkgp.means import LinearizedMean
from ntkgp.models.factors import GaussianFactors, SoftmaxFactors
from ntkgp.models.noise import NoiseLink, check_fixed_noise, is_classification
from ntkgp.models.paths import FixedMean


def matrices_of_fit(rows: int) -> int:
    """Bytes of the n × n matrices that a fit holds beside the Grams: their sum, factors, inverse and workspace."""
    return 8 * 8 * rows**2


def memory_of_fit(lin: LinearizedNetwork, num_data: int) -> int:
    """Bytes that N inputs take beside their Grams: for a fit, or for the passes before it."""
    n = num_data * lin.num_outputs
    return max(matrices_of_fit(n), 8 * n**2 + lin.gram_memory(1, num_data))


class DataSide:
    """What a visit to the training data leaves behind, with a row for each observation; see :class:`DualSide`."""

    x: Tensor
    outputs: Tensor

    @property
    def num_data(self) -> int:
        """N."""
        return len(self.outputs)

    def is_of(self, x: Tensor | None, targets: Tensor | None, likelihood: Likelihood) -> bool:
        """Whether the visit was to these inputs."""
        return self.x is x

    def noise(self, likelihood: Likelihood, targets: Tensor) -> LinearOperator:
        """Covariance of the observation noise of the training data."""
        check_fixed_noise(likelihood, self.num_data)
        return likelihood._shaped_noise_covar(targets.shape)


@dataclass(frozen=True)
class DualSide(DataSide):
    """What one visit to the training data leaves behind; independent of every hyper-parameter and of the targets.

    :param x: the training inputs, packed.
    :param grams: K_g, shape (G, N·C, N·C), half of the entries, in memory or on disk.
    :param outputs: f, shape (N, C).
    :param offset: f − Jθ̃ as the prior mean gives it, shape (N, C).
    :param tangent_theta: J_g θ̃_g, shape (G, N·C).
    :param factors: what the layers saw and what came back to them, where it fits.
    """

    lin: LinearizedNetwork
    prior_mean: LinearizedMean
    max_memory: int
    x: Tensor
    grams: SymmetricGrams
    outputs: Tensor
    offset: Tensor
    tangent_theta: Tensor
    factors: Factors | None

    form = "dual"

    @classmethod
    def build(cls, lin: LinearizedNetwork, prior_mean: LinearizedMean, x: Tensor, max_memory: int) -> DualSide:
        """Visit the training inputs."""
        n, groups = len(x) * lin.num_outputs, len(lin.groups)
        with torch.no_grad():
            reserved, held = memory_of_fit(lin, len(x)), SymmetricGrams.size_of(groups, n)
            storage = "memory" if held + reserved <= max_memory or x.device.type != "cpu" else "disk"
            taken = reserved + (held if storage == "memory" else 0)
            factors = lin.factors(x, max_memory) if taken + lin.factors_memory(len(x)) <= max_memory else None
            grams = lin.symmetric_grams(x if factors is None else factors, max_memory, storage=storage)
            theta, index = lin.theta, lin.groups.index.to(lin.theta.device)
            # One group at a time: G vectors of weights may be more than all Grams.
            tangent = torch.stack([lin.jvp(x, theta * (index == g)) for g in range(groups)]).to(torch.float64)
            tangent = tangent.flatten(1)
            outputs = lin(x).to(torch.float64)
            offset = prior_mean(x).reshape_as(outputs)
            return cls(lin, prior_mean, max_memory, x, grams, outputs, offset, tangent, factors)

    def gram(self, precision: Tensor) -> Tensor:
        """K of the training inputs."""
        return self.grams.weighted_sum(precision.reciprocal().to(torch.float64))

    def cross(self, x: Tensor, precision: Tensor, factors: Any) -> Tensor:
        """K(x, X), shape (T·C, N·C)."""
        return self.lin.weighted_gram(x, self._source(), precision.reciprocal(), self.max_memory)

    def _source(self) -> Factors | Tensor:
        return self.factors if self.factors is not None else self.x

    def condition(
        self, precision: Tensor, likelihood: Likelihood, targets: Tensor, curvature: str
    ) -> GaussianFactors | SoftmaxFactors:
        """Factors of the posterior at hyper-parameters."""
        gram = self.gram(precision)
        if is_classification(likelihood):
            return SoftmaxFactors.build(gram, self.outputs, self.offset, targets, curvature)
        rows = targets.reshape(-1) - self.offset.reshape(-1)
        return GaussianFactors.build(gram, self.noise(likelihood, targets), rows)

    def shift(self, x: Tensor, factors: Any, precision: Tensor, cross: Tensor | None = None) -> Tensor:
        """J(x) θ⋆, shape (T, C)."""
        cross = self.cross(x, precision, factors) if cross is None else cross
        return (cross @ factors.alpha).reshape(len(x), -1)

    def posterior_mean(self, factors: Any, precision: Tensor) -> FixedMean:
        """The posterior mean as a function, whatever becomes of the model."""
        return FixedMean(self.prior_mean, (self._source(), precision.reciprocal(), factors.alpha), self.max_memory)

    def pathwise(self, weights: Tensor, precision: Tensor, factors: Any, generator: torch.Generator | None) -> Tensor:
        """What Matheron's rule adds to prior draws of the weights, (S, P)."""
        prior = self.lin.jvp(self.x, weights).to(torch.float64).flatten(1)
        dual = factors.pathwise(prior, generator)
        pulled = self.lin.vjp(self.x, dual.reshape(len(weights), len(self.x), -1).to(self.lin.dtype))
        return pulled.to(torch.float64) / self.lin.groups.expand(precision)

    def problem(self, likelihood: Likelihood, y: Tensor, curvature: str, targets: str) -> Problem:
        """What determines the evidence."""
        groups = self.lin.groups
        shared: dict[str, Any] = {"group_names": groups.names, "group_sizes": groups.sizes}
        if targets == "data":
            shared["tangent_theta"] = self.tangent_theta
            shared["theta_norms"] = groups.sum_per_group(self.lin.theta.to(torch.float64).square())
        offset = self.offset if targets == "data" else self.outputs
        if is_classification(likelihood):
            return SoftmaxEvidence(self.grams, self.outputs, offset, y, curvature, **shared)
        rows, c = y.reshape(-1), self.lin.num_outputs
        noise = NoiseLink(likelihood, self.num_data, c).model()
        return GaussianEvidence(self.grams, rows - offset.reshape(-1), noise, c, observations=rows, **shared)
