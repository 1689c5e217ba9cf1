"""Each erratum of docs/errata.md: what is printed is wrong by the figures of the page, and what ntkgp does is right.

Figures in bold under "Matters" are compared with what the entry's test measures, within 5 %.
"""

from __future__ import annotations

import ast
import copy
import functools
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from torch import Tensor, nn

import ntkgp
from ntkgp.baselines.l2m import L2M
from ntkgp.baselines.laplace import Laplace
from ntkgp.baselines.moments import second_moments
from ntkgp.baselines.variational_laplace import VariationalLaplace
from ntkgp.evaluation.metrics import categorical_nll, centered_quantile_metric
from ntkgp.evidence import evidence_objective
from ntkgp.kernels import NeuralTangentKernel
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from ntkgp.models.variational.expectations import sampled_term
from tests import reference

DOUBLE = torch.float64
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errata.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
NUMBER = re.compile(r"\*\*([−-]?\d[\d .]*(?:e[−-]?\d+)?)")


@functools.cache
def entries() -> tuple[str, ...]:
    """The page's entries, by their headings of the third level."""
    return tuple(PAGE.read_text(encoding="utf-8").split("\n### ")[1:])


def printed_figures(test: str) -> list[float]:
    """The bold numbers of the entry that names a test of this file first."""
    own = [e for e in entries() if (found := TEST.search(e)) and found[2] == test]
    assert len(own) == 1, f"{test}: {len(own)} entries name it first"
    matters = own[0].partition("* **Matters.**")[2].partition("* **Here.**")[0]
    return [float(n.replace("−", "-").replace(" ", "")) for n in NUMBER.findall(matters)]


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compares what was measured with what the page says."""

    def check(*measured: float | Tensor) -> None:
        found = [float(m) for m in measured]
        print(request.node.originalname, [f"{m:.4g}" for m in found])
        assert found == pytest.approx(printed_figures(request.node.originalname), rel=0.05)

    return check


def test_every_test_named_on_the_page_exists() -> None:
    named = TEST.findall(PAGE.read_text(encoding="utf-8"))
    assert len(named) >= 60
    for path in {path for path, _ in named}:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        missing = {test for file, test in named if file == path} - defined
        assert not missing, f"{path} has no {missing}"


def test_every_test_of_this_file_is_on_the_page() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    own = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}
    named = {test for file, test in TEST.findall(PAGE.read_text(encoding="utf-8")) if file == "tests/test_errata.py"}
    assert own - {n for n in own if n.startswith("test_every_")} == named


def test_every_entry_has_all_its_parts() -> None:
    parts = [f"* **{part}.** " for part in ("Where", "Printed", "Right", "Why", "Matters", "Here", "Test")]
    for entry in entries():
        assert [part for part in parts if part not in entry] == [], entry.splitlines()[0]
        assert TEST.search(entry), entry.splitlines()[0]


# --- dense problems ---------------------------------------------------------------------------------


class Dense(NamedTuple):
    """A reference problem written out; rows input-major, one entry of precision per weight."""

    sample: reference.Sample
    theta: Tensor  # (P,)
    index: Tensor  # (P,)
    precision: Tensor  # (P,)
    f: Tensor  # (NC,)
    f_test: Tensor
    j: Tensor  # (NC, P)
    j_test: Tensor
    noise: Tensor  # (NC,)
    k: Tensor  # (NC, NC)
    cross: Tensor  # (test, train)
    k_test: Tensor

    @property
    def targets(self) -> Tensor:
        """y − f + Jθ̃."""
        return self.sample.y.flatten() - self.f + self.j @ self.theta

    @property
    def covariance(self) -> Tensor:
        """Of the regression posterior at the test inputs."""
        return reference.gaussian_dual_covariance(self.k, self.cross, self.k_test, self.noise)


PROBLEMS = {
    "r": reference.problem_r,
    "c": reference.problem_c,
    "bn": reference.batchnorm_net,
    "u": reference.problem_u,
}


@functools.cache
def dense(kind: str) -> Dense:
    s = PROBLEMS[kind]()
    index = reference.index(s.net, [{name} for name, _ in s.net.named_parameters()])
    precision = s.precision[index]
    j, j_test = (reference.jacobian(s.net, x).flatten(0, 1) for x in (s.x, s.x_test))
    f, f_test = (reference.outputs(s.net, x).flatten() for x in (s.x, s.x_test))
    grams = (reference.gram(a, precision, b) for a, b in ((j, None), (j_test, j), (j_test, None)))
    noise = torch.full((len(j),), s.noise, dtype=DOUBLE)
    return Dense(s, reference.theta(s.net), index, precision, f, f_test, j, j_test, noise, *grams)


def exact(kind: str) -> ntkgp.ExactNTKGP:
    """The package's exact model of a problem."""
    s = PROBLEMS[kind]()
    lin = ntkgp.LinearizedNetwork(s.net, s.x, groups="tensor")
    labels = not s.y.is_floating_point()
    likelihood = CategoricalLikelihood(lin.num_outputs) if labels else gpytorch.likelihoods.GaussianLikelihood()
    model = ntkgp.ExactNTKGP(s.x, s.y, likelihood, lin).eval()
    model.set_hyperparameters(s.precision, None if labels else torch.tensor([s.noise], dtype=DOUBLE))
    return model


def evidence_of(model: ntkgp.ExactNTKGP, at: str = "theta_star") -> float:
    logs = [model.kernel.precision.detach()]
    if not model.is_classification:
        logs.append(model.likelihood.noise.detach().reshape(-1))
    return evidence_objective(model.evidence_problem(), at)(torch.cat(logs).log()).value


def relative(found: Tensor | float, expected: Tensor | float) -> float:
    """Largest difference relative to the largest entry."""
    found, expected = (torch.as_tensor(v).detach().to(DOUBLE) for v in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


def blocks(covariance: Tensor, outputs: int) -> Tensor:
    """C × C covariances of single inputs, (N, C, C)."""
    n = len(covariance) // outputs
    return covariance.reshape(n, outputs, n, outputs)[range(n), :, range(n)]


def posterior(d: Dense) -> reference.Posterior:
    return reference.gaussian_primal(d.j, d.targets, d.precision, d.noise, d.index)


# --- 1. the tutorial --------------------------------------------------------------------------------


def test_tutorial_logistic(figures) -> None:
    x = torch.tensor([[2.0]], dtype=DOUBLE)
    ours = BernoulliLikelihood(link="probit")(MultivariateNormal(x, 1e-14 * torch.ones(1, 1, 1, dtype=DOUBLE))).probs
    assert relative(ours.flatten(), 1 / (1 + torch.exp(-x.flatten()))) < 1e-10
    figures(1 / (1 + math.exp(2.0)), ours)


def test_tutorial_taylor(figures) -> None:
    d = dense("c")
    n, c = len(d.sample.x), 4
    offset = (d.f - d.j @ d.theta).view(n, c)
    star = reference.softmax_theta_star(d.j, offset, d.sample.y, d.precision)

    def joint(theta: Tensor) -> float:
        fit = reference.label_log_likelihood(offset + (d.j @ theta).view(n, c), d.sample.y)
        return fit - float((d.precision * theta.square()).sum()) / 2

    a = d.j.T @ reference.curvature(offset + (d.j @ star).view(n, c)) @ d.j + d.precision.diag()
    step = 0.1 * torch.randn(len(star), generator=torch.Generator().manual_seed(0), dtype=DOUBLE) * d.precision.rsqrt()
    change = joint(star + step) - joint(star)
    figures(abs(change), abs(change + float(step @ a @ step) / 2))


def linear_layer(outputs: int, bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor]:
    with reference.seeded(0) as generator:
        x, x_test = reference._data(generator)
        return nn.Linear(3, outputs, bias=bias).double(), x * torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE), x_test


