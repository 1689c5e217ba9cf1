"""Evidence objectives: value, exact gradient and MacKay step at one (log precision, log noise).

All objectives share one form. With x = (log lambda_g, log sigma^2_c) there are non-negative vectors a, b with

    gradient = (a - b) / 2,    MacKay step  x <- x + log(a / b),

so that the fixed points of the step are exactly the stationary points of the evidence:

* theta_star, precision: a = gamma_g, b = lambda_g |theta_star_g|^2, i.e. lambda_g <- gamma_g / |theta_star_g|^2;
* theta_star, noise: a = sigma^2_c sum alpha_i^2, b = sigma^2_c sum (A^-1)_ii over the rows i of the component. It
  follows from d log N(t; 0, A) / d sigma^2_c = (sum alpha_i^2 - sum (A^-1)_ii) / 2, and for one variance it is
  sigma^2 <- SSE / (N C - gamma), because SSE = sigma^4 alpha^T alpha and N C - gamma = sigma^2 tr A^-1;
* theta_map: b = lambda_g |theta_g|^2 and, for the noise, a = sigma^2_c sum r_i^2 / d_i^2 with r = y - f.

Everything inside is computed in scale-free variables: targets divided by their root mean square, K_g weighted by
1 / (lambda_g s). Sources: MacKay 1992; Antoran et al. 2022.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkgp.evidence.checks import data_warnings
from ntkgp.evidence.problem import GaussianEvidence, NoiseModel, Problem
from ntkgp.evidence.system import LinearSystem, Solution

_MAX_LOG_STEP = 12.0
_NOISE_BOUNDS = (1e-10, 1e4)
_START_NOISE = (1e-4, 1.0)


@dataclass(frozen=True)
class Evaluation:
    r"""One evaluation of an evidence.

    :param value: the evidence in nats, all constants included.
    :param pull: the vector a of the module's text, shape (G+S,).
    :param push: the vector b, shape (G+S,).
    :param effective_dimension: :math:`\gamma_g = \mathrm{tr}(A^{-1} K_g)/\lambda_g`, shape (G,).
    :param squared_norms: :math:`\|\theta_g\|^2` of theta_star or of the trained weights, shape (G,).
    :param sse: squared error of the targets at that theta (NaN for classification).
    :param jitter: what was added to the diagonal of A.
    :param rounding: estimate of the rounding error of the value.
    :param gap: unmet optimality of theta_star in a classification (0 where theta_star is a linear solve).
    """

    value: float
    pull: Tensor
    push: Tensor
    effective_dimension: Tensor
    squared_norms: Tensor
    sse: float
    jitter: float
    rounding: float
    gap: float = 0.0

    @property
    def gradient(self) -> Tensor:
        """Gradient in (log lambda_g, log sigma^2_c), shape (G+S,)."""
        return 0.5 * (self.pull - self.push)

    @property
    def step(self) -> Tensor:
        """MacKay step log(a / b), zero where a = b = 0 and limited to +-12, shape (G+S,)."""
        both_zero = (self.pull <= 0) & (self.push <= 0)
        step = self.pull.log() - self.push.log()
        return torch.where(both_zero, torch.zeros_like(step), step).clamp(-_MAX_LOG_STEP, _MAX_LOG_STEP)


class EvidenceObjective:
    r"""Common part: the variables, their start and their bounds, in terms of the scale-free ratios.

    :math:`\rho_g = (\mathrm{tr} K_g / n) / (\lambda_g s)` is the prior variance of group g relative to the mean square
    s of the targets (s = 1 for logits). Start: :math:`\rho_g = 1/G` and the training mean squared error of the network
    as noise (0.1 s when it is unknown), clipped to [1e-4 s, s] with s here the mean square of the targets that it acts
    on. These rules make a whole run equivariant under J_g -> J_g / k and y -> c y.
    """

    def __init__(self, problem: Problem, scale: float, noise: NoiseModel, bounds: tuple[float, float]) -> None:
        """Set the scale, the reference diagonal of each group and the bounds."""
        try:
            low, high = map(float, bounds)
        except (TypeError, ValueError):
            raise ValueError(f"bounds must be two numbers (low, high), got {bounds!r}") from None
        if not 0 < low < high < math.inf:
            raise ValueError(f"bounds must be (low, high) with 0 < low < high < inf, got {bounds}")
        self.problem, self.scale, self.noise, self.bounds = problem, scale, noise, bounds
        means = self._mean_variances()
        positive = means[means > 0]
        # A group without any influence on the data has no scale of its own; it borrows that of the others.
        fallback = positive.mean() if positive.numel() else torch.ones_like(means[0])
        self.reference = torch.where(means > 0, means, fallback)  # shape: (G,)
        self.noise_scale = self._noise_scale()
        self.system: LinearSystem

    def _mean_variances(self) -> Tensor:
        """Mean of the diagonal of every K_g, shape (G,)."""
        return self.problem.stack.traces() / self.problem.rows

    @property
    def eigenvalues_cut(self) -> int:
        """Eigenvalues that were set to zero."""
        return self.system.eigenvalues_cut

    @property
    def knows_shift(self) -> bool:
        """Whether the trained weights are part of the problem, so that :meth:`squared_shift` exists."""
        return self.problem.tangent_theta is not None

    def residual_noise(self) -> Tensor | None:
        """Mean squared error of the network itself per noise component, (S,) or (1,); None where it has none."""
        problem = self.problem
        if not isinstance(problem, GaussianEvidence) or problem.tangent_theta is None:
            return None
        squares = problem.residual.square()
        if not self.num_noise:
            return squares.mean().reshape(1)
        return self.noise.sum_per_component(squares) / self.noise.sum_per_component(torch.ones_like(squares))

    def data_warnings(self) -> list[str]:
        """What about the data deserves attention: constant targets, repeated inputs."""
        return data_warnings(self.problem)

    @property
    def refreezes(self) -> bool:
        """Whether the curvature of a classification is to follow theta_star."""
        return False

    def evidence_bounds(self, x: Tensor) -> tuple[float, float] | None:
        """Lower and upper bound of the exact log evidence at x, where only bounds of it are known."""
        return None

    @property
    def num_groups(self) -> int:
        """Number G of precisions."""
        return self.problem.num_groups

    @property
    def num_noise(self) -> int:
        """Number S of learned noise variances."""
        return self.noise.num_learned

    @property
    def size(self) -> int:
        """Number of rows that tolerances refer to."""
        return self.problem.rows

    def _precision_at(self, ratio: float) -> Tensor:
        """Return log lambda_g at which every rho_g equals `ratio`, shape (G,)."""
        return (self.reference / self.scale).log() - math.log(ratio)

    def _noise_scale(self) -> Tensor:
        """Mean square of the targets that each learned variance acts on: outputs may differ in units, shape (S,)."""
        default = self.reference.new_full((self.num_noise,), self.scale)
        if not self.num_noise or not isinstance(self.problem, GaussianEvidence):
            return default
        counts = self.noise.sum_per_component(torch.ones_like(self.problem.targets))
        squares = self.noise.sum_per_component(self.problem.targets.square()) / counts
        return torch.where(squares > 0, squares, default)

    def _noise_bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds of the learned variances, each of shape (S,)."""
        low = (_NOISE_BOUNDS[0] * self.noise_scale).clamp_min(self.noise.minimum)
        return low, torch.maximum(_NOISE_BOUNDS[1] * self.noise_scale, 10.0 * low)

    def limits(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of x, each of shape (G+S,)."""
        low, high = (bound.log() for bound in self._noise_bounds())
        smallest, largest = self._precision_at(self.bounds[1]), self._precision_at(self.bounds[0])
        return torch.cat([smallest, low]), torch.cat([largest, high])

    def start(self) -> Tensor:
        """Documented starting point of x, shape (G+S,)."""
        noise = self._start_noise().clamp(_START_NOISE[0] * self.noise_scale, _START_NOISE[1] * self.noise_scale)
        start = torch.cat([self._precision_at(1.0 / self.num_groups), noise.log()])
        return start.clamp(*self.limits())

    def _start_noise(self) -> Tensor:
        """Training error of the network per noise component, or a fraction of the targets' mean square."""
        problem = self.problem
        if isinstance(problem, GaussianEvidence) and problem.tangent_theta is not None and self.num_noise:
            counts = self.noise.sum_per_component(torch.ones_like(problem.targets))
            return self.noise.sum_per_component(problem.residual.square()) / counts
        return 0.1 * self.noise_scale

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return precisions (G,) and learned noise variances (S,) at x."""
        return x[: self.num_groups].exp(), x[self.num_groups :].exp()

    def solution(self, x: Tensor, total: Tensor | None = None) -> Solution:
        """Solve the scale-free linear system at x; `total` is the weighted sum of the Grams, where it exists."""
        return self.system.solve(*self._scaled(x), total)

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the Grams and variances of the scale-free system."""
        precision, noise = self.split(x)
        return 1.0 / (precision * self.scale), noise / self.scale

    def constant(self, solution: Solution) -> float:
        """Log-determinant part of the evidence, in the units of the targets."""
        return -0.5 * solution.logdet - 0.5 * self.problem.rows * math.log(2.0 * math.pi * self.scale)

    def mode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha (n,), theta_star = Lambda^-1 J^T alpha, and B^(1/2) J (theta_star - theta_map) (rows,)."""
        raise NotImplementedError

    def likelihood_at_map(self, x: Tensor) -> tuple[float, Tensor, float]:
        """At the trained weights: log-likelihood (noise not normalised), noise pull (S,) and squared error."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the evidence at x = (log lambda, log sigma^2), shape (G+S,)."""
        raise NotImplementedError

    def evaluate(self, precision: Tensor, noise: Tensor | None = None) -> Evaluation:
        """Evaluate at precisions (G,) and learned variances (S,) (default: the current ones of the noise model)."""
        current = self.noise.values if noise is None else noise
        x = torch.cat([precision.reshape(-1), current.reshape(-1)]).to(self.reference).log()
        if x.numel() != self.num_groups + self.num_noise or not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"precision and noise must be positive with {self.num_groups} and {self.num_noise} entries, "
                f"got {precision.tolist()} and {current.tolist()}"
            )
        return self(x)

    def squared_shift(self, x: Tensor) -> tuple[float, Tensor]:
        r"""Squared distance :math:`\|\theta_\star - \tilde\theta\|^2_{H+\Lambda}`: its part in H, and in Lambda (G,).

        Needs `tangent_theta` and `theta_norms`. Half of the sum is M(theta_star) - M(theta_map) for a quadratic loss
        (law B17).
        """
        problem = self.problem
        if problem.tangent_theta is None or problem.theta_norms is None:
            raise ValueError("tangent_theta and theta_norms are needed for the shift, got None")
        precision, _ = self.split(x)
        alpha, misfit = self.mode(x)
        star = problem.stack.quadratic(alpha) / precision
        cross = problem.tangent_theta @ alpha
        prior = (star - 2.0 * cross + precision * problem.theta_norms).clamp_min(0.0)
        return float(misfit.square().sum()), prior


