"""VariationalNTKGP against dense formulas on deep, normalised, multi-output networks."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.constraints import Positive
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ntkgp
from ntkgp.kernels import NeuralTangentKernel, NystromKernel, SharedKernel
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood, point_covariances
from ntkgp.models.batches import Batches
from ntkgp.models.variational import VariationalNTKGP, kmeans_inducing_points
from ntkgp.models.variational.batch import batch_objective
from ntkgp.models.variational.optimum import predictive_scores
from tests import nystrom_oracle as oracle
from tests import reference as ref

DOUBLE = torch.float64


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found.detach() - expected).abs().max() / expected.abs().max())


def gaussian(value: float = 0.04) -> GaussianLikelihood:
    likelihood = GaussianLikelihood(noise_constraint=Positive(torch.exp, torch.log)).double()
    likelihood.noise = torch.tensor(value, dtype=DOUBLE)
    return likelihood


def multitask(c: int, rank: int = 0) -> MultitaskGaussianLikelihood:
    likelihood = MultitaskGaussianLikelihood(num_tasks=c, rank=rank).double()
    with torch.no_grad():
        for i, p in enumerate(likelihood.parameters()):
            p.copy_(-1.0 - i + torch.arange(p.numel()).reshape(p.shape) / 3)
    return likelihood


class Case:
    """A trained, normalised network of depth three with a dense reference for everything that is asked of it."""

    def __init__(self, outputs: int = 1, classify: bool = False, n: int = 24, seed: int = 0) -> None:
        with ref.seeded(seed) as generator:
            layers: list[nn.Module] = []
            for width in (3, 10, 10):
                layers += [nn.Linear(width, 10), nn.LayerNorm(10), nn.Tanh()]
            self.net = nn.Sequential(*layers, nn.Linear(10, outputs)).double()
            self.x = torch.randn(n, 3, generator=generator, dtype=DOUBLE)
            self.x_test = 1.5 * torch.randn(7, 3, generator=generator, dtype=DOUBLE)
            if classify:
                self.y = torch.randint(0, max(outputs, 2), (n,), generator=generator)
            else:
                wave = torch.sin(2 * self.x.sum(-1, keepdim=True) + torch.arange(outputs))
                self.y = wave + 0.1 * torch.randn(n, outputs, generator=generator, dtype=DOUBLE)
        self.c, self.classify = outputs, classify
        self.lin = ntkgp.LinearizedNetwork(self.net, self.x[:4])
        count = len(self.lin.groups)
        self.precision = torch.linspace(0.5, 3.0, count, dtype=DOUBLE)
        self.entries = self.precision[ref.index(self.net, [set(m) for m in self.lin.groups.members])]
        self.f, self.f_test = ref.outputs(self.net, self.x), ref.outputs(self.net, self.x_test)
        self.j, self.j_test = self.rows(self.x), self.rows(self.x_test)
        self.theta = ref.theta(self.net)

    def rows(self, x: Tensor) -> Tensor:
        return ref.jacobian(self.net, x).flatten(0, 1)

    def k(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return ref.gram(a, self.entries, b)

    @property
    def targets(self) -> Tensor:
        return self.y if self.classify or self.c > 1 else self.y[:, 0]

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.x, self.targets

    def default_likelihood(self) -> Likelihood:
        if self.classify:
            return BernoulliLikelihood() if self.c == 1 else CategoricalLikelihood(self.c)
        return gaussian()

    def model(self, z: Tensor | None = None, likelihood: Likelihood | None = None, **options: Any) -> VariationalNTKGP:
        z = self.x[:6] if z is None else z
        likelihood = self.default_likelihood() if likelihood is None else likelihood
        options = {"learn_inducing": False, **options}
        model = VariationalNTKGP(z, likelihood, self.lin, len(self.x), **options)
        if isinstance(model.kernel, NeuralTangentKernel):
            model.kernel.precision = self.precision
        return model

    def exact(self, likelihood: Likelihood | None = None, mean: str = "network") -> ntkgp.ExactNTKGP:
        likelihood = self.default_likelihood() if likelihood is None else likelihood
        model = ntkgp.ExactNTKGP(self.x, self.targets, likelihood, self.lin, mean=mean)
        model.kernel.precision = self.precision
        model.curvature = "quadratic"
        return model.eval()

    def curvature(self, noise: float = 0.04) -> Tensor:
        """B, (NC, NC)."""
        return ref.curvature(self.f) if self.classify else torch.eye(len(self.j), dtype=DOUBLE) / noise


CASES = {
    "one": (1, False), "three": (3, False), "softmax": (4, True), "bernoulli": (1, True)
}  # fmt: skip


@pytest.fixture(params=list(CASES), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*CASES[request.param])


@pytest.fixture(scope="module")
def three() -> Case:
    return Case(3)


def random_root(model: VariationalNTKGP, seed: int = 0) -> Tensor:
    root = model.variational_strategy.variational_root
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        root.copy_(0.3 * torch.randn(root.shape, generator=generator, dtype=DOUBLE))
    return root.detach()


def dense_reduction(k_z: Tensor, root: Tensor) -> Tensor:
    """A = (K_Z + (L Lᵀ)⁻¹)⁻¹ with an explicit inverse."""
    return torch.linalg.inv(k_z + torch.linalg.inv(root @ root.mT))


def selection(case: Case, index: Tensor | None, m: int) -> Tensor:
    return torch.arange(m * case.c) if index is None else torch.arange(m) * case.c + index


# --- the family -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [False, True])
def test_covariance_and_kl_for_any_root(case: Case, chosen: bool) -> None:
    index = torch.tensor([0, 1, 2, 0, 3, 1]) % case.c if chosen else None
    model = case.model(output_index=index).eval()
    root = random_root(model)
    j_z = case.rows(case.x[:6])[selection(case, index, 6)]
    k_z = case.k(j_z)
    a = dense_reduction(k_z, root)
    cross = case.k(case.j_test, j_z)
    expected = case.k(case.j_test) - cross @ a @ cross.mT
    latent = model(case.x_test)
    assert error(latent.covariance_matrix, expected) < 1e-9
    assert error(latent.variance.reshape(-1), expected.diagonal()) < 1e-9
    assert torch.equal(latent.mean, case.lin(case.x_test).reshape(latent.mean.shape))
    if case.c > 1:
        blocks = expected.reshape(7, case.c, 7, case.c).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        assert error(point_covariances(latent), blocks) < 1e-9
    # A few more parameters than inducing rows would make K_Z regular; a small share of the identity does it here.
    k_z = k_z + 1e-6 * torch.eye(len(k_z), dtype=DOUBLE)
    a = dense_reduction(k_z, root)
    zero = torch.zeros(len(k_z), dtype=DOUBLE)
    q = MultivariateNormal(zero, 0.5 * ((k_z - k_z @ a @ k_z) + (k_z - k_z @ a @ k_z).mT))
    kl = kl_divergence(q, MultivariateNormal(zero, k_z))
    found = model.variational_strategy.kl_divergence()
    assert abs(float(found.detach()) - float(kl)) < 1e-4 * float(kl)
    h = torch.eye(len(k_z), dtype=DOUBLE) + root.mT @ k_z @ root
    formula = 0.5 * torch.logdet(h) - 0.5 * (k_z @ a).trace()
    assert abs(float(formula) - float(kl)) < 1e-6 * float(kl)


def test_optimum_at_the_training_inputs_is_the_exact_model(case: Case) -> None:
    model = case.model(case.x)
    model.set_optimum(case.data)
    exact = case.exact()
    with torch.no_grad():
        found, expected = model.eval()(case.x_test), exact(case.x_test)
        assert error(found.covariance_matrix, expected.covariance_matrix) < 1e-6
        dense = case.j_test @ torch.linalg.inv(
            case.j.mT @ case.curvature() @ case.j + case.entries.diag()
        ) @ case.j_test.mT  # fmt: skip
        assert error(found.covariance_matrix, dense) < 1e-6
    model.mean = "posterior"
    exact.mean = "posterior"
    with torch.no_grad():
        assert error(model(case.x_test).mean, exact(case.x_test).mean) < 1e-6


@pytest.mark.parametrize("rank", [0, 1])
def test_noise_per_output_and_between_outputs(three: Case, rank: int) -> None:
    likelihood = multitask(3, rank)
    noise = likelihood._shaped_noise_covar(torch.Size((1, 3))).to_dense().detach()
    assert rank == 0 or float(noise[0, 1].abs()) > 1e-3
    model = three.model(three.x, likelihood)
    model.set_optimum(three.data)
    b = torch.kron(torch.eye(len(three.x), dtype=DOUBLE), torch.linalg.inv(noise).contiguous())
    expected = three.j_test @ torch.linalg.inv(three.j.mT @ b @ three.j + three.entries.diag()) @ three.j_test.mT
    assert error(model.eval()(three.x_test).covariance_matrix, expected) < 1e-6
    posterior = model.likelihood(model(three.x_test)).covariance_matrix
    total = expected + torch.kron(torch.eye(7, dtype=DOUBLE), noise)
    assert error(posterior, total) < 1e-6


def test_optimum_is_no_worse_than_any_other_root(case: Case) -> None:
    model = case.model()
    statistics = model.set_optimum(case.data)
    best = model.elbo(case.data)
    assert abs(best - statistics.fixed_mean_bound()) < 1e-7 * abs(best)
    root = model.variational_strategy.variational_root
    start = root.detach().clone()
    for seed in range(5):
        noise = torch.randn(root.shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        with torch.no_grad():
            root.copy_(start * (1 + 0.05 * noise))
        assert model.elbo(case.data) < best
    with torch.no_grad():
        root.copy_(start)
    value = batch_objective(model.train(), case.x, model._batches(case.data, None).collect()[1])
    assert abs(float(value.detach()) - best) < 1e-7 * abs(best)
    (gradient,) = torch.autograd.grad(value, root)
    assert float((gradient * start).abs().max()) < 1e-5 * abs(best)


def test_objective_against_a_dense_oracle(case: Case, capsys: pytest.CaptureFixture) -> None:
    """Σ E_q[log p] − KL, with all its constants."""
    model = case.model()
    root = random_root(model)
    j_z = case.rows(case.x[:6])
    k_z = case.k(j_z)
    h = torch.eye(len(k_z), dtype=DOUBLE) + root.mT @ k_z @ root
    a = root @ torch.linalg.inv(h) @ root.mT
    v = case.k(case.j) - case.k(case.j, j_z) @ a @ case.k(case.j, j_z).mT
    kl = 0.5 * torch.logdet(h) - 0.5 * (k_z @ a).trace()
    if case.classify:
        fit = ref.label_log_likelihood(case.f, case.y) - 0.5 * float((case.curvature() @ v).trace())
    else:
        r = (case.y - case.f).flatten()
        fit = -0.5 * len(r) * math.log(2 * math.pi * 0.04) - 0.5 * float(r @ r + v.trace()) / 0.04
    expected = fit - float(kl)
    assert abs(model.elbo(case.data) - expected) < 1e-9 * abs(expected)
    assert capsys.readouterr().err == ""
    assert abs(model.elbo(case.data, batch_size=5, progress=True) - expected) < 1e-9 * abs(expected)
    assert "bound" in capsys.readouterr().err


def test_elbo_of_the_posterior_mean(three: Case) -> None:
    """The SGPR bound from dense matrices: log N(t; 0, Q + σ²I) − tr(K − Q)/2σ²."""
    model = three.model(mean="posterior")
    statistics = model.set_optimum(three.data)
    j_z = three.rows(three.x[:6])
    q = three.k(three.j, j_z) @ torch.linalg.pinv(three.k(j_z), rtol=1e-12, hermitian=True) @ three.k(j_z, three.j)
    t = (three.y - three.f).flatten() + three.j @ three.theta
    noise = torch.full((len(t),), 0.04, dtype=DOUBLE)
    bound = ref.gaussian_log_evidence(q, t, noise) - float((three.k(three.j) - q).trace()) / 0.08
    assert abs(statistics.collapsed_bound() - bound) < 1e-7 * abs(bound)
    assert abs(model.elbo(three.data) - bound) < 1e-7 * abs(bound)
    assert statistics.fixed_mean_bound() > -math.inf


def test_collapsed_bound_of_a_classification_is_below_the_evidence_of_its_expansion() -> None:
    case = Case(4, True)
    whole = case.model(case.x).statistics(case.data).collapsed_bound()
    exact = case.exact().evidence_problem(curvature="quadratic")
    value = ntkgp.evidence.evidence_objective(exact).evaluate(case.precision).value
    assert abs(whole - value) < 1e-6 * abs(value)
    assert case.model().statistics(case.data).collapsed_bound() < value


# --- gradients and minibatches --------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["elbo", 0.5, 1.0])
@pytest.mark.parametrize("chosen", [False, True])
def test_gradient_in_inducing_inputs_and_root(case: Case, objective: str | float, chosen: bool) -> None:
    index = torch.arange(4) % case.c if chosen else None
    model = case.model(case.x[:4] + 0.1, learn_inducing=True, objective=objective, output_index=index)
    root = random_root(model)
    z = model.inducing_points
    y = model._batches(case.data, None).collect()[1]
    value = batch_objective(model.train(), case.x, y)
    gradients = torch.autograd.grad(value, [z, model.variational_strategy.variational_root])
    for parameter, gradient in zip([z, model.variational_strategy.variational_root], gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
        start, values = parameter.detach().clone(), []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.copy_(start + step * direction)
            values.append(float(batch_objective(model, case.x, y).detach()))
        with torch.no_grad():
            parameter.copy_(start)
        numeric = (values[0] - values[1]) / 2e-5
        assert abs(numeric - float((gradient * direction).sum())) < 1e-5 * max(abs(numeric), 1.0)
    assert root.shape == model.variational_strategy.variational_root.shape


def test_a_minibatch_is_unbiased(case: Case) -> None:
    """The mean over all batches of one size is the objective of all data."""
    model = case.model()
    random_root(model)
    model.train()
    x, y = model._batches(case.data, None).collect()
    whole = float(batch_objective(model, x, y).detach())
    parts = [float(batch_objective(model, a, b).detach()) for a, b in zip(x.split(6), y.split(6), strict=True)]
    assert abs(sum(parts) / len(parts) - whole) < 1e-9 * abs(whole)


def test_stock_variational_elbo_in_a_loop(case: Case) -> None:
    model = case.model(case.x[:4], learn_inducing=True)
    random_root(model)
    bound = gpytorch.mlls.VariationalELBO(model.likelihood, model, num_data=len(case.x))
    model.train()
    output = model(case.x)
    value = bound(output, case.targets)
    if not case.classify:
        expected = model.elbo(case.data) / len(case.x)
        assert abs(float(value.detach()) - expected) < 1e-6 * abs(expected)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first, start = float(value.detach()), model.inducing_points.detach().clone()
    for _ in range(8):
        optimizer.zero_grad()
        loss = -bound(model(case.x), case.targets)
        loss.backward()
        optimizer.step()
    assert -float(loss.detach()) > first
    assert not torch.equal(start, model.inducing_points)
    assert error(model.kernel.precision, case.precision) < 1e-12


def test_alpha_objective_against_quadrature() -> None:
    """(1/α) log E_q p(y|f)^α on a fine grid around the data; α = 1 is the log predictive density."""
    case = Case(1)
    grid = torch.linspace(-12, 12, 20001, dtype=DOUBLE) * 0.2
    for alpha in (0.3, 1.0):
        model = case.model(objective=alpha)
        random_root(model)
        found = batch_objective(model.train(), case.x, case.y[:, 0])
        with torch.no_grad():
            latent = model.eval()(case.x)
            # The likelihood is the narrow factor: integrate over y ± 12 σ/√α.
            f = case.y + grid / math.sqrt(alpha)
            log_p = -0.5 * math.log(2 * math.pi * 0.04) - (case.y - f).square() / 0.08
            log_q = torch.distributions.Normal(latent.mean.unsqueeze(-1), latent.stddev.unsqueeze(-1)).log_prob(f)
            terms = torch.trapezoid((alpha * log_p + log_q).exp(), f, dim=-1).log() / alpha
            expected = terms.sum() - model.variational_strategy.kl_divergence()
        assert abs(float(found.detach()) - float(expected)) < 1e-6 * abs(float(expected))
    for alpha, tolerance in ((1e-6, 1e-4), (1e-9, 1e-7), (1e-12, 1e-7), (1e-300, 1e-7)):
        tiny, elbo = case.model(objective=alpha), case.model()
        for model in (tiny, elbo):
            random_root(model)
        a, b = (float(batch_objective(m.train(), case.x, case.y[:, 0]).detach()) for m in (tiny, elbo))
        assert abs(a - b) < tolerance * abs(b)


@pytest.mark.parametrize("outputs", [1, 3])
def test_noise_below_the_rounding_of_the_covariance(outputs: int) -> None:
    case = Case(outputs, n=40)
    model = case.model(case.x[:20], likelihood=gaussian(1e-12))
    model.kernel.precision = 1e-4
    model.fit(case.data, evidence=None, validation=case.data, progress=False)
    assert math.isfinite(model.history.validation[0])
    scores = predictive_scores(
        model, model.statistics(case.data), Batches.of(case.data, case.lin, model.likelihood), (9.0,)
    )
    assert bool(torch.isfinite(scores).all())


def test_alpha_one_of_a_multi_output_regression_is_the_predictive_density(three: Case) -> None:
    model = three.model(objective=1.0)
    random_root(model)
    found = float(batch_objective(model.train(), three.x, three.y).detach())
    with torch.no_grad():
        latent = model.eval()(three.x)
        blocks = point_covariances(latent) + 0.04 * torch.eye(3, dtype=DOUBLE)
        expected = MultivariateNormal(latent.mean, blocks).log_prob(three.y).sum()
        expected -= model.variational_strategy.kl_divergence()
    assert abs(found - float(expected)) < 1e-9 * abs(found)


def test_classification_objectives_with_little_variance_agree() -> None:
    """As the variance vanishes, expansion, probit and Monte Carlo all become log p(y | f) − KL."""
    case = Case(4, True)
    values = []
    for options in ({}, {"expectation": "mc"}, {"objective": 1.0}, {"objective": 0.4}):
        model = case.model(case.x, **options)
        model.kernel.precision = 1e6
        model.set_optimum(case.data)
        values.append(float(batch_objective(model.train(), case.x, case.y).detach()))
    assert max(values) - min(values) < 1e-2
    assert abs(values[0] - ref.label_log_likelihood(case.f, case.y)) < 1e-2


# --- fits -----------------------------------------------------------------------------------------


def test_fit_of_fixed_inducing_inputs_is_the_optimum(case: Case) -> None:
    model = case.model().fit(case.data, evidence=None, progress=False)
    other = case.model()
    other.set_optimum(case.data)
    assert torch.equal(model.variational_strategy.variational_root, other.variational_strategy.variational_root)
    assert model.history is not None
    assert model.history.stages == ["optimum"]


def test_fit_moves_inducing_inputs_to_a_better_bound(case: Case) -> None:
    model = case.model(case.x[:4] + 0.3, learn_inducing=True)
    model.set_optimum(case.data)
    before = model.elbo(case.data)
    model.fit(case.data, iterations=15, evidence=None, progress=False)
    after = model.elbo(case.data)
    assert after > before + 1e-3 * abs(before)
    assert model.history is not None
    assert model.history.stages == ["optimum", "collapsed", "optimum"]
    assert abs(after - model.history.objective[-1]) < 1e-6 * abs(after)


def test_minibatch_fit_approaches_the_closed_form() -> None:
    """Adam on L alone from a wrong start, with the objective that has a known optimum."""
    from ntkgp.models.variational.fit import FitHistory, _Plan, _Run

    case = Case(1)
    model = case.model()
    best = model.set_optimum(case.data).fixed_mean_bound()
    with torch.no_grad():
        model.variational_strategy.variational_root.mul_(0.05)
    model.train()
    start = model.elbo(case.data)
    plan = _Plan(None, 80, 0.5, 5, 0, False)
    _Run(model, Batches.of(case.data, case.lin, model.likelihood, 8), None, plan, FitHistory())._minibatches()
    assert 0 < best - model.elbo(case.data) < 0.1 * (best - start)


def test_fit_learns_hyperparameters_by_the_evidence_of_a_part() -> None:
    case = Case(1, n=30)
    likelihood = gaussian(0.5)
    model = VariationalNTKGP(case.x[:5], likelihood, case.lin, 30, learn_inducing=False)
    model.fit(case.data, progress=False)
    exact = ntkgp.ExactNTKGP(case.x, case.targets, gaussian(0.5), case.lin)
    report = ntkgp.fit_evidence(exact)
    assert model.history is not None
    assert model.history.stages == ["evidence", "optimum"]
    assert error(model.kernel.precision, report.precision) < 1e-6
    assert error(model.likelihood.noise, report.noise) < 1e-6
    part = VariationalNTKGP(case.x[:5], gaussian(0.5), case.lin, 30, learn_inducing=False)
    part.fit(case.data, evidence_rows=20, progress=False)
    assert part.history is not None
    assert part.history.stages == ["evidence", "bound", "optimum"]
    assert part.history.evidence is not None
    kept = model.kernel.precision.clone()
    model.fit(case.data, progress=False)
    assert torch.equal(kept, model.kernel.precision)
    assert model.history.stages == ["optimum"]


@pytest.mark.parametrize("name", ["three", "softmax"])
def test_statistics_at_other_scales_need_no_pass(name: str) -> None:
    case = Case(*CASES[name])
    model = case.model()
    found = model.statistics(case.data)
    model.kernel.precision = case.precision / 1.7
    noise = 1.0
    if not case.classify:
        noise = 0.6
        model.likelihood.noise = torch.tensor(0.04 * noise, dtype=DOUBLE)
    direct, moved = model.statistics(case.data), found.rescaled(1.7, noise)
    for value in ("collapsed_bound", "fixed_mean_bound"):
        a, b = getattr(direct, value)(), getattr(moved, value)()
        assert abs(a - b) < 1e-8 * abs(a)
    a, b = (s.root() @ s.root().mT for s in (direct, moved))
    assert error(b, a) < 1e-6
    assert error(moved.dual_mean(), direct.dual_mean()) < 1e-6


def test_scales_of_kernel_and_noise_are_the_maximum_of_the_bound() -> None:
    case = Case(3)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(len(case.theta), generator=generator, dtype=DOUBLE) / case.entries.sqrt()
    noise = 0.2 * torch.randn(case.y.shape, generator=generator, dtype=DOUBLE)
    # Drawn from the model, so that the scales are known to be near one.
    case.y = case.f - (case.j @ (case.theta - weights)).view_as(case.f) + noise
    model = case.model(case.x)
    found = model.statistics(case.data)
    kernel, level = found.best_scales(learn_noise=True)
    assert 0.3 < kernel < 3
    assert 0.3 < level < 3
    best = found.rescaled(kernel, level).collapsed_bound()
    for factor in (0.99, 1.01):
        assert found.rescaled(kernel * factor, level).collapsed_bound() < best
        assert found.rescaled(kernel, level * factor).collapsed_bound() < best
    model.fit(case.data, evidence="bound", evidence_rows=30, progress=False)
    assert model.history is not None
    assert model.history.stages == ["evidence", "bound", "optimum"]
    kernel, level = model.statistics(case.data).best_scales(learn_noise=True)
    assert abs(kernel - 1) < 1e-3
    assert abs(level - 1) < 1e-3


@pytest.mark.parametrize("name", ["three", "softmax"])
def test_scale_of_the_kernel_by_validation_data(name: str) -> None:
    """The scores of all scales from one pass are those of models made at each, and the best is kept."""
    case = Case(*CASES[name])
    y = torch.randint(0, 4, (7,), generator=torch.Generator().manual_seed(1)) if case.classify else case.f_test + 0.3
    model = case.model()
    held_out = Batches.of((case.x_test, y), case.lin, model.likelihood, 3)
    scales = (0.2, 1.0, 30.0)
    found = predictive_scores(model, model.statistics(case.data), held_out, scales)
    for scale, score in zip(scales, found.tolist(), strict=True):
        other = case.model()
        other.kernel.precision = case.precision / scale
        other.set_optimum(case.data)
        with torch.no_grad():
            latent = other.eval()(case.x_test)
            if case.classify:
                direct = other.likelihood.log_marginal(y, latent).mean()
            else:
                blocks = point_covariances(latent) + 0.04 * torch.eye(3, dtype=DOUBLE)
                direct = MultivariateNormal(latent.mean, blocks).log_prob(y).mean()
        assert abs(float(direct) - score) < 1e-7 * abs(score)
    model.fit(case.data, evidence="validation", validation=(case.x_test, y), evidence_rows=30, progress=False)
    assert model.history is not None
    assert model.history.stages == ["evidence", "validation", "optimum"]
    held_out = Batches.of((case.x_test, y), case.lin, model.likelihood)
    near = predictive_scores(model, model.statistics(case.data), held_out, (0.6, 1.0, 1.6))
    at_end = float(model.kernel.precision.max()) > 1e3 * float(case.precision.max())
    assert at_end or int(near.argmax()) == 1
    with pytest.raises(ValueError, match="validation"):
        model.fit(case.data, evidence="validation", progress=False)


def test_fit_evidence_maximises_the_collapsed_bound(case: Case) -> None:
    model = case.model(case.x[:12])
    with pytest.raises(RuntimeError, match="no data yet"):
        ntkgp.fit_evidence(model)
    model.fit(case.data, evidence=None, progress=False)
    before = model.statistics(case.data).collapsed_bound()
    report = ntkgp.fit_evidence(model)
    after = model.statistics(case.data)
    assert after.collapsed_bound() > before
    assert abs(after.collapsed_bound() - report.log_evidence) < 1e-5 * max(1.0, abs(report.log_evidence))
    # L follows: its objective is that of the optimum at the new hyper-parameters.
    assert abs(model.elbo(case.data) - after.fixed_mean_bound()) < 1e-6 * abs(after.fixed_mean_bound())


def test_validation_restores_the_best_state() -> None:
    case = Case(4, True, n=30)
    model = case.model(case.x[:5], learn_inducing=True, objective=1.0)
    held_out = (case.x_test, torch.randint(0, 4, (7,), generator=torch.Generator().manual_seed(1)))
    model.fit(
        case.data, epochs=8, learning_rate=0.3, batch_size=10, validation=held_out, patience=3, evidence=None,
        progress=False,
    )  # fmt: skip
    assert model.history is not None
    scores = model.history.validation
    with torch.no_grad():
        now = model.likelihood.log_marginal(held_out[1], model.eval()(held_out[0])).mean()
    assert abs(float(now) - max(scores)) < 1e-12
    assert scores[-1] < max(scores)


def test_an_interrupt_keeps_a_consistent_model(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1)
    model = case.model(learn_inducing=True, objective=1.0).train(False)
    from ntkgp.models.variational import batch as variational_batch

    calls = iter(range(100))

    def interrupted(*args: Any) -> Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return batch_objective(*args)

    monkeypatch.setattr(variational_batch, "batch_objective", interrupted)
    model.fit(case.data, epochs=5, batch_size=6, evidence=None, progress=False)
    assert model.history is not None
    assert model.history.interrupted
    assert not model.training
    assert bool(torch.isfinite(model(case.x_test).variance).all())


def test_tensors_are_shuffled_also_when_they_come_as_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    case, seen = Case(1), []
    monkeypatch.setattr(
        "ntkgp.models.variational.batch.batch_objective", lambda *args: seen.append(args[1]) or batch_objective(*args)
    )
    model = case.model(objective=1.0)
    model.fit(Batches.of(case.data, case.lin, model.likelihood, 8), evidence=None, epochs=2, progress=False)
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert not torch.equal(first, second)
    assert torch.equal(first[first[:, 0].argsort()], second[second[:, 0].argsort()])


def test_loaders_and_their_faults() -> None:
    case = Case(3)
    whole = case.model()
    whole.set_optimum(case.data)
    loader = DataLoader(TensorDataset(*case.data), batch_size=7, shuffle=True)
    model = case.model()
    state = torch.get_rng_state()
    model.fit(loader, evidence=None, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        found, expected = model.eval()(case.x_test), whole.eval()(case.x_test)
    assert error(found.covariance_matrix, expected.covariance_matrix) < 1e-8
    bad = case.y.clone()
    bad[15] = math.nan
    with pytest.raises(ValueError, match="batch 2"):
        case.model().fit(DataLoader(TensorDataset(case.x, bad), batch_size=7), evidence=None, progress=False)
    with pytest.raises(ValueError, match=r"N = 20 rows, the model was made for 24"):
        case.model().fit((case.x[:20], case.y[:20]), evidence=None, progress=False)


def test_a_stream_of_data() -> None:
    case = Case(3)

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(zip(case.x, case.y, strict=True))

    model = case.model(learn_inducing=True, objective=1.0)
    model.fit(DataLoader(Stream(), batch_size=7), epochs=2, evidence=None, progress=False)
    assert model.history is not None
    assert len(model.history.objective) == 2
    with pytest.raises(ValueError, match="N = 24 rows, the model was made for 25"):
        VariationalNTKGP(case.x, gaussian(), case.lin, 25).fit(DataLoader(Stream(), batch_size=7), evidence=None)


def test_duplicated_and_too_many_inducing_inputs(case: Case) -> None:
    """Twice the same inputs say what they say once; K_Z is singular."""
    once, twice = case.model(case.x[:5]), case.model(torch.cat([case.x[:5], case.x[:5]]))
    for model in (once, twice):
        model.set_optimum(case.data)
        model.eval()
    with torch.no_grad():
        a, b = once(case.x_test).covariance_matrix, twice(case.x_test).covariance_matrix
        assert error(a, b) < 1e-6
        more = case.model(torch.cat([case.x, case.x_test]))
        more.set_optimum(case.data)
        assert error(more.eval()(case.x_test).covariance_matrix, case.exact()(case.x_test).covariance_matrix) < 1e-6
    twice = case.model(torch.cat([case.x[:3], case.x[:3]]), learn_inducing=True)
    twice.fit(case.data, iterations=3, evidence=None, progress=False)
    assert math.isfinite(twice.elbo(case.data))


def test_inducing_inputs_without_gradients_leave_the_prior() -> None:
    net = nn.Sequential(nn.Linear(2, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)).double()
    x = torch.randn(12, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    lin = ntkgp.LinearizedNetwork(net, x)
    model = VariationalNTKGP(torch.zeros(3, 2, dtype=DOUBLE), gaussian(), lin, 12, learn_inducing=False)
    model.fit((x, x), validation=(x, x), evidence="validation", progress=False)
    j = ref.jacobian(net, x).flatten(0, 1)
    with torch.no_grad():
        assert error(model(x).covariance_matrix, j @ j.mT / model.kernel.precision[0]) < 1e-9


# --- other kernels --------------------------------------------------------------------------------


def dense_rbf(a: Tensor, b: Tensor, lengthscale: float, scale: float) -> Tensor:
    return scale * (-0.5 * (a.unsqueeze(1) - b).square().sum(-1) / lengthscale**2).exp()


def rbf(lengthscale: float = 0.8, scale: float = 1.7) -> gpytorch.kernels.ScaleKernel:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.outputscale = torch.tensor(scale, dtype=DOUBLE)
    kernel.base_kernel.lengthscale = torch.tensor(lengthscale, dtype=DOUBLE)
    return kernel


@pytest.mark.parametrize("composed", [False, True])
def test_fixed_mean_process_with_another_kernel(case: Case, composed: bool) -> None:
    kernel = rbf()
    if composed:
        tangent = NeuralTangentKernel(case.lin, precision=case.precision).double()
        kernel = tangent + kernel
    model = case.model(kernel=kernel).eval()
    root = random_root(model)

    def k(a: Tensor, b: Tensor) -> Tensor:
        value = torch.kron(dense_rbf(a, b, 0.8, 1.7), torch.eye(case.c, dtype=DOUBLE))
        return value + case.k(case.rows(a), case.rows(b)) if composed else value

    z = case.x[:6]
    cross = k(case.x_test, z)
    expected = k(case.x_test, case.x_test) - cross @ dense_reduction(k(z, z), root) @ cross.mT
    with torch.no_grad():
        latent = model(case.x_test)
        assert error(latent.covariance_matrix, expected) < 1e-9
        assert torch.equal(latent.mean, case.lin(case.x_test).reshape(latent.mean.shape))
        assert error(model.products.blocks(case.x_test), torch.stack([k(r[None], r[None]) for r in case.x_test])) < 1e-9


@pytest.mark.parametrize("outputs", [1, 3])
def test_kernel_on_some_columns(outputs: int) -> None:
    case = Case(outputs)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(), active_dims=[0, 2]).double()
    kernel.base_kernel.lengthscale = torch.tensor(0.8, dtype=DOUBLE)
    kernel.outputscale = torch.tensor(1.7, dtype=DOUBLE)
    model = case.model(kernel=kernel, learn_hyperparameters=False).eval()
    root = random_root(model)

    def k(a: Tensor, b: Tensor) -> Tensor:
        value = dense_rbf(a[:, [0, 2]], b[:, [0, 2]], 0.8, 1.7)
        return torch.kron(value, torch.eye(outputs, dtype=DOUBLE))

    z, x = case.x[:6], case.x_test
    expected = k(x, x) - k(x, z) @ dense_reduction(k(z, z), root) @ k(z, x)
    with torch.no_grad():
        latent = model(x)
        blocks = expected.view(7, outputs, 7, outputs).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        assert error(latent.lazy_covariance_matrix.point_blocks(outputs), blocks) < 1e-9
        assert error(latent.covariance_matrix, expected) < 1e-9
    assert kernel.active_dims.tolist() == [0, 2]


@pytest.mark.parametrize("name", ["landmarks", "network"])
def test_tangent_kernels_that_are_not_the_network_s_own(three: Case, name: str) -> None:
    """A Nyström kernel, and the tangent kernel of another network, keep their own values."""
    if name == "landmarks":
        kernel = NystromKernel(three.lin, three.x[:4], tolerance=0.0)
        scaled = oracle.Nystrom(three.rows(three.x[:4]), torch.ones(three.lin.num_parameters, dtype=DOUBLE))
        k = lambda a, b: scaled.gram(three.rows(a), three.rows(b))  # noqa: E731
    else:
        other = Case(3, seed=5)
        kernel = NeuralTangentKernel(other.lin)
        k = lambda a, b: other.rows(a) @ other.rows(b).mT  # noqa: E731
    model = three.model(kernel=kernel, learn_hyperparameters=False)
    with torch.no_grad():
        kernel.raw_precision.copy_(kernel.raw_precision_constraint.inverse_transform(torch.ones_like(kernel.precision)))
    root = random_root(model)
    z, x = three.x[:6], three.x_test
    inner = torch.linalg.solve(torch.eye(len(root), dtype=DOUBLE) + root.mT @ k(z, z) @ root, root.mT)
    with torch.no_grad():
        found = model.eval()(x).covariance_matrix
    assert error(found, k(x, x) - k(x, z) @ root @ inner @ k(z, x)) < 1e-9
    with pytest.raises(ValueError, match="tangent"):
        model.set_hyperparameters(kernel.precision.detach())


def test_hyperparameters_of_another_kernel_are_learned_with_a_price_for_the_mean() -> None:
    case = Case(3)
    model = case.model(kernel=rbf(3.0, 20.0), learn_inducing=True)
    assert model.learn_hyperparameters
    start = [p.detach().clone() for p in model.kernel.parameters()]
    model.fit(case.data, epochs=15, batch_size=12, learning_rate=3e-2, progress=False)
    assert all(not torch.equal(a, b) for a, b in zip(start, model.kernel.parameters(), strict=True))
    values = model.history.objective if model.history is not None else []
    assert values[-1] > values[0]
    with pytest.warns(UserWarning, match="pays no price"):
        model.variational_strategy.kl_divergence()


@pytest.mark.parametrize("learn_inducing", [False, True])
def test_gradient_in_precisions_and_noise(case: Case, learn_inducing: bool) -> None:
    model = case.model(case.x[:4] + 0.1, learn_inducing=learn_inducing, learn_hyperparameters=True)
    random_root(model)
    with torch.no_grad():
        model.dual_mean.copy_(torch.randn(model.dual_mean.shape, generator=torch.Generator().manual_seed(1)))
    model._fitting = True
    y = model._batches(case.data, None).collect()[1]
    learned = [model.kernel.raw_precision, model.dual_mean, *model.likelihood.parameters()]
    gradients = torch.autograd.grad(batch_objective(model.train(), case.x, y), learned)
    for parameter, gradient in zip(learned, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
        start, values = parameter.detach().clone(), []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.copy_(start + step * direction)
            values.append(float(batch_objective(model, case.x, y).detach()))
        with torch.no_grad():
            parameter.copy_(start)
        numeric = (values[0] - values[1]) / 2e-5
        assert abs(numeric - float((gradient * direction).sum())) < 1e-5 * max(abs(numeric), 1.0)


def test_learned_precisions_of_the_tangent_kernel_do_not_run_away() -> None:
    """The second objective holds the prior scale; its optimum is near that of the evidence."""
    case = Case(1, n=30)
    model = case.model(case.x[:15], learn_hyperparameters=True)
    model.fit(case.data, epochs=40, batch_size=30, learning_rate=5e-2, progress=False)
    ratio = (model.kernel.precision / case.precision).detach()
    assert bool((ratio < 50).all())
    assert bool((ratio > 1 / 50).all())


def test_the_price_of_the_mean_in_the_second_objective() -> None:
    """Objective + surrogate ELBO from dense matrices, RBF, fixed root and mean."""
    case = Case(1)
    model = case.model(kernel=rbf())
    root = random_root(model)
    a_mean = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    with torch.no_grad():
        model.dual_mean.copy_(a_mean)
    z = case.x[:6]
    k_z, cross = dense_rbf(z, z, 0.8, 1.7), dense_rbf(case.x, z, 0.8, 1.7)
    h = torch.eye(6, dtype=DOUBLE) + root.mT @ k_z @ root
    a = root @ torch.linalg.inv(h) @ root.mT
    v = dense_rbf(case.x, case.x, 0.8, 1.7) - cross @ a @ cross.mT
    kl = float(0.5 * torch.logdet(h) - 0.5 * (k_z @ a).trace())

    def fit(mean: Tensor) -> float:
        r = case.y[:, 0] - mean
        return -0.5 * len(r) * math.log(2 * math.pi * 0.04) - 0.5 * float(r @ r + v.trace()) / 0.04

    expected = fit(case.f[:, 0]) + fit(cross @ a_mean) - 2 * kl - 0.5 * float(a_mean @ k_z @ a_mean)
    model._fitting = True
    found = batch_objective(model.train(), case.x, case.y[:, 0])
    assert abs(float(found.detach()) - expected) < 1e-9 * abs(expected)


def test_deep_features() -> None:
    """A kernel on features of the network, as GPyTorch users write it."""
    case = Case(3)

    class Features(gpytorch.kernels.Kernel):
        def __init__(self, base: gpytorch.kernels.Kernel, net: nn.Module) -> None:
            super().__init__()
            self.base, self.net = base, net

        def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Any:
            return self.base(self.net(x1), self.net(x2), diag=diag, **params)

    body = copy.deepcopy(case.net[:-1]).requires_grad_(False)
    model = case.model(kernel=Features(rbf(), body), learn_inducing=True).fit(case.data, epochs=2, progress=False)
    model.eval()
    with torch.no_grad():
        h = body(case.x_test)
        lengthscale = float(model.kernel.base_kernel.base.base_kernel.lengthscale)
        scale = float(model.kernel.base_kernel.base.outputscale)
        prior = model(case.x_test, prior=True).covariance_matrix
    assert isinstance(model.kernel, SharedKernel)
    assert error(prior, torch.kron(dense_rbf(h, h, lengthscale, scale), torch.eye(3, dtype=DOUBLE))) < 1e-9


# --- as a GPyTorch model --------------------------------------------------------------------------


def test_state_dict_pickle_and_copies(case: Case) -> None:
    model = case.model(output_index=torch.arange(6) % case.c)
    model.set_optimum(case.data)
    model.mean = "posterior"
    model.eval()
    with torch.no_grad():
        expected = model(case.x_test)
        other = VariationalNTKGP(
            case.x[6:12], case.default_likelihood(), case.lin, len(case.x), learn_inducing=False, mean="posterior",
            output_index=torch.zeros(6, dtype=torch.long),
        )  # fmt: skip
        other.load_state_dict(model.state_dict())
        for copied in (other.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            found = copied(case.x_test)
            assert torch.equal(found.mean, expected.mean)
            assert error(found.covariance_matrix, expected.covariance_matrix) < 1e-12
            assert copied.variational_strategy.model is copied
            assert copied.products.kernel is copied.kernel
    copied.kernel.precision = 7.0
    assert error(model(case.x_test).covariance_matrix, expected.covariance_matrix) < 1e-12
    assert error(copied(case.x_test).covariance_matrix, expected.covariance_matrix) > 1e-2


def test_a_prediction_follows_every_change(case: Case) -> None:
    model = case.model(learn_inducing=True).eval()
    random_root(model)
    seen = [model(case.x_test).covariance_matrix.detach()]

    def changed() -> bool:
        seen.append(model(case.x_test).covariance_matrix.detach())
        return error(seen[-1], seen[-2]) > 1e-6

    model.kernel.precision = 2 * case.precision
    assert changed()
    with torch.no_grad():
        model.inducing_points.add_(0.2)
    assert changed()
    with torch.no_grad():
        model.variational_strategy.variational_root.mul_(2)
    assert changed()
    with torch.inference_mode():
        model(case.x_test)
    model.train()(case.x_test).variance.sum().backward()


def test_batches_of_inputs_and_gradients_to_them(case: Case) -> None:
    model = case.model().eval()
    random_root(model)
    x = torch.stack([case.x_test, case.x_test.flip(0)])
    with torch.no_grad():
        together, single = model(x), model(case.x_test)
    assert together.batch_shape == (2,)
    assert error(together[0].covariance_matrix, single.covariance_matrix) < 1e-12
    point = case.x_test.clone().requires_grad_()
    value = model(point).variance.sum()
    (gradient,) = torch.autograd.grad(value, point)
    step = torch.zeros_like(point.detach())
    step[2, 1] = 1e-5
    with torch.no_grad():
        numeric = (model(point + step).variance.sum() - model(point - step).variance.sum()) / 2e-5
    assert abs(float(numeric) - float(gradient[2, 1])) < 1e-5 * float(gradient.abs().max())


def test_functions_drawn_have_the_covariance_of_the_process() -> None:
    case = Case(3)
    for index in (None, torch.arange(6) % 3):
        model = case.model(output_index=index)
        model.set_optimum(case.data)
        model.eval()
        with torch.no_grad():
            latent = model(case.x_test[:2])
        draws = model.sample_functions(200, torch.Generator().manual_seed(0))(case.x_test[:2]).flatten(1)
        # Four standard errors of a mean and of a variance.
        assert float((draws.mean(0) - latent.mean.flatten()).abs().max() / latent.stddev.max()) < 4 / 200**0.5
        assert error(torch.cov(draws.mT), latent.covariance_matrix) < 4 * (2 / 200) ** 0.5


def test_botorch_posterior() -> None:
    pytest.importorskip("botorch")
    case = Case(3)
    model = case.model()
    model.set_optimum(case.data)
    model.eval()
    with torch.no_grad():
        posterior, latent = model.posterior(case.x_test), model(case.x_test)
    assert posterior.mean.shape == (7, 3)
    assert error(posterior.variance, latent.variance) < 1e-12


def test_conditioning_on_new_observations() -> None:
    case = Case(3)
    model = case.model()
    model.set_optimum(case.data)
    model.eval()
    with torch.no_grad():
        joint = model(case.x_test)
        new = model.condition_on_observations(case.x_test[:2], case.f_test[:2] + 1.0)
        found = new(case.x_test[2:])
        v = joint.covariance_matrix
        gain = torch.linalg.solve(v[:6, :6] + 0.04 * torch.eye(6, dtype=DOUBLE), v[:6, 6:])
    assert error(found.covariance_matrix, v[6:, 6:] - v[6:, :6] @ gain) < 1e-8
    assert error(found.mean, joint.mean[2:] + (gain.mT @ torch.ones(6, dtype=DOUBLE)).reshape(-1, 3)) < 1e-8


def test_nothing_is_initialised_in_the_first_call() -> None:
    """Copies made at construction stay equal: a lazy random start would make the ranks of a parallel run differ."""
    case = Case(3)
    model = case.model(learn_inducing=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()(case.x)
    model.eval()(case.x_test)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_k_means() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]], dtype=DOUBLE)
    x = (centres.repeat_interleave(30, 0) + 0.1 * torch.randn(90, 2, generator=generator, dtype=DOUBLE))[
        torch.randperm(90, generator=generator)
    ]
    state = torch.get_rng_state()
    labels = (x[:, 0] > 2.5).long()
    found, index = kmeans_inducing_points(x, 5, labels, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert index is not None
    assert index.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal((found[:, 0] > 2.5).long(), index)
    assert float(torch.cdist(found, x).min(-1).values.max()) < 0.3
    with pytest.raises(ValueError, match="num_inducing"):
        kmeans_inducing_points(x, 91)
    with pytest.raises(ValueError, match="class 1"):
        kmeans_inducing_points(torch.randn(10, 2), 6, torch.tensor([0] * 8 + [1] * 2))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)).mean(-2))


def test_integer_inputs() -> None:
    with ref.seeded(0):
        ids = torch.randint(0, 7, (12, 5))
        net = Tokens()
    lin = ntkgp.LinearizedNetwork(net, ids[:3])
    with pytest.raises(ValueError, match="integer inputs"):
        VariationalNTKGP(ids[:4], gaussian(), lin, 12)
    model = VariationalNTKGP(ids[:4], gaussian(), lin, 12, learn_inducing=False)
    model.fit((ids, torch.randn(12, 2, generator=torch.Generator().manual_seed(0))), evidence=None, progress=False)
    assert model.eval()(ids).variance.shape == (12, 2)


@pytest.mark.parametrize(
    ("options", "error_type", "match"),
    [
        ({"objective": 0.0}, ValueError, r"\(0, 1\]"),
        ({"objective": 1.5}, ValueError, r"\(0, 1\]"),
        ({"objective": math.nan}, ValueError, r"\(0, 1\]"),
        ({"objective": "alpha"}, ValueError, "'elbo'"),
        ({"objective": None}, TypeError, "'elbo'"),
        ({"expectation": "exact"}, ValueError, "expectation"),
        ({"mean": "zero"}, ValueError, "mean"),
        ({"kernel": rbf(), "mean": "posterior"}, ValueError, "posterior"),
        ({"kernel": "rbf"}, TypeError, "kernel"),
        ({"kernel": gpytorch.kernels.AdditiveKernel(rbf(), SharedKernel(rbf(), 3))}, ValueError, r"\[1, 3\] outputs"),
        ({"output_index": torch.tensor([0, 1, 2, 3, 0, 0])}, ValueError, "0 … 2"),
        ({"output_index": torch.tensor([0, 1])}, ValueError, r"\(6,\)"),
        ({"output_index": torch.ones(6)}, TypeError, "integers"),
        ({"z": torch.zeros(0, 3)}, ValueError, "inducing_points|N = 0|M = 0"),
        ({"z": torch.full((2, 3), math.nan)}, ValueError, "inducing_points"),
        ({"z": torch.zeros(2, 5)}, ValueError, "inducing_points"),
        ({"likelihood": FixedNoiseGaussianLikelihood(torch.ones(24))}, ValueError, "FixedNoise"),
        ({"likelihood": CategoricalLikelihood(4)}, ValueError, "likelihood"),
    ],
)
def test_bad_arguments(three: Case, options: dict[str, Any], error_type: type[Exception], match: str) -> None:
    with pytest.raises(error_type, match=match):
        three.model(**options)


def test_bad_arguments_of_a_fit(three: Case) -> None:
    model = three.model()
    for options, match in (
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2, "iterations": 3}, "both"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"evidence": "all"}, "evidence"),
    ):
        with pytest.raises(ValueError, match=match):
            model.fit(three.data, progress=False, **options)
    with pytest.raises(RuntimeError, match="fit the model first"):
        three.model(mean="posterior").eval()(three.x_test)
    with pytest.raises(ValueError, match="num_data"):
        VariationalNTKGP(three.x, gaussian(), three.lin, 0)
    with pytest.raises(ValueError, match="expected shape"):
        model.fit((three.x, three.y[:, :2]), progress=False)
