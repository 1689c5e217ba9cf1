"""Conditioning a posterior on new observations."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Tensor

import ntkgp
from tests import reference as ref

DOUBLE = torch.float64


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def likelihood(kind: str, n: int) -> gpytorch.likelihoods.Likelihood:
    if kind == "gaussian":
        made = GaussianLikelihood().double()
        made.noise = 0.05
        return made
    if kind == "fixed":
        return FixedNoiseGaussianLikelihood(torch.linspace(0.02, 0.3, 24, dtype=DOUBLE)[:n])
    made = MultitaskGaussianLikelihood(num_tasks=3, rank=1 if kind == "full" else 0).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.linspace(-2.0, -1.0, p.numel(), dtype=DOUBLE).reshape(p.shape))
    return made


def build(kind: str, outputs: int, n: int, mean: str = "posterior") -> tuple[ref.Sample, ntkgp.ExactNTKGP]:
    sample = ref.batchnorm_net(outputs)
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="layer")
    y = sample.y[:n].squeeze(-1) if outputs == 1 else sample.y[:n]
    model = ntkgp.ExactNTKGP(sample.x[:n], y, likelihood(kind, n), lin, mean).eval()
    model.kernel.precision = torch.linspace(0.5, 3.0, len(lin.groups), dtype=DOUBLE)
    return sample, model


CASES = [("gaussian", 1), ("gaussian", 3), ("fixed", 1), ("fixed", 3), ("tasks", 3), ("full", 3)]


def new(sample: ref.Sample, kind: str, outputs: int, rows: slice) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x, y = sample.x[rows], sample.y[rows]
    noise = torch.linspace(0.02, 0.3, 24, dtype=DOUBLE)[rows]
    if outputs == 1:
        return x, y.squeeze(-1), {"noise": noise} if kind == "fixed" else {}
    return x, y, {"noise": noise.unsqueeze(-1).expand(-1, 3)} if kind == "fixed" else {}


@pytest.mark.parametrize(("kind", "outputs"), CASES)
def test_sequential_conditioning_is_batch_conditioning(kind: str, outputs: int) -> None:
    sample, base = build(kind, outputs, 14)
    _, whole = build(kind, outputs, 20)
    expected = whole(sample.x_test)
    x, y, extra = new(sample, kind, outputs, slice(14, 20))
    at_once = base.get_fantasy_model(x, y, **extra)
    x, y, extra = new(sample, kind, outputs, slice(14, 16))
    nested = base.get_fantasy_model(x, y, **extra)
    x, y, extra = new(sample, kind, outputs, slice(16, 20))
    nested = nested.get_fantasy_model(x, y, **extra)
    for model in (at_once, nested):
        found = model(sample.x_test)
        assert error(found.mean, expected.mean) < 1e-9
        assert error(found.covariance_matrix, expected.covariance_matrix) < 1e-9
        if kind != "fixed":
            assert error(model.likelihood(found).variance, whole.likelihood(expected).variance) < 1e-9


def test_the_covariance_does_not_depend_on_the_mean() -> None:
    sample, network = build("gaussian", 3, 14, "network")
    _, posterior = build("gaussian", 3, 14)
    x, y, _ = new(sample, "gaussian", 3, slice(14, 20))
    a, b = network.get_fantasy_model(x, y)(sample.x_test), posterior.get_fantasy_model(x, y)(sample.x_test)
    assert error(a.covariance_matrix, b.covariance_matrix) < 1e-10
    # What the network predicts exactly teaches it nothing.
    found = network.get_fantasy_model(x, network(x).mean)(sample.x_test)
    assert error(found.mean, network(sample.x_test).mean) < 1e-10


@pytest.mark.parametrize("outputs", [1, 3])
def test_batches_of_fantasies(outputs: int) -> None:
    sample, base = build("gaussian", outputs, 14)
    inputs = torch.stack([sample.x[14:16], sample.x[16:18]])  # (2, q=2, D)
    event = (2,) if outputs == 1 else (2, outputs)
    targets = torch.randn(5, 2, *event, dtype=DOUBLE)
    model = base.get_fantasy_model(inputs, targets)
    assert model.batch_shape == (5, 2)
    latent = model(sample.x_test)
    assert latent.mean.shape == (5, 2, 6, *event[1:])
    same = base.get_fantasy_model(inputs[0], targets[:, 0])
    assert same.batch_shape == (5,)
    batch_test = torch.stack([sample.x_test[:3], sample.x_test[3:]])
    for s in range(5):
        for b in range(2):
            single = base.get_fantasy_model(inputs[b], targets[s, b])
            assert error(latent.mean[s, b], single(sample.x_test).mean) < 1e-10
            covariance = latent.covariance_matrix.expand(5, 2, 6 * outputs, 6 * outputs)[s, b]
            assert error(covariance, single(sample.x_test).covariance_matrix) < 1e-9
            assert error(model(batch_test).mean[s, b], single(batch_test[b]).mean) < 1e-10
        assert error(same(sample.x_test).mean[s], latent.mean[s, 0]) < 1e-10
    nested = model.get_fantasy_model(sample.x[18:19], torch.zeros(1, *event[1:], dtype=DOUBLE))
    assert nested(sample.x_test).mean.shape == (5, 2, 6, *event[1:])
    single = base.get_fantasy_model(
        torch.cat([inputs[1], sample.x[18:19]]), torch.cat([targets[3, 1], torch.zeros(1, *event[1:], dtype=DOUBLE)])
    )
    assert error(nested(sample.x_test).mean[3, 1], single(sample.x_test).mean) < 1e-9


def test_given_noise_is_used() -> None:
    sample, base = build("gaussian", 1, 14)
    x, y, _ = new(sample, "gaussian", 1, slice(14, 18))
    free = base.get_fantasy_model(x, y, noise=torch.full((4,), 0.05, dtype=DOUBLE))(sample.x_test)
    assert error(free.mean, base.get_fantasy_model(x, y)(sample.x_test).mean) < 1e-9
    deaf = base.get_fantasy_model(x, y, noise=torch.full((4,), 1e12, dtype=DOUBLE))(sample.x_test)
    assert error(deaf.mean, base(sample.x_test).mean) < 1e-9
    assert error(deaf.covariance_matrix, base(sample.x_test).covariance_matrix) < 1e-9


def test_derivatives_in_the_new_and_the_test_inputs() -> None:
    sample, base = build("gaussian", 1, 14)
    x, y, _ = new(sample, "gaussian", 1, slice(14, 16))
    for place in (0, 1):
        pair = [x, sample.x_test[:2]]
        value = lambda pair: base.get_fantasy_model(pair[0], y)(pair[1]).variance.log().sum()  # noqa: E731
        pair[place] = pair[place].clone().requires_grad_()
        slope = torch.autograd.grad(value(pair), pair[place])[0]
        shift = torch.zeros_like(x)
        shift[1, 2] = 1e-5
        moved = [[p.detach() + s * shift * (i == place) for i, p in enumerate(pair)] for s in (1, -1)]
        expected = (value(moved[0]) - value(moved[1])) / 2e-5
        assert float(slope[1, 2]) == pytest.approx(float(expected), rel=1e-5)


def test_the_base_is_unchanged() -> None:
    sample, base = build("gaussian", 3, 14)
    before = base(sample.x_test).mean.clone()
    x, y, _ = new(sample, "gaussian", 3, slice(14, 20))
    base.get_fantasy_model(x, y)(sample.x_test)
    assert torch.equal(base(sample.x_test).mean, before)
    assert len(base.train_inputs[0]) == 14


def test_bad_input() -> None:
    sample, base = build("gaussian", 3, 14)
    x, y, _ = new(sample, "gaussian", 3, slice(14, 20))
    bad = {
        r"targets: expected shape \(\*batch, 6, 3\), got \(5, 3\)": lambda: base.get_fantasy_model(x, y[:5]),
        "targets: NaN or infinite": lambda: base.get_fantasy_model(x, y * float("nan")),
        "inputs: NaN": lambda: base.get_fantasy_model(x * float("nan"), y),
        "inputs: expected": lambda: base.get_fantasy_model(x[:, :2], y),
        r"noise: expected shape \(\*batch, 6, 3\)": lambda: base.get_fantasy_model(x, y, noise=y[:, :1].abs()),
        "noise: expected variances": lambda: base.get_fantasy_model(x, y, noise=-y.abs()),
        r"Y: expected shape \(\*batch, q, 3\)": lambda: base.condition_on_observations(x, y[:, :2]),
    }
    for words, call in bad.items():
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="targets: expected a tensor, got list"):
        base.get_fantasy_model(x, [1.0])
    fixed = build("fixed", 3, 14)[1]
    with pytest.raises(ValueError, match="noise: the likelihood has fixed noise"):
        fixed.get_fantasy_model(x, y)
    cnn = ref.layernorm_cnn(3)
    lin = ntkgp.LinearizedNetwork(cnn.net, cnn.x)
    classes = ntkgp.ExactNTKGP(cnn.x, cnn.y, ntkgp.CategoricalLikelihood(num_classes=3), lin)
    with pytest.raises(ValueError, match="needs a Gaussian likelihood"):
        classes.eval().get_fantasy_model(cnn.x[:1], cnn.y[:1])


@pytest.mark.filterwarnings("ignore:.*not p.d., added jitter:linear_operator.utils.warnings.NumericalWarning")
def test_repeated_test_inputs_have_a_singular_covariance() -> None:
    sample, base = build("gaussian", 3, 14)
    x, y, _ = new(sample, "gaussian", 3, slice(14, 20))
    twice = sample.x_test[:2].repeat(3, 1)
    for model in (base, base.get_fantasy_model(x, y)):
        latent = model(twice)
        assert error(latent.variance[:2], latent.variance[2:4]) < 1e-9
        assert error(latent.covariance_matrix[:6, :6], latent.covariance_matrix[:6, 6:12]) < 1e-9
        draws = latent.rsample(torch.Size([3]))
        assert torch.allclose(draws[:, :2], draws[:, 2:4], atol=1e-2)
        assert torch.isfinite(model.likelihood(latent).variance).all()
