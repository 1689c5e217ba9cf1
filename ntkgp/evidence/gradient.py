"""L-BFGS-B on the exact gradient of an evidence."""

from __future__ import annotations

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from ntkgp.evidence.ascent import Ascent, BudgetExhausted, Optimum, try_fading
from ntkgp.evidence.objective import Evaluation, EvidenceObjective

_RESTARTS = 10


def lbfgs(
    objective: EvidenceObjective,
    start: Tensor | None = None,
    tolerance: float = 1e-8,
    max_evaluations: int = 500,
    progress: bool = False,
) -> Optimum:
    """Maximise an evidence by scipy's L-BFGS-B in (log lambda, log sigma^2) with the objective's bounds.

    Restarted with a fresh memory, up to 10 times, until the projected gradient meets the tolerance: near the optimum
    its line search ends on rounding of the evidence long before the gradient does.

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
        for _ in range(_RESTARTS):
            try_fading(ascent)
            before = ascent.x
            _run(ascent)
            assert ascent.current is not None
            if ascent.finished(ascent.x, ascent.current) or torch.equal(before, ascent.x):
                break
        try_fading(ascent)
    except BudgetExhausted:
        notes = (f"not converged: stopped after max_evaluations={max_evaluations} evaluations of the evidence",)
    except KeyboardInterrupt:
        notes = ("interrupted: the best point so far is reported",)
    return ascent.result(notes)


def _run(ascent: Ascent) -> None:
    """One run of L-BFGS-B from the current point; its iterates are accepted as they come."""
    seen: dict[bytes, tuple[Tensor, Evaluation]] = {}
    assert ascent.current is not None
    base = ascent.current.value

    def negative(point: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(point.copy()).to(ascent.lower)
        found = ascent.evaluate(x)
        seen[point.tobytes()] = (x, found)
        return base - found.value, -found.gradient.cpu().numpy()

    def accept(point: np.ndarray) -> None:
        x, found = seen[point.tobytes()]
        seen.clear()
        assert ascent.current is not None
        if found.value >= ascent.current.value - ascent.rounding(ascent.current):
            ascent.accept(x, found)

    def accept_flattest() -> None:
        """Take the flattest of the level points, which the line search rejects for rounding of the evidence."""
        assert ascent.current is not None
        lowest = ascent.current.value - ascent.rounding(ascent.current)
        level = [pair for pair in seen.values() if pair[1].value >= lowest]
        best = min(level, key=lambda pair: ascent.predicted_gain(*pair), default=(ascent.x, ascent.current))
        if ascent.predicted_gain(*best) < ascent.predicted_gain(ascent.x, ascent.current):
            ascent.accept(*best)

    scipy.optimize.minimize(
        negative,
        ascent.x.cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(ascent.lower.tolist(), ascent.upper.tolist(), strict=True)),
        callback=accept,
        options={
            "maxcor": 20,
            "ftol": 0.0,
            "gtol": 1e-3 * ascent.tolerance * ascent.objective.size,
            "maxfun": 10**9,
            "maxiter": 10**9,
        },
    )
    accept_flattest()
