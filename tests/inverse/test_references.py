"""The comparators: each against its definition, on a small tomography problem."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from ntkgp.evaluation.metrics.images import score_image
from ntkgp.inverse.dip import DeepImagePrior
from ntkgp.inverse.geometry import ParallelBeam
from ntkgp.inverse.imaging import DenseOperator, Inpainting
from ntkgp.inverse.noise import MaternField, pinv_floor
from ntkgp.inverse.operators import RayTransform
from ntkgp.inverse.references import (
    ImagePosterior,
    bayes_dip_reference,
    ensemble_reference,
    fbp_reference,
    gp_reference,
    lmrf_reference,
    mc_dropout_reference,
    tv_reference,
)
from ntkgp.inverse.total_variation import total_variation

SD = 0.3
SMALL = {"channels": (8, 8), "skip_channels": (2,), "norm": "group", "output": "sigmoid"}
DOUBLE = torch.float64


@pytest.fixture(scope="module")
def problem():
    x = torch.zeros(12, 12, dtype=DOUBLE)
    x[2:6, 3:10] = 1.0
    x[6:10, 4:6] = 0.6
    A = RayTransform(ParallelBeam((12, 12), torch.arange(9) * math.pi / 9))
    y = A(x) + SD * torch.randn(A.data_shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    return x, A, y


def _error(found, x):
    return float((found.mean - x).square().mean().sqrt())


def test_fbp_propagates_the_noise(problem):
    x, A, y = problem
    found = fbp_reference(y, A, SD)
    torch.testing.assert_close(found.mean, A.fbp(y))
    draws = A.fbp(SD * torch.randn(4000, *A.data_shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)))
    ratio = draws.reshape(4000, -1).var(0) / found.covariance.diagonal()
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / 4000)
    weights = 0.5 + torch.rand(A.data_shape, dtype=DOUBLE)
    scaled = fbp_reference(y, A, SD * weights)
    draws = A.fbp(SD * weights * torch.randn(4000, *A.data_shape, dtype=DOUBLE)).reshape(4000, -1)
    assert float((draws.var(0) / scaled.covariance.diagonal() - 1).abs().mean()) < 0.05
    assert set(score_image(x, found.mean, **found.spread).as_dict()) >= {"psnr", "ll_full@0.0001"}
    assert found.sd.shape == x.shape
    with pytest.raises(TypeError, match="no filtered backprojection"):
        fbp_reference(torch.rand(9, dtype=DOUBLE), DenseOperator(torch.eye(9)), 0.1)


@pytest.mark.parametrize("kind", ["matern", "ridge", "known noise", "weighted"])
def test_gp_is_the_dense_posterior(problem, kind):
    x, A, y = problem
    noise = {"known noise": SD, "weighted": SD * (0.5 + torch.rand(A.data_shape, dtype=DOUBLE))}.get(kind)
    scales = {"length_scales": (0.0,)} if kind == "ridge" else {"length_scales": (2.0, 4.0)}
    found = gp_reference(y, A, noise, **scales)
    a, s = A.matrix(), found.settings
    k = s["image_sd"] ** 2 * MaternField((12, 12), s["length_scale"], 0.5).matrix()
    d = torch.as_tensor(found.noise, dtype=DOUBLE).expand(A.data_shape).flatten().square().diag()
    gain = k @ a.T @ torch.linalg.inv(a @ k @ a.T + d)
    torch.testing.assert_close(found.mean.flatten(), gain @ y.flatten(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.covariance, k - gain @ a @ k, rtol=1e-5, atol=1e-8)
    assert found.method == ("ridge" if kind == "ridge" else "GP, Matérn 0.5")
    assert _error(found, x) < 0.3
    if kind == "matern":
        assert found.settings["log_evidence"] > gp_reference(y, A, length_scales=(0.0,)).settings["log_evidence"]
        with pytest.raises(ValueError, match="max_memory"):
            gp_reference(y, A, max_memory="10kB")


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("isotropic", [False, True])
def test_tv_minimises_its_objective(problem, isotropic, nonnegative):
    """Not worse than L-BFGS-B on a smoothed objective, and close to it."""
    _, A, y = problem
    weight = 3.0
    found = tv_reference(
        y, A, SD, weight=weight, isotropic=isotropic, nonnegative=nonnegative, tolerance=1e-8, max_iterations=6000
    ).mean

    def objective(z, smooth=0.0):
        steps = torch.stack([
            torch.cat([z.diff(dim=0), z.new_zeros(1, 12)]), torch.cat([z.diff(dim=1), z.new_zeros(12, 1)], dim=1)
        ])  # fmt: skip
        squares = steps.square().sum(0) if isotropic else steps.square()
        return 0.5 * ((A(z) - y) / SD).square().sum() + weight * (squares + smooth).sqrt().sum()

    def value_and_gradient(flat):
        z = torch.tensor(flat).reshape(12, 12).requires_grad_()
        value = objective(z, 1e-8)
        return float(value.detach()), torch.autograd.grad(value, z)[0].flatten().numpy()

    bounds = [(0 if nonnegative else None, None)] * 144
    options = {"maxiter": 3000, "maxfun": 6000}
    best = minimize(value_and_gradient, np.zeros(144), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    reference = torch.tensor(best.x).reshape(12, 12)
    assert float(objective(found)) <= float(objective(reference)) + 1e-4
    assert float((found - reference).abs().max()) < 0.02
    assert float(found.min()) >= 0 or not nonnegative


def test_tv_meets_the_discrepancy(problem):
    x, A, y = problem
    found = tv_reference(y, A, SD)
    assert float(((A(found.mean) - y) / SD).square().mean()) == pytest.approx(1, abs=0.02)
    assert found.spread == {}
    assert found.sd is None
    assert _error(found, x) < 0.7 * float((A.fbp(y) - x).square().mean().sqrt())
    heavy = tv_reference(y, A, SD, weight=100 * found.settings["weight"])
    assert total_variation(heavy.mean) < total_variation(found.mean)
    with pytest.raises(ValueError, match="weight: expected a positive number"):
        tv_reference(y, A, SD, weight=0.0)
    with pytest.raises(ValueError, match="noise: expected positive numbers"):
        tv_reference(y, A, -SD)
    with pytest.raises(ValueError, match="noise: expected a number or shape"):
        tv_reference(y, A, torch.ones(3))


def test_tv_is_in_the_units_of_the_problem(problem):
    """Any operator, any units."""
    _, A, y = problem
    one = tv_reference(y, A, SD, weight=2.0, tolerance=1e-9, max_iterations=2000).mean
    scaled = DenseOperator(1e-3 * A.matrix(), (12, 12), tuple(A.data_shape))
    other = tv_reference(y, scaled, SD, weight=2e-3, tolerance=1e-9, max_iterations=2000).mean
    torch.testing.assert_close(other, 1000 * one, rtol=1e-3, atol=1.0)


def test_tv_fills_a_hole():
    x = torch.zeros(10, 10, dtype=DOUBLE)
    x[:, 5:] = 1.0
    mask = torch.ones(10, 10, dtype=torch.bool)
    mask[3:6, 2:4] = False
    found = tv_reference(x[mask], Inpainting(mask), 0.05)
    assert float((found.mean - x).abs().max()) < 0.3


def test_dropout_gives_random_images_and_leaves_the_state(problem):
    x, A, y = problem
    before = torch.get_rng_state()
    options = {"unet": SMALL, "learning_rate": 1e-2, "max_iterations": 300, "tau": 1.5}
    found = mc_dropout_reference(y, A, SD, num_samples=70, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.samples.shape == (70, 12, 12)
    torch.testing.assert_close(found.samples.mean(0), found.mean)
    assert float(found.sd.mean()) > 1e-3
    again = mc_dropout_reference(y, A, SD, num_samples=70, **options)
    assert torch.equal(again.samples, found.samples)
    assert np.isfinite(score_image(x, found.mean, **found.spread).likelihoods[0].full)
    with pytest.raises(ValueError, match="num_samples, rate"):
        mc_dropout_reference(y, A, SD, rate=0.0)


def test_members_of_an_ensemble_differ_by_their_seed(problem):
    x, A, y = problem
    options = {"unet": SMALL, "learning_rate": 1e-2, "max_iterations": 400, "tau": 1.4}
    found = ensemble_reference(y, A, SD, size=2, **options)
    single = DeepImagePrior(A, noise=SD, seed=1, **options).fit(y)
    torch.testing.assert_close(found.samples[1], single.reconstruction.double())
    assert not torch.equal(found.samples[0], found.samples[1])
    torch.testing.assert_close(found.mean, found.samples.mean(0))
    assert _error(found, x) < float((A.fbp(y) - x).square().mean().sqrt())
    made = ensemble_reference(y, A, size=2, make=lambda seed: DeepImagePrior(A, noise=SD, seed=seed, **options))
    torch.testing.assert_close(made.samples, found.samples)
    with pytest.raises(ValueError, match="at least two members"):
        ensemble_reference(y, A, SD, size=1)
    with pytest.raises(ValueError, match="make: it makes the members"):
        ensemble_reference(y, A, make=lambda seed: DeepImagePrior(A), tau=2.0)


@pytest.mark.parametrize("lengthscale", [None, 1.5])
def test_bayes_dip_is_its_recipe(problem, lengthscale):
    """Kernels of convolutions only, the evidence at the trained weights, and a wide floor, of the dense posterior."""
    x, A, y = problem
    unet = {"channels": (4, 4), "skip_channels": (2,), "output": "sigmoid"}
    dip = DeepImagePrior(A, unet=unet, noise=SD, learning_rate=1e-2, tau=2.0, dtype=DOUBLE).fit(y)
    found = bayes_dip_reference(y, A, dip=dip, lengthscale=lengthscale)
    torch.testing.assert_close(found.mean, dip.reconstruction)
    lin = dip.linearize("block", parameters="convolutions")
    j, a, parts = lin.jacobian(dip.input)[0], A.matrix(), []
    places = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).double()
    smooth = torch.exp(-torch.cdist(places, places) / (lengthscale or 1e-3)) + 1e-6 * torch.eye(9, dtype=DOUBLE)
    start = 0
    for name, parameter in lin.frozen.theta.items():
        block = j[:, start : start + parameter.numel()]
        start += parameter.numel()
        kernel = smooth if lengthscale and parameter.shape[-1] == 3 else torch.eye(parameter[0, 0].numel()).double()
        rows = block.reshape(144, -1, len(kernel))
        gram = torch.einsum("iak,kl,jal->ij", rows, kernel, rows)
        parts.append(gram / found.settings["precision"][lin.groups.names.index(name.split(".")[1])])
    k = sum(parts)
    floor = pinv_floor(a, found.noise) + 1e-6
    inverse = torch.linalg.inv(a @ k @ a.T + found.noise**2 * torch.eye(len(a), dtype=DOUBLE))
    expected = k - k @ a.T @ inverse @ a @ k + floor * torch.eye(144, dtype=DOUBLE)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-4, atol=1e-6 * float(k.diagonal().max()))
    assert np.isfinite(score_image(x, found.mean, **found.spread, floors=(0.0,)).likelihoods[0].full)


def test_bayes_dip_fits_by_itself(problem):
    _, A, y = problem
    unet = {"channels": (4, 4), "skip_channels": (0,), "output": "sigmoid"}
    found = bayes_dip_reference(y, A, SD, unet=unet, learning_rate=2e-2, tau=2.0, predcp=None)
    assert found.covariance.shape == (144, 144)
    with pytest.raises(ValueError, match="dip: it is fitted"):
        bayes_dip_reference(y, A, dip=DeepImagePrior(A), tau=2.0)


def test_lmrf_needs_its_package(problem, monkeypatch):
    import sys

    _, A, y = problem
    monkeypatch.setitem(sys.modules, "cuqi.geometry", None)
    monkeypatch.setitem(sys.modules, "cuqi", None)
    with pytest.raises(ImportError, match="cuqipy"):
        lmrf_reference(y, A, SD, scale=0.05)
    with pytest.raises(ValueError, match="noise: expected one number"):
        lmrf_reference(y, A, torch.ones(A.data_shape))


def test_lmrf_by_cuqipy(problem):
    pytest.importorskip("cuqi")
    x, A, y = problem
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    found = lmrf_reference(y, A, SD, num_samples=100, warmup=50)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert found.samples.shape == (100, 12, 12)
    assert _error(found, x) < 0.8 * float((A.fbp(y) - x).square().mean().sqrt())


def test_bayes_dip_floor_is_a_truncated_pseudo_inverse():
    a = torch.randn(12, 8, dtype=torch.float64)
    inverse = torch.linalg.pinv(a.T @ a)
    full = pinv_floor(a, 0.5, num_singular=8)
    assert full == pytest.approx(0.25 * float(inverse.diagonal().mean()), rel=1e-9)
    assert pinv_floor(a, 0.5, num_singular=3) < full
    assert pinv_floor(a, 0.5, num_singular=None, cutoff=1e-3) == pytest.approx(full)
    with pytest.raises(ValueError, match="one of the two"):
        pinv_floor(a, 0.5, cutoff=1e-3)


def test_forms_of_a_posterior():
    mean = torch.zeros(2, 2, dtype=DOUBLE)
    assert ImagePosterior("point", mean).sd is None
    torch.testing.assert_close(ImagePosterior("v", mean, variance=mean + 4).sd, mean + 2)
    torch.testing.assert_close(ImagePosterior("c", mean, covariance=4 * torch.eye(4, dtype=DOUBLE)).sd, mean + 2)
    assert list(ImagePosterior("s", mean, samples=torch.randn(3, 2, 2)).spread) == ["samples"]
