"""Gaussian evidence: value, gradient, effective dimension and noise models against dense weight-space references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkgp.evidence import GaussianEvidence, NoiseModel, evidence_objective
from ntkgp.evidence.stack import gram_stack
from ntkgp.evidence.system import DenseSystem, SpectralSystem
from tests.evidence import dense

ROWS = 36


def noise_models(rows: int) -> dict[str, NoiseModel]:
    known = 0.05 + torch.rand(rows, generator=dense.generator(5), dtype=torch.float64)
    return {
        "homoscedastic": NoiseModel.homoscedastic(rows, 0.3),
        "per_output": NoiseModel.per_output(rows, torch.tensor([0.1, 0.4, 0.02])),
        "known": NoiseModel.known(known),
        "known_and_learned": NoiseModel.known(known, learned=torch.tensor(0.2)),
    }


@pytest.fixture(params=["homoscedastic", "per_output", "known", "known_and_learned"])
def noise(request) -> NoiseModel:
    return noise_models(ROWS)[request.param]


@pytest.fixture(params=[(50,), (7, 40, 12), (8, 8, 4)], ids=["one", "three", "rank_deficient"])
def model(request) -> dense.Linear:
    return dense.linear_model(3, ROWS, request.param)


def some_precision(model: dense.Linear, seed: int = 0) -> torch.Tensor:
    return torch.exp(2.0 * dense.randn(dense.generator(seed), len(model.blocks)))


def at(objective, precision, noise: NoiseModel) -> torch.Tensor:
    return torch.cat([precision, noise.values]).log()


def close(a, b, tolerance: float) -> None:
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-300), (a, b)


def test_b4_value_is_the_marginal_likelihood_and_the_weight_space_evidence(model, noise):
    y = dense.targets_of(model, 3)
    problem = dense.gaussian_problem(model, y, noise, 3)
    precision, variance = some_precision(model), noise.diagonal()
    found = evidence_objective(problem).evaluate(precision)
    close(found.value, dense.marginal(model, problem.targets, precision, variance), 1e-10)
    primal = dense.primal_gaussian(model, problem.targets, precision, variance)
    joint = dense.gaussian_joint(model, problem.targets, precision, variance, primal["star"])
    close(found.value, joint, 1e-10)


def test_b2_theta_star_and_errors(model, noise):
    problem = dense.gaussian_problem(model, dense.targets_of(model, 4), noise, 3)
    precision, variance = some_precision(model, 1), noise.diagonal()
    objective = evidence_objective(problem)
    found = objective.evaluate(precision)
    primal = dense.primal_gaussian(model, problem.targets, precision, variance)
    alpha, misfit = objective.mode(at(objective, precision, noise))
    star = model.jacobian.T @ alpha / model.expand(precision)
    close(star, primal["star"], 1e-9)
    close(found.squared_norms, primal["norms"], 1e-9)
    close(found.sse, (problem.targets - model.jacobian @ primal["star"]).square().sum(), 1e-9)
    close(misfit, (model.jacobian @ (primal["star"] - model.weights)) / variance.sqrt(), 1e-8)


def test_b3_logdet(model, noise):
    problem = dense.gaussian_problem(model, dense.targets_of(model, 5), noise, 3)
    precision, variance = some_precision(model, 2), noise.diagonal()
    objective = evidence_objective(problem)
    solved = objective.solution(at(objective, precision, noise))
    logdet = solved.logdet + ROWS * math.log(objective.scale) - float(variance.log().sum())
    primal = dense.primal_gaussian(model, problem.targets, precision, variance)
    close(logdet, primal["logdet"], 1e-11)


def test_b15_effective_dimension(model, noise):
    problem = dense.gaussian_problem(model, dense.targets_of(model, 6), noise, 3)
    precision, variance = some_precision(model, 3), noise.diagonal()
    found = evidence_objective(problem).evaluate(precision)
    primal = dense.primal_gaussian(model, problem.targets, precision, variance)
    close(found.effective_dimension, primal["gamma"], 1e-9)
    kernel = model.jacobian / model.expand(precision) @ model.jacobian.T
    total = (kernel @ torch.linalg.inv(kernel + torch.diag(variance))).trace()
    close(found.effective_dimension.sum(), total, 1e-9)
    assert bool((found.effective_dimension >= 0).all())
    assert float(found.effective_dimension.sum()) <= min(ROWS, sum(model.sizes)) * (1 + 1e-12)


@pytest.mark.parametrize("where", ["theta_star", "theta_map"])
def test_b16_gradient_is_autograd(model, noise, where):
    problem = dense.gaussian_problem(model, dense.targets_of(model, 7), noise, 3)
    precision = some_precision(model, 4)

    def value(lam, values):
        variance = noise.diagonal(values)
        if where == "theta_star":
            return dense.marginal(model, problem.targets, lam, variance)
        return dense.gaussian_joint(model, problem.targets, lam, variance, model.weights)

    found = evidence_objective(problem, where).evaluate(precision)
    close(found.value, value(precision, noise.values), 1e-10)
    close(found.gradient, dense.log_gradient(value, precision.log(), noise.values.log()), 1e-8)


def test_b16_mackay_step_of_a_homoscedastic_problem_is_the_textbook_update(model):
    noise = NoiseModel.homoscedastic(ROWS, 0.3)
    problem = dense.gaussian_problem(model, dense.targets_of(model, 8), noise)
    precision = some_precision(model, 5)
    primal = dense.primal_gaussian(model, problem.targets, precision, noise.diagonal())
    sse = (problem.targets - model.jacobian @ primal["star"]).square().sum()
    update = torch.cat([primal["gamma"] / primal["norms"], (sse / (ROWS - primal["gamma"].sum())).reshape(1)])
    found = evidence_objective(problem).evaluate(precision)
    close(found.step.exp() * torch.cat([precision, noise.values]), update, 1e-8)
    classic = evidence_objective(problem, "theta_map").evaluate(precision)
    residual = (problem.targets - model.jacobian @ model.weights).square().sum()
    update = torch.cat([primal["gamma"] / model.theta_norms, (residual / (ROWS - primal["gamma"].sum())).reshape(1)])
    close(classic.step.exp() * torch.cat([precision, noise.values]), update, 1e-8)


def test_b17_gap_between_the_objectives_is_half_the_squared_shift(model, noise):
    problem = dense.gaussian_problem(model, dense.targets_of(model, 9), noise, 3)
    precision = some_precision(model, 6)
    star, classic = evidence_objective(problem), evidence_objective(problem, "theta_map")
    data, prior = star.squared_shift(at(star, precision, noise))
    primal = dense.primal_gaussian(model, problem.targets, precision, noise.diagonal())
    difference = primal["star"] - model.weights
    metric = primal["hessian"] + torch.diag(model.expand(precision))
    close(data + prior.sum(), difference @ metric @ difference, 1e-9)
    gap = star.evaluate(precision).value - classic.evaluate(precision).value
    assert gap >= 0
    close(gap, 0.5 * (data + prior.sum()), 1e-9)


def test_b18_classical_objective_is_concave_in_the_precisions(model, noise):
    problem = dense.gaussian_problem(model, dense.targets_of(model, 10), noise, 3)
    objective = evidence_objective(problem, "theta_map")
    for seed in range(5):
        a, b = some_precision(model, seed), some_precision(model, seed + 50)
        middle = objective.evaluate(0.5 * (a + b)).value
        ends = 0.5 * (objective.evaluate(a).value + objective.evaluate(b).value)
        assert middle > ends


def test_b18_negative_control_not_concave_in_log_precision():
    model = dense.linear_model(3, ROWS)
    problem = dense.gaussian_problem(model, dense.targets_of(model, 3))
    objective = evidence_objective(problem)
    logs = torch.linspace(-8, 20, 60, dtype=torch.float64)
    values = torch.tensor([objective.evaluate(torch.full((3,), math.exp(v))).value for v in logs.tolist()])
    bend = values[2:] - 2 * values[1:-1] + values[:-2]
    assert bool((bend > 1e-3).any())


@pytest.mark.parametrize("factors", [(5.0, 0.2, 1.0), (1e-3, 10.0, 1e3)])
def test_b26_scaling_weights_and_precisions_together_changes_nothing(noise, factors):
    model = dense.linear_model(3, ROWS)
    scaled = model.scaled(factors)
    y = dense.targets_of(model, 11)
    precision = some_precision(model, 7)
    for where in ("theta_star", "theta_map"):
        before = evidence_objective(dense.gaussian_problem(model, y, noise, 3), where).evaluate(precision)
        after = evidence_objective(dense.gaussian_problem(scaled, y, noise, 3), where).evaluate(
            precision / torch.tensor(factors, dtype=torch.float64).square()
        )
        close(after.value, before.value, 1e-10)
        close(after.effective_dimension, before.effective_dimension, 1e-10)
        close(after.gradient, before.gradient, 1e-9)


def test_spectral_and_dense_systems_agree():
    model = dense.linear_model(3, ROWS, (60,))
    t = dense.targets_of(model, 12)
    for noise in (NoiseModel.homoscedastic(ROWS, 0.3), noise_models(ROWS)["known"]):
        weights = torch.tensor([0.7], dtype=torch.float64)
        values = noise.values
        spectral = SpectralSystem(model.grams[0], t, noise)
        one = spectral.solve(weights, values)
        system = DenseSystem(gram_stack(model.grams), t, noise)
        two = system.solve(weights, values)
        for name in ("logdet", "dimension", "fit", "quadratic", "sse"):
            close(getattr(one, name), getattr(two, name), 1e-10)
        if noise.num_learned:
            close(one.inverse_diagonal, two.inverse_diagonal, 1e-10)
            close(one.alpha_squares, two.alpha_squares, 1e-10)
        close(spectral.alpha(weights, values), system.alpha(weights, values), 1e-9)


def test_eigenvalues_are_cut_and_counted_without_changing_the_evidence():
    model = dense.linear_model(3, ROWS, (9,))
    problem = dense.gaussian_problem(model, dense.targets_of(model, 13))
    objective = evidence_objective(problem)
    assert objective.system.eigenvalues_cut == ROWS - 9
    precision = torch.tensor([0.4], dtype=torch.float64)
    found = objective.evaluate(precision).value
    close(found, dense.marginal(model, problem.targets, precision, problem.noise.diagonal()), 1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    points=st.integers(1, 10),
    kind=st.sampled_from(["homoscedastic", "per_output", "known", "known_and_learned"]),
    spread=st.floats(0.0, 1.0),
    log_noise=st.floats(-6.0, 4.0),
)
def test_property_value_gradient_and_dimension(seed, sizes, points, kind, spread, log_noise):
    """Precisions spread over 1e8 and more, shapes from one row up."""
    rows = 3 * points
    model = dense.linear_model(seed, rows, tuple(sizes))
    base = noise_models(rows)[kind]
    noise = NoiseModel(base.fixed, base.component, base.values * math.exp(log_noise))
    problem = dense.gaussian_problem(model, dense.targets_of(model, seed), noise, 3)
    logs = (
        spread * math.log(1e4) * (2 * torch.rand(len(sizes), generator=dense.generator(seed), dtype=torch.float64) - 1)
    )
    found = evidence_objective(problem).evaluate(logs.exp())
    variance = noise.diagonal()
    cov = torch.einsum("g,gnm->nm", (-logs).exp(), model.grams) + torch.diag(variance)
    tolerance = 1e-14 * float(torch.linalg.cond(cov)) + 1e-11
    close(found.value, dense.marginal(model, problem.targets, logs.exp(), variance), tolerance)
    reference = dense.log_gradient(
        lambda lam, values: dense.marginal(model, problem.targets, lam, noise.diagonal(values)),
        logs,
        noise.values.log(),
    )
    scale = float(torch.maximum(found.pull, found.push).max())
    assert float((found.gradient - reference).abs().max()) <= 100 * tolerance * scale
    assert 0 <= float(found.effective_dimension.sum()) <= min(rows, sum(sizes)) * (1 + 1e-9)


def test_noise_models_refuse_bad_input():
    with pytest.raises(ValueError, match="multiple of the number of outputs"):
        NoiseModel.per_output(7, torch.ones(3))
    with pytest.raises(ValueError, match="must not be negative"):
        NoiseModel.homoscedastic(4, -1.0)
    with pytest.raises(ValueError, match="positive in every row"):
        NoiseModel.known(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"component must use every index 0\.\.1"):
        NoiseModel(torch.zeros(3), torch.zeros(3, dtype=torch.long), torch.ones(2))


def test_problems_refuse_bad_input():
    eye, t, noise = torch.eye(4)[None], torch.ones(4), NoiseModel.homoscedastic(4)
    with pytest.raises(ValueError, match=r"grams must have shape \(G, n, n\)"):
        GaussianEvidence(torch.ones(2, 4, 3), t, noise)
    with pytest.raises(ValueError, match="targets contains NaN or infinite"):
        GaussianEvidence(eye, torch.tensor([0.0, math.nan, 0.0, 0.0]), noise)
    with pytest.raises(ValueError, match=r"targets must have shape \(4,\), got \(3,\)"):
        GaussianEvidence(eye, torch.ones(3), noise)
    with pytest.raises(ValueError, match="outputs must divide"):
        GaussianEvidence(eye, t, noise, outputs=3)
    with pytest.raises(ValueError, match="noise must have 4 rows"):
        GaussianEvidence(eye, t, NoiseModel.homoscedastic(5))
    with pytest.raises(ValueError, match="given together"):
        GaussianEvidence(eye, t, noise, theta_norms=torch.ones(1))
    with pytest.raises(ValueError, match="group_names must have length 1"):
        GaussianEvidence(eye, t, noise, group_names=("a", "b"))
    with pytest.raises(ValueError, match="positive semi-definite"):
        GaussianEvidence(-eye, t, noise)
    with pytest.raises(ValueError, match="at must be"):
        evidence_objective(GaussianEvidence(eye, t, noise), "theta")
    with pytest.raises(ValueError, match="theta_norms is needed"):
        evidence_objective(GaussianEvidence(eye, t, noise), "theta_map")
    with pytest.raises(ValueError, match=r"bounds must be \(low, high\)"):
        evidence_objective(GaussianEvidence(eye, t, noise), bounds=(1.0, 0.5))
    with pytest.raises(ValueError, match="precision and noise must be positive"):
        evidence_objective(GaussianEvidence(eye, t, noise)).evaluate(torch.ones(2))


def test_a_matrix_that_is_not_a_gram_is_refused():
    gram = torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=torch.float64)
    problem = GaussianEvidence(torch.stack([gram, gram]), torch.ones(2), NoiseModel.homoscedastic(2, 1e-3))
    with pytest.raises(ValueError, match="not positive definite even with jitter"):
        evidence_objective(problem).evaluate(torch.ones(2))