class ClassificationObjective(EvidenceObjective):
    """What the evidences of a classification share: rows whitened by a curvature, with unit noise."""

    problem: Any

    @property
    def size(self) -> int:
        """Rank of the curvature."""
        return self.problem.max_dimension

    @property
    def refreezes(self) -> bool:
        """Whether the curvature is to follow theta_star."""
        return self.problem.variant == "full"

    def constant(self, solution: Solution) -> float:
        """Log-determinant part of the evidence."""
        return -0.5 * solution.logdet

    def at_star(
        self, found: Solution, log_likelihood: float, quadratic: Tensor, squared_norms: Tensor, gap: float
    ) -> Evaluation:
        """Evidence with the true loss at theta_star; `quadratic` is lambda_g |theta_star_g|^2, shape (G,)."""
        return Evaluation(
            value=log_likelihood - 0.5 * float(quadratic.sum()) + self.constant(found),
            pull=found.dimension,
            push=quadratic.clamp_min(0.0),
            effective_dimension=found.dimension,
            squared_norms=squared_norms.clamp_min(0.0),
            sse=math.nan,
            jitter=found.jitter,
            rounding=found.rounding,
            gap=gap,
        )

    def of_expansion(self, x: Tensor, constant: float) -> Evaluation:
        """Evidence of the loss's second-order expansion at x; `constant` is what the Gaussian rows leave out."""
        found = self.solution(x)
        return Evaluation(
            value=constant + self.constant(found) - 0.5 * found.fit,
            pull=found.dimension,
            push=found.quadratic,
            effective_dimension=found.dimension,
            squared_norms=found.quadratic / self.split(x)[0],
            sse=math.nan,
            jitter=found.jitter,
            rounding=found.rounding,
        )


