"""Evidence in weight space: as few rows as reach what N·C rows reach, and what the others contribute in closed form.

For rows J with one noise variance and QR = J, the rows of Q span all that J reaches, so that

    log N(t; 0, K_Lambda + s I) = log N(Q^T t; 0, R Lambda^-1 R^T + s I)
        - (N C - n) / 2 log(2 pi s) - (|t|^2 - |Q^T t|^2) / (2 s),

for every Lambda and s: n <= P rows stand for N·C. Several noise variances are compressed one by one. R and Q^T t come
from one pass (:class:`~ntkgp.linearization.statistics.RowTriangle`); they say what J^T J and J^T t say, to more digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ntkgp.evidence.gaussian import GaussianObjective
from ntkgp.evidence.objective import Evaluation, EvidenceObjective, MapObjective
from ntkgp.evidence.problem import NoiseModel
from ntkgp.evidence.stack import GramStack, gram_stack
from ntkgp.evidence.system import LinearSystem, Solution, SpectralSystem, linear_system
from ntkgp.linearization.symmetric import SymmetricGrams


@dataclass(frozen=True)
class DataSummary:
    """What the report says of the data, gathered in the pass.

    :param num_data: N.
    :param outputs: C.
    :param mean_variances: mean of the diagonal of every K_g, shape (G,).
    :param constant_targets: whether all targets are equal.
    :param repeated_inputs: number of inputs whose Jacobians equal those of another.
    """

    num_data: int
    outputs: int
    mean_variances: Tensor
    constant_targets: bool = False
    repeated_inputs: int = 0

    @property
    def rows(self) -> int:
        """N·C."""
        return self.num_data * self.outputs

    def warnings(self) -> list[str]:
        """The same words as of a problem in data space."""
        out = ["constant targets: all training targets are equal"] if self.constant_targets else []
        if self.repeated_inputs:
            out.append(f"{self.repeated_inputs} training inputs repeat another one (equal rows in every Gram)")
        return out


@dataclass(frozen=True)
class Unreached:
    """Rows that no J reaches, by kinds of noise.

    :param counts: number of rows of each kind, shape (K,).
    :param squares: sums of their squared targets, shape (K,).
    :param fixed: known variance of each kind, shape (K,).
    :param component: index of the learned variance on top of it, shape (K,).
    """

    counts: Tensor
    squares: Tensor
    fixed: Tensor
    component: Tensor

    def variance(self, noise: Tensor) -> Tensor:
        """Variance of each kind at learned variances (S,)."""
        return self.fixed + noise[self.component] if noise.numel() else self.fixed

    def per_component(self, values: Tensor, num_learned: int) -> Tensor:
        """Sum over the kinds of each learned variance: (K,) -> (S,)."""
        out = values.new_zeros(num_learned)
        return out.index_add(0, self.component, values) if num_learned else out

    def scaled(self, scale: float) -> Unreached:
        """In units in which `scale` is one."""
        return replace(self, squares=self.squares / scale, fixed=self.fixed / scale)


class ReducedSystem:
    """The linear system of the compressed rows, and what the rows that no J reaches add to each of its results."""

    def __init__(self, inner: LinearSystem, unreached: Unreached) -> None:
        """Add to `inner`, in its units."""
        self.inner, self.unreached = inner, unreached
        spectral = isinstance(inner, SpectralSystem)
        self.eigenvalues_cut = inner.eigenvalues_cut + (int(unreached.counts.sum()) if spectral else 0)

    def solve(self, weights: Tensor, noise: Tensor, total: Tensor | None = None) -> Solution:
        """Factorise and solve; see :class:`~ntkgp.evidence.system.Solution`."""
        found, rest, learned = self.inner.solve(weights, noise, total), self.unreached, noise.numel()
        variance = rest.variance(noise)
        return replace(
            found,
            logdet=found.logdet + float((rest.counts * variance.log()).sum()),
            fit=found.fit + float((rest.squares / variance).sum()),
            inverse_diagonal=found.inverse_diagonal + rest.per_component(rest.counts / variance, learned),
            alpha_squares=found.alpha_squares + rest.per_component(rest.squares / variance.square(), learned),
            sse=found.sse + float(rest.squares.sum()),
        )

    def alpha(self, weights: Tensor, noise: Tensor) -> Tensor:
        """A^-1 t of the compressed rows, shape (n,)."""
        return self.inner.alpha(weights, noise)


@dataclass(frozen=True)
class WeightSpaceProblem:
    """What both problems share.

    :param grams: Grams of the compressed rows, (G, n, n).
    :param root: the compressed rows R, shape (n, P).
    :param data: summary of the data.
    :param theta: trained weights, shape (P,); zeros where the prior is centred at the trained weights.
    :param index: group of every parameter, shape (P,).
    :param group_names: names of the groups, length G.
    :param group_sizes: number of parameters of each group, length G.
    :param knows_theta: whether `theta` are the trained weights.
    """

    grams: SymmetricGrams | Tensor
    root: Tensor
    data: DataSummary
    theta: Tensor
    index: Tensor
    group_names: tuple[str, ...]
    group_sizes: tuple[int, ...]
    knows_theta: bool

    @property
    def stack(self) -> GramStack:
        """View of the Grams."""
        return gram_stack(self.grams)

    @property
    def num_groups(self) -> int:
        """Number G of parameter groups."""
        return len(self.group_names)

    @property
    def rows(self) -> int:
        """Number N·C of scalar observations."""
        return self.data.rows

    @property
    def outputs(self) -> int:
        """C."""
        return self.data.outputs

    def sum_per_group(self, values: Tensor) -> Tensor:
        """(P,) -> (G,)."""
        return values.new_zeros(self.num_groups).index_add(0, self.index, values)

    @cached_property
    def tangent_theta(self) -> Tensor | None:
        """Rows R_g theta_g, shape (G, n); None where the trained weights are not part of the problem."""
        if not self.knows_theta:
            return None
        columns = self.theta.new_zeros(len(self.theta), self.num_groups)
        columns.scatter_(1, self.index.unsqueeze(-1), self.theta.unsqueeze(-1))
        return (self.root @ columns).mT.contiguous()

    @cached_property
    def theta_norms(self) -> Tensor | None:
        """Squared norms of the trained weights, shape (G,)."""
        return self.sum_per_group(self.theta.square()) if self.knows_theta else None


@dataclass(frozen=True)
class PrimalGaussianEvidence(WeightSpaceProblem):
    r"""Regression in weight space; the counterpart of :class:`~ntkgp.evidence.GaussianEvidence`.

    :param residual: y - f of the compressed rows, shape (n,).
    :param noise: noise model of the compressed rows.
    :param unreached: the other rows.
    :param mean_square: mean square of the targets of all rows.
    :param residual_square: mean square of y - f of all rows.
    :param log_whitening: sum of the logarithms of known variances that the rows were divided by (their roots); None
        where the rows are as observed.

    Equal to the problem in data space for every precision and noise, with n <= P rows per noise variance.
    """

    residual: Tensor = field(kw_only=True)
    noise: NoiseModel = field(kw_only=True)
    unreached: Unreached = field(kw_only=True)
    mean_square: float = field(kw_only=True)
    residual_square: float = field(kw_only=True)
    log_whitening: float | None = field(kw_only=True, default=None)

    @cached_property
    def targets(self) -> Tensor:
        """Targets of the compressed rows, shape (n,)."""
        return self.residual + self.root @ self.theta if self.knows_theta else self.residual

    @property
    def max_dimension(self) -> int:
        """Largest effective dimension that the data can determine."""
        return self.rows

    def objective(self, at: str, bounds: tuple[float, float]) -> EvidenceObjective:
        """The evidence as a function of precisions and noise."""
        return objective_at(PrimalGaussianObjective(self, bounds), at)


class PrimalGaussianObjective(GaussianObjective):
    """Evidence of a regression from compressed rows; cost as in data space with n <= P rows per noise variance."""

    problem: Any

    def __init__(self, problem: PrimalGaussianEvidence, bounds: tuple[float, float] = (1e-10, 1e10)) -> None:
        """Scale the targets and prepare the linear system."""
        scale = problem.mean_square or 1.0
        EvidenceObjective.__init__(self, problem, scale, problem.noise, bounds)  # type: ignore[arg-type]
        noise = replace(problem.noise, fixed=problem.noise.fixed / scale)
        inner = linear_system(problem.stack, problem.targets / math.sqrt(scale), noise)
        self.system = ReducedSystem(inner, problem.unreached.scaled(scale))

    def _mean_variances(self) -> Tensor:
        return self.problem.data.mean_variances

    def _mean_squares(self, rows: Tensor) -> Tensor:
        """Mean squares per noise component of rows as observed: compressed ones and those that no J reaches, (S,)."""
        rest = self.problem.unreached
        counts = self.noise.sum_per_component(torch.ones_like(rows)) + rest.per_component(rest.counts, self.num_noise)
        squares = self.noise.sum_per_component(rows.square()) + rest.per_component(rest.squares, self.num_noise)
        return squares / counts

    def _noise_scale(self) -> Tensor:
        default = self.reference.new_full((self.num_noise,), self.scale)
        if not self.num_noise:
            return default
        squares = self._mean_squares(self.problem.targets)
        return torch.where(squares > 0, squares, default)

    def _start_noise(self) -> Tensor:
        known = self.num_noise and self.problem.knows_theta
        return self._mean_squares(self.problem.residual) if known else 0.1 * self.noise_scale

    def residual_noise(self) -> Tensor | None:
        """Mean squared error of the network itself per noise component."""
        if not self.problem.knows_theta:
            return None
        if not self.num_noise:
            return self.reference.new_tensor([self.problem.residual_square])
        return self._mean_squares(self.problem.residual)

    def data_warnings(self) -> list[str]:
        """What about the data deserves attention."""
        return self.problem.data.warnings()

    def constant(self, solution: Solution) -> float:
        """Log-determinant part of the evidence, in the units of the targets."""
        return super().constant(solution) - 0.5 * (self.problem.log_whitening or 0.0)

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the evidence at x; the squared error of whitened rows is not that of the data (NaN)."""
        found = super().__call__(x)
        return found if self.problem.log_whitening is None else replace(found, sse=math.nan)

    def likelihood_at_map(self, x: Tensor) -> tuple[float, Tensor, float]:
        """Return the data fit at the trained weights; see the base class."""
        value, pull, _ = super().likelihood_at_map(x)
        _, noise = self.split(x)
        rest = self.problem.unreached
        variance = rest.variance(noise)
        value -= 0.5 * float((rest.squares / variance).sum())
        pull = pull + noise * rest.per_component(rest.squares / variance.square(), self.num_noise)
        return value, pull, self.problem.residual_square * self.problem.rows


class PrimalMapObjective(MapObjective):
    """The evidence at the trained weights, with what the problem in weight space knows of the data."""

    def __init__(self, star: EvidenceObjective) -> None:
        """Share the linear system of `star`."""
        self.star = star
        super().__init__(star)

    def _mean_variances(self) -> Tensor:
        return self.star._mean_variances()

    def _noise_scale(self) -> Tensor:
        return self.star.noise_scale

    def _start_noise(self) -> Tensor:
        return self.star._start_noise()

    @property
    def eigenvalues_cut(self) -> int:
        """Eigenvalues that were set to zero."""
        return self.star.eigenvalues_cut

    def residual_noise(self) -> Tensor | None:
        """Mean squared error of the network itself per noise component."""
        return self.star.residual_noise()

    def data_warnings(self) -> list[str]:
        """What about the data deserves attention."""
        return self.star.data_warnings()


def objective_at(star: EvidenceObjective, at: str) -> EvidenceObjective:
    """The objective itself at theta_star, or that at the trained weights."""
    return star if at == "theta_star" else PrimalMapObjective(star)
