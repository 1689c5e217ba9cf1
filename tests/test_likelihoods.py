"""Likelihoods against dense float64 values, exact rational-precision arithmetic and Monte Carlo."""

from __future__ import annotations

import copy
import math
import unittest

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.test.base_likelihood_test_case import BaseLikelihoodTestCase as _SharedSuite
from linear_operator.operators import DenseLinearOperator, RootLinearOperator

from ntkgp.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    MultioutputGaussianLikelihood,
    bridge_log_concentration,
    curvature_factor,
    log_likelihood,
    point_covariances,
    residual,
    validate_labels,
    whitened_targets,
)

DOUBLE = torch.float64
NO_BATCH = torch.Size([])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def covariance(*shape, seed=0):
    """Random covariances with eigenvalues spread over four decades."""
    root = randn(*shape, shape[-1], seed=seed) * torch.logspace(-2, 0, shape[-1], dtype=DOUBLE)
    return root @ root.mT


def multitask(n, c, *batch, seed=0, interleaved=True):
    cov = covariance(*batch, n * c, seed=seed)
    return MultitaskMultivariateNormal(randn(*batch, n, c, seed=seed + 1), cov, interleaved=interleaved)


def exact_blocks(latent):
    n, c = latent.event_shape
    dense = latent.covariance_matrix
    index = lambda i, k: i * c + k if latent._interleaved else i + k * n  # noqa: E731
    rows = [
        torch.stack([torch.stack([dense[..., index(i, a), index(i, b)] for b in range(c)], -1) for a in range(c)], -2)
        for i in range(n)
    ]
    return torch.stack(rows, -3)


# --- curvature ------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [2, 3, 10])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 60.0])
def test_curvature_factor_is_a_root_of_the_softmax_curvature(c, scale):
    f = scale * randn(20, c, seed=c)
    s = curvature_factor(f)
    p = f.softmax(-1)
    b = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    assert s.shape == (20, c, c - 1)
    assert (s @ s.mT - b).abs().max() < 1e-15
    assert s.sum(-2).abs().max() < 1e-15  # 1ᵀS = 0


def test_curvature_factor_is_componentwise_accurate_where_probabilities_underflow():
    """Against 80-digit arithmetic: |error of B_ij| <= 1e-13 √(B_ii B_jj), for B from 1 down to 1e-260."""
    from mpmath import mp, mpf

    with mp.workdps(700):
        for seed, peak in enumerate([0.0, 40.0, 300.0]):
            for position in range(4):
                f = 10 * randn(4, seed=seed)
                f[position] += peak
                exact = [mp.exp(mpf(v)) for v in f.tolist()]
                total = sum(exact)
                p = [e / total for e in exact]
                s = curvature_factor(f[None])[0]
                product = s @ s.T
                for i in range(4):
                    for j in range(4):
                        want = p[i] * (1 - p[i]) if i == j else -p[i] * p[j]
                        scale = mp.sqrt(p[i] * (1 - p[i]) * p[j] * (1 - p[j]))
                        assert abs(mpf(product[i, j].item()) - want) <= mpf("1e-13") * scale


def test_confident_logits_have_tiny_curvature_and_no_nan():
    f = torch.tensor([[900.0, 0.0, -5.0], [0.0, 900.0, 1.0], [-1.0, 3.0, 900.0], [1e5, 0.0, 0.0]], dtype=DOUBLE)
    s = curvature_factor(f)
    assert torch.isfinite(s).all()
    assert s[:3].abs().amax((-1, -2)).le(1e-190).all()
    assert s[:3].abs().amax((-1, -2)).gt(0).all()
    one = curvature_factor(torch.tensor([[700.0], [-700.0]]))
    assert one.flatten().tolist() == pytest.approx([math.exp(-350)] * 2, rel=1e-12)


@pytest.mark.parametrize("c", [1, 2, 5])
def test_derivatives_of_the_log_likelihood_are_residual_and_curvature(c):
    f = 2 * randn(7, c, seed=c)
    y = torch.randint(0, max(c, 2), (7,), generator=rng(1))
    f.requires_grad_(True)
    (gradient,) = torch.autograd.grad(log_likelihood(f, y).sum(), f)
    assert (gradient - residual(f.detach(), y)).abs().max() < 1e-15
    s = curvature_factor(f.detach())
    for n in range(7):
        hessian = torch.autograd.functional.hessian(lambda v, n=n: -log_likelihood(v[None], y[n : n + 1])[0], f[n])
        assert (hessian - s[n] @ s[n].T).abs().max() < 1e-15
    if c == 1:
        target = y.to(DOUBLE).unsqueeze(-1)
        want = -torch.nn.functional.binary_cross_entropy_with_logits(f, target, reduction="none")
        assert (log_likelihood(f, y) - want.squeeze(-1)).abs().max() < 1e-15
    else:
        want = -torch.nn.functional.cross_entropy(f, y, reduction="none")
        assert (log_likelihood(f, y) - want).abs().max() < 1e-15


