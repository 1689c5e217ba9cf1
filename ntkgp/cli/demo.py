"""``ntkgp demo``: three trained networks become Gaussian processes; a table and a figure."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkgp.evaluation import datasets, plots
from ntkgp.evaluation.comparison import Comparison, Method, compare
from ntkgp.evaluation.comparison.methods import GaussianProcess
from ntkgp.evaluation.training import seeded, train
from ntkgp.models import ExactNTKGP

COLUMNS = {
    "regression": ("nll", "rmse", "coverage", "ood_auc", "seconds"),
    "classification": ("nll", "accuracy", "ece", "ood_auc", "seconds"),
}
# Projected gradient of the evidence per row of data, in nats: beyond what the table shows.
_GP: dict[str, Any] = {"inference": "exact", "tolerance": 1e-5}
METHODS = {
    "network alone": Method("network"),
    "single λ at θ̃": Method("gp", groups="single", at="theta_map", **_GP),
    "single λ at θ⋆": Method("gp", groups="single", at="theta_star", **_GP),
    "groups at θ⋆": Method("gp", groups="normalization", at="theta_star", **_GP),
}
CLASSICAL, OURS = "single λ at θ̃", "groups at θ⋆"
_FEATURE_NOISE = 2.0


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
variance or entropy. * best, ° within its standard error of it."""


@dataclass(frozen=True)
class Rows:
    """All methods on one data set, and the models behind them."""

    found: Comparison
    models: dict[str, ExactNTKGP] = field(default_factory=dict)


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


def run_demo(out: Path, seed: int = 0, quick: bool = False) -> list[Comparison]:
    """
    Run the demo, print its tables, and write ``table.txt`` and ``demo.png`` into a folder.

    :param out: folder for the results; made if absent.
    :param seed: of the splits, the networks and their training.
    :param quick: a tenth of the work, for a first look.
    :return: the comparisons on diabetes and on digits.
    """
    sizes = QUICK if quick else FULL
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    toy_data, bands = toy(seed)
    diabetes, digits = regression(seed), classification(seed, sizes)
    comparisons = [diabetes.found, digits.found]
    table = "\n\n".join([*(str(found.table_of(COLUMNS[found.kind])) for found in comparisons), NOTE])
    (out / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n")
    try:
        figure = draw(toy_data, bands, diabetes, digits)
    except ImportError as error:
        print(f"no figure: {error}")
    else:
        figure.savefig(out / "demo.png")
        print(f"figure  {out / 'demo.png'}")
    print(f"table   {out / 'table.txt'}\n{time.perf_counter() - start:.0f} s in all")
    return comparisons


def toy(seed: int) -> tuple[tuple[Tensor, Tensor], dict[str, Bands]]:
    """Bands on the one-dimensional toy for the classical shortcut and for groups at θ⋆."""
    x, y = datasets.toy_gap(60, seed=seed)
    net = dense_network(1, 50, seed)
    train(net, x, y, steps=1000, weight_decay=1e-2, seed=seed)
    grid = torch.linspace(-4.2, 4.2, 361).unsqueeze(-1)
    bands = {}
    for name in (CLASSICAL, OURS):
        _say(f"toy with a gap: {name}")
        process = METHODS[name].build(net, (x, y), {"likelihood": "regression"})
        found = process.predict(grid)
        latent = found.latent  # type: ignore[attr-defined]
        bands[name] = Bands(grid, latent.mean, latent.variance, float((found.variance - latent.variance).mean()))
    return (x, y), bands


def regression(seed: int) -> Rows:
    """All four methods on diabetes, told from inputs with noise of two standard deviations on every feature."""
    data = datasets.diabetes(seed)
    net = dense_network(10, 32, seed)
    train(net, data.x_train, data.y_train, steps=100, weight_decay=1e-2, seed=seed)
    noise = torch.randn(data.x_test.shape, generator=torch.Generator().manual_seed(seed), dtype=data.x_test.dtype)
    return compared(
        net, (data.x_train, data.y_train), (data.x_test, data.y_test), data.x_test + _FEATURE_NOISE * noise,
        name=data.name, target_scale=(data.target_mean, data.target_std),
    )  # fmt: skip


def classification(seed: int, sizes: Sizes) -> Rows:
    """All four methods on digits, told from corrupted images."""
    data = datasets.digits(seed, sizes.train_images)
    x, y = data.x_test[: sizes.test_images], data.labels_test[: sizes.test_images]
    net = digits_network(seed)
    batch_size = min(50, len(data.x_train))
    train(net, data.x_train, data.labels_train, steps=sizes.steps, weight_decay=1.0, batch_size=batch_size, seed=seed)
    corrupted = [datasets.corrupt(x[: sizes.corrupted_images], kind, seed) for kind in datasets.CORRUPTIONS]
    return compared(net, (data.x_train, data.labels_train), (x, y), torch.cat(corrupted), name=data.name)


def compared(net: nn.Module, train_data: Any, test_data: Any, outside: Tensor, *, name: str, **options: Any) -> Rows:
    """All methods on one data set, in this process, so that their evidence can be drawn."""
    models: dict[str, ExactNTKGP] = {}

    def recorded(label: str, method: Method) -> Callable[[nn.Module, Any], Any]:
        def build(net: nn.Module, train_data: Any) -> Any:
            _say(f"{name}: {label}")
            integer = not train_data[1].is_floating_point()
            kind = "classification" if integer else "regression"
            found = method.build(net, train_data, {"likelihood": kind})
            if isinstance(found, GaussianProcess):
                assert isinstance(found.model, ExactNTKGP)
                models[label] = found.model
            return found

        return build

    methods = {label: recorded(label, method) for label, method in METHODS.items()}
    return Rows(compare(net, train_data, test_data, methods, outside, isolate=False, name=name, **options), models)


def draw(toy_data: tuple[Tensor, Tensor], bands: dict[str, Bands], diabetes: Rows, digits: Rows) -> plots.Figure:
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
    edge = bands[OURS].mean.abs() + 2 * bands[OURS].variance.sqrt()
    axes[0].set_ylim(-1.15 * float(edge.max()), 1.7 * float(edge.max()))
    axes[0].legend(loc="upper left", ncols=2, frameon=False, fontsize=8)
    colors = dict(zip(METHODS, plots.COLORS, strict=False))
    diabetes.found.plot_calibration(ax=axes[1], colors=colors)
    digits.found.plot_calibration(ax=axes[2], colors=colors)
    reports = {label: model.report for label, model in digits.models.items()}
    traces = {name: r.trace for name, r in reports.items() if r is not None and r.at == "theta_star"}
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
