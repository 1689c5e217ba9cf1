"""The deep image prior: fits without peeking, for any operator and network, that can be stopped and taken up again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ntkgp
from ntkgp.inverse import dip as dip_module
from ntkgp.inverse.dip import DeepImagePrior
from ntkgp.inverse.geometry import ParallelBeam, Rays
from ntkgp.inverse.imaging import Blur, DenseOperator, Inpainting
from ntkgp.inverse.noise import MaternField, estimate_noise
from ntkgp.inverse.operators import RayTransform
from ntkgp.inverse.pilot import filled
from ntkgp.inverse.total_variation import TVPredCP
from ntkgp.inverse.unet import UNet

SMALL = {"channels": (8, 8), "skip_channels": (2,), "norm": "group", "output": "sigmoid"}
SD = 0.3
OPTIONS = {"unet": SMALL, "learning_rate": 1e-2, "noise": SD, "seed": 2}


def _phantom(size=16):
    image = torch.zeros(size, size)
    image[3 : size // 2, 4 : size - 3] = 1.0
    image[size // 2 :, 5:8] = 0.6
    return image


@pytest.fixture(scope="module")
def tomography():
    """A phantom of 16 x 16, its projector with 10 views, and noisy data."""
    x = _phantom()
    A = RayTransform(ParallelBeam((16, 16), torch.arange(10) * math.pi / 10))
    generator = torch.Generator().manual_seed(0)
    return x, A, A(x) + SD * torch.randn(A.data_shape, generator=generator)


@pytest.fixture(scope="module")
def fitted(tomography):
    _, A, y = tomography
    return DeepImagePrior(A, **OPTIONS).fit(y)


def _error(dip, x):
    return float((dip.reconstruction - x).square().mean().sqrt())


def test_the_discrepancy_principle_ends_a_fit_without_the_truth(fitted, tomography):
    x, A, y = tomography
    assert fitted.stopped_by == "discrepancy"
    assert fitted.iteration < 2000
    residual = float((A(fitted.reconstruction) - y).square().mean().sqrt())
    assert residual <= fitted.noise * 1.001
    assert residual == pytest.approx(fitted.history[fitted.best_iteration] * fitted.noise, rel=1e-4)
    assert all(value > 1 for value in fitted.history[:-1])
    assert len(fitted.history) == fitted.iteration + 1
    assert _error(fitted, x) < 0.6 * float((A.fbp(y) - x).square().mean().sqrt())


def test_a_fit_is_its_seed_and_leaves_no_trace(fitted, tomography):
    _, A, y = tomography
    before = torch.get_rng_state()
    again = DeepImagePrior(A, **OPTIONS).fit(y)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.reconstruction, fitted.reconstruction)
    other = DeepImagePrior(A, **(OPTIONS | {"seed": 1})).fit(y)
    assert not torch.equal(other.reconstruction, fitted.reconstruction)


def test_held_out_measurements_reach_neither_the_loss_nor_the_input(tomography):
    x, A, y = tomography
    mask = torch.zeros(A.data_shape, dtype=torch.bool)
    mask[:, ::7] = True
    spoiled = torch.where(mask, y + 5 * torch.randn(A.data_shape), y)
    options = {"stop": "held_out", "held_out": mask, "noise": SD, "unet": SMALL, "max_iterations": 30}
    with pytest.warns(UserWarning, match="the rule 'held_out' was not met after 30"):
        first = DeepImagePrior(A, **options).fit(y)
    with pytest.warns(UserWarning, match="not met"):
        second = DeepImagePrior(A, **options).fit(spoiled)
    assert torch.equal(first.input, second.input)
    assert first.history == second.history
    assert first.stopped_by == "max_iterations"
    net = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 1, 5, padding=2), nn.Sigmoid())
    dip = DeepImagePrior(A, net, stop="held_out", learning_rate=5e-2).fit(y)
    assert dip.stopped_by == "held_out"
    assert 0.7 < dip.noise / SD < 1.3
    assert _error(dip, x) < 0.8 * float((A.fbp(y) - x).square().mean().sqrt())


def test_held_out_rays_are_interpolated():
    y = torch.tensor([[1.0, 9.0, 9.0, 4.0, 9.0], [9.0, 2.0, 3.0, 9.0, 9.0], [9.0] * 5])
    kept = y != 9
    expected = [[1, 2, 3, 4, 4], [2, 2, 3, 3, 3], [2.5] * 5]
    torch.testing.assert_close(filled(y, kept), torch.tensor(expected))
    assert filled(y, torch.ones_like(kept)) is y


def test_an_interrupt_keeps_the_best_and_resume_goes_on(fitted, tomography):
    _, A, y = tomography
    seen = []

    def interrupt(dip):
        seen.append((dip.iteration, dip.residual, dip.current.clone()))
        if dip.iteration == 40:
            raise KeyboardInterrupt

    dip = DeepImagePrior(A, **OPTIONS, callback=interrupt, callback_every=20).fit(y)
    assert dip.stopped_by == "interrupt"
    assert [entry[0] for entry in seen] == [20, 40]
    assert seen[0][2].shape == (16, 16)
    assert dip.reconstruction.shape == (16, 16)
    state = dip.state_dict()
    dip.resume()
    assert dip.stopped_by == "discrepancy"
    assert dip.history == fitted.history
    assert torch.equal(dip.reconstruction, fitted.reconstruction)
    loaded = DeepImagePrior(A, **OPTIONS).load_state_dict(state)
    assert loaded.iteration == 40
    assert torch.equal(loaded.resume().reconstruction, fitted.reconstruction)


def test_a_finished_fit_goes_on_only_for_another_rule(fitted, tomography):
    _, A, _ = tomography
    again = DeepImagePrior(A, **OPTIONS).load_state_dict(fitted.state_dict()).resume()
    assert again.history == fitted.history
    assert torch.equal(again.reconstruction, fitted.reconstruction)
    again.tau = 0.97
    again.resume()
    assert again.iteration > fitted.iteration
    assert again.best_iteration == again.iteration
    assert again.history[-1] ** 2 <= 0.97
    again.tau = 1e-6
    with pytest.warns(UserWarning, match="not met after"):
        again.resume(max_iterations=again.iteration + 5)
    assert len(again.history) == again.iteration + 1


def test_a_state_survives_a_file(fitted, tomography, tmp_path):
    _, A, _ = tomography
    torch.save(fitted.state_dict(), tmp_path / "dip.pt")
    state = torch.load(tmp_path / "dip.pt", weights_only=True)
    loaded = DeepImagePrior(A, unet=SMALL).load_state_dict(state)
    assert torch.equal(loaded.reconstruction, fitted.reconstruction)
    assert loaded.noise == fitted.noise
    with pytest.raises(ValueError, match="it belongs to another network"):
        DeepImagePrior(A, unet={**SMALL, "channels": (4, 4)}).load_state_dict(state)
    with pytest.raises(ValueError, match=r"missing or unknown entries \['net'\]"):
        DeepImagePrior(A).load_state_dict({name: value for name, value in state.items() if name != "net"})
    with pytest.raises(RuntimeError, match="call fit"):
        DeepImagePrior(A).state_dict()


def test_dropout_is_resumed_with_its_random_state(tomography):
    _, A, y = tomography
    unet = {**SMALL, "dropout": 0.1}
    options = {"noise": SD, "unet": unet, "tau": 0.1}

    def stop_at(number):
        def callback(dip):
            if dip.iteration == number:
                raise KeyboardInterrupt

        return callback

    whole = DeepImagePrior(A, callback=stop_at(20), callback_every=10, **options).fit(y)
    half = DeepImagePrior(A, callback=stop_at(10), callback_every=10, **options).fit(y)
    torch.randn(7)
    half.callback = stop_at(20)
    half.resume()
    assert half.history == whole.history
    assert torch.equal(whole.reconstruction, whole.reconstruction)  # dropout is off


def test_the_users_network_is_copied_and_trained_where_it_may(tomography):
    _, A, y = tomography
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 1, 3, padding=1)).train()
    net[0].requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.warns(UserWarning, match="not met"):
        dip = DeepImagePrior(A, net, noise=SD, max_iterations=20).fit(y)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training
    assert net[2].weight.grad is None
    assert dip.scale == 1.0
    fitted_net = dip.net.net
    assert torch.equal(fitted_net[0].weight, before["0.weight"])
    assert not torch.equal(fitted_net[2].weight, before["2.weight"])
    assert dip.linearize().num_parameters == 55


@pytest.mark.parametrize("groups", ["block", "normalization", "single"])
def test_the_tangent_model_is_of_the_reconstruction(fitted, groups):
    lin = fitted.linearize(groups)
    assert lin.num_outputs == 256
    assert lin.output_shape == (16, 16)
    torch.testing.assert_close(lin(fitted.input)[0].reshape(16, 16), fitted.reconstruction)
    if groups == "block":
        assert lin.groups.names == ("inc", "down0", "skip0", "up0", "out")
    kernels = fitted.linearize("block", parameters="convolutions")
    assert kernels.num_parameters == sum(m.weight.numel() for m in UNet(**SMALL).modules() if isinstance(m, nn.Conv2d))
    with pytest.raises(ValueError, match="parameters: expected"):
        fitted.linearize(parameters="biases")
    with pytest.raises(ValueError, match=r"groups: expected one of .*'block'.* got 'blocks'"):
        fitted.linearize("blocks")


def test_the_tangent_model_is_in_units_of_the_image(tomography):
    """What the network moves by when its weights move is the tangent's product, scale included."""
    _, A, y = tomography
    with pytest.warns(UserWarning, match="not met"):
        dip = DeepImagePrior(A, unet={**SMALL, "output": "linear"}, max_iterations=60, dtype=torch.float64).fit(50 * y)
    assert dip.scale > 10
    lin, net = dip.linearize(), dip.net
    v = torch.randn(lin.num_parameters, dtype=torch.float64)
    weights = nn.utils.parameters_to_vector(net.parameters())
    images = []
    with torch.no_grad():
        for sign in (1, -1):
            nn.utils.vector_to_parameters(weights + sign * 1e-6 * v, net.parameters())
            images.append(net(dip.input)[0].flatten())
    moved = (images[0] - images[1]) / 2e-6
    torch.testing.assert_close(lin.jvp(dip.input, v)[0], moved, rtol=1e-3, atol=1e-3 * float(moved.abs().max()))


