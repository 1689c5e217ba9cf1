"""Laws B1–B29: exact posterior, evidence, invariances."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import gpytorch
import pytest
import torch
from gpytorch.constraints import Positive
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn
from torch.func import functional_call

import ntkgp
from ntkgp.evidence import evidence_objective
from tests import reference as ref
from tests.laws.problems import (
    DOUBLE,
    Problem,
    group_factors,
    law,
    problem,
    rel,
    scale_normalized,
    scale_of,
    violation,
)

K_FACTORS = (5.0, 0.2)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaped(p: Problem, values: Tensor) -> Tensor:
    """(N·C,) values in the shape of a mean."""
    return values.view(-1, p.num_outputs).squeeze(-1)


class StockGP(gpytorch.models.ExactGP):
    """GPyTorch's own ExactGP with the package's mean and kernel."""

    def __init__(self, p: Problem, x: Tensor, y: Tensor, mean: gpytorch.means.Mean) -> None:
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=Positive(torch.exp, torch.log)).double()
        if p.num_outputs > 1:
            likelihood = ntkgp.likelihoods.MultioutputGaussianLikelihood(likelihood)
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = mean, p.kernel
        self.likelihood.noise = torch.tensor(p.noise, dtype=DOUBLE)

    def forward(self, x: Tensor) -> MultivariateNormal:
        mean = self.mean_module(x)
        kind = MultivariateNormal if mean.ndim == 1 else MultitaskMultivariateNormal
        return kind(mean, self.covar_module(x))


class Zero(gpytorch.means.Mean):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1]) if self.outputs == 1 else x.new_zeros(*x.shape[:-1], self.outputs)


def stock(p: Problem, zero_mean: bool) -> StockGP:
    """With the linearised mean and targets y, or with zero mean and the evidence targets t."""
    x = p.lin.pack(p.x).double()
    y = shaped(p, p.t) if zero_mean else shaped(p, p.y.double().flatten())
    return StockGP(p, x, y, Zero(p.num_outputs) if zero_mean else ntkgp.means.LinearizedMean(p.lin))


def exact() -> gpytorch.settings.fast_computations:
    return gpytorch.settings.fast_computations(False, False, False)


def evidence(model: gpytorch.models.ExactGP) -> Tensor:
    """GPyTorch's marginal log-likelihood times N·C."""
    model.train()
    with exact():
        out = model(*model.train_inputs)
        return ExactMarginalLogLikelihood(model.likelihood, model)(out, model.train_targets) * out.mean.numel()


def objective(p: Problem, at: str = "theta_star"):
    return evidence_objective(p.model().evidence_problem(at=at), at=at)


def at_point(p: Problem, at: str = "theta_star"):
    return objective(p, at).evaluate(p.precision, torch.tensor([p.noise], dtype=DOUBLE))


# --- two forms of the same model ------------------------------------------------------------------


@law("R", "U", "BN", examples=6)
def test_B1_posterior_covariance_primal_is_dual(p):
    tol = p.tol(1e-9)
    scale = 1.0 if p.dtype == DOUBLE else float(p.k_test.abs().max() / p.v.abs().max())
    assert rel(p.covariance(), p.v) < tol * scale
    assert rel(ref.gaussian_dual_covariance(p.k, p.cross, p.k_test, p.noise_rows), p.v) < p.tol(1e-9)
    blocks = (
        p.v.view(len(p.x_test), p.num_outputs, len(p.x_test), p.num_outputs).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    )
    latent = p.model()(p.x_test)
    if p.num_outputs > 1:
        assert rel(ntkgp.likelihoods.point_covariances(latent), blocks) < tol * scale
    assert rel(latent.variance.reshape(-1), p.v.diagonal()) < tol * scale


