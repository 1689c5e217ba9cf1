"""The one-pass evidence: time and memory linear in N, and a real case of 100 000 rows.

Synthetic regression with a 2×50 tanh network, one precision per parameter tensor (G = 6) and M = 128 landmarks: one
pass over N = 10⁵ … 10⁶ rows, each in a process of its own, then the evidence of all precisions and noise without data.
Then flight delays (nycflights13, 80 000 training rows): NLL and CRPS of the network alone and of its Gaussian process.

    python scripts/one_pass.py [--quick] [--data FOLDER] [--out docs/results] [--threads 1]

FOLDER holds misc/nycflights13_airline100k.npz; without it that part is skipped.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import torch
from torch import Tensor, nn

import common
import ntkgp
from ntkgp.evaluation.metrics import gaussian_crps, gaussian_nll, original_units, rmse
from ntkgp.evaluation.plots import new_figure
from ntkgp.evaluation.training import seeded, train
from ntkgp.evidence import one_pass

LANDMARKS = 128
WIDTH = 8


def network(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))


def synthetic(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, WIDTH, generator=generator)
    y = torch.sin(2 * x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.2 * torch.randn(rows, generator=generator)
    return x, y


def peak_memory() -> float:
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def stream(job: tuple[int, str, int]) -> dict[str, Any]:
    """One pass over so many rows with products in a dtype; the network is the same whatever the number."""
    rows, dtype, threads = job
    torch.set_num_threads(threads)
    x, y = synthetic(rows)
    with seeded(0):
        net = network(WIDTH)
    train(net, *synthetic(20_000), steps=2000, learning_rate=1e-2, batch_size=500)
    lin = ntkgp.LinearizedNetwork(net, x[:8], groups="tensor")
    start, processor = time.perf_counter(), time.process_time()
    found = one_pass(
        lin, (x, y), gpytorch.likelihoods.GaussianLikelihood(), num_landmarks=LANDMARKS, dtype=getattr(torch, dtype)
    )
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    report = ntkgp.fit_evidence(found)
    return {
        "N": rows,
        "products": dtype,
        "features": found.features.size,
        "pass": seconds,
        "processor": processor,
        "fit": report.seconds,
        "evaluations": report.evaluations,
        "memory": peak_memory(),
        "evidence": report.log_evidence / rows,
        "low": report.evidence_bounds[0] / rows,
        "high": report.evidence_bounds[1] / rows,
        "noise": float(report.noise),
        "converged": report.converged,
        "precision": report.precision.tolist(),
        "groups": list(report.group_names),
        "dimension": report.effective_dimension.tolist(),
    }


def scaling(sizes: list[int], threads: int) -> list[dict[str, Any]]:
    jobs = [(size, "float64", threads) for size in sizes] + [(sizes[0], "float32", threads)]
    results = []
    for job in jobs:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(stream, (job,)))
        print(f"N = {job[0]:,} {job[1]}: pass {results[-1]['pass']:.1f} s, {results[-1]['memory']:.0f} MiB", flush=True)
    return results


def scaling_table(results: list[dict[str, Any]], threads: int) -> tuple[str, np.ndarray]:
    """The table, and slope and intercept of the seconds of a pass."""
    lines = [
        f"Synthetic regression, 8-50-50-1, G = 6, M = {LANDMARKS} ({results[0]['features']} features after the basis "
        f"change), {threads} thread(s).",
        "",
        "| N | products | pass, s | of them busy | rows/s busy | fit, s (evaluations) | peak MiB | bound / N "
        "| exact / N between | noise |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['N']:,} | {r['products']} | {r['pass']:.1f} | {r['processor']:.1f} | {r['N'] / r['processor']:,.0f} "
            f"| {r['fit']:.2f} ({r['evaluations']}{'' if r['converged'] else ', not converged'}) | {r['memory']:.0f} "
            f"| {r['evidence']:.6f} | {r['low']:.6f} … {r['high']:.6f} | {r['noise']:.5f} |"
        )
    doubles = [r for r in results if r["products"] == "float64"]
    line = np.polyfit([r["N"] for r in doubles], [r["processor"] for r in doubles], 1)
    whole = doubles[-1]
    lines += [
        "",
        f"Busy seconds (processor time of the pass; the machine was shared) ≈ {line[1]:.2f} + "
        f"{line[0] * 1e6:.1f}·(N/10⁶): 10⁷ rows would take {(line[0] * 1e7 + line[1]) / 60:.1f} minutes and, streamed "
        "from a DataLoader, no more memory.",
        "",
        f"At N = {whole['N']:,}: "
        + ", ".join(
            f"{name} λ {precision:.3g} (γ {dimension:.1f})"
            for name, precision, dimension in zip(whole["groups"], whole["precision"], whole["dimension"], strict=True)
        )
        + ".",
    ]
    return "\n".join(lines), line


def flights(folder: Path, threads: int) -> str | None:
    path = folder / "misc" / "nycflights13_airline100k.npz"
    if not path.is_file():
        print(f"skipped: no {path}")
        return None
    torch.set_num_threads(threads)
    arrays = np.load(path)
    x, y = torch.from_numpy(arrays["X"]).float(), torch.from_numpy(arrays["y"]).double()
    first, second = int(arrays["n_train"]), int(arrays["n_train"]) + int(arrays["n_val"])
    mean, std = x[:first].mean(0), x[:first].std(0)
    centre, scale = y[:first].mean(), y[:first].std()
    x, target = (x - mean) / std, ((y - centre) / scale).float()
    start = time.perf_counter()
    with seeded(0):
        net = network(x.shape[1])
    train(net, x[:first], target[:first, None], steps=4000, learning_rate=3e-3, weight_decay=1e-4, batch_size=500)
    seconds = time.perf_counter() - start
    test, observed = x[second:], y[second:]
    with torch.no_grad():
        prediction = net(x).squeeze(-1).double()
    errors = (prediction - target.double()).square()
    rows = []

    def score(name: str, mean: Tensor, variance: Tensor, spent: float) -> None:
        mean, variance = original_units(mean, variance, centre, scale)
        values = (
            gaussian_nll(mean, variance, observed),
            gaussian_crps(mean, variance, observed),
            rmse(mean, observed),
            variance.sqrt().mean(),
        )
        rows.append(f"| {name} | " + " | ".join(f"{float(value):.4f}" for value in values) + f" | {spent:.1f} |")

    ones = torch.ones_like(observed)
    score("network, σ of the training residuals", prediction[second:], errors[:first].mean() * ones, seconds)
    score("network, σ of the validation residuals", prediction[second:], errors[first:second].mean() * ones, seconds)
    for groups in ("single", "tensor"):
        lin = ntkgp.LinearizedNetwork(net, x[:8], groups=groups)
        start = time.perf_counter()
        found = one_pass(
            lin, (x[:first], target[:first]), gpytorch.likelihoods.GaussianLikelihood(), num_landmarks=LANDMARKS
        )
        report = ntkgp.fit_evidence(found)
        spent = time.perf_counter() - start
        for residual in (False, True):
            for reported in ("network", "posterior"):
                model = found.model(residual=residual, mean=reported)
                with torch.no_grad():
                    predictive = model.likelihood(model(test))
                name = f"{'SGPR marginals' if residual else 'ELLA'}, λ per {'net' if groups == 'single' else 'tensor'}"
                score(f"{name}, mean {reported}", predictive.mean, predictive.variance, spent)
        print(report)
    return "\n".join(
        [
            f"Flight delays in minutes: nycflights13, {first:,} training and {len(test):,} test rows, 2×50 tanh net "
            f"({seconds:.1f} s of training, part of the network's seconds), M = {LANDMARKS}.",
            "",
            "| | NLL | CRPS | RMSE | mean sd | seconds |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )


def figure(results: list[dict[str, Any]], line: np.ndarray, path: Path) -> None:
    doubles = [r for r in results if r["products"] == "float64"]
    sizes = np.array([r["N"] for r in doubles])
    fig, (left, right) = new_figure(1, 2, (9.0, 3.6))
    grid = np.array([sizes[0], 1e7])
    left.loglog(sizes, [r["processor"] for r in doubles], "o", label="measured")
    left.loglog(grid, np.polyval(line, grid), "--", label="linear fit, to 10⁷")
    left.set_xlabel("rows N")
    left.set_ylabel("processor seconds of the pass")
    left.legend()
    right.fill_between(
        sizes, [r["low"] for r in doubles], [r["high"] for r in doubles], alpha=0.3, label="exact, between"
    )
    right.plot(sizes, [r["evidence"] for r in doubles], "o-", label="maximised bound")
    right.set_xscale("log")
    right.set_xlabel("rows N")
    right.set_ylabel("log evidence per row, nats")
    right.legend()
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = common.parser(__doc__, quick="a few thousand rows: no result")
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e5, 2e5, 5e5, 1e6])
    parser.add_argument("--threads", type=int, default=1)
    arguments = common.parse(parser, sizes=[2000.0, 4000.0])
    results = scaling([int(size) for size in arguments.sizes], arguments.threads)
    text, line = scaling_table(results, arguments.threads)
    real = flights(arguments.data, arguments.threads)
    text = "\n\n".join(["# The one-pass evidence", text, *([real] if real else [])])
    page = common.page_of(arguments, "one_pass")
    common.write(page, text)
    figure(results, line, page.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
