"""Tables of a comparison of Grams: the rows, what is asked of them, and their three forms (terminal, CSV, Markdown)."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from benchmarks.timing import Cost, percentile

WRONG = 1e-2
BASELINE = "ntkgp float32"
DENSE = "vmap(jacrev)"
PACKAGES = ("nngeometry", "laplace Curvlinops", "laplace BackPACK", "laplace ASDL")
COMPILED = "neural-tangents"


@dataclass(frozen=True)
class Asked:
    """Ratios asked of float32 Grams: over vmap(jacrev), the better PyTorch package, and neural-tangents."""

    dense: float | None
    packages: float | None
    compiled: float | None


ASKED = {
    "a": Asked(1, None, None),
    "b": Asked(280, 10, 1),
    "c": Asked(8, 15, 3),
    "d": Asked(2, 4, 1),
    "e": Asked(1.4, None, 5),
    "f": Asked(3, None, None),
}
LIMIT_ASKED = 2.0


@dataclass
class Row:
    """One method on one network and N: medians of its costs, or why there are none."""

    net: str
    samples: int
    method: str
    threads: int
    device: str
    cpu: float = math.nan
    wall: float = math.nan
    repeats: int = 0
    peak: float = math.nan
    error: float = math.nan
    seconds: float = field(default=math.nan, metadata={"doc": "CPU seconds / threads; wall seconds on a GPU"})
    limit: float = field(default=math.nan, metadata={"doc": "the FLOP limit at the measured GEMM rates, in seconds"})
    rate: float = field(default=math.nan, metadata={"doc": "FLOP/s of the ways chosen by ntkgp"})
    failure: str = ""

    @property
    def counts(self) -> bool:
        """Whether it was measured and is right."""
        return not self.failure and not self.error > WRONG and not math.isnan(self.seconds)

    def set_costs(self, costs: Sequence[Cost]) -> None:
        """Take the medians of some runs."""
        self.cpu = statistics.median(cost.cpu for cost in costs)
        self.wall = statistics.median(cost.wall for cost in costs)
        self.repeats = len(costs)
        self.seconds = self.wall if self.device.startswith("cuda") else self.cpu / self.threads


def gemm_ceilings(measured: Iterable[dict[str, float]]) -> dict[str, float]:
    """The 90th percentile of the rates of matrix products, by dtype; nan where none was measured."""
    rates = list(measured)
    return {dtype: percentile([rate[dtype] for rate in rates], 0.9) for dtype in ("float32", "float64")}


def set_limit(row: Row, flops: dict[str, float], ceilings: dict[str, float]) -> None:
    """FLOP limit and achieved rate of a row; passes run in float32, products of ours in the dtype of its name."""
    double = row.method.startswith("ntkgp") and "float32" not in row.method
    products = ceilings["float64" if double else "float32"]
    if "limit" in flops:
        row.limit = flops["passes"] / ceilings["float32"] + (flops["limit"] - flops["passes"]) / products
    if "chosen" in flops and row.method.startswith("ntkgp") and row.seconds > 0:
        row.rate = flops["chosen"] / row.seconds


def number(value: float, digits: int = 2) -> str:
    """A number in few characters; a dash for nan."""
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}e}" if value != 0 and not 1e-3 <= abs(value) < 1e5 else f"{value:.{digits + 1}g}"


HEADINGS = ("net", "N", "method", "CPU s", "wall s", "runs", "× ntkgp f32", "× limit", "GFLOP/s", "peak MB", "error")


def _cells(row: Row, base: Row | None) -> tuple[str, ...]:
    head = (row.net, str(row.samples), row.method)
    if row.failure:
        return (*head, row.failure)
    ratio = row.seconds / base.seconds if base is not None and base.counts else math.nan
    error = f"{number(row.error, 1)}{' WRONG' if row.error > WRONG else ''}"
    figures = (number(row.seconds), number(row.wall), str(row.repeats), number(ratio), number(row.seconds / row.limit))
    return (*head, *figures, number(row.rate / 1e9), number(row.peak / 1e6), error)


def grid(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The rows as text, each beside the float32 Grams of its own cell."""
    base = {(row.net, row.samples): row for row in rows if row.method == BASELINE}
    return [_cells(row, base.get((row.net, row.samples))) for row in rows]


def text_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned for the terminal; the last entry of a short line runs on."""
    full = [headings, *(line for line in lines if len(line) == len(headings))]
    widths = [max(len(line[k]) for line in full) for k in range(len(headings))]
    for line in lines:
        widths[:3] = [max(width, len(entry)) for width, entry in zip(widths, line[:3], strict=False)]
    return "\n".join(
        "  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=False)).rstrip()
        for line in [headings, *lines]
    )


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    rows = [
        list(headings),
        ["---"] * len(headings),
        *(list(line) + [""] * (len(headings) - len(line)) for line in lines),
    ]
    return "\n".join("| " + " | ".join(entry.replace("|", "\\|") for entry in row) + " |" for row in rows)


SUMMARY = ("net", "N", "vmap(jacrev)", "nngeometry or laplace-torch", "neural-tangents", "FLOP limit")


def summary(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Per cell: how many times slower the peers are than the float32 Grams, and the ratio to the FLOP limit.

    Each entry reads ``reached (asked)``; a peer that failed is given with its reason, several of them in a word.
    """
    lines: list[tuple[str, ...]] = []
    for ours in (row for row in rows if row.method == BASELINE and row.counts):
        peers = {row.method: row for row in rows if (row.net, row.samples) == (ours.net, ours.samples)}
        asked = ASKED[ours.net]
        limit = number(ours.seconds / ours.limit)
        lines.append(
            (
                ours.net,
                str(ours.samples),
                _ratio(ours, [peers.get(DENSE)], asked.dense),
                _ratio(ours, [peers.get(name) for name in PACKAGES], asked.packages),
                _ratio(ours, [peers.get(COMPILED)], asked.compiled),
                f"{limit} (≤ {LIMIT_ASKED:g})" if ours.samples == 256 else limit,
            )
        )
    return lines


def _ratio(ours: Row, peers: Sequence[Row | None], asked: float | None) -> str:
    present = [peer for peer in peers if peer is not None]
    right = [peer for peer in present if peer.counts]
    suffix = "" if asked is None else f" (≥ {asked:g})"
    if right:
        best = min(right, key=lambda peer: peer.seconds)
        name = f" {best.method}" if len(peers) > 1 else ""
        return f"{number(best.seconds / ours.seconds)}{name}{suffix}"
    if len(present) > 1:
        return f"none got there{suffix}"
    return "".join(peer.failure or "wrong values" for peer in present) + suffix or "–"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All fields of all rows."""
    names = [item.name for item in fields(Row)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


def insert(path: Path, marker: str, content: str) -> None:
    """Replace what stands between ``<!-- marker:begin -->`` and ``<!-- marker:end -->`` in a page.

    :raises ValueError: the page lacks the markers.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    page = path.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{path}: expected one line {begin} and one line {end}")
    head, rest = page.split(begin)
    path.write_text(f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