def test_predcp_has_the_rate_of_the_fit(fitted, monkeypatch):
    prior = fitted.predcp(fitted.linearize("block"), scale=2.0)
    assert isinstance(prior, TVPredCP)
    assert prior.rate == pytest.approx(2 * 10 * fitted.A.data_shape[1] * fitted.tv_weight)
    assert prior.num_groups == 5
    monkeypatch.setattr(dip_module, "_PROBES", 30)
    probed = fitted.predcp(fitted.linearize("block"), scale=2.0, max_memory="100kB")
    ratio = probed.variances.sum(-1) / prior.variances.sum(-1)
    assert float((ratio - 1).abs().max()) < 0.5
    assert not torch.equal(probed.variances, prior.variances)


def test_deblurring(tomography):
    """Nothing in it is about tomography."""
    x = tomography[0]
    A = Blur.gaussian((16, 16), 1.0)
    y = A(x) + 0.05 * torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    dip = DeepImagePrior(A, unet=SMALL, learning_rate=1e-2, noise=0.05, max_iterations=1500, tau=1.1).fit(y)
    assert dip.stopped_by == "discrepancy"
    assert _error(dip, x) < 0.8 * float((y - x).square().mean().sqrt())


def test_inpainting_in_colour():
    x = torch.stack([_phantom(12), _phantom(12).T])
    mask = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(2)) < 0.6
    A = Inpainting(mask)
    y = A(x) + 0.05 * torch.randn(A.data_shape, generator=torch.Generator().manual_seed(3))
    dip = DeepImagePrior(A, unet=SMALL, learning_rate=1e-2, noise=0.05, max_iterations=1500, tau=1.1).fit(y)
    assert dip.reconstruction.shape == (2, 12, 12)
    hole = ~mask
    naive = (A.adjoint(y) - x)[hole].square().mean().sqrt()
    assert float((dip.reconstruction - x)[hole].square().mean().sqrt()) < 0.6 * float(naive)


