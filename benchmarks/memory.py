"""Is ``max_memory`` kept? Peak memory of every call with a budget, measured in fresh processes.

    python -m benchmarks.memory [--nets abcdef] [--budgets 24 64] [--calls NAME ...] [--as-is] [--log FILE]
        [--out docs/results]

For each network and call: the smallest budget that the call names when it refuses one byte; whether it accepts that
one, and refuses nine tenths of it (of Nyström features the number that is named is enough for as many of them as there
can be; fewer may do with less); the growth of resident memory while it runs with a budget of so many MiB, results
included, over the budget. What the allocator and torch's libraries hold after a small run of everything is no part of
it; nor is what the C library keeps of freed blocks (``--as-is`` measures that too). A call whose smallest budget is
above the given one is measured at its smallest. The exit status is 1 where a peak is above 1.15 times the budget, or a
printed smallest budget is refused. FILE has a line of JSON per call, from which an interrupted run goes on with the
next network.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpytorch
import torch
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from benchmarks.nets import NETS, make
from benchmarks.report import insert
from benchmarks.timing import peak_memory, reset_peak
from ntkgp import baselines
from ntkgp.evidence import one_pass, sampled_evidence
from ntkgp.linearization.memory import format_memory, parse_memory

ROWS = {"a": 400, "b": 48, "c": 40, "d": 12, "e": 24, "f": 1}
PROMISE = 1.15
# Calls that need more than this are not tried.
MOST = 2**30
# glibc keeps freed blocks below a threshold, which it raises up to 32 MiB as blocks are freed: with a fixed one what is
# freed goes back, and what is measured is what the library holds.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# Of what these need, the ranks of the landmarks' Grams are a part, which are known later.
BY_RANK = ("NystromNTKGP.fit", "one_pass")
# These take any budget, the smaller the more passes: they are not asked for the smallest, which would take hours.
BY_PASSES = ("sampled_evidence dual", "sampled_evidence weights", "InverseNTKGP")
PAGE = "memory.md"
MEBIBYTE = 2**20
Call = Callable[[Any], Any]


def calls(lin: ntkgp.LinearizedNetwork, x: torch.Tensor) -> Iterator[tuple[str, Call]]:
    """Everything that takes a budget, on N rows."""
    n = len(x)
    z, variance = x[: max(1, n // 8)], torch.ones(len(lin.groups), dtype=torch.float64)
    directions = torch.randn(8, lin.num_parameters, generator=torch.Generator().manual_seed(0)).to(lin.dtype)
    y = lin(x).detach().double()
    yield "grams", lambda m: lin.grams(x, max_memory=m)
    yield "grams(z, x)", lambda m: lin.grams(z, x, max_memory=m)
    yield "weighted_gram", lambda m: lin.weighted_gram(x, None, variance, max_memory=m)
    yield "gram_diagonals", lambda m: lin.gram_diagonals(x, max_memory=m)
    yield "factors", lambda m: lin.factors(x, max_memory=m)
    yield "features", lambda m: lin.features(x, directions, max_memory=m)
    yield "symmetric_grams on disk", lambda m: lin.symmetric_grams(x, max_memory=m, storage="disk")
    yield from models(lin, x, y, z)


def models(
    lin: ntkgp.LinearizedNetwork, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor
) -> Iterator[tuple[str, Call]]:
    """Fits and predictions, of what does not take minutes."""
    likelihood, n = gpytorch.likelihoods.GaussianLikelihood, len(x)

    def nystrom(m: Any) -> Any:
        return ntkgp.NystromNTKGP((x, y), likelihood(), lin, max(1, n // 8), 8, max_memory=m).fit(progress=False)

    def exact(m: Any, form: str, data: Any = None) -> Any:
        given = (x, y) if data is None else (data, None)
        return ntkgp.ExactNTKGP(*given, likelihood(), lin, form=form, max_memory=m).eval()(z).variance

    def variational(m: Any) -> Any:
        model = ntkgp.VariationalNTKGP(z, likelihood(), lin, n, learn_inducing=False, max_memory=m)
        return model.fit((x, y), iterations=2, batch_size=8, progress=False)(z).variance

    def laplace(m: Any, structure: str) -> Any:
        return baselines.Laplace(net_of(lin), structure=structure, evidence=None, max_memory=m).fit((x, y)).predict(z)

    def sampled(m: Any, form: str) -> Any:
        options = {"form": form, "max_steps": 1, "max_iterations": 20, "bounds": False}
        return sampled_evidence(lin, (x, y), likelihood(), 2, max_memory=m, **options)

    def inverse(m: Any) -> Any:
        pooled = Pooled()
        model = ntkgp.InverseNTKGP(pooled(y[:1].reshape(1, 28, 28)), pooled, likelihood(), lin, max_memory=m).eval()
        return model.reconstruction, model.standard_deviation()

    if lin.num_outputs == 28 * 28:
        yield "InverseNTKGP", inverse
        return
    yield "NystromNTKGP.fit", nystrom
    yield "one_pass", lambda m: one_pass(lin, (x, y), likelihood(), num_landmarks=max(1, n // 8), max_memory=m)
    yield "ExactNTKGP dual", lambda m: exact(m, "dual")
    if lin.num_parameters < 100_000:
        yield "sampled_evidence dual", lambda m: sampled(m, "dual")
        yield "sampled_evidence weights", lambda m: sampled(m, "weights")
    if lin.num_outputs <= 10:
        yield "VariationalNTKGP.fit", variational
        yield "Laplace kfac", lambda m: laplace(m, "kfac")
        yield "Laplace diagonal", lambda m: laplace(m, "diagonal")
    if lin.num_parameters < 3000:
        yield "ExactNTKGP primal", lambda m: exact(m, "primal")
        loader = DataLoader(TensorDataset(x, y), batch_size=32)
        yield "ExactNTKGP primal, streamed", lambda m: exact(m, "primal", loader)


class Pooled(torch.nn.Module):
    """Means of 2 × 2 pixels of a 28 × 28 image: a forward operator."""

    image_shape, data_shape, num_measurements = (28, 28), (14, 14), 196

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(*, 28, 28) -> (*, 14, 14)."""
        return image.unflatten(-1, (14, 2)).unflatten(-3, (14, 2)).mean((-1, -3))

    def adjoint(self, data: torch.Tensor) -> torch.Tensor:
        """Its transpose."""
        return data.repeat_interleave(2, -1).repeat_interleave(2, -2) / 4


