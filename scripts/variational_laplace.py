"""Variational Laplace beside MAP and mean-field variational inference: a small softplus network on Fashion-MNIST.

An MLP 784-100-100-10 with softplus is trained from the same initialisation in four ways: MAP; variational Laplace (VL,
Unlu & Aitchison 2021) with its variances by their closed form, and by gradient as in the paper; mean-field VI with one
reparametrised draw of the weights per step (Blundell et al. 2015), predicting with the mean network and with 10 draws.
All have the prior N(0, 1/fan-in) per layer, Adam at 1e-3 (a tenth of it after one half and three quarters of the
epochs, ten times it for log σ), batches of 128, 40 epochs, and log σ from log s - 3 on. VL predicts with the mean
network, as the paper does.

The temperature β multiplies the divergence from the prior (for MAP: the quadratic penalty). It is chosen on held-out
images, for each method and seed; the published table takes the best β on the test set. Each seed draws its own 10,000
training and 5,000 held-out images and its own initialisation; all predict the 10,000 test images.

    python scripts/variational_laplace.py [--quick] [--data FOLDER] [--out docs/results]

FOLDER holds images/fashion_mnist.npz; without it the script says so and stops. What variational_laplace.csv in the
output folder already has is not computed again: an interrupted run goes on when it is called again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import common
from ntkgp.baselines import VariationalLaplace
from ntkgp.evaluation.metrics import accuracy, categorical_nll, expected_calibration_error
from ntkgp.evaluation.plots import COLORS, new_figure
from ntkgp.evaluation.training import seeded

RATE, LOG_STD_RATE, BATCH, DRAWS = 1e-3, 10.0, 128, 10
FITS = ("MAP", "VL", "VL, log σ by gradient", "VI")
METHODS = ("MAP", "VL", "VL, log σ by gradient", "VI, mean network", f"VI, {DRAWS} draws")
SCORES = ("nll", "accuracy", "ece")
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Numbers of images, epochs, and what is repeated."""

    train: int = 10_000
    held_out: int = 5_000
    test: int = 10_000
    width: int = 100
    epochs: int = 40
    betas: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001)
    seeds: int = 3


QUICK = Sizes(train=256, held_out=128, test=128, width=8, epochs=2, betas=(1.0, 0.01), seeds=2)


class Row(NamedTuple):
    """One method, seed and temperature, on one part of the images."""

    seed: int
    beta: float
    method: str
    part: str
    nll: float
    accuracy: float
    ece: float
    seconds: float


class Split(NamedTuple):
    """Images (N, 784), standardised by the training part, and labels."""

    train: Data
    held_out: Data
    test: Data


def split(folder: Path, sizes: Sizes, seed: int) -> Split:
    """The images of one seed."""
    x, y = common.images(folder, "fashion_mnist", "train")
    x_test, y_test = common.images(folder, "fashion_mnist", "test")
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: sizes.train + sizes.held_out]
    own, other = rows.split([sizes.train, sizes.held_out])
    center, scale = x[own].float().mean(), x[own].float().std()

    def part(images: Tensor, labels: Tensor) -> Data:
        return (images.float().flatten(1) - center) / scale, labels

    return Split(part(x[own], y[own]), part(x[other], y[other]), part(x_test[: sizes.test], y_test[: sizes.test]))


def network(sizes: Sizes, seed: int) -> nn.Sequential:
    """The network at its initialisation."""
    with seeded(seed):
        return nn.Sequential(
            nn.Linear(784, sizes.width), nn.Softplus(), nn.Linear(sizes.width, sizes.width), nn.Softplus(),
            nn.Linear(sizes.width, 10),
        )  # fmt: skip


def layer_precisions(net: nn.Sequential) -> Tensor:
    """Precision of the prior of each layer: its fan-in."""
    return torch.tensor([float(layer.in_features) for layer in net if isinstance(layer, nn.Linear)])


def weight_precisions(net: nn.Sequential) -> dict[str, Tensor]:
    """The same, by name of each parameter."""
    linear = {name: layer for name, layer in net.named_children() if isinstance(layer, nn.Linear)}
    return {
        f"{name}.{kind}": torch.tensor(float(layer.in_features))
        for name, layer in linear.items()
        for kind in ("weight", "bias")
    }


