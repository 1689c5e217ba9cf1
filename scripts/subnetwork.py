"""Subnetwork inference: what is lost when only some of the weights have a posterior.

The weights of the largest marginal variance get all of the Gauss-Newton matrix, the others stay as trained (Daxberger
et al. 2021). Two questions of that paper. In one dimension: a ReLU network 1-50-50-1 (2600 weights and 101 biases) with
subnetworks of 1300, 78 and 26, trained on 200 points of a draw from a Gaussian process (Matérn-3/2, length 0.5,
variance 1, noise 0.15) on two intervals; each data set is a draw of its own, so that the truth in the gap is known.
Under rotation: a tanh network of 1680 weights (two strided convolutions and a linear layer; 1,000 images of MNIST),
small enough for all weights to be treated exactly, on test images turned by 0 to 180 degrees, with Fashion-MNIST as
the other set.

Marginal variances are those of the diagonal Laplace approximation ("diagonal"), of SGD around the trained weights
("SWAG"), of all weights ("exact", in one dimension); "random" takes any. Each method has two priors. *Common*: the
precision λ (and noise) that the evidence of all weights finds, at θ⋆ in one dimension and at θ̃ for images, so that
only the weights left out differ; a subnetwork's standard deviation is then at most that of all weights. *Own*: λ by the
method's own evidence at θ⋆ in one dimension; for images by the NLL of 500 held-out images that are not rotated, from
10⁻¹ to 10⁶, much as in the paper, which validates λ. Predictions are linearised, with the network's mean; for images
under the probit link.

    python scripts/subnetwork.py [--quick] [--data FOLDER] [--out docs/results] [--work FOLDER]

FOLDER holds images/mnist.npz and images/fashion_mnist.npz; without them the part on images is left out. What was
computed is kept in the work folder: an interrupted run goes on when it is called again.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import common
from images import Trainer
from images_data import FILES, Images
from images_data import Sizes as ImageSizes
from ntkgp.baselines import Laplace
from ntkgp.evaluation.comparison.scores import Predicted, Scale, collect, score
from ntkgp.evaluation.plots import COLORS, new_figure, predictive_bands
from ntkgp.evaluation.training import seeded, train

NOISE_SD, LENGTH = 0.15, 0.5
INTERVALS, REACH = ((-1.3, -0.65), (0.35, 1.6)), (-2.2, 2.5)
GRID = torch.linspace(*REACH, 141, dtype=torch.float64)
PRIORS = ("common", "own")
SHARES = {"50 %": 0.5, "3 %": 0.03, "1 %": 0.01}
ALL = "all weights"
OTHERS = {"KFAC": "kfac", "diagonal": "diagonal", "last layer": "last_layer"}
Values = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is computed."""

    sets: int = 10
    width: int = 50
    steps: int = 4000
    seeds: int = 3
    channels: tuple[int, int] = (4, 6)
    epochs: int = 150
    snapshots: int = 10
    lambdas: tuple[float, ...] = tuple(10.0**k for k in range(-1, 7))
    images: ImageSizes = field(
        default_factory=lambda: ImageSizes(
            train=1_000, held_out=500, test=400, other=200, rotated=50, corrupted=1, step=15
        )
    )


QUICK = Sizes(
    sets=1, width=8, steps=100, seeds=1, channels=(2, 2), epochs=1, snapshots=2, lambdas=(0.1, 10.0),
    images=ImageSizes(train=100, held_out=40, test=40, other=20, rotated=20, corrupted=1, step=90),
)  # fmt: skip


def key(*parts: str) -> str:
    """Name of a value: method, prior, place, score."""
    return "|".join(parts)


# --- one dimension ---


