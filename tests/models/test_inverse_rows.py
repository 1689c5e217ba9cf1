"""MeasuredNetwork: every method against A J of the dense oracle, and the ways to its Grams against each other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from ntkgp.models.inverse import MeasuredNetwork
from tests import reference as ref
from tests.laws.problems import rel
from tests.models.inverse_problems import DOUBLE, InverseProblem, problem, rays


def network(p: InverseProblem, *further, weights: torch.Tensor | None = None) -> MeasuredNetwork:
    return MeasuredNetwork(p.lin, p.lin.pack(p.x), (p.A, *further), weights)


def mixture(p: InverseProblem, net: MeasuredNetwork) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in no order, one of them twice, and their Jacobian."""
    rows = torch.cat([net.rows_of(1)[[3, 0]], net.rows_of(0)[[2, 4, 2]], net.rows_of(2)[[1]]])
    other = net.shared.operators[1].rows
    return rows, torch.stack([p.j[3], p.j[0], p.aj[2], p.aj[4], p.aj[2], other[1] @ p.j])


def per_group(p: InverseProblem, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    masks = [p.index == g for g in range(len(p.lin.groups))]
    return torch.stack([(left * m) @ (right * m).T for m in masks])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_every_method_is_that_of_the_dense_rows(kind: str, kept: bool) -> None:
    p = problem(kind)
    net = network(p, rays(p.A.image_shape[0], 2, seed=4))
    if kept:
        net.keep_pixels()
    rows, j = mixture(p, net)
    v = torch.randn(3, p.j.shape[1], dtype=DOUBLE)
    u = torch.randn(2, len(rows), 1, dtype=DOUBLE)
    assert net.theta.equal(p.theta)
    assert net.groups.names == p.lin.groups.names
    assert net.groups.index.equal(p.lin.groups.index)
    assert rel(net.jvp(rows, v)[..., 0], v @ j.T) < 1e-12
    assert rel(net.jvp(rows, v[0])[:, 0], j @ v[0]) < 1e-12
    assert rel(net.vjp(rows, u), u[..., 0] @ j) < 1e-12
    assert rel(net.features(rows, v)[:, 0], j @ v.T) < 1e-12
    grouped = torch.stack([j @ (v * (p.index == g)).T for g in range(len(net.groups))])
    assert rel(net.features(rows, v, per_group=True)[:, :, 0], grouped) < 1e-12
    assert rel(net.jacobian(rows)[:, 0], j) < 1e-12
    expected = per_group(p, j, j)
    assert rel(net.grams(rows), expected) < 1e-12
    assert rel(net.grams(rows[:2], rows), expected[:, :2]) < 1e-12
    stack = net.symmetric_grams(rows)
    assert rel(torch.stack([stack.dense(g) for g in range(len(expected))]), expected) < 1e-12
    assert rel(net.gram_diagonals(rows)[..., 0, 0], expected.diagonal(dim1=1, dim2=2)) < 1e-12
    swapped = net.gram_diagonals(rows, rows.flip(0))[..., 0, 0]
    assert rel(swapped, per_group(p, j, j.flip(0)).diagonal(dim1=1, dim2=2)) < 1e-12
    weighted = torch.einsum("g,gnm->nm", 1 / p.precision, expected)
    assert rel(net.weighted_gram(rows, None, 1 / p.precision), weighted) < 1e-12
    assert rel(net.weighted_gram(rows, rows[:2], 1 / p.precision), weighted[:, :2]) < 1e-12
    assert rel(net.weighted_gram(rows[:2], rows, 1 / p.precision), weighted[:2]) < 1e-12


def test_weights_scale_the_measurements_and_nothing_else() -> None:
    p = problem("conv")
    roots = torch.rand(15, dtype=DOUBLE) + 0.5
    net = network(p, weights=roots)
    assert rel(net(net.rows_of(0))[:, 0], roots * (p.A.rows @ p.image)) < 1e-12
    assert rel(net(net.rows_of(1))[:, 0], p.image) < 1e-12
    v, u = torch.randn(p.j.shape[1], dtype=DOUBLE), torch.randn(15, 1, dtype=DOUBLE)
    assert rel(net.jvp(net.rows_of(0), v)[:, 0], roots * (p.aj @ v)) < 1e-12
    assert rel(net.vjp(net.rows_of(0), u), (roots * u[:, 0]) @ p.aj) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_ways_to_a_gram_agree(dtype: torch.dtype) -> None:
    p = problem("conv", dtype=dtype)
    net = network(p)
    rows = net.rows_of(0)
    together = net.grams(rows)
    by_row = super(MeasuredNetwork, net).grams(rows)
    one_by_one = net.grams(rows, rows)
    net.keep_pixels()
    projected = net.grams(rows)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found in (by_row, one_by_one, projected):
        assert rel(found, together) < tolerance
    assert rel(projected, per_group(problem("conv"), *2 * [problem("conv").aj])) < (1e-12 if dtype == DOUBLE else 1e-4)


def test_images_are_those_of_the_network_exactly() -> None:
    p = problem("conv", dtype=torch.float32)
    net = network(p)
    assert torch.equal(net(net.rows_of(1))[:, 0], p.net(p.x).detach().reshape(-1).double())


def test_layer_rules_serve_the_rows() -> None:
    p = problem("conv")
    net = network(p)
    lin = net._together(net._index(net.rows_of(0)))
    assert "net.0.weight" in lin.engine.plan.shapes
    assert "net.3.weight" in net.engine.plan.shapes


def test_normalised_groups_are_those_of_the_network() -> None:
    p = problem("conv", "normalization")
    net = network(p)
    assert net.groups.is_normalized == p.lin.groups.is_normalized
    assert any(net.groups.is_normalized)


def test_copies_share_and_pickles_carry() -> None:
    p = problem("conv")
    net = network(p)
    net.keep_pixels()
    assert copy.deepcopy(net) is net
    loaded = pickle.loads(pickle.dumps(net))
    assert loaded.pixel_grams is None
    assert torch.equal(loaded.grams(net.rows_of(0)), network(p).grams(net.rows_of(0)))


def test_refusals() -> None:
    net = network(problem("conv"))
    rows = net.rows_of(0)
    with pytest.raises(ValueError, match="indices of rows from 0 to 50"):
        net(torch.tensor([[51.0]]))
    with pytest.raises(ValueError, match=r"v: expected shape \(209,\)"):
        net.jvp(rows, torch.ones(3))
    with pytest.raises(ValueError, match=r"u: expected shape \(15, 1\)"):
        net.vjp(rows, torch.ones(15))
    with pytest.raises(ValueError, match=r"variance: expected shape \(5,\)"):
        net.weighted_gram(rows, None, torch.ones(2))
    with pytest.raises(ValueError, match="x2: expected one input for each"):
        net.gram_diagonals(rows, rows[:2])
    with pytest.raises(ValueError, match="dtype: expected"):
        net.grams(rows, dtype=torch.float16)


def test_the_oracle_itself() -> None:
    p = problem("conv")
    assert rel(ref.gram(p.aj, p.weights), p.A.rows @ ref.gram(p.j, p.weights) @ p.A.rows.T) < 1e-12