def test_tutorial_kfac_scale(figures) -> None:
    net, x, x_test = linear_layer(2)
    y = x[:, :2].sin()
    ours = Laplace(net, structure="kfac", groups="single", evidence=None, noise=0.1).fit((x, y))
    found = ours.predict(x_test).latent.covariance_matrix
    eye, inputs, outputs = torch.eye(6, dtype=DOUBLE), x.T @ x, 10 * len(x) * torch.eye(2, dtype=DOUBLE)
    j = reference.jacobian(net, x_test)
    right = j @ torch.linalg.inv(torch.kron(outputs, inputs) / len(x) + eye) @ j.mT
    exactly = reference.jacobian(net, x).flatten(0, 1)
    assert relative(right, j @ torch.linalg.inv(10 * exactly.T @ exactly + eye) @ j.mT) < 1e-12
    assert relative(found, right) < 1e-12
    printed = j @ torch.linalg.inv(torch.kron(outputs, inputs) + eye) @ j.mT
    figures((right / printed)[:, 0, 0].median())


def test_tutorial_kfac_is_a_precision(figures) -> None:
    d = dense("bn")
    a = d.j.T @ (d.j / d.noise.unsqueeze(-1)) + d.precision.diag()
    assert relative(exact("bn")(d.sample.x_test).covariance_matrix, d.covariance) < 1e-9
    assert relative(d.j_test @ torch.linalg.solve(a, d.j_test.T), d.covariance) < 1e-9
    printed = (d.j_test @ a @ d.j_test.T).diagonal()
    figures((printed / d.covariance.diagonal()).sqrt().median())


def test_tutorial_vec_order(figures) -> None:
    net, x, x_test = linear_layer(4)
    with torch.no_grad():
        net.weight.mul_(3)
    y = net(x).argmax(-1)
    ours = Laplace(net, "classification", structure="kfac", groups="single", evidence=None).fit((x, y))
    found = ours.predict(x_test).latent.covariance_matrix
    p = net(x).softmax(-1).detach()
    outputs, inputs = (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)).sum(0), x.T @ x / len(x)
    j, eye = reference.jacobian(net, x_test), torch.eye(12, dtype=DOUBLE)
    right, printed = (
        j @ torch.linalg.inv(torch.kron(*pair) + eye) @ j.mT for pair in ((outputs, inputs), (inputs, outputs))
    )
    assert relative(found, right) < 1e-9
    ratio = printed.diagonal(dim1=1, dim2=2) / right.diagonal(dim1=1, dim2=2)
    figures(ratio.min(), ratio.max())


def test_tutorial_expansion(figures) -> None:
    d = dense("r")
    star = posterior(d).theta_star
    hessian = d.j.T @ (d.j / d.noise.unsqueeze(-1)) + d.precision.diag()

    def loss(theta: Tensor) -> Tensor:
        return ((d.targets - d.j @ theta).square() / d.noise).sum() / 2 + (d.precision * theta.square()).sum() / 2

    step, gradient = star - d.theta, torch.func.grad(loss)(d.theta)
    change = loss(star) - loss(d.theta)
    assert relative(gradient @ step + step @ hessian @ step / 2, change) < 1e-9
    gap = evidence_of(exact("r")) - evidence_of(exact("r"), "theta_map")
    assert gap == pytest.approx(-float(change), rel=1e-9)
    figures(change, step @ hessian @ step)


def test_tutorial_sign_of_the_loss(figures) -> None:
    d = dense("r")
    s = d.sample
    ours = Laplace(s.net, groups="tensor", precision=s.precision, noise=s.noise, evidence=None, mean="posterior")
    star = ours.fit((s.x, s.y)).theta_star
    assert relative(star, posterior(d).theta_star) < 1e-7
    direction = torch.linalg.eigh(d.j.T @ d.j)[1][:, -1]

    def printed(theta: Tensor) -> float:
        fit = reference.gaussian_log_likelihood(d.targets, d.j @ theta, d.noise)
        return fit + float((d.precision * theta.square()).sum())

    figures(printed(star), printed(star + direction), printed(star + 10 * direction))


def test_tutorial_prior_factor(figures) -> None:
    grid = torch.linspace(-12, 12, 24001, dtype=DOUBLE)
    ratios = []
    for precision in (0.5, 3.0):
        weight = torch.exp(-precision * grid.square())
        ratios.append(precision * torch.trapezoid(grid.square() * weight, grid) / torch.trapezoid(weight, grid))
    assert relative(ratios[0], ratios[1]) < 1e-9
    d = dense("r")
    lin = ntkgp.LinearizedNetwork(d.sample.net, d.sample.x, groups="tensor")
    kernel = NeuralTangentKernel(lin)
    kernel.precision = d.sample.precision
    assert relative(kernel(d.sample.x_test).to_dense(), d.k_test) < 1e-12
    figures(ratios[0])


def test_tutorial_prior_covariance(figures) -> None:
    d = dense("bn")
    printed = (d.j_test * d.precision) @ d.j_test.T
    ratio = printed.diagonal() / d.k_test.diagonal()
    lin = ntkgp.LinearizedNetwork(d.sample.net, d.sample.x, groups="tensor")
    kernel = NeuralTangentKernel(lin)
    kernel.precision = d.sample.precision
    assert relative(kernel(d.sample.x_test).to_dense(), d.k_test) < 1e-12
    figures(ratio.min(), ratio.max())


def test_tutorial_offset(figures) -> None:
    d = dense("bn")
    offset = d.f - d.j @ d.theta
    right, printed = (reference.gaussian_log_evidence(d.k, t, d.noise) for t in (d.targets, d.sample.y.flatten()))
    assert evidence_of(exact("bn")) == pytest.approx(right, rel=1e-9)
    assert relative(d.targets, d.sample.y.flatten() - offset) < 1e-12
    # Where every group is homogeneous and the head is dense the printed form holds.
    r = dense("r")
    assert relative(r.f, r.j @ r.theta) < 1e-11
    figures(offset.norm() / d.f.norm(), right, printed)


def test_tutorial_concavity(figures) -> None:
    d = dense("r")
    grid = torch.linspace(-6, 8, 57, dtype=DOUBLE)
    scales = grid.exp()
    fixed, star = [], []
    for scale in scales.tolist():
        scaled = scale * d.precision
        fixed.append(reference.map_log_evidence(d.j, d.targets, d.theta, scaled, d.noise, d.index))
        star.append(reference.gaussian_log_evidence(d.k / scale, d.targets, d.noise))

    def bends(values: list[float], at: Tensor) -> Tensor:
        slopes = torch.tensor(values, dtype=DOUBLE).diff() / at.diff()
        return slopes.diff() / at.diff()[:-1]

    # At fixed weights concave in λ and in log λ as well; with the weights at their optimum in neither.
    assert bool((bends(fixed, scales) < 0).all())
    assert bool((bends(fixed, grid) < 0).all())
    assert bool((bends(star, scales) > 0).any())
    figures(bends(star, grid).max(), bends(fixed, grid).max())


def test_tutorial_table_2(figures) -> None:
    with reference.seeded(0) as generator:
        p = (3 * torch.randn(200, 10, generator=generator, dtype=DOUBLE)).softmax(-1)
    assert float(categorical_nll(p, p.argmax(-1))) > 0
    assert float(categorical_nll(torch.eye(3, dtype=DOUBLE), torch.arange(3))) == 0
    figures(math.exp(0.801))