def test_residual_of_a_confident_point_keeps_its_relative_accuracy():
    r = residual(torch.tensor([[60.0, 0.0, 1.0]]), torch.tensor([0]))
    want = (1 + math.e) * math.exp(-60)
    assert r[0, 0].item() == pytest.approx(want, rel=1e-13)
    assert r.sum().item() == 0.0


@pytest.mark.parametrize("c", [1, 3, 10])
def test_whitened_targets_turn_the_quadratic_surrogate_into_unit_noise_regression(c):
    """log N(ẑ; 0, SᵀKS + I) + constant equals the surrogate's evidence, computed in weight space, for every Λ."""
    n, p = 12, 40
    jacobian = randn(n * c, p, seed=1)
    f, theta = 2 * randn(n, c, seed=2), randn(p, seed=3)
    y = torch.randint(0, max(c, 2), (n,), generator=rng(4))
    offset = f - (jacobian @ theta).view(n, c)
    s, z, constant = whitened_targets(f, y, offset)
    factor = torch.block_diag(*s)
    b = factor @ factor.T
    r = residual(f, y).flatten()
    differences = []
    for exponent in (-3.0, 0.0, 4.0):
        precision = torch.exp(randn(p, seed=5)) * 10**exponent
        # Primal: ∫ exp(ℓ + rᵀJ(θ−θ̃) − ½(θ−θ̃)ᵀH(θ−θ̃)) N(θ; 0, Λ⁻¹) dθ
        h = jacobian.T @ b @ jacobian
        a = h + precision.diag()
        linear = jacobian.T @ r + h @ theta
        ell = log_likelihood(f, y).sum() - r @ jacobian @ theta - theta @ h @ theta / 2
        primal = ell + linear @ torch.linalg.solve(a, linear) / 2 - torch.logdet(a) / 2 + precision.log().sum() / 2
        gram = factor.T @ (jacobian / precision) @ jacobian.T @ factor + torch.eye(z.numel(), dtype=DOUBLE)
        dual = torch.distributions.MultivariateNormal(torch.zeros(z.numel(), dtype=DOUBLE), gram).log_prob(z.flatten())
        differences.append((primal - dual - constant).item())
    scale = abs(constant.item())
    assert max(map(abs, differences)) < 1e-11 * scale
    assert max(differences) - min(differences) < 1e-12 * scale
    # S⁺r is the least-squares solution
    pinv = torch.linalg.pinv(factor) @ r
    direct = z.flatten() - factor.T @ (f - offset).flatten()
    assert (direct - pinv).abs().max() < 1e-10 * pinv.abs().max()


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.tensor([0, 3]), 3, "values from 0 to 3"),
        (torch.tensor([0, -1]), 3, "values from -1 to 0"),
        (torch.tensor([0.0, 1.0, 2.0]), 3, "expected an integer dtype"),
        (torch.tensor([0.0, float("nan")]), 2, "NaN"),
        (torch.tensor([0.0, 0.5]), 2, "zeros and ones"),
        ([0, 1], 2, "expected a tensor"),
    ],
)
def test_bad_labels_are_refused_by_name(labels, classes, message):
    with pytest.raises(ValueError, match=f"labels: .*{message}"):
        validate_labels(labels, classes)


def test_bad_arguments_of_the_curvature_functions():
    with pytest.raises(ValueError, match="logits: contain NaN"):
        curvature_factor(torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(ValueError, match=r"labels: expected shape \(2,\), got \(3,\)"):
        log_likelihood(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"offset: expected shape \(2, 4\)"):
        whitened_targets(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), torch.zeros(2))
    assert validate_labels(torch.tensor([True, False]), 2).tolist() == [1, 0]


# --- per-point covariance blocks ------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_point_covariances_are_the_diagonal_blocks(batch, interleaved):
    latent = multitask(5, 3, *batch, interleaved=interleaved)
    assert torch.equal(point_covariances(latent), exact_blocks(latent))


