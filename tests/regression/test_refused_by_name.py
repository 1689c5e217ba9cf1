"""Mistakes that are refused by name where no test of a room makes them."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import ntkgp
from ntkgp.baselines import L2M, HessianFreeLaplace, Laplace, Point
from ntkgp.baselines.moments import second_moments
from ntkgp.evaluation import datasets, shifts
from ntkgp.evaluation.comparison.scores import collect
from ntkgp.evaluation.training import seeded
from ntkgp.evidence.factory import evidence_objective
from ntkgp.evidence.problem import GaussianEvidence, NoiseModel
from ntkgp.kernels import NeuralTangentKernel, SharedKernel
from ntkgp.models.variational.inducing import checked_output_index
from ntkgp.models.variational.objective import Objective


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lin(net: nn.Module, x: Tensor) -> ntkgp.LinearizedNetwork:
    return ntkgp.LinearizedNetwork(net, x)


@pytest.mark.parametrize("make", [Point, Laplace, HessianFreeLaplace, lambda net: L2M(net)])
def test_comparators_before_their_fit(make, net: nn.Module, x: Tensor) -> None:
    for use in (lambda found: found.predict(x), lambda found: found.state_dict()):
        with pytest.raises(RuntimeError, match=r"call fit\(train_data\) first"):
            use(make(net))


def test_parts_of_comparators_before_their_fit(net: nn.Module) -> None:
    for found, name in ((Laplace(net), "curvature"), (L2M(net), "weight_precision")):
        with pytest.raises(RuntimeError, match=rf"{type(found).__name__}: call fit\(train_data\) first"):
            getattr(found, name)


def test_options_of_laplace_that_do_not_go_together(net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"size": 3, "mask": torch.arange(3)}):
        with pytest.raises(ValueError, match="structure='subnetwork' needs either size"):
            Laplace(net, structure="subnetwork", **options)
    # As with many weights, where θ⋆ takes passes that nobody asked for.
    monkeypatch.setattr("ntkgp.baselines.laplace.evidence._MOST_EXACT", 0)
    fitted = Laplace(net, structure="diagonal", evidence=None).fit((x, x[:, :2]))
    with pytest.raises(RuntimeError, match="theta_star: was not computed"):
        _ = fitted.theta_star
    with pytest.raises(ValueError, match="state: of structure='diagonal', not 'full'"):
        Laplace(net, evidence=None).load_state_dict(fitted.state_dict(), example=x)


@pytest.mark.parametrize(
    ("given", "message"),
    [(3, "optimizer: expected .*got int"), (torch.optim.Adam(nn.Linear(1, 1).parameters()), "are not this network's")],
)
def test_optimisers_of_others(given, message: str, net: nn.Module) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        second_moments(given, net)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("bound", ValueError, "'elbo' or a number"), (True, TypeError, "'elbo' or a number"),
        (0.0, ValueError, r"α in \(0, 1\]"), (1.5, ValueError, r"α in \(0, 1\]"),
    ],
)  # fmt: skip
def test_objectives(name, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"objective: expected {message}"):
        Objective(name, "ggn", False)


def test_kernels_have_no_last_dimension_of_batches(lin: ntkgp.LinearizedNetwork, x: Tensor) -> None:
    for kernel in (NeuralTangentKernel(lin), SharedKernel(gpytorch.kernels.RBFKernel(), 2)):
        with pytest.raises(NotImplementedError, match="last_dim_is_batch"):
            kernel.forward(x, x, last_dim_is_batch=True)


def test_outputs_of_inducing_points(lin: ntkgp.LinearizedNetwork) -> None:
    with pytest.raises(ValueError, match="output_index: expected values 0 … 1, got 0 … 2"):
        checked_output_index(lin, torch.tensor([0, 2]), 2)


def test_images_out_of_their_range() -> None:
    images = torch.full((1, 1, 9, 9), 1.5)
    for corrupt in (
        lambda: datasets.corrupt(images, "noise"), lambda: shifts.common_corruption(images, "impulse_noise", 1)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\]"):
            corrupt()


def test_predictions_that_are_no_distribution_over_targets() -> None:
    with pytest.raises(TypeError, match=r"predict: expected Normal, .* got Gamma"):
        collect(torch.distributions.Gamma(torch.ones(3), torch.ones(3)))
    assert collect(Normal(torch.zeros(3), torch.ones(3)), torch.zeros(3)).log_density.shape == (3,)


def test_points_of_the_evidence() -> None:
    problem = GaussianEvidence(torch.eye(3)[None], torch.ones(3), NoiseModel.homoscedastic(3))
    with pytest.raises(ValueError, match="at must be 'theta_star' or 'theta_map', got 'here'"):
        evidence_objective(problem, "here")
