"""Changing anything a prediction depends on, in any order, gives what a fresh model gives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Tensor, nn

import ntkgp

N, T = 9, 5


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(2, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6), nn.LayerNorm(6), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(6, outputs)).double().eval()


def data(outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((N, 2), (N, outputs), (T, 2))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """Dense (N·C, P) by ordinary autograd, row by row."""
    parameters = list(net.parameters())
    rows = []
    for output in net(x).flatten():
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(output, parameters, retain_graph=True)]))
    return torch.stack(rows)


def dense_posterior(
    net: nn.Module, variance: Tensor, noise: Tensor, x: Tensor, y: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """h(θ⋆) and posterior covariance; `variance` 1/λ of every parameter (P,), `noise` (N·C, N·C)."""
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    train, test = jacobian(net, x), jacobian(net, at)
    targets = y.flatten() - net(x).detach().flatten() + train @ theta
    cross = test * variance @ train.T
    gain = torch.linalg.solve(train * variance @ train.T + noise, cross.T).T
    mean = net(at).detach().flatten() - test @ theta + gain @ targets
    return mean, test * variance @ test.T - gain @ cross.T


def check(model: ntkgp.ExactNTKGP, net: nn.Module, noise: Tensor, x: Tensor, y: Tensor, at: Tensor) -> None:
    variance = model.lin.groups.expand(model.kernel.precision.detach().reciprocal())
    mean, covariance = dense_posterior(net, variance, noise, x, y, at)
    found = model(at)
    torch.testing.assert_close(found.mean.flatten(), mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.covariance_matrix, covariance, rtol=1e-9, atol=1e-11)


def build(outputs: int, likelihood: object, mean: str = "posterior") -> tuple:
    net, (x, y, at) = network(outputs), data(outputs)
    lin = ntkgp.LinearizedNetwork(net, x)
    return ntkgp.ExactNTKGP(x, y, likelihood, lin, mean).eval(), net, x, y, at


def noise_by_module(model: ntkgp.ExactNTKGP) -> None:
    model.likelihood.noise_covar.noise = torch.full((N,), 2.0, dtype=torch.float64)


def noise_by_likelihood(model: ntkgp.ExactNTKGP) -> None:
    model.likelihood = ntkgp.models.noise.prepare_likelihood(
        FixedNoiseGaussianLikelihood(torch.full((N,), 2.0, dtype=torch.float64)), model.num_outputs
    )


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("change", [noise_by_module, noise_by_likelihood])
def test_a_changed_fixed_noise_is_used(outputs: int, change: Callable[[ntkgp.ExactNTKGP], None]) -> None:
    """Given noise is no parameter: it was not part of what the kept factors were compared by (error .3 to .4)."""
    model, net, x, y, at = build(outputs, FixedNoiseGaussianLikelihood(torch.full((N,), 0.1, dtype=torch.float64)))
    eye = torch.eye(N * outputs, dtype=torch.float64)
    check(model, net, 0.1 * eye, x, y, at)
    change(model)
    check(model, net, 2.0 * eye, x, y, at)


@pytest.mark.parametrize("outputs", [1, 3])
def test_targets_and_inputs_assigned_directly_are_used(outputs: int) -> None:
    """As BoTorch and user code do it, past `set_train_data`."""
    model, net, x, y, at = build(outputs, GaussianLikelihood())
    noise = model.likelihood.noise.item() * torch.eye(N * outputs, dtype=torch.float64)
    check(model, net, noise, x, y, at)
    model.train_targets = model.train_targets + 5
    check(model, net, noise, x, y + 5, at)
    model.train_inputs = (x + 1,)
    check(model, net, noise, x + 1, y + 5, at)
    model.set_train_data(x, y)
    check(model, net, noise, x, y, at)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("set_again", [False, True])
def test_in_place_changes_of_the_callers_data_do_not_reach_the_model(outputs: int, set_again: bool) -> None:
    """New targets with the old Gram: an error of 1.8, once a hyper-parameter changed."""
    model, net, x, y, at = build(outputs, GaussianLikelihood())
    if set_again:
        model.set_train_data(x, y)
    kept_x, kept_y = x.clone(), y.clone()
    model(at)
    x.mul_(3)
    y.mul_(3)
    model.kernel.precision = 2.0
    noise = model.likelihood.noise.item() * torch.eye(N * outputs, dtype=torch.float64)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check(same, net, noise, kept_x, kept_y, at)


def test_in_place_changes_of_labels_do_not_reach_the_model() -> None:
    x, _, at = data(3)
    labels = torch.arange(N) % 3
    lin = ntkgp.LinearizedNetwork(network(3), x)
    model = ntkgp.ExactNTKGP(x, labels, ntkgp.CategoricalLikelihood(3), lin, "posterior").eval()
    before = model(at).mean.clone()
    labels.zero_()
    model.kernel.precision = 2.0
    model.kernel.precision = 1.0
    torch.testing.assert_close(model(at).mean, before)


@pytest.mark.parametrize("outputs", [1, 3])
def test_draws_are_the_same_functions_whatever_becomes_of_the_model(outputs: int) -> None:
    """The mean of a draw followed the model while its weights did not."""
    for mean in ("network", "posterior"):
        model, _, x, y, at = build(outputs, GaussianLikelihood(), mean)
        draw = model.sample_functions(3, torch.Generator().manual_seed(0))
        before = draw(at)
        model.kernel.precision = 7.0
        model.likelihood.noise = 3.0
        model.mean = "posterior" if mean == "network" else "network"
        model.set_train_data(x + 1, y + 100)
        assert torch.equal(draw(at), before)


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_linear_map_of_draws_is_the_posterior_covariance(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact: unit vectors in place of the random numbers give the columns of A with A Aᵀ = V (law B20)."""
    model, _, _, _, at = build(outputs, GaussianLikelihood())
    model.kernel.precision = torch.logspace(-1, 1, len(model.lin.groups))
    parameters, rows = model.lin.num_parameters, N * outputs
    model(at)  # the passes over the training data draw numbers of their own, to check rules

    def unit_vectors(*shape: object, generator: object = None, **kwargs: object) -> Tensor:
        width = shape[-1] if isinstance(shape[-1], int) else shape[0][-1]  # type: ignore[index]
        start = 0 if width == parameters else parameters
        out = torch.zeros(parameters + rows, width, dtype=torch.float64)
        out[start : start + width] = torch.eye(width, dtype=torch.float64)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", unit_vectors)
        draw = model.sample_functions(parameters + rows)
    columns = (draw(at).flatten(1) - model(at).mean.flatten()).detach()
    torch.testing.assert_close(columns.T @ columns, model(at).covariance_matrix.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("outputs", [1, 2])
def test_what_inference_mode_leaves_behind_can_be_differentiated(outputs: int) -> None:
    model, _, _, _, at = build(outputs, GaussianLikelihood())
    with torch.inference_mode():
        inside = model(at)
        mean, covariance = inside.mean.clone(), inside.covariance_matrix.clone()
    outside = model(at)
    assert torch.equal(outside.mean, mean)
    assert torch.equal(outside.covariance_matrix, covariance)
    x = at.clone().requires_grad_()
    posterior = model(x)
    (gradient,) = torch.autograd.grad(posterior.mean.sum() + posterior.variance.sum(), x)
    assert bool(gradient.abs().sum() > 0)
    model.train()
    loss = -model(model.train_inputs[0]).log_prob(model.train_targets)
    loss.backward()
    assert bool(model.kernel.raw_precision.grad.abs().sum() > 0)


def test_misspelt_options_are_refused_when_assigned() -> None:
    model, *_ = build(1, GaussianLikelihood())
    with pytest.raises(ValueError, match=r"mean: expected one of .* got 'netwrok'"):
        model.mean = "netwrok"
    with pytest.raises(ValueError, match=r"curvature: expected one of .* got 'ful'"):
        model.curvature = "ful"


def test_a_singular_noise_between_outputs() -> None:
    """MultitaskGaussianLikelihood(rank=1) alone has a rank-1 noise, which has no Cholesky factor."""
    likelihood = MultitaskGaussianLikelihood(3, rank=1, has_global_noise=False).double()
    model, net, x, y, at = build(3, likelihood)
    factor = likelihood.task_noise_covar_factor.detach()
    noise = torch.kron(torch.eye(N, dtype=torch.float64), factor @ factor.T)
    assert int(torch.linalg.matrix_rank(noise)) == N
    check(model, net, noise, x, y, at)
    root = model._factors()[0].noise_root
    torch.testing.assert_close(root @ root.mT, noise)


@pytest.mark.parametrize(("precision", "expected"), [(1e-6, 0), (1e-15, 1)])
def test_lost_digits_are_said(precision: float, expected: int, caplog: pytest.LogCaptureFixture) -> None:
    """At λ = 1e-15 variances near the data were 32 instead of .1, without a word."""
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-4))
    model, _, _, _, at = build(1, likelihood)
    model.likelihood.noise = 0.1
    model.kernel.precision = precision
    model(at)
    assert sum("rounding error" in record.message for record in caplog.records) == expected
