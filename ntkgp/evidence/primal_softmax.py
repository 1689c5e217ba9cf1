"""Evidence of a classification in weight space: whitened, compressed rows, and theta_star by passes over the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ntkgp.checkpoint import moved_to
from ntkgp.evidence.objective import ClassificationObjective, Evaluation, EvidenceObjective
from ntkgp.evidence.primal import WeightSpaceProblem, objective_at
from ntkgp.evidence.problem import NoiseModel
from ntkgp.evidence.system import SpectralSystem, linear_system
from ntkgp.evidence.weight_space import CompressedRows, PrimalMode, TangentLogits, primal_mode
from ntkgp.linearization.symmetric import SymmetricGrams


@dataclass(frozen=True)
class PrimalSoftmaxEvidence(WeightSpaceProblem):
    r"""Classification in weight space; the counterpart of :class:`~ntkgp.evidence.SoftmaxEvidence`.

    :param logits: the tangent logits, for passes over the data.
    :param compressed: rows whitened by the curvature at the weights `point`.
    :param point: where the curvature is taken, shape (P,).
    :param make_grams: Grams of compressed rows.
    :param log_likelihood: of the data at the network's outputs.
    :param variant: "simple", "quadratic" or "full".
    """

    logits: TangentLogits = field(kw_only=True)
    compressed: CompressedRows = field(kw_only=True)
    point: Tensor = field(kw_only=True)
    make_grams: Callable[[Tensor], SymmetricGrams] = field(kw_only=True)
    log_likelihood: float = field(kw_only=True)
    variant: str = field(kw_only=True, default="simple")

    @property
    def max_dimension(self) -> int:
        """Largest effective dimension that the data can determine."""
        return self.data.num_data * max(self.outputs - 1, 1)

    def objective(self, at: str, bounds: tuple[float, float]) -> EvidenceObjective:
        """The evidence as a function of the precisions."""
        kind = PrimalQuadraticObjective if self.variant == "quadratic" else PrimalSoftmaxObjective
        return objective_at(kind(self, bounds), at)

    def frozen_at(self, point: Tensor) -> PrimalSoftmaxEvidence:
        """The same with the curvature at other weights: one pass."""
        compressed = self.logits.compress(point)
        grams = self.make_grams(compressed.root)
        return replace(self, grams=grams, root=compressed.root, compressed=compressed, point=point)


class _LogitObjective(ClassificationObjective):
    """What the objectives of a classification in weight space share."""

    def __init__(self, problem: PrimalSoftmaxEvidence, bounds: tuple[float, float], targets: Tensor | None) -> None:
        unit = NoiseModel.known(torch.ones_like(problem.compressed.targets))
        super().__init__(problem, 1.0, unit, bounds)  # type: ignore[arg-type]
        self.system = linear_system(problem.stack, targets, unit)

    def _mean_variances(self) -> Tensor:
        return self.problem.data.mean_variances

    @property
    def eigenvalues_cut(self) -> int:
        """Eigenvalues that were set to zero, those of rows that no J reaches among them."""
        spectral = isinstance(self.system, SpectralSystem)
        return self.system.eigenvalues_cut + (self.problem.compressed.unreached if spectral else 0)

    def residual_noise(self) -> Tensor | None:
        """None: a classification has no noise."""
        return None

    def data_warnings(self) -> list[str]:
        """What about the data deserves attention."""
        return self.problem.data.warnings()

    def theta_star(self, x: Tensor) -> Tensor:
        """The mode in weight space, shape (P,)."""
        raise NotImplementedError

    def squared_shift(self, x: Tensor) -> tuple[float, Tensor]:
        """Squared distance between theta_star and the trained weights; see the base class."""
        problem, precision = self.problem, self.split(x)[0]
        shift = self.theta_star(x) - problem.theta
        return float((problem.root @ shift).square().sum()), precision * problem.sum_per_group(shift.square())

    def likelihood_at_map(self, x: Tensor) -> tuple[float, Tensor, float]:
        """Return the data fit at the trained weights; see the base class."""
        return self.problem.log_likelihood, x[self.num_groups :], math.nan


class PrimalSoftmaxObjective(_LogitObjective):
    """Evidence of a classification at theta_star, curvature frozen, from compressed rows and passes over the data.

    Cost per evaluation: the linear system of n <= P rows, one factorisation of size P, and a few passes of 4·N·C·P
    flops; a new Hessian for theta_star, N·(C - 1)·P² flops, as a rule only in the first evaluations.
    """

    def __init__(self, problem: PrimalSoftmaxEvidence, bounds: tuple[float, float] = (1e-10, 1e10)) -> None:
        """Prepare the linear system of the whitened rows."""
        super().__init__(problem, bounds, None)
        self._last: tuple[Tensor, PrimalMode] | None = None

    def primal_mode(self, x: Tensor) -> PrimalMode:
        """Solve for theta_star at x, warm-started from the previous evaluation."""
        precision = self.split(x)[0][self.problem.index]
        if self._last is None:
            mode = find_mode(self.problem.logits, precision, self.problem.compressed)
        else:
            old, last = self._last
            if torch.equal(old, precision):
                return last
            # What the data fix stays as it is, what the prior fixes moves with it.
            candidates = [last.theta, last.theta * (old / precision)]
            values = [self.problem.logits.value(c)[0] - 0.5 * float((precision * c.square()).sum()) for c in candidates]
            start = candidates[values.index(max(values))]
            mode = primal_mode(self.problem.logits, precision, last.hessian, start)
        self._last = precision, mode
        return mode

    def theta_star(self, x: Tensor) -> Tensor:
        """The mode in weight space, shape (P,)."""
        return self.primal_mode(x).theta

    def warm_start(self) -> dict[str, Any] | None:
        """What the next evaluation starts from, as tensors and plain values."""
        return None if self._last is None else {"precision": self._last[0], "mode": dict(vars(self._last[1]))}

    def set_warm_start(self, state: dict[str, Any] | None) -> None:
        """Inverse of :meth:`warm_start`."""
        if state is None:
            self._last = None
            return
        moved = moved_to(state, self.problem.theta.device)
        self._last = moved["precision"], PrimalMode(**moved["mode"])

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the evidence at x."""
        precision, _ = self.split(x)
        found, star = self.solution(x), self.primal_mode(x)
        norms = self.problem.sum_per_group(star.theta.square())
        return self.at_star(found, star.log_likelihood, precision * norms, norms, star.gap)

    @property
    def curvature_point(self) -> Tensor:
        """Weights at which the curvature is taken."""
        return self.problem.point

    def mode_point(self, x: Tensor) -> Tensor:
        """Weights at which the curvature would be taken at theta_star."""
        return self.theta_star(x)

    def logit_change(self, new: Tensor, old: Tensor) -> tuple[float, float]:
        """Largest change of a logit between two points of curvature, and largest logit at the first."""
        return self.problem.logits.change(new, old)

    def frozen_at(self, point: Tensor) -> PrimalSoftmaxObjective:
        """The objective with its curvature at a point."""
        other = PrimalSoftmaxObjective(self.problem.frozen_at(point), self.bounds)
        other._last = self._last
        return other


