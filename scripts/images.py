"""MNIST and Fashion-MNIST with a LeNet, all methods side by side, and what becomes of them under shifts.

Per set a tanh LeNet (44,426 weights: two convolutions with average pooling, three linear layers) is trained by Adam
(2e-3, cosine, decay 1e-4, batches of 128, 15 epochs) on 30,000 random training images; 5,000 more are held out for the
one row with a temperature. All methods but ensemble and dropout share it. They predict the same images: a part of the
test images, of the other set (OOD-AUC: is it told from the test images, by the predictive entropy and by the latent
variance?), rotated ones and those of ten common corruptions in severities 1, 3, 5 (ntkgp.evaluation.shifts).

One prior precision for all weights, by each method's own evidence: at θ⋆ for the GPs and the last layer, at θ̃ where θ⋆
would take passes over the data for every evaluation (KFAC, diagonal, subnetwork). ELLA: 200 landmarks, 128 features;
with residual as the library's default has it. VaLLA: 100 inducing images, λ by the collapsed bound. Exact: the evidence
and the posterior of 200 random images. Subnetwork: the 500 weights of largest variance along 10 epochs of SGD. L2M and
prior only have no evidence and get ELLA's λ; their seconds, and those of ELLA + residual, are without ELLA's fit. VL:
two epochs, λ by its bound, exact Fisher. SWAG: 15 epochs of SGD at 0.01, rank 15. Ensemble: 5 networks. Dropout 0.2
before the last two layers, in a network of its own. Sampled Laplace, SWAG and dropout average 50, 30 and 50 networks;
the others use the probit link.

    python scripts/images.py [--quick] [--data FOLDER] [--out docs/results] [--work FOLDER] [--workers 2]

FOLDER holds images/mnist.npz and images/fashion_mnist.npz; without them the script says so and stops. Networks and
predictions are kept in the work folder: an interrupted run goes on when it is called again.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import common
import ntkgp
from images_data import FILES, QUICK, SEVERITIES, Data, Images, Sizes
from ntkgp.evaluation.comparison import Comparison, Method, Row, compare
from ntkgp.evaluation.comparison.methods import GaussianProcess
from ntkgp.evaluation.comparison.scores import Predicted, Scale, score
from ntkgp.evaluation.plots import COLORS, new_figure
from ntkgp.evaluation.training import seeded
from ntkgp.models.variational import VariationalNTKGP, kmeans_inducing_points

COLUMNS = ("accuracy", "nll", "calibrated_nll", "ece", "brier", "ood_auc", "ood_auc_variance", "seconds")
SHIFTED = ("accuracy", "nll", "ece")
# For glibc's malloc: memory of large tensors is kept for the next ones. Asking the system for fresh, zeroed pages each
# time takes twice as long as the arithmetic on rows of Jacobians.
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**28)}
DRAWN = ("network", "GP θ⋆, ELLA + residual", "Laplace last layer", "Laplace KFAC", "Laplace KFAC, sampled", "VaLLA",
         "deep ensemble", "SWAG", "MC dropout")  # fmt: skip
CLAIMS = (
    ("Linearised beats sampled Laplace, all weights (Immer et al. 2021)", "Laplace KFAC", "Laplace KFAC, sampled"),
    ("Linearised beats sampled Laplace, last layer", "Laplace last layer", "Laplace last layer, sampled"),
    ("All weights (KFAC) beat the last layer", "Laplace KFAC", "Laplace last layer"),
    ("All weights (ELLA + residual) beat the last layer", "GP θ⋆, ELLA + residual", "Laplace last layer"),
)

# Each worker makes them once.
images_of = functools.cache(Images)


def lenet(dropout: float = 0.0) -> nn.Sequential:
    """LeNet-5 as it is usually written today, with the tanh of the original."""
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(256, 120), nn.Tanh(), *drop, nn.Linear(120, 84), nn.Tanh(), *drop, nn.Linear(84, 10),
    )  # fmt: skip


class Trainer:
    """Adam on cross-entropy, cosine schedule."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def __call__(self, net: nn.Module, data: Data) -> nn.Module:
        """Train in place."""
        x, y = data
        steps = self.epochs * math.ceil(len(x) / 128)
        # Adam's coupled decay is the gradient of a Gaussian prior.
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, weight_decay=1e-4, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        net.train()
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
        return net.eval()

    def new(self, data: Data, dropout: float = 0.0, seed: int = 0) -> nn.Module:
        """A network from its initialisation on."""
        with seeded(seed):
            return self(lenet(dropout), data)


