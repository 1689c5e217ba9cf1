"""Orthonormal directions of landmarks, and the engine's products of kept factors that they use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ntkgp
from ntkgp.linearization.nystrom import LandmarkFeatures
from tests import reference as ref
from tests.models.test_nystrom import DOUBLE, Case, close


def jacobian_of(case: Case, x: Tensor, group: int) -> Tensor:
    """J_g with the columns of other groups at zero."""
    return ref.jacobian(case.net, x).flatten(0, 1) * (case.index == group)


@pytest.mark.parametrize("features", [None, 5])
@pytest.mark.parametrize("random_outputs", [False, True])
def test_features_are_products_with_orthonormal_directions(features: int | None, random_outputs: bool) -> None:
    case = Case("shared")
    z = case.x[:6]
    outputs = torch.tensor([0, 2, 1, 1, 0, 2]) if random_outputs else None
    found = LandmarkFeatures.build(
        case.lin, z, outputs, precision=case.precision, num_features=features, tolerance=1e-12
    )
    psi = found(case.x_test).flatten(0, 1)
    start = 0
    for g, rank in enumerate(found.ranks):
        j_z = jacobian_of(case, z, g)
        if outputs is not None:
            j_z = j_z.view(6, 3, -1)[torch.arange(6), outputs]
        rows = j_z if found.mixing is None else found.mixing.T @ j_z
        directions = found.bases[g].T @ rows
        close(directions @ directions.T, torch.eye(rank, dtype=DOUBLE), 1e-7)
        close(psi[:, start : start + rank], jacobian_of(case, case.x_test, g) @ directions.T, 1e-9)
        close(found.coordinates[g].T @ directions, rows, 1e-7)
        close(found.theta[start : start + rank], directions @ ref.theta(case.net), 1e-8)
        start += rank
    assert start == found.size == psi.shape[1]


def test_blocks_of_kept_factors_equal_those_of_inputs() -> None:
    case = Case("softmax")
    factors = case.lin.factors(case.x)
    expected = case.lin.gram_diagonals(case.x)
    close(case.lin.gram_diagonals(factors), expected, 1e-13)
    alike = case.lin.engine.factors_like(case.x_test, case.lin.factors(case.x[:3]), 2**30)
    close(case.lin.grams(alike, case.lin.factors(case.x[:3])), case.lin.grams(case.x_test, case.x[:3]), 1e-13)
    _, blocks = LandmarkFeatures.build(case.lin, case.x[:4]).visit(case.x)
    close(blocks, expected, 1e-13)


def test_refusals() -> None:
    case = Case("single")
    with pytest.raises(ValueError, match="tolerance"):
        LandmarkFeatures.build(case.lin, case.x, tolerance=-1.0)
    with pytest.raises(ValueError, match="num_features"):
        LandmarkFeatures.build(case.lin, case.x, num_features=0)
    with pytest.raises(ValueError, match="max_memory"):
        LandmarkFeatures.build(case.lin, case.x, max_memory="10KiB")
    dead = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        dead[0].weight.fill_(-1.0)
    lin = ntkgp.LinearizedNetwork(dead.double(), case.x)
    for features in (None, 2):
        with pytest.raises(ValueError, match="zero"):
            LandmarkFeatures.build(lin, torch.ones(4, 3, dtype=DOUBLE), num_features=features)


def test_no_gradients_at_any_of_many_landmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkgp.linearization.nystrom._DENSE_ROWS", 10)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 1, bias=False))
    lin = ntkgp.LinearizedNetwork(net, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="gradients are zero"):
        LandmarkFeatures.build(lin, torch.zeros(60, 2), num_features=5)