def test_tutorial_predcp(figures) -> None:
    from ntkgp.inverse.total_variation import expected_total_variation

    s = reference.batchnorm_net(10)
    j, f = reference.jacobian(s.net, s.x_test[:1])[0], reference.outputs(s.net, s.x_test[:1])[0]
    difference, mean = j[1:] - j[:-1], f[1:] - f[:-1]

    def expected(log_variance: Tensor) -> Tensor:
        sd = log_variance.exp().sqrt() * difference.norm(dim=-1)
        folded = sd * math.sqrt(2 / math.pi) * torch.exp(-(mean**2) / (2 * sd**2))
        return (folded + mean * torch.erf(mean / (sd * math.sqrt(2)))).sum()

    at = torch.tensor(math.log(0.01), dtype=DOUBLE)
    value, slope = expected(at), torch.func.grad(expected)(at)
    assert relative(expected_total_variation(f, 0.01 * j @ j.T), value) < 1e-12
    draws = 0.1 * torch.randn(2000, j.shape[1], generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    sampled = (mean + draws @ difference.T).abs().sum(-1)
    assert abs(float(sampled.mean() - value)) < 4 * float(sampled.std()) / 2000**0.5
    # The total variation of the image itself does not depend on the variance: its derivative is zero.
    figures(mean.abs().sum(), value, slope)


# --- 2. variational Laplace -------------------------------------------------------------------------


def test_vl_log_of_a_ratio_of_logs(figures) -> None:
    q, p = torch.distributions.Normal(0.0, 0.3), torch.distributions.Normal(0.5, 1.0)
    x = q.sample((20000,))
    inner = p.log_prob(x) / q.log_prob(x)
    right = -torch.distributions.kl_divergence(q, p)
    assert float((p.log_prob(x) - q.log_prob(x)).mean()) == pytest.approx(float(right), abs=0.05)
    figures(right, 100 * (inner <= 0).double().mean())


def test_vl_determinant_of_the_hessian(figures) -> None:
    d = dense("r")
    star = posterior(d).theta_star
    hessian = -(d.j.T @ (d.j / d.noise.unsqueeze(-1)) + d.precision.diag())
    sign, logdet = torch.linalg.slogdet(hessian)
    assert sign == -1  # 321 weights: the determinant of the negative definite matrix is negative, its log is not real
    assert torch.linalg.slogdet(-hessian)[0] == 1
    joint = reference.gaussian_log_likelihood(d.targets, d.j @ star, d.noise)
    joint -= float((d.precision * star.square()).sum() - d.precision.log().sum()) / 2
    joint -= len(star) / 2 * math.log(2 * math.pi)
    right = joint + len(star) / 2 * math.log(2 * math.pi) - float(logdet) / 2
    assert right == pytest.approx(evidence_of(exact("r")), rel=1e-9)
    figures(right, joint - float(logdet) / 2)


def test_vl_expectation_over_outputs(figures) -> None:
    d = dense("c")
    n, c = 40, 4
    j = d.j.view(n, c, -1)
    p = d.f.view(n, c).softmax(-1)
    half_fisher = 0.5 / n * (d.j * (reference.curvature(d.f.view(n, c)) @ d.j)).sum(0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([torch.multinomial(p, 1, generator=generator)[:, 0] for _ in range(2000)])
    residual = nn.functional.one_hot(draws, c) - p
    squared = n / 2 * (residual.flatten(1) @ j.flatten(0, 1) / n).square()
    live = half_fisher > 1e-3 * half_fisher.max()
    error = (squared[:, live] / half_fisher[live] - 1).square()
    averaged = (squared[:, live].mean(0) / half_fisher[live] - 1).square()
    assert float(averaged.mean().sqrt()) < 0.1
    figures(error.mean().sqrt(), averaged.mean().sqrt())


def test_vl_divergence(figures) -> None:
    d = dense("r")
    s2 = 0.01
    mean, sd = d.theta, torch.full_like(d.theta, 0.05)
    distributions = torch.distributions.Normal(mean, sd), torch.distributions.Normal(0 * mean, s2**0.5)
    right = ((sd.square() + mean.square()) / s2 - 1 + (s2 / sd.square()).log()).sum() / 2
    assert relative(right, torch.distributions.kl_divergence(*distributions).sum()) < 1e-12
    vl = VariationalLaplace(
        d.sample.net, groups="single", precision=1 / s2, noise=d.sample.noise, epochs=1, learning_rate=1e-12
    ).fit((d.sample.x, d.sample.y.unsqueeze(-1)))
    fisher = (d.j.square() / d.noise.unsqueeze(-1)).sum(0)
    assert relative(vl.variance, 1 / (fisher + 1 / s2)) < 1e-9
    figures(((1 / (fisher + 1)) / vl.variance).median())


def test_vl_best_temperature_on_the_test_set(figures) -> None:
    # Ten equally good temperatures whose test scores err independently: the best one looks better than it is.
    scores = torch.randn(40000, 10, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    figures(-scores.min(-1).values.mean())


# --- 3. L2M -----------------------------------------------------------------------------------------


def adamw_network(decay: float = 0.1) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    """Two hidden layers, AdamW, standardised targets, minibatches of 10."""
    with reference.seeded(1) as generator:
        net = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).double()
        x = 8 * torch.rand(40, 1, generator=generator, dtype=DOUBLE) - 4
        y = x**3 + 3 * torch.randn(x.shape, generator=generator, dtype=DOUBLE)
        y = (y - y.mean()) / y.std()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=decay)
        for _ in range(300):
            rows = torch.randperm(40, generator=generator)[:10]
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net, optimizer, x, y


def test_l2m_inverse_precision(figures) -> None:
    net, optimizer, x, y = adamw_network()
    printed = L2M(net, optimizer=optimizer, variant="paper").fit((x, y)).weight_precision.rsqrt()
    right = L2M(net, optimizer=optimizer, batch_size=10, precision=0.1).fit((x, y))
    share = right.data_share
    # Weights of which the data say nothing keep the prior N(0, 1/λ).
    unseen = right.weight_precision.rsqrt()[share < 1e-6]
    assert len(unseen) > 0
    assert relative(unseen, torch.full_like(unseen, 10**0.5)) < 1e-5
    figures(printed.min(), printed.max(), unseen.median(), right.weight_precision.rsqrt().min())


def test_l2m_number_of_data(figures) -> None:
    d = dense("r")
    residual = d.f - d.sample.y
    g = 2 * residual.unsqueeze(-1) * d.j  # of the mean squared error, one row each
    mean, b = g.mean(0), 10
    moments = {n: mean.square() + g.repeat(n // 40, 1).var(0, correction=0) / b for n in (40, 4000)}
    assert relative(moments[40], moments[4000]) < 1e-9
    scale = 1 / (2 * d.sample.noise)
    sums = {n: scale**2 * n * (b * (v - mean.square()) + mean.square()) for n, v in moments.items()}
    assert relative(sums[40], scale**2 * g.square().sum(0)) < 1e-9
    printed = (moments[4000] + 10).rsqrt() / (moments[40] + 10).rsqrt()
    right = (sums[4000] + 0.1).rsqrt() / (sums[40] + 0.1).rsqrt()
    figures(printed.median(), right.median())


def test_l2m_decoupled_decay(figures) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=generator, dtype=DOUBLE)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE) + 0.1 * torch.randn(30, generator=generator, dtype=DOUBLE)
    decay = 0.5
    gram, rhs = 2 * x.T @ x / 30, 2 * x.T @ y / 30
    ridge, unpenalised = (
        torch.linalg.solve(gram + decay * torch.eye(3, dtype=DOUBLE), rhs),
        torch.linalg.solve(gram, rhs),
    )
    ends = {}
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        w = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
        optimizer = kind([w], lr=0.05, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
        for _ in range(1500):
            optimizer.zero_grad()
            nn.functional.mse_loss(x @ w, y).backward()
            optimizer.step()
            schedule.step()
        ends[kind] = w.detach()
    assert relative(ends[torch.optim.Adam], ridge) < 1e-3
    net = nn.Linear(3, 1, bias=False).double()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=decay)
    nn.functional.mse_loss(net(x)[:, 0], y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="AdamW"):
        L2M(net, optimizer=optimizer, batch_size=10).fit((x, y.unsqueeze(-1)))
    figures(relative(ends[torch.optim.AdamW], ridge), relative(ends[torch.optim.AdamW], unpenalised))


def test_l2m_bias_correction(figures) -> None:
    net = nn.Linear(2, 1, bias=False).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    gradient = torch.tensor([[0.3, -2.0]], dtype=DOUBLE)
    for _ in range(1000):
        net.weight.grad = gradient.clone()
        optimizer.step()
    moments = second_moments(optimizer, net)
    assert relative(moments.corrected, gradient.flatten().square()) < 1e-9
    figures((moments.raw / gradient.flatten().square())[0])


# --- 4. Hessian-free Laplace ------------------------------------------------------------------------


def test_hfl_hessian_and_not_gauss_newton() -> None:
    measured = (ROOT / "docs/results/hfl.md").read_text(encoding="utf-8")
    assert "Full Hessian / Gauss-Newton variance: 0.840 to 0.918." in measured
    entry = next(e for e in entries() if "test_hfl_hessian_and_not_gauss_newton" in e)
    assert "0.840 to 0.918" in entry


def test_hfl_amortised(figures) -> None:
    d = dense("r")
    row_means, variance = d.covariance.mean(-1), d.covariance.diagonal()
    # One refit regularised by the mean prediction, on the tangent model: θ_μ = θ⋆ − μ Σ mean_j J_j.
    hessian = d.j.T @ (d.j / d.noise.unsqueeze(-1)) + d.precision.diag()
    moved = -torch.linalg.solve(hessian, d.j_test.mean(0))
    assert relative(-(d.j_test @ moved), row_means) < 1e-9
    ratio = row_means / variance
    figures(ratio.min(), ratio.max(), 100 * (ratio < 0).double().mean())


def test_hfl_absolute_value() -> None:
    # L = ½h(θ − a)² and f = θ, with f̂ = a nearer to 0 than the refit would move it: it is caught at the kink.
    h, mu = 4.0, 0.1
    right, grid = 1 / h, torch.linspace(-1, 1, 2_000_001, dtype=DOUBLE)
    found = {}
    for a in (0.5, 0.005):
        minimum = float(grid[(h / 2 * (grid - a).square() + mu * grid.abs()).argmin()])
        found[a] = abs(minimum - a) / mu
    assert found[0.5] == pytest.approx(right, abs=1e-4)
    assert found[0.005] == pytest.approx(0.005 / mu, abs=1e-4)
    assert printed_figures("test_hfl_absolute_value") == pytest.approx([right, found[0.005]], rel=0.05)


def test_hfl_scale_of_the_loss(figures) -> None:
    d = dense("r")
    hessian = d.j.T @ (d.j / d.noise.unsqueeze(-1)) + d.precision.diag()
    right = d.covariance.diagonal()
    mean_loss = (d.j_test * torch.linalg.solve(hessian / len(d.f), d.j_test.T).T).sum(-1)
    summed = (d.j_test * torch.linalg.solve(hessian, d.j_test.T).T).sum(-1)
    assert relative(summed, right) < 1e-9
    figures((mean_loss / right).median())


def test_hfl_drift(figures) -> None:
    d = dense("r")
    hessian = d.j.T @ (d.j / d.noise.unsqueeze(-1)) + d.precision.diag()
    star, mu, right = posterior(d).theta_star, 0.1, d.covariance.diagonal()
    moved = star - mu * torch.linalg.solve(hessian, d.j_test.T).T  # a refit for each input
    at = {name: -((d.j_test * (moved - start)).sum(-1)) / mu for name, start in (("given", d.theta), ("control", star))}
    assert relative(at["control"], right) < 1e-6
    ratio = at["given"] / right
    figures(ratio.min(), ratio.max())


# --- 5. ELLA, VaLLA, fixed-mean GPs -----------------------------------------------------------------


def test_valla_underfitting(figures) -> None:
    d = dense("bn")
    model = exact("bn")
    assert relative(model(d.sample.x_test).mean.flatten(), d.f_test) < 1e-12
    # What can underfit is the tangent model's own mean.
    star = posterior(d).theta_star
    y = d.sample.y.flatten()
    figures((y - d.f).square().mean().sqrt(), (y - d.f - d.j @ (star - d.theta)).square().mean().sqrt())


def elbo_parts(d: Dense, scale: float, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Latent variances at the data, squared errors and KL of the optimal covariance with the mean fixed at f."""
    k = scale * d.k
    inverse = torch.linalg.inv(k + noise * torch.eye(len(k), dtype=DOUBLE))
    variance = (k - k @ inverse @ k).diagonal()
    divergence = torch.linalg.slogdet(torch.eye(len(k), dtype=DOUBLE) + k / noise)[1] / 2 - (inverse * k).sum() / 2
    return variance, (d.sample.y.flatten() - d.f).square(), divergence


def test_valla_alpha_one(figures) -> None:
    d = dense("r")

    def objectives(noise: float) -> tuple[float, float]:
        variance, errors, divergence = elbo_parts(d, 1.0, noise)
        bound = -((errors + variance) / noise + math.log(2 * math.pi * noise)).sum() / 2 - divergence
        total = variance + noise
        return float(bound), float(-(errors / total + (2 * math.pi * total).log()).sum() / 2 - divergence)

    bound, density = objectives(d.sample.noise)
    grid = torch.logspace(-5, 0, 201, dtype=DOUBLE).tolist()
    best = [max(grid, key=lambda s, i=i: objectives(s)[i]) for i in (0, 1)]
    assert density > bound
    figures(density - bound, best[0], best[1])


def test_valla_scale_of_the_prior(figures) -> None:
    d = dense("r")
    grid = torch.logspace(-6, 3, 37, dtype=DOUBLE).tolist()

    def fixed_mean(scale: float) -> float:
        variance, errors, divergence = elbo_parts(d, scale, d.sample.noise)
        return float(-((errors + variance) / d.noise).sum() / 2 - divergence)

    values = [fixed_mean(s) for s in grid]
    assert values == sorted(values, reverse=True)  # the smaller the prior the better, without end
    evidence = [reference.gaussian_log_evidence(s * d.k, d.targets, d.noise) for s in grid]
    best = evidence.index(max(evidence))
    assert 0 < best < len(grid) - 1
    figures(grid[best])


def test_valla_identity_start(figures) -> None:
    d = dense("r")
    m = 20
    kz, kxz, eye = d.k[:m, :m], d.k[:, :m], torch.eye(20, dtype=DOUBLE)

    def covariance_part(root: Tensor) -> float:
        a = root @ torch.linalg.solve(eye + root.T @ kz @ root, root.T)
        variance = d.k.diagonal() - ((kxz @ a) * kxz).sum(-1)
        divergence = torch.linalg.slogdet(eye + root.T @ kz @ root)[1] / 2 - (kz * a).sum() / 2
        return float(-(variance / d.noise).sum() / 2 - divergence)

    jittered = kz + 1e-8 * kz.diagonal().mean() * eye
    half = torch.linalg.solve(jittered, kxz.T) / d.sample.noise**0.5
    root = torch.linalg.cholesky(half @ half.T + 1e-12 * eye)
    best = covariance_part(root)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = 0.03 * torch.randn(m, m, generator=generator, dtype=DOUBLE).tril()
        assert covariance_part(root * (1 + noise)) < best
    figures(best - covariance_part(eye))


def test_monte_carlo_factor(figures) -> None:
    s = reference.problem_c()
    model = exact("c")
    latent = model(s.x_test)
    covariance = blocks(latent.covariance_matrix.detach(), 4)
    factor = torch.linalg.cholesky(covariance)
    printed = factor.mT @ factor  # of draws zL; Lz has L Lᵀ
    assert relative(factor @ factor.mT, covariance) < 1e-12
    ratio = printed.diagonal(dim1=1, dim2=2) / covariance.diagonal(dim1=1, dim2=2)
    draws = torch.randn(40000, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    mean = latent.mean.detach()

    def averaged(cov: Tensor) -> Tensor:
        root = torch.linalg.cholesky(cov)
        return torch.stack([(m + draws @ r.T).softmax(-1).mean(0) for m, r in zip(mean, root, strict=True)])

    ours = CategoricalLikelihood(4, link="mc", num_samples=20000, seed=1)
    found = ours(MultitaskMultivariateNormal(mean.unsqueeze(1), covariance)).probs.squeeze(1)
    right, wrong = averaged(covariance), averaged(printed)
    assert float((found - right).abs().max()) < 0.02
    figures(ratio.min(), ratio.max(), (wrong - right).abs().max())


def test_noise_added_twice(figures) -> None:
    d = dense("r")
    latent = d.covariance.diagonal()
    ours = exact("r")
    found = ours.likelihood(ours(d.sample.x_test)).variance
    assert relative(found, latent + d.sample.noise) < 1e-9
    # At the data, where the latent variance is below the noise.
    at_data = (d.k - d.k @ torch.linalg.solve(d.k + d.noise.diag(), d.k)).diagonal()
    figures(((at_data + 2 * d.noise) / (at_data + d.noise)).median())


def test_weight_decay_overwritten(figures) -> None:
    with reference.seeded(0) as generator:
        net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        x = torch.randn(60, 3, generator=generator, dtype=DOUBLE)
        y = (x.sum(-1) > 0).long()
    norms = {}
    for decay in (0.0, 0.01):
        copied = copy.deepcopy(net)
        optimizer = torch.optim.Adam(copied.parameters(), lr=1e-2, weight_decay=0.01)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1, momentum=0.5, weight_decay=decay)
        for _ in range(1000):
            optimizer.zero_grad()
            nn.functional.cross_entropy(copied(x), y).backward()
            optimizer.step()
        norms[decay] = float(reference.theta(copied).square().sum())
    figures(norms[0.0] / norms[0.01])


def test_valla_alpha_of_a_classification(figures) -> None:
    f, label = torch.tensor([1.0, -0.5, 0.2], dtype=DOUBLE), torch.tensor(1)
    alpha = 0.5
    probabilities = f.softmax(-1) ** alpha
    printed = -nn.functional.cross_entropy(probabilities.log(), label) / alpha
    # Without variance (1/α) log E p^α is log p for every α.
    right = f.log_softmax(-1)[label]
    draws = torch.randn(8, 1, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    ours = sampled_term(f[None], label[None], 1e-14 * torch.eye(3, dtype=DOUBLE)[None], alpha, draws)
    assert float(ours) == pytest.approx(float(right), abs=1e-5)
    with pytest.raises(ZeroDivisionError):
        _ = -1 / 0.0
    figures(printed, right)


def test_quantile_metric_end(figures) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(4000, dtype=DOUBLE)
    y = 1.3 * torch.randn(4000, generator=generator, dtype=DOUBLE)
    ours = float(centered_quantile_metric(mean, torch.ones_like(mean), y))
    levels = np.arange(1, 10) / 10
    half = torch.special.ndtri(torch.as_tensor(0.5 + levels / 2))
    gaps = np.abs((y.abs().unsqueeze(-1) < half).double().mean(0).numpy() - levels)
    right, printed = (torch.trapezoid(torch.tensor([0.0, *gaps, end], dtype=DOUBLE), dx=0.1) for end in (0.0, 1.0))
    assert ours == pytest.approx(float(right), rel=1e-9)
    figures(right, printed)


def test_fixed_mean_gp_coupled_outputs(figures) -> None:
    with reference.seeded(0) as generator:
        phi = torch.randn(5, 7, generator=generator, dtype=DOUBLE).tanh()
        head = nn.Linear(7, 3).double()
    j = reference.jacobian(head, phi)
    right = j @ j.mT
    assert relative(ntkgp.LinearizedNetwork(head, phi, groups="single").gram_diagonals(phi)[0], right) < 1e-12
    inner = phi.square().sum(-1)[:, None, None]
    eye = torch.eye(3, dtype=DOUBLE)
    assert relative((inner + 1) * eye, right) < 1e-12
    printed = inner * torch.ones(3, 3, dtype=DOUBLE) + eye
    correlation = printed[:, 0, 1] / printed[:, 0, 0]
    assert float(right[:, 0, 1].abs().max()) == 0
    figures(correlation.min(), correlation.max())


def test_fixed_mean_gp_length_scale(figures) -> None:
    with np.errstate(invalid="ignore"):
        assert math.isnan(float(torch.log(torch.tensor(np.log(0.8)))))
    # √(median of the squared distances / 2) of 13 standardised inputs.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 13, generator=generator, dtype=DOUBLE)
    right = float((torch.pdist(x).square().median() / 2).sqrt())
    figures(right, math.log(right))


def test_ella_small_eigenvalues(figures) -> None:
    d = dense("r")
    j = torch.cat([d.j, d.j[:20] + 1e-9]).float()  # landmarks that nearly repeat each other, as augmented data do
    gram, jitter = j @ j.T, 0.0
    values, vectors = torch.linalg.eigh(gram)
    while not bool((values > 0).all()):
        jitter = 10 * jitter if jitter else 1e-10
        values, vectors = torch.linalg.eigh(gram + jitter * torch.eye(60))
    printed = j.T @ (vectors / values.sqrt())
    kept = torch.linalg.eigh(j.double() @ j.double().T)
    chosen = kept[0] > 1e-10 * kept[0].max()
    right = j.double().T @ (kept[1][:, chosen] / kept[0][chosen].sqrt())
    errors = [float((v.T @ v - torch.eye(v.shape[1])).abs().max()) for v in (printed.double(), right)]
    assert errors[0] > 0.1
    assert errors[1] < 1e-4
    figures(int(chosen.sum()), len(gram))


def test_ella_collapse(figures) -> None:
    d = dense("bn")
    n, c = 30, 3
    picked = torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(0)) + c * torch.arange(n)
    root = d.precision.rsqrt()
    landmarks = d.j[picked] * root
    _, values, directions = torch.linalg.svd(landmarks, full_matrices=False)
    directions = directions[values > 1e-5 * values[0]]
    phi, phi_test = ((rows * root) @ directions.T for rows in (d.j, d.j_test))
    inner = phi.T @ phi / d.sample.noise + torch.eye(len(directions), dtype=DOUBLE)
    ratio = (phi_test * torch.linalg.solve(inner, phi_test.T).T).sum(-1) / d.covariance.diagonal()
    assert float(ratio.max()) <= 1 + 1e-9
    figures(ratio.min(), ratio.median())


# --- 6. sampling-based inference --------------------------------------------------------------------


def test_same_key_for_every_leaf(figures) -> None:
    with reference.seeded(0) as generator:
        layers = [nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()]
        net = nn.Sequential(*layers, nn.Linear(4, 4)).double()
        x = torch.randn(200, 4, generator=generator, dtype=DOUBLE)
    j = reference.jacobian(net, x).flatten(0, 1)
    sizes = [(tuple(p.shape), p.numel()) for p in net.parameters()]
    shared = {shape: torch.eye(count, dtype=DOUBLE) for shape, count in sizes}
    parts = dict.fromkeys(shared, 0)
    for (shape, _), columns in zip(sizes, j.split([count for _, count in sizes], dim=1), strict=True):
        parts[shape] = parts[shape] + columns
    printed = sum(part.square().sum(-1) for part in parts.values())  # draws equal in tensors of equal shape
    ratio = (printed / j.square().sum(-1)).sqrt()
    figures(ratio.min(), ratio.max())


def test_unused_clamps(figures) -> None:
    gamma, norm = 1.0, 1e-14  # weights that the data do not use: γ is clipped to 1, ‖θ⋆‖² is nearly 0
    d = dense("r")
    j = torch.cat([d.j, torch.zeros(40, 1, dtype=DOUBLE)], -1)
    precision, index = torch.cat([d.precision, torch.ones(1, dtype=DOUBLE)]), torch.cat([d.index, torch.tensor([4])])
    found = reference.gaussian_primal(j, d.targets, precision, d.noise, index)
    assert float(found.gamma[-1]) == 0
    assert float(found.norms[-1]) == 0
    figures(gamma / norm)


# --- 7. laplace-torch -------------------------------------------------------------------------------


def test_functional_laplace_order_of_axes(figures) -> None:
    d = dense("bn")
    c, test, train = 3, 6, 30
    k = d.cross.reshape(test, c, train, c)  # test, its output, train, its output
    factor = torch.linalg.cholesky(d.k + d.noise.diag())
    own = blocks(d.k_test, c)

    def variance(rows: Tensor) -> Tensor:
        v = torch.linalg.solve_triangular(factor, rows, upper=False)
        return own - v.mT @ v

    printed = variance(k.permute(0, 2, 1, 3).reshape(test, -1, c))
    right = variance(k.permute(0, 2, 3, 1).reshape(test, -1, c))
    assert relative(right, blocks(d.covariance, c)) < 1e-9
    assert relative(blocks(exact("bn")(d.sample.x_test).covariance_matrix, c), right) < 1e-9
    figures(printed.diagonal(dim1=1, dim2=2).min(), right.diagonal(dim1=1, dim2=2).min())


def test_functional_laplace_evidence(figures) -> None:
    d = dense("r")

    def both(noise: float) -> tuple[float, float, float]:
        variances = torch.full_like(d.noise, noise)
        right = reference.gaussian_log_evidence(d.k, d.targets, variances)
        a = d.k + variances.diag()
        twice = (torch.linalg.slogdet(a)[1] + d.targets @ torch.linalg.solve(a, d.targets)) / 2
        fit = reference.gaussian_log_likelihood(d.sample.y, d.f, variances)
        refit = fit - float(((d.sample.y - d.f).square() / noise).sum()) / 2
        return right, fit - float(twice), refit - float(twice)

    assert evidence_of(exact("r")) == pytest.approx(both(d.sample.noise)[0], rel=1e-9)
    grid = torch.logspace(-4, 0, 161, dtype=DOUBLE).tolist()
    best = [max(grid, key=lambda noise, i=i: both(noise)[i]) for i in (0, 1)]
    figures(*both(0.01), *best)


def test_functional_laplace_shrunk_prior(figures) -> None:
    d = dense("u")
    m = 4

    def variance(scale: float) -> Tensor:
        k, cross = scale * d.k[:m, :m], scale * d.cross[:, :m]
        return reference.gaussian_dual_covariance(k, cross, scale * d.k_test, d.noise[:m]).diagonal()

    full, right, printed = d.covariance.diagonal(), variance(1.0), variance(m / 40)
    assert relative(exact("u")(d.sample.x_test).variance, full) < 1e-8
    assert bool((right >= full * (1 - 1e-9)).all())  # fewer data, more variance
    ratio = printed / full
    figures(100 * (ratio < 1).double().mean(), ratio.min())


def test_regression_grid_search(figures) -> None:
    d = dense("r")
    y = torch.sin(2 * d.sample.x_test.sum(-1))
    errors, scores = [], []
    for scale in torch.logspace(-4, 4, 9, dtype=DOUBLE).tolist():
        k, cross, own = d.k / scale, d.cross / scale, d.k_test / scale
        variance = reference.gaussian_dual_covariance(k, cross, own, d.noise).diagonal() + d.sample.noise
        errors.append(float((y - d.f_test).square().mean()))  # of the linearised mean, f: no precision in it
        scores.append(float(((y - d.f_test).square() / variance + (2 * math.pi * variance).log()).mean()) / 2)
    assert len(set(errors)) == 1
    figures(min(scores), max(scores))


def test_functional_laplace_diagonal_curvature(figures) -> None:
    d = dense("c")
    b = reference.curvature(d.f.view(40, 4))
    own = d.k_test
    diagonal = reference.gaussian_dual_covariance(d.k, d.cross, own, 1 / b.diagonal()).diagonal()
    right = (d.j_test @ torch.linalg.solve(d.j.T @ b @ d.j + d.precision.diag(), d.j_test.T)).diagonal()
    assert relative(exact("c")(d.sample.x_test).covariance_matrix.diagonal(), right) < 1e-8
    ratio = diagonal / right
    figures(ratio.min(), ratio.median())


def test_functional_laplace_confident_points(figures) -> None:
    d = dense("c")
    s = d.sample
    net = copy.deepcopy(s.net)
    with torch.no_grad():
        net[-1].weight.mul_(400)
        net[-1].bias.mul_(400)
    j, j_test = (reference.jacobian(net, x).flatten(0, 1) for x in (s.x, s.x_test))
    f = reference.outputs(net, s.x)
    p = f.float().softmax(-1)
    curvature = (p * (1 - p)).flatten().double()
    k, cross, own = (reference.gram(a, d.precision, b) for a, b in ((j, None), (j_test, j), (j_test, None)))
    printed = reference.gaussian_dual_covariance(k, cross, own, torch.nan_to_num(1 / curvature, posinf=10.0)).diagonal()
    b = reference.curvature(f)
    right = (j_test @ torch.linalg.solve(j.T @ b @ j + d.precision.diag(), j_test.T)).diagonal()
    figures(100 * (curvature == 0).double().mean(), (printed / right).median())


def test_functional_samples_share_their_noise(figures) -> None:
    d = dense("r")
    sd = d.covariance.diagonal().sqrt()
    correlation = d.covariance / sd / sd.unsqueeze(-1)
    draws = exact("r")(d.sample.x_test).rsample(torch.Size([4000])).detach()
    assert float((torch.corrcoef(draws.T) - correlation).abs().max()) < 0.1
    off = correlation[~torch.eye(len(sd), dtype=torch.bool)]
    figures(off.abs().median())


def test_full_curvature_in_single_precision() -> None:
    d = dense("bn")
    half = d.j / d.noise.sqrt().unsqueeze(-1)
    rounded = (half.T.float() @ half.float()).double()
    found = d.j_test @ torch.linalg.solve(rounded + d.precision.diag(), d.j_test.T)
    assert relative(found, d.covariance) > 1e-8
    assert relative(exact("bn")(d.sample.x_test).covariance_matrix, d.covariance) < 1e-9


def installed() -> tuple[object, object]:
    """laplace-torch and its backends, where they are installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        laplace = pytest.importorskip("laplace")
        curvature = pytest.importorskip("laplace.curvature")
    from importlib.metadata import version

    if version("laplace-torch") != "0.3":
        pytest.skip(f"written against laplace-torch 0.3, found {version('laplace-torch')}")
    return laplace, curvature


def fitted(kind: str, structure: str, **options: object):
    """Their Laplace approximation of a regression problem, with one precision of 2 and Curvlinops."""
    laplace, curvature = installed()
    s = PROBLEMS[kind]()
    options = {"backend": curvature.CurvlinopsGGN, "prior_precision": 2.0, "sigma_noise": s.noise**0.5} | options
    la = laplace.Laplace(copy.deepcopy(s.net), "regression", "all", structure, **options)
    y = s.y if s.y.ndim == 2 else s.y.unsqueeze(-1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(s.x, y), batch_size=10)
    la.fit(loader)
    return la, loader


def single(kind: str) -> Dense:
    """A regression problem with one precision of 2."""
    d = dense(kind)
    k, cross, own = (reference.gram(a, torch.full_like(d.precision, 2.0), b) for a, b in (
        (d.j, None), (d.j_test, d.j), (d.j_test, None)
    ))  # fmt: skip
    return d._replace(precision=torch.full_like(d.precision, 2.0), k=k, cross=cross, k_test=own)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("probe", ["axes", "evidence", "shrunk", "samples", "generator", "mode", "data", "mutation"])
def test_probe_of_laplace_torch(probe: str) -> None:
    if probe == "axes":
        la, _ = fitted("bn", "gp", n_subset=30)
        assert float(la(reference.batchnorm_net().x_test)[1].diagonal(dim1=1, dim2=2).min()) < 0
    elif probe == "evidence":
        la, loader = fitted("r", "gp", n_subset=40)
        d = single("r")
        a = d.k + d.noise.diag()
        twice = (torch.linalg.slogdet(a)[1] + d.targets @ torch.linalg.solve(a, d.targets)) / 2
        fit = reference.gaussian_log_likelihood(d.sample.y, d.f, d.noise)
        assert float(la.log_marginal_likelihood()) == pytest.approx(float(fit - twice), rel=1e-6)
        la.fit(loader)
        again = fit - float(((d.sample.y - d.f).square() / d.noise).sum()) / 2
        assert float(la.log_marginal_likelihood()) == pytest.approx(float(again - twice), rel=1e-6)
    elif probe == "shrunk":
        la, _ = fitted("r", "gp", n_subset=4)
        far = 1e3 * torch.ones(1, 3, dtype=DOUBLE)
        j = reference.jacobian(reference.problem_r().net, far).flatten(0, 1)
        assert float(la(far)[1]) < 0.11 * float(reference.gram(j, single("r").precision))
    elif probe == "samples":
        la, _ = fitted("r", "kron")
        draws = la.functional_samples(reference.problem_r().x_test[:2], pred_type="glm", n_samples=2000).squeeze(-1)
        assert float(torch.corrcoef(draws.T)[0, 1].abs()) > 0.999
        joint = la(reference.problem_r().x_test[:2], joint=True)[1]
        assert float((joint[0, 1] / (joint[0, 0] * joint[1, 1]).sqrt()).abs()) < 0.95
    elif probe == "generator":
        la, _ = fitted("r", "kron")
        x = reference.problem_r().x_test[:2]
        first, second = (
            la(x, pred_type="nn", link_approx="mc", n_samples=5, generator=torch.Generator().manual_seed(0))[0]
            for _ in range(2)
        )
        assert not torch.equal(first, second)
    elif probe == "mode":
        laplace, _ = installed()
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).train()
        la = laplace.Laplace(net, "regression", "all", "diag")
        la.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 1))))
        assert not net.training
    elif probe == "data":
        la, _ = fitted("r", "gp", n_subset=40)
        assert any(isinstance(v, torch.utils.data.DataLoader) for v in la.state_dict().values())
    elif probe == "mutation":
        la, _ = fitted("r", "diag")
        la.log_marginal_likelihood(prior_precision=torch.tensor(5.0, dtype=DOUBLE))
        assert float(la.prior_precision) == 5.0


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_probe_of_image_shaped_outputs(structure: str) -> None:
    laplace, _ = installed()
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))
    data = torch.utils.data.TensorDataset(torch.randn(6, 1, 5, 5), torch.randn(6, 1, 5, 5))
    la = laplace.Laplace(net, "regression", "all", structure)

    def run() -> None:
        la.fit(torch.utils.data.DataLoader(data, batch_size=3))
        la(torch.randn(2, 1, 5, 5))

    # Errors from inside einsum or indexing, none of which names the outputs.
    with pytest.raises((RuntimeError, ValueError, AssertionError, IndexError, NotImplementedError)):
        run()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["bn", "r"])
