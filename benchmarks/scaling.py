"""Scaling of the ELLA accumulation over processes: ``python -m benchmarks.scaling``.

Two processes of one thread each take turns: one of them alone, both by virtual shards and ordered sums, both by one
``all_reduce`` at the end (whose sums depend on the number of processes). Each way makes the whole pass over the same
data; wall time is from barrier to barrier, CPU time that of the process which used most. On a machine that is busy with
other work the CPU times are the ones to read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ntkgp
from ntkgp.distributed import alone, gather_objects, rank, world_size
from ntkgp.evidence.accumulation import accumulate
from ntkgp.evidence.streaming import StreamStatistics
from ntkgp.linearization.nystrom import LandmarkFeatures
from ntkgp.models.batches import Batches

WAYS = ("one", "ordered", "plain")


class Case(NamedTuple):
    """One accumulation: a classifier 20-64-64-64-10 with layer norms in float32.

    :ivar rows: N.
    :ivar landmarks: M.
    :ivar mixed: K, or None for all rows of the landmarks.
    :ivar batch: rows per batch.
    """

    label: str
    rows: int
    landmarks: int
    mixed: int | None
    batch: int


CASES = (Case("20 mixed features", 2048, 200, 20, 64), Case("all rows of 24 landmarks", 1024, 24, None, 32))


def problem(case: Case) -> tuple[LandmarkFeatures, Batches]:
    """Features and data."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (20, 64, 64):
        layers += [nn.Linear(width, 64), nn.LayerNorm(64), nn.Tanh()]
    net, x = nn.Sequential(*layers, nn.Linear(64, 10)), torch.randn(case.rows, 20)
    lin = ntkgp.LinearizedNetwork(net, x, groups="single")
    y = (x @ torch.randn(20, 10)).argmax(-1)
    features = LandmarkFeatures.build(lin, x[: case.landmarks], num_features=case.mixed)
    return features, Batches.of((x, y), lin, ntkgp.CategoricalLikelihood(10), case.batch)


def plain_pass(features: LandmarkFeatures, batches: Batches) -> StreamStatistics:
    """Every second batch to each process, and one ``all_reduce``."""
    own = StreamStatistics.zeros("classification", features)
    for index, (x, y) in enumerate(batches):
        if index % world_size() == rank():
            with alone():
                own.add(features, x, y)
    vector = own.vector()
    dist.all_reduce(vector)
    return own.with_vector(vector)


def timed(work: Callable[[], StreamStatistics | None]) -> tuple[float, float, Tensor]:
    """Wall seconds between barriers, CPU seconds of the process that used most, and the sums."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    cpu = time.process_time() - cpu
    dist.barrier()
    wall = time.perf_counter() - wall
    return wall, max(gather_objects(cpu)), torch.empty(0) if found is None else found.second


def measure(case: Case, repeats: int) -> list[str]:
    """A row of the table."""
    features, batches = problem(case)

    def by_one() -> StreamStatistics | None:
        with alone():
            return None if dist.get_rank() else accumulate(features, "classification", batches)

    ways: dict[str, Callable[[], StreamStatistics | None]] = {
        "one": by_one,
        "ordered": lambda: accumulate(features, "classification", batches),
        "plain": lambda: plain_pass(features, batches),
    }
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    gap = 0.0
    for turn in range(repeats + 1):
        sums: dict[str, Tensor] = {}
        for name in (*WAYS[turn % 3 :], *WAYS[: turn % 3]):
            seconds, used, sums[name] = timed(ways[name])
            if turn:  # the first is a warm-up
                costs[name].append((seconds, used))
        if rank() == 0:
            assert torch.equal(sums["one"], sums["ordered"]), "the sums depend on the number of processes"
            gap = float((sums["plain"] - sums["one"]).abs().max() / sums["one"].abs().max())
    wall = {name: statistics.median(cost[0] for cost in costs[name]) for name in WAYS}
    cpu = {name: statistics.median(cost[1] for cost in costs[name]) for name in WAYS}
    cells = [f"{case.label}, R = {features.size}, N = {case.rows}"]
    cells += [f"{wall[name]:.2f} / {cpu[name]:.2f}" for name in WAYS]
    cells += [f"{wall['one'] / wall['ordered']:.2f} / {cpu['one'] / cpu['ordered']:.2f}"]
    cells += [f"{wall['ordered'] / wall['plain'] - 1:+.1%} / {cpu['ordered'] / cpu['plain'] - 1:+.1%}", f"{gap:.0e}"]
    return cells


def main(repeats: int, out: Path | None) -> None:
    """Fork two processes, measure, print a table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        child = os.fork()
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(child == 0), world_size=2)
        rows = [measure(case, repeats) for case in CASES]
        dist.barrier()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        dist.destroy_process_group()
    head = [
        "case",
        "one",
        "two, ordered",
        "two, all_reduce",
        "one / two",
        "ordered over all_reduce",
        "all_reduce off by",
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    text = "\n".join([f"Seconds, wall / CPU, median of {repeats}, alternating.", "", *lines])
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    main(arguments.repeats, arguments.out)
