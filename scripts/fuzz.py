"""Random networks times every public call: each case is the dense oracle's result, or a clear error.

    PYTHONPATH=. python scripts/fuzz.py --count 10000 --log cases.csv --out docs/results  # and the page of it
    PYTHONPATH=. python scripts/fuzz.py --first 1234 --count 1 --verbose    # one case again, with its traceback
    PYTHONPATH=. python scripts/fuzz.py --count 300 --call grams            # one call on many networks

A case is its number: network, data and call are drawn from it. A find is a wrong number, an error that torch raised
and not the library, a bad argument that was accepted, a warning, or a change of the module, of a generator, of the
default dtype or of the number of threads. The exit status is 1 where there is one. What cases.csv has already is not
run again. What grows over many repetitions is asked by scripts/leaks.py.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.report import insert
from tests.fuzzing import NAMES, Outcome, run

PAGE = "fuzzing.md"
COLUMNS = ("number", "call", "kind", "text", "network", "seconds")


@dataclass(frozen=True)
class Timed:
    """An outcome and its CPU seconds."""

    outcome: Outcome
    seconds: float


def read(log: Path | None) -> dict[int, Timed]:
    """The cases of a log, by number; the last row of a number counts."""
    if log is None or not log.is_file():
        return {}
    found: dict[int, Timed] = {}
    with log.open(newline="") as file:
        for row in csv.DictReader(file):
            outcome = Outcome(int(row["number"]), row["call"], row["kind"], row["text"], row["network"])
            found[outcome.number] = Timed(outcome, float(row["seconds"]))
    return found


def append(log: Path, timed: Timed) -> None:
    new = not log.exists()
    with log.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(
            {**{name: getattr(timed.outcome, name) for name in COLUMNS[:-1]}, "seconds": f"{timed.seconds:.4f}"}
        )


def sweep(numbers: range, call: str | None, log: Path | None, again: bool, verbose: bool) -> list[Timed]:
    known, found = read(log), []
    for number in numbers:
        if number in known and not (again and known[number].outcome.kind == "find"):
            found.append(known[number])
            continue
        started = time.process_time()
        outcome = run(number, call)
        timed = Timed(replace(outcome, error=None), time.process_time() - started)
        if log is not None:
            append(log, timed)
        found.append(timed)
        if outcome.kind == "find" or (verbose and outcome.kind == "refused"):
            print(f"{outcome.number} {outcome.call} {outcome.kind}: {outcome.text}\n    {outcome.network}", flush=True)
            if verbose and outcome.error is not None:
                traceback.print_exception(outcome.error)
    return found


def table(outcomes: list[Outcome]) -> str:
    """Cases by call and kind."""
    lines = ["| call | cases | equal | refused | finds |", "| --- | --- | --- | --- | --- |"]
    counts = Counter((o.call, o.kind) for o in outcomes)
    for name in (*NAMES, "all"):
        kinds = [
            sum(n for (call, kind), n in counts.items() if call == name or name == "all" if kind == wanted)
            for wanted in ("equal", "refused", "find")
        ]
        if sum(kinds):
            lines.append(f"| {name} | {sum(kinds)} | {' | '.join(map(str, kinds))} |")
    return "\n".join(lines)


def refusals(outcomes: list[Outcome]) -> str:
    """What good arguments were refused for, and how often."""
    said = Counter(f"`{o.call}`: {o.text[:140]}" for o in outcomes if o.kind == "refused")
    return "\n".join(f"- {n} times, {text}" for text, n in said.most_common(20)) or "None was."


def section(found: list[Timed], command: str) -> str:
    """What the page says of the cases."""
    outcomes, cpu = [timed.outcome for timed in found], sum(timed.seconds for timed in found)
    networks = len({o.network for o in outcomes})
    finds = [f"- {o.number} `{o.call}`: {o.text}" for o in outcomes if o.kind == "find"]
    return "\n".join(
        [
            f"    {command}", "",
            f"{len(found):,} cases on {networks:,} networks, {cpu:,.0f} CPU seconds, one thread, torch "
            f"{torch.__version__}: **{len(finds)} finds**.", *finds, "", table(outcomes), "",
            "Good arguments that were refused:", "", refusals(outcomes),
        ]
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1000, help="how many cases")
    parser.add_argument("--call", choices=NAMES, help="this call only")
    parser.add_argument("--log", type=Path, help="a CSV file of all cases, from which an interrupted run goes on")
    parser.add_argument("--again", action="store_true", help="run the finds of the log again")
    parser.add_argument("--out", type=Path, help=f"a folder with {PAGE}, whose table is replaced")
    parser.add_argument("--verbose", action="store_true", help="print refusals, tracebacks and what the library logs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.verbose:
        logging.getLogger("ntkgp").setLevel(logging.ERROR)
    numbers = range(options.first, options.first + options.count)
    found = sweep(numbers, options.call, options.log, options.again, options.verbose)
    print(section(found, ""))
    if options.out:
        first = f" --first {options.first}" if options.first else ""
        command = f"PYTHONPATH=. python scripts/fuzz.py{first} --count {options.count} --log cases.csv"
        insert(options.out / PAGE, "cases", section(found, f"{command} --out docs/results"))
    return int(any(timed.outcome.kind == "find" for timed in found))


if __name__ == "__main__":
    sys.exit(main())
