"""Laws of the evidence and of what it chooses."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from ntkgp.laws.oracle import rel
from ntkgp.laws.problems import rescaled
from ntkgp.laws.protocol import Fitted, NotApplicableError, Optimum
from ntkgp.laws.trial import DENSE, Trial, law, worst_of


def either_evidence(fitted: Fitted) -> float | None:
    """The evidence that a library has: at θ⋆, at θ̃, or None."""
    for name in ("log_evidence", "log_evidence_map"):
        try:
            return float(getattr(fitted, name)())
        except (NotApplicableError, AttributeError):
            continue
    return None


def _compared(pairs: list[tuple[float, float]]) -> tuple[float, str]:
    """Largest difference of (found, right) evidences, relative beyond one nat, and where it is."""
    found, right = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    error = worst_of(*(abs(a - b) / max(abs(b), 1.0) for a, b in pairs))
    return error, f"{found:.4f} nats where {right:.4f} is right"


def _points(trial: Trial) -> list[tuple[torch.Tensor, float | None]]:
    """Hyper-parameters at which an evidence is compared; σ² is None in a classification."""
    noises = (0.02, 0.09, 0.5)
    return [
        (precision, None if trial.problem.likelihood == "classification" else noise)
        for precision, noise in zip(trial.precisions(3), noises, strict=True)
    ]


@law(
    "B4", "The evidence at θ⋆ is log N(y; f − Jθ̃, K + σ²I), at any Λ and σ².", kinds=("exact",),
    problems=("normalised", "plain"),
)  # fmt: skip
def _marginal_likelihood(trial: Trial) -> tuple[float, str]:
    fitted, dense = trial.fit(), trial.reference
    pairs = [(fitted.log_evidence(*point), dense.log_evidence(*point)) for point in _points(trial)]
    return _compared(pairs)


@law("B15", "Effective dimension γ = P − λ tr Σ of each tensor.", kinds=("exact",), problems=("normalised", "plain"))
def _effective_dimension(trial: Trial) -> float:
    return rel(trial.fit().effective_dimension(), trial.reference.effective_dimension())


@law(
    "B16", "The hyper-parameters chosen by the evidence maximise it (nats lost).", tolerance=1e-3,
    problems=("normalised", "softmax"),
)  # fmt: skip
def _optimum(trial: Trial) -> tuple[float, str]:
    chosen = trial.fit().optimum()
    trial.require(
        chosen.at == "theta_map" or (trial.kind == "exact" and trial.problem.likelihood == "regression"),
        "no closed form to compare with",
    )
    return lost(trial, chosen)


def lost(trial: Trial, chosen: Optimum) -> tuple[float, str]:
    """Nats between the evidence at a choice and at the best one."""
    if not bool(torch.isfinite(chosen.precision).all()):
        return math.inf, f"precision {chosen.precision.tolist()}"
    dense = trial.reference
    best = dense.optimum(chosen.at, chosen.precision.numel() == 1, chosen.noise is not None)
    value = {"theta_star": lambda o: dense.log_evidence(o.precision, o.noise)}.get(
        chosen.at, lambda o: dense.log_evidence_map(o.precision, o.noise)
    )
    gap = value(best) - value(chosen)
    return max(0.0, gap) if math.isfinite(gap) else math.inf, f"of {value(best):.4f}, at {chosen.at}"


@law(
    "B17", "The evidence at θ̃ is log p(y|θ̃) − ½‖θ̃‖²_Λ − ½logdet(I + Λ⁻¹H), ½‖θ⋆ − θ̃‖² below that at θ⋆.",
    problems=("normalised", "plain"),
)  # fmt: skip
def _at_the_trained_weights(trial: Trial) -> tuple[float, str]:
    fitted, dense = trial.fit(), trial.reference
    pairs = [(fitted.log_evidence_map(*point), dense.log_evidence_map(*point)) for point in _points(trial)]
    error, words = _compared(pairs)
    if trial.kind == "exact":
        # The same number by a way that shares neither determinant nor norm with the formula.
        for point, (found, _) in zip(_points(trial), pairs, strict=True):
            other = dense.at(*point)
            star = other.log_evidence()
            again = abs(found + other.distance() - star) / max(abs(star), other.distance(), 1.0)
            error = worst_of(error, again)
    return error, words


@law("B18", "The evidence at θ̃ is concave in the precisions.", tolerance=1e-10)
def _concave(trial: Trial) -> float:
    fitted, worst = trial.fit(), 0.0
    precisions = [*trial.precisions(3), trial.precision]
    for a, b in pairwise(precisions):
        ends = (fitted.log_evidence_map(a, None) + fitted.log_evidence_map(b, None)) / 2
        worst = worst_of(worst, (ends - fitted.log_evidence_map((a + b) / 2, None)) / abs(ends))
    return worst


@law(
    "B25", "Precisions chosen by the evidence make predictions that do not see the scale of normalised weights.",
    kinds=("exact", "diagonal", "kfac"), tolerance=1e-3, per_tensor=True,
)  # fmt: skip
def _chosen_at_any_scale(trial: Trial) -> float:
    changed, _ = rescaled(trial.problem)
    x, found = trial.x_test, []
    for p in (trial.problem, changed):
        chosen = trial.fit(p).optimum()
        noise = p.noise if chosen.noise is None else chosen.noise
        found.append(trial.fit(p, precision=chosen.precision, noise=noise).covariance(x))
    return rel(found[1], found[0])


@law("C14", "The diagonal's log-determinant is no smaller, its evidence at θ̃ no larger, than of all of H.",
     kinds=("diagonal",), tolerance=1e-10)  # fmt: skip
def _hadamard(trial: Trial) -> float:
    exact = trial.exact.log_evidence_map()
    return worst_of(0.0, trial.fit().log_evidence_map() - exact) / abs(exact)


@law("D3", "Softmax: the evidence at θ̃, with all of diag(p) − ppᵀ.", kinds=DENSE, problems=("softmax",))
def _softmax_evidence(trial: Trial) -> tuple[float, str]:
    fitted, dense = trial.fit(), trial.reference
    pairs = [(fitted.log_evidence_map(*point), dense.log_evidence_map(*point)) for point in _points(trial)]
    return _compared(pairs)


@law("U3", "Asking for the evidence at other hyper-parameters changes nothing.", tolerance=0.0, strict=True)
def _asking(trial: Trial) -> float:
    fitted, x = trial.fit(), trial.x_test
    before = fitted.covariance(x)
    for name in ("log_evidence", "log_evidence_map"):
        try:
            getattr(fitted, name)(5 * trial.precision, 4 * trial.problem.noise)
        except (NotApplicableError, AttributeError):
            continue
        return float((fitted.covariance(x) - before).abs().max() / before.abs().max())
    raise NotApplicableError("has no evidence")