@law("R", "U", "BN", examples=6)
def test_B2_theta_star_primal_is_dual(p):
    """By the package's Grams and vjp: θ⋆ = Λ⁻¹Jᵀ(K+σ²I)⁻¹t; and as the posterior mean h(θ⋆)."""
    tol = p.tol(1e-9)
    k = p.kernel(p.lin.pack(p.x).double()).to_dense().detach()
    alpha = torch.linalg.solve(k + p.noise * torch.eye(len(k), dtype=DOUBLE), p.t)
    pulled = p.lin.vjp(p.x, alpha.view_as(p.f).to(p.dtype)).double() / p.entries
    # Λ^½θ⋆, so that weakly and strongly regularised weights count alike
    assert rel(pulled * p.entries.sqrt(), p.primal.theta_star * p.entries.sqrt()) < tol
    want = (p.f_test - (p.j_test @ p.theta).view_as(p.f_test)).flatten() + p.j_test @ p.primal.theta_star
    assert rel(p.model(mean="posterior")(p.x_test).mean, shaped(p, want)) < tol
    network = p.model()(p.x_test).mean
    assert torch.equal(network, p.lin(p.x_test).double().reshape(network.shape))


@law("R", "U", "BN", dtype=DOUBLE)
def test_B3_logdet_primal_is_dual(p):
    k = p.kernel(p.lin.pack(p.x).double())
    with exact():
        dual = (k.add_jitter(p.noise).logdet() - len(p.j) * math.log(p.noise)).detach()
    assert rel(dual, p.primal.logdet) < p.tol(1e-11)


@law("R", "U", "BN", examples=6)
def test_B4_theta_star_evidence_is_a_marginal_likelihood(p):
    tol = p.tol(1e-10)
    assert rel(at_point(p).value, p.primal.log_evidence) < tol
    assert rel(evidence(p.model()), p.primal.log_evidence) < tol
    assert rel(ref.gaussian_log_evidence(p.k, p.t, p.noise_rows), p.primal.log_evidence) < p.tol(1e-10)


def test_B4n_evidence_of_the_residual_is_refused():
    """It drives every λ → ∞: the network was fitted to these y."""
    p = problem("R")
    model = p.model()
    before = model.kernel.precision.detach().clone()
    with pytest.raises(ValueError, match="residual"):
        ntkgp.fit_evidence(model, targets="residual")
    assert torch.equal(model.kernel.precision, before)
    honest = ntkgp.fit_evidence(p.model())
    deceived = ntkgp.fit_evidence(model, targets="residual", held_out=True)
    assert deceived.effective_dimension.sum() < 0.2 * honest.effective_dimension.sum()
    single = p.regroup("single").model()
    report = ntkgp.fit_evidence(single, targets="residual", held_out=True)
    assert report.pruned == ("all",)
    assert report.precision.item() > 1e6
    assert report.noise.item() == pytest.approx(float((p.y - p.f).square().mean()), rel=1e-3)


@law("R", "U", "BN", examples=6)
def test_B5_stock_exact_gp_has_the_dense_covariance(p):
    x, x_test = (p.lin.pack(v).double() for v in (p.x, p.x_test))
    with exact(), torch.no_grad():
        model = stock(p, zero_mean=False).eval()
        got = model(x_test).covariance_matrix
    # Dense formula on the package's own Grams: a float32 network is not asked for more than its passes give.
    k, cross, test = (p.kernel(a, b).to_dense().detach() for a, b in ((x, x), (x_test, x), (x_test, x_test)))
    want = ref.gaussian_dual_covariance(k, cross, test, p.noise_rows)
    assert rel(got, want) < 1e-7
    if p.dtype == DOUBLE:
        assert rel(got, p.v) < p.tol(1e-7)


@law("R", "U", "BN", dtype=DOUBLE)
def test_B6_stock_exact_gp_on_the_targets_predicts_with_theta_star(p):
    x_test = p.lin.pack(p.x_test).double()
    with exact(), torch.no_grad():
        mean = stock(p, zero_mean=True).eval()(x_test).mean
        shifted = stock(p, zero_mean=False).eval()(x_test).mean
    want = p.j_test @ p.primal.theta_star
    assert rel(mean, shaped(p, want)) < p.tol(1e-8)
    offset = (p.f_test - (p.j_test @ p.theta).view_as(p.f_test)).flatten()
    assert rel(shifted, shaped(p, offset + want)) < p.tol(1e-8)


@law("R", "U", "BN", examples=6)
def test_B7_marginal_log_likelihood_times_n_is_the_evidence(p):
    own = evidence(p.model())
    assert rel(evidence(stock(p, zero_mean=False)), own) < 1e-9
    assert rel(evidence(stock(p, zero_mean=True)), own) < p.tol(1e-9)
    assert rel(own, p.primal.log_evidence) < p.tol(1e-9)


