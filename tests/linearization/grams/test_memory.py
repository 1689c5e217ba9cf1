"""Peak memory as measured in a fresh process: within the budget, the result included; nothing but disk for storage."""

from __future__ import annotations

import sys

import pytest

from benchmarks.timing import peak_memory, reset_peak
from tests.fresh import FreshInterpreter

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or reset_peak() is None or peak_memory() is None, reason="needs /proc"
)

# What the allocator and torch's libraries hold after a small run of everything is no part of a budget.
PROGRAM = """
import ctypes, sys
import torch
from torch import nn
import ntkgp
from benchmarks.timing import peak_memory, reset_peak

torch.set_num_threads(1)
torch.manual_seed(0)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.layers(self.embed(x)).mean(1))


def conv():
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))


def mlp():
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.LayerNorm(256), nn.ReLU(),
                         nn.Linear(256, 4))


net, inputs = {
    "conv": (conv, lambda n: torch.randn(n, 3, 8, 8)),
    "mlp": (mlp, lambda n: torch.randn(n, 256)),
    "transformer": (Words, lambda n: torch.randint(0, 100, (n, 16))),
}[sys.argv[1]]
lin = ntkgp.LinearizedNetwork(net().eval(), inputs(2))
variance, v = torch.ones(len(lin.groups)), torch.randn(16, lin.num_parameters)
n, m = int(sys.argv[2]), 4
x, z = inputs(n), inputs(m)
kept = lin.factors(x)
forward_rows = []
lin.frozen.module(torch.device("cpu")).register_forward_pre_hook(lambda module, args: forward_rows.append(len(args[0])))


def everything(x, z, kept, **budget):
    yield "grams", lambda: lin.grams(x, **budget)
    yield "cross", lambda: lin.grams(z, x, **budget)
    yield "kept", lambda: lin.grams(z, kept, **budget)
    yield "kept alone", lambda: lin.grams(kept, **budget)
    yield "weighted", lambda: lin.weighted_gram(x, None, variance, **budget)
    yield "weighted kept", lambda: lin.weighted_gram(kept, z, variance, **budget)
    yield "diagonals", lambda: lin.gram_diagonals(x, **budget)
    yield "features", lambda: lin.features(x, v, **budget)
    yield "disk", lambda: lin.symmetric_grams(x, storage="disk", **budget)


for _, call in everything(x[:4], z[:2], lin.factors(x[:4])):
    call()
for budget in map(float, sys.argv[3:]):
    for name, call in everything(x, z, kept, max_memory=budget * 2**20):
        ctypes.CDLL(None).malloc_trim(0)
        forward_rows.clear()
        before = reset_peak()
        result = call()
        print(name, budget, (peak_memory() - before) / 2**20, sum(forward_rows), sep="\\t")
        del result
"""
# What is kept by the allocator between one block and the next, and by the tables of this process, in MiB.
SLACK = 2.0


@pytest.mark.parametrize(
    ("net", "rows", "budgets"), [("conv", 40, (7, 20)), ("mlp", 48, (12, 32)), ("transformer", 16, (12, 32))]
)
def test_measured_peaks(net: str, rows: int, budgets: tuple[int, ...], fresh: FreshInterpreter) -> None:
    printed = fresh.run(PROGRAM, net, rows, *budgets)
    peaks = [line.split("\t") for line in printed.splitlines()]
    assert len(peaks) == 9 * len(budgets)
    for name, budget, peak, visited in peaks:
        assert float(peak) <= float(budget) + SLACK, (name, budget, peak)
        if name.endswith("kept"):
            assert int(visited) == 4, (name, visited)
        elif name == "kept alone":
            assert int(visited) == 0
        else:
            assert int(visited) >= rows
    # The budget is what the blocks are cut by: some of what is computed needs most of it.
    assert max(float(peak) / float(budget) for _, budget, peak, _ in peaks) > 0.3
