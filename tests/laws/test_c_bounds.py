"""Laws C7, C13, C14, C16, C17, C18 and the control B21n: what stands above and below the exact posterior."""

import copy

import gpytorch
import pytest
import torch
from gpytorch.constraints import Positive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ntkgp
from ntkgp.evidence.bounds import action_variance, fischer_logdet, group_logdet, logdet_bounds, variance_bounds
from ntkgp.solvers import NystromPreconditioner, solve
from tests import reference as ref
from tests.laws.problems import DOUBLE, Problem, law, problem, violation


def system(p: Problem) -> Tensor:
    """K + σ²I."""
    return p.k + p.noise * torch.eye(len(p.k), dtype=DOUBLE)


def landmarks(p: Problem, m: int) -> NystromPreconditioner:
    chosen = torch.randperm(len(p.k), generator=torch.Generator().manual_seed(0))[:m]
    return NystromPreconditioner(p.k[:, chosen], p.k[chosen][:, chosen], p.noise)


def inside(low: Tensor, v: Tensor, high: Tensor, slack: float = 1e-9) -> bool:
    return bool((low <= v * (1 + slack)).all() and (v <= high * (1 + slack)).all())


def subnetwork_covariance(p: Problem, kept: list[str]) -> Tensor:
    """Posterior covariance with the parameters of these names alone, at equal precisions and noise."""
    net = copy.deepcopy(p.net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in kept)
    lin = ntkgp.LinearizedNetwork(net, p.x, groups="tensor")
    reference = p.model()
    model = ntkgp.ExactNTKGP(p.x, reference.train_targets, copy.deepcopy(reference.likelihood), lin).eval()
    owner = {name: g for g, members in enumerate(p.lin.groups.members) for name in members}
    model.kernel.precision = p.precision[[owner[name] for name in kept]]
    return model(p.x_test).covariance_matrix.detach()


@law("R", "BN", "C", groups="tensor", examples=2)
def test_C7_subnetwork_below_the_full_posterior(p: Problem):
    full = p.covariance()
    names = [name for name, _ in p.net.named_parameters()]
    for kept in (names[-2:], names[::2]):  # the last layer, and a subnetwork
        assert violation(full - subnetwork_covariance(p, kept)) <= p.tol(1e-11)


@pytest.mark.parametrize("name", ["R", "U", "BN", "C"])
def test_C7_the_last_layer_falls_short(name):
    p = problem(name)
    part = subnetwork_covariance(p, [name for name, _ in p.net.named_parameters()][-2:])
    assert (part.diagonal() / p.covariance().diagonal()).median() < 0.9


@law("R", "U", "BN", "C", examples=6)
def test_C13_fischer_over_data_and_over_outputs(p: Problem):
    n, c = len(p.k), p.num_outputs
    a = torch.eye(n, dtype=DOUBLE) + p.k / p.noise
    exact = torch.linalg.slogdet(a)[1]
    sizes = [2**i for i in range(20) if 2**i < n] + [n]
    values = torch.stack([fischer_logdet(a, size) for size in sizes])
    slack = p.tol(1e-9) * exact.abs()
    assert (values >= exact - slack).all()
    assert (values.diff() <= slack).all()  # merging blocks
    assert abs(values[-1] - exact) <= slack
    outputs = [torch.arange(n)[start::c] for start in range(c)]
    assert fischer_logdet(a, outputs) >= exact - slack
    assert values[0] > exact + 1e-3  # a bound, no identity


@law("R", "U", "BN", examples=6)
def test_C14_block_diagonal_ggn(p: Problem):
    phi = p.j * p.entries.rsqrt()
    ggn = torch.eye(phi.shape[1], dtype=DOUBLE) + phi.T @ phi / p.noise
    exact = torch.linalg.slogdet(ggn)[1]
    blocks = [(p.index == g).nonzero()[:, 0] for g in range(len(p.precision))]
    bound = fischer_logdet(ggn, blocks)
    assert bound >= exact - p.tol(1e-9) * exact.abs()
    grams = torch.stack([p.j[:, block] @ p.j[:, block].T for block in blocks])
    dual = group_logdet(grams, p.precision.reciprocal(), p.noise)
    assert abs(dual - bound) <= p.tol(1e-9) * bound.abs()


def test_C14_the_packages_grams_of_the_reference_problem():
    p = problem("R")
    bound = group_logdet(p.lin.grams(p.x), p.precision.reciprocal(), p.noise)
    assert bound > torch.linalg.slogdet(torch.eye(40, dtype=DOUBLE) + p.k / p.noise)[1] + 1.0


