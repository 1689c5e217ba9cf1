"""Clocks, peak memory and alternating measurements in one process; needs neither torch nor ntkgp."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """What a run took, in seconds: CPU time of the whole process (all threads), and wall time."""

    cpu: float
    wall: float


def measure(run: Callable[[], object], synchronize: Callable[[], object] = lambda: None) -> tuple[Cost, object]:
    """The cost of one call and what it returned.

    :param synchronize: waits for a device; called before the clocks start and before they stop.
    """
    synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    value = run()
    synchronize()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall), value


def alternate(ways: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median CPU seconds of each way, run in turn after one warm-up each."""
    for run in ways.values():
        run()
    clocked = {name: lambda run=run: measure(run)[0] for name, run in ways.items()}
    costs = alternate_costs(clocked, dict.fromkeys(ways, repeats))
    return {name: statistics.median(cost.cpu for cost in runs) for name, runs in costs.items()}


def alternate_costs(ways: Mapping[str, Callable[[], Cost]], repeats: Mapping[str, int]) -> dict[str, list[Cost]]:
    """Costs of each way, run in turn A B C B C A …; a way drops out after its own number of repeats.

    The order rotates: what runs after a way that leaves cold caches behind, or another process, is slower for it.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(max(repeats.values(), default=0)):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if turn < repeats[name]:
                costs[name].append(ways[name]())
    return costs


def reset_peak() -> int | None:
    """Start a new peak of this process's resident memory; its size now, in bytes, or None where /proc has none."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak_memory()


def peak_memory() -> int | None:
    """Peak resident memory of this process since :func:`reset_peak`, in bytes, or None where /proc has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(sizes[0]) * 1024 if sizes else None


def percentile(values: list[float], fraction: float) -> float:
    """The smallest value with at least this fraction of all values below or at it; nan for none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else math.nan