class Bench:
    """The methods of one set, in groups that share what they have in common."""

    def __init__(self, images: Images, sizes: Sizes) -> None:
        self.images, self.sizes, self.trainer = images, sizes, Trainer(sizes.epochs)
        self._ella: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """What methods depend on, by which kept rows are found: neither the data, which count anyway, nor the fit."""
        return {"sizes": self.sizes}

    def ella(self, net: nn.Module, data: Data) -> GaussianProcess:
        """Nyström kernel of all data, evidence at θ⋆."""
        if self._ella is None:
            lin = ntkgp.LinearizedNetwork(net, data[0][:8], groups="single")
            self._ella = ntkgp.NystromNTKGP(
                data, ntkgp.CategoricalLikelihood(10), lin, self.sizes.landmarks, 128, landmarks="balanced"
            ).fit(progress=False)
            ntkgp.fit_evidence(self._ella)
        self._ella.residual = False
        return GaussianProcess(self._ella)

    def with_residual(self, net: nn.Module, data: Data) -> GaussianProcess:
        """The same with the variance that the features miss."""
        found = self.ella(net, data)
        found.model.residual = True  # type: ignore[union-attr]
        return found

    def at_its_prior(self, name: str) -> Any:
        """A method without evidence at the precision of ELLA."""

        def build(net: nn.Module, data: Data) -> Any:
            precision = self.ella(net, data).model.kernel.precision.detach().clone()
            shared = {"likelihood": "classification", "groups": "single"}
            return Method(name, precision=precision).build(net, data, shared)

        return build

    def exact(self, net: nn.Module, data: Data) -> GaussianProcess:
        """Exact inference from a random part of the data, which come in random order."""
        rows = slice(self.sizes.exact)
        return GaussianProcess(
            ntkgp.from_network(net, (data[0][rows], data[1][rows]), "classification", "exact", groups="single")
        )

    def valla(self, net: nn.Module, data: Data) -> GaussianProcess:
        """Variational, all data."""
        x, y = data[0][:5000].flatten(1), data[1][:5000]
        points, _ = kmeans_inducing_points(x, self.sizes.inducing, y)
        lin = ntkgp.LinearizedNetwork(net, data[0][:8], groups="single")
        model = VariationalNTKGP(points, ntkgp.CategoricalLikelihood(10), lin, len(data[0]), learn_inducing=False)
        return GaussianProcess(model.fit(data, batch_size=500, evidence="bound", progress=False))

    def dropout(self, net: nn.Module, data: Data) -> Any:
        """MC dropout of a network of its own; its training is part of the fit."""
        own = self.trainer.new(data, 0.2)
        return Method("dropout", net=own, num_samples=50).build(net, data, {"likelihood": "classification"})

    def methods(self, group: str) -> dict[str, Any]:
        """By label, of one group."""
        sampled = {"prediction": "weights", "num_samples": 50}
        groups: dict[str, dict[str, Any]] = {
            "kfac": {"Laplace KFAC": "laplace-kfac"},
            "kfac sampled": {"Laplace KFAC, sampled": Method("laplace-kfac", **sampled)},
            "gp": {
                "GP θ⋆, ELLA": self.ella,
                "GP θ⋆, ELLA + residual": self.with_residual,
                "L2M": self.at_its_prior("l2m"),
                "prior only": self.at_its_prior("prior-only"),
            },
            "valla": {"VaLLA": self.valla},
            "vl": {"VL": Method("vl", epochs=2)},
            "diagonal": {"Laplace diagonal": "laplace-diagonal"},
            "subnetwork": {
                "Laplace subnetwork": Method(
                    "laplace-subnetwork", size=500, score="swag", swag_snapshots=10, evidence="theta"
                )
            },
            "ensemble": {"deep ensemble": Method("ensemble", train=self.trainer, size=5)},
            "exact": {f"GP θ⋆, exact, {self.sizes.exact} images": self.exact},
            "others": {
                "network": "network",
                "network, temperature": Method("network-validated", validation=self.images.held_out),
                "Laplace last layer": "laplace-last-layer",
                "Laplace last layer, sampled": Method("laplace-last-layer", **sampled),
                "SWAG": Method("swag", num_snapshots=15, rank=15, batch_size=128),
                "MC dropout": self.dropout,
            },
        }
        return groups[group]


