"""The evidence of real networks through ExactNTKGP: deep, normalised, several outputs."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from torch import nn

import ntkgp
from ntkgp.evidence import fit_evidence
from tests.evidence import dense

POINTS = 14


def network(outputs: int, width: int = 6) -> nn.Module:
    """Three hidden layers with LayerNorm (affine) in between, float64, trained briefly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(2, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width), nn.LayerNorm(width)]
        layers += [nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)]
        return nn.Sequential(*layers).double()


def inputs() -> torch.Tensor:
    return dense.randn(dense.generator(0), POINTS, 2)


def explicit(model, x: torch.Tensor) -> dense.Linear:
    """The tangent model of the network with its Jacobian stored whole."""
    lin = model.lin
    jacobian = lin.jacobian(x).double().reshape(-1, lin.num_parameters)
    blocks = [jacobian[:, lin.groups.index == g] for g in range(len(lin.groups.names))]
    theta = [lin.theta[lin.groups.index == g].double() for g in range(len(lin.groups.names))]
    return dense.Linear(blocks, theta, lin(x).double().reshape(-1))


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_evidence_is_gpytorchs_marginal_likelihood(outputs):
    x = inputs()
    net = network(outputs)
    y = net(x).detach() + 0.3 * dense.randn(dense.generator(1), POINTS, outputs)
    y = y[:, 0] if outputs == 1 else y
    model = ntkgp.ExactNTKGP(x, y, gpytorch.likelihoods.GaussianLikelihood().double(), ntkgp.LinearizedNetwork(net, x))
    reports = {method: fit_evidence(model, method=method) for method in ("lbfgs", "mackay")}
    report = reports["mackay"]
    assert report.converged, report.warnings
    assert report.log_evidence == pytest.approx(reports["lbfgs"].log_evidence, abs=1e-7)
    tangent = explicit(model, x)
    t = y.reshape(-1) - tangent.offset
    value = dense.marginal(tangent, t, report.precision, report.noise.expand(len(t)))
    assert report.log_evidence == pytest.approx(float(value), rel=1e-9)
    model.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    with gpytorch.settings.fast_computations(False, False, False):
        stock = mll(model(*model.train_inputs), model.train_targets).detach() * POINTS * outputs
    assert float(stock.sum()) == pytest.approx(report.log_evidence, rel=1e-7)


def test_classification_evidence_is_the_weight_space_one():
    x = inputs()
    net = network(4)
    labels = torch.randint(4, (POINTS,), generator=dense.generator(2))
    model = ntkgp.ExactNTKGP(x, labels, ntkgp.CategoricalLikelihood(num_classes=4), ntkgp.LinearizedNetwork(net, x))
    report = fit_evidence(model)
    tangent = explicit(model, x)
    star = dense.softmax_mode(tangent, labels, 4, report.precision)
    value = dense.softmax_joint(tangent, labels, 4, report.precision, star, tangent.network.reshape(POINTS, 4))
    assert report.log_evidence == pytest.approx(float(value), rel=1e-8)


@pytest.mark.parametrize("k", [1e-3, 10.0, 1e3])
def test_proposition_3_on_a_layernorm_network(k):
    """Weights in front of a LayerNorm times k, refitted: the predictions stay (Antoran et al. 2022, proposition 3)."""
    x, test = inputs(), 2.0 * dense.randn(dense.generator(5), 5, 2)
    predictions = []
    for scale in (1.0, k):
        net = network(1)
        for module in net:
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.0
        y = net(x)[:, 0].detach() + 0.3 * dense.randn(dense.generator(1), POINTS)
        with torch.no_grad():
            net[0].weight.mul_(scale)
            net[0].bias.mul_(scale)
            net[3].weight.div_(scale)
            net[3].bias.div_(scale)
        model = ntkgp.ExactNTKGP(
            x, y, gpytorch.likelihoods.GaussianLikelihood().double(), ntkgp.LinearizedNetwork(net, x)
        )
        assert sum(model.lin.groups.is_normalized) == 2
        report = fit_evidence(model)
        assert report.converged, report.warnings
        posterior = model.eval()(test)
        predictions.append((posterior.mean.detach(), posterior.covariance_matrix.detach()))
    for before, after in zip(*predictions, strict=True):
        assert float((after - before).abs().max()) <= 1e-6 * float(before.abs().max())


def test_a_network_that_fits_worse_than_its_tangent_model_is_reported() -> None:
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).unsqueeze(-1)
    y = torch.sin(3 * x) + 0.05 * dense.randn(dense.generator(3), 60, 1)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).double()  # untrained
    report = ntkgp.from_network(net, (x, y)).report
    ratio = float(report.residual_noise / report.noise)
    assert ratio > 1.5
    assert any(f"training error is {ratio:.2g} times the noise" in text for text in report.warnings)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    report = ntkgp.from_network(net, (x, y)).report
    assert float(report.residual_noise / report.noise) < 1.5
    assert not any("training error" in text for text in report.warnings)
