"""Agreement with laplace-torch where it is right, and the case where its functional Laplace is not.

Its full GGN with BackPACK is float64 throughout and agrees to rounding. With Curvlinops the GGN is assembled in float32
whatever the network's dtype, which leaves about 1e-7. Its functional Laplace (subset of data) with C > 1 outputs is
right for one hidden layer only.

An environment of its own is needed, without torchvision, which is pulled in though nothing uses it:

    python3 -m venv .venv-laplace
    .venv-laplace/bin/pip install -c constraints.txt . pytest pytest-timeout hypothesis torchmetrics opt_einsum einops \
        curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 asdfghjkl==0.1a4
    .venv-laplace/bin/pip install --no-deps laplace-torch==0.3
    .venv-laplace/bin/pip uninstall -y torchvision
    .venv-laplace/bin/python -m pytest tests/test_laplace_torch.py
"""

from __future__ import annotations

import copy
import functools
import warnings

import gpytorch
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.evidence import evidence_objective
from tests import reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    laplace = pytest.importorskip("laplace")
    curvature = pytest.importorskip("laplace.curvature")

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

DOUBLE = torch.float64
NOISE, PRECISION = 0.09, 2.0
N, N_TEST = 30, 7
BACKENDS = {"backpack": (curvature.BackPackGGN, 1e-9), "curvlinops": (curvature.CurvlinopsGGN, 1e-6)}
TASKS = ("regression-1", "regression-3", "softmax-3")