@pytest.mark.parametrize("kind", ["auto", "fbp", "adjoint", "random", "tensor"])
def test_inputs(tomography, kind):
    _, A, y = tomography
    given = torch.randn(1, 3, 16, 16) if kind == "tensor" else kind
    with pytest.warns(UserWarning, match="not met"):
        dip = DeepImagePrior(A, input=given, noise=SD, unet=SMALL, max_iterations=2).fit(y)
    if kind == "tensor":
        assert torch.equal(dip.input, given)
    elif kind == "random":
        assert dip.input.shape == (1, 32, 16, 16)
    else:
        expected = A.fbp(y) if kind != "adjoint" else A.adjoint(y)
        ratio = dip.input[0, 0] / expected
        torch.testing.assert_close(ratio, ratio[0, 0].expand(16, 16))


def test_rays_without_a_backprojection_start_from_least_squares():
    generator = torch.Generator().manual_seed(0)
    points, directions = torch.randn(40, 2, generator=generator), torch.randn(40, 2, generator=generator)
    A = RayTransform(Rays((8, 8), points, directions))
    y = A(_phantom(8)) + 0.1 * torch.randn(40, generator=generator)
    with pytest.warns(UserWarning, match="not met"):
        dip = DeepImagePrior(A, unet=SMALL, noise=0.1, max_iterations=2).fit(y)
    expected = A.pinv(y.to(dip.input.dtype), damping=1e-2)
    torch.testing.assert_close(dip.input[0, 0], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="no filtered backprojection"):
        DeepImagePrior(A, unet=SMALL, noise=0.1, input="fbp").fit(y)


