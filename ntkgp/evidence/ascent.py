"""What both optimisers share: counting evaluations, convergence, the best point so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ntkgp.evidence.objective import Evaluation, EvidenceObjective

PRUNED_DIMENSION = 1e-4


class BudgetExhausted(Exception):
    """Raised inside an optimiser when no evaluation is left."""


@dataclass(frozen=True)
class Optimum:
    """Result of an evidence maximisation.

    :param x: (log lambda, log sigma^2), shape (G+S,).
    :param evaluation: the evaluation there.
    :param trace: evidence of the start and after each accepted step.
    :param converged: whether the tolerance was met, or rounding of the evidence reached.
    :param evaluations: number of evidence evaluations.
    :param notes: plain words on what ended the run early.
    """

    x: Tensor
    evaluation: Evaluation
    trace: list[float]
    converged: bool
    evaluations: int
    notes: tuple[str, ...] = ()


class Ascent:
    """Evaluates an objective within its limits, counts, shows progress and remembers accepted points."""

    def __init__(
        self, objective: EvidenceObjective, start: Tensor | None, tolerance: float, max_evaluations: int, progress: bool
    ) -> None:
        """Prepare the run."""
        if not isinstance(tolerance, int | float) or not tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {tolerance!r}")
        if not isinstance(max_evaluations, int) or max_evaluations < 1:
            raise ValueError(f"max_evaluations must be at least 1, got {max_evaluations!r}")
        self.objective, self.tolerance, self.max_evaluations = objective, tolerance, max_evaluations
        self.lower, self.upper = objective.limits()
        self.x = objective.start() if start is None else start.clamp(self.lower, self.upper)
        self.evaluations = 0
        self.trace: list[float] = []
        self.bar = tqdm(total=None, desc="evidence", unit=" evaluations", disable=not progress)
        self.current: Evaluation | None = None

    def evaluate(self, x: Tensor) -> Evaluation:
        """Evaluate one point inside the limits."""
        if self.evaluations >= self.max_evaluations:
            raise BudgetExhausted
        out = self.objective(x)
        self.evaluations += 1
        self.bar.update()
        return out

    def accept(self, x: Tensor, evaluation: Evaluation) -> None:
        """Make a point the current one."""
        self.x, self.current = x, evaluation
        self.trace.append(evaluation.value)
        self.bar.set_postfix_str(f"log evidence {evaluation.value:.4f}")

    def best(self) -> Evaluation:
        """Evaluation of the current point, which is the best so far."""
        assert self.current is not None
        return self.current

    def free(self, x: Tensor, evaluation: Evaluation) -> Tensor:
        """Coordinates that are not held at a bound by an outward gradient, shape (G+S,) of bool."""
        gradient = evaluation.gradient
        return ~((x <= self.lower) & (gradient <= 0) | (x >= self.upper) & (gradient >= 0))

    def projected_gradient(self, x: Tensor, evaluation: Evaluation) -> float:
        """Largest entry of the gradient among the free coordinates."""
        gradient = evaluation.gradient[self.free(x, evaluation)]
        return float(gradient.abs().max()) if gradient.numel() else 0.0

    def metric(self, evaluation: Evaluation) -> Tensor:
        """MacKay's metric M, with step = M gradient; where both vanish its limit, shape (G+S,)."""
        gradient = evaluation.gradient
        limit = 2.0 / evaluation.push.clamp_min(1e-300)
        return torch.where(gradient != 0, evaluation.step / gradient, limit)

    def predicted_gain(self, x: Tensor, evaluation: Evaluation) -> float:
        """Gradient times MacKay step over the free coordinates: how far from stationarity, in MacKay's metric."""
        return float((evaluation.gradient * evaluation.step)[self.free(x, evaluation)].sum())

    def met(self, x: Tensor, evaluation: Evaluation) -> bool:
        """Whether the projected gradient is within tolerance, or a step gains less than rounding of the evidence."""
        if self.projected_gradient(x, evaluation) <= self.tolerance * self.objective.size:
            return True
        return self.predicted_gain(x, evaluation) <= 1e-2 * self.rounding(evaluation)

    def finished(self, x: Tensor, evaluation: Evaluation) -> bool:
        """Whether nothing is left to gain: 100 times stricter, because flat directions need it for their log lambda."""
        step = evaluation.step[self.free(x, evaluation)]
        small = not step.numel() or float(step.abs().max()) <= self.tolerance
        return small and self.projected_gradient(x, evaluation) <= 1e-2 * self.tolerance * self.objective.size

    def rounding(self, evaluation: Evaluation) -> float:
        """Differences of the evidence that are rounding."""
        return evaluation.rounding + 1e-14 * (abs(evaluation.value) + self.objective.size)

    def result(self, notes: tuple[str, ...]) -> Optimum:
        """Collect the result at the current point."""
        self.bar.close()
        if self.current is None:
            raise KeyboardInterrupt("interrupted before the first evaluation of the evidence")
        converged = not notes and self.met(self.x, self.current)
        return Optimum(self.x, self.current, self.trace, converged, self.evaluations, notes)


def try_fading(ascent: Ascent, limit: float = 1e-2) -> bool:
    """Move what fades to its bound, if the evidence does not fall; its optimum is only approached slowly in logarithms.

    Groups fade when gamma_g is below `limit` and the precision still grows; a noise variance fades when the number of
    rows that it explains, sigma^2 tr A^-1, is below `limit` and it still shrinks.
    """
    current = ascent.current
    assert current is not None
    groups, gradient = ascent.objective.num_groups, current.gradient
    fading_groups = (current.effective_dimension < limit) & (gradient[:groups] >= 0)
    fading_noise = (current.push[groups:] < limit) & (gradient[groups:] <= 0)
    target = torch.cat([ascent.upper[:groups], ascent.lower[groups:]])
    fading = torch.cat([fading_groups, fading_noise]) & (ascent.x != target)
    if not bool(fading.any()):
        return False
    x = torch.where(fading, target, ascent.x)
    evaluation = ascent.evaluate(x)
    if evaluation.value < current.value - ascent.rounding(current):
        return False
    ascent.accept(x, evaluation)
    return True
