"""Hessian-free Laplace against dense Hessians and posteriors."""

from __future__ import annotations

import copy
import functools
import itertools
import logging

import pytest
import torch
from torch import Tensor, nn

from ntkgp.baselines.hessian_free import HessianFreeLaplace
from ntkgp.baselines.newton_cg import minimise
from tests import reference

DOUBLE = torch.float64
NOISE = 0.04


def tensors(net: nn.Module) -> list[set[str]]:
    return [{name} for name, _ in net.named_parameters()]


def dense(net: nn.Module, x: Tensor, x_test: Tensor, precision: Tensor, noise: float) -> Tensor:
    """Joint covariance (N, C, N, C) of the tangent model at test inputs."""
    j, test = (reference.jacobian(net, inputs).flatten(0, 1) for inputs in (x, x_test))
    hessian = j.T @ j / noise + precision.diag()
    n = len(x_test)
    return (test @ torch.linalg.solve(hessian, test.T)).reshape(n, -1, n, len(test) // n)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@functools.cache
def curve() -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """Three hidden layers on two clusters: the network, its data and test inputs."""
    with reference.seeded(0) as generator:
        x = torch.rand(40, 1, generator=generator, dtype=DOUBLE) * 2 - 3
        x[20:] += 4
        y = torch.sin(1.5 * x) + 0.2 * torch.randn(40, 1, generator=generator, dtype=DOUBLE)
        sizes = (1, 6, 5, 4)
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
        net = nn.Sequential(*layers, nn.Linear(4, 1)).double()
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=400, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            prior = sum(p.square().sum() for p in net.parameters()) / 2
            total = (net(x) - y).square().sum() / (2 * NOISE) + prior
            total.backward()
            return total

        optimizer.step(loss)
        net.zero_grad()
    return net, x, y, torch.tensor([[-2.5], [-1.0], [0.0], [1.5], [3.5]], dtype=DOUBLE)


def hessian_covariance(theta: Tensor, net: nn.Module, loss, x_test: Tensor) -> Tensor:
    """J⋆ (∇²L)⁻¹ J⋆ᵀ at theta, (N, C, N, C), by torch.autograd.functional; loss(f, theta) of the network's function."""
    net = copy.deepcopy(net)
    named = dict(net.named_parameters())

    def f(t: Tensor, inputs: Tensor) -> Tensor:
        parts = t.split([p.numel() for p in named.values()])
        weights = {n: q.reshape(p.shape) for (n, p), q in zip(named.items(), parts, strict=True)}
        return torch.func.functional_call(net, weights, inputs)

    hessian = torch.autograd.functional.hessian(lambda t: loss(f, t), theta)
    assert torch.linalg.eigvalsh(hessian)[0] > 0
    j = torch.autograd.functional.jacobian(lambda t: f(t, x_test), theta)
    flat = j.flatten(0, 1)
    return (flat @ torch.linalg.solve(hessian, flat.T)).reshape(*j.shape[:2], *j.shape[:2])


@pytest.mark.parametrize("step", [1e-3, 1.7])
def test_b23_exact_on_the_tangent_model_for_any_step(step: float) -> None:
    s = reference.problem_r()
    precision = s.precision[reference.index(s.net, tensors(s.net))]
    expected = dense(s.net, s.x, s.x_test[:5], precision, s.noise)[range(5), :, range(5)]
    for form in ("central", "signed"):
        hfl = HessianFreeLaplace(
            s.net, groups="tensor", precision=s.precision, noise=s.noise, model="tangent", step=step, form=form,
            tolerance=1e-8,
        )  # fmt: skip
        assert relative(hfl.fit((s.x, s.y)).covariance(s.x_test[:5]), expected) < 1e-8
        assert hfl.unconverged == 0


def test_b23_many_outputs_with_batch_norm() -> None:
    s = reference.batchnorm_net(outputs=3)
    precision = s.precision[reference.index(s.net, tensors(s.net))]
    hfl = HessianFreeLaplace(
        s.net, groups="tensor", precision=s.precision, noise=s.noise, model="tangent", step=1.0, tolerance=1e-8
    ).fit((s.x, s.y))
    n = 3
    expected = dense(s.net, s.x, s.x_test[:n], precision, s.noise)[range(n), :, range(n)]
    assert relative(hfl.covariance(s.x_test[:n]), expected) < 1e-7
    predictive = hfl.predict(s.x_test[:n])
    assert relative(predictive.latent.covariance_matrix, expected) < 1e-7
    noisy = expected + s.noise * torch.eye(3, dtype=DOUBLE)
    assert relative(predictive.covariance_matrix, noisy) < 1e-7
    j = reference.jacobian(s.net, s.x).flatten(0, 1)
    theta = reference.theta(s.net)
    t = s.y.reshape(-1) - reference.outputs(s.net, s.x).reshape(-1) + j @ theta
    theta_star = torch.linalg.solve(j.T @ j / s.noise + precision.diag(), j.T @ t / s.noise)
    mean = reference.outputs(s.net, s.x_test[:n]) + reference.jacobian(s.net, s.x_test[:n]) @ (theta_star - theta)
    assert relative(predictive.mean, mean) < 1e-7


def test_b24_amortised_gives_covariances_with_the_mean_prediction() -> None:
    s = reference.batchnorm_net(outputs=3)
    precision = s.precision[reference.index(s.net, tensors(s.net))]
    hfl = HessianFreeLaplace(
        s.net, groups="tensor", precision=s.precision, noise=s.noise, model="tangent", step=1.0, tolerance=1e-9,
        amortised=True,
    ).fit((s.x, s.y))  # fmt: skip
    joint = dense(s.net, s.x, s.x_test, precision, s.noise)
    found = hfl.average_covariance(s.x_test)
    assert relative(found, joint.mean(2)) < 1e-8
    variance = joint[range(len(joint)), :, range(len(joint))]
    assert relative(found, variance) > 0.3  # the negative control: it is no variance
    with pytest.raises(ValueError, match="no variances"):
        hfl.predict(s.x_test)


@pytest.mark.parametrize(("form", "step", "bound"), [
    ("central", 1e-3, 1e-4), ("central", 1e-4, 1e-5), ("signed", 1e-4, 1e-3), ("absolute", 1e-4, 1e-3),
])  # fmt: skip
def test_network_has_the_full_hessian_and_not_the_gauss_newton_matrix(form: str, step: float, bound: float) -> None:
    net, x, y, x_test = curve()
    hfl = HessianFreeLaplace(net, noise=NOISE, step=step, form=form).fit((x, y))
    theta = hfl.state_dict()["theta"]

    def loss(f, t: Tensor) -> Tensor:
        return (f(t, x) - y).square().sum() / (2 * NOISE) + 0.5 * t.square().sum()

    expected = hessian_covariance(theta, net, loss, x_test)[range(5), 0, range(5), 0]
    found = hfl.covariance(x_test)[:, 0, 0]
    assert float((found / expected - 1).abs().max()) < bound
    moved = copy.deepcopy(net)
    nn.utils.vector_to_parameters(theta, moved.parameters())
    precision = torch.ones(len(theta), dtype=DOUBLE)
    gauss_newton = dense(moved, x, x_test, precision, NOISE)[range(5), 0, range(5), 0]
    assert float((found / gauss_newton - 1).abs().max()) > 0.02
    predictive = hfl.predict(x_test)
    torch.testing.assert_close(predictive.mean, moved(x_test)[:, 0].detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(predictive.variance, found + NOISE, rtol=1e-8, atol=0)


@pytest.mark.parametrize("outputs", [1, 3])
def test_classification_has_the_full_hessian(outputs: int) -> None:
    with reference.seeded(1) as generator:
        x = torch.randn(30, 2, generator=generator, dtype=DOUBLE)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long() * (outputs > 1)
        net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, outputs)).double()

        def likelihood(f: Tensor) -> Tensor:
            if outputs == 1:
                return nn.functional.binary_cross_entropy_with_logits(f[:, 0], y.double(), reduction="sum")
            return nn.functional.cross_entropy(f, y, reduction="sum")

        reference.train(net, lambda: likelihood(net(x)) / 30, 200)
    hfl = HessianFreeLaplace(net, "classification", step=1e-3, tolerance=1e-7).fit((x, y))
    x_test = x[:4] * 1.5
    expected = hessian_covariance(
        hfl.state_dict()["theta"], net, lambda f, t: likelihood(f(t, x)) + 0.5 * t.square().sum(), x_test
    )[range(4), :, range(4)]
    found = hfl.covariance(x_test)
    assert relative(found, expected) < 1e-5
    predictive = hfl.predict(x_test)
    mean = predictive.latent.mean.reshape(4, outputs)
    scaled = mean / (1 + torch.pi / 8 * expected.diagonal(dim1=1, dim2=2)).sqrt()
    probs = scaled[:, 0].sigmoid() if outputs == 1 else scaled.softmax(-1)
    torch.testing.assert_close(predictive.probs, probs, rtol=1e-5, atol=1e-6)


