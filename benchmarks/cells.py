"""One cell of the comparison, in a process of its own: a probe of one method, or a race of several.

A probe warms up on a few samples and measures one evaluation and the growth of peak memory. A race runs its methods in
turn in one process, with the rate of matrix products before and after. Both write one JSON object per line
as soon as it is known, so that what is done survives a crash or a time limit.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.contenders import Cell, Contender, Reference, Unavailable, contender, flop_counts
from benchmarks.jax_peer import NAME, ROOT
from benchmarks.timing import Cost, alternate_costs, measure

Event = dict[str, Any]

WARM_UP = 4
TINY, SHORT, MEDIUM = 0.05, 2.0, 10.0


def launch(task: str, arguments: dict[str, Any], limit: float, address_space: int | None) -> tuple[list[Event], str]:
    """Run :func:`probe` or :func:`race` in a fresh process.

    :param limit: seconds after which it is ended, with the processes that it started.
    :param address_space: bytes it may allocate.
    :return: the events that it wrote, and why it ended early ("" if it did not).
    """
    request = json.dumps({"task": task, "address_space": address_space, **arguments})
    threads = str(arguments["cell"]["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cells", request],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            reason = "" if status == 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            reason = f"over {limit:.0f} s"
        finally:
            _end(process)
        out.seek(0)
        err.seek(0)
        events = [json.loads(line) for line in out if line.startswith("{")]
        if reason.startswith("ended"):
            reason = _why(reason, err.read())
    return events, reason


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those it started, which share its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _why(reason: str, errors: str) -> str:
    lines = errors.strip().splitlines()
    return f"{reason}: {lines[-1][:120]}" if lines else f"{reason} (killed for memory?)"


def say(event: Event) -> None:
    """Write one event."""
    print(json.dumps(event), flush=True)


def describe(error: BaseException) -> str:
    """A failure in a line."""
    text = str(error).strip()
    if isinstance(error, (Unavailable, TimeoutError)):
        return text
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0][:90] if text else ''}".rstrip(": ")


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when its time is over, at the next Python instruction."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"over {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def probe(cell: Cell, method: str, limit: float) -> None:
    """Write the cost and the peak memory of one evaluation after a warm-up on a few samples."""
    try:
        if method != NAME:
            small = contender(method, cell, min(WARM_UP, cell.samples))
            small.run()
            small.close()
            gc.collect()
        entrant = contender(method, cell)
        with within(limit):
            cost, peak = entrant.run_with_peak()
        entrant.close()
        say({"method": method, **asdict(cost), "peak": peak})
    except Exception as error:
        say({"method": method, "failure": describe(error)})


def repeats_for(wall: float, repeats: int) -> int:
    """How often a cell is clocked, by the wall seconds of its first run."""
    if wall < TINY:
        return 5 * repeats
    if wall < SHORT:
        return repeats
    return min(3, repeats) if wall < MEDIUM else 1


def race(cell: Cell, methods: Iterable[str], repeats: int, limit: float) -> None:
    """Write errors, costs of alternating runs, rates of matrix products and FLOP counts.

    The first run of each method warms up and gives its error against the reference; it counts where it takes long. What
    is running is written before it starts, so that a reader knows what a crash was due to.
    """
    say({"flops": flop_counts(cell)})
    reference = Reference.of(cell)
    entrants: dict[str, Contender] = {}
    left: dict[str, int] = {}
    for method in methods:
        say({"starting": method})
        try:
            entrants[method] = contender(method, cell)
            with within(limit):
                first = entrants[method].run()
                if first.wall < SHORT:
                    # What is set up at the first call is no part of the cost.
                    first = entrants[method].run()
            say({"method": method, "error": reference.error(entrants[method].kernel())})
        except Exception as error:
            if method in entrants:
                entrants.pop(method).close()
            say({"method": method, "failure": describe(error)})
            continue
        left[method] = repeats_for(first.wall, repeats)
        if first.wall >= SHORT:
            say({"method": method, **asdict(first)})
            left[method] -= 1
    say({"ceiling": gemm_rates(cell)})

    def clocked(method: str) -> Cost:
        say({"starting": method})
        cost = entrants[method].run()
        entrants[method].forget()
        say({"method": method, **asdict(cost)})
        return cost

    alternate_costs({method: partial(clocked, method) for method in entrants}, left)
    say({"ceiling": gemm_rates(cell)})
    for entrant in entrants.values():
        entrant.close()


def gemm_rates(cell: Cell, seconds: float = 0.4, size: int = 1024) -> dict[str, float]:
    """FLOP per second (CPU seconds / threads; wall on a GPU) of square matrix products, by dtype."""
    rates = {}
    cuda = cell.device.startswith("cuda")
    size = 8 * size if cuda else size

    def synchronize() -> None:
        if cuda:
            torch.cuda.synchronize()

    for dtype in (torch.float32, torch.float64):
        matrix = torch.randn(size, size, dtype=dtype, device=cell.device)
        out = matrix @ matrix
        count, end, spent = 0, time.perf_counter() + seconds, 0.0
        while time.perf_counter() < end:
            cost = measure(partial(torch.mm, matrix, matrix, out=out), synchronize)[0]
            spent += cost.wall if cuda else cost.cpu / cell.threads
            count += 1
        rates[str(dtype).removeprefix("torch.")] = 2.0 * size**3 * count / spent if spent else math.nan
    return rates


def main() -> None:
    request = json.loads(sys.argv[1])
    limit = request.pop("address_space")
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    task, cell = request.pop("task"), Cell(**request.pop("cell"))
    torch.set_num_threads(cell.threads)
    if task == "probe":
        probe(cell, **request)
    else:
        race(cell, **request)


if __name__ == "__main__":
    main()