GROUPS = ("others", "kfac", "gp", "kfac sampled", "diagonal", "valla", "ensemble", "vl", "subnetwork", "exact")
ORDER = (
    "network", "network, temperature", "GP θ⋆, ELLA", "GP θ⋆, ELLA + residual", "GP θ⋆, exact", "VaLLA",
    "Laplace last layer", "Laplace last layer, sampled", "Laplace KFAC", "Laplace KFAC, sampled", "Laplace diagonal",
    "Laplace subnetwork", "L2M", "VL", "deep ensemble", "MC dropout", "SWAG", "prior only",
)  # fmt: skip


def network_of(images: Images, sizes: Sizes, work: Path) -> nn.Module:
    """The trained network, kept in the work folder."""
    path = work / f"{FILES[images.name]}.pt"
    net = lenet().eval()
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    net = Trainer(sizes.epochs).new(images.train)
    with common.replacing(path) as part:
        torch.save(net.state_dict(), part)
    return net


def run(job: tuple[str, str, Sizes, Path, Path]) -> tuple[list[Row], list[Row]]:
    """Train the network (group "") or compare the methods of a group: rows with predictions, and by piece."""
    name, group, sizes, folder, work = job
    torch.set_num_threads(1)
    images = images_of(name, folder, sizes)
    net = network_of(images, sizes, work)
    if not group:
        return [], []
    methods = Bench(images, sizes).methods(group)
    found = compare(
        net, images.train, (images.x, images.y), methods, groups="single", isolate=False, folder=work / "rows",
        name=name,
    )  # fmt: skip
    return found.rows, [part for row in found.rows for part in pieces_of(row, images)]


def pieces_of(row: Row, images: Images) -> Iterator[Row]:
    """The scores of each piece of what a method predicted."""
    if row.predicted is None:
        yield row
        return
    outside = part_of(row.predicted, images.pieces["outside"])
    for name, place in images.pieces.items():
        if name != "outside":
            there = outside if name == images.name else None
            found = score(part_of(row.predicted, place), images.y[place], there, Scale())
            scores, errors = ({key: pair[i] for key, pair in found.items()} for i in (0, 1))
            yield replace(row, data=name, scores=scores, errors=errors, predicted=None)


def part_of(found: Predicted, place: slice) -> Predicted:
    """Predictions of some of the images."""
    return Predicted(
        probabilities=found.probabilities[place],  # type: ignore[index]
        latent=None if found.latent is None else found.latent[place],
    )