class MeanField:
    """Bayes by backprop, a draw of the weights per step; with ``spread=False`` the MAP under the same prior."""

    def __init__(self, net: nn.Sequential, beta: float, epochs: int, spread: bool) -> None:
        self.net, self.beta, self.epochs, self.spread = net, beta, epochs, spread
        self.precision = weight_precisions(net)
        self.mean = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        self.log_std = {
            name: torch.full_like(p, -0.5 * math.log(self.precision[name]) - 3).requires_grad_()
            for name, p in net.named_parameters()
        }

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Weights from q."""
        return {
            name: mean + self.log_std[name].exp() * torch.randn(mean.shape, generator=generator)
            for name, mean in self.mean.items()
        }

    def divergence(self) -> Tensor:
        """KL(q‖p); of MAP the quadratic penalty."""
        total = torch.zeros(())
        for name, mean in self.mean.items():
            precision = self.precision[name]
            total = total + precision * mean.square().sum() / 2
            if self.spread:
                log_std = self.log_std[name]
                total = total + (precision * (2 * log_std).exp() - 1 - precision.log() - 2 * log_std).sum() / 2
        return total

    def fit(self, data: Data, seed: int) -> MeanField:
        """Adam on the mean per point of minus the bound."""
        x, y = data
        parameters: list[dict[str, Any]] = [{"params": list(self.mean.values()), "lr": RATE}]
        if self.spread:
            parameters.append({"params": list(self.log_std.values()), "lr": RATE * LOG_STD_RATE})
        optimizer = torch.optim.Adam(parameters)
        marks = sorted({max(1, self.epochs // 2), max(1, 3 * self.epochs // 4)})
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x), generator=generator).split(BATCH):
                optimizer.zero_grad()
                weights = self.draw(generator) if self.spread else self.mean
                loss = nn.functional.cross_entropy(functional_call(self.net, weights, x[rows]), y[rows])
                (loss + self.beta / len(x) * self.divergence()).backward()
                optimizer.step()
            schedule.step()
        return self

    def at_mean(self, x: Tensor) -> Tensor:
        """Probabilities of the network at the mean weights, (N, C)."""
        with torch.no_grad():
            return functional_call(self.net, self.mean, x).double().softmax(-1)

    def averaged(self, x: Tensor) -> Tensor:
        """Probabilities averaged over draws of the weights, (N, C)."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            parts = [functional_call(self.net, self.draw(generator), x).double().softmax(-1) for _ in range(DRAWS)]
        return torch.stack(parts).mean(0)


def fitted(fit: str, beta: float, seed: int, data: Data, sizes: Sizes) -> dict[str, Callable[[Tensor], Tensor]]:
    """Train once; what predicts, by the method's name."""
    net = network(sizes, seed)
    if fit in ("MAP", "VI"):
        found = MeanField(net, beta, sizes.epochs, spread=fit == "VI").fit(data, seed)
        return (
            {"MAP": found.at_mean}
            if fit == "MAP"
            else {"VI, mean network": found.at_mean, f"VI, {DRAWS} draws": found.averaged}
        )
    model = VariationalLaplace(
        net, "classification", groups="layer", precision=layer_precisions(net), temperature=beta,
        variance="closed_form" if fit == "VL" else "gradient", exact_fisher=False, prediction="network",
        epochs=sizes.epochs, batch_size=BATCH, learning_rate=RATE, log_std_rate=LOG_STD_RATE, seed=seed,
    ).fit(data)  # fmt: skip
    return {fit: lambda x: model.predict(x).probs}  # type: ignore[attr-defined]


def rows_of(fit: str, beta: float, seed: int, images: Split, sizes: Sizes) -> Iterator[Row]:
    """Scores of one training on held-out and test images."""
    start = time.process_time()
    predictors = fitted(fit, beta, seed, images.train, sizes)
    seconds = time.process_time() - start
    for method, predict in predictors.items():
        for part, (x, y) in (("held out", images.held_out), ("test", images.test)):
            p = predict(x)
            scores = (float(score(p, y)) for score in (categorical_nll, accuracy, expected_calibration_error))
            yield Row(seed, beta, method, part, *scores, seconds)


