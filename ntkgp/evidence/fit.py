"""Fit precisions and noise by the evidence: of a bare problem, or of a model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ntkgp.checkpoint import Checkpoint, running
from ntkgp.evidence.ascent import PRUNED_DIMENSION, Optimum
from ntkgp.evidence.factory import evidence_objective
from ntkgp.evidence.fixed_point import fixed_point
from ntkgp.evidence.gradient import lbfgs
from ntkgp.evidence.hyperprior import HyperPrior, PenalisedObjective
from ntkgp.evidence.objective import EvidenceObjective, MapObjective
from ntkgp.evidence.problem import AnyProblem, GaussianEvidence, SoftmaxEvidence
from ntkgp.evidence.recorded import Answers, RecordedObjective, problem_identity
from ntkgp.evidence.report import EvidenceReport

_METHODS: dict[str, Callable[..., Optimum]] = {"mackay": fixed_point, "lbfgs": lbfgs}
_OUTER_STEPS = 50
_OUTER_TOLERANCE = 1e-7
_OVERFITTED = 0.9
_UNDERFITTED = 1.5  # of the network's mean squared training error to the noise
_STORED_TOLERANCE = 1e-4


class EvidenceModel(Protocol):
    """What :func:`fit_evidence` needs of a model."""

    def evidence_problem(self, *, at: str, curvature: str, targets: str) -> AnyProblem:
        """Build the problem from training data, kernel and likelihood."""

    def set_hyperparameters(self, precision: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Write precisions (G,) and noise (S,) under the model's constraints; return what was stored."""


@dataclass(frozen=True)
class _Fit:
    """An optimum with the objective that it belongs to."""

    objective: Any
    optimum: Optimum