class MapObjective(EvidenceObjective):
    r"""The classical Laplace evidence at the trained weights (MacKay 1992), for comparison.

    .. math:: M_{\tilde\theta} = \log p(y | f) - \tfrac12 \|\tilde\theta\|^2_\Lambda - \tfrac12 \log\det(I +
    \Lambda^{-1} H)

    Not the marginal likelihood of any GP; its precisions are too small where the trained weights are no stationary
    point (T1).

    :param star: the objective at theta_star of the same problem, whose linear system is used; it must carry
        `theta_norms` (and `tangent_theta`).
    """

    def __init__(self, star: EvidenceObjective) -> None:
        """Share the linear system of `star`."""
        super().__init__(star.problem, star.scale, star.noise, star.bounds)
        if star.problem.theta_norms is None:
            raise ValueError("theta_norms is needed by the evidence at the trained weights, got None")
        self.star, self.system, self.theta_norms = star, star.system, star.problem.theta_norms

    @property
    def size(self) -> int:
        """Number of rows that tolerances refer to."""
        return self.star.size

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the evidence at x."""
        precision, noise = self.split(x)
        found = self.solution(x)
        likelihood, pull, sse = self.star.likelihood_at_map(x)
        prior = precision * self.theta_norms
        return Evaluation(
            value=likelihood - 0.5 * float(prior.sum()) + self.star.constant(found),
            pull=torch.cat([found.dimension, pull]),
            push=torch.cat([prior, noise / self.scale * found.inverse_diagonal]),
            effective_dimension=found.dimension,
            squared_norms=self.theta_norms,
            sse=sse,
            jitter=found.jitter * self.scale,
            rounding=found.rounding,
        )