class Report:
    """Tables, pictures and words from the rows of all sets.

    :param rows: with predictions.
    :param parts: the scores of each piece.
    """

    def __init__(self, rows: list[Row], parts: list[Row], images: dict[str, Images], sizes: Sizes) -> None:
        self.images, self.sizes = images, sizes
        self.rows = {name: {row.method: row for row in _ordered(rows) if row.data == name} for name in images}
        self.found = Comparison(_ordered(parts), "classification")
        self._by_piece = {(row.method, row.data): row for row in parts}

    def value(self, column: str, method: str, piece: str) -> float:
        """A score of one piece; nan where there is none."""
        row = self._by_piece.get((method, piece))
        return math.nan if row is None else row.value(column)

    def levels(self, name: str) -> dict[str, dict[int, str]]:
        """The piece of each angle and of each severity; the test images are 0 of both."""
        return {
            "rotation, degrees": {0: name} | {a: f"{name} rotated/{a}" for a in self.sizes.angles},
            "severity of corruption": {0: name} | {s: f"{name} corrupted/{s}" for s in SEVERITIES},
        }

    def difference(self, name: str, first: str, second: str, pieces: list[str]) -> tuple[float, float]:
        """NLL of one method minus that of another on pieces of the same images, and its standard error over these."""
        images, both = self.images[name], []
        for piece in pieces:
            place, losses = images.pieces[piece], []
            for method in (first, second):
                predicted = self.rows[name][method].predicted
                assert predicted is not None
                assert predicted.probabilities is not None
                picked = predicted.probabilities[place].gather(-1, images.y[place].unsqueeze(-1)).squeeze(-1)
                losses.append(-picked.clamp_min(1e-300).log())
            both.append(losses[0] - losses[1])
        mean = torch.stack(both).mean(0)
        return float(mean.mean()), float(mean.std() / math.sqrt(len(mean)))

    def claim(self, text: str, first: str, second: str) -> list[str]:
        """What the numbers say of one claim of the literature."""
        lines, verdicts = [], []
        for name in self.rows:
            if any(self.rows[name].get(m) is None or self.rows[name][m].predicted is None for m in (first, second)):
                continue
            levels = self.levels(name)
            turned, changed = ([piece for level, piece in part.items() if level] for part in levels.values())
            for where, pieces in ((name, [name]), (f"{name} rotated", turned), (f"{name} corrupted", changed)):
                mean, error = self.difference(name, first, second, pieces)
                verdicts.append(0 if abs(mean) <= 2 * error else -1 if mean < 0 else 1)
                word = ("better", "not told apart", "worse")[verdicts[-1] + 1]
                lines.append(f"{where} {mean:+.4f} ± {error:.4f} ({word})")
            pairs = [[self.value(c, m, name) for m in (first, second)] for c in ("ood_auc", "ood_auc_variance")]
            lines.append(
                f"OOD-AUC of {name} by entropy {pairs[0][0]:.3f} against {pairs[0][1]:.3f}, by variance "
                f"{pairs[1][0]:.3f} against {pairs[1][1]:.3f}"
            )
        if not verdicts:
            return [f"- **{text}**: a row is missing."]
        counts = {word: verdicts.count(sign) for sign, word in ((-1, "better"), (1, "worse"), (0, "not told apart"))}
        verdict = (
            "confirmed" if counts["better"] == len(verdicts) else "refuted" if counts["worse"] == len(verdicts)
            else "not told apart" if not counts["better"] and not counts["worse"]
            else "confirmed where there is a difference" if not counts["worse"]
            else "refuted where there is a difference" if not counts["better"] else "mixed"
        )  # fmt: skip
        summary = ", ".join(f"{word} in {count}" for word, count in counts.items() if count)
        return [
            f"- **{text}: {verdict}** ({summary} of {len(verdicts)} comparisons by NLL beyond two standard errors).",
            f"  NLL of *{first}* minus that of *{second}*, same images: {'; '.join(lines)}.",
        ]

    def shift_table(self, name: str) -> list[str]:
        """Accuracy / NLL / ECE at some angles and severities."""
        levels = self.levels(name)
        angles, severities = levels.values()
        shown = [a for a in angles if a in (30, 60, 90, 120, 180)]
        titles = [f"{a}°" for a in shown] + [f"severity {s}" for s in SEVERITIES]
        columns = [angles[a] for a in shown] + [severities[s] for s in SEVERITIES]
        lines = ["| method | " + " | ".join(titles) + " |", "|---|" + "--:|" * len(titles)]
        for method in self.rows[name]:
            cells = [" / ".join(f"{self.value(c, method, piece):.3f}" for c in SHIFTED) for piece in columns]
            if not self.rows[name][method].failure:
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
        return lines

    def text(self, seconds: float) -> str:
        """The page."""
        s = self.sizes
        lines = ["# MNIST and Fashion-MNIST: all methods", "",
                 *(part.replace("\n", " ") + "\n" for part in (__doc__ or "").split("\n\n")[1:3]),
                 f"{s.train:,} training, {s.held_out:,} held-out, {s.test:,} test images and {s.other:,} of the other "
                 f"set; {s.rotated} test images at each angle; {s.corrupted} at each severity of each corruption. "
                 "Seconds are those of fit and prediction of all these images on one thread, beside another; the "
                 "network's own training is in none but those of ensemble (four more) and dropout (its own). *NLL, "
                 "temp.* is the NLL after the best temperature of the other half of the images. `*` best, `°` within "
                 f"one standard error of the best. Command: `python scripts/images.py{' --quick' * (s == QUICK)}`.",
                 ""]  # fmt: skip
        for name in self.rows:
            part = Comparison([row for row in self.found.rows if row.data == name], "classification")
            lines += [f"## {name}", "", part.table_of(COLUMNS).to_markdown(), ""]
            lines += [f"### {name}, shifted: accuracy / NLL / ECE", "", *self.shift_table(name), ""]
        lines += ["## What the literature says, and these numbers", ""]
        for claim in CLAIMS:
            lines += self.claim(*claim)
        failures = {(row.method, name): row.failure for name, each in self.rows.items() for row in each.values()}
        listed = [f"- {method}, {data}: {why}" for (method, data), why in failures.items() if why]
        lines += ["", "## Failures", "", *(listed or ["none"]), "", f"This run: {seconds / 60:.0f} minutes."]
        return "\n".join(lines) + "\n"

    def figure(self) -> Any:
        """Accuracy, NLL and ECE against angle and severity, a row of panels for each set."""
        figure, axes = new_figure(2 * len(self.rows), 3, (13.0, 6.2 * len(self.rows)))
        panels = iter(axes)
        for name, each in self.rows.items():
            for title, levels in self.levels(name).items():
                for column in SHIFTED:
                    ax = next(panels)
                    for index, method in enumerate(DRAWN):
                        if method not in each or each[method].failure:
                            continue
                        values = [self.value(column, method, piece) for piece in levels.values()]
                        style = "-" if index < len(COLORS) else "--"
                        ax.plot(list(levels), values, style, color=COLORS[index % len(COLORS)], marker="o", ms=3,
                                lw=1.3, label=method)  # fmt: skip
                    if column == "nll":
                        ax.set_yscale("log")
                    ax.set_title(f"{name}: {column.upper() if column != 'accuracy' else column}", loc="left")
                    ax.set_xlabel(title)
        lines = {line.get_label(): line for ax in axes for line in ax.get_lines()}
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        return figure


