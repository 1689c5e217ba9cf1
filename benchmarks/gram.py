"""Grams of six networks: ntkgp against other ways to compute the same kernel.

    python -m benchmarks.gram [--quick] [--nets abcdef] [--samples 64 256] [--jax-python PATH] [--write]

Every method computes the kernel of all outputs over all parameters of the same float32 network. For each network and N:

1. each method runs once in a process of its own: its peak memory, and whether it ends within the limit;
2. those that do run in turn in one process: the median of their CPU seconds / threads and of wall seconds
   (on a GPU: wall only), with the rate of matrix products before and after, and the error of each against a float64
   reference.

Runs of over 2 seconds are repeated 3 times and those of over 10 seconds once; the column "runs" tells. With
``--results`` what was measured is kept in a file, and a run that was interrupted goes on from there. "× limit" is the
time over the FLOP limit, the cheapest exact way for each layer at the measured rate of matrix products.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import ntkgp
from benchmarks import report
from benchmarks.cells import Event, launch
from benchmarks.contenders import METHODS, OURS, Cell, Variant, unavailable
from benchmarks.jax_peer import NAME, ROOT
from benchmarks.nets import NETS, make
from benchmarks.report import Row
from benchmarks.timing import Cost

QUICK_SAMPLES = {"a": 64, "b": 16, "c": 32, "d": 4, "e": 16, "f": 1}
QUICK_LIMIT = 10.0
QUICK_METHODS = ("ntkgp float32", "ntkgp", "vmap(jacrev)", "nngeometry", NAME)
PAGE = ROOT / "docs" / "performance.md"


class Results:
    """Finished measurements by what they measured, in memory and, if a path is given, in an append-only file."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._known = path, {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    # The last line of a run that was cut off while it wrote.
                    continue
                self._known[record["key"]] = record["value"]

    def get(self, key: str) -> Any:
        """What was measured under this key, or None."""
        return self._known.get(key)

    def add(self, key: str, value: Any) -> None:
        """Keep a measurement."""
        self._known[key] = value
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")


def _key(task: str, cell: Cell, rest: str) -> str:
    return f"{task} {json.dumps(asdict(cell))} {rest}"


class Comparison:
    """Probes and races of the asked cells.

    :param limit: seconds for one run of one method.
    :param address_space: bytes that a process may allocate; None for no bound.
    """

    def __init__(
        self, methods: Sequence[str], results: Results, *, repeats: int, limit: float, address_space: int | None
    ) -> None:
        self.methods, self.results, self.repeats = methods, results, repeats
        self.limit, self.address_space = limit, address_space
        self.rows: list[Row] = []
        self._flops: dict[tuple[str, int], dict[str, float]] = {}
        self._ceilings: list[dict[str, float]] = []
        # Per network and method: the largest N that was probed, and its event.
        self._smaller: dict[tuple[str, str], tuple[int, Event]] = {}

    def _launch(self, task: str, cell: Cell, seconds: float, **arguments: Any) -> tuple[list[Event], str]:
        arguments["limit"] = self.limit
        key = _key(task, cell, json.dumps(arguments))
        known = self.results.get(key)
        if known is None:
            events, reason = launch(task, {"cell": asdict(cell), **arguments}, seconds, self.address_space)
            known = [events, reason]
            self.results.add(key, known)
        return known[0], known[1]

    def probe(self, cell: Cell, method: str) -> Event:
        """Cost and peak memory of a single run, or a failure; hopeless ones are not started."""
        reason = self._hopeless(cell, method)
        if reason:
            return {"method": method, "failure": reason}
        # Imports, compilation and the warm-up have 60 seconds of their own.
        events, ended = self._launch("probe", cell, self.limit + 60, method=method)
        event = events[-1] if events else {"method": method, "failure": ended}
        self._smaller[cell.net, method] = (cell.samples, event)
        return event

    def _hopeless(self, cell: Cell, method: str) -> str:
        variant = OURS.get(method)
        if variant is not None and self.address_space is not None and self.address_space < 2 * _stack(cell, variant):
            return f"the Grams take {_stack(cell, variant) / 2**30:.0f} GiB"
        samples, event = self._smaller.get((cell.net, method), (0, {}))
        if "failure" in event:
            return f"{event['failure']} (N = {samples})"
        if samples and event["wall"] * cell.samples / samples > self.limit:
            return f"over {self.limit:.0f} s (by N = {samples}, linearly)"
        return ""

    def run(self, cell: Cell, probes: bool) -> list[Row]:
        """Measure one cell; returns its rows."""
        rows = {method: Row(cell.net, cell.samples, method, cell.threads, cell.device) for method in self.methods}
        for method, row in rows.items():
            row.failure = unavailable(method, cell)
        total = self.limit * len(rows)
        if probes:
            total = 0.0
            for method, row in rows.items():
                if row.failure:
                    continue
                event = self.probe(cell, method)
                row.failure = event.get("failure", "")
                row.peak = math.nan if event.get("peak") is None else event["peak"]
                total += 0 if row.failure else min(event["wall"] * (3 + self.repeats), 4 * self.limit)
        self._race(cell, rows, total + 180)
        self.rows += rows.values()
        return list(rows.values())

    def _race(self, cell: Cell, rows: dict[str, Row], seconds: float) -> None:
        """Race those that have not failed; one that ends the process is left out of another race of the rest."""
        while running := [method for method, row in rows.items() if not row.failure]:
            events, ended = self._launch("race", cell, seconds, methods=running, repeats=self.repeats)
            started = [event["starting"] for event in events if "starting" in event]
            self._take(cell, rows, [event for event in events if "starting" not in event])
            if not ended:
                return
            for method in [started[-1]] if started else running:
                rows[method].failure = f"race: {ended}"

    def _take(self, cell: Cell, rows: dict[str, Row], events: Sequence[Event]) -> None:
        costs: dict[str, list[Cost]] = {}
        for event in events:
            if "flops" in event:
                self._flops[cell.net, cell.samples] = event["flops"]
            elif "ceiling" in event:
                self._ceilings.append(event["ceiling"])
            elif "failure" in event:
                rows[event["method"]].failure = event["failure"]
            elif "error" in event:
                rows[event["method"]].error = event["error"]
            else:
                costs.setdefault(event["method"], []).append(Cost(event["cpu"], event["wall"]))
        for method, runs in costs.items():
            rows[method].set_costs(runs)

    def finished(self) -> tuple[list[Row], dict[str, float]]:
        """All rows with their FLOP limits at the measured rates of matrix products, and those rates."""
        ceilings = report.gemm_ceilings(self._ceilings)
        for row in self.rows:
            report.set_limit(row, self._flops.get((row.net, row.samples), {}), ceilings)
        return self.rows, ceilings