def test_control_reports_the_drift_of_the_weights() -> None:
    trained, x, y, _ = curve()
    net = copy.deepcopy(trained)
    nn.utils.vector_to_parameters(1.05 * reference.theta(trained), net.parameters())
    hfl = HessianFreeLaplace(net, noise=NOISE).fit((x, y))
    first = hfl.drift
    theta = hfl.state_dict()["theta"]
    assert first.converged
    assert first.gradient_after < 1e-6 < 1e-2 < first.gradient_before
    assert first.weights == pytest.approx(
        float((theta - reference.theta(net)).norm() / reference.theta(net).norm()), rel=1e-9
    )
    moved = copy.deepcopy(net)
    nn.utils.vector_to_parameters(theta, moved.parameters())
    assert first.outputs == pytest.approx(float((moved(x) - net(x)).detach().abs().max()), rel=1e-9)
    again = HessianFreeLaplace(moved, noise=NOISE).fit((x, y)).drift
    assert again.weights < 1e-6
    assert again.outputs < 1e-6


def test_network_in_single_precision_is_perturbed_in_double() -> None:
    net, x, y, x_test = curve()
    single = copy.deepcopy(net).float()
    rounded = copy.deepcopy(single).double()
    found, expected = (
        HessianFreeLaplace(n, noise=NOISE, model="tangent", step=1e-4).fit((x, y)).covariance(x_test)
        for n in (single, rounded)
    )
    assert relative(found, expected) < 1e-8