def region(x: Tensor) -> dict[str, Tensor]:
    """In the data, in the gap, and up to 0.3 beyond the data on each side."""
    (first, left), (right, last) = INTERVALS
    return {
        "data": ((x >= first) & (x <= left)) | ((x >= right) & (x <= last)),
        "gap": (x > left) & (x < right),
        "beyond": ((x < first) & (x >= first - 0.3)) | ((x > last) & (x <= last + 0.3)),
    }


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (N, 1) and targets (N, 1) with noise, and the function on the grid, of one draw from the process."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(200, generator=generator, dtype=torch.float64)
    lengths = [high - low for low, high in INTERVALS]
    along = share * sum(lengths)
    x = torch.where(along < lengths[0], INTERVALS[0][0] + along, INTERVALS[1][0] + along - lengths[0])
    points = torch.cat([x, GRID])
    distance = math.sqrt(3) * (points.unsqueeze(0) - points.unsqueeze(1)).abs() / LENGTH
    kernel = (1 + distance) * (-distance).exp() + 1e-8 * torch.eye(len(points), dtype=torch.float64)
    f = torch.linalg.cholesky(kernel) @ torch.randn(len(points), generator=generator, dtype=torch.float64)
    y = f[: len(x)] + NOISE_SD * torch.randn(len(x), generator=generator, dtype=torch.float64)
    return x.unsqueeze(-1), y.unsqueeze(-1), f[len(x) :]


def exact_mask(full: Laplace, x: Tensor, size: int) -> Tensor:
    """Places of the largest marginal variances of the posterior of all weights.

    As for the library's own scores, weights that no training output depends on come last.
    """
    rows = full.lin.jacobian(x)[:, 0].double()
    variance = 1 / float(full.precision)
    inner = float(full.noise) * torch.eye(len(rows), dtype=torch.float64) + variance * rows @ rows.T
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), rows, upper=False)
    scores = torch.where(rows.abs().amax(0) > 0, variance - variance**2 * half.square().sum(0), 0.0)
    return scores.argsort(descending=True, stable=True)[:size]


def curve_methods(full: Laplace, x: Tensor, width: int) -> dict[str, dict[str, Any]]:
    """Options of each method."""
    found: dict[str, dict[str, Any]] = {ALL: {"structure": "full"}}
    for share, fraction in SHARES.items():
        size = max(1, round((width**2 + 2 * width) * fraction))
        found[f"{share}, exact"] = {"structure": "subnetwork", "mask": exact_mask(full, x, size)}
        for name, kind in (("diagonal", "laplace"), ("SWAG", "swag"), ("random", "random")):
            found[f"{share}, {name}"] = {"structure": "subnetwork", "size": size, "score": kind}
    return found | {name: {"structure": structure} for name, structure in OTHERS.items()}


def expectations(mean: Tensor, variance: Tensor, noise: float, truth: Tensor) -> dict[str, Tensor]:
    """NLL and coverage of 95 % intervals on the grid, expected under the true density."""
    total, error = variance + noise, mean - truth
    half = 1.959964 * total.sqrt()
    ends = [torch.special.ndtr((error + sign * half) / NOISE_SD) for sign in (1, -1)]
    nll = (2 * math.pi * total).log() / 2 + (NOISE_SD**2 + error.square()) / (2 * total)
    return {"nll": nll, "covers": ends[0] - ends[1], "sd": variance.sqrt()}


def curve(seed: int, sizes: Sizes) -> Values:
    """One data set in one dimension: scores by method, prior and region; the curves of the first one."""
    x, y, truth = draw(seed)
    with seeded(seed):
        w = sizes.width
        net = nn.Sequential(nn.Linear(1, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 1)).double()
    train(net, x, y, steps=sizes.steps, learning_rate=1e-2, seed=seed)
    full = Laplace(net, groups="single").fit((x, y))
    swag = {"swag_snapshots": 4 * sizes.snapshots}
    found: Values = {}
    spread: Tensor | None = None
    for method, options in curve_methods(full, x, sizes.width).items():
        for prior in PRIORS:
            if method == ALL:
                model = full
            elif prior == "own":
                model = Laplace(net, groups="single", seed=seed, **swag, **options).fit((x, y))
            else:
                kept = {"evidence": None, "precision": full.precision, "noise": full.noise}
                model = Laplace(net, groups="single", seed=seed, **kept, **swag, **options).fit((x, y))
            latent = model.predict(GRID.unsqueeze(-1)).latent  # type: ignore[attr-defined]
            values = expectations(latent.mean, latent.variance, float(model.noise), truth)
            spread = values["sd"] if spread is None else spread
            values["ratio"] = values.pop("sd") / spread
            for name, inside in region(GRID).items():
                found |= {key(method, prior, name, s): float(v[inside].mean()) for s, v in values.items()}
            found[key(method, prior, "", "largest")] = float(values["ratio"].max())
            found[key(method, prior, "", "lambda")] = float(model.precision)
            if seed == 0:
                found[key(method, prior, "", "curve")] = [latent.mean.tolist(), latent.variance.tolist()]
                found[key("noise", method, prior)] = float(model.noise)
    if seed == 0:
        found["data"] = [x.flatten().tolist(), y.flatten().tolist(), truth.tolist()]
    return found


