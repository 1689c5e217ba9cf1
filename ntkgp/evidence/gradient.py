"""L-BFGS-B on the exact gradient of an evidence."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import scipy
import torch
from torch import Tensor

from ntkgp.evidence.ascent import Ascent, BudgetExhausted, Optimum, try_fading
from ntkgp.evidence.objective import Evaluation, EvidenceObjective

_STEPS = 12
_UNITS = (1e-2, 1e2)
_PATIENCE = 4
_FLATTER = 0.1


def lbfgs(
    objective: EvidenceObjective,
    start: Tensor | None = None,
    tolerance: float = 1e-8,
    max_evaluations: int = 500,
    progress: bool = False,
) -> Optimum:
    """Maximise an evidence by scipy's L-BFGS-B in (log lambda, log sigma^2) with the objective's bounds.

    Restarted every 12 steps in the metric of MacKay's fixed point there, with groups that fade tried at their bounds,
    until the projected gradient meets the tolerance or rounding of the evidence allows no further progress.

    Parameters, result and errors are those of :func:`~ntkgp.evidence.fixed_point`.

    >>> import torch
    >>> from ntkgp.evidence import GaussianEvidence, NoiseModel, evidence_objective
    >>> rows = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> problem = GaussianEvidence((rows @ rows.T)[None], rows.sum(-1), NoiseModel.known(torch.full((20,), 0.1)))
    >>> lbfgs(evidence_objective(problem)).converged
    True
    """
    ascent = Ascent(objective, start, tolerance, max_evaluations, progress)
    notes: tuple[str, ...] = ()
    try:
        ascent.accept(ascent.x, ascent.evaluate(ascent.x))
        while True:
            faded = try_fading(ascent)
            before = ascent.x
            if ascent.finished(before, ascent.best()):
                break
            gain = ascent.predicted_gain(before, ascent.best())
            _Run(ascent)()
            if torch.equal(before, ascent.x):
                break
            flatter = ascent.predicted_gain(ascent.x, ascent.best()) < _FLATTER * gain
            if ascent.met(ascent.x, ascent.best()) and not flatter and not faded:
                break
    except BudgetExhausted:
        notes = (f"not converged: stopped after max_evaluations={max_evaluations} evaluations of the evidence",)
    except KeyboardInterrupt:
        notes = ("interrupted: the best point so far is reported",)
    return ascent.result(notes)


class _Enough(Exception):
    """Raised inside scipy when another step has nothing to gain."""


class _Run:
    """One run of L-BFGS-B from the current point; its iterates are accepted as they come.

    It sees x in units of the square root of MacKay's metric, in which curvatures are near one: groups that hardly
    matter would otherwise take hundreds of steps.
    """

    def __init__(self, ascent: Ascent) -> None:
        """Start at the current point, which is not evaluated again."""
        self.ascent, self.start = ascent, ascent.best()
        self.unit = ascent.metric(self.start).sqrt().clamp(*_UNITS)
        self.low, self.high = ascent.lower / self.unit, ascent.upper / self.unit
        self.origin = (ascent.x / self.unit).cpu().numpy()
        self.seen = {self.origin.tobytes(): (ascent.x, self.start)}
        self.flattest = ascent.predicted_gain(ascent.x, self.start)
        self.steps = self.stale = self.level = 0

    def __call__(self) -> None:
        """Run until the limits, the optimum or rounding end it."""
        with suppress(_Enough):
            scipy.optimize.minimize(
                self._negative,
                self.origin,
                jac=True,
                method="L-BFGS-B",
                bounds=torch.stack([self.low, self.high], -1).cpu().numpy(),
                callback=self._accept,
                options={"maxcor": 20, "maxls": 5, "ftol": 0.0, "gtol": 0.0, "maxfun": 10**9, "maxiter": 10**9},
            )
        self._accept_flattest()

    def _negative(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the evidence, from that of the start, and minus its gradient."""
        ascent, key = self.ascent, point.tobytes()
        if key not in self.seen:
            scaled = torch.from_numpy(point.copy()).to(self.unit)
            # At a bound exactly: a rounding error inside it, the coordinate would count as free.
            x = torch.where(scaled >= self.high, ascent.upper, scaled * self.unit)
            x = torch.where(scaled <= self.low, ascent.lower, x)
            self.seen[key] = (x, ascent.evaluate(x))
            self._end(*self.seen[key])
        found = self.seen[key][1]
        return self.start.value - found.value, -(found.gradient * self.unit).cpu().numpy()

    def _end(self, x: Tensor, found: Evaluation) -> None:
        """End where nothing is left to gain, or where the line search only moves within rounding of the evidence."""
        ascent, current = self.ascent, self.ascent.best()
        gain, rounding = found.value - current.value, ascent.rounding(current)
        self.level = self.level + 1 if abs(gain) <= rounding else 0
        exhausted = self.level >= _PATIENCE and ascent.met(ascent.x, current)
        if exhausted or (gain >= -rounding and ascent.finished(x, found)):
            raise _Enough

    def _accept(self, point: np.ndarray) -> None:
        """Take an iterate; end after some steps, for a new metric, or where they lead nowhere."""
        ascent, current = self.ascent, self.ascent.best()
        x, found = self.seen[point.tobytes()]
        self.seen.clear()
        if found.value >= current.value - ascent.rounding(current):
            ascent.accept(x, found)
        gain = ascent.predicted_gain(x, found)
        self.stale = 0 if gain < _FLATTER * self.flattest else self.stale + 1
        self.flattest = gain if self.stale == 0 else self.flattest
        self.steps, self.level = self.steps + 1, 0
        if self.steps == _STEPS or (self.stale >= _PATIENCE and ascent.met(x, found)):
            raise _Enough

    def _accept_flattest(self) -> None:
        """Take the flattest of the level points, which the line search rejects for rounding of the evidence."""
        ascent, current = self.ascent, self.ascent.best()
        level = [pair for pair in self.seen.values() if pair[1].value >= current.value - ascent.rounding(current)]
        best = min(level, key=lambda pair: ascent.predicted_gain(*pair), default=(ascent.x, current))
        if ascent.predicted_gain(*best) < ascent.predicted_gain(ascent.x, current):
            ascent.accept(*best)