def test_little_memory_and_no_vmap_change_nothing() -> None:
    net, x, y, x_test = curve()
    options = {"noise": NOISE, "model": "tangent", "tolerance": 1e-8}
    expected = HessianFreeLaplace(net, **options).fit((x, y)).covariance(x_test[:2])
    small = HessianFreeLaplace(net, max_memory="300KiB", **options).fit((x, y))
    assert relative(small.covariance(x_test[:2]), expected) < 1e-7
    loops = HessianFreeLaplace(net, **options).fit((x, y))
    loops._loss._frozen.vectorized = False
    loops._loss._frozen.twice_differentiable = False
    assert relative(loops.covariance(x_test[:1]), expected[:1]) < 1e-5


def test_absolute_form_says_when_an_output_changed_its_sign(caplog: pytest.LogCaptureFixture) -> None:
    net, x, y, x_test = curve()
    with caplog.at_level(logging.WARNING, "ntkgp"):
        hfl = HessianFreeLaplace(net, noise=NOISE, form="absolute", step=20.0, model="tangent").fit((x, y))
        signed = HessianFreeLaplace(net, noise=NOISE, form="signed", step=20.0, model="tangent").fit((x, y))
        assert not caplog.records
        found = hfl.covariance(x_test)
    assert any("through zero" in r.getMessage() for r in caplog.records)
    assert relative(found, signed.covariance(x_test)) < 1e-6


def test_unreached_gradient_norms_are_said(caplog: pytest.LogCaptureFixture) -> None:
    net, x, y, _ = curve()
    net = copy.deepcopy(net)
    nn.utils.vector_to_parameters(1.05 * reference.theta(net), net.parameters())
    with caplog.at_level(logging.WARNING, "ntkgp"):
        hfl = HessianFreeLaplace(net, noise=NOISE, max_iterations=1).fit((x, y))
    assert not hfl.drift.converged
    assert any("ended with a gradient" in r.getMessage() for r in caplog.records)


def test_scale_invariant_network_is_refused() -> None:
    s = reference.problem_r()
    with pytest.raises(ValueError, match="does not change with the scale"):
        HessianFreeLaplace(s.net).fit((s.x, s.y))
    s = reference.layernorm_cnn()
    with pytest.raises(ValueError, match="does not change with the scale"):
        HessianFreeLaplace(s.net, "classification").fit((s.x, s.y))


def test_users_network_and_random_state_are_left_alone() -> None:
    s = reference.batchnorm_net(outputs=2)
    net = copy.deepcopy(s.net).train()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    hfl = HessianFreeLaplace(net, noise=0.1, model="tangent").fit((s.x, s.y[:, :2]))
    hfl.predict(s.x_test[:1])
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_state_dict_of_tensors_restores_predictions() -> None:
    net, x, y, x_test = curve()
    hfl = HessianFreeLaplace(net, noise=NOISE).fit((x, y))
    state = hfl.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    other = HessianFreeLaplace(net)
    with pytest.raises(ValueError, match="example"):
        other.load_state_dict(state)
    loaded = other.load_state_dict(state, example=x[:2]).predict(x_test[:2])
    expected = hfl.predict(x_test[:2])
    torch.testing.assert_close(loaded.mean, expected.mean, rtol=0, atol=0)
    torch.testing.assert_close(loaded.variance, expected.variance, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="missing"):
        other.load_state_dict({name: state[name] for name in ("method", "theta")})