# --- images ---


def image_methods(num_weights: int) -> dict[str, dict[str, Any]]:
    """Options of each method; all weights first, whose evidence gives the common λ."""
    found: dict[str, dict[str, Any]] = {ALL: {"structure": "full"}}
    for share, fraction in {"50 %": 0.5, "10 %": 0.1, "3 %": 0.03, "1 %": 0.01}.items():
        found[f"{share}, SWAG"] = {"structure": "subnetwork", "size": round(num_weights * fraction), "score": "swag"}
    for name, kind in (("diagonal", "laplace"), ("random", "random")):
        found[f"3 %, {name}"] = {"structure": "subnetwork", "size": round(num_weights * 0.03), "score": kind}
    return found | {name: {"structure": structure} for name, structure in OTHERS.items()}


class Turned:
    """All methods on one trained network.

    :param images: those of the script of all image methods: training, held-out, and pieces with a name each.
    """

    def __init__(self, images: Images, seed: int, sizes: Sizes) -> None:
        self.images, self.seed, self.sizes = images, seed, sizes
        first, second = sizes.channels
        with seeded(seed):
            self.net = nn.Sequential(
                nn.Conv2d(1, first, 5, stride=2), nn.Tanh(), nn.Conv2d(first, second, 5, stride=2), nn.Tanh(),
                nn.Flatten(), nn.Linear(16 * second, 10),
            )  # fmt: skip
            Trainer(sizes.epochs)(self.net, images.train)
        self.common, self.largest = 1.0, torch.zeros(0)

    def scores(self, method: str, prior: str, found: Distribution | Predicted) -> Values:
        """Of each angle, of all turned images together, and of telling the other set apart."""
        predicted = found if isinstance(found, Predicted) else collect(found)
        assert predicted.probabilities is not None
        pieces, y, name = self.images.pieces, self.images.y, self.images.name

        def part(rows: Tensor) -> Predicted:
            latent = None if predicted.latent is None else predicted.latent[rows]
            return Predicted(probabilities=predicted.probabilities[rows], latent=latent)  # type: ignore[index]

        everywhere = torch.arange(len(y))
        turned = {p.split("/")[1]: everywhere[s] for p, s in pieces.items() if p.startswith(f"{name} rotated/")}
        places = {"0": everywhere[pieces[name]], **turned, "turned": torch.cat(list(turned.values()))}
        values: Values = {}
        for place, rows in places.items():
            outside = part(everywhere[pieces["outside"]]) if place == "0" else None
            each = {s: pair[0] for s, pair in score(part(rows), y[rows], outside, Scale()).items()}
            wanted = ("nll", "ece", "accuracy", "ood_auc", "ood_auc_variance")
            values |= {key(method, prior, place, s): each[s] for s in wanted if s in each}
        return values

    def at(self, model: Laplace, precision: float, x: Tensor) -> Distribution:
        """Prediction with another λ, from the same curvature."""
        model.precision = torch.full_like(model.precision, precision)
        model.curvature.update(model.precision, 1 / model.noise)
        return model.predict(x)

    def run(self) -> Values:
        """All scores of this network."""
        with torch.no_grad():
            alone = Predicted(probabilities=self.net(self.images.x).double().softmax(-1))
        found = {k: v for prior in PRIORS for k, v in self.scores("network", prior, alone).items()}
        x, y = self.images.held_out
        for method, options in image_methods(sum(p.numel() for p in self.net.parameters())).items():
            swag = {"swag_snapshots": self.sizes.snapshots}
            evidence = "theta" if method == ALL else None
            model = Laplace(
                self.net, "classification", groups="single", evidence=evidence, seed=self.seed, **swag, **options
            ).fit(self.images.train)
            if method == ALL:
                self.common = float(model.precision)
            losses = [-float(self.at(model, p, x).log_prob(y).mean()) for p in self.sizes.lambdas]
            own = self.sizes.lambdas[losses.index(min(losses))]
            for prior, precision in (("common", self.common), ("own", own)):
                predicted = collect(self.at(model, precision, self.images.x))
                assert predicted.latent is not None
                if (method, prior) == (ALL, "common"):
                    self.largest = predicted.latent
                found |= self.scores(method, prior, predicted)
                found[key(method, prior, "", "largest")] = float((predicted.latent / self.largest).max().sqrt())
                found[key(method, prior, "", "lambda")] = precision
            print(f"  {method}: λ = {own:g}, common {self.common:.3g}", flush=True)
        return found