# --- order ----------------------------------------------------------------------------------------


@law("R", "U", "BN", "C", "CNN")
def test_B8_posterior_lies_between_zero_and_the_prior(p):
    """In the full Loewner order."""
    v = p.covariance()
    prior = p.kernel(p.lin.pack(p.x_test).double()).to_dense().detach()
    assert violation(v) < 1e-12 if p.dtype == DOUBLE else 1e-5
    # Of float32 passes only rounding relative to the prior can be asked for.
    slack = 1e-12 if p.dtype == DOUBLE else 1e-5
    assert float(torch.linalg.eigvalsh(prior - v)[0]) > -slack * float(torch.linalg.eigvalsh(prior)[-1])


@law("R", "U", "BN", dtype=DOUBLE)
def test_B9_more_data_never_raises_the_covariance(p):
    fewer = p.covariance(x=p.x[::2], y=p.y[::2])
    everything = p.covariance()
    gap = torch.linalg.eigvalsh(fewer - everything)
    assert float(gap[0]) > -p.tol(1e-12) * float(torch.linalg.eigvalsh(p.k_test)[-1])
    assert float(gap[-1]) > 1e-6 * float(fewer.diagonal().max())


@law("R", "U", "BN", dtype=DOUBLE)
def test_B10_conditioning_in_steps_and_in_any_order(p):
    half = len(p.x) // 2
    batch = p.model(mean="posterior")(p.x_test)
    for first, second in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        q = replace(p, x=p.x[first], y=p.y[first], raw_precision=p.precision, unit_scale=False)
        model = q.model(mean="posterior")
        model(p.x_test)
        rest = p.y[second] if p.num_outputs > 1 else p.y[second, 0]
        steps = model.get_fantasy_model(p.x[second], rest)(p.x_test)
        assert rel(steps.mean, batch.mean) < p.tol(1e-9)
        assert rel(steps.covariance_matrix, p.v) < p.tol(1e-9)


@law("R", "U", "BN", dtype=DOUBLE)
def test_B11_duplicated_data_at_twice_the_noise(p):
    q = replace(
        p, x=torch.cat([p.x, p.x]), y=torch.cat([p.y, p.y]), noise=2 * p.noise, raw_precision=p.precision,
        unit_scale=False,
    )  # fmt: skip
    assert rel(q.covariance(), p.v) < p.tol(1e-9)
    a, b = q.model(mean="posterior")(p.x_test).mean, p.model(mean="posterior")(p.x_test).mean
    assert rel(a, b) < p.tol(1e-9)


@law("R", "U", "BN", dtype=DOUBLE)
def test_B12_infinite_noise_gives_the_prior(p):
    """Error <= ‖K⋆‖²/σ², the analytic bound, and rounding."""
    norm = float(torch.linalg.matrix_norm(p.cross, 2))
    for noise in (1e6, 1e12):
        error = float((p.covariance(noise=noise) - p.k_test).abs().max())
        assert error <= norm**2 / noise + 1e-13 * float(p.k_test.abs().max())


@law("R", "U", "BN", dtype=DOUBLE)
def test_B13_training_variance_stays_below_the_noise(p):
    for noise in (1e-9, 1e-5, 1e-1, 1e3):
        v = p.covariance(noise=noise, x_test=p.x)
        values = torch.linalg.eigvalsh(v) / noise
        rounding = 20 * 2e-16 * float(torch.linalg.eigvalsh(p.k)[-1]) / noise
        slack = max(1e-3 if noise == 1e-9 else 1e-9, rounding)
        assert float(values[-1]) <= 1 + slack
        assert float(values[0]) >= -slack


def test_B14_no_noise_gives_the_projected_posterior():
    """Σ → Λ^-½ Π_null(JΛ^-½) Λ^-½ as σ² → 0."""
    p = problem("R")
    phi, phi_test = p.j * p.entries.rsqrt(), p.j_test * p.entries.rsqrt()
    _, values, basis = torch.linalg.svd(phi, full_matrices=False)
    basis = basis[values > 1e-10 * values[0]]
    outside = phi_test - phi_test @ basis.T @ basis
    assert rel(p.covariance(noise=1e-8), outside @ outside.T) < 1e-5


