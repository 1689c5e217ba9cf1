"""One pass over the data against the exact evidence, shard by shard, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.constraints import Positive
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood

import ntkgp
from ntkgp.evidence import OnePassEvidence, evidence_objective, one_pass
from ntkgp.evidence.streaming import add_square
from tests.models.test_nystrom import DOUBLE, Case, N, close


def exact_model(case: Case) -> ntkgp.ExactNTKGP:
    model = ntkgp.ExactNTKGP(case.x, case.y, free(case), case.lin)
    model.kernel.precision = case.precision
    return model


def free(case: Case) -> Any:
    """A likelihood whose constraint stops nothing."""
    if case.kind in ("single", "shared"):
        return GaussianLikelihood(noise_constraint=Positive(torch.exp, torch.log)).double()
    return case.likelihood()


def passed(case: Case, rows: slice = slice(None), **options: Any) -> OnePassEvidence:
    options = {"landmarks": case.x, "tolerance": 0.0, **options}
    return one_pass(case.lin, (case.x[rows], case.y[rows]), free(case), **options)


@pytest.mark.parametrize("kind", ["single", "shared", "per_output"])
@pytest.mark.parametrize("method", ["mackay", "lbfgs"])
def test_all_data_as_landmarks_give_the_exact_fit(kind: str, method: str) -> None:
    case = Case(kind)
    exact = ntkgp.fit_evidence(exact_model(case), method=method)
    found = ntkgp.fit_evidence(passed(case), method=method)
    assert found.converged
    assert exact.converged
    assert abs(found.log_evidence - exact.log_evidence) < 1e-6 * (1 + abs(exact.log_evidence))
    kept = torch.tensor([name not in exact.pruned for name in exact.group_names])
    assert found.pruned == exact.pruned
    close(found.precision[kept].log(), exact.precision[kept].log(), 1e-4)
    close(found.noise, exact.noise, 1e-4)
    close(found.effective_dimension[kept], exact.effective_dimension[kept], 1e-4)
    close(found.theta_star_norm[kept], exact.theta_star_norm[kept], 1e-4)
    close(found.residual_noise, exact.residual_noise, 1e-10)
    assert found.evidence_bounds[0] <= exact.log_evidence + 1e-5
    assert found.evidence_bounds[1] >= exact.log_evidence - 1e-5
    assert exact.evidence_bounds is None


@pytest.mark.parametrize("kind", ["single", "per_output", "softmax", "bernoulli"])
def test_all_quantities_at_one_point(kind: str) -> None:
    """Every number of the report at the same hyper-parameters, not only at an optimum."""
    case = Case(kind)
    model = exact_model(case)
    curvature = "quadratic" if case.classify else "simple"
    exact = evidence_objective(model.evidence_problem(curvature=curvature))
    found = passed(case).evidence_problem().objective()
    x = case.precision.log() if case.classify else torch.cat([case.precision, case.noise]).log()
    one, two = exact(x), found(x)
    assert abs(one.value - two.value) < 1e-7 * (1 + abs(one.value))
    close(two.gradient, one.gradient, 1e-6)
    close(two.effective_dimension, one.effective_dimension, 1e-6)
    close(two.squared_norms, one.squared_norms, 1e-6)
    if not case.classify:
        assert abs(one.sse - two.sse) < 1e-6 * one.sse
    misfit, prior = exact.squared_shift(x)
    streamed_misfit, streamed_prior = found.squared_shift(x)
    assert abs(misfit - streamed_misfit) < 1e-6 * (misfit + float(prior.sum()))
    close(streamed_prior, prior, 1e-6)


@pytest.mark.parametrize("kind", ["single", "shared", "per_output", "softmax", "bernoulli"])
@pytest.mark.parametrize("bound", ["vfe", "dtc"])
@pytest.mark.parametrize("features", [None, 5])
def test_gradient_of_few_landmarks(kind: str, bound: str, features: int | None) -> None:
    case = Case(kind)
    found = passed(case, landmarks=case.x[:4], bound=bound, num_features=features)
    objective = found.evidence_problem().objective()
    x = case.precision.log() if case.classify else torch.cat([case.precision, case.noise]).log()
    gradient = objective(x).gradient
    for i in range(len(x)):
        step = torch.zeros_like(x)
        step[i] = 1e-4
        slope = (objective(x + step).value - objective(x - step).value) / 2e-4
        assert abs(float(gradient[i]) - slope) < 1e-6 * (1 + float(gradient.abs().max()))
    evaluation = objective(x)
    assert bool((evaluation.pull >= 0).all())
    assert bool((evaluation.push >= 0).all())


@pytest.mark.parametrize("kind", ["single", "per_output", "softmax"])
@pytest.mark.parametrize("bound", ["vfe", "dtc"])
def test_both_methods_reach_one_optimum(kind: str, bound: str) -> None:
    case = Case(kind)
    reports = [
        ntkgp.fit_evidence(passed(case, landmarks=case.x[:8], bound=bound), method=method)
        for method in ("mackay", "lbfgs")
    ]
    assert all(report.converged for report in reports)
    assert abs(reports[0].log_evidence - reports[1].log_evidence) < 1e-5 * (1 + abs(reports[0].log_evidence))
    if case.classify:
        assert any("expansion" in text for text in reports[0].warnings)


@pytest.mark.parametrize("kind", ["single", "per_output", "softmax"])
def test_shards_add_up(kind: str) -> None:
    case = Case(kind)
    z = case.x[:7]
    whole = passed(case, landmarks=z)
    parts = [passed(case, rows, landmarks=z) for rows in (slice(0, 13), slice(13, 31), slice(31, None))]
    joined = parts[0] + parts[1] + parts[2]
    assert joined.statistics.num_data == N
    x = case.precision.log() if case.classify else torch.cat([case.precision, case.noise]).log()
    one, two = whole.evidence_problem().objective()(x), joined.evidence_problem().objective()(x)
    assert abs(one.value - two.value) < 1e-10 * abs(one.value)
    close(two.gradient, one.gradient, 1e-9)
    with pytest.raises(ValueError, match="different landmarks"):
        whole + passed(case, landmarks=case.x[7:14])


def test_posterior_and_model_of_the_statistics() -> None:
    case = Case("shared")
    found = passed(case, landmarks=case.x[:10])
    ntkgp.fit_evidence(found)
    with torch.no_grad():
        latent = found.posterior(case.x_test)
        rows = case.j.view(N, case.c, -1)[:10].flatten(0, 1)
        case.rows_noise = torch.full_like(case.rows_noise, float(found.likelihood.noise))
        expected, _ = case.posterior(rows, found.precision[case.index])
        close(latent.covariance_matrix, expected, 1e-6)
        assert torch.equal(found.model(residual=True)(case.x_test).mean, latent.mean)


def test_residual_targets_need_held_out_data() -> None:
    case = Case("single")
    found = passed(case, landmarks=case.x[:10])
    with pytest.raises(ValueError, match="held_out"):
        ntkgp.fit_evidence(found, targets="residual")
    x = torch.cat([case.precision, case.noise]).log()
    value = found.evidence_problem(targets="residual").objective()(x).value
    model = exact_model(case)
    full = passed(case).evidence_problem(targets="residual").objective()(x).value
    exact = evidence_objective(model.evidence_problem(targets="residual"))(x).value
    assert abs(full - exact) < 1e-7 * (1 + abs(exact))
    assert value <= exact
    report = ntkgp.fit_evidence(found, targets="residual", held_out=True)
    assert torch.isnan(torch.tensor(report.theta_shift))


def test_products_in_single_precision_are_close() -> None:
    case = Case("single")
    x = torch.cat([case.precision, case.noise]).log()
    values = [
        passed(case, landmarks=case.x[:10], tolerance=1e-6, dtype=dtype).evidence_problem().objective()(x).value
        for dtype in (torch.float64, torch.float32)
    ]
    assert 0 < abs(values[0] - values[1]) < 1e-3 * abs(values[0])


def test_lower_square() -> None:
    rows = torch.randn(50, 600, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    total = torch.zeros(600, 600, dtype=DOUBLE)
    add_square(total, rows)
    close(total.tril(), (rows.T @ rows).tril(), 1e-13)


def test_refusals() -> None:
    case = Case("softmax")
    found = passed(case, landmarks=case.x[:5])
    with pytest.raises(ValueError, match="theta_star"):
        ntkgp.fit_evidence(found, at="theta_map")
    with pytest.raises(ValueError, match="full"):
        ntkgp.fit_evidence(found, curvature="full")
    with pytest.raises(ValueError, match="bound"):
        passed(case, landmarks=case.x[:5], bound="elbo").evidence_problem()
    with pytest.raises(ValueError, match="max_memory"):
        passed(case, max_memory="100KiB")
    shared = Case("shared")
    fixed = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(torch.ones(N))
    with pytest.raises(ValueError, match="rank"):
        one_pass(shared.lin, (shared.x, shared.y), MultitaskGaussianLikelihood(3, rank=1), landmarks=shared.x[:3])
    with pytest.raises(ValueError, match="input by input"):
        one_pass(shared.lin, (shared.x, shared.y), fixed, landmarks=shared.x[:3])


def test_warnings() -> None:
    case = Case("single")
    case.y = torch.ones_like(case.y)
    report = ntkgp.fit_evidence(passed(case, landmarks=case.x[:3]), max_evaluations=3)
    assert any("constant targets" in text for text in report.warnings)
    assert "exact log evidence between" in str(report)


def test_a_pass_in_inference_mode_poisons_nothing() -> None:
    case = Case("shared")
    likelihood = free(case)
    with torch.inference_mode():
        found = one_pass(case.lin, (case.x, case.y), likelihood, num_landmarks=8)
        found.posterior(case.x_test)
    x = case.x_test.clone().requires_grad_()
    model = found.model()
    (gradient,) = torch.autograd.grad(model(x).variance.sum(), x)
    assert float(gradient.abs().max()) > 0
    found.statistics.add(found.features, case.x, case.y)
    assert found.statistics.num_data == 2 * N


def test_labels_that_the_network_excludes_are_reported() -> None:
    case = Case("softmax")
    for scale in (30.0, 1e5):
        net = copy.deepcopy(case.net)
        with torch.no_grad():
            net[-1].weight.mul_(scale)
        found = one_pass(ntkgp.LinearizedNetwork(net, case.x), (case.x, case.y), free(case), num_landmarks=8)
        if scale == 30.0:
            assert any("chi-square" in text for text in ntkgp.fit_evidence(found).warnings)
        else:
            with pytest.raises(ValueError, match="no probability"):
                ntkgp.fit_evidence(found)
    assert not any("chi-square" in text for text in ntkgp.fit_evidence(passed(case)).warnings)
