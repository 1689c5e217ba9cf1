"""UCI regression without a validation set: the network alone against its Gaussian process.

Per split a 2×50 tanh network is trained on all training data; precisions and noise come from the evidence alone. Rows:
the network with the standard deviation of its training residuals, and {one λ, one λ per layer} × {evidence at θ̃, at
θ⋆} × {mean = the network's output, mean = the posterior's}. Scores are test NLL and RMSE in original units, mean ±
standard error over splits.

    python scripts/uci.py --quick [--data FOLDER] [--out docs/results] [--workers 2]

FOLDER holds uci/<name>.npz with the published splits; without it the script says so and stops.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.evaluation.datasets import RegressionData, uci
from ntkgp.evaluation.metrics import gaussian_nll, original_units, rmse
from ntkgp.evaluation.training import seeded, train

FITS = [(groups, at) for groups in ("single", "layer") for at in ("theta_map", "theta_star")]
NAMES = {"single": "single λ", "layer": "λ per layer", "theta_map": "θ̃", "theta_star": "θ⋆"}


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)).double()


def scores(mean: Tensor, variance: Tensor, data: RegressionData) -> tuple[float, float]:
    mean, variance = original_units(mean.flatten(), variance.flatten(), data.target_mean, data.target_std)
    target = data.y_test.flatten().double() * data.target_std + data.target_mean
    return float(gaussian_nll(mean, variance, target)), float(rmse(mean, target))


def evaluate(data: RegressionData, steps: int) -> list[tuple[str, float, float, float]]:
    """(row, NLL, RMSE, seconds) for every row of the table on one split."""
    x, y = data.x_train, data.y_train.reshape(-1, 1)
    start = time.perf_counter()
    with seeded(0):
        net = network(x.shape[-1])
    train(net, x, y, steps=steps, learning_rate=1e-2, weight_decay=1e-4)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        prediction, error = net(data.x_test), (net(x) - y).square().mean()
    rows = [("network alone", *scores(prediction, error.expand(len(prediction)), data), seconds)]
    for groups, at in FITS:
        start = time.perf_counter()
        model = ntkgp.from_network(net, (x, y), groups=groups, at=at)
        for mean in ("network", "posterior"):
            model.mean = mean
            with torch.no_grad():
                predictive = model.likelihood(model(data.x_test))
                row = f"{NAMES[groups]}, {NAMES[at]}, mean {mean}" + ("" if model.report.converged else " (!)")
                rows.append((row, *scores(predictive.mean, predictive.variance, data), time.perf_counter() - start))
    return rows


def work(job: tuple[str, str, int, str, int]) -> list[tuple[str, str, int, str, float, float, float]]:
    name, kind, index, folder, steps = job
    torch.set_num_threads(1)
    data = uci(name, folder)
    split = (data.standard if kind == "standard" else data.gap)(index, torch.float64)
    return [(name, kind, index, *row) for row in evaluate(split, steps)]


def mean_error(values: list[float]) -> str:
    tensor = torch.tensor(values, dtype=torch.float64)
    error = float(tensor.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{float(tensor.mean()):.3f} ± {error:.3f}"


def table(results: list[tuple[str, str, int, str, float, float, float]]) -> str:
    cells: dict[tuple[str, str], dict[str, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for name, kind, _, row, *values in results:
        cells[name, kind][row.removesuffix(" (!)")].append(tuple(values))
    lines = []
    for (name, kind), rows in cells.items():
        count = len(next(iter(rows.values())))
        lines += [
            "",
            f"## {name}, {kind} splits ({count})",
            "",
            "| | NLL | worst NLL | RMSE | seconds |",
            "|---|---|---|---|---|",
        ]
        for row, values in rows.items():
            nll, error, seconds = (list(column) for column in zip(*values, strict=True))
            lines.append(
                f"| {row} | {mean_error(nll)} | {max(nll):.2f} | {mean_error(error)} "
                f"| {sum(seconds) / len(seconds):.1f} |"
            )
    failed = sum(row.endswith("(!)") for *_, row, _, _, _ in results) // 2
    return "\n".join(
        [*lines, "", f"Fits that did not converge: {failed} of {len(FITS) * len({r[:3] for r in results})}."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="first 5 standard and all gap splits of three small sets")
    parser.add_argument("--sets", nargs="+", default=["concrete", "boston", "wine"])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    try:
        sets = {name: uci(name, arguments.data) for name in arguments.sets}
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        return
    jobs = [
        (name, kind, index, str(arguments.data), arguments.steps)
        for name, data in sets.items()
        for kind, splits in (("standard", data.standard_splits), ("gap", data.gap_splits))
        for index in range(min(5, len(splits)) if arguments.quick and kind == "standard" else len(splits))
    ]
    start, results = time.perf_counter(), []
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (
        multiprocessing.get_context("spawn").Pool(arguments.workers) as pool,
        (arguments.out / "uci.csv").open("w", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["set", "kind", "split", "row", "nll", "rmse", "seconds"])
        for done, rows in enumerate(pool.imap(work, jobs), 1):
            results += rows
            writer.writerows(rows)
            file.flush()
            print(
                f"[{done}/{len(jobs)}] {rows[0][0]} {rows[0][1]} {rows[0][2]}: {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    text = table(results)
    print(text)
    title = "# UCI regression without a validation set\n\nNLL and RMSE in original units, mean ± s.e. over splits."
    (arguments.out / "uci.md").write_text(f"{title}\n{text}\n")


if __name__ == "__main__":
    main()
