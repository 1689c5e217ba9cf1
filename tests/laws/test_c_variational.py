"""Laws C9, C10, C11 (its ELBO) and C15: variational inducing inputs against the exact posterior and evidence."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import NamedTuple

import gpytorch
import torch
from gpytorch.constraints import Positive
from torch import Tensor

from ntkgp.models.variational import VariationalNTKGP
from tests import reference as ref
from tests.laws.problems import DOUBLE, Problem, law, rel, violation

SIZES = (5, 10, 20, 40)


class Fitted(NamedTuple):
    """An optimal model of M nested inducing inputs with what it says."""

    model: VariationalNTKGP
    rows: Tensor  # of J at Z
    bound: float
    covariance: Tensor


@functools.lru_cache(maxsize=64)
def fitted(p: Problem, m: int) -> Fitted:
    """Optimal L for the first M rows of a random permutation of the training inputs."""
    order = torch.randperm(len(p.x), generator=torch.Generator().manual_seed(0))[:m]
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=Positive(torch.exp, torch.log))
    model = VariationalNTKGP(p.x[order], likelihood, p.lin, len(p.x), learn_inducing=False, mean="posterior")
    model.kernel.precision = p.precision
    model.likelihood.noise = torch.tensor(p.noise, dtype=DOUBLE)
    y = p.y if p.num_outputs > 1 else p.y[:, 0]
    bound = model.set_optimum((p.x, y)).collapsed_bound()
    with torch.no_grad():
        covariance = model.eval()(p.x_test).covariance_matrix
    rows = p.j.reshape(len(p.x), -1, p.j.shape[-1])[order].flatten(0, 1)
    return Fitted(model, rows, bound, covariance)


def sizes(p: Problem) -> list[int]:
    return sorted({min(m, len(p.x)) for m in SIZES})


def nystrom(p: Problem, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """K̂(a, b) from landmark rows of J."""
    k_z = ref.gram(rows, p.entries)
    inverse = torch.linalg.pinv(0.5 * (k_z + k_z.mT), rtol=1e-10, hermitian=True)
    return ref.gram(a, p.entries, rows) @ inverse @ ref.gram(rows, p.entries, b)


def evidence(p: Problem) -> float:
    return float(ref.gaussian_log_evidence(p.k, p.t, p.noise_rows))


def slack(p: Problem) -> float:
    """Rounding of an evidence: 1e-6 absolute for the reference problem, scaled by size and condition of others."""
    unit = 2e-16 if p.dtype == DOUBLE else 2e-6
    return max(1e-6, unit * p.condition * (abs(evidence(p)) + float(p.t.square().sum()) / p.noise))


@law("R", examples=3, dtype=DOUBLE, log_noise=-1.0)
def test_C9_optimal_variational_posterior_is_ELLA_plus_the_residual(p):
    """V_VaLLA − V_ELLA = K⋆⋆ − Q⋆⋆ ≽ 0."""
    for m in sizes(p):
        f = fitted(p, m)
        q, q_cross, q_test = (nystrom(p, f.rows, *ab) for ab in ((p.j, p.j), (p.j_test, p.j), (p.j_test, p.j_test)))
        noise = torch.full((len(q),), p.noise, dtype=DOUBLE)
        ella = q_test - q_cross @ torch.linalg.solve(q + noise.diag(), q_cross.mT)
        residual = p.k_test - q_test
        tol = p.tol(1e-9)
        assert float((f.covariance - ella - residual).abs().max() / p.k_test.abs().max()) < max(tol, 1e-7)
        assert violation(residual) < max(tol, 1e-9)


def test_C10_variational_variance_is_no_upper_bound():
    """ANTI-LAW: at its inducing inputs the optimal variance lies below the exact one, by half and more on problem R."""
    from tests.laws.problems import problem

    p = problem("R")
    for m in (5, 10, 20):
        f = fitted(p, m)
        with torch.no_grad():
            found = f.model(f.model.inducing_points).variance
        exact = (f.rows @ p.primal.covariance @ f.rows.mT).diagonal()
        assert bool((found <= exact * (1 + 1e-9)).all())
        k_z = ref.gram(f.rows, p.entries)
        a = torch.linalg.solve(k_z + 1e-12 * k_z.diagonal().mean() * torch.eye(m, dtype=DOUBLE),
                               ref.gram(f.rows, p.entries, p.j)).mT  # fmt: skip
        s_z = torch.linalg.inv(torch.linalg.inv(k_z) + a.mT @ a / p.noise).diagonal()
        assert rel(found, s_z) < 1e-5
    assert float((fitted(p, 5).covariance.diagonal() / p.v.diagonal()).max()) > 2  # elsewhere far above
    f = fitted(p, 5)
    with torch.no_grad():
        below = f.model(f.model.inducing_points).variance / (f.rows @ p.primal.covariance @ f.rows.mT).diagonal()
    assert float(below.min()) < 0.5


@law("R", examples=4, dtype=DOUBLE, log_noise=(-1.0, 0.0))
def test_C11_elbo_is_a_lower_bound_increasing_in_nested_landmarks_and_exact_for_all(p):
    bounds = [fitted(p, m).bound for m in sizes(p)]
    top, tol = evidence(p), slack(p)
    assert all(b <= top + tol for b in bounds)
    assert all(a <= b + tol for a, b in itertools.pairwise(bounds))
    assert abs(bounds[-1] - top) < max(tol, 1e-6 * abs(top))
    f = fitted(p, sizes(p)[0])
    y = p.y if p.num_outputs > 1 else p.y[:, 0]
    assert abs(f.model.elbo((p.x, y)) - f.bound) < max(tol, 1e-7 * abs(f.bound))


def test_C11_elbo_values_of_the_reference_problem_by_dense_matrices():
    from tests.laws.problems import problem

    p = problem("R")
    for m in SIZES:
        f = fitted(p, m)
        q = nystrom(p, f.rows, p.j, p.j)
        direct = ref.gaussian_log_evidence(q, p.t, p.noise_rows) - float((p.k - q).trace()) / (2 * p.noise)
        assert abs(f.bound - direct) < 1e-6 * max(1.0, abs(direct))


@law("R", examples=3, dtype=DOUBLE, log_noise=-1.0)
def test_C11_no_other_root_or_mean_reaches_the_bound(p):
    """The ELBO of any q lies below the collapsed bound, hence below the evidence."""
    y = p.y if p.num_outputs > 1 else p.y[:, 0]
    f = fitted(p, sizes(p)[0])
    root, dual = f.model.variational_strategy.variational_root, f.model.dual_mean
    start = root.detach().clone(), dual.detach().clone()
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(3):
            with torch.no_grad():
                root.copy_(start[0] * (1 + 0.1 * torch.randn(root.shape, generator=generator, dtype=DOUBLE)))
                dual.copy_(start[1] * (1 + 0.1 * torch.randn(dual.shape, generator=generator, dtype=DOUBLE)))
            assert f.model.elbo((p.x, y)) < f.bound + slack(p)
    finally:
        with torch.no_grad():
            root.copy_(start[0])
            dual.copy_(start[1])


@law("R", examples=3, dtype=DOUBLE, log_noise=-1.0)
def test_C15_divergence_of_the_processes_decreases_in_nested_landmarks(p):
    """KL[Q‖P] = M − ELBO, which is that of the joint Gaussians over data and inducing variables for every M.

    On a finite set that does not hold Z it need not decrease; only the process divergence does.
    """
    divergences = [evidence(p) - fitted(p, m).bound for m in sizes(p)]
    tol = slack(p)
    assert all(d > -tol for d in divergences)
    assert all(a + tol >= b for a, b in itertools.pairwise(divergences))
    f = fitted(p, sizes(p)[0])
    # The same number from two Gaussians over the function at the training inputs, which hold Z.
    with torch.no_grad():
        q = f.model(p.x)
        mean = q.mean.flatten() - p.offset.flatten()
        v = q.covariance_matrix
    n = len(v)
    posterior = p.k - p.k @ torch.linalg.solve(p.k + p.noise * torch.eye(n, dtype=DOUBLE), p.k)
    centre = p.k @ torch.linalg.solve(p.k + p.noise * torch.eye(n, dtype=DOUBLE), p.t)
    values, vectors = torch.linalg.eigh(0.5 * (p.k + p.k.mT))
    kept = vectors[:, values > 1e-7 * values[-1]]
    if kept.shape[1] < n or p.condition > 1e5:
        return  # the joint Gaussian is singular to rounding: nothing to compare with
    v, posterior = (0.5 * (m + m.mT) for m in (v, posterior))
    direct = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(mean, v), torch.distributions.MultivariateNormal(centre, posterior)
    )
    assert abs(float(direct) - divergences[0]) < 1e-4 * abs(divergences[0])


def test_C15_with_other_labels_than_the_optimum_is_refused_by_the_sign():
    """A bound computed for other targets exceeds the evidence somewhere: the comparison above can fail."""
    from tests.laws.problems import problem

    p = problem("R")
    flat = replace(p, y=p.f)
    assert fitted(flat, 40).bound > evidence(p)
