"""MacKay's fixed point in data space, safeguarded and accelerated."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkgp.evidence.ascent import Ascent, BudgetExhausted, Optimum, try_fading
from ntkgp.evidence.objective import Evaluation, EvidenceObjective

_HISTORY = 20
_MAX_MOVE = 5.0
_MAX_HALVINGS = 30
_SUFFICIENT = 1e-4


def fixed_point(
    objective: EvidenceObjective,
    start: Tensor | None = None,
    tolerance: float = 1e-8,
    max_evaluations: int = 500,
    progress: bool = False,
) -> Optimum:
    r"""Maximise an evidence by MacKay's fixed point :math:`\lambda_g \leftarrow \gamma_g / \|\theta_{\star g}\|^2`.

    With the gradient (a - b)/2 the step log(a/b) equals M g with the positive diagonal M = log(a/b) / ((a - b)/2):
    MacKay's rule is gradient ascent in its own metric, an ascent direction coordinate by coordinate. Each iteration
    takes that step, improved by limited-memory BFGS with M as the initial inverse Hessian (the first step is exactly
    MacKay's), and halves it until the evidence rises; a direction that fails is replaced by the plain MacKay step.
    Variables held at a bound are left out. Groups that fade are tried at their upper bound directly. Source: MacKay
    1992.

    :param objective: the evidence.
    :param start: starting point (log lambda, log sigma^2), shape (G+S,) (default: the objective's documented start).
    :param tolerance: accepted projected gradient per row of data.
    :param max_evaluations: largest number of evaluations of the evidence.
    :param progress: show a progress bar.
    :returns: the best point; an interrupt (Ctrl-C) returns the best so far with a note.

    Cost: one evaluation of the objective per accepted step as a rule; memory O(20 (G+S)).

    >>> import torch
    >>> from ntkgp.evidence import GaussianEvidence, NoiseModel, evidence_objective
    >>> rows = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> targets = rows.sum(-1)
    >>> problem = GaussianEvidence((rows @ rows.T)[None], targets, NoiseModel.known(torch.full((20,), 0.1)))
    >>> fixed_point(evidence_objective(problem)).converged
    True
    """
    ascent = Ascent(objective, start, tolerance, max_evaluations, progress)
    notes: tuple[str, ...] = ()
    try:
        ascent.accept(ascent.x, ascent.evaluate(ascent.x))
        _iterate(ascent)
    except BudgetExhausted:
        notes = (f"not converged: stopped after max_evaluations={max_evaluations} evaluations of the evidence",)
    except KeyboardInterrupt:
        notes = ("interrupted: the best point so far is reported",)
    return ascent.result(notes)


def _iterate(ascent: Ascent) -> None:
    """Iterate until convergence or until rounding allows no further step."""
    pairs: list[tuple[Tensor, Tensor]] = []
    mask: Tensor | None = None
    iteration, next_fading = 0, 0
    while True:
        current = ascent.current
        assert current is not None
        if iteration >= next_fading:
            next_fading = iteration + 3
            if try_fading(ascent):
                pairs = []
                continue
        free = ascent.free(ascent.x, current)
        if ascent.finished(ascent.x, current):
            return
        if mask is None or not torch.equal(mask, free):
            pairs, mask = [], free
        before, gradient = ascent.x, current.gradient
        moved = bool(pairs) and _search(
            ascent, _quasi_newton(current, ascent.metric(current), free, pairs), max_halvings=4
        )
        if not moved:
            pairs = []
            if not _search(ascent, torch.where(free, current.step, 0.0), _MAX_HALVINGS):
                return
        assert ascent.current is not None
        change, bend = ascent.x - before, gradient - ascent.current.gradient
        change, bend = torch.where(free, change, 0.0), torch.where(free, bend, 0.0)
        # Only pairs of positive curvature keep the direction an ascent direction.
        if float(change @ bend) > 1e-10 * float(change.norm() * bend.norm()):
            pairs = [*pairs[1 - _HISTORY :], (change, bend)]
        else:
            pairs = []
        iteration += 1


def _quasi_newton(current: Evaluation, metric: Tensor, free: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Two-loop recursion with MacKay's metric as the initial inverse Hessian, in the free coordinates."""
    gradient = torch.where(free, current.gradient, 0.0)
    direction, factors = gradient.clone(), []
    for change, bend in reversed(pairs):
        factor = (change @ direction) / (change @ bend)
        factors.append(factor)
        direction = direction - factor * bend
    direction = torch.where(free, metric * direction, 0.0)
    for (change, bend), factor in zip(pairs, reversed(factors), strict=True):
        direction = direction + (factor - (bend @ direction) / (change @ bend)) * change
    # Pairs may have been taken where the metric was different by orders of magnitude: keep moves moderate.
    return direction * min(1.0, _MAX_MOVE / max(float(direction.abs().max()), 1e-300))


def _search(ascent: Ascent, direction: Tensor, max_halvings: int) -> bool:
    """Halve the step along the projected direction until the evidence rises; False when it does not."""
    current = ascent.current
    assert current is not None
    size = 1.0
    for _ in range(max_halvings + 1):
        x = (ascent.x + size * direction).clamp(ascent.lower, ascent.upper)
        if torch.equal(x, ascent.x):
            return False
        slope = float(current.gradient @ (x - ascent.x))
        if slope <= 0:
            return False
        found = ascent.evaluate(x)
        gain = found.value - current.value
        rising = gain >= _SUFFICIENT * slope and gain > 0
        # Below rounding of the evidence only the gradient can still tell progress.
        level = abs(gain) <= ascent.rounding(current)
        flatter = ascent.predicted_gain(x, found) < ascent.predicted_gain(ascent.x, current)
        if (rising and not level) or (level and flatter):
            ascent.accept(x, found)
            return True
        if level:
            return False
        size *= 0.5
    return False
