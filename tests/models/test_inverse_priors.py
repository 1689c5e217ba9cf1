"""Structured priors of the weights against the dense oracle with their whole covariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.evidence import evidence_objective
from ntkgp.models.inverse.priors import filter_lengthscales, filter_prior, g_prior
from tests import reference as ref
from tests.laws.problems import rel
from tests.models.inverse_problems import DOUBLE, InverseProblem, Matrix, problem


def dense_posterior(p: InverseProblem, prior: Tensor) -> tuple[float, Tensor, Tensor]:
    """Evidence, mean and covariance of the pixels for a prior covariance of the weights, (P, P)."""
    noise = torch.full((len(p.aj),), p.noise, dtype=DOUBLE)
    k, cross, test = p.aj @ prior @ p.aj.T, p.j @ prior @ p.aj.T, p.j @ prior @ p.j.T
    mean = p.image - p.j @ p.theta + cross @ torch.linalg.solve(k + noise.diag(), p.targets)
    covariance = ref.gaussian_dual_covariance(k, cross, test, noise)
    return ref.gaussian_log_evidence(k, p.targets, noise), mean, covariance


def check(p: InverseProblem, lin: ntkgp.LinearizedNetwork, prior: Tensor) -> None:
    """The model in other coordinates is that with the prior covariance."""
    q = InverseProblem(p.net, p.x, p.A, p.y, p.groups)
    q.__dict__["lin"] = lin
    model = q.model(mean="posterior").eval()
    evidence, mean, covariance = dense_posterior(p, prior)
    found = model()
    assert evidence_objective(model.evidence_problem()).evaluate(p.precision).value == pytest.approx(evidence, rel=1e-8)
    assert rel(found.mean, mean) < 1e-8
    assert rel(found.covariance_matrix, covariance) < 1e-8
    free = q.model(mean="posterior", form="matrix_free").eval()
    assert rel(free().mean, mean) < 1e-6
    at_map = evidence_objective(model.evidence_problem(at="theta_map"), "theta_map").evaluate(p.precision)
    squared = torch.stack([at_map.squared_norms[g] * p.precision[g] for g in range(len(p.precision))]).sum()
    assert float(squared) == pytest.approx(float(p.theta @ torch.linalg.solve(prior, p.theta)), rel=1e-8)


def filter_covariance(p: InverseProblem, lengths: list[float]) -> Tensor:
    """Λ⁻¹ with the correlations within filters, entry by entry."""
    blocks = []
    for name, parameter in p.net.named_parameters():
        group = next(g for g, members in enumerate(p.lin.groups.members) if name in members)
        variance = 1 / float(p.precision[group])
        if parameter.ndim != 4 or parameter.shape[-1] == 1:
            blocks.append(variance * torch.eye(parameter.numel(), dtype=DOUBLE))
            continue
        block = torch.zeros(9, 9, dtype=DOUBLE)
        for i in range(9):
            for j in range(9):
                distance = np.hypot(i // 3 - j // 3, i % 3 - j % 3)
                block[i, j] = variance * (np.exp(-distance / lengths[group]) + 1e-6 * (i == j))
        blocks += [block] * (parameter.numel() // 9)
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("groups", ["single", "layer"])
def test_filter_prior_is_the_dense_one(groups: str) -> None:
    p = problem("conv", groups)
    lengths = [0.4 + 0.5 * g for g in range(len(p.lin.groups))]
    lin = filter_prior(p.lin, torch.tensor(lengths))
    assert rel(lin(p.x).flatten(), p.image) < 1e-12
    assert lin.groups.names == p.lin.groups.names
    check(p, lin, filter_covariance(p, lengths))


def test_short_filters_are_isotropic() -> None:
    p = problem("conv")
    found = filter_prior(p.lin, 1e-2).jacobian(p.x)[0]
    assert rel(found, p.j) < 1e-6


@pytest.mark.parametrize("groups", ["single", "layer"])
@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_g_prior_is_the_dense_one(kind: str, groups: str) -> None:
    p = problem(kind, groups)
    size = p.aj.square().mean(0).sqrt()
    scale = 1 / size.clamp_min(1e-3 * float(size.max()))
    check(p, g_prior(p.lin, p.A, floor=1e-3), (scale.square() / p.weights).diag())


def test_g_prior_ignores_the_scale_of_single_weights() -> None:
    """A network whose weights are stored in other units has the same posterior."""

    class Scaled(nn.Module):
        def __init__(self, factor: Tensor) -> None:
            super().__init__()
            self.register_buffer("factor", factor)
            self.weight = nn.Parameter(torch.linspace(-1, 1, 36, dtype=DOUBLE).reshape(4, 9) / factor)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ (self.factor * self.weight))

    x, A = torch.ones(1, 4, dtype=DOUBLE), Matrix(torch.rand(5, 9, dtype=DOUBLE), (3, 3), (5,))
    found = []
    for factor in (torch.ones(4, 9, dtype=DOUBLE), 10 ** torch.randn(4, 9, dtype=DOUBLE)):
        net = Scaled(factor)
        p = InverseProblem(net, x, A, torch.ones(5, dtype=DOUBLE), "single")
        p.__dict__["lin"] = g_prior(p.lin, A, floor=1e-9)
        found.append(p.model().eval()().covariance_matrix)
    assert rel(found[1], found[0]) < 1e-9


def test_lengthscales_have_the_largest_evidence() -> None:
    p = problem("conv", "single")
    model = p.model()
    before = model.kernel.precision.clone()
    found = filter_lengthscales(model, tolerance=1e-7)
    assert torch.equal(model.kernel.precision, before)
    assert filter_lengthscales(p.model(form="primal"), tolerance=1e-7).log_evidence == pytest.approx(found.log_evidence)

    def fitted(length: float) -> ntkgp.evidence.EvidenceReport:
        q = InverseProblem(p.net, p.x, p.A, p.y, "single")
        q.__dict__["lin"] = filter_prior(p.lin, length)
        return ntkgp.fit_evidence(q.model())

    best = fitted(float(found.lengthscale[0]))
    assert best.log_evidence == pytest.approx(found.log_evidence, abs=1e-5)
    torch.testing.assert_close(best.precision.log(), found.precision.log(), rtol=1e-3, atol=1e-3)
    for factor in (0.3, 0.8, 1.25, 3.0):
        other = float(found.lengthscale[0]) * factor
        if 1e-2 < other < 1e2:
            assert fitted(other).log_evidence <= found.log_evidence + 1e-6


def test_lengthscales_of_groups() -> None:
    p = problem("conv", "layer")
    found = filter_lengthscales(p.model(), max_evaluations=15)
    has_filters = [any(name in ("0.weight", "3.weight") for name in members) for members in p.lin.groups.members]
    assert (~found.lengthscale.isnan()).tolist() == has_filters
    assert found.log_evidence >= ntkgp.fit_evidence(p.model()).log_evidence - 0.5
    assert found.evaluations <= 40
    q = InverseProblem(p.net, p.x, p.A, p.y, "layer")
    q.__dict__["lin"] = filter_prior(p.lin, found.lengthscale)
    objective = evidence_objective(q.model().evidence_problem())
    assert objective.evaluate(found.precision, found.noise).value == pytest.approx(found.log_evidence, abs=1e-6)


def test_profile_gradient_is_that_of_finite_differences() -> None:
    from ntkgp.models.inverse.priors import _DistanceGrams, _Profile

    p = problem("conv", "layer")
    model = p.model()
    problem_ = model.evidence_problem()
    profile = _Profile(_DistanceGrams.of(model), problem_.targets, problem_.noise)
    point = np.array([0.2, -0.3])
    gradient = profile(point)[1]
    for i in range(2):
        step = np.zeros(2)
        step[i] = 1e-4
        numerical = (profile(point + step)[0] - profile(point - step)[0]) / 2e-4
        assert gradient[i] == pytest.approx(numerical, rel=1e-4, abs=1e-5)


def test_refusals() -> None:
    p, q = problem("conv"), problem("mlp")
    with pytest.raises(ValueError, match="no trainable convolution"):
        filter_prior(q.lin)
    with pytest.raises(ValueError, match="no trainable convolution"):
        filter_lengthscales(q.model())
    with pytest.raises(ValueError, match="lengthscale: expected positive"):
        filter_prior(p.lin, 0.0)
    with pytest.raises(ValueError, match=r"lengthscale: expected a number or shape \(5,\)"):
        filter_prior(p.lin, torch.ones(2))
    with pytest.raises(ValueError, match="floor: expected a number"):
        g_prior(p.lin, p.A, floor=0.0)
    with pytest.raises(ValueError, match="no weight has any effect"):
        g_prior(p.lin, Matrix(torch.zeros(2, 36, dtype=DOUBLE), (6, 6), (2,)))
    with pytest.raises(ValueError, match="max_memory: 20 KiB is too small for the rows"):
        filter_lengthscales(p.model(max_memory="20KiB", form="matrix_free"))
