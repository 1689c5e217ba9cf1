"""Exact inference in weight space on tens of thousands of points: protein and kin40k with 2×50 tanh networks.

A network is trained on the training part of the first published split. The Gaussian process sees the same data through
a DataLoader, once; precisions and noise come from the evidence alone. Rows: the network with the variance of its
training residuals, and {one λ, one λ per layer} × {mean = the network's output, mean = the posterior's}. NLL and RMSE
are in original units; the last column is the share of test targets inside the central 95 % interval.

    python scripts/streamed.py [--quick] [--data FOLDER] [--out docs/results] [--sets protein te_kin40k]

FOLDER holds uci/<name>.npz with the published splits; without it the script says so and stops.
"""

from __future__ import annotations

import time

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import common
import ntkgp
from ntkgp.evaluation.datasets import RegressionData, uci
from ntkgp.evaluation.metrics import coverage, gaussian_nll, original_units, rmse
from ntkgp.evaluation.training import seeded, train

GROUPS = {"single": "single λ", "layer": "λ per layer"}
TIMES = ("train", "pass", "evidence", "cpu", "predict")


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))


def scores(mean: Tensor, variance: Tensor, data: RegressionData) -> tuple[float, float, float]:
    mean, variance = original_units(mean.flatten(), variance.flatten(), data.target_mean, data.target_std)
    target = data.y_test.flatten().double() * data.target_std + data.target_mean
    return (
        float(gaussian_nll(mean, variance, target)),
        float(rmse(mean, target)),
        float(coverage(mean, variance, target).fraction),
    )


def evaluate(data: RegressionData, steps: int, max_memory: str) -> list[dict[str, object]]:
    """One dict per row of the table."""
    x, y = data.x_train, data.y_train.reshape(-1, 1)
    start = time.perf_counter()
    with seeded(0):
        net = network(x.shape[-1])
    train(net, x, y, steps=steps, learning_rate=1e-2, weight_decay=1e-4, batch_size=min(1024, len(x)))
    trained = time.perf_counter() - start
    with torch.no_grad():
        prediction, error = net(data.x_test), (net(x) - y).square().mean()
    size = sum(p.numel() for p in net.parameters())
    base = {"set": data.name, "N": len(x), "P": size, "train": trained}
    alone = scores(prediction, error.expand(len(prediction)), data)
    rows: list[dict[str, object]] = [
        {**base, "row": "network alone", "nll": alone[0], "rmse": alone[1], "cover": alone[2]}
    ]
    for groups, name in GROUPS.items():
        loader = DataLoader(TensorDataset(x, y), batch_size=4096, shuffle=True)
        lin = ntkgp.LinearizedNetwork(net, x[:8], groups=groups)
        likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-8))
        start, used = time.perf_counter(), time.process_time()
        model = ntkgp.ExactNTKGP(loader, None, likelihood, lin, max_memory=max_memory).eval()
        model.evidence_problem()
        passed = time.perf_counter() - start
        report = ntkgp.fit_evidence(model)
        fitted, used = time.perf_counter() - start - passed, time.process_time() - used
        print(report, flush=True)
        for mean in ("network", "posterior"):
            model.mean = mean
            start = time.perf_counter()
            with torch.no_grad():
                predictive = model.likelihood(model(data.x_test))
                found = scores(predictive.mean, predictive.variance, data)
            seconds = {"pass": passed, "evidence": fitted, "cpu": used, "predict": time.perf_counter() - start}
            of_report = {key: getattr(report, key) for key in ("log_evidence", "evaluations", "converged")}
            values = dict(zip(("nll", "rmse", "cover"), found, strict=True))
            rows.append({**base, "row": f"{name}, mean {mean}", **seconds, **of_report, **values})
            print(rows[-1], flush=True)
    return rows


def cell(row: dict[str, object], name: str, digits: int) -> str:
    value = row.get(name)
    return f"{value:,.{digits}f}" if isinstance(value, float) else "" if value is None else f"{value:,}"


def table(rows: list[dict[str, object]]) -> str:
    lines: list[str] = []
    for name in dict.fromkeys(row["set"] for row in rows):
        chosen = [row for row in rows if row["set"] == name]
        first = chosen[0]
        lines += [
            "", f"## {name}: N = {first['N']:,}, P = {first['P']:,}", "",
            "| | log evidence | evals | train s | pass s | evidence s | both CPU s | predict s | NLL | RMSE | in 95% |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in chosen:
            cells = [cell(row, "log_evidence", 1), cell(row, "evaluations", 0), *(cell(row, key, 1) for key in TIMES)]
            cells += [cell(row, "nll", 3), cell(row, "rmse", 3), cell(row, "cover", 3)]
            mark = " (!)" if row.get("converged") is False else ""
            lines.append(f"| {row['row']}{mark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__, quick="one small set, a few steps: no result")
    parser.add_argument("--sets", nargs="+", default=["protein", "te_kin40k"])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--max-memory", default="4GiB")
    arguments = common.parse(parser, sets=["te_autompg"], steps=50)
    try:
        sets = [uci(name, arguments.data) for name in arguments.sets]
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        return
    rows = [row for data in sets for row in evaluate(data.standard(0), arguments.steps, arguments.max_memory)]
    text = table(rows)
    print(text)
    page = common.page_of(arguments, "streamed")
    common.write_rows(page.with_suffix(".csv"), rows)
    threads = f"Float32 networks, {torch.get_num_threads()} thread(s)."
    common.write(page, f"# Exact inference in weight space, streamed\n\n{threads}\n{text}")


if __name__ == "__main__":
    main()