def _stack(cell: Cell, variant: Variant) -> int:
    """Bytes of the Grams that a variant returns."""
    net, x = make(cell.net, 2)
    lin = ntkgp.LinearizedNetwork(net, x, groups=variant.groups)
    return len(lin.groups.names) * (cell.samples * lin.num_outputs) ** 2 * torch.finfo(variant.dtype).bits // 8


def machine(cell: Cell, ceilings: dict[str, float]) -> str:
    """One line on where and how it was measured."""
    name = torch.cuda.get_device_name(cell.device) if cell.device.startswith("cuda") else _processor()
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in ceilings.items())
    budget = f"budget {cell.budget / 2**30:g} GiB"
    return f"{name}, threads = {cell.threads}, torch {torch.__version__}, {budget}; matrix products in GFLOP/s: {rates}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default="".join(NETS), help="letters of the networks (default: all)")
    parser.add_argument("--samples", type=int, nargs="+", help="N for every network (default: by network)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="for PyTorch methods (default: cpu)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each method that takes under 2 s (default: 5)")
    parser.add_argument("--budget", type=float, default=2.0, help="GiB that a method may hold (default: 2)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one run of a method (default: 120)")
    parser.add_argument(
        "--address-space", type=float, default=17.0, help="GiB that a process may allocate; 0: no bound"
    )
    parser.add_argument("--jax-python", help="a Python with jax and neural-tangents")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure peak memory")
    parser.add_argument(
        "--results", type=Path, help="append-only file of what was measured; found there, not run again"
    )
    parser.add_argument("--csv", type=Path, help="write all rows to this file")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--quick", action="store_true", help="small N, few methods, 2 runs, no peak memory: 2 minutes")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.nets) - set(NETS)
    if unknown:
        parser.error(f"--nets: expected letters of {''.join(NETS)}, got {''.join(sorted(unknown))!r}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    methods = chosen.methods or (QUICK_METHODS if chosen.quick else METHODS)
    # A GPU's driver reserves address space without bound.
    bounded = chosen.address_space > 0 and chosen.device == "cpu"
    comparison = Comparison(
        methods,
        Results(chosen.results),
        repeats=min(2, chosen.repeats) if chosen.quick else chosen.repeats,
        limit=min(QUICK_LIMIT, chosen.limit) if chosen.quick else chosen.limit,
        address_space=int(chosen.address_space * 2**30) if bounded else None,
    )
    cell = Cell("a", 1)
    for net in chosen.nets:
        for samples in chosen.samples or ([QUICK_SAMPLES[net]] if chosen.quick else NETS[net].samples):
            cell = Cell(net, samples, chosen.threads, int(chosen.budget * 2**30), chosen.device, chosen.jax_python)
            rows = comparison.run(cell, probes=not (chosen.quick or chosen.no_memory))
            print(f"\n{net}: {NETS[net].title}, N = {samples}", flush=True)
            print(report.text_table(report.HEADINGS, report.grid(rows)), flush=True)
    rows, ceilings = comparison.finished()
    lines, ratios, where = report.grid(rows), report.summary(rows), machine(cell, ceilings)
    print(f"\n{where}\n\n{report.text_table(report.HEADINGS, lines)}")
    print(f"\ntimes slower than float32 Grams of ntkgp (asked)\n\n{report.text_table(report.SUMMARY, ratios)}")
    if chosen.csv is not None:
        report.write_csv(chosen.csv, rows)
    if chosen.write:
        tables = [report.markdown_table(report.SUMMARY, ratios), report.markdown_table(report.HEADINGS, lines)]
        report.insert(PAGE, "gram", "\n\n".join([f"{where}.", *tables]))


if __name__ == "__main__":
    main()