def test_progress_is_a_bar_with_the_residual(tomography, capsys):
    _, A, y = tomography
    with pytest.warns(UserWarning, match="not met"):
        DeepImagePrior(A, unet=SMALL, noise=SD, max_iterations=10, progress=True, callback_every=5).fit(y)
    shown = capsys.readouterr().err
    assert "deep image prior" in shown
    assert "residual=" in shown


def test_known_noise_weights_the_residuals(tomography):
    _, A, y = tomography
    sd = 0.1 + torch.rand(A.data_shape, generator=torch.Generator().manual_seed(5))
    dip = DeepImagePrior(A, noise=sd, unet=SMALL, learning_rate=1e-2).fit(y)
    white = (A(dip.reconstruction) - y) / sd
    assert float(white.square().mean()) <= 1.001
    assert torch.equal(dip.noise, sd)


def test_float64_and_other_units(tomography):
    _, A, y = tomography
    with pytest.warns(UserWarning, match="not met"):
        dip = DeepImagePrior(A, dtype=torch.float64, noise=SD, unet=SMALL, max_iterations=3).fit(y)
    assert dip.reconstruction.dtype == torch.float64
    linear = {**SMALL, "output": "linear"}
    first, second = (DeepImagePrior(A, unet=linear, max_iterations=3, dtype=torch.float64) for _ in range(2))
    with pytest.warns(UserWarning, match="not met"):
        first.fit(y)
    with pytest.warns(UserWarning, match="not met"):
        second.fit(1000 * y)
    torch.testing.assert_close(second.reconstruction, 1000 * first.reconstruction, rtol=1e-6, atol=1e-3)
    assert second.noise == pytest.approx(1000 * first.noise, rel=1e-6)


def test_a_plateau_ends_a_fit(tomography):
    _, A, y = tomography
    with pytest.warns(UserWarning, match=r"\(plateau\); iterate \d+, of residual"):
        dip = DeepImagePrior(A, nn.Conv2d(1, 1, 1), noise=1e-3, learning_rate=0.05).fit(y)
    assert dip.stopped_by == "plateau"
    assert dip.iteration < 5000


def test_noise_is_estimated_from_the_measurements_alone():
    ratios = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        A = RayTransform(ParallelBeam((20, 20), torch.arange(8) * math.pi / 8))
        y = A(_phantom(20)) + 0.4 * torch.randn(A.data_shape, generator=generator)
        ratios.append(estimate_noise(y, A).sd / 0.4)
    assert abs(sum(ratios) / 4 - 1) < 0.1
    weights = 0.5 + torch.rand(A.data_shape, generator=generator)
    y = A(_phantom(20)) + 0.4 * weights * torch.randn(A.data_shape, generator=generator)
    assert abs(estimate_noise(y, A, weights=weights).sd / 0.4 - 1) < 0.25
    assert abs(estimate_noise(y, A, weights=weights, max_measurements=120).sd / 0.4 - 1) < 0.4
    with pytest.raises(ValueError, match="all measurements are zero"):
        estimate_noise(0 * y, A)


