"""Jacobian rows in float64 and the triangle that stands for them, against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.linearization import statistics
from ntkgp.linearization.statistics import RowTriangle, add_symmetric, jacobian_rows, rows_at_a_time
from tests import reference as ref
from tests.architectures import CASES

DOUBLE = torch.float64
NAMES = ["mlp_layer_norm_plain", "unet_group_norm", "hf_bert"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_jacobian(name: str) -> None:
    case = CASES[name]()
    lin = ntkgp.LinearizedNetwork(case.net, case.example)
    expected = ref.jacobian(case.net, case.example)
    found = jacobian_rows(lin, lin.pack(case.example))
    assert found.dtype == DOUBLE
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


def test_rows_of_a_float32_network_are_products_in_float64() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).float()
        x = torch.randn(5, 3)
    lin = ntkgp.LinearizedNetwork(net, x, groups="single")
    rows = jacobian_rows(lin, x).flatten(0, 1)
    gram = lin.grams(x)[0]
    assert float((rows @ rows.T - gram).abs().max() / gram.abs().max()) < 1e-14


def test_rows_have_a_graph_to_the_inputs() -> None:
    sample = ref.layernorm_cnn(3)
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x)
    x = lin.pack(sample.x[:2]).double().requires_grad_()
    weights = torch.sin(torch.arange(2 * 3 * lin.num_parameters, dtype=DOUBLE)).reshape(2, 3, -1)
    rows = jacobian_rows(lin, x, keep_graph=True)
    found = torch.autograd.grad((rows * weights).sum(), x)[0]
    direction = torch.cos(torch.arange(x.numel(), dtype=DOUBLE)).reshape(x.shape)
    ends = [jacobian_rows(lin, x.detach() + s * 1e-5 * direction) for s in (1, -1)]
    expected = float(((ends[0] - ends[1]) * weights).sum()) / 2e-5
    assert float((found * direction).sum()) == pytest.approx(expected, rel=1e-6)


def test_rows_at_a_time_follow_the_budget() -> None:
    sample = ref.layernorm_cnn(3)
    lin = ntkgp.LinearizedNetwork(sample.net, sample.x)
    assert rows_at_a_time(lin, 1) == 1
    assert rows_at_a_time(lin, 8 * 8 * 3 * lin.num_parameters * 7) == 7


def pieces(rows: Tensor, targets: Tensor, sizes: list[int]) -> RowTriangle:
    triangle = RowTriangle(rows.shape[1])
    for a, b in zip(rows.split(sizes), targets.split(sizes), strict=True):
        triangle.add(a, b)
    return triangle


def problem(n: int, p: int) -> tuple[Tensor, Tensor]:
    """Columns of very different scales, one of them zero, one a multiple of another."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, p, dtype=DOUBLE, generator=generator)
    rows = rows * torch.logspace(-6, 6, p, dtype=DOUBLE)
    rows[:, 2] = 0.0
    rows[:, 4] = 3 * rows[:, 3]
    return rows, torch.randn(n, dtype=DOUBLE, generator=generator)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("sizes", [[40], [1, 2, 37], [13, 0, 13, 14], [8, 32], [9, 31]])
def test_triangle_stands_for_all_rows(sizes: list[int], elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if elsewhere:  # what other devices use
        monkeypatch.setattr(
            statistics, "_update",
            lambda old, new: torch.linalg.qr(new if old is None else torch.cat([old, new]), mode="r").R,
        )  # fmt: skip
    rows, targets = problem(40, 9)
    root, reduced, unreached, squares = pieces(rows, targets, sizes).result()
    assert (root.shape, reduced.shape, unreached) == ((9, 9), (9,), 31)
    norms = rows.norm(dim=0)
    scale = torch.where(norms > 0, norms, 1.0)
    assert float(((root.T @ root - rows.T @ rows) / torch.outer(scale, scale)).abs().max()) < 1e-14
    assert float(((root.T @ reduced - rows.T @ targets) / scale).abs().max()) < 1e-13
    # Squares are kept in total, and what is lost is what no combination of columns reaches.
    assert float(reduced.square().sum()) + squares == pytest.approx(float(targets.square().sum()), rel=1e-13)
    basis = torch.linalg.svd(rows / scale, full_matrices=False)[0][:, :7]
    assert squares <= float((targets - basis @ (basis.T @ targets)).square().sum()) * (1 + 1e-12)


@pytest.mark.parametrize("n", [1, 5, 9])
def test_few_rows_are_kept_as_they_are(n: int) -> None:
    rows, targets = problem(n, 9)
    root, reduced, unreached, squares = pieces(rows, targets, [1] * n).result()
    assert torch.equal(root, rows)
    assert torch.equal(reduced, targets)
    assert (unreached, squares) == (0, 0.0)


def test_small_singular_values_keep_their_digits() -> None:
    """The square of this matrix has lost its smallest singular value entirely."""
    generator = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(50, 6, dtype=DOUBLE, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE, generator=generator))[0]
    values = torch.logspace(0, -10, 6, dtype=DOUBLE)
    rows = (u * values) @ v.T
    root = pieces(rows, u[:, 0], [20, 30]).result()[0]
    assert torch.allclose(torch.linalg.svdvals(root), values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [3, 300, 1100])
def test_symmetric_sums(size: int) -> None:
    rows = torch.randn(7, size, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    matrix = torch.zeros(size, size, dtype=DOUBLE)
    for _ in range(2):
        add_symmetric(matrix, rows)
    assert torch.allclose(matrix.tril(), 2 * (rows.T @ rows).tril(), rtol=0, atol=1e-12)
