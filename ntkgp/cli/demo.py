"""``ntkgp demo``: three trained networks become Gaussian processes; a table and a figure."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ntkgp.cli.comparison import (
    METHODS,
    ClassificationResult,
    RegressionResult,
    Row,
    classification_row,
    format_rows,
    gaussian_model,
    latent_moments,
    regression_row,
)
from ntkgp.evaluation import datasets, plots
from ntkgp.evaluation.training import seeded, train


@dataclass(frozen=True)
class Sizes:
    """How much work the demo does."""

    train_images: int
    test_images: int
    corrupted_images: int
    steps: int


FULL = Sizes(train_images=250, test_images=500, corrupted_images=100, steps=400)
QUICK = Sizes(train_images=60, test_images=100, corrupted_images=25, steps=150)


NOTE = """\
network alone: Gaussian with the training residual as variance, or softmax. Other rows: GP around the network's
output, precisions and noise from the evidence. OOD-AUC: corrupted against clean test inputs, by predictive
variance or entropy."""


@dataclass(frozen=True)
class Bands:
    """Posterior of one method on the toy: points, mean, latent variance and noise variance."""

    x: Tensor
    mean: Tensor
    variance: Tensor
    noise: float


def dense_network(inputs: int, width: int, seed: int) -> nn.Module:
    """MLP with two hidden layers, BatchNorm before each tanh, one output."""
    with seeded(seed):
        return nn.Sequential(
            nn.Linear(inputs, width),
            nn.BatchNorm1d(width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.Tanh(),
            nn.Linear(width, 1),
        )


def digits_network(seed: int) -> nn.Module:
    """Two convolutions with BatchNorm on 8 × 8 images, max pooling after each, a dense layer to ten classes."""
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def run_demo(out: Path, seed: int = 0, quick: bool = False) -> list[Row]:
    """
    Run the demo, print its table, and write ``table.txt`` and ``demo.png`` into a folder.

    :param out: folder for the results; made if absent.
    :param seed: of the splits, the networks and their training.
    :param quick: a tenth of the work, for a first look.
    :return: the rows of the table.
    """
    sizes = QUICK if quick else FULL
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    toy_data, bands = toy(seed, sizes)
    diabetes = regression(seed, sizes)
    digits_data, digits = classification(seed, sizes)
    rows = [*(result.row for result in diabetes[1]), *(result.row for result in digits)]
    table = f"{format_rows(rows)}\n\n{NOTE}"
    (out / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n")
    try:
        figure = draw(toy_data, bands, diabetes, digits_data, digits)
    except ImportError as error:
        print(f"no figure: {error}")
    else:
        figure.savefig(out / "demo.png")
        print(f"figure  {out / 'demo.png'}")
    print(f"table   {out / 'table.txt'}\n{time.perf_counter() - start:.0f} s in all")
    return rows


def toy(seed: int, sizes: Sizes) -> tuple[tuple[Tensor, Tensor], dict[str, Bands]]:
    """Bands on the one-dimensional toy for the classical shortcut and for groups at θ⋆."""
    x, y = datasets.toy_gap(60, seed=seed)
    net = dense_network(1, 50, seed)
    train(net, x, y, steps=1000, weight_decay=1e-2, seed=seed)
    grid = torch.linspace(-4.2, 4.2, 361).unsqueeze(-1)
    bands = {}
    for method in (METHODS[1], METHODS[3]):
        _say(f"toy with a gap: {method.name}")
        model, _ = gaussian_model(net, x, y, method)
        mean, variance = latent_moments(model, grid)
        bands[method.name] = Bands(grid, mean, variance, float(model.likelihood.noise.detach()))
    return (x, y), bands


def regression(seed: int, sizes: Sizes) -> tuple[datasets.RegressionData, list[RegressionResult]]:
    """All four methods on diabetes."""
    data = datasets.diabetes(seed)
    net = dense_network(10, 32, seed)
    train(net, data.x_train, data.y_train, steps=100, weight_decay=1e-2, seed=seed)
    results = []
    for method in METHODS:
        _say(f"diabetes: {method.name}")
        results.append(regression_row(net, data, method, seed))
    return data, results


def classification(seed: int, sizes: Sizes) -> tuple[datasets.ClassificationData, list[ClassificationResult]]:
    """All four methods on digits."""
    data = datasets.digits(seed, sizes.train_images)
    test = slice(sizes.test_images)
    data = datasets.ClassificationData(
        data.name, data.x_train, data.labels_train, data.x_test[test], data.labels_test[test], data.num_classes
    )
    net = digits_network(seed)
    batch_size = min(50, len(data.x_train))
    train(net, data.x_train, data.labels_train, steps=sizes.steps, weight_decay=1.0, batch_size=batch_size, seed=seed)
    results = []
    for method in METHODS:
        _say(f"digits: {method.name}")
        results.append(classification_row(net, data, method, sizes.corrupted_images, seed))
    return data, results


def draw(
    toy_data: tuple[Tensor, Tensor],
    bands: dict[str, Bands],
    diabetes: tuple[datasets.RegressionData, list[RegressionResult]],
    digits_data: datasets.ClassificationData,
    digits: list[ClassificationResult],
) -> plots.Figure:
    """Four panels: bands on the toy, coverage on diabetes, reliability and evidence on digits."""
    figure, axes = plots.new_figure(2, 2)
    for index, (name, band) in enumerate(bands.items()):
        last = index == len(bands) - 1
        plots.predictive_bands(
            band.x,
            band.mean,
            band.variance,
            data=toy_data if last else None,
            truth=datasets.toy_gap_function(band.x) if last else None,
            label=f"{name}, ± 2 sd",
            color=plots.COLORS[3 if last else 1],
            ax=axes[0],
        )
    # The classical bands are several times wider than everything else and may leave the panel.
    edge = bands[METHODS[3].name].mean.abs() + 2 * bands[METHODS[3].name].variance.sqrt()
    axes[0].set_ylim(-1.15 * float(edge.max()), 1.7 * float(edge.max()))
    axes[0].legend(loc="upper left", ncols=2, frameon=False, fontsize=8)
    colors = {method.name: color for method, color in zip(METHODS, plots.COLORS, strict=False)}
    data, results = diabetes
    target = data.y_test.double() * data.target_std + data.target_mean
    intervals = {result.row.method: (result.mean, result.variance) for result in results}
    plots.coverage_curve(intervals, target, colors=colors, ax=axes[1])
    probabilities = {result.row.method: result.probabilities for result in digits}
    plots.reliability_diagram(probabilities, digits_data.labels_test, colors=colors, ax=axes[2])
    traces = {r.row.method: r.report.trace for r in digits if r.report is not None and r.report.at == "theta_star"}
    plots.evidence_trace(traces, colors=colors, ax=axes[3])
    titles = (
        "Toy: network 1-50-50-1 with BatchNorm",
        "Diabetes: coverage of test intervals",
        "Digits: reliability on test images",
        "Digits: evidence",
    )
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left", fontsize=10)
    return figure


def _say(text: str) -> None:
    """Progress, on the error stream so that the table can be piped."""
    print(text, file=sys.stderr, flush=True)