def test_probe_of_kfac_and_normalisers(kind: str) -> None:
    laplace, _ = installed()
    s = PROBLEMS[kind]()
    net = copy.deepcopy(s.net)
    if kind == "r":
        net[1] = nn.LayerNorm(16).double()  # with affine parameters
    y = s.y if s.y.ndim == 2 else s.y.unsqueeze(-1)
    la = laplace.Laplace(net, "regression", "all", "kron")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(s.x, y), batch_size=10)
    with pytest.raises(Exception, match="un-supported layers"):
        la.fit(data)


# --- 8. other codes ---------------------------------------------------------------------------------


def test_bayesian_lora_evidence(figures) -> None:
    with reference.seeded(0) as generator:
        rank, wide, kept = 3, 8, 5
        factors = [
            (torch.randn(rank, rank, generator=generator, dtype=DOUBLE).tril(),
             torch.randn(wide, kept, generator=generator, dtype=DOUBLE)) for _ in range(2)
        ]  # fmt: skip
        weights = [0.1 * torch.randn(rank * wide, generator=generator, dtype=DOUBLE) for _ in range(2)]
    fit = -20.0
    ours, printed = [], []
    for s2 in (0.01, 0.1, 1.0):
        logdet = logdet_small = 0.0
        for small, large in factors:
            h = torch.kron(large @ large.T, small @ small.T)
            logdet += float(torch.linalg.slogdet(torch.eye(len(h), dtype=DOUBLE) + s2 * h)[1])
            m = torch.eye(rank * kept, dtype=DOUBLE) + s2 * torch.kron(large.T @ large, small.T @ small)
            logdet_small += float(torch.linalg.slogdet(m)[1])
        assert logdet == pytest.approx(logdet_small, rel=1e-9)  # the small determinant is right
        squared = sum(float(w.square().sum()) for w in weights)
        ours.append(fit - squared / (2 * s2) - logdet / 2)
        norms = sum(float(w.norm()) for w in weights)
        printed.append(fit + norms / s2 + (logdet_small - rank * wide * math.log(s2)) / 2)
    figures(*ours, *printed)


