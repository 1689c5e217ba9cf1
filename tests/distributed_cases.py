"""Sums over 1, 2 and 4 processes: ``python -m tests.distributed_cases FOLDER`` forks them after one import."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ntkgp
from ntkgp.distributed import Shards, gather_rows, ordered_sum, symmetric_tiles
from ntkgp.solvers import solve

WORLDS = (1, 2, 4)
DOUBLE = torch.float64


def problem() -> tuple[ntkgp.LinearizedNetwork, Tensor, Tensor]:
    """Law E1: N = 512, P = 745, 4-24-24-1 tanh; three right-hand sides."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
        x, b = torch.randn(512, 4, dtype=DOUBLE), torch.randn(512, 3, dtype=DOUBLE)
    return ntkgp.LinearizedNetwork(net, x, groups="single"), x, b


def work(lin: ntkgp.LinearizedNetwork, x: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Accumulator, Gram and 60 unconverged steps of CG in data space and in weight space."""
    shards = Shards(len(x), 8)
    z = x[:: len(x) // 16]
    rows = {s: lin.jacobian(shards.rows(x, s)).flatten(0, 1) for s in shards.own()}
    landmarks = lin.jacobian(z).flatten(0, 1)
    features = {s: rows[s] @ landmarks.mT for s in rows}
    accumulator = ordered_sum({s: f.mT @ f for s, f in features.items()}, shards)

    def tile(s: int, t: int) -> Tensor:
        return lin.grams(shards.rows(x, s), None if s == t else shards.rows(x, t))[0]

    gram = symmetric_tiles(tile, shards)

    def dual(v: Tensor) -> Tensor:
        return gather_rows({s: shards.rows(gram, s) @ v + 1e-4 * shards.rows(v, s) for s in shards.own()}, shards)

    def primal(v: Tensor, fast: bool = False) -> Tensor:
        return ordered_sum({s: rows[s].mT @ (rows[s] @ v) for s in rows}, shards, fast) + 1e-4 * v

    rhs = ordered_sum({s: rows[s].mT @ shards.rows(b, s) for s in rows}, shards)
    options: dict[str, Any] = {"tolerance": 1e-14, "max_iterations": 60}
    return {
        "accumulator": accumulator,
        "gram": gram,
        "dual": solve(dual, b, **options).solution,
        "primal": solve(primal, rhs, **options).solution,
        "fast": solve(lambda v: primal(v, True), rhs, **options).solution,
    }


def main(folder: str) -> None:
    """Fork the processes of every world; each writes what it found."""
    torch.set_num_threads(1)
    for world in WORLDS:
        children = []
        for rank in range(world):
            child = os.fork()
            if child:
                children.append(child)
                continue
            code = 1
            try:
                store = f"file://{folder}/store{world}"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
                torch.save(work(*problem()), Path(folder) / f"{world}-{rank}.pt")
                dist.barrier()
                code = 0
            finally:
                os._exit(code)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children), f"a process of {world} failed"


if __name__ == "__main__":
    main(*sys.argv[1:])
