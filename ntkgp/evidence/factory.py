"""From an evidence problem to its objective."""

from __future__ import annotations

from ntkgp.evidence.gaussian import GaussianObjective
from ntkgp.evidence.objective import EvidenceObjective, MapObjective
from ntkgp.evidence.problem import AnyProblem, GaussianEvidence, SoftmaxEvidence
from ntkgp.evidence.softmax import QuadraticObjective, SoftmaxObjective


def evidence_objective(
    problem: AnyProblem, at: str = "theta_star", bounds: tuple[float, float] = (1e-10, 1e10)
) -> EvidenceObjective:
    """Build the objective of a problem.

    :param problem: a :class:`GaussianEvidence` or a :class:`SoftmaxEvidence` (its `variant` selects the curvature;
        "full" gives the inner problem, curvature frozen at the network, see :func:`~ntkgp.evidence.fit_problem`), or
        another one that brings its own ``problem.objective(at, bounds)``.
    :param at: "theta_star" (default) or "theta_map" (the classical evidence at the trained weights).
    :param bounds: smallest and largest prior variance of a group relative to the mean square of the targets.
    :raises ValueError: for an unknown `at`, bad bounds, or fields that the objective needs and the problem lacks.

    >>> import torch
    >>> from ntkgp.evidence import GaussianEvidence, NoiseModel
    >>> problem = GaussianEvidence(torch.eye(2)[None], torch.ones(2), NoiseModel.homoscedastic(2, 1.0))
    >>> type(evidence_objective(problem)).__name__
    'GaussianObjective'
    """
    if at not in ("theta_star", "theta_map"):
        raise ValueError(f"at must be 'theta_star' or 'theta_map', got {at!r}")
    star: EvidenceObjective
    if not isinstance(problem, GaussianEvidence | SoftmaxEvidence):
        return problem.objective(at, bounds)
    if isinstance(problem, GaussianEvidence):
        star = GaussianObjective(problem, bounds)
    else:
        star = (QuadraticObjective if problem.variant == "quadratic" else SoftmaxObjective)(problem, bounds)
    return star if at == "theta_star" else MapObjective(star)