def _holes(size):
    x = torch.linspace(-1, 1, size, dtype=torch.float64)
    rows, columns = torch.meshgrid(x, x, indexing="ij")
    disc = (torch.hypot(rows, columns) < 0.8).double()
    for row, column in ((0.3, 0.2), (-0.3, 0.3), (0.0, -0.4)):
        disc[torch.hypot(rows - row, columns - column) < 0.18] = 0
    return disc


def test_the_smoothness_of_the_image_is_found_with_the_noise():
    A = RayTransform(ParallelBeam((32, 32), torch.arange(16) * math.pi / 16))
    clean = A(_holes(32))
    sd = 0.01 * float(clean.mean())
    y = clean + sd * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = estimate_noise(y, A)
    alone = {smoothness: estimate_noise(y, A, smoothness=smoothness) for smoothness in (0.5, 1.5, 2.5)}
    assert found == max(alone.values(), key=lambda estimate: estimate.log_evidence) == alone[0.5]
    assert abs(found.sd / sd - 1) < 0.1
    with pytest.raises(ValueError, match="at least one of each"):
        estimate_noise(y, A, smoothness=())
    with pytest.raises(ValueError, match=r"smoothness: expected one of \(0.5, 1.5, 2.5\), got 1.0"):
        estimate_noise(y, A, smoothness=(0.5, 1.0))


def test_a_rough_prior_does_not_take_all_noise_for_image():
    A = DenseOperator(torch.eye(32 * 32, dtype=torch.float64), (32, 32))
    y = _holes(32).reshape(A.data_shape)
    y = y + 0.02 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rough, found = (estimate_noise(y, A, smoothness=nu, max_measurements=1024) for nu in (0.5, (0.5, 1.5)))
    assert rough.sd < 1e-3  # of the edges alone, nothing is left for the noise
    assert found.smoothness == 1.5
    assert found.sd > 0.02
    assert rough.log_evidence > found.log_evidence


def test_the_evidence_of_the_noise_is_that_of_scipy(tomography):
    from scipy.stats import multivariate_normal

    _, A, y = tomography
    found = estimate_noise(y, A, length_scales=(3.0,), smoothness=1.5)
    a = A.matrix()
    cov = found.image_sd**2 * a @ MaternField((16, 16), 3.0).matrix() @ a.T
    cov = cov + found.sd**2 * torch.eye(len(a), dtype=torch.float64)
    flat = y.double().flatten().numpy()
    best = multivariate_normal(cov=cov.numpy()).logpdf(flat)
    assert found.log_evidence == pytest.approx(best, rel=1e-8)
    for factor in (0.9, 1.1):
        assert multivariate_normal(cov=factor * cov.numpy()).logpdf(flat) < best