def fit_evidence(
    model: EvidenceModel,
    method: str = "mackay",
    at: str = "theta_star",
    curvature: str = "simple",
    targets: str = "data",
    held_out: bool = False,
    max_evaluations: int = 500,
    tolerance: float = 1e-8,
    progress: bool = False,
    bounds: tuple[float, float] = (1e-10, 1e10),
    prior: HyperPrior | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> EvidenceReport:
    r"""Fit all group precisions and the noise of a model by maximising its evidence, and store them in the model.

    At `theta_star` (Antoran et al. 2022, recommendation 1) the evidence is the marginal likelihood of the tangent
    model,

    .. math:: M = \log p(y | h(\theta_\star)) - \tfrac12 \|\theta_\star\|^2_\Lambda
        - \tfrac12 \log\det(I + \Lambda^{-1} H),

    with theta_star the mode of the tangent model. At `theta_map` it is the classical Laplace evidence, the same
    expression at the trained weights. Only per-group Grams are used; no network pass is made after they are built.

    :param model: :class:`ntkgp.ExactNTKGP`; a :class:`~ntkgp.models.nystrom.NystromNTKGP` or what
        :func:`~ntkgp.evidence.one_pass` returns, whose evidence is a bound (the report has bounds of the exact one); or
        anything with its `evidence_problem` and `set_hyperparameters`.
    :param method: "mackay" (accelerated fixed point, default) or "lbfgs" (L-BFGS-B); both find the same optimum.
    :param at: "theta_star" (default) or "theta_map".
    :param curvature: classification only: "simple" (true loss, H at the trained weights, default), "quadratic"
        (second-order expansion of the loss there) or "full" (H re-evaluated at theta_star in an outer fixed point).
    :param targets: "data" (default), or "residual" for the evidence of y - f(x), which needs `held_out=True`.
    :param held_out: declares that the network was not trained on the model's data.
    :param max_evaluations: largest number of evaluations of the evidence.
    :param tolerance: accepted projected gradient per row of data.
    :param progress: show a progress bar. An interrupt keeps the best point so far.
    :param bounds: smallest and largest prior variance of a group relative to the mean square of the targets (of one,
        for logits): bounds on log lambda that do not depend on units or on the scale of the weights.
    :param prior: a hyper-prior, an object with ``log_density(log_precision)``: (G,) -> a scalar, differentiable. Its
        log-density is added to the evidence that is maximised; `report.log_evidence` stays that of the data alone,
        `report.log_prior` is the other term, `report.trace` their sum.
    :param checkpoint: a folder, or a :class:`~ntkgp.checkpoint.Checkpoint`: a call that was killed is repeated with the
        same arguments and goes on where it stood, to the very same result. Kept are all evaluations, a few numbers
        each, and the last theta_star of a classification.
    :returns: the report.
    :raises ValueError: for unknown or inconsistent arguments.
    :raises CheckpointMismatch: a checkpoint of another network, other data or other arguments.

    Cost: for one group a single eigendecomposition and O(N C) per evaluation; otherwise (N C)^3 + O(G (N C)^2) per
    evaluation (typically 10-50), memory 4 (N C)^2 besides the Grams; classification adds one or two Cholesky
    factorisations per evaluation and needs 7 (N C)^2. Streamed sums over R features: O(R^2 K), whatever N.

    >>> import torch
    >>> from ntkgp.evidence import GaussianEvidence, NoiseModel
    >>> class Line:  # y = slope * x, observed with noise
    ...     def evidence_problem(self, at, curvature, targets):
    ...         x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    ...         y = 2 * x + 0.1 * torch.sin(37 * x)
    ...         return GaussianEvidence(torch.outer(x, x)[None], y, NoiseModel.homoscedastic(20, 1.0))
    ...     def set_hyperparameters(self, precision, noise):
    ...         return precision, noise
    >>> report = fit_evidence(Line())
    >>> report.converged, round(float(report.theta_star_norm), 1)
    (True, 2.0)
    """
    started = time.perf_counter()
    _check_arguments(method, at, curvature, targets, held_out)
    if not hasattr(model, "evidence_problem"):
        raise TypeError(f"model: expected a model with evidence_problem, got {type(model).__name__}")
    problem = model.evidence_problem(at=at, curvature=curvature, targets=targets)
    if isinstance(problem, GaussianEvidence) and curvature != "simple":
        raise ValueError(f"curvature={curvature!r} applies to classification; a Gaussian likelihood has one curvature")
    if prior is not None and not isinstance(prior, HyperPrior):
        raise TypeError(f"prior: expected an object with log_density(log_precision), got {type(prior).__name__}")
    kept = checkpoint, model, targets
    fit = _maximise(problem, method, at, max_evaluations, tolerance, progress, bounds, prior, kept)
    precision, noise = fit.objective.split(fit.optimum.x)
    stored = model.set_hyperparameters(precision, noise if noise.numel() else None)
    fit, extra = _as_stored(fit, stored)
    return _report(fit, method, at, time.perf_counter() - started, extra)


def fit_problem(
    problem: AnyProblem,
    method: str = "mackay",
    at: str = "theta_star",
    max_evaluations: int = 500,
    tolerance: float = 1e-8,
    progress: bool = False,
    bounds: tuple[float, float] = (1e-10, 1e10),
) -> EvidenceReport:
    """Fit precisions and noise of a bare problem; parameters, cost and errors as in :func:`fit_evidence`.

    For a classification the problem's `variant` selects the curvature.

    >>> import torch
    >>> from ntkgp.evidence import GaussianEvidence, NoiseModel
    >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    >>> noise = NoiseModel.homoscedastic(20, 1.0)
    >>> fit_problem(GaussianEvidence(torch.outer(x, x)[None], 2 * x + 0.1 * torch.sin(37 * x), noise)).converged
    True
    """
    started = time.perf_counter()
    curvature = problem.variant if isinstance(problem, SoftmaxEvidence) else "simple"
    _check_arguments(method, at, curvature, "data", False)
    fit = _maximise(problem, method, at, max_evaluations, tolerance, progress, bounds)
    return _report(fit, method, at, time.perf_counter() - started, ())


def _check_arguments(method: str, at: str, curvature: str, targets: str, held_out: bool) -> None:
    """Refuse unknown or inconsistent choices."""
    choices = {
        "method": (method, ("mackay", "lbfgs")),
        "at": (at, ("theta_star", "theta_map")),
        "curvature": (curvature, ("simple", "quadratic", "full")),
        "targets": (targets, ("data", "residual")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if at == "theta_map" and curvature == "full":
        raise ValueError("curvature='full' evaluates H at theta_star; with at='theta_map' use 'simple'")
    if targets == "residual" and not held_out:
        raise ValueError(
            "targets='residual' is refused for training data: the network was fitted to that y, so the residual "
            "y - f(x) asks for no prior variance at all and every precision runs to infinity. Pass held_out=True only "
            "if the network has never seen these data; otherwise use targets='data'"
        )
    if targets == "residual" and at == "theta_map":
        raise ValueError(
            "targets='residual' centres the prior at the trained weights; at='theta_map' needs targets='data'"
        )


def _maximise(
    problem: AnyProblem,
    method: str,
    at: str,
    max_evaluations: int,
    tolerance: float,
    progress: bool,
    bounds: tuple[float, float],
    prior: HyperPrior | None = None,
    kept: tuple[Checkpoint | str | os.PathLike[str] | None, Any, str] = (None, None, "data"),
) -> _Fit:
    """Run the optimiser; `kept`: the checkpoint, and what else its run is known by: model and kind of targets."""
    optimise = _METHODS[method]
    objective: Any = evidence_objective(problem, at, bounds)
    if prior is not None:
        objective = PenalisedObjective(objective, prior)
        if math.isinf(objective.log_prior(objective.start())[0]):
            raise ValueError("prior: has no density at the start of the search, where all groups share the variance")
    checkpoint, model, targets = kept
    options = {
        "method": method, "at": at, "tolerance": tolerance, "bounds": list(bounds),
        "curvature": getattr(problem, "variant", None), "targets": targets,
    }  # fmt: skip
    with running(checkpoint, lambda: problem_identity(model, problem, objective, options)) as run:
        if run.checkpoint is None:
            return _optimised(objective, optimise, max_evaluations, tolerance, progress)
        answers = Answers(run)
        found = _optimised(RecordedObjective(objective, answers), optimise, max_evaluations, tolerance, progress)
        answers.save()
    return replace(found, objective=found.objective.objective)


def _optimised(
    objective: Any, optimise: Callable[..., Optimum], max_evaluations: int, tolerance: float, progress: bool
) -> _Fit:
    """One run of the optimiser, or the outer loop of a curvature that follows theta_star."""
    if objective.refreezes:
        return _maximise_full(objective, optimise, max_evaluations, tolerance, progress)
    return _Fit(objective, optimise(objective, tolerance=tolerance, max_evaluations=max_evaluations, progress=progress))


def _maximise_full(
    objective: Any,
    optimise: Callable[..., Optimum],
    max_evaluations: int,
    tolerance: float,
    progress: bool,
) -> _Fit:
    """Alternate between a converged fit at frozen curvature and the curvature at its theta_star.

    The point of the curvature (logits, or weights in weight space) moves by a step that is halved whenever the change
    of the logits does not shrink.
    """
    point, damping, previous = objective.curvature_point, 1.0, math.inf
    x: Tensor | None = None
    trace: list[float] = []
    used = 0
    notes: tuple[str, ...] = ("not converged: the curvature at theta_star did not settle",)
    for _ in range(_OUTER_STEPS):
        found = optimise(
            objective, start=x, tolerance=tolerance, max_evaluations=max(max_evaluations - used, 1), progress=progress
        )
        used += found.evaluations
        x = found.x
        target = objective.mode_point(x)
        change, size = objective.logit_change(target, point)
        if change >= previous:
            damping *= 0.5
        previous = change
        point = point + damping * (target - point)
        settled = change <= _OUTER_TOLERANCE * (1.0 + size)
        objective = objective.frozen_at(target if settled or found.notes else point)
        trace.append(objective(x).value)
        if settled or found.notes:
            notes = found.notes
            break
    assert x is not None
    return _Fit(objective, Optimum(x, objective(x), trace, found.converged and not notes, used, notes))


def _as_stored(fit: _Fit, stored: tuple[Tensor, Tensor | None]) -> tuple[_Fit, tuple[str, ...]]:
    """Replace the optimum by what the model stored; re-evaluate and say so when constraints changed it."""
    objective, optimum = fit.objective, fit.optimum
    noise = torch.zeros(0) if stored[1] is None else stored[1]
    x = torch.cat([stored[0].detach().reshape(-1).to(optimum.x), noise.detach().reshape(-1).to(optimum.x)]).log()
    if x.shape != optimum.x.shape:
        raise ValueError(
            f"set_hyperparameters must return {objective.num_groups} precisions and {objective.num_noise} noise "
            f"variances, got {stored[0].numel()} and {noise.numel()}"
        )
    if float((x - optimum.x).abs().max()) <= _STORED_TOLERANCE:
        return replace(fit, optimum=replace(optimum, x=x)), ()
    evaluation = objective(x)
    text = (
        "the model's constraints changed the fitted values: evidence "
        f"{optimum.evaluation.value:.4f} at the optimum, {evaluation.value:.4f} as stored"
    )
    return replace(fit, optimum=replace(optimum, x=x, evaluation=evaluation)), (text,)


def _report(fit: _Fit, method: str, at: str, seconds: float, extra: tuple[str, ...]) -> EvidenceReport:
    """Collect the report at the optimum."""
    objective, optimum = fit.objective, fit.optimum
    problem, evaluation, x = objective.problem, optimum.evaluation, optimum.x
    log_prior = None
    if isinstance(objective, PenalisedObjective):
        log_prior, objective = objective.log_prior(x)[0], objective.evidence
    star = objective.star if isinstance(objective, MapObjective) else objective
    squared_norms = star(x).squared_norms if isinstance(objective, MapObjective) else evaluation.squared_norms
    pruned = evaluation.effective_dimension < PRUNED_DIMENSION
    shift = star.squared_shift(x) if star.knows_shift else None
    precision, noise = objective.split(x)
    return EvidenceReport(
        log_evidence=evaluation.value - (log_prior or 0.0),
        trace=list(optimum.trace),
        precision=precision,
        noise=noise,
        effective_dimension=evaluation.effective_dimension,
        theta_star_norm=squared_norms.clamp_min(0.0).sqrt(),
        theta_shift=math.nan if shift is None else math.sqrt(shift[0] + float(shift[1].sum())),
        residual_noise=objective.residual_noise(),
        group_names=problem.group_names,
        group_sizes=problem.group_sizes,
        pruned=tuple(name for name, off in zip(problem.group_names, pruned.tolist(), strict=True) if off),
        jitter=evaluation.jitter,
        eigenvalues_cut=objective.eigenvalues_cut,
        iterations=max(len(optimum.trace) - 1, 0),
        evaluations=optimum.evaluations,
        seconds=seconds,
        converged=optimum.converged,
        method=method,
        at=at,
        warnings=(*optimum.notes, *extra, *_warnings(objective, optimum, pruned, shift)),
        evidence_bounds=objective.evidence_bounds(x),
        log_prior=log_prior,
    )


def _warnings(
    objective: EvidenceObjective, optimum: Optimum, pruned: Tensor, shift: tuple[float, Tensor] | None
) -> tuple[str, ...]:
    """Everything that deserves attention, in plain words."""
    problem, evaluation, x = objective.problem, optimum.evaluation, optimum.x
    names, groups = problem.group_names, objective.num_groups
    out: list[str] = []
    if not optimum.converged and not optimum.notes:
        worst = float(evaluation.gradient.abs().max())
        out.append(f"not converged: rounding stopped the search at a gradient of {worst:.1e}")
    if bool(pruned.any()):
        listed = ", ".join(names[g] for g in range(groups) if pruned[g])
        out.append(f"pruned: the data ask for no variance from {listed}")
    lower, upper = objective.limits()
    wide = [names[g] for g in range(groups) if float(x[g] - lower[g]) < 1e-6]
    if wide:
        out.append(f"precision at its lower bound: {', '.join(wide)}")
    bounded = (lower[groups:].exp() <= objective.noise.minimum * (1 + 1e-9)).tolist()
    for c in range(objective.num_noise):
        value = f"noise variance{f' {c}' if objective.num_noise > 1 else ''}"
        if float(x[groups + c] - lower[groups + c]) < 1e-6:
            exact = "the tangent model can reproduce the targets exactly"
            out.append(f"{value} at its lower bound: {'the constraint on it is active' if bounded[c] else exact}")
        elif float(upper[groups + c] - x[groups + c]) < 1e-6:
            out.append(f"{value} at its upper bound")
    used, available = float(evaluation.effective_dimension.sum()), problem.max_dimension
    if used > _OVERFITTED * available:
        out.append(f"over-fitting: effective dimension {used:.1f} out of {available} that the data determine")
    out.extend(_shift_warning(problem, pruned, shift))
    out.extend(_residual_warning(objective.residual_noise(), objective.split(x)[1]))
    if evaluation.gap > 1e-6:
        out.append(f"theta_star is only accurate to {evaluation.gap:.1e} in its optimality condition")
    if evaluation.jitter > 0:
        out.append(f"jitter {evaluation.jitter:.1e} was needed: the kernel matrix is numerically singular")
    out.extend(objective.data_warnings())
    return tuple(out)


def _residual_warning(residual: Tensor | None, noise: Tensor) -> list[str]:
    """Warn when the noise of the tangent model is not that of the network's own predictions."""
    if residual is None or noise.numel() == 0:
        return []
    ratio = float((residual.to(noise) / noise).max())
    if ratio <= _UNDERFITTED:
        return []
    return [
        f"the network's training error is {ratio:.2g} times the noise, which is that of the tangent model: error bars "
        "around mean='network' are too narrow, those around mean='posterior' fit"
    ]


def _shift_warning(problem: AnyProblem, pruned: Tensor, shift: tuple[float, Tensor] | None) -> list[str]:
    """Warn when the trained weights are farther out than a draw from the posterior, whose distance is about sqrt(P)."""
    if shift is None or not problem.group_sizes:
        return []
    kept = torch.where(pruned, 0.0, shift[1])
    distance = math.sqrt(shift[0] + float(kept.sum()))
    parameters = sum(size for size, off in zip(problem.group_sizes, pruned.tolist(), strict=True) if not off)
    if distance <= math.sqrt(parameters) + 3.0:
        return []
    return [
        f"the trained weights are far from theta_star: {distance:.3g} in the posterior metric, where a posterior draw "
        f"is at {math.sqrt(parameters):.3g}; the classical evidence at the trained weights would mislead"
    ]
