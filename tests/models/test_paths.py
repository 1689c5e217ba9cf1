"""Function samples: reproducible, consistent, and of the right covariance."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from torch import Tensor

import ntkgp
from ntkgp.likelihoods import CategoricalLikelihood
from tests import reference as ref

DOUBLE = torch.float64


def build(outputs: int, mean: str = "posterior", fixed: bool = False) -> tuple[ref.Sample, ntkgp.ExactNTKGP]:
    sample = ref.batchnorm_net(outputs)
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="layer")
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    if fixed:
        likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(torch.linspace(0.01, 0.5, 12, dtype=DOUBLE))
    model = ntkgp.ExactNTKGP(sample.x[:12], sample.y[:12], likelihood, lin, mean).eval()
    model.kernel.precision = torch.linspace(0.5, 3.0, len(lin.groups), dtype=DOUBLE)
    return sample, model


def classifier() -> tuple[ref.Sample, ntkgp.ExactNTKGP]:
    sample = ref.layernorm_cnn(3)
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="layer")
    return sample, ntkgp.ExactNTKGP(sample.x[:12], sample.y[:12], CategoricalLikelihood(num_classes=3), lin).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("make", [lambda: build(1), lambda: build(3), lambda: build(3, "network"), classifier])
def test_reproducible_and_consistent(make) -> None:
    sample, model = make()
    random = torch.get_rng_state()
    functions = model.sample_functions(4, seeded(1))
    values = functions(sample.x_test)
    assert torch.equal(values, functions(sample.x_test))
    assert len(functions) == 4
    c = model.num_outputs
    assert values.shape == ((4, len(sample.x_test)) if c == 1 else (4, len(sample.x_test), c))
    # A function has one value at an input, whatever it is asked beside.
    assert torch.allclose(functions(sample.x_test.flip(0)).flip(1), values, atol=1e-12)
    assert torch.allclose(functions(sample.x_test[2:3]), values[:, 2:3], atol=1e-12)
    assert torch.equal(functions(model.lin.pack(sample.x_test)), values)
    assert torch.equal(model.sample_functions(4, seeded(1))(sample.x_test), values)
    assert not torch.equal(model.sample_functions(4, seeded(2))(sample.x_test), values)
    assert torch.equal(random, torch.get_rng_state())
    assert not torch.equal(values[0], values[1])


def test_without_a_generator_the_global_state_is_used() -> None:
    sample, model = build(1)
    torch.manual_seed(3)
    first = model.sample_functions(2)(sample.x_test)
    torch.manual_seed(3)
    assert torch.equal(model.sample_functions(2)(sample.x_test), first)
    assert not torch.equal(model.sample_functions(2)(sample.x_test), first)


def unit_draws(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    """All standard-normal numbers of S = total draws together become the identity: row s is the unit vector e_s."""
    start = [0]

    def randn(*shape: object, **kwargs: object) -> Tensor:
        size = tuple(shape[0]) if isinstance(shape[0], tuple) else shape
        assert size[0] == total
        out = torch.zeros(total, size[1], dtype=DOUBLE)
        out[start[0] : start[0] + size[1]] = torch.eye(size[1], dtype=DOUBLE)
        start[0] += size[1]
        return out

    monkeypatch.setattr(torch, "randn", randn)


@pytest.mark.parametrize("make", [lambda: build(1), lambda: build(3), lambda: build(3, fixed=True), classifier])
def test_the_linear_map_of_the_draws_has_the_posterior_covariance(make, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, model = make()
    covariance = model(sample.x_test).covariance_matrix.detach()
    mean = model(sample.x_test).mean.detach().reshape(-1)
    noise_rows = len(model.train_inputs[0]) * model.num_outputs
    total = model.lin.num_parameters + noise_rows
    unit_draws(monkeypatch, total)
    functions = model.sample_functions(total)
    monkeypatch.undo()
    centred = functions(sample.x_test).reshape(total, -1) - mean
    assert float((centred.T @ centred - covariance).abs().max() / covariance.abs().max()) < 1e-9


def test_the_mean_is_the_models() -> None:
    for mean in ("network", "posterior"):
        sample, model = build(3, mean)
        functions = model.sample_functions(2, seeded(0))
        shift = model.lin.jvp(sample.x_test, functions.weights)
        assert torch.allclose(functions(sample.x_test) - shift, model(sample.x_test).mean.detach(), atol=1e-12)


def test_samples_are_differentiable_in_the_inputs() -> None:
    sample, model = build(1)
    functions = model.sample_functions(2, seeded(0))
    x, h = sample.x_test[:2].clone().requires_grad_(), 1e-5
    slope = torch.autograd.grad(functions(x).sum(), x)[0]
    shift = torch.zeros_like(slope)
    shift[1, 2] = h
    expected = (functions(x.detach() + shift).sum() - functions(x.detach() - shift).sum()) / (2 * h)
    assert float(slope[1, 2]) == pytest.approx(float(expected), rel=1e-6)


def test_draws_at_the_data_concentrate_there() -> None:
    sample, model = build(1)
    model.likelihood.noise = 1e-4
    values = model.sample_functions(50, seeded(0))(sample.x[:12])
    assert float((values - sample.y[:12].squeeze(-1)).abs().max()) < 0.06


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_bad_number(bad: int) -> None:
    with pytest.raises(ValueError, match="num_samples: expected an integer >= 1"):
        build(1)[1].sample_functions(bad)