# --- evidence -------------------------------------------------------------------------------------


@law("R", "U", "BN", dtype=DOUBLE)
def test_B15_effective_dimension_primal_is_dual(p):
    gamma = at_point(p).effective_dimension
    assert rel(gamma, p.primal.gamma) < p.tol(1e-9)
    a = p.k + p.noise * torch.eye(len(p.k), dtype=DOUBLE)
    assert rel(gamma.sum(), torch.trace(torch.linalg.solve(a, p.k))) < p.tol(1e-9)
    assert bool((gamma >= 0).all())
    assert gamma.sum() <= min(p.j.shape) * (1 + 1e-12)


@law("R", "U", "BN", dtype=DOUBLE)
def test_B16_gradient_of_the_evidence(p):
    """½(γ_g − λ_g‖θ⋆_g‖²) = autograd through GPyTorch; also in the noise, ½σ²(‖α‖² − tr A⁻¹)."""
    model = p.model()
    evidence(model).backward()
    formula = (p.primal.gamma - p.precision * p.primal.norms) / 2
    scale = float(formula.abs().max().clamp_min(1.0))
    by_autograd = model.kernel.raw_precision.grad
    assert float((by_autograd - formula).abs().max()) < p.tol(1e-8) * scale
    a = p.k + p.noise * torch.eye(len(p.k), dtype=DOUBLE)
    inverse = torch.linalg.inv(a)
    noise = p.noise * ((inverse @ p.t).square().sum() - inverse.trace()) / 2
    got = at_point(p).gradient
    assert float((got[:-1] - formula).abs().max()) < p.tol(1e-8) * scale
    assert float((got[-1] - noise).abs()) < p.tol(1e-8) * max(1.0, float(noise.abs()))
    raw = next(q for name, q in model.likelihood.named_parameters() if name.endswith("raw_noise"))
    assert float((raw.grad.squeeze() - noise).abs()) < p.tol(1e-8) * max(1.0, float(noise.abs()))


@pytest.mark.parametrize("method", ["mackay", "lbfgs"])
@pytest.mark.parametrize("name", ["R", "BN"])
def test_B16_zero_gradient_is_the_fixed_point(name, method):
    """At the optimum λ_g = γ_g/‖θ⋆_g‖² and σ² = SSE/(NC − γ), both by the oracle."""
    p = problem(name)
    report = ntkgp.fit_evidence(p.model(), method=method)
    assert report.converged
    precision, noise = report.precision, report.noise.expand(len(p.j)).double()
    best = ref.gaussian_primal(p.j, p.t, precision[p.index], noise, p.index)
    alive = [g for g, group in enumerate(p.lin.groups.names) if group not in report.pruned]
    assert alive
    bounded = (report.effective_dimension < 1e-3)[alive]
    for g, at_bound in zip(alive, bounded.tolist(), strict=True):
        assert at_bound or float(best.gamma[g] / best.norms[g] / precision[g] - 1) == pytest.approx(0, abs=1e-5)
    sse = (p.t - p.j @ best.theta_star).square().sum()
    assert float(sse / (len(p.t) - best.gamma.sum()) / noise[0]) == pytest.approx(1.0, abs=1e-5)
    assert report.log_evidence == pytest.approx(best.log_evidence, rel=1e-8)
    assert report.log_evidence > p.primal.log_evidence


@law("R", "U", "BN", dtype=DOUBLE)
def test_B17_evidence_lost_at_the_trained_weights(p):
    """M_θ⋆ − M_θ̃ = ½‖θ⋆ − θ̃‖²_{H+Λ} >= 0 at equal Λ, σ²."""
    star, trained = at_point(p).value, at_point(p, "theta_map").value
    oracle = ref.map_log_evidence(p.j, p.t, p.theta, p.entries, p.noise_rows, p.index)
    assert rel(trained, oracle) < p.tol(1e-9)
    shift = p.primal.theta_star - p.theta
    distance = (p.j @ shift).square().sum() / p.noise + (p.entries * shift.square()).sum()
    scale = max(abs(star), abs(trained), float(distance))
    assert abs(star - trained - float(distance) / 2) < p.tol(1e-9) * scale
    assert star >= trained
    x = torch.cat([p.precision, torch.tensor([p.noise], dtype=DOUBLE)]).log()
    in_h, in_prior = objective(p).squared_shift(x)
    assert abs(in_h + float(in_prior.sum()) - float(distance)) < p.tol(1e-9) * scale


