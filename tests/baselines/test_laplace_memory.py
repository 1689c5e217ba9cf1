"""Budgets of the Laplace comparators: the smallest that is named is enough, for the same numbers, and it is kept."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.timing import peak_memory, reset_peak
from ntkgp.baselines.laplace import Laplace, kfac
from ntkgp.baselines.laplace.rows import row_pieces
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import parse_memory
from tests import reference
from tests.fresh import FreshInterpreter

OPTIONS: dict[str, dict[str, Any]] = {
    "primal": {"structure": "full", "form": "primal"}, "dual": {"structure": "full", "form": "dual"},
    "kfac": {"structure": "kfac"}, "diagonal": {"structure": "diagonal"}, "last_layer": {"structure": "last_layer"},
    "subnetwork": {"structure": "subnetwork", "size": 20},
}  # fmt: skip


class Position(nn.Module):
    """A learned vector added to each token: no layer's rule describes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens with their positions."""
        return x + self.weight


@functools.cache
def network() -> tuple[nn.Module, Tensor, Tensor]:
    """Three outputs of a convolution, GroupNorm and Linear layers, one of them on tokens; inputs and targets."""
    with reference.seeded(5) as generator:
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.GroupNorm(3, 3), nn.Tanh(), nn.Flatten(2), nn.Linear(16, 4), Position(), nn.Tanh(),
            nn.Flatten(), nn.Linear(12, 3),
        ).double()  # fmt: skip
        return net, torch.randn(6, 1, 6, 6, generator=generator).double(), torch.randn(6, 3, generator=generator)


def fitted(memory: int | str, kind: str, evidence: str | None, name: str) -> tuple[Tensor, float]:
    net, x, y = network()
    target = y if kind == "regression" else y.argmax(-1)
    la = Laplace(net, kind, groups="layer", evidence=evidence, max_memory=memory, **OPTIONS[name]).fit((x, target))
    return la.predict(x[:4]).latent.variance, la.log_evidences["theta"]


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_smallest_budget_that_is_named_is_enough(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfac, "_EXACT", 8)  # GroupNorm in an exact block, positions in a diagonal one
    with pytest.raises(ValueError, match=r"max_memory: 1 B is too small for .*; the smallest possible is") as refused:
        fitted(1, kind, None, name)
    least = parse_memory(re.search(r"smallest possible is (.*)", str(refused.value))[1])  # type: ignore[index]
    for found, expected in zip(fitted(least, kind, None, name), fitted("2GiB", kind, None, name), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"max_memory: .*smallest possible is"):
        fitted(int(0.97 * least), kind, None, name)


