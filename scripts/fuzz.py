"""Random networks times every public call: each case is the dense oracle's result, or a clear error.

    PYTHONPATH=. python scripts/fuzz.py --first 0 --count 10000            # all calls in turn, eight on each network
    PYTHONPATH=. python scripts/fuzz.py --first 1234 --count 1 --verbose    # one case again, with its traceback
    PYTHONPATH=. python scripts/fuzz.py --count 300 --call grams            # one call on many networks
    PYTHONPATH=. python scripts/fuzz.py --leaks 1000 --count 4  # the same cases again and again: what grows?

A case is its number: network, data and call are drawn from it. A find is a wrong number, an error that torch raised
and not the library, a bad argument that was accepted, a warning, or a change of the module, of a generator, of the
default dtype or of the number of threads. The exit status is 1 where there is one.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter

import torch

from tests.fuzzing import NAMES, Outcome, run
from tests.fuzzing.watch import resources


def sweep(first: int, count: int, seconds: float, call: str | None, verbose: bool) -> list[Outcome]:
    started, found = time.monotonic(), []
    for number in range(first, first + count):
        outcome = run(number, call)
        found.append(outcome)
        if outcome.kind == "find" or (verbose and outcome.kind == "refused"):
            print(f"{outcome.number} {outcome.call} {outcome.kind}: {outcome.text}\n    {outcome.network}", flush=True)
        if time.monotonic() - started > seconds:
            break
    return found


def table(outcomes: list[Outcome], cpu: float) -> str:
    lines = ["| call | cases | equal | refused | finds |", "| --- | --- | --- | --- | --- |"]
    counts = Counter((o.call, o.kind) for o in outcomes)
    for name in (*NAMES, "all"):
        kinds = [
            sum(n for (call, kind), n in counts.items() if call == name or name == "all" if kind == wanted)
            for wanted in ("equal", "refused", "find")
        ]
        if sum(kinds):
            lines.append(f"| {name} | {sum(kinds)} | {' | '.join(map(str, kinds))} |")
    refusals = Counter(f"{o.call}: {o.text[:110]}" for o in outcomes if o.kind == "refused")
    lines += ["", f"{len(outcomes)} cases, {cpu:.0f} CPU s ({1e3 * cpu / max(1, len(outcomes)):.0f} ms each)"]
    return "\n".join([*lines, *(f"refused {n} times: {text}" for text, n in refusals.most_common(20))])


def leaks(first: int, count: int, repetitions: int, call: str | None) -> int:
    """Growth of files, threads and tensors from the fifth repetition of some cases to the last."""
    before: dict[str, int] = {}
    for repetition in range(repetitions):
        for number in range(first, first + count):
            run(number, call)
        if repetition == min(5, repetitions - 2):
            before = resources()
    after = resources()
    grown = {name: (before[name], after[name]) for name in after if after[name] > before[name]}
    print(f"{repetitions} repetitions of {count} cases: {grown or 'nothing has grown'}")
    return int(bool(grown))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1000, help="how many cases")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so much time")
    parser.add_argument("--call", choices=NAMES, help="this call only")
    parser.add_argument("--leaks", type=int, help="repeat the cases so often, and say what has grown")
    parser.add_argument("--verbose", action="store_true", help="print refusals and what the library logs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.verbose:
        logging.getLogger("ntkgp").setLevel(logging.ERROR)
    if options.leaks:
        return leaks(options.first, options.count, options.leaks, options.call)
    started = time.process_time()
    outcomes = sweep(options.first, options.count, options.seconds, options.call, options.verbose)
    print(table(outcomes, time.process_time() - started))
    return int(any(outcome.kind == "find" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