def _ordered(rows: list[Row]) -> list[Row]:
    """In the order of the table."""

    def place(row: Row) -> int:
        return max((len(name), i) for i, name in enumerate(ORDER) if row.method.startswith(name))[1]

    return sorted(rows, key=place)


def main() -> None:
    parser = common.parser(__doc__, quick="a fiftieth of the images: some minutes, and no result")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ntkgp-images")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if common.absent(arguments.data, *(f"images/{name}.npz" for name in FILES.values())):
        return
    sizes = QUICK if arguments.quick else Sizes()
    work = arguments.work / common.digest(sizes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    shared = (sizes, arguments.data, work)
    start = time.perf_counter()
    os.environ.update({name: value for name, value in KEEPING.items() if name not in os.environ})
    rows: list[Row] = []
    parts: list[Row] = []
    images = {name: Images(name, arguments.data, sizes) for name in FILES}
    page = common.page_of(arguments, "images")
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        pool.map(run, [(name, "", *shared) for name in FILES], chunksize=1)
        jobs = [(name, group, *shared) for group in GROUPS for name in FILES]
        for count, (found, split) in enumerate(pool.imap_unordered(run, jobs), 1):
            rows, parts = rows + found, parts + split
            seconds = time.perf_counter() - start
            names = ", ".join(f"{row.method} ({row.seconds:.0f} s)" for row in found)
            print(f"[{count}/{len(jobs)}] {found[0].data}: {names}: {seconds:.0f} s", flush=True)
            report = Report(rows, parts, images, sizes)
            report.found.to_csv(page.with_suffix(".csv"))
            common.write(page, report.text(seconds))
        # Workers that end by themselves leave no locks behind.
        pool.close()
        pool.join()
    report.figure().savefig(page.with_suffix(".png"), dpi=110)
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