@pytest.mark.parametrize("interleaved", [True, False])
def test_point_covariances_of_large_lazy_covariances_stay_small(interleaved, monkeypatch):
    monkeypatch.setattr("ntkgp.likelihoods.classification._MAX_DENSE_ROWS", 12)
    root = randn(60, 7)
    latent = MultitaskMultivariateNormal(randn(20, 3), RootLinearOperator(root), interleaved=interleaved)
    dense = DenseLinearOperator(root @ root.T)
    want = exact_blocks(MultitaskMultivariateNormal(randn(20, 3), dense, interleaved=interleaved))
    sizes = []
    original = RootLinearOperator.to_dense
    monkeypatch.setattr(RootLinearOperator, "to_dense", lambda op: sizes.append(op.shape[-1]) or original(op))
    assert (point_covariances(latent) - want).abs().max() < 1e-14
    assert not sizes or max(sizes) <= 12


def test_point_covariances_ask_the_operator_first():
    class Knowing(DenseLinearOperator):
        def point_blocks(self, num_outputs):
            return torch.full((4, num_outputs, num_outputs), 7.0, dtype=DOUBLE)

    latent = MultitaskMultivariateNormal(randn(4, 3), Knowing(covariance(12)))
    assert point_covariances(latent).eq(7).all()


# --- softmax --------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_probit_link(batch, interleaved):
    latent = multitask(4, 3, *batch, interleaved=interleaved)
    predictive = CategoricalLikelihood(3)(latent)
    variance = exact_blocks(latent).diagonal(dim1=-2, dim2=-1)
    want = (latent.mean / (1 + math.pi / 8 * variance).sqrt()).softmax(-1)
    assert isinstance(predictive, torch.distributions.Categorical)
    assert predictive.batch_shape == (*batch, 4)
    assert (predictive.probs - want).abs().max() < 1e-15


@pytest.mark.parametrize("link", ["probit", "mc", "bridge"])
def test_links_do_not_transpose_when_points_equal_classes(link):
    """GPyTorch's SoftmaxLikelihood transposes here: a batch of C points gets the wrong probabilities."""
    latent = multitask(4, 4)
    likelihood = CategoricalLikelihood(4, link=link)
    alone = torch.cat([likelihood(latent[i : i + 1]).probs for i in range(4)])
    if link == "mc":
        assert (likelihood(latent).probs - alone).abs().max() < 0.2
        assert (likelihood(latent).probs.T - alone).abs().max() > 0.2
    else:
        assert (likelihood(latent).probs - alone).abs().max() < 1e-15
    f = randn(4, 4, seed=9)
    assert torch.allclose(likelihood(f).probs, f.softmax(-1))


def test_monte_carlo_link_against_a_long_run():
    latent = multitask(3, 4, seed=5)
    blocks = exact_blocks(latent)
    draws = latent.mean + torch.einsum("ncr,snr->snc", torch.linalg.cholesky(blocks), randn(200_000, 3, 4, seed=8))
    want = draws.softmax(-1)
    error = want.std(0) * math.sqrt(1 / 200_000 + 1 / 20_000)
    got = CategoricalLikelihood(4, link="mc", num_samples=20_000)(latent).probs
    assert ((got - want.mean(0)) / error).abs().max() < 4


def test_monte_carlo_draws_have_the_covariance_of_the_contrasts():
    """D4n: draws with LᵀL instead of LLᵀ would fail this by orders of magnitude."""
    latent = multitask(2, 5, seed=3)
    blocks = exact_blocks(latent)
    centre = torch.eye(5, dtype=DOUBLE) - 0.2
    likelihood = CategoricalLikelihood(5, link="mc", num_samples=100_000)
    draws = torch.cat(list(likelihood._draws(latent, None)))
    got = torch.einsum("snc,snd->ncd", draws - latent.mean, draws - latent.mean) / 100_000
    want = centre @ blocks @ centre
    d = want.diagonal(dim1=-2, dim2=-1)
    error = ((d.unsqueeze(-1) * d.unsqueeze(-2) + want.square()) / 100_000).sqrt()
    assert ((got - want) / error).abs().max() < 4.5
    lower = torch.linalg.cholesky(blocks)
    wrong = centre @ lower.mT @ lower @ centre
    assert ((wrong - want) / error).abs().max() > 100