@functools.cache
def problem(task: str, hidden: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A trained tanh network 3-8-…-8-C with its data and test inputs: (net, x, y, x_test)."""
    kind, outputs = task.split("-")
    c = int(outputs)
    with reference.seeded(hidden) as generator:
        x, x_test = reference._data(generator, n=N, n_test=N_TEST)
        layers: list[nn.Module] = []
        for width in [3] + [8] * (hidden - 1):
            layers += [nn.Linear(width, 8), nn.Tanh()]
        net = nn.Sequential(*layers, nn.Linear(8, c)).double()
        if kind == "softmax":
            y = torch.randint(0, c, (N,), generator=generator)
            return reference.train(net, lambda: nn.functional.cross_entropy(net(x), y), 60), x, y, x_test
        y = torch.sin(x @ torch.randn(3, c, generator=generator, dtype=DOUBLE))
        y = y + 0.1 * torch.randn(y.shape, generator=generator, dtype=DOUBLE)
        return reference.train(net, lambda: (net(x) - y).square().mean(), 300), x, y, x_test


def ours(task: str, hidden: int, groups: str = "single", precision: float | Tensor = PRECISION) -> ntkgp.ExactNTKGP:
    """The exact model at given hyper-parameters."""
    net, x, y, _ = problem(task, hidden)
    softmax = task.startswith("softmax")
    likelihood = ntkgp.CategoricalLikelihood(num_classes=3) if softmax else gpytorch.likelihoods.GaussianLikelihood()
    model = ntkgp.ExactNTKGP(x, y, likelihood, ntkgp.LinearizedNetwork(net, x, groups=groups))
    noise = None if softmax else torch.tensor([NOISE], dtype=DOUBLE)
    model.set_hyperparameters(torch.as_tensor(precision, dtype=DOUBLE), noise)
    return model.eval()


def theirs(task: str, hidden: int, structure: str, backend: str, precision: float | Tensor = PRECISION, **options):
    """laplace-torch on a copy of the same network, since its backends extend the module they are given."""
    net, x, y, _ = problem(task, hidden)
    if task.startswith("regression"):
        options["sigma_noise"] = NOISE**0.5
    la = laplace.Laplace(
        copy.deepcopy(net), "classification" if task.startswith("softmax") else "regression", "all", structure,
        prior_precision=precision, backend=BACKENDS[backend][0], **options,
    )  # fmt: skip
    la.fit(DataLoader(TensorDataset(x, y), batch_size=10))
    return la


def latent_blocks(model: ntkgp.ExactNTKGP, x: Tensor) -> Tensor:
    """C × C covariance of each input, (N, C, C)."""
    dense = model(x).covariance_matrix.detach().reshape(len(x), model.num_outputs, len(x), model.num_outputs)
    return dense.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def latent_variance(la, x: Tensor) -> Tensor:
    """What laplace-torch gives for the same, (N, C, C)."""
    return la._glm_predictive_distribution(x)[1].detach()


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def map_evidence(model: ntkgp.ExactNTKGP) -> float:
    """The classical evidence at θ̃ at the model's present hyper-parameters."""
    objective = evidence_objective(model.evidence_problem(), "theta_map")
    return objective.evaluate(model.kernel.precision.detach()).value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", TASKS)
def test_full_ggn_one_hidden_layer(task: str, backend: str) -> None:
    model, la, tolerance = ours(task, 1), theirs(task, 1, "full", backend), BACKENDS[backend][1]
    x_test = problem(task, 1)[-1]
    assert error(latent_blocks(model, x_test), latent_variance(la, x_test)) < tolerance
    evidence = float(la.log_marginal_likelihood())
    assert abs(map_evidence(model) - evidence) < tolerance * abs(evidence)


@pytest.mark.parametrize("task", TASKS)
def test_full_ggn_three_hidden_layers_and_a_precision_per_tensor(task: str) -> None:
    net, _, _, x_test = problem(task, 3)
    sizes = torch.tensor([p.numel() for p in net.parameters()])
    precision = torch.logspace(-1, 2, len(sizes), dtype=DOUBLE)
    model = ours(task, 3, "tensor", precision)
    la = theirs(task, 3, "full", "backpack", precision.repeat_interleave(sizes))
    assert error(latent_blocks(model, x_test), latent_variance(la, x_test)) < 1e-9
    evidence = float(la.log_marginal_likelihood())
    assert abs(map_evidence(model) - evidence) < 1e-9 * abs(evidence)


@pytest.mark.parametrize("task", ["regression-1", "regression-3"])
def test_joint_covariance(task: str) -> None:
    model, la = ours(task, 1), theirs(task, 1, "full", "backpack")
    x_test = problem(task, 1)[-1]
    mean, covariance = la(x_test, joint=True)
    latent = model(x_test)
    assert error(latent.covariance_matrix.detach(), covariance.detach()) < 1e-9
    assert error(latent.mean.detach().flatten(), mean.detach().flatten()) < 1e-12


def test_probit_probabilities() -> None:
    x_test = problem("softmax-3", 1)[-1]
    model, la = ours("softmax-3", 1), theirs("softmax-3", 1, "full", "backpack")
    expected = la(x_test, link_approx="probit").detach()
    assert error(model.likelihood(model(x_test)).probs.detach(), expected) < 1e-9


def test_fitted_map_evidence_is_a_maximum_of_theirs() -> None:
    model = ours("regression-3", 1)
    report = ntkgp.fit_evidence(model, at="theta_map")
    la = theirs("regression-3", 1, "full", "backpack")

    def evidence(scale_precision: float = 1.0, scale_noise: float = 1.0) -> float:
        precision, sigma = report.precision * scale_precision, (report.noise * scale_noise).sqrt()
        return float(la.log_marginal_likelihood(precision, sigma).detach())

    best = evidence()
    assert report.converged
    assert abs(report.log_evidence - best) < 1e-9 * abs(best)
    around = [evidence(a, b) for a, b in ((1.05, 1), (0.95, 1), (1, 1.05), (1, 0.95))]
    assert best - max(around) > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", ["regression-1", "regression-3"])
def test_functional_laplace_one_hidden_layer(task: str, backend: str) -> None:
    x_test = problem(task, 1)[-1]
    la = theirs(task, 1, "gp", backend, n_subset=N)
    assert error(latent_blocks(ours(task, 1), x_test), latent_variance(la, x_test)) < 1e-9


def test_functional_laplace_three_hidden_layers_three_outputs() -> None:
    """Version 0.3 gives negative variances here (wrong order of the axes of K(x, X)); a corrected one must agree."""
    net, x, _, x_test = problem("regression-3", 3)
    la = theirs("regression-3", 3, "gp", "curvlinops", n_subset=N)
    found = latent_variance(la, x_test)
    j, j_test = (reference.jacobian(net, inputs).flatten(0, 1) for inputs in (x, x_test))
    precision = torch.full((j.shape[1],), PRECISION, dtype=DOUBLE)
    noise = torch.full((len(j),), NOISE, dtype=DOUBLE)
    dense = reference.gaussian_dual_covariance(
        reference.gram(j, precision), reference.gram(j_test, precision, j), reference.gram(j_test, precision), noise
    )
    expected = dense.reshape(N_TEST, 3, N_TEST, 3).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    assert error(latent_blocks(ours("regression-3", 3), x_test), expected) < 1e-9
    negative = float(found.diagonal(dim1=1, dim2=2).min()) < 0
    assert negative or error(found, expected) < 1e-6