# --- the page ---


def over(jobs: list[Values], name: str, digits: int = 2, factor: float = 1.0) -> str:
    """Mean ± standard error over jobs."""
    mean, error = common.mean_error(factor * job[name] for job in jobs)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def methods_of(job: Values, score_name: str) -> list[str]:
    """In the order of the rows."""
    return list(dict.fromkeys(k.split("|")[0] for k in job if k.endswith("|" + score_name)))


def median(jobs: list[Values], name: str) -> str:
    """Of all jobs."""
    return f"{float(torch.tensor([job[name] for job in jobs]).median()):.2g}"


def curve_table(jobs: list[Values], prior: str) -> list[str]:
    """Scores in one dimension with one prior."""
    columns = [("data", "ratio"), ("gap", "ratio"), ("beyond", "ratio"), ("data", "covers"), ("gap", "covers"),
               ("beyond", "covers"), ("data", "nll"), ("gap", "nll")]  # fmt: skip
    titles = {"ratio": "sd / sd of all weights, {}", "covers": "95 % covers, {}", "nll": "NLL, {}"}
    lines = ["| | " + " | ".join(titles[s].format(w) for w, s in columns) + " | largest ratio | λ, median |",
             "|---|" + "--:|" * (len(columns) + 2)]  # fmt: skip
    for method in methods_of(jobs[0], "ratio"):
        cells = []
        for where, name in columns:
            factor, digits, unit = (100.0, 1, " %") if name == "covers" else (1.0, 2, "")
            cells.append(over(jobs, key(method, prior, where, name), digits, factor) + unit)
        largest = max(job[key(method, prior, "", "largest")] for job in jobs)
        lines.append(
            f"| {method} | {' | '.join(cells)} | {largest:.4g} | {median(jobs, key(method, prior, '', 'lambda'))} |"
        )
    return lines


def image_table(jobs: list[Values], prior: str) -> list[str]:
    """Scores of images with one prior."""
    columns = {
        "NLL, 0°": ("0", "nll"), "ECE, 0°": ("0", "ece"), "NLL, turned": ("turned", "nll"),
        "ECE, turned": ("turned", "ece"), "accuracy, turned": ("turned", "accuracy"), "OOD-AUC": ("0", "ood_auc"),
        "OOD-AUC (var.)": ("0", "ood_auc_variance"),
    }  # fmt: skip
    lines = ["| | " + " | ".join(columns) + " | largest ratio | λ |", "|---|" + "--:|" * (len(columns) + 2)]
    for method in methods_of(jobs[0], "nll"):
        names = [key(method, prior, *column) for column in columns.values()]
        cells = [over(jobs, name, 3) if name in jobs[0] else "" for name in names]
        extra = ["", ""]
        if (name := key(method, prior, "", "largest")) in jobs[0]:
            lambdas = ", ".join(f"{job[key(method, prior, '', 'lambda')]:.3g}" for job in jobs)
            extra = [f"{max(job[name] for job in jobs):.4g}", lambdas]
        lines.append(f"| {method} | {' | '.join([*cells, *extra])} |")
    return lines


