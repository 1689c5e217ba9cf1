"""Laws D1–D6, D9, D10: classification, calibration, units, gradient descent."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import gpytorch
import pytest
import torch
from gpytorch.constraints import Positive
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from torch import Tensor, nn

import ntkgp
from ntkgp.evidence import evidence_objective
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood, curvature_factor, point_covariances
from tests import reference as ref
from tests.laws.problems import DOUBLE, Problem, Spec, group_factors, law, problem, rel, violation


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at_point(p: Problem):
    return evidence_objective(p.model().evidence_problem()).evaluate(p.precision)


def oracle_blocks(p: Problem) -> Tensor:
    """Posterior covariance of the logits at each test input by the oracle, (N, C, C)."""
    n, c = len(p.x_test), p.num_outputs
    return p.v.view(n, c, n, c).diagonal(dim1=0, dim2=2).movedim(-1, 0)


# --- the Laplace–GGN posterior --------------------------------------------------------------------


@law("C", "CNN", classify=True, examples=6)
def test_D1_posterior_with_singular_curvature_primal_is_dual(p):
    """J⋆(JᵀBJ + Λ)⁻¹J⋆ᵀ with the full, singular B = (K⋆⋆ − K⋆XS(I + SᵀKS)⁻¹SᵀKX⋆)."""
    tol = p.tol(1e-9)
    latent = p.model()(p.x_test)
    assert rel(latent.covariance_matrix, p.v) < tol
    if p.num_outputs > 1:
        assert rel(point_covariances(latent), oracle_blocks(p)) < tol
    gamma = at_point(p).effective_dimension
    assert rel(gamma, p.primal.gamma) < tol
    rank = len(p.x) * max(p.num_outputs - 1, 1)
    assert gamma.sum() <= min(rank, p.j.shape[1])
    want = (p.f_test - (p.j_test @ p.theta).view_as(p.f_test)).flatten() + p.j_test @ p.primal.theta_star
    mean = p.model(mean="posterior")(p.x_test).mean
    assert rel(mean, want.view(len(p.x_test), -1).squeeze(-1)) < max(tol, 1e-8)
    network = p.model()(p.x_test).mean
    assert torch.equal(network, p.lin(p.x_test).double().reshape(network.shape))


@law("C", "CNN", classify=True)
def test_D1_the_posterior_lies_below_the_prior(p):
    v = p.covariance()
    prior = p.kernel(p.lin.pack(p.x_test).double()).to_dense().detach()
    slack = 1e-12 if p.dtype == DOUBLE else 1e-5
    assert violation(v) < slack
    assert float(torch.linalg.eigvalsh(prior - v)[0]) > -slack * float(torch.linalg.eigvalsh(prior)[-1])


@law("C", "CNN", classify=True, outputs=(3, 10), dtype=DOUBLE)
def test_D2_softmax_curvature_annihilates_a_common_shift(p):
    """B1 = 0, so B has no inverse and K + B⁻¹ does not exist; S has C − 1 columns."""
    s = curvature_factor(p.lin(p.x))
    b = s @ s.mT
    assert b.sum(-1).abs().max() < 1e-15
    assert s.sum(-2).abs().max() < 1e-15
    dense = ref.curvature(p.f)
    assert rel(torch.block_diag(*b), dense) < 1e-13
    assert s.shape[-1] == p.num_outputs - 1
    values = torch.linalg.eigvalsh(b)
    assert (values[:, 0].abs() <= 1e-15).all()
    assert (torch.linalg.matrix_rank(s) <= p.num_outputs - 1).all()


@law("C", "CNN", classify=True, dtype=DOUBLE, examples=6)
def test_D3_logdet_and_evidence_primal_is_dual(p):
    factor = torch.block_diag(*curvature_factor(p.lin(p.x)))
    k = p.kernel(p.lin.pack(p.x).double()).to_dense().detach()
    dual = torch.linalg.slogdet(torch.eye(factor.shape[1], dtype=DOUBLE) + factor.T @ k @ factor)[1]
    assert rel(dual, p.primal.logdet) < p.tol(1e-9)
    found = at_point(p)
    assert rel(found.value, p.primal.log_evidence) < p.tol(1e-9)
    assert rel(found.squared_norms * p.precision, p.primal.norms * p.precision) < max(1e-7, p.tol(1e-9))


# --- predictives ----------------------------------------------------------------------------------


@law("C", "CNN", classify=True, outputs=(3, 10), dtype=DOUBLE)
def test_D4_softmax_predictive_ignores_a_common_shift(p):
    """Σ + c·11ᵀ at every input, and a common shift of the logits, change nothing."""
    latent = p.model()(p.x_test)
    likelihood = CategoricalLikelihood(p.num_outputs, link="mc", num_samples=200)
    n, c = latent.mean.shape
    base = likelihood(latent).probs
    size = float(latent.variance.detach().mean())
    for factor in (1.0, 100.0):
        common = torch.kron(torch.eye(n, dtype=DOUBLE), torch.ones(c, c, dtype=DOUBLE)) * size * factor
        moved = MultitaskMultivariateNormal(latent.mean + 7.0, latent.covariance_matrix + common)
        assert rel(likelihood(moved).probs, base) < 1e-12


def test_D4n_draws_with_the_transposed_factor_fail():
    """LᵀL instead of LLᵀ: the covariance test that our draws pass rejects it."""
    p = problem("C")
    latent, size = p.model()(p.x_test), 40_000
    blocks = oracle_blocks(p)
    centre = torch.eye(4, dtype=DOUBLE) - 0.25
    likelihood = CategoricalLikelihood(4, link="mc", num_samples=size)
    with torch.no_grad():
        draws = torch.cat(list(likelihood._draws(latent, gen(2)))) - latent.mean

    want = centre @ blocks @ centre
    d = want.diagonal(dim1=-2, dim2=-1)
    error = ((d.unsqueeze(-1) * d.unsqueeze(-2) + want.square()) / size).sqrt()
    score = lambda cov: float(((cov - want) / error).abs().max())  # noqa: E731
    assert score(torch.einsum("snc,snd->ncd", draws, draws) / size) < 4.5
    lower = torch.linalg.cholesky(blocks)
    wrong = torch.einsum("nrc,snr->snc", lower, torch.randn(size, *d.shape, generator=gen(1), dtype=DOUBLE)) @ centre
    assert score(torch.einsum("snc,snd->ncd", wrong, wrong) / size) > 20


@pytest.mark.parametrize("name", ["C", "CNN"])
@torch.no_grad()
def test_D5_monte_carlo_is_within_its_error_and_links_agree_for_small_variance(name):
    p = problem(name)
    size, long = 10_000, 100_000
    latent = p.model()(p.x_test)
    likelihood = CategoricalLikelihood(p.num_outputs, link="mc", num_samples=size)
    draws = p.f_test + torch.einsum(
        "ncr,snr->snc", torch.linalg.cholesky(oracle_blocks(p)),
        torch.randn(long, *p.f_test.shape, generator=gen(4), dtype=DOUBLE),
    )  # fmt: skip
    probabilities = draws.softmax(-1)
    error = probabilities.std(0) * math.sqrt(1 / size + 1 / long)
    assert ((likelihood(latent).probs - probabilities.mean(0)) / error).abs().max() < 4
    gaps = []
    for factor in (1e4, 1e6, 1e8):
        tight = replace(p, raw_precision=p.precision * factor).model()
        small = tight(p.x_test)
        mc = likelihood(small).probs
        gaps.append(float((mc - CategoricalLikelihood(p.num_outputs)(small).probs).abs().max()))
        assert gaps[-1] < 4 * float(small.variance.max().sqrt()) / math.sqrt(size) + float(small.variance.max())
        assert float((mc - p.f_test.softmax(-1)).abs().max()) < 10 * float(small.variance.max().sqrt())
    assert gaps[2] < gaps[1] < gaps[0]


def test_D5_binary_links():
    p = problem(Spec(outputs=1, normalizer="layer", classify=True, seed=3))
    latent = p.model()(p.x_test)
    grid = torch.linspace(-9, 9, 6001, dtype=DOUBLE)
    weight = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    values = (p.f_test + p.v.diagonal().sqrt().unsqueeze(-1) * grid).sigmoid()
    exact = (values * weight).sum(-1)
    error = ((values.square() * weight).sum(-1) - exact.square()).sqrt() / 100
    got = BernoulliLikelihood(link="mc", num_samples=10_000)(latent).probs
    assert ((got - exact) / error).abs().max() < 4
    assert (BernoulliLikelihood()(latent).probs - exact).abs().max() < 0.03
    tight = replace(p, raw_precision=p.precision * 1e8, unit_scale=False).model()(p.x_test)
    a, b = (BernoulliLikelihood(link=link)(tight).probs for link in ("probit", "mc"))
    assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["R", "BN"])
def test_D6_self_calibration(name):
    """400 joint draws of train and test from the prior: 90 % coverage and uniform PIT of the test values."""
    p = problem(name)
    model, draws, c = p.model(mean="posterior"), 400, p.num_outputs
    x = torch.cat([p.x, p.x_test])
    joint = p.kernel(x).to_dense().detach()
    values, vectors = torch.linalg.eigh(joint)
    root = vectors * values.clamp_min(0).sqrt()
    offset = ntkgp.means.LinearizedMean(p.lin)(x).reshape(-1)
    generator, rows = gen(11), len(p.j)
    h = offset + (root @ torch.randn(len(joint), draws, generator=generator, dtype=DOUBLE)).T
    y = h[:, :rows] + math.sqrt(p.noise) * torch.randn(draws, rows, generator=generator, dtype=DOUBLE)
    sd = p.covariance().diagonal().sqrt()
    inside, pit = [], []
    for i in range(draws):
        model.set_train_data(targets=y[i].view(-1, c).squeeze(-1))
        with torch.no_grad():
            score = (h[i, rows:] - model(p.x_test).mean.reshape(-1)) / sd
        inside.append((score.abs() < 1.6448536).double().mean())
        pit.append(torch.special.ndtr(score))
    inside, pit = torch.stack(inside), torch.stack(pit)
    for sample, expected in (
        (inside, 0.9), (pit.mean(1), 1 / 2), (pit.square().mean(1), 1 / 3), ((pit < 0.05).double().mean(1), 0.05)
    ):  # fmt: skip
        z = (sample.mean() - expected) / (sample.std() / math.sqrt(draws))
        assert abs(float(z)) < 4


# --- units and gradient descent -------------------------------------------------------------------


@law("R", "U", "BN", groups=("tensor", "layer"), dtype=DOUBLE)
def test_D9_units_of_the_targets(p):
    """y → cy, head → c·head, λ_head → λ_head/c², σ² → c²σ²: V → c²V, and the evidence loses NC·log c; c = 3."""
    c = 3.0
    net = copy.deepcopy(p.net)
    head = [name for name, _ in net.named_parameters()][-2:]
    assert isinstance(net[-1], nn.Linear)
    with torch.no_grad():
        for parameter in net[-1].parameters():
            parameter.mul_(c)
    factor = group_factors(p, {name: c if name in head else 1.0 for name, _ in net.named_parameters()})
    q = replace(
        p, net=net, y=c * p.y, raw_precision=p.precision / factor**2, unit_scale=False, noise=c * c * p.noise
    )  # fmt: skip
    assert rel(q.covariance(), c * c * p.v) < p.tol(1e-9)
    a, b = (v.model(mean="posterior")(p.x_test).mean for v in (q, p))
    assert rel(a, c * b) < p.tol(1e-9)
    noise = torch.tensor([q.noise], dtype=DOUBLE)
    value = evidence_objective(q.model().evidence_problem()).evaluate(q.precision, noise).value
    assert rel(value, p.primal.log_evidence - len(p.t) * math.log(c)) < p.tol(1e-9)


class _NetworkMeanGP(gpytorch.models.ExactGP):
    def __init__(self, p: Problem, beta: float) -> None:
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=Positive(torch.exp, torch.log)).double()
        if p.num_outputs > 1:
            likelihood = ntkgp.likelihoods.MultioutputGaussianLikelihood(likelihood)
        super().__init__(p.x, p.y.squeeze(-1) if p.num_outputs == 1 else p.y, likelihood)
        self.likelihood.noise = torch.tensor(beta, dtype=DOUBLE)
        self.mean_module = ntkgp.means.NetworkMean(p.lin)
        self.covar_module = ntkgp.kernels.NeuralTangentKernel(p.lin).double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        mean = self.mean_module(x)
        return (MultivariateNormal if mean.ndim == 1 else MultitaskMultivariateNormal)(mean, self.covar_module(x))


@law("R", "BN", dtype=DOUBLE, examples=3)
def test_D10_gradient_descent_on_the_linearised_loss_ends_at_the_gp_mean(p):
    """On ‖y − h(θ)‖² + β‖θ − θ₀‖² from θ₀: the limit is m + Θ(Θ + βI)⁻¹(y − m), m the network itself."""
    largest = float(torch.linalg.eigvalsh(p.lin.grams(p.x).sum(0))[-1])
    beta = 0.1 * largest
    target = p.y.double() - p.f
    shift, rate = torch.zeros_like(p.theta), 1.0 / (largest + beta)
    for _ in range(180):
        residual = p.lin.jvp(p.x, shift) - target
        shift = shift - rate * (p.lin.vjp(p.x, residual) + beta * shift)
    with gpytorch.settings.fast_computations(False, False, False), torch.no_grad():
        gp = _NetworkMeanGP(p, beta).eval()
        x = torch.cat([p.x, p.x_test])
        descended = torch.cat([p.f, p.f_test]) + p.lin.jvp(x, shift)
        assert rel(gp(x).mean.reshape(descended.shape), descended) < 1e-6
    theta = p.j @ p.j.T
    closed = p.f.flatten() + theta @ torch.linalg.solve(
        theta + beta * torch.eye(len(theta), dtype=DOUBLE), target.flatten()
    )
    assert rel((p.f + p.lin.jvp(p.x, shift)).flatten(), closed) < 1e-6
