"""MacKay's fixed point and L-BFGS-B: same optimum, monotone, equivariant, pruning, early ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ntkgp.evidence import GaussianEvidence, NoiseModel, evidence_objective, fixed_point, lbfgs
from ntkgp.evidence.ascent import PRUNED_DIMENSION
from tests.evidence import dense

ROWS = 48


def live(objective, optimum) -> torch.Tensor:
    """Coordinates that are no pruned group and no noise at a bound."""
    lower, upper = objective.limits()
    groups = objective.num_groups
    out = (optimum.x - lower > 1e-6) & (upper - optimum.x > 1e-6)
    out[:groups] &= optimum.evaluation.effective_dimension > PRUNED_DIMENSION
    return out


def assert_monotone(found) -> None:
    """Each accepted step raises the evidence, up to its own rounding error."""
    rounding = found.evaluation.rounding + 1e-13 * (abs(found.evaluation.value) + ROWS)
    assert rounding < 1e-6
    assert all(after >= before - rounding for before, after in zip(found.trace, found.trace[1:], strict=False))


def assert_same_optimum(objective) -> None:
    one, two = fixed_point(objective), lbfgs(objective)
    assert one.converged, one.notes
    assert two.converged, two.notes
    assert torch.equal(live(objective, one), live(objective, two))
    both = live(objective, one)
    assert float((one.x - two.x)[both].abs().max()) <= 1e-5
    assert abs(one.evaluation.value - two.evaluation.value) <= 1e-9 * (abs(one.evaluation.value) + ROWS)
    for found in (one, two):
        assert_monotone(found)
        assert float(found.evaluation.gradient[both].abs().max()) <= 1e-8 * ROWS


@pytest.mark.parametrize("where", ["theta_star", "theta_map"])
@pytest.mark.parametrize(
    ("sizes", "decay"), [((50,), 6.0), ((20, 40, 30), 6.0), ((5, 5), 3.0), ((100, 100, 100), 12.0), ((20, 40, 30), 0.0)]
)
def test_mackay_and_lbfgs_find_the_same_optimum(sizes, decay, where):
    model = dense.linear_model(2, ROWS, sizes, decay)
    problem = dense.gaussian_problem(model, dense.targets_of(model, 2))
    assert_same_optimum(evidence_objective(problem, where))


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("variant", ["simple", "quadratic"])
def test_mackay_and_lbfgs_agree_in_classification(classes, variant):
    _, problem = dense.softmax_problem(4, ROWS // max(classes, 2), classes, variant)
    assert_same_optimum(evidence_objective(problem))


def test_rank_deficient_grams():
    model = dense.linear_model(5, ROWS, rank=4)
    assert_same_optimum(evidence_objective(dense.gaussian_problem(model, dense.targets_of(model, 5))))


def test_noise_per_output_is_found():
    """Three outputs with very different noise."""
    model = dense.linear_model(6, 150, (10, 10), decay=3.0)
    true = torch.tensor([0.01, 0.3, 5.0], dtype=torch.float64)
    y = model.network + true.sqrt().repeat(50) * dense.randn(dense.generator(6), 150)
    noise = NoiseModel.per_output(150, torch.ones(3))
    objective = evidence_objective(dense.gaussian_problem(model, y, noise, outputs=3))
    found = fixed_point(objective)
    assert found.converged
    _, values = objective.split(found.x)
    assert bool(((values / true).log().abs() < 0.7).all()), values
    assert_same_optimum(objective)


def test_known_noise_is_left_alone_and_learned_noise_adds_to_it():
    model = dense.linear_model(7, ROWS, (8, 8))
    y = dense.targets_of(model, 7)
    known = NoiseModel.known(torch.full((ROWS,), 0.05))
    assert fixed_point(evidence_objective(dense.gaussian_problem(model, y, known))).x.shape == (2,)
    both = NoiseModel.known(torch.full((ROWS,), 0.03), learned=torch.tensor(1.0))
    plain = evidence_objective(dense.gaussian_problem(model, y))
    added = evidence_objective(dense.gaussian_problem(model, y, both))
    one, two = fixed_point(plain), fixed_point(added)
    assert one.converged
    assert two.converged
    assert float(two.x[-1].exp() + 0.03) == pytest.approx(float(one.x[-1].exp()), rel=1e-6)
    assert two.evaluation.value == pytest.approx(one.evaluation.value, abs=1e-8)


def test_a_useless_group_is_pruned():
    model = dense.linear_model(8, ROWS, (10, 10, 10), decay=2.0)
    t = sum(model.blocks[g] @ model.theta[g] for g in (0, 2)) + 0.1 * dense.randn(dense.generator(8), ROWS)
    # Noise in the span that the second group has for itself is removed: it can only hurt.
    basis = torch.linalg.qr(torch.cat([model.blocks[0], model.blocks[2]], -1))[0]
    t = basis @ (basis.T @ t) + 0.1 * torch.linalg.qr(model.jacobian, mode="complete")[0][:, -3:].sum(-1)
    objective = evidence_objective(GaussianEvidence(model.grams, t, NoiseModel.homoscedastic(ROWS, 1.0)))
    for optimise in (fixed_point, lbfgs):
        found = optimise(objective)
        assert found.converged
        assert float(found.evaluation.effective_dimension[1]) < PRUNED_DIMENSION
        assert float(found.x[1]) == pytest.approx(float(objective.limits()[1][1]))
        assert bool((found.evaluation.effective_dimension[[0, 2]] > 1).all())
    # Trying the bound directly saves the slow approach to it in log lambda (32 evaluations without).
    assert fixed_point(objective).evaluations <= 24


def test_a_group_without_any_influence_does_not_block_convergence():
    model = dense.linear_model(9, ROWS, (10, 10))
    grams = torch.cat([model.grams, torch.zeros(1, ROWS, ROWS, dtype=torch.float64)])
    t = dense.targets_of(model, 9) - model.offset
    found = fixed_point(evidence_objective(GaussianEvidence(grams, t, NoiseModel.homoscedastic(ROWS, 1.0))))
    assert found.converged
    assert float(found.evaluation.effective_dimension[2]) == 0.0


def predict(model: dense.Linear, precision, noise, t, test: torch.Tensor):
    """Mean of J theta_star and covariance at new rows, in the weight space of the model."""
    primal = dense.primal_gaussian(model, t, precision, noise.expand(len(t)))
    return test @ primal["star"], test @ primal["sigma"] @ test.T


@pytest.mark.parametrize("k", [1e-3, 10.0, 1e3])
def test_proposition_3_predictions_do_not_depend_on_the_scale_of_a_group(k):
    """theta_g -> k theta_g, J_g -> J_g / k and a fresh fit (Antoran et al. 2022, proposition 3)."""
    model = dense.linear_model(10, ROWS, (20, 40, 30), decay=5.0)
    y, test = dense.targets_of(model, 10), dense.randn(dense.generator(99), 7, 90)
    results = []
    for factors in ((1.0, 1.0, 1.0), (k, 1.0, 1.0 / k)):
        scaled = model.scaled(factors)
        problem = dense.gaussian_problem(scaled, y)
        objective = evidence_objective(problem)
        found = fixed_point(objective)
        assert found.converged
        precision, noise = objective.split(found.x)
        rows = torch.cat([part / f for part, f in zip(test.split([20, 40, 30], -1), factors, strict=True)], -1)
        results.append(
            (*predict(scaled, precision, noise, problem.targets, rows), torch.tensor(found.evaluation.value))
        )
    for before, after in zip(*results, strict=True):
        assert float((after - before).abs().max()) <= 1e-6 * float(before.abs().max())


def test_b27_negative_control_a_single_precision_depends_on_the_scale():
    model = dense.linear_model(10, ROWS, (20, 40, 30), decay=5.0)
    y, test = dense.targets_of(model, 10), dense.randn(dense.generator(99), 7, 90)
    spreads = []
    for factors in ((1.0, 1.0, 1.0), (10.0, 1.0, 0.1)):
        scaled = model.scaled(factors)
        single = GaussianEvidence(scaled.grams.sum(0)[None], y - scaled.offset, NoiseModel.homoscedastic(ROWS, 0.1))
        objective = evidence_objective(single)
        precision, noise = objective.split(fixed_point(objective).x)
        rows = torch.cat([part / f for part, f in zip(test.split([20, 40, 30], -1), factors, strict=True)], -1)
        spreads.append(predict(scaled, precision.expand(3), noise, single.targets, rows)[1].diagonal())
    assert float((spreads[1] / spreads[0] - 1).abs().max()) > 1e-2


@pytest.mark.parametrize("c", [1e-4, 3.0, 1e5])
def test_run_is_equivariant_under_the_unit_of_the_targets(c):
    """y -> c y, f -> c f, theta and J unchanged up to the unit: precisions / c^2, noise * c^2."""
    model = dense.linear_model(11, ROWS, decay=5.0)
    y = dense.targets_of(model, 11)
    problem = dense.gaussian_problem(model, y)
    moved = dense.gaussian_problem(
        dense.Linear([c * block for block in model.blocks], model.theta, c * model.network), c * y
    )
    one, two = fixed_point(evidence_objective(problem)), fixed_point(evidence_objective(moved))
    assert one.evaluations == two.evaluations
    shift = torch.tensor([0.0, 0.0, 0.0, 2 * math.log(c)], dtype=torch.float64)
    assert float((two.x - one.x - shift).abs().max()) <= 1e-6
    assert two.evaluation.value == pytest.approx(one.evaluation.value - ROWS * math.log(c), abs=1e-7)


def test_a_single_row():
    """n = 1: every (lambda, noise) with K / lambda + noise = t^2 is optimal."""
    gram, t = torch.full((1, 1, 1), 2.0), torch.tensor([3.0])
    for optimise in (fixed_point, lbfgs):
        objective = evidence_objective(GaussianEvidence(gram, t, NoiseModel.homoscedastic(1, 1.0)))
        found = optimise(objective)
        precision, noise = objective.split(found.x)
        assert found.converged
        assert float(2.0 / precision + noise) == pytest.approx(9.0, rel=1e-5)


def test_zero_targets():
    model = dense.linear_model(12, 20, (5, 5))
    problem = GaussianEvidence(model.grams, torch.zeros(20), NoiseModel.homoscedastic(20, 1.0))
    found = fixed_point(evidence_objective(problem))
    assert math.isfinite(found.evaluation.value)
    assert bool(torch.isfinite(found.x).all())
    assert float(found.evaluation.effective_dimension.sum()) < 20


def test_bounds_are_kept():
    model = dense.linear_model(13, ROWS, (10, 10), decay=2.0)
    objective = evidence_objective(dense.gaussian_problem(model, dense.targets_of(model, 13)), bounds=(0.5, 1.0))
    for optimise in (fixed_point, lbfgs):
        found = optimise(objective)
        lower, upper = objective.limits()
        assert bool(((found.x >= lower) & (found.x <= upper)).all())
        assert found.converged
        ratio = objective.reference / (found.x[:2].exp() * objective.scale)
        assert bool(((ratio > 0.5 - 1e-9) & (ratio < 1.0 + 1e-9)).all())


def test_smallest_noise_of_a_likelihood_is_kept():
    model = dense.linear_model(13, 20, (40,), decay=0.0)
    noise = NoiseModel.homoscedastic(20, 1.0, minimum=0.25)
    found = fixed_point(evidence_objective(dense.gaussian_problem(model, model.network, noise)))
    assert float(found.x[-1].exp()) >= 0.25 * (1 - 1e-12)


@pytest.mark.parametrize("optimise", [fixed_point, lbfgs])
def test_early_ends_return_the_best_so_far(optimise):
    model = dense.linear_model(14, ROWS, decay=5.0)
    objective = evidence_objective(dense.gaussian_problem(model, dense.targets_of(model, 14)))
    found = optimise(objective, max_evaluations=4)
    assert not found.converged
    assert found.evaluations == 4
    assert "max_evaluations=4" in found.notes[0]
    assert found.evaluation.value == max(found.trace)

    class Interrupted:
        def __init__(self):
            self.calls = 0

        def __getattr__(self, name):
            return getattr(objective, name)

        def __call__(self, x):
            self.calls += 1
            if self.calls == 6:
                raise KeyboardInterrupt
            return objective(x)

    found = optimise(Interrupted())
    assert not found.converged
    assert "interrupted" in found.notes[0]
    assert found.evaluation.value == max(found.trace)


@pytest.mark.parametrize("optimise", [fixed_point, lbfgs])
def test_progress_bar_and_bad_arguments(optimise, capsys):
    model = dense.linear_model(15, 20, (5, 5))
    objective = evidence_objective(dense.gaussian_problem(model, dense.targets_of(model, 15)))
    optimise(objective, progress=True)
    assert "log evidence" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tolerance must be positive"):
        optimise(objective, tolerance=0.0)
    with pytest.raises(ValueError, match="max_evaluations must be at least 1"):
        optimise(objective, max_evaluations=0)


@pytest.mark.parametrize("where", ["theta_star", "theta_map"])
def test_lbfgs_ends_soon_after_the_optimum(where):
    """Groups that hardly matter and rounding of the evidence cost it hundreds of evaluations where MacKay needs 15."""
    model = dense.linear_model(3, 100, (10,) * 12, decay=2.0)
    objective = evidence_objective(dense.gaussian_problem(model, dense.targets_of(model, 3)), where)
    one, two = fixed_point(objective), lbfgs(objective)
    assert two.converged
    assert two.evaluations <= 2 * one.evaluations
    again = lbfgs(objective, start=two.x)
    assert again.evaluations <= 5
    assert again.evaluation.value >= two.evaluation.value - 1e-9


def test_far_fewer_evaluations_than_the_plain_fixed_point():
    model = dense.linear_model(2, ROWS, (20, 40, 30), decay=0.0)
    objective = evidence_objective(dense.gaussian_problem(model, dense.targets_of(model, 2)), "theta_map")
    found = fixed_point(objective)
    x, plain = objective.start(), 0
    while float(objective(x).gradient.abs().max()) > 1e-8 * ROWS:
        x, plain = (x + objective(x).step).clamp(*objective.limits()), plain + 1
    assert 4 * found.evaluations < plain
    assert float((found.x - x).abs().max()) < 1e-4


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    scales=st.lists(st.floats(-4.0, 4.0), min_size=4, max_size=4),
    decay=st.floats(2.0, 8.0),
)
def test_property_converged_stationary_and_monotone(seed, sizes, scales, decay):
    """Groups whose scales differ by up to 1e8 (in K_g: 1e16)."""
    unscaled = dense.linear_model(seed, ROWS, tuple(sizes), decay)
    model = unscaled.scaled(tuple(10.0**s for s in scales[: len(sizes)]))
    assume(sum(sizes) < ROWS)
    # A rescaled network is the same function: its targets stay, and with them the signal in units of the noise.
    problem = dense.gaussian_problem(model, dense.targets_of(unscaled, seed))
    objective = evidence_objective(problem)
    found = fixed_point(objective)
    assert found.converged, (found.notes, found.evaluation.gradient)
    assert found.evaluations <= 120
    assert_monotone(found)
    lower, upper = objective.limits()
    interior = (found.x > lower + 1e-6) & (found.x < upper - 1e-6)
    reference = dense.log_gradient(
        lambda lam, noise: dense.marginal(model, problem.targets, lam, noise.expand(ROWS)),
        found.x[:-1],
        found.x[-1:],
    )
    assert float(reference[interior].abs().max()) <= 1e-5
