"""Laws C1–C6, C8, C11, C12, C18, C19: what a Nyström approximation must satisfy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gpytorch
import torch
from gpytorch.constraints import Positive
from torch import Tensor

import ntkgp
from ntkgp.evidence import StreamedEvidence, one_pass
from ntkgp.evidence.collapsed import Collapsed
from ntkgp.kernels import NystromKernel
from ntkgp.models.nystrom import NystromNTKGP
from tests import nystrom_oracle as oracle
from tests import reference as ref
from tests.laws.problems import DOUBLE, Problem, law, rel, violation

SIZES = (5, 10, 20)


def order(p: Problem) -> Tensor:
    return torch.randperm(len(p.x), generator=torch.Generator().manual_seed(3))


def landmarks(p: Problem, size: int) -> Tensor:
    """The first rows of one random order, so that sets are nested."""
    return p.lin.pack(p.x)[order(p)[:size]]


def oracle_of(p: Problem, size: int) -> oracle.Nystrom:
    blocks = p.j.view(len(p.x), p.num_outputs, -1)
    return oracle.Nystrom(blocks[order(p)[:size]].flatten(0, 1), p.entries)


def likelihood_of(p: Problem) -> Any:
    if p.classify:
        c = p.num_outputs
        return ntkgp.likelihoods.BernoulliLikelihood() if c == 1 else ntkgp.CategoricalLikelihood(c)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=Positive(torch.exp, torch.log)).double()
    likelihood.noise = torch.tensor(p.noise, dtype=DOUBLE)
    return likelihood


def targets(p: Problem) -> Tensor:
    return p.y if p.classify or p.num_outputs > 1 else p.y[:, 0]


def model(p: Problem, size: int, **options: Any) -> NystromNTKGP:
    options = {"num_features": None, "tolerance": 0.0, **options}
    made = NystromNTKGP((p.x, targets(p)), likelihood_of(p), p.lin, landmarks=landmarks(p, size), **options)
    made.kernel.precision = p.precision
    return made.fit(progress=False)


def covariance(p: Problem, size: int, x: Tensor | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(p, size, **options)(p.x_test if x is None else x).covariance_matrix


def streamed(p: Problem, size: int) -> StreamedEvidence:
    found = one_pass(p.lin, (p.x, targets(p)), likelihood_of(p), landmarks=landmarks(p, size), tolerance=0.0)
    return found.evidence_problem()


def point(p: Problem) -> Tensor:
    noise = p.precision.new_zeros(0) if p.classify else torch.tensor([p.noise], dtype=DOUBLE)
    return torch.cat([p.precision, noise]).log()


def elbo(p: Problem, size: int) -> float:
    return streamed(p, size).objective()(point(p)).value


def joint(p: Problem) -> tuple[Tensor, Tensor]:
    """Train and test inputs, and their Jacobian rows."""
    return torch.cat([p.lin.pack(p.x), p.lin.pack(p.x_test)]), torch.cat([p.j, p.j_test])


def nystrom_gram(p: Problem, size: int, x: Tensor) -> Tensor:
    with torch.no_grad():
        return NystromKernel(p.lin, landmarks(p, size), tolerance=0.0, precision=p.precision)(x).to_dense()


@law("R", "C", "U", "BN", "CNN", examples=2, classify=False, dtype=DOUBLE)
def test_C1_nystrom_kernel_is_below_the_kernel(p):
    x, j = joint(p)
    k = ref.gram(j, p.entries)
    for size in SIZES:
        approximate = nystrom_gram(p, size, x)
        assert rel(approximate, oracle_of(p, size).gram(j)) < 1e-9
        assert violation(k - approximate) < 1e-9


@law("R", "BN", examples=2, dtype=DOUBLE)
def test_C2_nested_landmarks_raise_the_kernel(p):
    x, _ = joint(p)
    grams = [nystrom_gram(p, size, x) for size in SIZES]
    scale = float(grams[-1].abs().max())
    for small, large in itertools.pairwise(grams):
        assert violation(large - small) < 1e-9 or float((large - small).abs().max()) < 1e-9 * scale


@law("R", "C", "BN", examples=2, classify=(True, False), outputs=3, dtype=DOUBLE, spread=1.0)
def test_C3_ella_is_below_the_exact_posterior(p):
    exact = p.v
    scale = float(exact.abs().max())
    for size in SIZES[:2]:
        difference = exact - covariance(p, size)
        assert float(torch.linalg.eigvalsh(difference)[0]) > -p.tol(1e-9) * scale


@law("R", "C", examples=2, outputs=3, dtype=DOUBLE, spread=1.0)
def test_C4_ella_grows_with_nested_landmarks(p):
    covariances = [covariance(p, size) for size in SIZES]
    scale = float(covariances[-1].abs().max())
    for small, large in itertools.pairwise(covariances):
        assert float(torch.linalg.eigvalsh(large - small)[0]) > -p.tol(1e-9) * scale


@law("R", "C", "BN", examples=1, dtype=DOUBLE, spread=1.0)
def test_C5_all_training_points_as_landmarks_are_exact_on_them(p):
    exact = p.j @ p.primal.covariance @ p.j.T
    assert rel(covariance(p, len(p.x), p.lin.pack(p.x)), exact) < 1e-6


@law("R", "C", examples=1, dtype=DOUBLE, spread=1.0)
def test_C6_deficit_of_all_landmarks(p):
    missing = p.k_test - p.cross @ torch.linalg.pinv(p.k, rtol=1e-12, hermitian=True) @ p.cross.T
    found = p.v - covariance(p, len(p.x))
    assert float((found - missing).abs().max()) < 1e-6 * float(p.k_test.abs().max())


@law("R", "C", "BN", "CNN", examples=4, classify=(True, False), dtype=DOUBLE, spread=2.0)
def test_C8_feature_space_is_the_nystrom_dual(p):
    """The streamed posterior against conditioning on the data with K̂ in the place of K, and against the oracle."""
    for size in SIZES[:2]:
        approximate = oracle_of(p, size)
        gram, cross, test = (approximate.gram(*pair) for pair in ((p.j,), (p.j_test, p.j), (p.j_test,)))
        if p.classify:
            root = oracle.whitening(p.f)
            inner = torch.eye(len(gram), dtype=DOUBLE) + root @ gram @ root
            expected = test - cross @ root @ torch.linalg.solve(inner, root @ cross.T)
            features = oracle.classification_posterior(approximate.phi(p.j), approximate.phi(p.j_test), p.f)
            assert rel(features, expected) < p.tol(1e-7)
        else:
            expected = ref.gaussian_dual_covariance(gram, cross, test, p.noise_rows)
        assert rel(covariance(p, size), expected) < p.tol(1e-7)


@law("R", "U", "BN", examples=2, dtype=DOUBLE, spread=1.0)
def test_C11_collapsed_bound(p):
    exact = ref.gaussian_log_evidence(p.k, p.t, p.noise_rows)
    values = [elbo(p, size) for size in (*SIZES[:2], len(p.x))]
    slack = 1e-6 + 1e-12 * abs(exact)
    assert all(value <= exact + slack for value in values)
    assert all(a <= b + slack for a, b in itertools.pairwise(values))
    assert abs(values[-1] - exact) < max(1e-6, 1e-9 * abs(exact))


@law("R", "U", "BN", examples=2, dtype=DOUBLE, spread=1.0)
def test_C12_upper_bound(p):
    exact = ref.gaussian_log_evidence(p.k, p.t, p.noise_rows)
    for size in (*SIZES[:2], len(p.x)):
        lower, upper = streamed(p, size).objective().evidence_bounds(point(p))
        assert lower <= exact + 1e-6
        assert upper >= exact - 1e-6
        q = oracle_of(p, size).gram(p.j)
        trace = float((p.k - q).trace())
        noisy = q + p.noise * torch.eye(len(q), dtype=DOUBLE)
        inflated = noisy + max(trace, 0.0) * torch.eye(len(q), dtype=DOUBLE)
        formula = -0.5 * float(p.t @ torch.linalg.solve(inflated, p.t)) - 0.5 * float(torch.logdet(noisy))
        assert abs(upper - formula + len(q) / 2 * math.log(2 * math.pi)) < 1e-6 * (1 + abs(formula))
        assert lower >= elbo(p, size) - 1e-6


@law("R", "U", "BN", examples=2, dtype=DOUBLE, spread=1.0)
def test_C18_log_determinant(p):
    exact = float(torch.logdet(p.k + p.noise * torch.eye(len(p.k), dtype=DOUBLE)))
    for size in SIZES[:2]:
        problem = streamed(p, size)
        found = Collapsed(
            problem.statistics.sums(), problem.features.group, problem.features.stacked, p.precision,
            torch.tensor([p.noise], dtype=DOUBLE),
        )  # fmt: skip
        left = float(found.left_over.sum()) / p.noise
        slack = 1e-9 * abs(exact)
        assert found.logdet <= exact + slack
        assert exact <= found.logdet + len(p.k) * math.log1p(left / len(p.k)) + slack
        assert math.log1p(left / len(p.k)) * len(p.k) <= left


@law("R", "U", "BN", examples=4, dtype=DOUBLE, spread=1.0)
def test_C19_one_pass_every_hyper_parameter(p):
    size = min(10, len(p.x) - 2)
    objective = streamed(p, size).objective()
    generator = torch.Generator().manual_seed(1)
    rows = oracle_of(p, size).rows
    for _ in range(5):
        precision = 0.1 + 5.0 * torch.rand(len(p.precision), generator=generator, dtype=DOUBLE)
        noise = 0.02 + 0.2 * torch.rand(1, generator=generator, dtype=DOUBLE)
        entries = precision[p.index]
        q, k = oracle.Nystrom(rows, entries).gram(p.j), ref.gram(p.j, entries)
        direct = oracle.log_normal(p.t, q + noise * torch.eye(len(q), dtype=DOUBLE))
        trace = 0.5 * float((k - q).trace() / noise)
        found = objective.evaluate(precision, noise)
        assert abs(found.value - (direct - trace)) < 1e-8 * abs(direct - trace)
        x = torch.cat([precision, noise]).log()
        for i in (0, len(precision)):
            step = torch.zeros_like(x)
            step[i] = 1e-4
            slope = (objective(x + step).value - objective(x - step).value) / 2e-4
            assert abs(float(objective(x).gradient[i]) - slope) < 1e-5 * (1 + float(found.gradient.abs().max()))


@law("C", examples=3, classify=True, outputs=(1, 3), dtype=DOUBLE, spread=1.0)
def test_C19_classification(p):
    size = min(10, len(p.x) - 2)
    found = one_pass(p.lin, (p.x, p.y), likelihood_of(p), landmarks=landmarks(p, size), tolerance=0.0)
    objective = found.evidence_problem().objective()
    for factor in (0.3, 1.0, 4.0):
        entries = factor * p.entries
        q = oracle.Nystrom(oracle_of(p, size).rows, entries).gram(p.j)
        direct = oracle.expansion_bound(q, ref.gram(p.j, entries), p.f, p.offset, p.y)
        assert abs(objective.evaluate(factor * p.precision).value - direct) < 1e-8 * (1 + abs(direct))