class Report:
    """Tables, figure and verdicts from all rows."""

    def __init__(self, rows: list[Row], sizes: Sizes) -> None:
        self.sizes = sizes
        self.by = {(row.seed, row.beta, row.method, row.part): row for row in rows}
        self.seeds = range(sizes.seeds)

    def values(self, method: str, beta: float, score: str, part: str = "test") -> Tensor:
        """Of all seeds."""
        return torch.tensor([getattr(self.by[s, beta, method, part], score) for s in self.seeds], dtype=torch.float64)

    def best(self, method: str, part: str) -> list[float]:
        """β of the smallest NLL on one part, for each seed."""
        return [min(self.sizes.betas, key=lambda b: self.by[s, b, method, part].nll) for s in self.seeds]

    def chosen(self, method: str, score: str, part: str = "held out") -> Tensor:
        """Test scores of all seeds at the β chosen on `part`."""
        picked = zip(self.seeds, self.best(method, part), strict=True)
        return torch.tensor([getattr(self.by[s, b, method, "test"], score) for s, b in picked], dtype=torch.float64)

    def main_table(self) -> list[str]:
        """β chosen on held-out images."""
        lines = [
            "| | NLL | accuracy | ECE | seconds | β of each seed | NLL at the best β of the test set |",
            "|---|--:|--:|--:|--:|---|--:|",
        ]
        for method in METHODS:
            cells = [cell(self.chosen(method, score), 4) for score in SCORES]
            cells.append(cell(self.chosen(method, "seconds"), 0))
            cells.append(", ".join(f"{b:g}" for b in self.best(method, "held out")))
            cells.append(cell(self.chosen(method, "nll", "test"), 4))
            lines.append(f"| {method} | {' | '.join(cells)} |")
        return lines

    def full_table(self) -> list[str]:
        """Every β."""
        titles = [f"β = {b:g}" for b in self.sizes.betas]
        lines = ["| | " + " | ".join(titles) + " |", "|---|" + "--:|" * len(titles)]
        for method in METHODS:
            cells = [
                " / ".join(f"{float(self.values(method, b, score).mean()):.3f}" for score in SCORES)
                for b in self.sizes.betas
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        return lines

    def difference(self, first: str, second: str, score: str) -> str:
        """Paired over seeds, with a word."""
        change = self.chosen(first, score) - self.chosen(second, score)
        error = float(change.std() / math.sqrt(len(change)))
        mean = float(change.mean())
        word = "not told apart" if abs(mean) <= 2 * error else "better" if mean < 0 else "worse"
        return f"{score.upper()} {mean:+.4f} ± {error:.4f} ({word})"

    def text(self) -> str:
        """The page; the reading is of the full run."""
        quick = " --quick" * (self.sizes == QUICK)
        lines = [
            "# Variational Laplace, MAP and mean-field VI on Fashion-MNIST", "",
            f"Made by `python scripts/variational_laplace.py{quick}`.", "",
            "![NLL and ECE against β](variational_laplace.png)", "",
            *(part.replace("\n", " ") + "\n" for part in (__doc__ or "").split("\n\n")[1:3]),
            f"Mean ± s.e. over {len(self.seeds)} seeds. Seconds are processor time of training on one thread.", "",
            *self.main_table(), "", "## Every β: NLL / accuracy / ECE on the test images", "", *self.full_table(), "",
            "## VL against the others", "",
        ]  # fmt: skip
        for other in METHODS:
            if other != "VL":
                both = "; ".join(self.difference("VL", other, score) for score in ("nll", "ece"))
                lines.append(f"- VL minus {other}, by seeds: {both}.")
        return "\n".join(lines) + "\n"

    def figure(self, path: Path) -> None:
        """NLL and ECE on test images against β."""
        figure, axes = new_figure(1, 2, (9.0, 3.6))
        for ax, (score, title) in zip(axes, (("nll", "test NLL, nats"), ("ece", "test ECE")), strict=True):
            for index, method in enumerate(METHODS):
                values = torch.stack([self.values(method, b, score) for b in self.sizes.betas])
                ax.errorbar(
                    self.sizes.betas, values.mean(1), values.std(1) / math.sqrt(values.shape[1]), color=COLORS[index],
                    marker="osD^v"[index], ms=4, lw=1.4, capsize=2, label=method,
                )  # fmt: skip
            ax.set_xscale("log")
            ax.set_xlabel("β")
            ax.set_ylabel(title)
        lines = axes[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
        figure.savefig(path, dpi=110)


def cell(values: Tensor, digits: int) -> str:
    """Mean ± standard error."""
    return f"{float(values.mean()):.{digits}f} ± {float(values.std()) / math.sqrt(len(values)):.{digits}f}"


def kept(path: Path) -> list[Row]:
    """Rows of an earlier, interrupted run."""
    return [
        Row(int(r["seed"]), float(r["beta"]), r["method"], r["part"], *(float(r[n]) for n in Row._fields[4:]))
        for r in common.read_rows(path)
    ]


def collect(folder: Path, sizes: Sizes, path: Path) -> list[Row]:
    """All rows, as the file has them."""
    rows = kept(path)
    done = {(row.seed, row.beta, row.method.split(", mean")[0].split(f", {DRAWS}")[0]) for row in rows}
    for seed in range(sizes.seeds):
        images = split(folder, sizes, seed)
        for beta in sizes.betas:
            for fit in FITS:
                if (seed, beta, fit) in done:
                    continue
                rows += rows_of(fit, beta, seed, images, sizes)
                common.write_rows(path, [row._asdict() for row in rows])
                last = rows[-1]
                print(f"seed {seed}, β = {beta:g}, {fit}: NLL {last.nll:.4f}, {last.seconds:.0f} s", flush=True)
    return kept(path)


def main() -> None:
    parser = common.parser(__doc__, quick="some hundred images, a tiny network: no result")
    arguments = parser.parse_args()
    if common.absent(arguments.data, "images/fashion_mnist.npz"):
        return
    torch.set_num_threads(1)
    sizes = QUICK if arguments.quick else Sizes()
    page = common.page_of(arguments, "variational_laplace")
    report = Report(collect(arguments.data, sizes, page.with_suffix(".csv")), sizes)
    common.write(page, report.text())
    report.figure(page.with_suffix(".png"))
    print(report.text())


if __name__ == "__main__":
    main()