@pytest.mark.parametrize("smoothness", [0.5, 1.5, 2.5])
def test_the_field_is_a_matern_covariance(smoothness):
    from gpytorch.kernels import MaternKernel

    kernel = MaternKernel(nu=smoothness).double()
    kernel.lengthscale = 2.5
    points = torch.cartesian_prod(torch.arange(5.0), torch.arange(4.0)).double()
    torch.testing.assert_close(MaternField((5, 4), 2.5, smoothness).matrix(), kernel(points).to_dense().detach())
    colour = MaternField((2, 5, 4), 2.5, smoothness).matrix()
    assert float(colour[:20, 20:].abs().max()) < 1e-12
    for bad in ({"length_scale": -1.0}, {"smoothness": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            MaternField((5, 4), **{"length_scale": 1.0, **bad})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "early"}, "stop: expected one of"),
        ({"input": "noise"}, "input: expected one of"),
        ({"input": torch.zeros(2, 1, 16, 16)}, "input: expected one row"),
        ({"net": nn.Conv2d(1, 1, 1), "unet": SMALL}, "unet: its options are for net=None"),
        ({"dtype": torch.float16}, "dtype: expected"),
        ({"tau": -1.0}, "tau: expected a positive number"),
        ({"scale": 0.0}, "scale: expected a positive number"),
        ({"tv_weight": -1.0}, "tv_weight: expected a number >= 0"),
        ({"noise": -0.1}, "noise: expected a positive number"),
        ({"noise": torch.ones(3)}, "noise: expected positive numbers of shape"),
        ({"stop": "held_out", "held_out": 1.5}, "held_out: expected a fraction"),
        ({"stop": "held_out", "held_out": torch.ones(10, 24, dtype=torch.bool)}, "held_out: expected a boolean mask"),
        ({"net": nn.Flatten()}, "no trainable parameter"),
        ({"net": nn.Conv2d(2, 1, 1)}, "net: it does not run on an input"),
        ({"net": nn.Conv2d(1, 2, 1)}, "net: expected an output with the numbers of an image"),
    ],
)
def test_bad_options_are_refused(tomography, options, message):
    _, A, y = tomography
    with pytest.raises(ValueError, match=message):
        DeepImagePrior(A, **{"noise": 0.3, **options}).fit(y)


def test_bad_measurements_are_refused(tomography):
    _, A, y = tomography
    with pytest.raises(ValueError, match="transposed"):
        DeepImagePrior(A).fit(y.T)
    with pytest.raises(ValueError, match=r"1 of .* NaN or infinite"):
        DeepImagePrior(A).fit(torch.where(torch.arange(y.numel()).reshape(y.shape) == 3, math.nan, y))
    with pytest.raises(TypeError, match=r"A: expected a ntkgp\.inverse\.ForwardOperator"):
        DeepImagePrior(lambda x: x)
    with pytest.raises(TypeError, match=r"got ParallelBeam; make it RayTransform\(geometry\)"):
        DeepImagePrior(A.geometry)
    with pytest.raises(ValueError, match="has no method fbp"):
        DeepImagePrior(DenseOperator(torch.eye(9), (3, 3), (3, 3)), input="fbp", noise=1.0).fit(torch.rand(3, 3))
    with pytest.raises(ValueError, match="the U-Net needs images"):
        DeepImagePrior(DenseOperator(torch.eye(9)), noise=1.0).fit(torch.rand(9))
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        DeepImagePrior(A, nn.Conv2d(1, 1, 1), noise=SD, learning_rate=1e30).fit(y)


def test_one_view_gives_an_image():
    """As under-determined as it gets."""
    A = RayTransform(ParallelBeam((12, 12), torch.zeros(1)))
    y = A(_phantom(12)) + 0.1 * torch.randn(A.data_shape, generator=torch.Generator().manual_seed(0))
    dip = DeepImagePrior(A, unet=SMALL, noise=0.1, learning_rate=2e-2, tau=4.0).fit(y)
    assert bool(dip.reconstruction.isfinite().all())
    assert isinstance(dip.linearize(), ntkgp.LinearizedNetwork)


def test_one_dimensional_signals_with_a_network_of_the_users():
    x = torch.cat([torch.zeros(10), torch.ones(10)])
    A = DenseOperator(torch.tril(torch.ones(20, 20)) / 5)
    y = A(x) + 0.05 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 20))
    dip = DeepImagePrior(A, net, noise=0.05, learning_rate=1e-2).fit(y)
    assert dip.reconstruction.shape == (20,)
    assert dip.stopped_by == "discrepancy"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_dark_image_does_not_end_in_zero(seed):
    """Begun at 0.5, this fit is at zero everywhere after 30 iterations, where the sigmoid has no gradient."""
    image = torch.zeros(28, 28, dtype=torch.float64)
    image[6:22, 8:11], image[6:9, 8:20], image[14:16, 8:18] = 1.0, 1.0, 0.9
    A = RayTransform(ParallelBeam((28, 28), torch.arange(10) * math.pi / 10, 41))
    dip = DeepImagePrior(A, noise=1.0, tau=9.0, unet={"output": "sigmoid"}, seed=seed, max_iterations=150).fit(A(image))
    assert dip.history[0] < 25
    assert dip.stopped_by == "discrepancy"