def text(curves: list[Values], images: list[Values], quick: bool) -> str:
    """The page, up to its reading."""
    parts = [part.replace("\n", " ") + "\n" for part in (__doc__ or "").split("\n\n")[1:3]]
    lines = [
        "# Subnetwork inference", "", f"Made by `python scripts/subnetwork.py{' --quick' * quick}`.", "",
        f"![bands in one dimension; NLL and ECE against the angle](subnetwork{'_quick' * quick}.png)", "", *parts,
        f"## In one dimension, {len(curves)} data sets", "",
        "Mean ± s.e. over data sets. NLL and coverage are expected under the true density, averaged over the data's "
        "two intervals, the gap between them, or 0.3 beyond them. *Largest ratio*: the largest sd / sd of all weights "
        "on the whole grid in all data sets.", "", "### Common prior", "", *curve_table(curves, "common"), "",
        "### Own prior", "", *curve_table(curves, "own"), "",
    ]  # fmt: skip
    if images:
        lines += [
            f"## Rotated MNIST, {len(images)} networks", "",
            "Mean ± s.e. over networks; the images are the same. *Turned*: 12 angles from 15° to 180° together. "
            "OOD-AUC: Fashion-MNIST told from upright test images by the predictive entropy, or by the latent "
            "variance. *Largest ratio*: the largest sd / sd of all weights with the common prior, of all predicted "
            "images.", "", "### Own prior", "",
            *image_table(images, "own"), "", "### Common prior", "", *image_table(images, "common"), "",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


# Panels of the figure, and lines.
SHOWN = (ALL, *(f"{share}, diagonal" for share in SHARES), "3 %, SWAG", "3 %, random", "diagonal", "last layer")
DRAWN = ("network", ALL, "10 %, SWAG", "1 %, SWAG", "last layer", "diagonal")


def figure(curves: list[Values], images: list[Values], path: Path) -> None:
    """Bands of the first data set with the common prior; NLL and ECE against the angle."""
    canvas, axes = new_figure(3 if images else 2, 4, (13.0, 8.6 if images else 5.8))
    x, y, truth = (torch.tensor(values, dtype=torch.float64) for values in curves[0]["data"])
    for ax, method in zip(axes, SHOWN, strict=False):
        mean, variance = (torch.tensor(v) for v in curves[0][key(method, "common", "", "curve")])
        predictive_bands(
            GRID, mean, variance.clamp_min(0), curves[0][key("noise", method, "common")], data=(x, y), truth=truth,
            label="f ± 2 sd", ax=ax,
        )  # fmt: skip
        ax.set_title(f"1-D, common prior: {method}", fontsize=9)
        ax.set_ylim(-4, 4)
        if ax is not axes[0]:
            ax.get_legend().remove()
    panels = [(prior, name) for prior in ("own", "common") for name in ("nll", "ece")]
    for ax, (prior, name) in zip(axes[8:], panels, strict=False):
        angles = sorted({int(p) for k in images[0] if (p := k.split("|")[2]).isdigit()})
        for color, method in zip(COLORS, DRAWN, strict=True):
            values = [sum(job[key(method, prior, str(a), name)] for job in images) / len(images) for a in angles]
            ax.plot(angles, values, color=color, marker="o", ms=3, lw=1.3, label=method)
        ax.set_title(f"images, {prior} prior: {name.upper()}" + ", nats" * (name == "nll"), fontsize=9)
        ax.set_xlabel("rotation, degrees")
    if images:
        lines = axes[8].get_legend_handles_labels()
        canvas.legend(*lines, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    save_small(canvas, path)


def save_small(canvas: Any, path: Path) -> None:
    """Write a picture with a palette."""
    from PIL import Image

    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=100)
    buffer.seek(0)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def kept(path: Path, compute: Callable[[], Values]) -> Values:
    """What an earlier run left, or what is computed now."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    start = time.process_time()
    found = compute()
    with common.replacing(path) as part:
        part.write_text(json.dumps(found), encoding="utf-8")
    print(f"{path.stem}: {time.process_time() - start:.0f} s", flush=True)
    return found


def main() -> None:
    parser = common.parser(__doc__, quick="one small data set, some images: no result")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ntkgp-subnetwork")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = QUICK if arguments.quick else Sizes()
    work = arguments.work / common.digest(sizes)
    curves = [kept(work / f"curve{s}.json", lambda s=s: curve(s, sizes)) for s in range(sizes.sets)]  # type: ignore[misc]
    images: list[Values] = []
    if not common.absent(arguments.data, *(f"images/{name}.npz" for name in FILES.values()), what="images skipped"):
        pictures = Images("MNIST", arguments.data, sizes.images)
        for seed in range(sizes.seeds):
            images.append(kept(work / f"images{seed}.json", lambda s=seed: Turned(pictures, s, sizes).run()))  # type: ignore[misc]
    page = common.page_of(arguments, "subnetwork")
    common.write(page, text(curves, images, arguments.quick))
    figure(curves, images, page.with_suffix(".png"))
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