def test_B17n_the_evidence_at_the_trained_weights_has_another_optimum():
    p = problem("R")
    for groups in ("tensor", "single"):
        q = p.regroup(groups)
        star, trained = q.model(), q.model()
        report = ntkgp.fit_evidence(star)
        classical = ntkgp.fit_evidence(trained, at="theta_map")
        assert report.at == "theta_star"
        assert classical.at == "theta_map"
        with torch.no_grad():
            ratio = (trained(p.x_test).variance / star(p.x_test).variance).sqrt().median()
        assert ratio > 2  # its precisions are too small, its error bars too wide
        assert report.log_evidence > classical.log_evidence


@law("R", "U", "BN", dtype=DOUBLE, seed=tuple(range(4)))
def test_B18_evidence_at_fixed_weights_is_concave_in_the_precision(p):
    found = objective(p, "theta_map")
    noise = torch.tensor([p.noise], dtype=DOUBLE)
    value = lambda precision: found.evaluate(precision, noise).value  # noqa: E731
    for seed in range(4):
        other = p.precision * torch.exp(torch.randn(len(p.precision), generator=gen(seed), dtype=DOUBLE))
        middle, ends = value((p.precision + other) / 2), (value(p.precision) + value(other)) / 2
        assert middle >= ends - 1e-12 * abs(ends)


# --- samples and bounds ---------------------------------------------------------------------------


@law("R", "U", "BN", dtype=DOUBLE)
def test_B19_sample_then_optimise_map_has_the_posterior_covariance(p):
    """A = Σ[Jᵀ/σ, Λ^½]: J⋆A A ᵀJ⋆ᵀ = V, with J by the package's vjp and J⋆ by its jvp."""
    n = len(p.x)
    rows = len(p.j)
    jt = p.lin.vjp(p.x, torch.eye(rows, dtype=p.dtype).reshape(rows, n, -1)).T  # (P, NC)
    columns = torch.cat([jt / math.sqrt(p.noise), p.entries.sqrt().diag()], 1)
    h = jt @ jt.T / p.noise + p.entries.diag()
    scaling = p.entries.rsqrt()
    a = scaling.unsqueeze(-1) * torch.linalg.solve(scaling.unsqueeze(-1) * h * scaling, scaling.unsqueeze(-1) * columns)
    assert rel((a @ a.T) * p.entries.sqrt() * p.entries.sqrt().unsqueeze(-1),
               p.primal.covariance * p.entries.sqrt() * p.entries.sqrt().unsqueeze(-1)) < p.tol(1e-9)  # fmt: skip
    pushed = p.lin.jvp(p.x_test, a.T).flatten(1).T
    assert rel(pushed @ pushed.T, p.v) < p.tol(1e-9)
    assert rel(pushed @ pushed.T, p.covariance()) < p.tol(1e-9)


@law("R", "U", "BN", dtype=DOUBLE)
def test_B20_matheron_map_has_the_posterior_covariance(p):
    """[(J⋆ − WJ)Λ^-½, −σW] with W = K⋆X(K+σ²I)⁻¹, deterministically."""
    x, x_test = p.lin.pack(p.x).double(), p.lin.pack(p.x_test).double()
    k, cross = p.kernel(x).to_dense().detach(), p.kernel(x_test, x).to_dense().detach()
    w = torch.linalg.solve(k + p.noise * torch.eye(len(k), dtype=DOUBLE), cross.T).T
    unit = p.entries.rsqrt().diag()
    prior_train, prior_test = (p.lin.jvp(v, unit).flatten(1).T for v in (p.x, p.x_test))
    map_ = torch.cat([prior_test - w @ prior_train, -math.sqrt(p.noise) * w], 1)
    assert rel(map_ @ map_.T, p.covariance()) < p.tol(1e-9)


