"""Intervals of quadratic forms, variances and evidences on plain tensors and problems."""

import math

import pytest
import torch
from linear_operator.operators import DenseLinearOperator

from ntkgp.evidence import GaussianEvidence, NoiseModel, SoftmaxEvidence, evidence_bounds, evidence_objective
from ntkgp.evidence.bounds import (
    action_variance,
    collapsed_elbo,
    fischer_logdet,
    quadratic_bounds,
    titsias_upper_bound,
    variance_bounds,
)
from ntkgp.evidence.newton_cg import iterative_mode
from ntkgp.solvers import NystromPreconditioner, WhitenedSystem
from tests import reference as ref

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def grams(groups: int = 3, rows: int = 24, width: int = 5, seed: int = 0) -> torch.Tensor:
    j = randn(groups, rows, width, seed=seed)
    return j @ j.mT


PRECISION = torch.tensor([0.3, 2.0, 7.0], dtype=DOUBLE)


def test_titsias_bounds_by_dense_formulas_and_their_order():
    k, t = grams().sum(0), randn(24, seed=3)
    noise = torch.linspace(0.1, 0.5, 24, dtype=DOUBLE)
    exact = ref.gaussian_log_evidence(k, t, noise)
    trace = (k.diagonal() / noise).sum()
    lower, upper = [], []
    for m in (2, 6, 12, 24):
        nystrom = NystromPreconditioner(k[:, :m], k[:m, :m], noise, jitter=1e-14)
        q = k[:, :m] @ torch.linalg.pinv(k[:m, :m], rtol=1e-12) @ k[:m]
        missing = ((k - q).diagonal() / noise).sum()
        lower.append(float(collapsed_elbo(nystrom, t, trace)))
        assert lower[-1] == pytest.approx(ref.gaussian_log_evidence(q, t, noise) - float(missing) / 2, abs=1e-6)
        upper.append(float(titsias_upper_bound(nystrom, t, trace)))
        a = q + noise.diag() * (1 + missing)
        fit = t @ torch.linalg.solve(a, t) + torch.linalg.slogdet(q + noise.diag())[1] + 24 * math.log(2 * math.pi)
        assert upper[-1] == pytest.approx(-float(fit) / 2, abs=1e-6)
    assert lower == sorted(lower)
    assert upper == sorted(upper, reverse=True)
    assert max(lower) <= exact + 1e-8 <= min(upper) + 2e-8
    assert lower[-1] == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("kind", ["tensor", "operator", "function"])
def test_quadratic_bounds_take_any_operator(kind):
    a, b, w = grams().sum(0) + torch.eye(24, dtype=DOUBLE), randn(24, seed=1), randn(24, seed=2)
    operator = {"tensor": a, "operator": DenseLinearOperator(a), "function": lambda v: a @ v}[kind]
    low, high = quadratic_bounds(operator, b, w)
    exact = b @ torch.linalg.solve(a, b)
    assert low <= exact <= high
    near, far = quadratic_bounds(operator, b, torch.linalg.solve(a, b))
    assert near == pytest.approx(float(exact), rel=1e-10)
    assert far == pytest.approx(float(exact), rel=1e-10)


