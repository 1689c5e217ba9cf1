"""A hyper-prior of the precisions beside the evidence."""

from __future__ import annotations

import gpytorch
import pytest
import scipy.optimize
import torch
from gpytorch.constraints import Positive
from torch import Tensor

import ntkgp
from ntkgp.evidence import evidence_objective
from ntkgp.evidence.hyperprior import PenalisedObjective
from tests import reference as ref

DOUBLE = torch.float64


class Normal:
    """log λ_g ~ N(m, s²)."""

    def __init__(self, mean: float, sd: float) -> None:
        self.mean, self.sd = mean, sd

    def log_density(self, log_precision: Tensor) -> Tensor:
        return -0.5 * ((log_precision - self.mean) / self.sd).square().sum()


class Bounded:
    """Nothing above a precision."""

    def log_density(self, log_precision: Tensor) -> Tensor:
        return (9.0 - log_precision).log().sum()


def model(likelihood: gpytorch.likelihoods.Likelihood | None = None) -> ntkgp.ExactNTKGP:
    sample = ref.problem_r()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="tensor")
    likelihood = likelihood or gpytorch.likelihoods.GaussianLikelihood(noise_constraint=Positive())
    return ntkgp.ExactNTKGP(sample.x, sample.y, likelihood, lin)


@pytest.mark.parametrize("at", ["theta_star", "theta_map"])
def test_gradient_is_that_of_finite_differences(at: str) -> None:
    problem = model().evidence_problem(at=at)
    objective = PenalisedObjective(evidence_objective(problem, at), Normal(1.0, 0.7))
    x = torch.tensor([0.3, -1.0, 2.0, 0.5, -3.0], dtype=DOUBLE)
    steps = 1e-5 * torch.eye(len(x), dtype=DOUBLE)
    numerical = torch.stack([torch.tensor((objective(x + s).value - objective(x - s).value) / 2e-5) for s in steps])
    found = objective(x)
    torch.testing.assert_close(found.gradient, numerical.to(DOUBLE), rtol=1e-5, atol=1e-6)
    assert bool((found.pull >= 0).all())
    assert bool((found.push >= 0).all())


@pytest.mark.parametrize("prior", [Normal(1.0, 0.5), Normal(-3.0, 2.0), Bounded()])
@pytest.mark.parametrize("method", ["mackay", "lbfgs"])
def test_optimum_is_that_of_another_optimiser(method: str, prior) -> None:
    problem = model().evidence_problem()
    evidence = evidence_objective(problem)

    def negative(point):
        x = torch.from_numpy(point)
        log_precision = x[: evidence.num_groups]
        extra = float(prior.log_density(log_precision))
        return -(evidence(x).value + extra) if extra == extra else 1e6

    start = evidence.start().numpy()
    expected = scipy.optimize.minimize(negative, start, method="L-BFGS-B", options={"maxiter": 500})
    report = ntkgp.fit_evidence(model(), method=method, prior=prior)
    assert report.converged
    assert report.log_evidence + report.log_prior == pytest.approx(-expected.fun, abs=1e-3)
    assert report.trace[-1] == pytest.approx(report.log_evidence + report.log_prior, abs=1e-9)
    assert report.log_evidence == pytest.approx(evidence.evaluate(report.precision, report.noise).value, abs=1e-6)
    assert "log density of the prior" in str(report)


def test_a_narrow_prior_decides_and_a_flat_one_changes_nothing() -> None:
    plain = ntkgp.fit_evidence(model())
    flat = ntkgp.fit_evidence(model(), prior=Normal(0.0, 1e6))
    narrow = ntkgp.fit_evidence(model(), prior=Normal(1.0, 1e-4))
    assert plain.log_prior is None
    assert "log density" not in str(plain)
    assert flat.log_evidence == pytest.approx(plain.log_evidence, abs=1e-6)
    torch.testing.assert_close(narrow.precision.log(), torch.ones_like(narrow.precision), rtol=1e-3, atol=1e-3)
    assert narrow.log_evidence < plain.log_evidence


def test_a_prior_stops_pruning() -> None:
    fitted = model()
    plain = ntkgp.fit_evidence(fitted)
    report = ntkgp.fit_evidence(model(), prior=Normal(float(plain.precision.log().min()), 1.0))
    assert not report.pruned
    assert float(report.precision.max()) < float(plain.precision.max())


def test_classification_with_curvature_at_theta_star() -> None:
    sample = ref.problem_c()
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="tensor")
    found = []
    for prior in (None, Normal(0.0, 1e6), Normal(1.0, 1e-3)):
        gp = ntkgp.ExactNTKGP(sample.x, sample.y, ntkgp.CategoricalLikelihood(num_classes=4), lin)
        found.append(ntkgp.fit_evidence(gp, curvature="full", prior=prior))
    assert found[1].log_evidence == pytest.approx(found[0].log_evidence, abs=1e-3)
    torch.testing.assert_close(found[2].precision.log(), torch.ones(4, dtype=DOUBLE), rtol=1e-2, atol=1e-2)


class Vector:
    def log_density(self, log_precision: Tensor) -> Tensor:
        return log_precision


class Number:
    def log_density(self, log_precision: Tensor) -> float:
        return 0.0


class Kink:
    def log_density(self, log_precision: Tensor) -> Tensor:
        return (log_precision - log_precision.detach()).abs().sqrt().sum()


class Nowhere:
    def log_density(self, log_precision: Tensor) -> Tensor:
        return log_precision.sum() * 0 - torch.inf


class Constant:
    def log_density(self, log_precision: Tensor) -> Tensor:
        return torch.tensor(3.0)


def test_a_constant_density_is_a_prior() -> None:
    assert ntkgp.fit_evidence(model(), prior=Constant()).log_prior == 3.0


@pytest.mark.parametrize(
    ("prior", "kind", "words"),
    [
        (object(), TypeError, "prior: expected an object with log_density"),
        (Vector(), ValueError, r"prior: expected log_density to return a scalar tensor, got \(4,\)"),
        (Number(), ValueError, "prior: expected log_density to return a scalar tensor, got float"),
        (Kink(), ValueError, "prior: the gradient of log_density"),
        (Nowhere(), ValueError, "prior: has no density at the start"),
    ],
)
def test_what_is_no_prior(prior, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        ntkgp.fit_evidence(model(), prior=prior)
