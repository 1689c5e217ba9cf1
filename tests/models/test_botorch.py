"""The models as BoTorch models."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn

import ntkgp
from tests import reference as ref

pytest.importorskip("botorch")

from botorch.acquisition import LogExpectedImprovement, qKnowledgeGradient, qLogNoisyExpectedImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.fit import fit_gpytorch_mll
from botorch.models.model import Model
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler

import ntkgp.botorch

DOUBLE = torch.float64
BOUNDS = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=DOUBLE)


def objective(x: Tensor) -> Tensor:
    return -((x - 0.3).square().sum(-1)) + 0.05 * torch.sin(20 * x[..., 0])


def build(outputs: int = 1, fixed: bool = False, n: int = 12, mean: str = "posterior") -> ntkgp.ExactNTKGP:
    with ref.seeded(0) as generator:
        net = nn.Sequential(
            nn.Linear(2, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 12), nn.LayerNorm(12), nn.Tanh(),
            nn.Linear(12, outputs),
        ).double()  # fmt: skip
        x = 2 * torch.rand(n, 2, generator=generator, dtype=DOUBLE) - 1
    y = torch.stack([objective(x + 0.1 * c) for c in range(outputs)], -1)
    ref.train(net, lambda: (net(x) - y).square().mean(), 150)
    if fixed:
        likelihood = FixedNoiseGaussianLikelihood(torch.linspace(1e-3, 3e-3, n, dtype=DOUBLE))
    elif outputs > 1:
        likelihood = MultitaskGaussianLikelihood(num_tasks=outputs, has_global_noise=False)
    else:
        likelihood = GaussianLikelihood()
    return ntkgp.ExactNTKGP(x, y, likelihood, ntkgp.LinearizedNetwork(net, x), mean)


@pytest.fixture(scope="module")
def fitted() -> ntkgp.ExactNTKGP:
    model = build()
    ntkgp.fit_evidence(model)
    return model.eval()


def test_they_are_botorch_models(fitted: ntkgp.ExactNTKGP) -> None:
    assert isinstance(fitted, Model)
    assert isinstance(fitted.condition_on_observations(fitted.train_inputs[0][:1], torch.zeros(1, 1)), Model)
    assert fitted.batch_shape == torch.Size()
    assert fitted.num_outputs == 1


@pytest.mark.parametrize("outputs", [1, 2])
def test_posterior_shapes_and_values(outputs: int) -> None:
    model = build(outputs).eval()
    x = torch.rand(3, 4, 2, dtype=DOUBLE)
    posterior = model.posterior(x)
    assert posterior.mean.shape == posterior.variance.shape == (3, 4, outputs)
    assert torch.allclose(posterior.mean, model(x).mean.reshape(3, 4, outputs))
    assert torch.allclose(posterior.variance, model(x).variance.reshape(3, 4, outputs))
    assert posterior.rsample(torch.Size([5])).shape == (5, 3, 4, outputs)
    noisy = model.posterior(x, observation_noise=True)
    noise = model.likelihood.task_noises if outputs > 1 else model.likelihood.noise
    assert torch.allclose(noisy.variance, posterior.variance + noise.detach())
    given = torch.rand(3, 4, outputs, dtype=DOUBLE)
    assert torch.allclose(model.posterior(x, observation_noise=given).variance, posterior.variance + given)
    shared = torch.rand(1, outputs, dtype=DOUBLE)
    assert torch.allclose(model.posterior(x, observation_noise=shared).variance, posterior.variance + shared)
    assert torch.allclose(model.posterior(x, observation_noise=False).variance, posterior.variance)
    with pytest.raises(ValueError, match="observation_noise: expected variances"):
        model.posterior(x, observation_noise=torch.rand(3, 5, outputs))


@pytest.mark.parametrize("outputs", [1, 2])
def test_fixed_noise_is_observed_by_its_mean(outputs: int) -> None:
    model = build(outputs, fixed=True).eval()
    x = torch.rand(3, 4, 2, dtype=DOUBLE)
    added = model.posterior(x, observation_noise=True).variance - model.posterior(x).variance
    assert torch.allclose(added, torch.full_like(added, 2e-3), rtol=1e-6)
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    fantasy = model.fantasize(x, sampler)
    assert fantasy.posterior(x).mean.shape == (4, 3, 4, outputs)


def test_a_posterior_transform() -> None:
    model = build(2).eval()
    x = torch.rand(3, 4, 2, dtype=DOUBLE)
    weights = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    found = model.posterior(x, posterior_transform=ScalarizedPosteriorTransform(weights))
    assert torch.allclose(found.mean.squeeze(-1), model.posterior(x).mean @ weights)
    blocks = model(x).covariance_matrix.reshape(3, 4, 2, 4, 2)
    assert torch.allclose(found.covariance_matrix, torch.einsum("bicjd,c,d->bij", blocks, weights, weights), rtol=1e-5)
    with pytest.raises(ValueError, match="output_indices"):
        model.posterior(x, output_indices=[0])


def test_the_mode_is_put_back() -> None:
    model = build()
    model.posterior(torch.rand(3, 1, 2, dtype=DOUBLE))
    assert model.training
    assert model.likelihood.training


def test_classification_has_no_observation_noise() -> None:
    sample = ref.layernorm_cnn(3)
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x)
    model = ntkgp.ExactNTKGP(sample.x, sample.y, ntkgp.CategoricalLikelihood(num_classes=3), lin)
    assert model.posterior(sample.x_test).mean.shape == (5, 3)
    with pytest.raises(ValueError, match="observation_noise: a classification model has none"):
        model.posterior(sample.x_test, observation_noise=True)


@pytest.mark.parametrize(("outputs", "fixed"), [(1, False), (1, True), (2, False)])
def test_fit_gpytorch_mll_finds_the_evidence_optimum(outputs: int, fixed: bool) -> None:
    model, reference = build(outputs, fixed), build(outputs, fixed)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(mll)
    report = ntkgp.fit_evidence(reference)
    model.train()
    value = mll(model(*model.train_inputs), model.train_targets) * model.train_targets.numel()
    assert value.item() == pytest.approx(report.log_evidence, abs=2e-2)


def test_log_expected_improvement(fitted: ntkgp.ExactNTKGP) -> None:
    acquisition = LogExpectedImprovement(fitted, best_f=fitted.train_targets.max())
    candidate, value = optimize_acqf(acquisition, BOUNDS, q=1, num_restarts=2, raw_samples=16)
    assert candidate.shape == (1, 2)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 15, dtype=DOUBLE)] * 2).unsqueeze(1)
    assert value >= acquisition(grid).max() - 0.1
    x = candidate.clone().requires_grad_()
    slope = torch.autograd.grad(acquisition(x.unsqueeze(0)).sum(), x)[0]
    shift = torch.tensor([[1e-5, 0.0]], dtype=DOUBLE)
    expected = (acquisition((candidate + shift).unsqueeze(0)) - acquisition((candidate - shift).unsqueeze(0))) / 2e-5
    assert slope[0, 0].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def test_monte_carlo_acquisition_and_fantasies(fitted: ntkgp.ExactNTKGP) -> None:
    sampler = SobolQMCNormalSampler(torch.Size([8]), seed=0)
    noisy = qLogNoisyExpectedImprovement(
        fitted, fitted.train_inputs[0], sampler, prune_baseline=False, cache_root=False
    )
    assert torch.isfinite(noisy(torch.rand(3, 2, 2, dtype=DOUBLE))).all()
    gradient = qKnowledgeGradient(fitted, num_fantasies=3)
    candidate, _ = optimize_acqf(
        gradient, BOUNDS, q=1, num_restarts=1, raw_samples=4, options={"maxiter": 4}, return_best_only=True
    )
    assert candidate.shape == (1, 2)
    x = torch.rand(2, 1, 2, dtype=DOUBLE)
    fantasy = fitted.fantasize(x, sampler)
    assert fantasy.batch_shape == (8, 2)
    assert fantasy.posterior(torch.rand(2, 5, 2, dtype=DOUBLE)).mean.shape == (8, 2, 5, 1)
    # Observing cannot raise the variance.
    where = torch.rand(2, 5, 2, dtype=DOUBLE)
    assert (fantasy.posterior(where).variance <= fitted.posterior(where).variance * (1 + 1e-9)).all()
    nested = fantasy.fantasize(where[:, :1], SobolQMCNormalSampler(torch.Size([2]), seed=1))
    assert nested.posterior(where).mean.shape == (2, 8, 2, 5, 1)


def test_condition_on_observations(fitted: ntkgp.ExactNTKGP) -> None:
    x = torch.rand(2, 2, dtype=DOUBLE)
    y = torch.rand(2, 1, dtype=DOUBLE)
    noise = torch.full((2, 1), 1e-8, dtype=DOUBLE)
    found = fitted.condition_on_observations(x, y, noise=noise).posterior(x)
    assert torch.allclose(found.mean, y, atol=1e-3)
    assert (found.variance < 1e-6).all()
    with pytest.raises(ValueError, match=r"Y: expected shape \(\*batch, q, 1\), got \(2,\)"):
        fitted.condition_on_observations(x, y.squeeze(-1))


def test_marginal_likelihood_of_a_conditioned_model_is_not_offered(fitted: ntkgp.ExactNTKGP) -> None:
    conditioned = fitted.condition_on_observations(torch.rand(1, 2, dtype=DOUBLE), torch.zeros(1, 1, dtype=DOUBLE))
    assert not conditioned.training
    assert isinstance(conditioned(torch.rand(3, 2)), gpytorch.distributions.MultivariateNormal)
