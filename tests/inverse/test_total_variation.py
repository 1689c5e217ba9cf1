"""Total variation, its expectation in closed form, and the hyper-priors made of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import ntkgp
from ntkgp.inverse.total_variation import (
    HalfCauchyPrior,
    ScalePrior,
    TVPredCP,
    collapse_warnings,
    difference_variances,
    expected_absolute,
    expected_total_variation,
    neighbours,
    total_variation,
)
from ntkgp.inverse.unet import UNet
from tests import reference

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(5)
    net = UNet(channels=(4, 4), skip_channels=(2,), norm="group", num_groups=2).double()
    x = torch.randn(1, 1, 6, 5, dtype=DOUBLE)
    lin = ntkgp.LinearizedNetwork(
        net, x, groups=ntkgp.ParameterGroups({"in": ["inc.*", "down0.*"], "out": ["skip0.*", "up0.*", "out.*"]})
    )
    return net, x, lin, reference.jacobian(net, x)[0]


def test_both_variations_by_their_sums():
    x = torch.randn(2, 5, 4, dtype=DOUBLE)
    loop, lengths = 0.0, 0.0
    for image in x.tolist():
        for i in range(5):
            for j in range(4):
                down = image[i + 1][j] - image[i][j] if i < 4 else 0.0
                right = image[i][j + 1] - image[i][j] if j < 3 else 0.0
                loop += abs(down) + abs(right)
                lengths += math.hypot(down, right)
    assert float(total_variation(x)) == pytest.approx(loop)
    assert float(total_variation(x, isotropic=True)) == pytest.approx(lengths)
    assert float(total_variation(x[0, 0], dims=1)) == pytest.approx(float(x[0, 0].diff().abs().sum()))
    assert torch.autograd.gradcheck(lambda z: total_variation(z, isotropic=True), x.requires_grad_())
    flat = torch.zeros(3, 3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(total_variation(flat, isotropic=True), flat)[0], torch.zeros(3, 3))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        total_variation(torch.zeros(3))


def test_neighbours_make_the_variation():
    for shape in ((4, 3), (2, 4, 3), (7,)):
        x = torch.randn(shape)
        i, j = neighbours(shape)
        expected = total_variation(x, min(2, len(shape)))
        torch.testing.assert_close((x.flatten()[i] - x.flatten()[j]).abs().sum(), expected)


def test_folded_normal_is_an_integral():
    for m, s in ((0.0, 1.0), (0.7, 0.5), (-3.0, 0.1), (1e-3, 2.0), (2.0, 0.0)):
        expected = (
            abs(m)
            if s == 0
            else integrate.quad(
                lambda t, m=m, s=s: abs(t) * stats.norm.pdf(t, m, s), m - 12 * s, m + 12 * s, points=[0.0], limit=200
            )[0]
        )
        found = expected_absolute(torch.tensor(m, dtype=DOUBLE), torch.tensor(s**2, dtype=DOUBLE))
        assert float(found) == pytest.approx(expected, rel=1e-9)
    variance = torch.tensor([0.0, 0.3, 2.0], dtype=DOUBLE, requires_grad=True)
    gradient = torch.autograd.grad(expected_absolute(torch.full((3,), 0.4, dtype=DOUBLE), variance).sum(), variance)[0]
    sd = variance.detach()[1:].sqrt()
    expected = math.sqrt(2 / math.pi) * (-(0.4**2) / (2 * sd**2)).exp() / (2 * sd)
    torch.testing.assert_close(gradient, torch.cat([torch.zeros(1, dtype=DOUBLE), expected]))


def test_expectation_against_monte_carlo():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 5, 4, generator=generator, dtype=DOUBLE)
    root = torch.randn(40, 40, generator=generator, dtype=DOUBLE) / 6
    draws = mean.flatten() + torch.randn(4000, 40, generator=generator, dtype=DOUBLE) @ root.T
    values = torch.stack([total_variation(draw.reshape(2, 5, 4)) for draw in draws])
    error = float(values.mean() - expected_total_variation(mean, root @ root.T))
    assert abs(error) < 3 * float(values.std()) / math.sqrt(len(values))
    with pytest.raises(ValueError, match=r"covariance: expected shape \(40, 40\)"):
        expected_total_variation(mean, torch.eye(4))


def test_difference_variances_by_every_way(problem):
    _, x, lin, j = problem
    first, second = neighbours((6, 5))
    rows = j[first] - j[second]
    expected = torch.stack([rows[:, lin.groups.index == g].square().sum(-1) for g in range(2)])
    torch.testing.assert_close(difference_variances(lin, x), expected)
    torch.testing.assert_close(difference_variances(lin, x, max_memory="50kB"), expected)
    probed = difference_variances(lin, x, num_probes=50, seed=1)
    assert abs(float((probed / expected).mean()) - 1) < 0.15
    torch.testing.assert_close(probed, difference_variances(lin, x, num_probes=50, seed=1))
    assert not torch.equal(probed, difference_variances(lin, x, num_probes=2, seed=2))


def test_predcp_against_monte_carlo(problem):
    """κ of each group: the total variation of images whose group varies about the trained weights."""
    net, x, lin, j = problem
    prior = TVPredCP(lin, x, 0.1)
    log_precision = torch.tensor([2.0, 1.0], dtype=DOUBLE)
    image = reference.outputs(net, x)[0]
    generator = torch.Generator().manual_seed(2)
    for g, kappa in enumerate(prior.expected_tv(log_precision)):
        part = j[:, lin.groups.index == g]
        noise = torch.randn(3000, part.shape[1], generator=generator, dtype=DOUBLE) * math.exp(-log_precision[g] / 2)
        values = torch.stack([total_variation((image + part @ row).reshape(6, 5)) for row in noise])
        assert abs(float(values.mean() - kappa)) < 3 * float(values.std()) / math.sqrt(3000)


def test_predcp_derivatives(problem):
    _, x, lin, _ = problem
    for form in ("density", "tempered"):
        prior = TVPredCP(lin, x, 0.3, form=form)
        at = torch.tensor([1.5, -0.5], dtype=DOUBLE, requires_grad=True)
        assert torch.autograd.gradcheck(prior.log_density, (at,), eps=1e-6, atol=1e-6)
        step = 1e-5 * torch.eye(2, dtype=DOUBLE)
        for g in range(2):
            with torch.no_grad():
                slope = (prior.expected_tv(at + step[g]) - prior.expected_tv(at - step[g]))[g] / 2e-5
            assert float(slope) < 0  # more precision, less variation
            assert float(prior.log_jacobian(at)[g].detach()) == pytest.approx(math.log(-float(slope)), rel=1e-6)


def test_predcp_is_a_density_of_the_log_precision(problem):
    """It integrates to one for each group, and its κ is exponential of the stated rate."""
    net, x, _, _ = problem
    prior = TVPredCP(ntkgp.LinearizedNetwork(net, x, groups="single"), x, 0.2)

    def density(u):
        return math.exp(float(prior.log_density(torch.tensor([u], dtype=DOUBLE))))

    def excess(u):
        return float(prior.expected_tv(torch.tensor([u], dtype=DOUBLE))[0] - prior.differences.abs().sum())

    options = {"limit": 300, "points": [0.0, 5.0]}
    assert integrate.quad(density, -15, 25, **options)[0] == pytest.approx(1, abs=1e-5)
    mean = integrate.quad(lambda u: excess(u) * density(u), -15, 25, **options)[0]
    assert mean == pytest.approx(1 / 0.2, rel=1e-4)


def test_predcp_stays_finite_far_out(problem):
    _, x, lin, _ = problem
    prior = TVPredCP(lin, x, 0.1)
    for value in (-30.0, 30.0):
        at = torch.full((2,), value, dtype=DOUBLE, requires_grad=True)
        density = prior.log_density(at)
        assert bool(density.isfinite())
        assert bool(torch.autograd.grad(density, at)[0].isfinite().all())
    assert float(prior.log_density(torch.full((2,), 20.0))) < float(prior.log_density(torch.full((2,), 5.0)))


def test_predcp_refuses(problem):
    net, x, lin, _ = problem
    with pytest.raises(ValueError, match="rate: expected a positive number"):
        TVPredCP(lin, x, 0.0)
    with pytest.raises(ValueError, match="form: expected one of"):
        TVPredCP(lin, x, 1.0, form="sampled")
    with pytest.raises(ValueError, match=r"log_precision: expected shape \(2,\), got \(3,\); the prior"):
        TVPredCP(lin, x, 1.0).log_density(torch.zeros(3))
    with pytest.raises(ValueError, match="x: expected one input"):
        difference_variances(lin, torch.cat([x, x]))
    with pytest.raises(ValueError, match="image_shape"):
        difference_variances(lin, x, image_shape=(4, 4))
    with pytest.raises(ValueError, match="num_probes"):
        difference_variances(lin, x, num_probes=0)
    bias = ntkgp.ParameterGroups(
        {"shift": ["out.bias"], "rest": ["inc.*", "down0.*", "skip0.*", "up0.*", "out.weight"]}
    )
    with pytest.raises(ValueError, match=r"groups \['shift'\] move no difference"):
        TVPredCP(ntkgp.LinearizedNetwork(net, x, groups=bias), x, 1.0)


def test_scale_priors_are_densities():
    single = ScalePrior(0.7, location=1.2)
    u = np.linspace(-12, 12, 4001)
    for prior, expected in (
        (single, stats.norm.pdf(-u, 1.2, 0.7)),
        (HalfCauchyPrior(1.5), stats.halfcauchy.pdf(np.exp(-u / 2), scale=1.5) * np.exp(-u / 2) / 2),
    ):
        found = np.array([float(prior.log_density(torch.tensor([value]))) for value in u[::100]])
        np.testing.assert_allclose(np.exp(found), expected[::100], rtol=1e-9)
    at = torch.tensor([0.3, -1.0, 2.0], dtype=DOUBLE, requires_grad=True)
    for prior in (ScalePrior(0.5), single, HalfCauchyPrior(torch.tensor([1.0, 2.0, 0.1]))):
        assert torch.autograd.gradcheck(prior.log_density, (at,))
    pooled = ScalePrior(0.5)
    torch.testing.assert_close(pooled.log_density(at), pooled.log_density(at + 3.0))
    assert float(ScalePrior(1.0).log_density(torch.tensor([0.0]))) == 0  # one group: nothing to pool
    for bad in (lambda: ScalePrior(0.0), lambda: HalfCauchyPrior(-1.0)):
        with pytest.raises(ValueError, match=r"expected (a )?positive"):
            bad()
    with pytest.raises(ValueError, match=r"expected shape \(G,\)"):
        pooled.log_density(torch.zeros(2, 2))


def test_collapse_is_said():
    healthy = torch.tensor([0.1, 0.2])
    sd = torch.full((5, 5), 0.05)
    assert collapse_warnings(healthy, posterior_sd=sd, noise=0.28, residual_rms=0.25) == ()
    (pruned,) = collapse_warnings(torch.tensor([0.1, 1e-5]), names=("inc", "up0"))
    assert "up0" in pruned
    assert "inc" not in pruned
    words = collapse_warnings(torch.zeros(2), posterior_sd=0 * sd, noise=0.25, residual_rms=0.251)
    assert len(words) == 3
    assert "no group moves" in words[0]
    assert "100%" in words[1]
    assert "explain nothing" in words[2]