def test_bayes_dip_jitter(figures) -> None:
    eye, eps, size = torch.eye(3, dtype=DOUBLE), 1e-6, 3
    everywhere, diagonal = eye + eps, eye * (1 + eps)
    assert float((everywhere - diagonal).abs().max()) == pytest.approx(eps)
    # The only use is of 1 × 1 kernels, where the two are the same number.
    one = torch.ones(1, 1, dtype=DOUBLE)
    assert torch.equal(one + eps, one * (1 + eps))
    figures(relative(everywhere @ torch.ones(size, dtype=DOUBLE), diagonal @ torch.ones(size, dtype=DOUBLE)) * 1e6)


def test_bayes_dip_predcp_is_tempered(figures) -> None:
    from ntkgp.inverse.total_variation import TVPredCP

    # One pixel pair, s² = v: κ(v) = E|δ|, δ ~ N(m, v t); density of v for κ ~ Exp(scale).
    mean, t, scale = 0.3, 2.0, 0.05
    logs = torch.linspace(-40, 40, 40001, dtype=DOUBLE)

    def kappa(log_v: Tensor) -> Tensor:
        sd = (log_v.exp() * t).sqrt()
        folded = sd * math.sqrt(2 / math.pi) * torch.exp(-(mean**2) / (2 * sd**2))
        return folded + mean * torch.erf(mean / (sd * math.sqrt(2)))

    value = kappa(logs)
    slope = (logs.exp() * t).sqrt() / math.sqrt(2 * math.pi) * torch.exp(-(mean**2) / (2 * logs.exp() * t))
    autograd = torch.func.vmap(torch.func.grad(kappa))(logs[15000:25000:500])
    assert relative(autograd, slope[15000:25000:500]) < 1e-9
    right = (scale * torch.exp(-scale * value) * slope) / math.exp(-scale * mean)
    assert float(torch.trapezoid(right, logs)) == pytest.approx(1, rel=1e-3)  # a density
    live = slope > 0
    modes = [logs[live][(power * slope[live].log() - scale * value[live]).argmax()].exp() for power in (1.0, scale)]
    lin = ntkgp.LinearizedNetwork(reference.batchnorm_net().net, reference.batchnorm_net().x_test[:1], groups="single")
    masses = []
    for form in ("density", "tempered"):
        ours = TVPredCP(lin, reference.batchnorm_net().x_test[:1], scale, form=form, image_shape=(1, 3))
        grid = torch.linspace(-40, 40, 2001, dtype=DOUBLE)
        masses.append(torch.trapezoid(torch.func.vmap(lambda v, p=ours: p.log_density(v[None]))(grid).exp(), grid))
    assert float(masses[0]) == pytest.approx(1, rel=1e-3)
    assert abs(float(masses[1]) - 1) > 0.1
    figures(modes[0], modes[1])