def test_a_fit_that_seeks_the_mode_asks_for_its_vectors() -> None:
    net, x, y = network()

    def least(mean: str) -> int:
        la = Laplace(net, structure="diagonal", evidence=None, mean=mean, max_memory=1)
        with pytest.raises(ValueError, match="smallest possible is") as refused:
            la.fit((x, y))
        return parse_memory(re.search(r"smallest possible is (.*)", str(refused.value))[1])  # type: ignore[index]

    assert least("posterior") > least("network") + 8 * 6 * 155
    options = {"structure": "diagonal", "evidence": None, "mean": "posterior", "noise": 10.0}
    found = Laplace(net, max_memory=least("posterior"), **options).fit((x, y))
    torch.testing.assert_close(found.theta_star, Laplace(net, **options).fit((x, y)).theta_star, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("room", [1, 2**14, 2**30])
@pytest.mark.parametrize("white", [False, True])
def test_pieces_are_the_rows(room: int, white: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights once, whatever the room; blocks that are asked for twice are the same."""
    net, x, _ = network()
    monkeypatch.setattr("ntkgp.baselines.laplace.rows._LEAST", 5)
    lin = LinearizedNetwork(net, x[:2], groups="single")
    expected = reference.jacobian(net, x)
    root = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    if white:
        expected = torch.einsum("ncp,ncr->nrp", expected, root)
    found = torch.zeros_like(expected)
    visited = []
    for rows, step, pieces in row_pieces(lin, lin.pack(x), room, (lambda rows: root[rows]) if white else None):
        visited.append((rows, step))
        for block in pieces.blocks():
            first = block.form(slice(0, 1)).mul_(3)
            formed = block.form(slice(0, 3))
            torch.testing.assert_close(first, 3 * formed[:, :1])
            found[rows][..., block.columns] += formed
    torch.testing.assert_close(found, expected)
    if room != 2**14:
        assert visited == ([(slice(n, n + 1), 1) for n in range(6)] if room == 1 else [(slice(0, 6), 3)])


class Derived(nn.Linear):
    """A layer that K-FAC does not know but a rule does: one factor serves its weight and its bias."""


class Again(nn.Module):
    """A layer that is applied once more to the inputs that ask for it, and not called where none does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3) -> (N, 3)."""
        h, asks = torch.tanh(self.layer(x)), x[:, :1] > 0
        return torch.where(asks, torch.tanh(self.layer(h)), h) if bool(asks.any()) else h


class ByKeyword(nn.Module):
    """A head that is called with a named argument, which hooks do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3) -> (N, 2)."""
        return self.head(input=torch.tanh(x))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_a_weight_and_its_bias_in_different_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfac, "_EXACT", 10)  # the biases in the exact block, the weights in the diagonal one
    with reference.seeded(2) as generator:
        net = nn.Sequential(Derived(3, 5), nn.Tanh(), Derived(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = torch.zeros(6, 3) if kind == "regression" else torch.arange(6) % 3
    options = {"noise": 0.3} if kind == "regression" else {}
    la = Laplace(net, kind, structure="kfac", evidence=None, precision=0.7, **options).fit((x, y))
    j = reference.jacobian(net, x)
    rows = j.flatten(0, 1)
    b = torch.eye(18).double() / 0.3 if kind == "regression" else reference.curvature(reference.outputs(net, x))
    h = (rows.T @ b @ rows)[:44, :44]
    biases = torch.zeros(44, dtype=torch.bool)
    biases[15:20] = biases[40:44] = True
    h = torch.where(biases & biases.unsqueeze(-1), h, h.diagonal().diag())
    v = torch.zeros(59, dtype=torch.float64)
    v[:44] = torch.linspace(-1, 1, 44)
    expected = torch.linalg.inv(h + 0.7 * torch.eye(44).double())
    torch.testing.assert_close(la.curvature.solve(v)[:44], expected @ v[:44])
    whole = torch.stack([la.curvature.solve(e) for e in torch.eye(59).double()])
    torch.testing.assert_close(la.curvature.covariance(la.lin.pack(x)), j @ whole @ j.mT)


def test_a_layer_that_is_called_more_often_than_for_the_example() -> None:
    """Rows of a weight and its bias, where they become rows at all, are as interleaved as their factors."""
    with reference.seeded(4) as generator:
        net = nn.Sequential(Again(), nn.Linear(3, 2)).double()
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    x = x[x[:, 0].argsort()]
    assert float(x[1, 0]) < 0 < float(x[-1, 0])
    la = Laplace(net, structure="diagonal", evidence=None, precision=0.7, noise=0.3, groups="layer").fit((x, x[:, :2]))
    assert la.lin.engine.plan.merges
    j = reference.jacobian(net, x)
    variance = 1 / (j.square().sum((0, 1)) / 0.3 + 0.7)
    torch.testing.assert_close(la.curvature.covariance(la.lin.pack(x)), (j * variance) @ j.mT)


def test_kfac_of_layers_that_are_called_by_keyword() -> None:
    with reference.seeded(4) as generator:
        net, x = ByKeyword().double(), torch.randn(5, 3, generator=generator, dtype=torch.float64)
    la = Laplace(net, structure="kfac", evidence=None, noise=0.3).fit((x, x[:, :2]))
    assert not la.curvature.layers
    j = reference.jacobian(net, x)
    covariance = torch.linalg.inv(torch.einsum("ncp,ncq->pq", j, j) / 0.3 + torch.eye(8).double())
    torch.testing.assert_close(la.curvature.covariance(la.lin.pack(x)), j @ covariance @ j.mT)


PROGRAM = """
import ctypes, re, sys
import torch
from torch import nn
from benchmarks.timing import peak_memory, reset_peak
from ntkgp.baselines import Laplace
from ntkgp.linearization.memory import parse_memory

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(300, 250), nn.Tanh(), nn.Linear(250, 60), nn.LayerNorm(60), nn.Tanh(), nn.Linear(60, 10))
x, y = torch.randn(8, 300), torch.randn(8, 10)


def run(kind, structure, memory):
    target = y if kind == "regression" else y.argmax(-1)
    return Laplace(net, kind, structure=structure, evidence=None, max_memory=memory).fit((x, target)).predict(x[:2])


for kind, structure in (("regression", "kfac"), ("classification", "diagonal")):
    run(kind, structure, "40MiB")
    try:
        run(kind, structure, 1)
    except ValueError as refused:
        least = parse_memory(re.search("smallest possible is (.*)", str(refused))[1])
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak()
    result = run(kind, structure, least)
    print(kind, structure, least / 2**20, (peak_memory() - before) / 2**20, sep="\\t")
"""
# What is kept by the allocator between one piece and the next, in MiB.
SLACK = 2.0


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or reset_peak() is None or peak_memory() is None, reason="needs /proc"
)
def test_measured_peaks(fresh: FreshInterpreter) -> None:
    printed = [line.split("\t") for line in fresh.run(PROGRAM).splitlines()]
    assert len(printed) == 2
    for kind, structure, budget, peak in printed:
        assert float(peak) <= float(budget) + SLACK, (kind, structure, budget, peak)
    assert max(float(peak) / float(budget) for *_, budget, peak in printed) > 0.5
