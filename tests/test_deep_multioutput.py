"""The exact model on deep, normalised, multi-output networks against the dense oracle."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from torch import Tensor

import ntkgp
from ntkgp.evidence import evidence_objective
from tests import reference

DOUBLE = torch.float64
TOLERANCE = 1e-9
AT = ("theta_star", "theta_map")


def close(found: Tensor | float, expected: Tensor | float) -> bool:
    """Equal to 1e-9 of the largest entry."""
    found, expected = torch.as_tensor(found).detach(), torch.as_tensor(expected).detach()
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def build(sample: reference.Sample, likelihood: gpytorch.likelihoods.Likelihood, noise: float | None):
    """The model with one precision per tensor, and θ̃, J, J⋆, prior precisions per weight, group index."""
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x, groups="tensor")
    model = ntkgp.ExactNTKGP(sample.x, sample.y, likelihood, lin).eval()
    model.set_hyperparameters(sample.precision, None if noise is None else torch.tensor([noise], dtype=DOUBLE))
    theta = reference.theta(sample.net)
    index = reference.index(sample.net, [{name} for name, _ in sample.net.named_parameters()])
    j, j_test = (reference.jacobian(sample.net, x).flatten(0, 1) for x in (sample.x, sample.x_test))
    return model, theta, j, j_test, sample.precision[index], index


def log_of(model: ntkgp.ExactNTKGP) -> Tensor:
    """(log λ, log σ²) of the model as it stands."""
    noise = [] if model.is_classification else [model.likelihood.noise.detach().reshape(-1)]
    return torch.cat([model.kernel.precision.detach(), *noise]).log()


@pytest.mark.parametrize("outputs", [3, 10])
def test_regression_three_hidden_layers_with_batchnorm(outputs: int) -> None:
    sample = reference.batchnorm_net(outputs)
    model, theta, j, j_test, precision, index = build(sample, gpytorch.likelihoods.GaussianLikelihood(), sample.noise)
    noise = torch.full((len(j),), sample.noise, dtype=DOUBLE)
    f, f_test = (reference.outputs(sample.net, x).flatten() for x in (sample.x, sample.x_test))
    targets = sample.y.flatten() - f + j @ theta
    posterior = reference.gaussian_primal(j, targets, precision, noise, index)

    latent = model(sample.x_test)
    assert close(latent.covariance_matrix, j_test @ posterior.covariance @ j_test.T)
    assert close(latent.mean.flatten(), f_test)
    assert float(latent.variance.min()) > 0
    model.mean = "posterior"
    assert close(model(sample.x_test).mean.flatten(), f_test + j_test @ (posterior.theta_star - theta))

    evidence = {at: evidence_objective(model.evidence_problem(), at)(log_of(model)).value for at in AT}
    assert close(evidence["theta_star"], posterior.log_evidence)
    assert close(evidence["theta_map"], reference.map_log_evidence(j, targets, theta, precision, noise, index))


def test_softmax_four_layers_with_layernorm() -> None:
    sample = reference.layernorm_cnn(3)
    model, theta, j, j_test, precision, index = build(sample, ntkgp.CategoricalLikelihood(num_classes=3), None)
    f, f_test = reference.outputs(sample.net, sample.x), reference.outputs(sample.net, sample.x_test)
    offset = f - (j @ theta).view_as(f)
    posterior = reference.softmax_primal(j, offset, f, sample.y, precision, index)

    latent = model(sample.x_test)
    assert close(latent.covariance_matrix, j_test @ posterior.covariance @ j_test.T)
    assert close(latent.mean, f_test)
    model.mean = "posterior"
    assert close(model(sample.x_test).mean, f_test + (j_test @ (posterior.theta_star - theta)).view_as(f_test))

    evidence = {at: evidence_objective(model.evidence_problem(), at)(log_of(model)).value for at in AT}
    assert close(evidence["theta_star"], posterior.log_evidence)
    fit = reference.label_log_likelihood(f, sample.y) - float((precision * theta.square()).sum()) / 2
    assert close(evidence["theta_map"], fit - posterior.logdet / 2)