def test_bayes_dip_mixed_evidence(figures) -> None:
    d = dense("bn")
    with reference.seeded(3) as generator:
        a = torch.randn(20, 90, generator=generator, dtype=DOUBLE) / 90**0.5
        y = a @ d.sample.y.flatten() + 0.2 * torch.randn(20, generator=generator, dtype=DOUBLE)
    aj, noise = a @ d.j, torch.full((20,), 0.04, dtype=DOUBLE)
    targets = y - a @ d.f + aj @ d.theta
    k = reference.gram(aj, d.precision)
    right = reference.gaussian_log_evidence(k, targets, noise)
    at = reference.gaussian_primal(aj, targets, d.precision, noise, d.index)
    assert at.log_evidence == pytest.approx(right, rel=1e-9)
    constant = 20 * math.log(2 * math.pi) + float(torch.linalg.slogdet(k + noise.diag())[1])

    def mixed(residual: Tensor, weights: Tensor) -> float:
        return -float((residual.square() / noise).sum() + (d.precision * weights.square()).sum() + constant) / 2

    assert mixed(targets - aj @ at.theta_star, at.theta_star) == pytest.approx(right, rel=1e-9)
    printed = mixed(y - a @ d.f, at.theta_star)  # the residual of the image itself, the norm of the linear solution
    figures(right, printed)