def test_monte_carlo_is_chunked_by_memory_and_reproducible(monkeypatch):
    latent = multitask(3, 4)
    likelihood = CategoricalLikelihood(4, link="mc", num_samples=50, seed=3)
    before = torch.random.get_rng_state()
    first = likelihood(latent).probs
    assert torch.equal(first, likelihood(latent).probs)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, likelihood(latent, generator=rng(99)).probs)
    assert torch.equal(first, likelihood(latent, generator=rng(3)).probs)
    monkeypatch.setattr("ntkgp.likelihoods.classification._MAX_DRAWN_NUMBERS", 36)
    blocks = list(likelihood._draws(latent, None))
    assert [len(b) for b in blocks] == [3] * 16 + [2]
    assert likelihood(latent).probs.sum(-1).sub(1).abs().max() < 1e-14


def test_monte_carlo_handles_singular_covariances():
    root = randn(3, 4, 1, seed=1)
    cov = DenseLinearOperator(torch.block_diag(*(root @ root.mT)))
    latent = MultitaskMultivariateNormal(randn(3, 4), cov)
    likelihood = CategoricalLikelihood(4, link="mc", num_samples=100_000)
    z = randn(100_000, seed=7)
    want = (latent.mean + root.squeeze(-1) * z[:, None, None]).softmax(-1)
    error = want.std(0) * math.sqrt(2 / 100_000)
    assert ((likelihood(latent).probs - want.mean(0)) / error).abs().max() < 4.5
    none = MultitaskMultivariateNormal(randn(3, 4), DenseLinearOperator(torch.zeros(12, 12, dtype=DOUBLE)))
    assert (likelihood(none).probs - randn(3, 4).softmax(-1)).abs().max() < 1e-14


def test_bridge_link_against_its_formulas():
    """The condition on sum zero by an explicit linear map, and α by the printed equation."""
    latent = multitask(4, 5, seed=2)
    mean, cov = latent.mean, exact_blocks(latent)
    ones = torch.ones(5, 1, dtype=DOUBLE)
    for i in range(4):
        gain = cov[i] @ ones @ torch.linalg.inv(ones.T @ cov[i] @ ones)
        m = mean[i] - (gain @ ones.T @ mean[i].unsqueeze(-1)).squeeze(-1)
        s = cov[i] - gain @ ones.T @ cov[i]
        assert m.sum().abs() < 1e-13
        alpha = (1 - 2 / 5 + m.exp() / 25 * (-m).exp().sum()) / s.diagonal()
        got = bridge_log_concentration(mean, cov)[i].exp()
        assert (got / alpha - 1).abs().max() < 1e-11
        probs = CategoricalLikelihood(5, link="bridge")(latent).probs[i]
        assert (probs - alpha / alpha.sum()).abs().max() < 1e-12
    # Inverse of the bridge: the Laplace approximation of Dirichlet(α) in the softmax basis has these moments
    alpha = torch.tensor([0.7, 3.0, 1.9], dtype=DOUBLE)
    mu = alpha.log() - alpha.log().mean()
    sigma = torch.diag(1 / alpha) - (1 / alpha + 1 / alpha.unsqueeze(-1)) / 3 + (1 / alpha).sum() / 9
    assert (bridge_log_concentration(mu, sigma).exp() - alpha).abs().max() < 1e-12


def test_bridge_survives_extreme_and_degenerate_input():
    mean = torch.tensor([[800.0, -800.0, 0.0], [0.0, 0.0, 0.0]], dtype=DOUBLE)
    cov = torch.stack([1e-300 * torch.eye(3, dtype=DOUBLE), torch.zeros(3, 3, dtype=DOUBLE)])
    probs = bridge_log_concentration(mean, cov).softmax(-1)
    assert torch.isfinite(probs).all()
    assert probs[0, 0].item() == pytest.approx(1.0)
    assert (probs[1] - 1 / 3).abs().max() < 1e-15
    pair = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    got = bridge_log_concentration(pair, torch.eye(2, dtype=DOUBLE)).softmax(-1)
    assert (got - pair.softmax(-1)).abs().max() < 1e-15


def test_expected_log_prob_and_log_marginal():
    latent = multitask(6, 3, seed=4)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    likelihood = CategoricalLikelihood(3, link="mc", num_samples=50_000)
    blocks = exact_blocks(latent)
    draws = latent.mean + torch.einsum("ncr,snr->snc", torch.linalg.cholesky(blocks), randn(100_000, 6, 3, seed=8))
    log_p = draws.log_softmax(-1).gather(-1, y.expand(100_000, 6).unsqueeze(-1)).squeeze(-1)
    error = log_p.std(0) * math.sqrt(1 / 100_000 + 1 / 50_000)
    got = likelihood.expected_log_prob(y, latent)
    assert got.shape == (6,)
    assert ((got - log_p.mean(0)) / error).abs().max() < 4
    marginal = likelihood.log_marginal(y, latent)
    assert (marginal - likelihood(latent).log_prob(y)).abs().max() < 1e-14
    assert (marginal > got).all()  # Jensen
    probit = CategoricalLikelihood(3)
    assert (probit.log_marginal(y, latent) - probit(latent).log_prob(y)).abs().max() < 1e-14