def test_default_noise_is_the_mean_square_of_the_residuals_of_each_output() -> None:
    s = reference.batchnorm_net(outputs=3)
    hfl = HessianFreeLaplace(s.net, model="tangent").fit((s.x, s.y))
    expected = (reference.outputs(s.net, s.x) - s.y).square().mean(0)
    torch.testing.assert_close(hfl.state_dict()["noise"], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "ggn"}, "model: expected one of"),
        ({"form": "double"}, "form: expected one of"),
        ({"step": 0.0}, "step: expected a positive number"),
        ({"tolerance": float("nan")}, "tolerance: expected a positive number"),
        ({"precision": -1.0}, "precision: expected positive numbers"),
        ({"precision": torch.ones(7)}, "precision: expected a number or shape"),
        ({"noise": torch.ones(7)}, "noise: expected a number or shape"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    net, x, y, _ = curve()
    with pytest.raises(ValueError, match=message):
        HessianFreeLaplace(net, **options).fit((x, y))


def test_before_fit() -> None:
    net, x, _, _ = curve()
    with pytest.raises(RuntimeError, match="fit"):
        HessianFreeLaplace(net).predict(x)
    with pytest.raises(RuntimeError, match="fit"):
        HessianFreeLaplace(net).state_dict()


class _Rosenbrock:
    """Two curved valleys at once, with negative curvature on the way."""

    def value_and_gradient(self, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            value = self._values(theta, index)
            return value.detach(), torch.autograd.grad(value.sum(), theta)[0]

    def hessian_product(self, theta: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            slope = torch.autograd.grad(self._values(theta, index).sum(), theta, create_graph=True)[0]
            return torch.autograd.grad((slope * vectors).sum(), theta)[0]

    @staticmethod
    def _values(theta: Tensor, index: Tensor) -> Tensor:
        x, y = theta.T
        return (index + 1.0 - x).square() + 100 * (y - x.square()).square()


def test_newton_cg_minimises_functions_side_by_side() -> None:
    start = torch.tensor([[-1.2, 1.0], [-1.5, 3.0]], dtype=DOUBLE)
    found = minimise(
        _Rosenbrock(), start, torch.full((2,), 1e-10, dtype=DOUBLE), lambda v: v, forcing=1e-3, max_iterations=200,
    )  # fmt: skip
    assert found.converged.all()
    expected = torch.tensor([[1.0, 1.0], [2.0, 4.0]], dtype=DOUBLE)
    torch.testing.assert_close(found.theta, expected, rtol=1e-8, atol=1e-8)


class _Wells:
    """Σ c_i (θ_i² − 1)² with c from 1 to 10⁴: far from its minima the Hessian is indefinite and ill-conditioned."""

    def __init__(self, size: int) -> None:
        self.scales = torch.logspace(0, 4, size, dtype=DOUBLE)

    def value_and_gradient(self, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        rest = theta.square() - 1
        return (self.scales * rest.square()).sum(-1), 4 * self.scales * theta * rest

    def hessian_product(self, theta: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
        return self.scales * (12 * theta.square() - 4) * vectors


def test_newton_cg_keeps_what_it_found_before_negative_curvature() -> None:
    start = torch.linspace(0.3, 2.0, 40, dtype=DOUBLE).unsqueeze(0)
    found = minimise(
        _Wells(40), start, torch.tensor([1e-8], dtype=DOUBLE), lambda v: v, forcing=1e-3, max_iterations=40,
    )  # fmt: skip
    # With gradient steps wherever the curvature is negative it is not there after 300 iterations.
    assert found.converged.all()
    torch.testing.assert_close(found.theta.abs(), torch.ones_like(start), rtol=1e-8, atol=1e-8)


def test_refits_that_a_kink_holds_are_an_error() -> None:
    # Seed 2 ends with a data point on a kink: every refit stays where it is, which would be a variance of zero.
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).unsqueeze(-1)
    hfl = HessianFreeLaplace(net, noise=0.01).fit((x, x.abs()))
    with pytest.raises(RuntimeError, match="6 of 6 refits did not follow their perturbation"):
        hfl.predict(x)