@law("R", "U", "BN", examples=8)
def test_C16_any_iterate_of_any_solver(p: Problem):
    a, cross, prior, v = system(p), p.cross.T, p.k_test.diagonal(), p.v.diagonal()
    generator = torch.Generator().manual_seed(1)
    for m in (1, 3, len(a) // 2, len(a)):
        nystrom = landmarks(p, m)
        exact = torch.linalg.solve(a, cross)
        iterates = [torch.zeros_like(cross), 0.5 * exact, torch.randn(cross.shape, generator=generator, dtype=DOUBLE)]
        iterates += [
            exact * (1 + 10.0**-k * torch.randn(cross.shape, generator=generator, dtype=DOUBLE)) for k in (1, 4)
        ]
        for steps in (1, 3, 10):
            iterates.append(solve(a, cross, max_iterations=steps).solution)
            iterates.append(solve(a, cross, preconditioner=nystrom, max_iterations=steps, tolerance=1e-12).solution)
        for w in iterates:
            for certificate in (nystrom, None):
                low, high = variance_bounds(a, cross, prior, w, certificate, noise=p.noise)
                assert inside(low, v, high)


@law("R", "BN", "C", "CNN", examples=8)
def test_C16_by_the_model(p: Problem):
    model = p.model()
    v = model(p.x_test).variance.detach()
    # Single precision: the rounding of the Jacobians is the same on both sides.
    slack = max(1e-9, 4e-16 * p.condition)
    widths = []
    for steps in (0, 1, 3, 10, 60):
        low, high = model.posterior_bounds(p.x_test, steps, preconditioner=3)
        assert low.shape == high.shape == v.shape
        assert inside(low, v, high, slack)
        widths.append(float(((high - low) / v).median()))
    assert widths[-1] < 0.5 * widths[0]


@law("R", "U", "BN", examples=6)
def test_C17_actions_stand_above(p: Problem):
    a, cross, prior, v = system(p), p.cross.T, p.k_test.diagonal(), p.v.diagonal()
    actions = torch.randn(len(a), len(a) + 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    actions[:, 3] = actions[:, 1]  # what repeats changes nothing
    before = prior
    for m in (1, 2, 4, 8, len(a) + 2):
        now = action_variance(a, cross, prior, actions[:, :m])
        assert (now <= before + 1e-9 * prior).all()
        assert (now >= v * (1 - p.tol(1e-9)) - 1e-12 * prior).all()
        before = now
    assert torch.allclose(before, v, rtol=p.tol(1e-6))  # all of the space
    units = torch.eye(len(a), dtype=DOUBLE)[:, ::2]  # dropping data is an action too (B9)
    subset = prior - (cross[::2] * torch.linalg.solve(a[::2, ::2], cross[::2])).sum(0)
    assert torch.allclose(action_variance(a, cross, prior, units), subset, rtol=1e-6)


@law("R", "U", "BN", examples=8)
def test_C18_log_determinant(p: Problem):
    exact = torch.linalg.slogdet(system(p))[1]
    trace = p.k.diagonal().sum() / p.noise
    slack = p.tol(1e-9) * exact.abs()
    last = None
    for m in (1, 3, len(p.k) // 2, len(p.k)):
        nystrom = landmarks(p, m)
        low, high = logdet_bounds(nystrom, trace)
        assert low <= exact + slack
        assert exact <= high + slack
        printed = nystrom.logdet() + trace - nystrom.whitened_trace()  # C18 as printed
        assert high <= printed + slack
        last = high - low
    assert last <= 1e-4 * trace  # all landmarks: what the jitter leaves


@pytest.mark.parametrize("name", ["R", "U", "BN"])
def test_B21n_the_shortcut_is_no_upper_bound(name):
    p = problem(name)
    a, cross, prior, v = system(p), p.cross.T, p.k_test.diagonal(), p.v.diagonal()
    w = 1.2 * torch.linalg.solve(a, cross)
    shortcut = prior - (w * cross).sum(0)
    assert (shortcut < v * (1 - 1e-3)).any()
    low, high = variance_bounds(a, cross, prior, w, landmarks(p, 5))
    assert inside(low, v, high)


# --- the certificate experiment -------------------------------------------------------------------


def experiment(seed: int = 1, n: int = 400) -> tuple[ntkgp.ExactNTKGP, Tensor]:
    """Problem R with 32 hidden units, 800 steps, Λ = I, σ² = .04; 20 test points out of distribution."""
    with ref.seeded(seed) as generator:
        norm = lambda: nn.LayerNorm(32, eps=0.0, elementwise_affine=False)  # noqa: E731
        net = nn.Sequential(
            nn.Linear(3, 32, bias=False), norm(), nn.Tanh(), nn.Linear(32, 32, bias=False), norm(), nn.Tanh(),
            nn.Linear(32, 1),
        ).double()  # fmt: skip
        x = torch.randn(n, 3, generator=generator, dtype=DOUBLE)
        x_test = 2 * torch.randn(20, 3, generator=generator, dtype=DOUBLE)
        y = torch.sin(2 * x.sum(-1)) + 0.1 * torch.randn(n, generator=generator, dtype=DOUBLE)
        ref.train(net, lambda: (net(x).squeeze(-1) - y).square().mean(), 800)
    lin = ntkgp.LinearizedNetwork(net, x, groups="single")
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=Positive(torch.exp, torch.log))
    model = ntkgp.ExactNTKGP(x, y, likelihood, lin, form="dual").eval()
    model.likelihood.noise = torch.tensor(0.04, dtype=DOUBLE)
    model.kernel.precision = torch.ones(1, dtype=DOUBLE)
    return model, x_test


def test_certificate_experiment():
    model, x_test = experiment()
    assert model.lin.num_parameters == 1153
    gram = model.lin.grams(model.train_inputs[0]).sum(0)
    assert 1e5 < torch.linalg.cond(gram + 0.04 * torch.eye(400, dtype=DOUBLE)) < 1e7
    v = model(x_test).variance.detach()
    a = model.whitened_system()
    cross = a.reduce(model.lin.weighted_gram(model.train_inputs[0], x_test, torch.ones(1)))
    prior = model.lin.gram_diagonals(x_test).flatten()
    nystrom = model.nystrom(100)
    for steps in (5, 10, 20, 40):
        for preconditioner in (None, nystrom):
            w = solve(a, cross, preconditioner=preconditioner, tolerance=1e-12, max_iterations=steps).solution
            for certificate in (None, nystrom):
                low, high = variance_bounds(a, cross, prior, w, certificate, diagonal=1 + a.diagonal())
                assert inside(low, v, high)
    for steps, allowed in ((10, 2e-2), (20, 1e-6)):
        low, high = model.posterior_bounds(x_test, steps, nystrom)
        assert ((high - low) / v).median() <= allowed


# --- no violation, whatever the numbers -----------------------------------------------------------


def exact_variance(phi: Tensor, phi_test: Tensor, noise: float) -> Tensor:
    """φ⋆(I + ΦᵀΦ/σ²)⁻¹φ⋆ᵀ by the weights: a sum of squares, accurate where the dual form is a difference."""
    r = torch.linalg.qr(torch.cat([phi / noise**0.5, torch.eye(phi.shape[1], dtype=DOUBLE)]), mode="r").R
    return torch.linalg.solve_triangular(r.T, phi_test.T, upper=False).square().sum(0)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 12), features=st.integers(1, 14), m=st.integers(1, 8),
    log_noise=st.floats(-6, 3), decay=st.floats(0, 3), log_error=st.floats(-12, 1), steps=st.integers(0, 8),
    solver=st.sampled_from(["zero", "random", "near", "cg", "pcg"]), repeated=st.booleans(),
)  # fmt: skip
def test_C16_and_C18_without_a_violation(seed, n, features, m, log_noise, decay, log_error, steps, solver, repeated):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -decay, features, dtype=DOUBLE)
    phi, phi_test = (scale * torch.randn(k, features, generator=generator, dtype=DOUBLE) for k in (n, 3))
    if repeated:
        phi[-1] = phi[0]
    noise = 10.0**log_noise
    k, cross, prior = phi @ phi.T, phi @ phi_test.T, phi_test.square().sum(-1)
    a = k + noise * torch.eye(n, dtype=DOUBLE)
    chosen = torch.randint(n, (m,), generator=generator)
    nystrom = NystromPreconditioner(k[:, chosen], k[chosen][:, chosen], noise)
    exact = torch.linalg.solve(a, cross)
    spread = torch.randn(cross.shape, generator=generator, dtype=DOUBLE)
    w = {
        "zero": lambda: torch.zeros_like(cross),
        "random": lambda: spread,
        "near": lambda: exact + 10.0**log_error * exact.abs().max() * spread,
        "cg": lambda: solve(a, cross, max_iterations=steps, tolerance=1e-14).solution,
        "pcg": lambda: solve(a, cross, preconditioner=nystrom, max_iterations=steps, tolerance=1e-14).solution,
    }[solver]()
    v = exact_variance(phi, phi_test, noise)
    for certificate in (nystrom, None):
        assert inside(*_around(v, variance_bounds(a, cross, prior, w, certificate, noise=noise)))
    low, high = logdet_bounds(nystrom, k.diagonal().sum() / noise)
    logdet = torch.linalg.svdvals(torch.cat([phi, noise**0.5 * torch.eye(features, dtype=DOUBLE)]))
    logdet = 2 * logdet.log().sum() + (n - features) * torch.tensor(noise, dtype=DOUBLE).log()
    slack = 1e-9 * (1 + logdet.abs())
    assert low <= logdet + slack
    assert logdet <= high + slack


def _around(v: Tensor, bounds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return bounds[0], v, bounds[1]