def test_expected_log_prob_is_differentiable_also_for_equal_variances():
    mean = torch.zeros(4, 3, dtype=DOUBLE, requires_grad=True)
    scale = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)
    latent = MultitaskMultivariateNormal(mean, scale * torch.eye(12, dtype=DOUBLE))
    y = torch.tensor([0, 1, 2, 0])
    likelihood = CategoricalLikelihood(3, num_samples=4000)
    likelihood.expected_log_prob(y, latent).sum().backward()
    assert torch.isfinite(scale.grad)
    assert scale.grad < 0  # more variance, less expected log-likelihood (concave)
    assert (mean.grad.argmax(-1) == y).all()


def test_a_variational_model_trains_with_the_categorical_likelihood():
    class Model(gpytorch.models.ApproximateGP):
        def __init__(self, z):
            q = gpytorch.variational.CholeskyVariationalDistribution(z.size(0), batch_shape=torch.Size([3]))
            base = gpytorch.variational.VariationalStrategy(self, z, q)
            super().__init__(gpytorch.variational.IndependentMultitaskVariationalStrategy(base, num_tasks=3))
            self.mean_module = gpytorch.means.ZeroMean(batch_shape=torch.Size([3]))
            self.covar_module = gpytorch.kernels.RBFKernel()

        def forward(self, x):
            return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    x = torch.linspace(-2, 2, 30).unsqueeze(-1)
    y = (x.squeeze(-1) > -0.7).long() + (x.squeeze(-1) > 0.7).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, likelihood = Model(x[::3].clone()), CategoricalLikelihood(3, num_samples=64)
        mll = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=30)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        generator, losses = rng(0), []
        for _ in range(40):
            optimizer.zero_grad()
            loss = -mll(model(x), y, generator=generator)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            accuracy = (likelihood(model(x)).probs.argmax(-1) == y).float().mean()
    assert losses[-1] < 0.7 * losses[0]
    assert accuracy > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CategoricalLikelihood(1), "num_classes: expected an integer of at least 2, got 1"),
        (lambda: CategoricalLikelihood(3, link="logit"), "link: expected one of probit, mc, bridge, got 'logit'"),
        (lambda: CategoricalLikelihood(3, num_samples=0), "num_samples"),
        (lambda: BernoulliLikelihood(link="bridge"), "link: expected one of probit, mc, got 'bridge'"),
        (lambda: CategoricalLikelihood(3)(multitask(2, 4)), "expected 3 outputs, got 4"),
        (lambda: CategoricalLikelihood(3)(randn(5, 4)), r"function_samples: expected shape \(\*batch, N, 3\)"),
        (lambda: CategoricalLikelihood(3)(MultivariateNormal(randn(3), covariance(3))), "MultitaskMultivariateNormal"),
        (lambda: BernoulliLikelihood()(multitask(2, 4)), "expected one output, got 4"),
        (lambda: CategoricalLikelihood(3).log_marginal(torch.tensor([0, 3]), multitask(2, 3)), "labels: "),
        (lambda: MultioutputGaussianLikelihood(CategoricalLikelihood(3)), "got CategoricalLikelihood"),
    ],
)
def test_bad_arguments_of_the_likelihoods(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_copies_keep_their_settings():
    likelihood = CategoricalLikelihood(3, link="mc", num_samples=17, seed=5)
    twin = copy.deepcopy(likelihood)
    assert (twin.link, twin.num_samples, twin.seed, twin.num_classes) == ("mc", 17, 5, 3)
    twin.link = "bridge"
    assert likelihood.link == "mc"
    assert not list(likelihood.parameters())


# --- logistic -------------------------------------------------------------------------------------


def test_bernoulli_links_against_quadrature():
    latent = MultivariateNormal(2 * randn(8), covariance(8))
    variance = latent.covariance_matrix.diagonal()
    probit = BernoulliLikelihood()(latent)
    assert (probit.probs - torch.sigmoid(latent.mean / (1 + math.pi / 8 * variance).sqrt())).abs().max() < 1e-15
    grid = torch.linspace(-10, 10, 4001, dtype=DOUBLE)
    weight = torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    values = latent.mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * grid
    likelihood = BernoulliLikelihood(link="mc", num_samples=40_000)
    exact, second = (values.sigmoid() * weight).sum(-1), (values.sigmoid().square() * weight).sum(-1)
    error = ((second - exact**2) / 40_000).sqrt()
    assert ((likelihood(latent).probs - exact) / error).abs().max() < 4
    y = torch.tensor([0.0, 1.0] * 4)
    log_p = -torch.nn.functional.softplus(-(2 * y - 1).unsqueeze(-1) * values)
    mean, square = (log_p * weight).sum(-1), (log_p.square() * weight).sum(-1)
    error = ((square - mean**2) / 40_000).sqrt()
    assert ((likelihood.expected_log_prob(y, latent) - mean) / error).abs().max() < 4
    want = likelihood(latent).log_prob(y.to(DOUBLE))
    assert (likelihood.log_marginal(y.long(), latent) - want).abs().max() < 1e-14


def test_bernoulli_of_far_tails_has_no_infinite_logit():
    latent = MultivariateNormal(torch.tensor([500.0, -500.0], dtype=DOUBLE), torch.eye(2, dtype=DOUBLE))
    for link in ("probit", "mc"):
        logits = BernoulliLikelihood(link=link)(latent).logits
        assert torch.isfinite(logits).all()
        assert logits[0] > 400
        assert logits[1] < -400


class TestBernoulliSharedSuite(_SharedSuite, unittest.TestCase):
    seed = 2

    def create_likelihood(self):
        return BernoulliLikelihood(link="mc", num_samples=4000)

    def _create_targets(self, batch_shape=NO_BATCH):
        return torch.distributions.Bernoulli(0.5).sample((*batch_shape, 5))


class TestCategoricalSharedSuite(_SharedSuite, unittest.TestCase):
    seed = 2

    def create_likelihood(self):
        return CategoricalLikelihood(6, link="mc", num_samples=4000)

    def _create_conditional_input(self, batch_shape=NO_BATCH):
        return torch.randn(*batch_shape, 5, 6)

    def _create_marginal_input(self, batch_shape=NO_BATCH):
        root = torch.randn(*batch_shape, 30, 30) / 4
        return MultitaskMultivariateNormal(torch.randn(*batch_shape, 5, 6), root @ root.mT + 0.1 * torch.eye(30))

    def _create_targets(self, batch_shape=NO_BATCH):
        return torch.randint(0, 6, (*batch_shape, 5))

    def _test_conditional(self, batch_shape):
        likelihood, logits = self.create_likelihood(), self._create_conditional_input(batch_shape)
        assert likelihood(logits).sample().shape == (*batch_shape, 5)

    def _test_marginal(self, batch_shape):
        likelihood, latent = self.create_likelihood(), self._create_marginal_input(batch_shape)
        assert likelihood(latent).probs.shape == (*batch_shape, 5, 6)
        draws = latent.rsample(torch.Size([4000]))
        self.assertAllClose(likelihood(latent).probs, draws.softmax(-1).mean(0), rtol=0.25, atol=0.02)


# --- one Gaussian noise for many outputs ----------------------------------------------------------


def fixed(noise, **kwargs):
    return FixedNoiseGaussianLikelihood(noise, **kwargs)


def gaussian(noise=0.3):
    likelihood = GaussianLikelihood().double()
    likelihood.noise = torch.tensor(noise, dtype=DOUBLE)  # a float would be rounded to float32 by gpytorch
    return likelihood


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("kind", ["one", "per input", "per entry", "fixed and learned"])
def test_multioutput_noise_is_dense_noise(kind, batch, interleaved):
    n, c = 5, 3
    per_input, per_entry = randn(n, seed=3).exp(), randn(*batch, n, c, seed=3).exp()
    stock, entries = {
        "one": (gaussian(), torch.full((n, c), 0.3, dtype=DOUBLE)),
        "per input": (fixed(per_input), per_input.unsqueeze(-1).expand(n, c)),
        "per entry": (fixed(per_entry), per_entry),
        "fixed and learned": (fixed(per_entry, learn_additional_noise=True).double(), per_entry + 0.7),
    }[kind]
    likelihood = MultioutputGaussianLikelihood(stock)
    if kind == "fixed and learned":
        likelihood.second_noise = torch.tensor(0.7, dtype=DOUBLE)
    latent = multitask(n, c, *batch, interleaved=interleaved)
    predictive = likelihood(latent)
    flat = entries if interleaved else entries.mT
    want = latent.covariance_matrix + torch.diag_embed(flat.flatten(-2))
    assert isinstance(predictive, MultitaskMultivariateNormal)
    assert torch.equal(predictive.mean, latent.mean)
    assert (predictive.covariance_matrix - want).abs().max() < 1e-12
    y = randn(*batch, n, c, seed=8)
    variance = latent.variance
    dense = torch.distributions.Normal(latent.mean, (variance + entries).sqrt()).log_prob(y).sum(-1)
    assert (likelihood.log_marginal(y, latent) - dense).abs().max() < 1e-12
    elp = -((y - latent.mean) ** 2 + variance) / entries / 2 - (2 * math.pi * entries).log() / 2
    if interleaved:
        assert (likelihood.expected_log_prob(y, latent) - elp.sum(-1)).abs().max() < 1e-11
    conditional = likelihood(latent.mean)
    assert (conditional.variance - entries.expand(*batch, n, c)).abs().max() < 1e-12


def test_multioutput_likelihood_shares_the_parameter_object():
    stock = gaussian()
    likelihood = MultioutputGaussianLikelihood(stock)
    assert likelihood.raw_noise is stock.raw_noise
    assert [p is stock.raw_noise for p in likelihood.parameters()] == [True]
    assert likelihood.state_dict().keys() == stock.state_dict().keys()
    likelihood.noise = 2.5
    assert stock.noise.item() == pytest.approx(2.5)
    stock.load_state_dict(gaussian(0.7).state_dict())
    assert likelihood.noise.item() == pytest.approx(0.7)
    twin = copy.deepcopy(likelihood)
    twin.noise = 9.0
    assert stock.noise.item() == pytest.approx(0.7)
    with pytest.raises(RuntimeError, match="second_noise"):
        likelihood.second_noise = 1.0


class _DenseGP(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, num_outputs):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.MultitaskMean(gpytorch.means.ConstantMean(), num_outputs)
        self.covar_module = gpytorch.kernels.MultitaskKernel(gpytorch.kernels.RBFKernel(), num_outputs, rank=1)

    def forward(self, x):
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


def dense_gp(likelihood, n=7, c=3):
    x, y = randn(n, 2, seed=1), randn(n, c, seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _DenseGP(x, y, likelihood, c).double()


@pytest.mark.parametrize("kind", ["one", "per input", "per entry"])
def test_stock_marginal_likelihood_and_prediction_are_the_dense_ones(kind):
    noise = {"one": None, "per input": randn(7, seed=5).exp(), "per entry": randn(7, 3, seed=5).exp()}[kind]
    stock = gaussian() if noise is None else fixed(noise)
    model = dense_gp(MultioutputGaussianLikelihood(stock))
    x, y = model.train_inputs[0], model.train_targets
    diagonal = torch.full((7, 3), 0.3, dtype=DOUBLE) if noise is None else noise.view(7, -1).expand(7, 3)
    with gpytorch.settings.fast_computations(False, False, False):
        prior = model(x)
        value = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)(prior, y)
        k = model.covar_module(x).to_dense() + diagonal.flatten().diag()
        want = torch.distributions.MultivariateNormal(prior.mean.flatten(), k).log_prob(y.flatten()) / 21
        assert (value - want).abs() < 1e-12
        if noise is None:
            value.backward()
            assert stock.raw_noise.grad is not None
        model.eval()
        test = randn(4, 2, seed=6)
        posterior = model(test)
        cross = model.covar_module(test, x).to_dense()
        mean = model.mean_module(test) + (cross @ torch.linalg.solve(k, (y - prior.mean).flatten())).view(4, 3)
        covar = model.covar_module(test).to_dense() - cross @ torch.linalg.solve(k, cross.T)
        assert (posterior.mean - mean).abs().max() < 1e-10
        assert (posterior.covariance_matrix - covar).abs().max() < 1e-10


def test_stock_gaussian_likelihood_fails_here():
    """The reason for the wrapper; if this passes one day, the wrapper can go."""
    model = dense_gp(gaussian())
    with pytest.raises(RuntimeError):
        gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)(
            model(*model.train_inputs), model.train_targets
        )