def test_torch_layer_norm_derivatives(figures) -> None:
    d = dense("r")
    with reference.seeded(0):
        net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = d.sample.x[:1]
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    v = {name: torch.randn(p.shape, generator=generator, dtype=DOUBLE) for name, p in parameters.items()}

    def product(inputs: Tensor) -> Tensor:
        return torch.func.jvp(lambda p: torch.func.functional_call(net, p, (inputs,)), (parameters,), (v,))[1].sum()

    def differences(function: Callable[[Tensor], Tensor]) -> Tensor:
        steps = 1e-5 * torch.eye(3, dtype=DOUBLE)
        return torch.stack([(function(x + e) - function(x - e)) / 2e-5 for e in steps]).flatten()

    expected = differences(product)
    leaf = x.clone().requires_grad_()
    theirs = torch.autograd.grad(product(leaf), leaf)[0].flatten()
    lin = ntkgp.LinearizedNetwork(net, x, groups="single")
    leaf = x.clone().requires_grad_()
    flat = torch.cat([v[name].flatten() for name in parameters])
    ours = torch.autograd.grad(lin.jvp(leaf, flat).sum(), leaf)[0].flatten()
    assert relative(ours, expected) < 1e-7
    if torch.__version__.startswith("2.13"):
        figures(relative(theirs, expected))


