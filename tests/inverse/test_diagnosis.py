"""Warnings about fitted error maps."""

from __future__ import annotations

import pytest
import torch
from gpytorch.constraints import Positive
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood

from ntkgp.inverse import diagnose
from ntkgp.inverse.diagnosis import group_image_sd
from ntkgp.models.inverse import InverseNTKGP
from tests.models.inverse_problems import DOUBLE, problem


def test_standard_deviation_of_each_group_alone() -> None:
    p = problem("conv", "layer")
    model = p.model()
    state = torch.get_rng_state()
    found = group_image_sd(model, num_probes=100)
    assert torch.equal(state, torch.get_rng_state())
    squares = p.j.square().sum(0)
    exact = torch.stack(
        [(squares[p.index == g]).sum() / (len(p.j) * p.precision[g]) for g in range(len(p.precision))]
    ).sqrt()
    assert torch.allclose(found, exact, rtol=0.25)


def test_pruned_and_collapsed() -> None:
    p = problem("conv", "layer")
    model = p.model()
    assert diagnose(model) == ()
    precision = p.precision.clone()
    precision[0] = 1e14
    model.set_hyperparameters(precision)
    (found,) = diagnose(model)
    assert found.startswith(f"pruned: the groups {model.lin.groups.names[0]} move")
    model.set_hyperparameters(torch.full_like(precision, 1e14))
    assert diagnose(model)[0].startswith("collapsed")


def test_noise_equal_to_the_residuals_and_certain_pixels() -> None:
    p = problem("conv", "layer")
    model = InverseNTKGP(p.y, p.A, GaussianLikelihood(noise_constraint=Positive()).double(), p.lin)
    residual = (p.y.reshape(-1) - p.A.rows @ p.image).square().mean()
    model.set_hyperparameters(p.precision, residual.reshape(1))
    sd = torch.ones(p.A.image_shape, dtype=DOUBLE)
    sd[0] = 0.0
    said = diagnose(model, sd)
    assert any("is the residual of the network" in text for text in said)
    assert any("of the pixels have a standard deviation below" in text for text in said)
    assert diagnose(model, floor=1e9)[0].startswith("collapsed")


def test_known_noise_and_other_models() -> None:
    p = problem("mlp")
    model = InverseNTKGP(p.y, p.A, FixedNoiseGaussianLikelihood(torch.full((len(p.aj),), 0.1, dtype=DOUBLE)), p.lin)
    assert diagnose(model) == ()
    with pytest.raises(TypeError, match="model: expected a ntkgp\\.InverseNTKGP, got Linear"):
        diagnose(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
