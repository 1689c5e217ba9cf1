"""The names that users type: each call below can be made in exactly this form, and what it returns has these parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import gpytorch
import pytest
import torch
from torch import nn

import ntkgp
from ntkgp.evidence import EvidenceReport

GIVEN: Any = object()  # some argument


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A call that is not made."""
    return function, arguments, options


CALLS = {
    "LinearizedNetwork": call(ntkgp.LinearizedNetwork, GIVEN, GIVEN, groups="normalization"),
    "lin.jvp": call(ntkgp.LinearizedNetwork.jvp, GIVEN, GIVEN, GIVEN),
    "lin.vjp": call(ntkgp.LinearizedNetwork.vjp, GIVEN, GIVEN, GIVEN),
    "lin.jacobian": call(ntkgp.LinearizedNetwork.jacobian, GIVEN, GIVEN),
    "lin.grams": call(ntkgp.LinearizedNetwork.grams, GIVEN, GIVEN, None, max_memory="2GiB", progress=False),
    "lin.pack": call(ntkgp.LinearizedNetwork.pack, GIVEN, GIVEN),
    "lin.unpack": call(ntkgp.LinearizedNetwork.unpack, GIVEN, GIVEN),
    "ExactNTKGP": call(ntkgp.ExactNTKGP, GIVEN, GIVEN, GIVEN, GIVEN, mean="network"),
    "CategoricalLikelihood": call(ntkgp.CategoricalLikelihood, num_classes=10),
    "NystromNTKGP": call(ntkgp.NystromNTKGP, GIVEN, GIVEN, GIVEN, num_landmarks=2000, num_features=20, residual=False),
    "NystromNTKGP.fit": call(ntkgp.NystromNTKGP.fit, GIVEN, GIVEN),
    "VariationalNTKGP": call(ntkgp.VariationalNTKGP, GIVEN, GIVEN, GIVEN, num_data=GIVEN),
    "VariationalNTKGP.fit": call(ntkgp.VariationalNTKGP.fit, GIVEN, GIVEN),
    "fit_evidence": call(ntkgp.fit_evidence, GIVEN, method="mackay", at="theta_star"),
    "from_network": call(ntkgp.from_network, GIVEN, GIVEN, likelihood="regression", inference="auto"),
    "Laplace": call(ntkgp.baselines.Laplace, GIVEN, "regression", structure="full"),
    "HessianFreeLaplace": call(ntkgp.baselines.HessianFreeLaplace, GIVEN, "regression"),
    "L2M": call(ntkgp.baselines.L2M, GIVEN, "regression", variant="corrected"),
    "VariationalLaplace": call(ntkgp.baselines.VariationalLaplace, GIVEN, "regression"),
    "Baseline.fit": call(ntkgp.baselines.Baseline.fit, GIVEN, GIVEN),
    "Baseline.predict": call(ntkgp.baselines.Baseline.predict, GIVEN, GIVEN),
    "compare": call(ntkgp.compare, GIVEN, GIVEN, GIVEN, methods=None, ood_data=None),
    "Comparison.to_csv": call(ntkgp.Comparison.to_csv, GIVEN, GIVEN),
    "Comparison.plot": call(ntkgp.Comparison.plot, GIVEN),
    "ParallelBeam": call(ntkgp.inverse.ParallelBeam, GIVEN, GIVEN, None),
    "FanBeam": call(ntkgp.inverse.FanBeam, GIVEN, GIVEN, None, source_origin=GIVEN, source_detector=GIVEN),
    "Rays": call(ntkgp.inverse.Rays, GIVEN, GIVEN, GIVEN),
    "RayTransform": call(ntkgp.inverse.RayTransform, GIVEN),
    "A.adjoint": call(ntkgp.inverse.RayTransform.adjoint, GIVEN, GIVEN),
    "A.fbp": call(ntkgp.inverse.RayTransform.fbp, GIVEN, GIVEN),
    "DeepImagePrior": call(ntkgp.inverse.DeepImagePrior, GIVEN),
    "DeepImagePrior.fit": call(ntkgp.inverse.DeepImagePrior.fit, GIVEN, GIVEN),
    "DeepImagePrior.linearize": call(ntkgp.inverse.DeepImagePrior.linearize, GIVEN),
    "InverseNTKGP": call(ntkgp.InverseNTKGP, GIVEN, GIVEN, GIVEN, GIVEN),
    "fit_evidence with a prior": call(ntkgp.fit_evidence, GIVEN, prior=GIVEN),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_keep_their_form_and_their_defaults(name: str) -> None:
    function, arguments, options = CALLS[name]
    signature = inspect.signature(function)
    signature.bind(*arguments, **options)
    for option, value in options.items():
        default = signature.parameters[option].default
        assert value is GIVEN or default in (value, inspect.Parameter.empty), f"{option}: {default!r}"


def test_everything_public_is_documented_and_listed() -> None:
    for room in (ntkgp, ntkgp.baselines, ntkgp.inverse, ntkgp.kernels, ntkgp.means, ntkgp.likelihoods):
        for name in room.__all__:
            assert inspect.getdoc(getattr(room, name)), f"{room.__name__}.{name}"


def test_a_report_has_the_numbers_that_are_promised() -> None:
    names = {field.name for field in fields(EvidenceReport)}
    assert names >= {
        "log_evidence", "precision", "noise", "effective_dimension", "theta_star_norm", "converged", "warnings",
        "jitter", "eigenvalues_cut", "pruned", "theta_shift",
    }  # fmt: skip


def test_what_a_linearised_network_and_its_model_have() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    lin = ntkgp.LinearizedNetwork(net, x)
    assert lin.theta.shape == (lin.num_parameters,)
    assert (lin.num_outputs, lin.output_shape) == (3, (3,))
    groups = lin.groups
    assert len(groups.names) == len(groups.sizes) == len(groups.is_normalized) == len(groups.verify(x))
    assert groups.names[0] in str(groups)
    tangents, cotangents = torch.randn(2, lin.num_parameters), torch.randn(2, 5, 3)
    assert [lin(x).shape, lin.jvp(x, tangents[0]).shape, lin.jvp(x, tangents).shape] == [(5, 3), (5, 3), (2, 5, 3)]
    assert lin.vjp(x, cotangents[0]).shape == lin.theta.shape
    assert lin.vjp(x, cotangents).shape == tangents.shape
    assert lin.jacobian(x).shape == (5, 3, lin.num_parameters)
    assert (lin.grams(x).shape, lin.grams(x).dtype) == ((len(groups), 15, 15), torch.float64)
    assert torch.equal(lin.unpack(lin.pack(x)), x)
    model = ntkgp.ExactNTKGP(x, y, gpytorch.likelihoods.GaussianLikelihood(), lin)
    assert isinstance(model.kernel, ntkgp.kernels.NeuralTangentKernel)
    assert isinstance(model.kernel, gpytorch.kernels.Kernel)
    assert model.kernel.precision.shape == (len(groups),)
    latent = model.eval()(lin.pack(x))
    assert isinstance(latent, gpytorch.distributions.MultitaskMultivariateNormal)
    assert isinstance(model.likelihood(latent), gpytorch.distributions.MultitaskMultivariateNormal)
    assert callable(model.posterior)


def test_a_ray_transform_is_a_module_and_a_linear_operator() -> None:
    geometry = ntkgp.inverse.ParallelBeam((6, 6), torch.linspace(0, 3, 4))
    A = ntkgp.inverse.RayTransform(geometry)
    assert isinstance(A, nn.Module)
    image = torch.rand(6, 6, dtype=torch.float64)
    y = A(image)
    assert A.adjoint(y).shape == A.fbp(y).shape == image.shape
    torch.testing.assert_close(A.operator @ image.flatten(), y.flatten())
