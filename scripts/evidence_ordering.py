"""Precisions chosen by the evidence at θ⋆ and at θ̃, one or many, on six networks of about 46,000 weights.

Antorán et al. (2022, Table 1) report test negative log-likelihoods of linearised Laplace on six architectures: with the
evidence at θ⋆ those of classifiers are up to fifteen times smaller than at the trained weights θ̃; many precisions are
at least as good as a single one on normalised networks, and worse on the FixUp network. Their networks are not
described in what we could read, and we found no code. This is a stand-in on one CPU core: the same kinds of network
(scripts/nets46k.py) with few images. Numbers cannot be compared with theirs, orderings can.

Classifiers: a CNN and a FixUp ResNet without normalisation, a ResNet and a pre-activation ResNet with BatchNorm, a
transformer encoder with LayerNorm. Each is trained on 100 random images of MNIST or of scikit-learn's digits (AdamW,
400 batches of 50, learning rate 3e-3 with a cosine schedule, decay 1); the seed draws images and initial weights. All
inference is exact, with those 100 images. Rows: the evidence at θ⋆ or at θ̃, with a single precision or with many: one
per normalised group and one for the rest, or one per layer (module that owns weights) where nothing is normalised.
Predictions at 300 random test images: probit around the network's own logits, which is the library's default; the
column *NLL, mean h(θ⋆)* has the mode of the tangent model as mean instead. *NLL, temp.* is after the best temperature
of the other half of the test images. The CNN and the pre-activation ResNet are repeated with 50 digits, in
batches of 25, and with 200.

U-Net with GroupNorm and a sigmoid: the deep image prior of KMNIST glyphs, one of each of five classes, from 10 views
with 5 % noise, as in scripts/ct_kmnist.py; its score is the negative log-likelihood per pixel of the joint Gaussian
with 1e-4 added to all variances. Seeds are glyphs.

Nothing was chosen by test scores. The learning rate 3e-3 was preferred to 1e-2 because the transformer's *training*
loss does not fall with the latter; the numbers of images were chosen by running time, in trials on another seed. An
ordering "holds" where the mean of the paired differences over seeds is beyond two of its standard errors, is "reversed"
on the other side, and is "not told apart" between.

    python scripts/evidence_ordering.py [--quick] [--seeds 5] [--nets ...] [--data FOLDER] [--out docs/results]
        [--report]

FOLDER holds images/mnist.npz and ct/kmnist_glyphs.npz; what is missing is left out, and said. Seeds that
evidence_ordering.csv in the output folder already has are not computed again: an interrupted run goes on when it is
called again; all takes some 30 minutes of one core. --report writes page and picture of what is there. What people
wrote under "Reading" stays.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpytorch.constraints import Positive
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.likelihoods import GaussianLikelihood
from linear_operator.operators import DiagLinearOperator
from torch import Tensor, nn

import common
import ntkgp
from ct_kmnist import GLYPHS, measured
from nets46k import CLASSES, NETS, NORMALISED, UNET, network
from ntkgp.evaluation.comparison.scores import Predicted, Scale, score
from ntkgp.evaluation.datasets import digits
from ntkgp.evaluation.metrics.images import score_image
from ntkgp.evaluation.plots import COLORS, new_figure
from ntkgp.evaluation.training import train
from ntkgp.evidence import EvidenceReport, SoftmaxEvidence, dual_mode, fit_problem
from ntkgp.inverse import DeepImagePrior
from ntkgp.likelihoods import curvature_factor

ANGLES, FLOOR, TOLERANCE = 10, 1e-4, 1e-5
# What becomes of it with fewer and with more images, of two of the networks, in three seeds.
TREND = {"digits, 50 images": 50, "digits, 200 images": 200}
TREND_NETS, TREND_SEEDS = ("CNN", "pre-ResNet"), 3
AT = {"θ̃": "theta_map", "θ⋆": "theta_star"}
METHODS = tuple(f"{kind} {at}" for kind in ("single", "many") for at in AT)
ALONE = "network alone"
ORDERINGS = (
    ("θ⋆ better than θ̃, single λ", "single θ⋆", "single θ̃"),
    ("θ⋆ better than θ̃, many λ", "many θ⋆", "many θ̃"),
    ("many better than single, θ⋆", "many θ⋆", "single θ⋆"),
    ("many better than single, θ̃", "many θ̃", "single θ̃"),
    ("many at θ⋆ better than the network alone", "many θ⋆", ALONE),
)
Row = dict[str, Any]
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much work."""

    train: int = 100
    test: int = 300
    steps: int = 400
    iterations: int = 20_000