def net_of(lin: ntkgp.LinearizedNetwork) -> torch.nn.Module:
    """The network that was linearised."""
    return lin.frozen.module(lin.frozen.device)


def smallest(call: Call) -> int | None:
    """The smallest budget in bytes that a call names, or None where it names none; 0 where it takes any."""
    try:
        call(1)
    except ValueError as refused:
        found = re.search(r"smallest possible is ([\d.e+]+ \w+)|needs ([\d.e+]+ \w+)", str(refused))
        return parse_memory(next(g for g in found.groups() if g)) if found else None
    return 0


def accepted(call: Call, budget: int) -> bool:
    """Whether a call runs within a budget."""
    try:
        call(budget)
    except ValueError as refused:
        if "max_memory" not in str(refused):
            raise
        return False
    return True


def measure(name: str, budgets: list[float], chosen: list[str] | None) -> None:
    """Write one line of JSON per call and budget: in a process of its own."""
    torch.set_num_threads(1)
    net, x = make(name, max(ROWS[name], 2))
    x = x[: ROWS[name]]
    lin = ntkgp.LinearizedNetwork(net, x[:2], groups="layer")
    for title, call in calls(lin, x[:2]):
        if (chosen is None or title in chosen) and title not in BY_PASSES:
            accepted(call, 2**31)
    for title, call in calls(lin, x):
        if chosen is not None and title not in chosen:
            continue
        least = 0 if title in BY_PASSES else smallest(call)
        if (least or 0) > MOST:
            print(json.dumps({"net": name, "call": title, "smallest": least}), flush=True)
            continue
        honest = least == 0 or (least is not None and accepted(call, least))
        honest = honest and (not least or title in BY_RANK or not accepted(call, int(0.9 * least)))
        for budget in budgets:
            given = max(int(budget * MEBIBYTE), least or 1)
            ctypes.CDLL(None).malloc_trim(0)
            before = reset_peak()
            result = call(given)
            peak = peak_memory()
            assert before is not None
            assert peak is not None
            row = {"net": name, "call": title, "smallest": least, "honest": honest, "budget": given}
            print(json.dumps({**row, "peak": peak - before}), flush=True)
            del result


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ("net", "N", "call", "smallest", "is enough", "budget", "peak", "peak / budget")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        head = f"| {NETS[row['net']].title} | {ROWS[row['net']]} | {row['call']}"
        least, enough = "none named", "yes" if row.get("honest") else "NO"
        if row["call"] in BY_PASSES:
            least, enough = "not asked", ""
        elif row["smallest"] is not None:
            least = format_memory(row["smallest"]) if row["smallest"] else "any"
        if "peak" not in row:
            lines.append(f"{head} | {least} | not tried | | | |")
            continue
        lines.append(
            f"{head} | {least} | {enough} | {row['budget'] / MEBIBYTE:.1f} MiB | "
            f"{row['peak'] / MEBIBYTE:.1f} MiB | {row['peak'] / row['budget']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default="".join(NETS), help="letters of benchmarks.nets")
    parser.add_argument("--budgets", type=float, nargs="+", default=[24.0, 64.0], help="MiB")
    parser.add_argument("--calls", nargs="+", help="these calls only")
    parser.add_argument("--log", type=Path, help="a file of all rows, from which an interrupted run goes on")
    parser.add_argument("--out", type=Path, help=f"a folder with {PAGE}, whose table is replaced")
    parser.add_argument("--as-is", action="store_true", help="leave the C library's allocator as it is")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.budgets, options.calls)
        return 0
    known = [json.loads(line) for line in options.log.open()] if options.log and options.log.exists() else []
    rows = [row for row in known if row["net"] in options.nets]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if options.as_is else ALLOCATOR)}
    for name in sorted(set(options.nets) - {row["net"] for row in rows}):
        command = [sys.executable, "-m", "benchmarks.memory", "--measure", name, "--budgets"]
        command += [*map(str, options.budgets), *(["--calls", *options.calls] if options.calls else [])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 2
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        rows += map(json.loads, lines)
        if options.log:
            with options.log.open("a") as file:
                file.writelines(f"{line}\n" for line in lines)
    text = table(rows)
    print(text)
    if options.out:
        insert(options.out / PAGE, "memory", text)
    tried = [row for row in rows if "peak" in row]
    return int(any(not row["honest"] or row["peak"] > PROMISE * row["budget"] for row in tried))


if __name__ == "__main__":
    sys.exit(main())