def test_the_width_is_what_the_equality_says():
    """B22: U − L = ‖r‖²/σ² exactly."""
    a, cross, w = grams().sum(0) + 0.2 * torch.eye(24, dtype=DOUBLE), randn(24, 4, seed=1), randn(24, 4, seed=2) / 50
    low, high = variance_bounds(a, cross, torch.full((4,), 1e6, dtype=DOUBLE), w, noise=0.2)
    assert torch.allclose(high - low, (cross - a @ w).square().sum(0) / 0.2, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(
    "noise",
    [
        NoiseModel.homoscedastic(24, 0.05),
        NoiseModel.per_output(24, torch.tensor([0.1, 0.4])),
        NoiseModel.known(torch.linspace(0.1, 1, 24), torch.tensor(0.3)),
    ],
)
@pytest.mark.parametrize("landmarks", [1, 4, 12, None])
def test_gaussian_evidence_is_inside(noise, landmarks):
    problem = GaussianEvidence(grams(), randn(24, seed=3), noise, outputs=2)
    exact = evidence_objective(problem).evaluate(PRECISION).value
    low, high = evidence_bounds(problem, PRECISION, num_landmarks=landmarks)
    assert low <= exact <= high
    if landmarks is None:
        assert high - low <= 1e-5
    other = torch.full((noise.num_learned,), 0.7, dtype=DOUBLE)
    moved = evidence_objective(problem).evaluate(PRECISION, other).value
    low, high = evidence_bounds(problem, PRECISION, other, num_landmarks=landmarks)
    assert low <= moved <= high


@pytest.mark.parametrize("variant", ["simple", "quadratic", "full"])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("landmarks", [2, None])
def test_classification_evidence_is_inside(variant, outputs, landmarks):
    logits, offset = 2 * randn(24 // outputs, outputs, seed=1), randn(24 // outputs, outputs, seed=2)
    labels = torch.randint(max(outputs, 2), (24 // outputs,), generator=torch.Generator().manual_seed(0))
    problem = SoftmaxEvidence(grams(), logits, offset, labels, variant)
    objective = evidence_objective(problem)
    if variant == "full":
        objective = type(objective)(problem, curvature_at=objective.dual_mode(PRECISION.log()).logits)
    exact = objective.evaluate(PRECISION).value
    low, high = evidence_bounds(problem, PRECISION, num_landmarks=landmarks)
    assert low <= exact <= high
    if landmarks is None:
        assert high - low <= 1e-5


def test_unconverged_iterates_only_widen_the_interval():
    problem = GaussianEvidence(100 * grams(), randn(24, seed=3), NoiseModel.homoscedastic(24, 0.05))
    exact = evidence_objective(problem).evaluate(PRECISION).value
    widths = []
    for steps in (0, 1, 5, 40):
        low, high = evidence_bounds(problem, PRECISION, num_landmarks=6, max_iterations=steps)
        assert low <= exact <= high
        widths.append(high - low)
    assert widths[-1] < widths[0]


@pytest.mark.parametrize("outputs", [1, 4])
def test_iterative_mode_equals_newton_and_brackets_the_optimum(outputs):
    k = grams().sum(0)
    n = 24 // outputs
    offset = randn(n, outputs, seed=2)
    labels = torch.randint(max(outputs, 2), (n,), generator=torch.Generator().manual_seed(0))
    blocks = k.reshape(n, outputs, n, outputs).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    points = k.reshape(24, n, outputs)
    factor = torch.zeros(n, outputs, max(outputs - 1, 1), dtype=DOUBLE)
    system = WhitenedSystem(lambda v: k @ v, lambda i: points[:, i].flatten(1), blocks, factor)
    from ntkgp.evidence import dual_mode

    exact = dual_mode(k, offset, labels)
    optimum = exact.log_likelihood - 0.5 * float(exact.alpha @ k @ exact.alpha)
    found = iterative_mode(system, offset, labels)
    assert found.gap <= 1e-8
    assert torch.allclose(found.alpha, exact.alpha, atol=1e-6)
    assert found.lower <= optimum <= found.upper
    assert found.upper - found.lower <= 1e-8
    early = iterative_mode(system, offset, labels, tolerance=1e9)
    assert early.steps == 0
    assert early.lower < optimum < early.upper


def test_actions_that_depend_on_each_other():
    a, cross = grams().sum(0) + torch.eye(24, dtype=DOUBLE), randn(24, 3, seed=1)
    actions = randn(24, 2, seed=2)
    prior = torch.full((3,), 50.0, dtype=DOUBLE)
    once = action_variance(a, cross, prior, actions)
    twice = action_variance(a, cross, prior, torch.cat([actions, actions @ torch.ones(2, 3, dtype=DOUBLE)], -1))
    assert torch.allclose(once, twice)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quadratic_bounds(torch.eye(2), torch.ones(2), torch.ones(3)), ValueError, "iterate: expected the"),
        (
            lambda: quadratic_bounds(torch.eye(2), torch.ones(2), torch.ones(2), noise=0.0),
            ValueError,
            "noise: expected",
        ),
        (lambda: fischer_logdet(torch.eye(3), 0), ValueError, "blocks: expected a positive size"),
        (lambda: fischer_logdet(torch.eye(3), [torch.tensor([0, 1])]), ValueError, "blocks: expected a partition"),
        (lambda: fischer_logdet(-torch.eye(3), 1), ValueError, "matrix: expected a positive definite"),
        (lambda: evidence_bounds("model"), TypeError, "source: expected a model"),
        (
            lambda: evidence_bounds(GaussianEvidence(grams(), torch.ones(24), NoiseModel.homoscedastic(24))),
            ValueError,
            "precision: a problem holds none",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