QUICK = Sizes(train=12, test=20, steps=20, iterations=20)


def images(data: str, folder: Path, seed: int, sizes: Sizes) -> tuple[Data, Data]:
    """Random training and test images with their labels."""
    if data != "MNIST":
        found = digits(seed, sizes.train)
        return (found.x_train, found.labels_train), (found.x_test[: sizes.test], found.labels_test[: sizes.test])
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for kind, count in (("train", sizes.train), ("test", sizes.test)):
        x, labels = common.images(folder, "mnist", kind)
        rows = torch.randperm(len(labels), generator=generator)[:count]
        parts.append((x[rows].float().unsqueeze(1) / 255, labels[rows]))
    return parts[0], parts[1]


class Posteriors:
    r"""All that the posteriors of one network share: Grams per group, of the training images and with the test images.

    For precisions Λ the latent covariance at a test image is
    :math:`\sum_g K_g(x, x)/\lambda_g - K(x, X) S (I + S^\top K S)^{-1} S^\top K(X, x)`, what ``model(x)`` has, from one
    pass over the test images for all Λ.
    """

    def __init__(self, net: nn.Module, groups: str, data: Data, x: Tensor) -> None:
        self.lin = ntkgp.LinearizedNetwork(net, data[0][:8], groups=groups)
        self.likelihood = ntkgp.CategoricalLikelihood(CLASSES)
        problem = ntkgp.ExactNTKGP(*data, self.likelihood, self.lin).evidence_problem()
        assert isinstance(problem, SoftmaxEvidence)
        self.problem = problem
        self.grams = self.lin.grams(data[0])
        self.cross = self.lin.grams(x, data[0])
        self.own = self.lin.gram_diagonals(x).diagonal(dim1=-2, dim2=-1)  # shape: (G, T, C)
        self.network = self.lin(x).double()
        self.offset = self.network - self.lin.jvp(x, self.lin.theta).double()

    def single(self) -> SoftmaxEvidence:
        """The same problem with one precision for all weights."""
        old = self.problem
        assert old.tangent_theta is not None
        assert old.theta_norms is not None
        return replace(
            old, grams=self.grams.sum(0, keepdim=True), tangent_theta=old.tangent_theta.sum(0, keepdim=True),
            theta_norms=old.theta_norms.sum(0, keepdim=True), group_names=("all",), group_sizes=(sum(old.group_sizes),),
        )  # fmt: skip

    def predict(self, precision: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities around the network's logits and around those of θ⋆, for precisions of all groups (G,)."""
        prior = precision.reciprocal()
        gram, cross = (torch.tensordot(prior, grams, 1) for grams in (self.grams, self.cross))
        factor = curvature_factor(self.problem.logits)  # shape: (N, C, R)

        def reduced(rows: Tensor) -> Tensor:
            return torch.einsum("mnc,ncr->mnr", rows.unflatten(-1, (-1, CLASSES)), factor).flatten(1)

        inner = reduced(reduced(gram).mT)
        inner.diagonal().add_(1.0)
        root = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), reduced(cross).mT, upper=False)
        explained = root.square().sum(0).reshape_as(self.network)
        variance = (torch.tensordot(prior, self.own, 1) - explained).clamp_min(0)
        alpha = dual_mode(gram, self.problem.offset, self.problem.labels).alpha
        mode = self.offset + (cross @ alpha).reshape_as(self.offset)
        first, second = (
            self.likelihood(MultitaskMultivariateNormal(mean, DiagLinearOperator(variance.flatten()))).probs
            for mean in (self.network, mode)
        )
        return first, second