@pytest.mark.parametrize("kind", ["one", "per input", "per entry", "mixed"])
def test_fantasies_equal_retraining(kind):
    """One new input: with several, gpytorch's own strategy mixes (M, C) and (M·C,) for every likelihood."""
    x_new, y_new = randn(1, 2, seed=11), randn(1, 3, seed=12)
    shapes = {"one": None, "per input": ((7,), (1,)), "per entry": ((7, 3), (1, 3)), "mixed": ((7,), (1, 3))}[kind]
    if shapes is None:
        stock, kwargs, full = gaussian(), {}, gaussian()
    else:
        old, new = randn(*shapes[0], seed=5).exp(), randn(*shapes[1], seed=6).exp()
        entries = [v.view(len(v), -1).expand(len(v), 3) for v in (old, new)]
        stock, kwargs, full = fixed(old), {"noise": new}, fixed(torch.cat(entries))
    with gpytorch.settings.fast_computations(False, False, False), torch.no_grad():
        model = dense_gp(MultioutputGaussianLikelihood(stock)).eval()
        test = randn(4, 2, seed=6)
        model(test)
        fantasy = model.get_fantasy_model(x_new, y_new, **kwargs)
        batch = copy.deepcopy(model)
        batch.likelihood = MultioutputGaussianLikelihood(full)
        x, y = model.train_inputs[0], model.train_targets
        batch.set_train_data(torch.cat([x, x_new]), torch.cat([y, y_new]), strict=False)
        batch.eval()
        assert (fantasy(test).mean - batch(test).mean).abs().max() < 1e-9
        assert (fantasy(test).covariance_matrix - batch(test).covariance_matrix).abs().max() < 1e-9
        assert isinstance(fantasy.likelihood, MultioutputGaussianLikelihood)