@pytest.mark.parametrize("name", ["R", "BN"])
def test_B20_function_samples_have_mean_and_covariance_of_the_posterior(name):
    p = problem(name)
    model, size = p.model(mean="posterior"), 400
    before = torch.random.get_rng_state()
    draws = model.sample_functions(size, generator=gen(3))(p.x_test).reshape(size, -1)
    assert torch.equal(before, torch.random.get_rng_state())
    mean = model(p.x_test).mean.reshape(-1)
    error = (draws.mean(0) - mean) / (p.v.diagonal() / size).sqrt()
    assert error.abs().max() < 4.5
    centred = draws - mean
    d = p.v.diagonal()
    error = (centred.T @ centred / size - p.v) / ((d.unsqueeze(-1) * d + p.v.square()) / size).sqrt()
    assert error.abs().max() < 4.5
    again = model.sample_functions(size, generator=gen(3))(p.x_test[:2]).reshape(size, -1)
    assert rel(again, draws[:, : again.shape[1]]) < 1e-12


def quadratic_forms(p: Problem) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """(i, k, w, r, A): for test entry i exact, CG and random iterates w, with recomputed residuals r = k − Aw."""
    x, x_test = p.lin.pack(p.x).double(), p.lin.pack(p.x_test).double()
    a = p.kernel(x).to_dense().detach() + p.noise * torch.eye(len(p.j), dtype=DOUBLE)
    cross = p.kernel(x_test, x).to_dense().detach()
    for i in range(0, len(cross), max(1, len(cross) // 4)):
        k = cross[i]
        iterates = [torch.zeros_like(k), 0.5 * torch.linalg.solve(a, k)]
        noise = torch.randn(len(k), generator=gen(i), dtype=DOUBLE)
        iterates.append(torch.linalg.solve(a, k) + 0.1 * noise * torch.linalg.solve(a, k).abs().max())
        w, r = torch.zeros_like(k), k.clone()
        d = r.clone()
        for _ in range(5):  # conjugate gradients
            step = (r @ r) / (d @ a @ d)
            w, new = w + step * d, r - step * (a @ d)
            d, r = new + (new @ new) / (r @ r) * d, new
            iterates.append(w)
        for w in iterates:
            yield i, k, w, k - a @ w, a


@law("R", "U", "BN", dtype=DOUBLE)
def test_B21_any_iterate_bounds_the_variance_from_above(p):
    v, prior = p.covariance().diagonal(), p.k_test.diagonal()
    for i, k, w, r, _ in quadratic_forms(p):
        upper = prior[i] - w @ (k + r)
        assert upper >= v[i] - 1e-12 * prior[i]


def test_B21n_the_shortcut_is_no_bound():
    """K⋆⋆ − kᵀw without the residual falls below the variance for inexact w."""
    p = problem("R")
    v, prior = p.covariance().diagonal(), p.k_test.diagonal()
    short = [float((prior[i] - w @ k - v[i]) / prior[i]) for i, k, w, _, _ in quadratic_forms(p)]
    assert min(short) < -1e-6


@law("R", "U", "BN", dtype=DOUBLE)
def test_B22_lower_bound_and_the_exact_gap(p):
    """v = Λ⁻¹(j − Jᵀw): L(v) <= V and U − L = ‖r‖²/σ², with every product by jvp and vjp."""
    variances = p.covariance().diagonal()
    for i, k, w, r, _ in quadratic_forms(p):
        gap = float(r @ r) / p.noise
        point, output = divmod(i, p.num_outputs)
        pick = torch.zeros(1, p.num_outputs, dtype=DOUBLE)
        pick[0, output] = 1.0
        j = p.lin.vjp(p.x_test[point : point + 1], pick)
        v = (j - p.lin.vjp(p.x, w.view_as(p.f))) / p.entries
        lower = 2 * (v @ j) - p.lin.jvp(p.x, v).square().sum() / p.noise - (p.entries * v.square()).sum()
        upper = p.k_test[i, i] - w @ (k + r)
        # Rounding of U and L themselves, each of the order of the terms that they are made of.
        terms = float(p.k_test[i, i] + (v @ j).abs() * 2 + p.lin.jvp(p.x, v).square().sum() / p.noise)
        assert abs(float(upper - lower) - gap) <= 1e-10 * gap + 1e-12 * terms
        assert lower <= variances[i] + 1e-11 * terms


@law("R", "BN", dtype=DOUBLE)
def test_B23_hessian_free_laplace_on_the_tangent_model_is_exact(p):
    """Add μ h(x⋆) to the loss, minimise again: −Δh(x⋆)/μ = V for any step, here μ = 1.7."""
    mu, scaling = 1.7, p.entries.rsqrt()
    j = p.lin.jacobian(p.x).flatten(0, 1) * scaling
    j_test = p.lin.jacobian(p.x_test).flatten(0, 1) * scaling
    hessian = j.T @ j / p.noise + torch.eye(j.shape[1], dtype=DOUBLE)
    minimise = lambda extra: scaling * torch.linalg.solve(hessian, j.T @ p.t / p.noise - extra)  # noqa: E731
    base, v = minimise(0.0), p.covariance()
    for i in range(0, len(j_test), max(1, len(j_test) // 4)):
        change = p.lin.jvp(p.x_test, minimise(mu * j_test[i]) - base).flatten()[i]
        scale = max(1.0, float((j_test @ (base / scaling)).abs().max()) / float(v[i, i]))
        assert rel(-change / mu, v[i, i]) < max(1e-8, 1e-13 * scale * p.condition)


@law("R", "BN", dtype=DOUBLE)
def test_B24_amortised_hessian_free_laplace_gives_row_sums_not_variances(p):
    mu, scaling = 1.7, p.entries.rsqrt()
    j = p.lin.jacobian(p.x).flatten(0, 1) * scaling
    j_test = p.lin.jacobian(p.x_test).flatten(0, 1) * scaling
    hessian = j.T @ j / p.noise + torch.eye(j.shape[1], dtype=DOUBLE)
    change = -mu * scaling * torch.linalg.solve(hessian, j_test.sum(0))
    rows = -p.lin.jvp(p.x_test, change).flatten() / mu
    v = p.covariance()
    assert float((rows - v.sum(1)).abs().max()) < max(1e-8, p.tol(1e-9)) * float(v.abs().sum(1).max())
    # The control: neither these numbers nor their mean over the test set are the variances.
    assert rel(rows, v.diagonal()) > 1e-2
    assert rel(rows / len(rows), v.diagonal()) > 1e-2


# --- invariances ----------------------------------------------------------------------------------


def scaled_problem(p: Problem, factors: tuple[float, ...]) -> Problem:
    return replace(p, net=scale_normalized(p.net, factors), raw_precision=p.precision, unit_scale=False)


def fitted_variances(p: Problem) -> tuple[Tensor, Tensor]:
    """Posterior covariance and mean at the test inputs after fitting precisions and noise."""
    model = p.model(mean="posterior")
    ntkgp.fit_evidence(model)
    latent = model(p.x_test)
    return latent.covariance_matrix.detach(), latent.mean.detach()


@functools.cache
def fitted_as_trained(name: str, groups: str) -> tuple[Tensor, Tensor]:
    return fitted_variances(problem(name).regroup(groups))


@pytest.mark.parametrize("groups", ["tensor", "normalization"])
@pytest.mark.parametrize("name", ["R", "BN", "CNN"])
@pytest.mark.parametrize("factors", [K_FACTORS, (1e-3,), (10.0,), (1e3,)])
def test_B25_groups_fitted_at_theta_star_do_not_see_the_scale(name, factors, groups):
    (v, mean), p = fitted_as_trained(name, groups), problem(name).regroup(groups)
    v_k, mean_k = fitted_variances(scaled_problem(p, factors))
    assert rel(v_k, v) < 1e-6
    assert rel(mean_k, mean) < 1e-6


@law("R", "BN", normalizer=("layer", "batch", "group", "rms"), groups=("tensor", "normalization"), dtype=DOUBLE)
def test_B26_scaled_weights_and_precisions_are_the_same_model(p):
    q = scaled_problem(p, K_FACTORS)
    k = group_factors(p, scale_of(p.net, K_FACTORS))
    assert {5.0, 0.2} <= set(k.tolist())
    q = replace(q, raw_precision=p.precision / k**2)
    assert rel(evidence(q.model()), evidence(p.model())) < p.tol(1e-10)
    assert rel(at_point(q).value, p.primal.log_evidence) < p.tol(1e-10)
    assert rel(q.covariance(), p.v) < p.tol(1e-10)
    a, b = q.model(mean="posterior")(p.x_test).mean, p.model(mean="posterior")(p.x_test).mean
    assert rel(a, b) < p.tol(1e-10)


@pytest.mark.parametrize("name", ["R", "BN"])
def test_B27_a_single_precision_must_see_the_scale(name):
    """Negative control of B25."""
    p = problem(name).regroup("single")
    (v, _), (v_k, _) = fitted_variances(p), fitted_variances(scaled_problem(p, K_FACTORS))
    assert rel(v_k, v) > 1e-2


class Reparametrised(nn.Module):
    """The same function with parameters θ' where θ = d ∘ θ'."""

    def __init__(self, net: nn.Module, d: Tensor) -> None:
        super().__init__()
        self._inner = [net]
        sizes = [p.numel() for p in net.parameters()]
        parts = [part.view_as(p) for part, p in zip(d.split(sizes), net.parameters(), strict=True)]
        self.names = [name for name, _ in net.named_parameters()]
        for number, (part, p) in enumerate(zip(parts, net.parameters(), strict=True)):
            self.register_buffer(f"d{number}", part)
            self.register_parameter(f"w{number}", nn.Parameter(p.detach() / part))

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: getattr(self, f"d{i}") * getattr(self, f"w{i}") for i, name in enumerate(self.names)}
        return functional_call(self._inner[0], weights, (x,))


@law("R", normalizer=("none", "layer", "group", "rms"), dtype=DOUBLE, examples=3)
def test_B28_g_prior_is_invariant_to_any_diagonal_reparametrisation(p):
    """λ_i = g Σ_n J_ni²; identically zero columns are dropped."""

    def posterior(lin: ntkgp.LinearizedNetwork) -> Tensor:
        rows = len(p.j)
        j = lin.vjp(p.x, torch.eye(rows, dtype=DOUBLE).reshape(rows, len(p.x), -1))
        squares = 0.1 * j.square().sum(0)
        inverse = torch.where(squares > 0, 1 / squares.where(squares > 0, 1.0), 0.0)
        k = lin.jvp(p.x, j * inverse).flatten(1)
        j_test = lin.jacobian(p.x_test).flatten(0, 1)
        cross = lin.jvp(p.x_test, j * inverse).flatten(1).T
        test = lin.jvp(p.x_test, j_test * inverse).flatten(1)
        return ref.gaussian_dual_covariance((k + k.T) / 2, cross, (test + test.T) / 2, p.noise_rows)

    d = torch.exp(torch.randn(len(p.theta), generator=gen(5), dtype=DOUBLE))
    lin = ntkgp.LinearizedNetwork(Reparametrised(p.net, d).eval(), p.x, groups="single")
    assert rel(lin(p.x), p.f) < 1e-12
    assert rel(lin.jacobian(p.x).flatten(0, 1) / d, p.j) < 1e-10
    assert rel(posterior(lin), posterior(p.lin)) < p.tol(1e-9)


@law("U", normalizer="none", activation="relu", groups="tensor")
def test_B29_relu_rescaling(p):
    """(aW₁, ab₁, W₂/a) with λ of W₁, b₁ over a² and of W₂ times a² leaves K unchanged; a = 3."""
    a = 3.0
    factor = dict.fromkeys((name for name, _ in p.net.named_parameters()), 1.0)
    factor |= {"0.weight": a, "0.bias": a, "2.weight": 1 / a}
    net = copy.deepcopy(p.net)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(factor[name])
    q = replace(p, net=net, raw_precision=p.precision / group_factors(p, factor) ** 2, unit_scale=False)
    tol = 1e-11 if p.dtype == DOUBLE else 1e-5
    assert rel(q.lin(p.x), p.f) < tol
    x, x_test = p.lin.pack(p.x).double(), p.lin.pack(p.x_test).double()
    assert rel(q.kernel(x_test, x).to_dense(), p.kernel(x_test, x).to_dense()) < tol
    if p is problem("U"):  # with the old precisions it must change
        assert rel(replace(q, raw_precision=p.precision).kernel(x).to_dense(), p.k) > 1e-2
