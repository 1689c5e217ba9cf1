"""Noise: outputs in different units, and a learned part on top of given variances."""

from __future__ import annotations

import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from torch import Tensor, nn

import ntkgp
from tests.regression.test_stale_and_shared_state import N, T, data, dense_posterior, network


class Scaled(nn.Module):
    """A network whose outputs are given in other units, as buffers."""

    def __init__(self, net: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 2, dtype=torch.float64, generator=generator)
    y = torch.stack([torch.sin(x.sum(-1)), torch.sin(2 * x.sum(-1))], -1)
    y = y + 0.1 * torch.randn(y.shape, dtype=torch.float64, generator=generator)
    net = network(2)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        (net(x) - y).square().mean().backward()
        optimiser.step()
    return net, x, y


@pytest.mark.parametrize("units", [(1e6, 1.0), (1e-6, 1.0), (1.0, 1e-4), (1e6, 1e6), (1e-6, 1e-6)])
def test_noise_follows_the_units_of_each_output(
    trained: tuple[nn.Module, Tensor, Tensor], units: tuple[float, float]
) -> None:
    """Floor and bounds were taken from all outputs together: up to 2931 times the second output's mean square."""
    net, x, y = trained
    # With K -> S K S, t -> S t and D -> S D S for the diagonal S of units, the evidence changes by log det S only.
    scale = torch.tensor(units, dtype=torch.float64)
    reference = ntkgp.from_network(net, (x, y)).report
    report = ntkgp.from_network(Scaled(net, scale).eval(), (x, y * scale)).report
    assert report.converged
    assert not [text for text in report.warnings if "noise variance" in text]
    torch.testing.assert_close(report.noise / scale.square(), reference.noise, rtol=1e-6, atol=0)
    assert report.log_evidence + len(x) * float(scale.log().sum()) == pytest.approx(reference.log_evidence, abs=1e-6)


def test_the_warning_of_a_bound_names_the_constraint(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = trained
    small = 1e-4
    lin = ntkgp.LinearizedNetwork(Scaled(net, torch.tensor(small, dtype=torch.float64)).eval(), x)
    model = ntkgp.ExactNTKGP(x, y * small, GaussianLikelihood(), lin)
    report = ntkgp.fit_evidence(model)
    assert "noise variance at its lower bound: the constraint on it is active" in report.warnings


@pytest.mark.parametrize("outputs", [1, 2])
def test_new_observations_have_the_learned_noise_too(outputs: int) -> None:
    """FixedNoiseGaussianLikelihood(learn_additional_noise=True): the learned part was left out (mean off by .1)."""
    net, (x, y, at) = network(outputs), data(outputs)
    generator = torch.Generator().manual_seed(5)
    given = torch.rand(N, dtype=torch.float64, generator=generator) + 0.1
    likelihood = FixedNoiseGaussianLikelihood(given, learn_additional_noise=True)
    lin = ntkgp.LinearizedNetwork(net, x)
    model = ntkgp.ExactNTKGP(x, y, likelihood, lin, "posterior").eval()
    new_x = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    new_y = torch.randn(3, outputs, dtype=torch.float64, generator=generator)
    new_noise = torch.rand(3, outputs, dtype=torch.float64, generator=generator) + 0.2
    learned = model.likelihood.second_noise.detach()
    assert float(learned) > 0.1
    noise = torch.cat([given.repeat_interleave(outputs), new_noise.flatten()]) + learned
    mean, covariance = dense_posterior(
        net,
        lin.groups.expand(model.kernel.precision.detach().reciprocal()),
        noise.diag(),
        torch.cat([x, new_x]),
        torch.cat([y, new_y]),
        at,
    )
    conditioned = model.condition_on_observations(new_x, new_y, new_noise)
    found = conditioned(at)
    torch.testing.assert_close(found.mean.flatten(), mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.covariance_matrix, covariance, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("outputs", [1, 2])
def test_botorch_adds_the_learned_noise_to_given_variances(outputs: int) -> None:
    pytest.importorskip("botorch")
    x, y, at = data(outputs)
    given = torch.linspace(0.1, 0.9, N, dtype=torch.float64)
    likelihood = FixedNoiseGaussianLikelihood(given, learn_additional_noise=True)
    model = ntkgp.ExactNTKGP(x, y, likelihood, ntkgp.LinearizedNetwork(network(outputs), x)).eval()
    learned = float(model.likelihood.second_noise.detach())
    latent = model.posterior(at).variance
    for noise, known in ((True, float(given.mean())), (torch.full((T, outputs), 0.3, dtype=torch.float64), 0.3)):
        added = model.posterior(at, observation_noise=noise).variance - latent
        torch.testing.assert_close(added, torch.full_like(added, known + learned), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_batch_of_single_points_stays_a_batch_for_botorch(outputs: int) -> None:
    """Rows of shape (1, L), as Conv1d has them: (b, 1, L) was read as b points in one batch."""
    pytest.importorskip("botorch")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 4), nn.Tanh())
    net = nn.Sequential(net, nn.Linear(4, outputs)).double().eval()
    x, y = torch.randn(8, 1, 5, dtype=torch.float64), torch.randn(8, outputs, dtype=torch.float64)
    model = ntkgp.ExactNTKGP(x, y, GaussianLikelihood(), ntkgp.LinearizedNetwork(net, x)).eval()
    at = torch.randn(6, 1, 5, dtype=torch.float64)
    posterior = model.posterior(at)
    assert posterior.mean.shape == (6, 1, outputs)
    torch.testing.assert_close(posterior.mean.squeeze(1), net(at).detach())
    for n in range(6):
        torch.testing.assert_close(posterior.variance[n], model(at[n : n + 1]).variance.reshape(1, outputs))
