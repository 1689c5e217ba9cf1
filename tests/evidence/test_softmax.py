"""Classification evidence: curvature factor, damped Newton and the variants against dense weight-space references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkgp.evidence import SoftmaxEvidence, dual_mode, evidence_objective
from ntkgp.evidence.blocks import apply_factor, apply_factor_transpose, project
from ntkgp.evidence.newton import NewtonSystem
from ntkgp.evidence.softmax import SoftmaxObjective
from ntkgp.likelihoods import curvature_factor
from tests.evidence import dense

SHAPES = [(12, 4), (15, 2), (20, 1)]


@pytest.fixture(params=SHAPES, ids=["four_classes", "two_classes", "logistic"])
def case(request):
    points, classes = request.param
    model, problem = dense.softmax_problem(2, points, classes, sizes=(12, 25, 18), decay=2.0)
    return model, problem, classes


def some_precision(groups: int, seed: int = 0) -> torch.Tensor:
    return torch.exp(dense.randn(dense.generator(seed), groups))


def close(a, b, tolerance: float) -> None:
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-300), (a, b)


def variant(problem: SoftmaxEvidence, name: str) -> SoftmaxEvidence:
    return dense.softmax_evidence_like(problem, name)


def test_block_products_are_those_of_the_block_diagonal_factor():
    logits = dense.randn(dense.generator(0), 5, 4)
    factor = curvature_factor(logits)
    full = torch.block_diag(*factor)
    g = dense.generator(1)
    gram, rows, reduced = dense.randn(g, 20, 20), dense.randn(g, 20), dense.randn(g, 15)
    gram = gram @ gram.T
    close(project(gram, factor), full.T @ gram @ full, 1e-14)
    close(apply_factor(factor, reduced), full @ reduced, 1e-14)
    close(apply_factor_transpose(factor, rows), full.T @ rows, 1e-14)
    close(full @ full.T, dense.curvature(logits), 1e-14)


def test_d2_the_curvature_is_singular_and_only_c_minus_one_rows_remain(case):
    _, problem, classes = case
    objective = evidence_objective(problem)
    assert problem.max_dimension == len(problem.labels) * max(classes - 1, 1)
    assert objective.solution(torch.zeros(3, dtype=torch.float64)).dimension.shape == (3,)
    if classes > 1:
        ones = torch.ones(len(problem.labels), classes, dtype=torch.float64).reshape(-1)
        assert float((dense.curvature(problem.logits) @ ones).abs().max()) <= 1e-15


def test_d1_d3_logdet_and_effective_dimension_equal_weight_space(case):
    model, problem, _ = case
    precision = some_precision(3)
    objective = evidence_objective(problem)
    solved = objective.solution(precision.log())
    lam = model.expand(precision)
    hessian = model.jacobian.T @ dense.curvature(problem.logits) @ model.jacobian
    root = lam.rsqrt()
    inner = torch.eye(len(lam)).double() + root[:, None] * hessian * root
    close(solved.logdet, torch.linalg.slogdet(inner)[1], 1e-9)
    sigma = torch.linalg.inv(hessian + torch.diag(lam))
    blocks = dense._diagonal_blocks(sigma, model.sizes)
    gamma = torch.stack([size - precision[g] * blocks[g].trace() for g, size in enumerate(model.sizes)])
    close(solved.dimension, gamma, 1e-9)
    assert float(gamma.sum()) <= problem.max_dimension
    # Q = S (I + S^T K S)^-1 S^T replaces (K + B^-1)^-1, which does not exist: posterior covariance in both forms.
    full = torch.block_diag(*curvature_factor(problem.logits))
    kernel = model.jacobian / lam @ model.jacobian.T
    q = full @ torch.linalg.solve(torch.eye(full.shape[1]).double() + full.T @ kernel @ full, full.T)
    close(kernel - kernel @ q @ kernel, model.jacobian @ sigma @ model.jacobian.T, 1e-9)
    close(solved.dimension, torch.stack([(q * gram).sum() for gram in model.grams]) / precision, 1e-9)


def test_theta_star_is_the_weight_space_mode(case):
    model, problem, classes = case
    precision = some_precision(3, 1)
    objective = evidence_objective(problem)
    star = dense.softmax_mode(model, problem.labels, classes, precision)
    found = objective.dual_mode(precision.log())
    close(model.jacobian.T @ found.alpha / model.expand(precision), star, 1e-9)
    close(found.logits.reshape(-1), model.offset + model.jacobian @ star, 1e-9)
    assert found.gap <= 1e-11
    close(found.alpha, dense.residual(found.logits, problem.labels), 1e-9)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_undamped_newton_cycles_and_damped_newton_converges(seed):
    """14 points, 4 classes."""
    model = dense.linear_model(seed, 56, (45,), decay=1.0)
    labels = torch.randint(4, (14,), generator=dense.generator(seed))
    gram, offset = 10.0 * model.jacobian @ model.jacobian.T, model.offset.reshape(14, 4)
    alpha = torch.zeros(56, dtype=torch.float64)
    for _ in range(50):
        logits = offset + (gram @ alpha).reshape(14, 4)
        b, r = dense.curvature(logits), dense.residual(logits, labels)
        gap = float((alpha - r).abs().max())
        factor = torch.block_diag(*curvature_factor(logits))
        linear = b @ (gram @ alpha) + r
        inner = torch.eye(factor.shape[1]).double() + factor.T @ gram @ factor
        alpha = linear - factor @ torch.linalg.solve(inner, factor.T @ gram @ linear)
    assert gap > 0.5
    found = dual_mode(gram, offset, labels)
    assert found.gap <= 1e-11
    assert found.steps <= 15


def test_a_factorisation_serves_neighbouring_modes():
    """After a small change of the precisions no new one is made; from far away the old one does no harm."""
    model, problem = dense.softmax_problem(2, 12, 3)
    gram = model.jacobian @ model.jacobian.T
    first = dual_mode(gram, problem.offset, problem.labels)
    assert first.steps >= 2
    system = NewtonSystem.build(gram, first.logits)
    near = dual_mode(1.01 * gram, problem.offset, problem.labels, first.alpha, system=system)
    assert near.system is system
    assert near.steps == 0
    assert near.gap <= 1e-11
    assert dual_mode(1.01 * gram, problem.offset, problem.labels, first.alpha).steps == 1
    for factor in (1e-3, 1e3):
        far = dual_mode(factor * gram, problem.offset, problem.labels, first.alpha, system=first.system)
        cold = dual_mode(factor * gram, problem.offset, problem.labels)
        assert far.gap <= 1e-10
        close(far.logits, cold.logits, 1e-8)


def test_a_bad_warm_start_costs_no_accuracy():
    model, problem = dense.softmax_problem(2, 12, 3)
    gram = model.jacobian @ model.jacobian.T
    cold = dual_mode(gram, problem.offset, problem.labels)
    warm = dual_mode(gram, problem.offset, problem.labels, alpha=1e6 * torch.ones(36, dtype=torch.float64))
    close(warm.alpha, cold.alpha, 1e-10)


def simple_value(model, labels, classes, logits, precision):
    """Profiled weight-space evidence whose autograd gradient is the total derivative in the precisions.

    One differentiable Newton step from the converged mode carries d theta_star / d Lambda, with no envelope theorem.
    """
    with torch.no_grad():
        star = dense.softmax_mode(model, labels, classes, precision.detach())
    star = dense.softmax_newton_step(model, labels, classes, model.expand(precision), star)
    return dense.softmax_joint(model, labels, classes, precision, star, logits)


def test_simple_value_and_exact_gradient(case):
    model, problem, classes = case
    logits = problem.logits
    for seed in range(3):
        precision = some_precision(3, seed)
        found = evidence_objective(problem).evaluate(precision)
        close(found.value, simple_value(model, problem.labels, classes, logits, precision), 1e-10)
        reference = dense.log_gradient(
            lambda lam: simple_value(model, problem.labels, classes, logits, lam), precision.log()
        )
        close(found.gradient, reference, 1e-8)


def test_quadratic_value_and_exact_gradient(case):
    model, problem, classes = case
    quadratic = variant(problem, "quadratic")
    for seed in range(3):
        precision = some_precision(3, seed)
        found = evidence_objective(quadratic).evaluate(precision)
        close(found.value, dense.quadratic_joint(model, problem.labels, classes, precision)[0], 1e-9)
        reference = dense.log_gradient(
            lambda lam: dense.quadratic_joint(model, problem.labels, classes, lam)[0], precision.log()
        )
        close(found.gradient, reference, 1e-8)


def test_quadratic_constant_does_not_depend_on_the_precisions():
    """M - log N(z; 0, S^T K S + I) at three Lambda (measured for GPYTORCH 10 to 1e-14)."""
    model, problem = dense.softmax_problem(3, 30, 3)
    objective = evidence_objective(variant(problem, "quadratic"))
    full = torch.block_diag(*curvature_factor(problem.logits))
    r = dense.residual(problem.logits, problem.labels)
    targets = full.T @ (model.jacobian @ model.weights) + torch.linalg.lstsq(full, r[:, None]).solution[:, 0]
    constants = []
    for seed in range(3):
        precision = some_precision(3, seed)
        cov = full.T @ (model.jacobian / model.expand(precision) @ model.jacobian.T) @ full
        cov = cov + torch.eye(len(targets)).double()
        normal = torch.distributions.MultivariateNormal(torch.zeros_like(targets), cov)
        constants.append(objective.evaluate(precision).value - float(normal.log_prob(targets)))
    assert max(constants) - min(constants) <= 1e-9
    close(constants[0], constants[2], 1e-11)


def test_quadratic_mode_and_shift(case):
    model, problem, classes = case
    quadratic = variant(problem, "quadratic")
    precision = some_precision(3, 1)
    objective = evidence_objective(quadratic)
    _, star = dense.quadratic_joint(model, problem.labels, classes, precision)
    alpha, misfit = objective.mode(precision.log())
    close(model.jacobian.T @ alpha / model.expand(precision), star, 1e-8)
    full = torch.block_diag(*curvature_factor(problem.logits))
    close(misfit, full.T @ (model.jacobian @ (star - model.weights)), 1e-8)
    # B17 holds exactly for the expansion: both objectives share the curvature and the loss is quadratic.
    data, prior = objective.squared_shift(precision.log())
    gap = objective.evaluate(precision).value - evidence_objective(quadratic, "theta_map").evaluate(precision).value
    close(gap, 0.5 * (data + prior.sum()), 1e-9)


def test_simple_shift_is_the_posterior_metric(case):
    model, problem, classes = case
    precision = some_precision(3, 2)
    data, prior = evidence_objective(problem).squared_shift(precision.log())
    star = dense.softmax_mode(model, problem.labels, classes, precision)
    hessian = model.jacobian.T @ dense.curvature(problem.logits) @ model.jacobian
    difference = star - model.weights
    close(data, difference @ hessian @ difference, 1e-8)
    close(prior.sum(), (model.expand(precision) * difference.square()).sum(), 1e-8)


@pytest.mark.parametrize("name", ["simple", "quadratic"])
def test_theta_map_value_and_gradient(case, name):
    model, problem, classes = case
    precision = some_precision(3, 3)

    def value(lam):
        return dense.softmax_joint(model, problem.labels, classes, lam, model.weights, problem.logits)

    found = evidence_objective(variant(problem, name), "theta_map").evaluate(precision)
    close(found.value, value(precision), 1e-10)
    close(found.gradient, dense.log_gradient(value, precision.log()), 1e-8)
    close(found.step.exp(), found.effective_dimension / (precision * model.theta_norms), 1e-10)


def test_curvature_at_other_logits():
    model, problem = dense.softmax_problem(4, 10, 3)
    precision = some_precision(3, 4)
    other = problem.logits + dense.randn(dense.generator(9), 10, 3)
    found = SoftmaxObjective(problem, curvature_at=other).evaluate(precision)
    star = dense.softmax_mode(model, problem.labels, 3, precision)
    close(found.value, dense.softmax_joint(model, problem.labels, 3, precision, star, other), 1e-10)


def test_logistic_equals_two_classes_with_a_constant_logit():
    model, problem = dense.softmax_problem(5, 18, 1)
    precision = some_precision(3, 5)
    blocks = [torch.stack([torch.zeros_like(b), b], 1).reshape(36, -1) for b in model.blocks]
    network = torch.stack([torch.zeros(18).double(), model.network], 1).reshape(-1)
    pair = dense.softmax_evidence(dense.Linear(blocks, model.theta, network), problem.labels, 2, "simple")
    for name in ("simple", "quadratic"):
        one = evidence_objective(variant(problem, name)).evaluate(precision)
        two = evidence_objective(variant(pair, name)).evaluate(precision)
        close(one.value, two.value, 1e-11)
        close(one.gradient, two.gradient, 1e-9)


def test_b26_scaling_weights_and_precisions_together_changes_nothing():
    model, problem = dense.softmax_problem(6, 12, 3)
    factors = (1e-3, 10.0, 1e3)
    scaled = dense.softmax_evidence(model.scaled(factors), problem.labels, 3, "simple")
    precision = some_precision(3, 6)
    moved = precision / torch.tensor(factors, dtype=torch.float64).square()
    for name in ("simple", "quadratic"):
        for where in ("theta_star", "theta_map"):
            before = evidence_objective(variant(problem, name), where).evaluate(precision)
            after = evidence_objective(variant(scaled, name), where).evaluate(moved)
            close(after.value, before.value, 1e-10)
            close(after.gradient, before.gradient, 1e-8)


def test_confident_network_gives_finite_numbers():
    model, _ = dense.softmax_problem(7, 10, 3)
    loud = dense.Linear(model.blocks, model.theta, 300.0 * model.network)
    labels = loud.network.reshape(10, 3).argmax(-1)
    for name in ("simple", "quadratic"):
        found = evidence_objective(dense.softmax_evidence(loud, labels, 3, name)).evaluate(some_precision(3))
        assert math.isfinite(found.value)
        assert bool(torch.isfinite(found.gradient).all())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    points=st.integers(1, 8),
    classes=st.sampled_from([1, 2, 3, 10]),
    spread=st.floats(0.0, 1.0),
)
def test_property_value_and_gradient(seed, sizes, points, classes, spread):
    """Precisions spread over up to 1e8, from a single point up."""
    model, problem = dense.softmax_problem(seed, points, classes, sizes=tuple(sizes))
    g = dense.generator(seed)
    logs = spread * math.log(1e4) * (2 * torch.rand(len(sizes), generator=g, dtype=torch.float64) - 1)
    found = evidence_objective(problem).evaluate(logs.exp())
    reference = simple_value(model, problem.labels, classes, problem.logits, logs.exp())
    close(found.value, reference, 1e-8)
    gradient = dense.log_gradient(lambda lam: simple_value(model, problem.labels, classes, problem.logits, lam), logs)
    scale = float(torch.maximum(found.pull, found.push).max())
    assert float((found.gradient - gradient).abs().max()) <= 1e-6 * scale
    assert found.gap <= 1e-8


def test_problems_refuse_bad_input():
    eye, zeros = torch.eye(4)[None], torch.zeros(2, 2)
    with pytest.raises(ValueError, match="labels"):
        SoftmaxEvidence(eye, zeros, zeros, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="labels"):
        SoftmaxEvidence(eye, zeros, zeros, torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="variant must be"):
        SoftmaxEvidence(eye, zeros, zeros, torch.tensor([0, 1]), "exact")
    with pytest.raises(ValueError, match=r"logits must have shape \(N, C\)"):
        SoftmaxEvidence(eye, torch.zeros(3, 2), zeros, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="offset must have shape"):
        SoftmaxEvidence(eye, zeros, torch.zeros(4), torch.tensor([0, 1]))
