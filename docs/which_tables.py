"""The seconds on which.md, taken from the results: ``python docs/which_tables.py`` writes them between its markers."""

from __future__ import annotations

import csv
import re
import statistics
from collections import defaultdict
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "which.md"
SETS = {"boston": 455, "concrete": 927, "wine": 1439, "power": 8611, "naval": 10741, "protein": 41157}
METHODS = {
    "GP θ⋆, network mean": "`gp`: exact, one λ, evidence at θ⋆",
    "GP θ⋆, λ per layer": '`gp`, `groups="layer"`',
    "ELLA": "`NystromNTKGP`",
    "VaLLA": "`VariationalNTKGP` (λ and σ² given)",
    "Laplace KFAC": "`Laplace`, KFAC",
    "Laplace diagonal": "`Laplace`, diagonal",
    "Laplace last layer": "`Laplace`, last layer",
    "Laplace subnetwork": "`Laplace`, subnetwork",
    "Laplace sampled": "Laplace, sampled weights",
    "L2M": "`L2M`",
    "VL": "`VariationalLaplace`",
    "SWAG": "`SWAG`",
    "MC dropout": "`MCDropout`",
    "deep ensemble": "`DeepEnsemble` of 5",
}  # fmt: skip
NETS = {
    "a": "MLP 1-50-50-1, P = 2,701, C = 1",
    "b": "MLP 784-512-512-10, P = 669,706, C = 10",
    "c": "LeNet, P = 61,706, C = 10",
    "d": "ResNet-18 of width 16, P = 701,466, C = 10",
    "e": "transformer of two blocks, P = 45,010, C = 10",
    "f": "U-Net, P = 117,393, C = 784",
}


def short(seconds: float) -> str:
    """Two digits."""
    return f"{seconds:.2g}" if seconds < 100 else f"{seconds:.0f}"


def methods_table() -> str:
    """Median fit and prediction seconds of each method on each standard set."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with (FOLDER / "results" / "uci.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["fit_seconds"] and row["predict_seconds"]:
                name = row["data"].split("/")[0]
                seconds[row["method"], name].append(float(row["fit_seconds"]) + float(row["predict_seconds"]))
    heads = [f"{name}, N = {n:,}" for name, n in SETS.items()]
    lines = [f"| method | {' | '.join(heads)} |", f"| --- |{' --: |' * len(SETS)}"]
    for method, label in METHODS.items():
        found = [seconds.get((method, f"{name} standard")) for name in SETS]
        lines.append(f"| {label} | {' | '.join(short(statistics.median(s)) if s else '–' for s in found)} |")
    return "\n".join(lines)


def grams_table() -> str:
    """CPU seconds of the Grams of each benchmark network, from the table on performance.md."""
    text = (FOLDER / "performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-f]) \| (\d+) \| ntkgp \| ([^|]+) \|", text, re.MULTILINE)
    lines = ["| network | CPU seconds for the Grams of N inputs, float64 |", "| --- | --- |"]
    for net, label in NETS.items():
        cells = [(n, value.strip()) for name, n, value in rows if name == net]
        told = [f"N = {n}: {short(float(value))}" for n, value in cells if not value.startswith("over")]
        lines.append(f"| {label} | {'; '.join(told)} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """The page with its tables as the results have them now."""
    for name, table in {"methods": methods_table(), "grams": grams_table()}.items():
        between = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text, count = between.subn(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"{PAGE.name}: expected one place for {name!r}, found {count}")
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