def scored(probabilities: Tensor, labels: Tensor) -> Row:
    """Scores of predicted probabilities."""
    found = score(Predicted(probabilities=probabilities), labels, None, Scale())
    return {name: found[name][0] for name in ("nll", "calibrated_nll", "accuracy", "ece")}


def found_by(report: EvidenceReport) -> Row:
    """What is kept of a report."""
    return {
        "log_evidence": report.log_evidence, "precision": " ".join(f"{v:.4g}" for v in report.precision.tolist()),
        "groups": len(report.precision), "pruned": len(report.pruned), "evaluations": report.evaluations,
        "converged": int(report.converged),
    }  # fmt: skip


def classification(data: str, name: str, seed: int, folder: Path, sizes: Sizes) -> list[Row]:
    """The network alone and all four evidences, on one draw of images and initial weights."""
    if data in TREND:
        sizes = replace(sizes, train=TREND[data])
    training, (x, labels) = images(data, folder, seed, sizes)
    net = network(name, training[0].shape[-1], seed)
    batch = min(50, sizes.train // 2)
    train(net, *training, steps=sizes.steps, learning_rate=3e-3, weight_decay=1.0, batch_size=batch, seed=seed)
    with torch.no_grad():
        fitted, alone = (net(images).double().softmax(-1) for images in (training[0], x))
    common = {"train_nll": scored(fitted, training[1])["nll"], "weights": sum(p.numel() for p in net.parameters())}
    rows: list[Row] = [{"method": ALONE, **scored(alone, labels), **common}]
    start = time.process_time()
    shared = Posteriors(net, "normalization" if name in NORMALISED else "layer", training, x)
    common["shared_s"] = time.process_time() - start
    for kind, problem in (("single", shared.single()), ("many", shared.problem)):
        for symbol, at in AT.items():
            start = time.process_time()
            report = fit_problem(problem, at=at, tolerance=TOLERANCE)
            fit = time.process_time() - start
            around_network, around_mode = shared.predict(report.precision.expand(len(shared.lin.groups)))
            mode = {f"{key}_mode": scored(around_mode, labels)[key] for key in ("nll", "accuracy")}
            rows.append({
                "method": f"{kind} {symbol}", **scored(around_network, labels), **mode, **found_by(report), **common,
                "fit_s": fit,
            })  # fmt: skip
    return rows


def tomography(glyph: int, folder: Path, sizes: Sizes) -> list[Row]:
    """All four evidences of the U-Net fitted to one glyph, and the best constant variance."""
    with np.load(folder / "ct" / "kmnist_glyphs.npz") as file:
        truth, A, y, _ = measured(file["imgs"], glyph, ANGLES)
    dip = DeepImagePrior(A, unet=UNET, max_iterations=sizes.iterations).fit(y)
    rows: list[Row] = []
    for kind, groups in (("single", "single"), ("many", "normalization")):
        lin = dip.linearize(groups)
        model = ntkgp.InverseNTKGP(y, A, GaussianLikelihood(noise_constraint=Positive()).double(), lin)
        start = time.process_time()
        model.evidence_problem()
        shared = time.process_time() - start
        for symbol, at in AT.items():
            start = time.process_time()
            report = ntkgp.fit_evidence(model.train(), at=at, tolerance=TOLERANCE)
            fit = time.process_time() - start
            image = model.eval()()
            found = score_image(
                truth, image.mean.detach().reshape(truth.shape), image.covariance_matrix.detach(), floors=(FLOOR,),
                data_range=1.0,
            )  # fmt: skip
            calibration = found.calibrations[0]
            rows.append({
                "method": f"{kind} {symbol}", "nll": -found.likelihoods[0].full, "psnr": found.psnr,
                "rank": found.rank_correlation, "z_sd": calibration.z_sd, "coverage": calibration.coverage_95,
                **found_by(report), "fit_s": fit, "shared_s": shared, "weights": lin.num_parameters,
            })  # fmt: skip
    return [{"method": "best constant variance", "nll": -found.oracle, "psnr": found.psnr}, *rows]


class Results:
    """Rows by data, network and method."""

    def __init__(self, rows: list[Row]) -> None:
        self.cells: dict[tuple[str, str, str], dict[int, Row]] = {}
        for row in rows:
            self.cells.setdefault((row["data"], row["net"], row["method"]), {})[int(row["seed"])] = row
        problems = dict.fromkeys((row["data"], row["net"]) for row in rows)
        self.main = [problem for problem in problems if problem[0] not in TREND]

    def values(self, problem: tuple[str, str], method: str, column: str) -> dict[int, float]:
        """Of all seeds."""
        cell = self.cells.get((*problem, method), {})
        return {seed: float(row[column]) for seed, row in cell.items() if row.get(column) is not None}

    def summary(self, problem: tuple[str, str], method: str, column: str) -> tuple[float, float]:
        """Mean and standard error over seeds."""
        return common.mean_error(self.values(problem, method, column).values())

    def difference(self, problem: tuple[str, str], first: str, second: str, column: str) -> tuple[float, float]:
        """Of a column, seed by seed: mean and standard error."""
        one, two = (self.values(problem, method, column) for method in (first, second))
        return common.mean_error([one[seed] - two[seed] for seed in one.keys() & two.keys()])

    def precisions(self, problem: tuple[str, str], method: str) -> str:
        """Smallest and largest precision of the groups that are not pruned, geometric means, and how many are."""
        ends, pruned, groups = [], [], 0
        for row in self.cells.get((*problem, method), {}).values():
            found = sorted(float(v) for v in str(row["precision"]).split())
            groups = len(found)
            kept = found[: groups - int(row["pruned"])] or found[:1]
            ends.append((math.log(kept[0]), math.log(kept[-1])))
            pruned.append(int(row["pruned"]))
        if not ends:
            return ""
        low, high = (math.exp(v) for v in np.mean(ends, axis=0))
        if math.isclose(low, high):
            return f"{low:.3g}" + (f"; {np.mean(pruned):.1f} of {groups} pruned" if groups > 1 else "")
        return f"{low:.3g} … {high:.3g}; {np.mean(pruned):.1f} of {groups} pruned"


def word(mean: float, error: float) -> str:
    """Whether a difference that should be negative is."""
    if not abs(mean) > 2 * error:
        return "not told apart"
    return "holds" if mean < 0 else "reversed"


def cell(pair: tuple[float, float], digits: int = 3) -> str:
    """Mean ± standard error."""
    mean, error = pair
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" if math.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def table(found: Results, problem: tuple[str, str]) -> list[str]:
    """Scores of all rows of one network on one data set."""
    if problem[1] == "U-Net":
        columns = {"nll": "NLL per pixel", "psnr": "PSNR", "z_sd": "z-sd", "coverage": "95 % covers"}
        methods = ("best constant variance", *METHODS)
    else:
        columns = {
            "nll": "NLL", "calibrated_nll": "NLL, temp.", "nll_mode": "NLL, mean h(θ⋆)", "accuracy": "accuracy",
            "ece": "ECE",
        }  # fmt: skip
        methods = (ALONE, *METHODS)
    columns |= {"log_evidence": "log evidence"}
    lines = ["| | " + " | ".join(columns.values()) + " | λ | fit, s |", "|---|" + "--:|" * (len(columns) + 2)]
    for method in methods:
        cells = [
            cell(found.summary(problem, method, name), 1 if name in ("log_evidence", "psnr") else 3) for name in columns
        ]
        fitted = method in METHODS
        cells += [found.precisions(problem, method) if fitted else "–"]
        cells += [f"{found.summary(problem, method, 'fit_s')[0]:.1f}" if fitted else "–"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def orderings(found: Results, column: str) -> list[str]:
    """Paired differences of a column for every network, with the word for each."""
    shown = [each for each in ORDERINGS if any(found.values(p, each[2], column) for p in found.main)]
    lines = ["| data | network | " + " | ".join(title for title, *_ in shown) + " |", "|---|---|" + "---|" * len(shown)]
    for problem in found.main:
        pairs = [found.difference(problem, first, second, column) for _, first, second in shown]
        if math.isnan(pairs[0][0]):
            continue
        name = problem[1] + (" (normalised)" if problem[1] in NORMALISED else "")
        words = (
            "–" if math.isnan(pair[0]) else f"{'+' if pair[0] > 0 else ''}{cell(pair)}: {word(*pair)}" for pair in pairs
        )
        lines.append(f"| {problem[0]} | {name} | " + " | ".join(words) + " |")
    return lines


def counts(found: Results, column: str) -> list[str]:
    """Each published ordering: in how many networks it holds."""
    every, lines = found.main, []
    normalised = [p for p in every if p[1] in NORMALISED]
    plain = [p for p in every if p[1] not in NORMALISED]
    for index, problems, kind in (
        (0, every, "all"),
        (1, every, "all"),
        (2, normalised, "normalised"),
        (2, plain, "without normalisation"),
    ):
        title, first, second = ORDERINGS[index]
        pairs = {p: found.difference(p, first, second, column) for p in problems}
        words = [word(*pair) for pair in pairs.values() if not math.isnan(pair[0])]
        listed = ", ".join(f"{w} in {words.count(w)}" for w in ("holds", "not told apart", "reversed") if w in words)
        lines.append(f"- {title}, {kind}: {listed} (of {len(words)} pairs of network and data).")
    return lines


def trend(found: Results) -> list[str]:
    """NLL by number of training images."""
    sets = {50: "digits, 50 images", 100: "digits", 200: "digits, 200 images"}
    lines = ["| network | row | " + " | ".join(f"{n} images" for n in sets) + " |", "|---|---|" + "--:|" * len(sets)]
    for net in TREND_NETS:
        seeds = (str(len(found.values((data, net), ALONE, "nll"))) for data in sets.values())
        lines.append(f"| {net} | seeds | " + " | ".join(seeds) + " |")
        for method in (ALONE, *METHODS):
            cells = (cell(found.summary((data, net), method, "nll")) for data in sets.values())
            lines.append(f"| {net} | {method} | " + " | ".join(cells) + " |")
    return lines


def page(found: Results) -> str:
    """The page."""
    protocol = (__doc__ or "").split("\n    python ")[0].split("\n\n")
    lines = ["# Evidence at θ⋆ and at θ̃ on six architectures", "",
             *(part.replace("\n", " ").strip() + "\n" for part in protocol if part.strip()),
             "Command: `python scripts/evidence_ordering.py`. Mean ± standard error over seeds. λ: geometric means "
             "over seeds, for many precisions of the smallest and the largest that are not pruned. Seconds of one "
             "core, for the fit of the evidence once the Grams are there.", "", common.READING, ""]  # fmt: skip
    lines += ["## Orderings", "", "Differences of test NLL, seed by seed; negative is better.", "",
              *orderings(found, "nll"), "", *counts(found, "nll"), "",
              "After a temperature for every row, which takes out how over- or under-confident it is on the whole:", "",
              *orderings(found, "calibrated_nll"), "",
              "With the mode of the tangent model as mean:", "", *orderings(found, "nll_mode"), "",
              "## Fewer and more images", "", "Test NLL on digits.", "",
              *trend(found), ""]  # fmt: skip
    for problem in found.main:
        seeds = len(found.values(problem, METHODS[0], "nll"))
        weights, shared = (found.summary(problem, METHODS[0], name)[0] for name in ("weights", "shared_s"))
        lines += [f"## {problem[1]}, {problem[0]}", "",
                  f"{weights:,.0f} weights, {seeds} seeds, {shared:.0f} s for the Grams.", "",
                  *table(found, problem), ""]  # fmt: skip
    return "\n".join(lines)


def draw(found: Results, path: Path) -> None:
    """Test NLL of all rows, a panel for each data set."""
    sets = [data for data in ("digits", "MNIST", "glyphs") if any(data == part for part, _ in found.main)]
    figure, axes = new_figure(1, len(sets), (4.3 * len(sets), 4.6))
    styles = dict(zip((ALONE, *METHODS), zip(("0.45", *COLORS), "xosDv", strict=False), strict=True))
    for ax, data in zip(axes, sets, strict=True):
        nets = [net for part, net in found.main if part == data]
        for index, net in enumerate(nets):
            for row, (method, (color, marker)) in enumerate(styles.items()):
                mean, error = found.summary((data, net), method, "nll")
                if math.isnan(mean) and method == ALONE:
                    mean, error = found.summary((data, net), "best constant variance", "nll")
                ax.errorbar(mean, index + 0.13 * (row - 2), xerr=error, fmt=marker, ms=4.5, color=color, lw=1.0)
        ax.set_yticks(range(len(nets)), nets)
        ax.invert_yaxis()
        ax.set_title(data, loc="left", fontsize=10)
        ax.set_xlabel("test NLL, nats per pixel" if data == "glyphs" else "test NLL, nats per image")
    for method, (color, marker) in styles.items():
        label = method.replace(ALONE, "network alone (U-Net: best constant variance)")
        axes[0].plot([], [], marker, color=color, ms=4.5, label=label)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def jobs_of(folder: Path, seeds: int, nets: list[str]) -> list[tuple[str, str, int]]:
    """Data, network and seed of all jobs, seed by seed; says what is left out."""
    sets = ["digits"]
    for data, file in (("MNIST", "images/mnist.npz"), ("glyphs", "ct/kmnist_glyphs.npz")):
        if not common.absent(folder, file, what=f"skipped {data}"):
            sets.insert(0, data)
    chosen = sorted(GLYPHS, key=lambda glyph: (glyph % 30, glyph))
    found = []
    for seed in range(seeds):
        if "glyphs" in sets and "U-Net" in nets:
            found.append(("glyphs", "U-Net", chosen[seed]))
        found += [(data, net, seed) for data in ("digits", "MNIST") if data in sets for net in NETS if net in nets]
    later = product(range(min(seeds, TREND_SEEDS)), TREND, TREND_NETS)
    return found + [(data, net, seed) for seed, data, net in later if net in nets]


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__, quick="a tenth of the images, two seeds: no result")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--nets", nargs="+", choices=[*NETS, "U-Net"], default=[*NETS, "U-Net"])
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    given = parser.parse_args(arguments)
    written = common.page_of(given, "evidence_ordering")
    path = written.with_suffix(".csv")
    sizes = QUICK if given.quick else Sizes()
    rows = common.read_rows(path)
    done = {(row["data"], row["net"], int(row["seed"])) for row in rows}
    wanted = [] if given.report else jobs_of(given.data, given.seeds, given.nets)
    jobs = [job for job in wanted if job not in done and not (given.quick and job[0] in TREND)]
    torch.set_num_threads(1)
    logging.getLogger("ntkgp").setLevel(logging.ERROR)
    start = time.perf_counter()
    for count, (data, net, seed) in enumerate(jobs, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if net == "U-Net":
                found = tomography(seed, given.data, sizes)
            else:
                found = classification(data, net, seed, given.data, sizes)
        rows += [{"data": data, "net": net, "seed": seed, **row} for row in found]
        common.write_rows(path, rows)
        print(f"[{count}/{len(jobs)}] {net}, {data}, {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    order = [*((data, net) for data in ("digits", "MNIST", *TREND) for net in NETS), ("glyphs", "U-Net")]
    results = Results(sorted(rows, key=lambda row: (order.index((row["data"], row["net"])), int(row["seed"]))))
    common.write(written, page(results))
    draw(results, written.with_suffix(".png"))


if __name__ == "__main__":
    main()
