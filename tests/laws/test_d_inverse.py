"""Laws D7, D8: conditioning an image on linear measurements of it."""

from __future__ import annotations

import pytest
import torch

from ntkgp.evidence import evidence_objective
from tests import reference as ref
from tests.laws.problems import rel, violation
from tests.models.inverse_problems import DOUBLE, InverseProblem, dense, problem, rays

PROBLEMS = [(kind, groups) for kind in ("conv", "mlp", "deblur", "inpaint") for groups in ("single", "tensor")]


@pytest.fixture(params=PROBLEMS, ids="-".join)
def p(request: pytest.FixtureRequest) -> InverseProblem:
    return problem(*request.param)


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_D7_conditioning_on_measurements_is_the_weight_space_posterior_with_AJ(p, form):
    """K_xx − K_xy(K_yy + σ²I)⁻¹K_yx = J(JᵀAᵀAJ/σ² + Λ)⁻¹Jᵀ, and both means; γ and the evidence too."""
    model = p.model(mean="posterior", form=form).eval()
    found = model()
    _, star, covariance = dense(p)
    assert rel(found.covariance_matrix, covariance) < 1e-9
    assert rel(found.mean, star) < 1e-9
    at_point = evidence_objective(model.evidence_problem()).evaluate(p.precision)
    noise = torch.full((len(p.aj),), p.noise, dtype=DOUBLE)
    expected = ref.gaussian_primal(p.aj, p.targets, p.weights, noise, p.index)
    assert rel(at_point.effective_dimension, expected.gamma) < 1e-7
    assert at_point.value == pytest.approx(expected.log_evidence, rel=1e-9)


def test_D7_the_posterior_lies_below_the_prior(p):
    prior = ref.gram(p.j, p.weights)
    assert violation(prior - p.model().eval()().covariance_matrix) < 1e-12


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_D8_covariance_of_Bh_is_B_covariance_Bt(p, form):
    model = p.model(mean="posterior", form=form).eval()
    image, B = model(), rays(p.A.image_shape[0], 3, seed=8)
    seen = model(B)
    assert rel(seen.covariance_matrix, B.rows @ image.covariance_matrix @ B.rows.T) < 1e-12
    assert rel(seen.mean, B.rows @ image.mean) < 1e-12
    of_data = model(model.lin.rows_of(0))
    assert rel(of_data.covariance_matrix, p.A.rows @ image.covariance_matrix @ p.A.rows.T) < 1e-9


def test_D8_grams_of_measurements_are_A_grams_At(p):
    """By their own passes, with no pixel Gram, and from the Grams of the pixels."""
    net = p.model().lin.with_operators()
    net.pixel_grams = None
    measured, pixels = net.grams(net.rows_of(0)), net.grams(net.rows_of(1))
    assert rel(measured, p.A.rows @ pixels @ p.A.rows.T) < 1e-12
    net.keep_pixels()
    assert rel(net.grams(net.rows_of(0)), measured) < 1e-12


def test_D8_products_of_the_measured_network_are_adjoint(p):
    net = p.model().lin
    rows = torch.cat([net.rows_of(0), net.rows_of(1)])
    v, u = torch.randn(net.num_parameters, dtype=DOUBLE), torch.randn(len(rows), 1, dtype=DOUBLE)
    left, right = float((net.jvp(rows, v) * u).sum()), float(v @ net.vjp(rows, u))
    assert abs(left - right) <= 1e-12 * float(net.jvp(rows, v).norm() * u.norm())