def test_gpytorch_softmax_transposes(figures) -> None:
    with reference.seeded(0) as generator:
        logits = 2 * torch.randn(3, 3, generator=generator, dtype=DOUBLE)
    stock = gpytorch.likelihoods.SoftmaxLikelihood(num_classes=3, num_features=3, mixing_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = stock(logits).probs
    covariance = 1e-14 * torch.eye(3, dtype=DOUBLE).expand(3, 3, 3)
    ours = CategoricalLikelihood(3)(MultitaskMultivariateNormal(logits.unsqueeze(1), covariance)).probs.squeeze(1)
    assert relative(ours, logits.softmax(-1)) < 1e-6
    assert relative(found, logits.T.softmax(-1)) < 1e-12
    figures((found - logits.softmax(-1)).abs().max())


def test_gpytorch_variational_start(figures) -> None:
    def model() -> gpytorch.models.ApproximateGP:
        class Model(gpytorch.models.ApproximateGP):
            def __init__(self) -> None:
                z = torch.linspace(-1, 1, 16, dtype=DOUBLE).unsqueeze(-1)
                q = gpytorch.variational.CholeskyVariationalDistribution(16)
                super().__init__(gpytorch.variational.VariationalStrategy(self, z, q))
                self.mean_module = gpytorch.means.ZeroMean()
                self.covar_module = gpytorch.kernels.RBFKernel()

            def forward(self, x: Tensor) -> MultivariateNormal:
                return MultivariateNormal(self.mean_module(x), self.covar_module(x))

        return Model().double()

    first, second = model(), model()
    second.load_state_dict(first.state_dict())  # what a broadcast before the first pass does
    x = torch.linspace(-1, 1, 5, dtype=DOUBLE).unsqueeze(-1)
    for seed, m in enumerate((first, second)):
        torch.manual_seed(seed)
        m(x)
    means = [m.variational_strategy._variational_distribution.variational_mean for m in (first, second)]
    figures((means[0] - means[1]).detach().abs().max())


# --- 9. statements in general use -------------------------------------------------------------------


def test_evidence_at_the_trained_weights(figures) -> None:
    s = reference.problem_r()
    x, y = s.x, s.y
    sd = {}
    for at in ("theta_star", "theta_map"):
        lin = ntkgp.LinearizedNetwork(s.net, x, groups="single")
        model = ntkgp.ExactNTKGP(x, y, gpytorch.likelihoods.GaussianLikelihood(), lin)
        ntkgp.fit_evidence(model, at=at)
        sd[at] = model.eval()(s.x_test).variance.detach().sqrt()
    gap = evidence_of(exact("r")) - evidence_of(exact("r"), "theta_map")
    figures(gap, (sd["theta_map"] / sd["theta_star"]).median())


def test_evidence_of_the_residual(figures) -> None:
    d = dense("r")
    residual = d.sample.y - d.f
    grid = torch.logspace(-8, 4, 25, dtype=DOUBLE).tolist()
    noise = float(residual.square().mean())
    values = [
        reference.gaussian_log_evidence(s * d.k, residual, torch.full_like(d.noise, noise)) for s in grid
    ]  # fmt: skip
    assert values[0] == max(values)
    right = [reference.gaussian_log_evidence(s * d.k, d.targets, d.noise) for s in grid]
    best = right.index(max(right))
    assert 0 < best < 24
    model = exact("r")
    with pytest.raises(ValueError, match="residual"):
        ntkgp.fit_evidence(model, targets="residual")
    figures(values[0], values[grid.index(min(grid, key=lambda s: abs(s - 1)))])


def test_inverse_of_the_softmax_curvature(figures) -> None:
    d = dense("c")
    b = reference.curvature(d.f.view(40, 4))
    values = torch.linalg.eigvalsh(b)
    null = int((values < 1e-12 * values.max()).sum())
    right = (d.j_test @ torch.linalg.solve(d.j.T @ b @ d.j + d.precision.diag(), d.j_test.T)).diagonal()
    assert relative(exact("c")(d.sample.x_test).covariance_matrix.diagonal(), right) < 1e-8
    pseudo = d.k_test - d.cross @ torch.linalg.solve(d.k + torch.linalg.pinv(b), d.cross.T)
    ratio = pseudo.diagonal() / right
    figures(null, ratio.min(), ratio.median())


def test_single_precision_of_normalised_weights(figures) -> None:
    s = reference.problem_r()
    changes = {}
    for groups in ("single", "normalization"):
        sd = []
        for scale in (1.0, 5.0):
            net = copy.deepcopy(s.net)
            with torch.no_grad():
                net[0].weight.mul_(scale)
                net[3].weight.div_(scale)
            assert relative(reference.outputs(net, s.x_test), reference.outputs(s.net, s.x_test)) < 1e-9
            lin = ntkgp.LinearizedNetwork(net, s.x, groups=groups)
            model = ntkgp.ExactNTKGP(s.x, s.y, gpytorch.likelihoods.GaussianLikelihood(), lin)
            ntkgp.fit_evidence(model)
            sd.append(model.eval()(s.x_test).variance.detach().sqrt())
        changes[groups] = relative(sd[1], sd[0])
    assert changes["normalization"] < 1e-4
    figures(changes["single"])


def test_euler_identity_in_evaluation_mode(figures) -> None:
    s = reference.batchnorm_net()
    j = reference.jacobian(s.net, s.x, ["0.weight", "0.bias"])
    theta = reference.theta(s.net, ["0.weight", "0.bias"])
    change = (j @ theta).square().mean().sqrt() / reference.outputs(s.net, s.x).square().mean().sqrt()
    scaled = copy.deepcopy(s.net)
    with torch.no_grad():
        scaled[0].weight.mul_(3)
        scaled[0].bias.mul_(3)
        scaled[1].running_mean.mul_(3)
        scaled[1].running_var.mul_(9)
    assert relative(reference.outputs(scaled, s.x), reference.outputs(s.net, s.x)) < 1e-9
    lin = ntkgp.LinearizedNetwork(s.net, s.x)
    assert sum(lin.groups.is_normalized) == 3
    figures(change)


def test_shortcut_of_a_variance_bound(figures) -> None:
    d = dense("r")
    a = d.k + d.noise.diag()
    w = torch.zeros_like(d.cross.T)
    residual = d.cross.T.clone()
    direction = residual.clone()
    for _ in range(8):  # conjugate gradients, stopped early
        image = a @ direction
        step = residual.square().sum(0) / (direction * image).sum(0)
        w = w + step * direction
        new = residual - step * image
        direction = new + new.square().sum(0) / residual.square().sum(0) * direction
        residual = new
    w = 1.02 * w  # inexact otherwise too
    right, own = d.covariance.diagonal(), d.k_test.diagonal()
    bound = own - 2 * (w * d.cross.T).sum(0) + (w * (a @ w)).sum(0)
    shortcut = own - (w * d.cross.T).sum(0)
    assert bool((bound >= right * (1 - 1e-9)).all())
    figures((shortcut / right).min())


def test_arithmetic_of_printed_numbers(figures) -> None:
    figures(114.9 / 43.2, 114.9 / 41.8, 40000 * 100 / 60000)