@pytest.mark.parametrize("learn", [False, True])
def test_fantasy_likelihood_extends_a_fixed_noise(learn):
    old, new = randn(7, 3, seed=5).exp(), randn(2, 3, seed=6).exp()
    likelihood = MultioutputGaussianLikelihood(fixed(old, learn_additional_noise=learn).double())
    if learn:
        likelihood.second_noise = torch.tensor(0.4, dtype=DOUBLE)
    longer = likelihood.get_fantasy_likelihood(noise=new)
    latent = multitask(9, 3)
    added = longer(latent).covariance_matrix - latent.covariance_matrix
    want = torch.cat([old, new]) + (0.4 if learn else 0.0)
    assert (added - want.flatten().diag()).abs().max() < 1e-12
    assert likelihood.noise_covar.noise.shape == (7, 3)
    with pytest.raises(ValueError, match=r"noise: got 2 outputs, .* has 3"):
        likelihood.get_fantasy_likelihood(noise=torch.ones(2, 2, dtype=DOUBLE))


def test_fixed_noise_for_other_inputs():
    likelihood = MultioutputGaussianLikelihood(fixed(randn(7, seed=5).exp()))
    latent = multitask(4, 3)
    with pytest.warns(gpytorch.utils.warnings.GPInputWarning, match="no noise is added"):
        assert torch.equal(likelihood(latent).covariance_matrix, latent.covariance_matrix)
    given = randn(4, seed=1).exp()
    extra = likelihood(latent, noise=given).covariance_matrix - latent.covariance_matrix
    assert (extra - given.repeat_interleave(3).diag()).abs().max() < 1e-14
    with pytest.raises(ValueError, match=r"noise: expected shape \(4,\) or \(\*batch, 4, 3\), got \(5,\)"):
        likelihood(latent, noise=torch.ones(5, dtype=DOUBLE))
    with pytest.raises(ValueError, match="noise: expected 3 outputs"):
        likelihood(latent, noise=torch.ones(4, 2, dtype=DOUBLE))
    with pytest.raises(RuntimeError, match="noise: a fixed-noise likelihood"):
        likelihood.get_fantasy_likelihood()
    with pytest.raises(ValueError, match="expected a MultitaskMultivariateNormal"):
        likelihood(MultivariateNormal(randn(4), covariance(4)))


class TestMultioutputSharedSuite(_SharedSuite, unittest.TestCase):
    seed = 2

    def create_likelihood(self):
        return MultioutputGaussianLikelihood(GaussianLikelihood())

    def _create_conditional_input(self, batch_shape=NO_BATCH):
        return torch.randn(*batch_shape, 5, 4)

    def _create_marginal_input(self, batch_shape=NO_BATCH):
        root = torch.randn(*batch_shape, 20, 20)
        return MultitaskMultivariateNormal(torch.randn(*batch_shape, 5, 4), root @ root.mT + torch.eye(20))

    def _create_targets(self, batch_shape=NO_BATCH):
        return torch.randn(*batch_shape, 5, 4)

    def _test_log_marginal(self, batch_shape):
        """The default estimator needs millions of draws in 4 dimensions; dense values are tested above."""