class PrimalQuadraticObjective(_LogitObjective):
    """Evidence of the second-order expansion of a classification; a Gaussian problem with unit noise in n <= P rows."""

    def __init__(self, problem: PrimalSoftmaxEvidence, bounds: tuple[float, float] = (1e-10, 1e10)) -> None:
        """Prepare the linear system with the targets of the expansion."""
        pull = problem.compressed.targets
        self.targets = pull + problem.root @ problem.theta if problem.knows_theta else pull
        super().__init__(problem, bounds, self.targets)

    def theta_star(self, x: Tensor) -> Tensor:
        """The mode in weight space, shape (P,)."""
        alpha = self.system.alpha(*self._scaled(x))
        return (alpha @ self.problem.root) / self.split(x)[0][self.problem.index]

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the evidence at x."""
        # Squares of the rows that no J reaches cancel between the surrogate's constant and its misfit.
        squares = float(self.problem.compressed.targets.square().sum())
        return self.of_expansion(x, self.problem.log_likelihood + 0.5 * squares)


def find_mode(logits: TangentLogits, precision: Tensor, compressed: CompressedRows) -> PrimalMode:
    """theta_star from nothing but compressed rows, whose curvature and expansion give metric and start."""
    root = compressed.root
    return primal_mode(logits, precision, root.mT @ root, logits.centre)
