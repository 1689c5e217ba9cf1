"""Tomography of handwritten glyphs: which prior and which evidence give error maps that can be trusted.

30 KMNIST glyphs of 28 × 28 pixels, six of each class, none of which was looked at while the settings of the library
were made (glyphs 5 and 97 were: `--glyphs 5 97` runs them, into a file of their own). Parallel beam, 10 and 20 angles,
41 detectors, white noise with a standard deviation of 5 % of the mean line integral. Scan and reconstruction share one
pixel grid, as in the literature on these images (an inverse crime, the same for all methods). Every method sees the
same sinogram; noise levels are estimated (under the Matérn prior with ν = 1.5, which was the library's default when the
rule below was fixed; it chooses ν by the evidence since, and came to 1.5 on 40 of 60 other sinograms of these glyphs,
and to levels 1 % higher in the mean), and no truth is looked at before the scores.

Rows: the tangent model of a deep image prior (U-Net without normalisation or with GroupNorm, with a sigmoid or the
library's linear output), one precision (single), one per block of the U-Net, one per normalised group, the g-prior,
blocks with a TV-PredCP or a pooling prior (ScalePrior, spread 0.3 and 1), each with the evidence at θ⋆ and at θ̃;
bayes_dip's recipe on the same fit; FBP, TV, a Matérn GP, ridge, Monte-Carlo dropout, an ensemble of five, and CUQIpy's
LMRF where it is installed. The networks with a linear output, and the two references that train networks of their own
(dropout, ensemble), see five of the glyphs, one of each class.

Scores (ntkgp.evaluation.metrics.images, data range one): log-likelihoods per pixel of the joint Gaussian with 1e-4,
8-bit rounding (1.3e-6) or bayes_dip's σ²·tr(AᵀA)⁺/d added to all variances; the *oracle* is the best constant variance.
z-sd, coverage of 95 % intervals (both at 1e-4), Spearman's correlation of |error| and sd. Mean ± standard error over
glyphs.

The verdict is computed by a rule that was fixed before the run. A variant is calibrated at a number of angles if its
mean z-sd is in [0.8, 1.25] and its mean 95 % coverage in [0.92, 0.98]. The default should be, of the variants that are
calibrated at both numbers of angles, the one with the largest log-likelihood above the oracle at the floor 1e-4,
averaged over both; if none is, the one whose z-sd is nearest to one (least mean |log z-sd|). Variants within one
standard error of the paired difference from the winner are named as its equals.

    python scripts/ct_kmnist.py [--quick] [--data FOLDER] [--out docs/results] [--workers 2] [--nets ...]

FOLDER holds ct/kmnist_glyphs.npz; without it the script says so and stops. What ct_kmnist.csv in the output folder
already has is not computed again: an interrupted run goes on when it is called again.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import multiprocessing
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpytorch.constraints import Positive
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

import common
import ntkgp
from ntkgp.evaluation.metrics.images import FLOORS, oracle_log_likelihood, psnr, score_image, ssim
from ntkgp.evaluation.plots import COLORS, new_figure
from ntkgp.evaluation.plots_images import image_report
from ntkgp.inverse import DeepImagePrior, ParallelBeam, RayTransform, ScalePrior, g_prior, references
from ntkgp.inverse.noise import estimate_noise, pinv_floor

TILES = (1, 6, 9, 14, 22, 27)
GLYPHS = tuple(sorted(30 * label + tile for label in range(5) for tile in TILES))
ANGLES = (10, 20)
DETECTORS, NOISE = 41, 0.05
SMOOTHNESS = 1.5  # of the images, for their noise levels
NETS: dict[str, dict[str, Any]] = {
    "no norm, sigmoid": {"norm": None, "output": "sigmoid"},
    "GroupNorm, sigmoid": {"norm": "group", "output": "sigmoid"},
    "no norm, linear": {"norm": None, "output": "linear"},
    "GroupNorm, linear": {"norm": "group", "output": "linear"},
}
REFERENCES, TRAINED = "references", "trained references"
# One after the other, a part for so many glyphs of each class: an interrupted run has what matters most.
STAGES = (
    ("no norm, sigmoid", 2), ("GroupNorm, sigmoid", 1), (REFERENCES, 2), ("no norm, sigmoid", 6), (REFERENCES, 6),
    ("GroupNorm, sigmoid", 6), ("GroupNorm, linear", 1), ("no norm, linear", 1), (TRAINED, 1),
)  # fmt: skip
FLOOR_NAMES = ("1e-4", "1.3e-6", "pinv")
AT = {"θ⋆": "theta_star", "θ̃": "theta_map"}
Z_RANGE, COVERAGE_RANGE = (0.8, 1.25), (0.92, 0.98)
TARGET_GAIN, TARGET_RANK = 0.5, 0.7
Row = dict[str, Any]
Job = tuple[int, int, str, str, str]


def measured(images: np.ndarray, glyph: int, angles: int) -> tuple[Tensor, RayTransform, Tensor, float]:
    """Glyph in [0, 1], operator, noisy sinogram and its noise level."""
    truth = torch.as_tensor(images[glyph], dtype=torch.float64) / 255
    views = torch.arange(angles, dtype=torch.float64) * math.pi / angles
    A = RayTransform(ParallelBeam((28, 28), views, DETECTORS))
    clean = A(truth)
    sd = NOISE * float(clean.abs().mean())
    generator = torch.Generator().manual_seed(glyph)
    return truth, A, clean + sd * torch.randn(clean.shape, generator=generator, dtype=torch.float64), sd


def scored(method: str, truth: Tensor, mean: Tensor, spread: dict[str, Tensor], floor: float) -> Row:
    """All scores of one method on one glyph, flat."""
    mean = mean.detach().reshape(truth.shape).to(torch.float64)
    if not spread:
        error = mean - truth
        return {
            "method": method, "psnr": psnr(mean, truth, 1.0), "ssim": ssim(mean, truth, 1.0),
            "rmse": float(error.square().mean().sqrt()), "oracle": oracle_log_likelihood(mean, truth),
        }  # fmt: skip
    found = score_image(truth, mean, floors=(*FLOORS, floor), data_range=1.0, **spread)
    row: Row = {
        "method": method, "psnr": found.psnr, "ssim": found.ssim, "rmse": found.rmse, "oracle": found.oracle,
        "rank": found.rank_correlation,
    }  # fmt: skip
    for name, ll, calibration in zip(FLOOR_NAMES, found.likelihoods, found.calibrations, strict=True):
        row |= {f"{key}@{name}": value for key, value in (*ll._asdict().items(), *calibration._asdict().items())}
    row["gain"] = found.likelihoods[0].full - found.oracle
    return row


def tangent_models(truth: Tensor, A: RayTransform, y: Tensor, sd: float, net: str, example: Path | None) -> list[Row]:
    """All priors and both evidences on one fit."""
    start = time.perf_counter()
    level = estimate_noise(y, A, smoothness=SMOOTHNESS).sd
    dip = DeepImagePrior(A, unet=NETS[net], noise=level).fit(y)
    fitted = time.perf_counter() - start
    floor = pinv_floor(A.matrix(), level)
    rows = []
    common = {"noise_ratio": level / sd, "iterations": dip.iteration, "stopped_by": dip.stopped_by, "dip_s": fitted}
    groupings = {"single": "single", "block": "block"}
    if NETS[net]["norm"]:
        groupings["normalization"] = "normalization"
    for name, groups in (*groupings.items(), ("g-prior", "single")):
        start = time.perf_counter()
        lin = dip.linearize(groups)
        if name == "g-prior":
            lin = g_prior(lin, A, floor=1e-3)
        model = ntkgp.InverseNTKGP(y, A, GaussianLikelihood(noise_constraint=Positive()).double(), lin)
        model.evidence_problem()
        priors: dict[str, Any] = {"": None}
        if name in ("single", "block"):
            priors[" + PredCP"] = dip.predcp(lin)
        if name == "block":
            priors |= {" + pool 0.3": ScalePrior(0.3), " + pool 1": ScalePrior(1.0)}
        built = time.perf_counter() - start
        for (label, prior), (symbol, at) in ((p, a) for p in priors.items() for a in AT.items()):
            start = time.perf_counter()
            report = ntkgp.fit_evidence(model.train(), at=at, prior=prior)
            evidence = time.perf_counter() - start
            for mean in ("network", "posterior"):
                if mean == "posterior" and (name, label, symbol) != ("single", "", "θ⋆"):
                    continue
                model.mean = mean
                image = model.eval()()
                covariance = image.covariance_matrix.detach()
                method = f"{name}{label} {symbol}" + (", mean h(θ⋆)" if mean == "posterior" else "")
                rows.append({
                    **scored(method, truth, image.mean, {"covariance": covariance}, floor), **common,
                    "build_s": built, "evidence_s": evidence, "seconds": fitted + built + time.perf_counter() - start,
                    "sigma_ratio": float(report.noise.sqrt()) / sd, "pruned": len(report.pruned),
                    "log_evidence": report.log_evidence, "converged": int(report.converged),
                })  # fmt: skip
                if example is not None and method == "single θ⋆":
                    picture = image_report(dip.reconstruction, image.variance.reshape(28, 28), truth, data_range=1.0)
                    picture.savefig(example, dpi=110)
            model.mean = "network"
    if net == "no norm, sigmoid":
        found = references.bayes_dip_reference(y, A, dip=dip)
        rows.append({**scored("bayes_dip", truth, found.mean, found.spread, floor), **common, "seconds": found.seconds})
    return rows


def reference_methods(truth: Tensor, A: RayTransform, y: Tensor, sd: float, part: str) -> list[Row]:
    """What needs no tangent model; at the same estimate of the noise level."""
    level = estimate_noise(y, A, smoothness=SMOOTHNESS).sd
    floor = pinv_floor(A.matrix(), level)
    methods: dict[str, Callable[[], references.ImagePosterior]] = {
        "FBP": lambda: references.fbp_reference(y, A, level),
        "TV": lambda: references.tv_reference(y, A, level),
        "Matérn GP": lambda: references.gp_reference(y, A, level),
        "ridge": lambda: references.gp_reference(y, A, level, length_scales=(0.0,)),
    }
    trained: dict[str, Callable[[], references.ImagePosterior]] = {
        "MC dropout": lambda: references.mc_dropout_reference(
            y, A, level, num_samples=2000, unet=NETS["no norm, sigmoid"]
        ),
        "ensemble of 5": lambda: references.ensemble_reference(y, A, level, unet=NETS["GroupNorm, sigmoid"]),
    }
    if importlib.util.find_spec("cuqi") is not None:
        methods["LMRF (CUQIpy)"] = lambda: references.lmrf_reference(y, A, level)
    rows = []
    for name, method in (trained if part == TRAINED else methods).items():
        found = method()
        row = scored(name, truth, found.mean, found.spread, floor)
        rows.append({**row, "noise_ratio": level / sd, "seconds": found.seconds})
    return rows


def work(job: Job) -> list[Row]:
    """One part of one glyph at one number of angles."""
    glyph, angles, part, data, out = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("ntkgp").setLevel(logging.ERROR)
    with np.load(Path(data) / "ct" / "kmnist_glyphs.npz") as file:
        images = file["imgs"]
    truth, A, y, sd = measured(images, glyph, angles)
    if part in (REFERENCES, TRAINED):
        rows = reference_methods(truth, A, y, sd, part)
    else:
        first = glyph == GLYPHS[0] and angles == ANGLES[-1] and part == next(iter(NETS))
        rows = tangent_models(truth, A, y, sd, part, Path(out) / "ct_kmnist_example.png" if first else None)
    return [{"glyph": glyph, "angles": angles, "part": part, **row} for row in rows]


def number(value: Any) -> Any:
    """A CSV field as a number where it is one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def load(path: Path) -> list[Row]:
    """Rows of a CSV file, or none."""
    rows = common.read_rows(path)
    return [{key: number(value) for key, value in row.items()} | {"part": row["part"]} for row in rows]


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over glyphs, of what is finite."""
    return common.mean_error(value for value in values if math.isfinite(value))


class Results:
    """Rows by method and number of angles; a method is (part, name)."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.cells: dict[tuple[int, str, str], dict[int, Row]] = defaultdict(dict)
        for row in rows:
            self.cells[int(row["angles"]), row["part"], row["method"]][int(row["glyph"])] = row
        self.angles = sorted({key[0] for key in self.cells})
        self.methods = list(dict.fromkeys(key[1:] for key in self.cells))

    def values(self, angles: int, method: tuple[str, str], column: str) -> dict[int, float]:
        """Of all glyphs."""
        cell = self.cells.get((angles, *method), {})
        return {glyph: row[column] for glyph, row in cell.items() if isinstance(row.get(column), float)}

    def summary(self, angles: int, method: tuple[str, str], column: str) -> tuple[float, float]:
        """Mean and standard error."""
        return mean_error(list(self.values(angles, method, column).values()))

    @property
    def variants(self) -> list[tuple[str, str]]:
        """Tangent models with the mean of the network, the same for all of one part."""
        return [m for m in self.methods if m[0] in NETS and "h(θ⋆)" not in m[1] and m[1] != "bayes_dip"]

    def calibrated(self, angles: int, method: tuple[str, str]) -> bool:
        """By the rule of the docstring."""
        z, covered = (self.summary(angles, method, column)[0] for column in ("z_sd@1e-4", "coverage_95@1e-4"))
        return Z_RANGE[0] <= z <= Z_RANGE[1] and COVERAGE_RANGE[0] <= covered <= COVERAGE_RANGE[1]

    def score(self, method: tuple[str, str]) -> dict[tuple[int, int], float]:
        """What decides: gain over the oracle, by angles and glyph."""
        return {(a, g): v for a in self.angles for g, v in self.values(a, method, "gain").items()}

    def miss(self, method: tuple[str, str]) -> float:
        """Mean |log z-sd|."""
        return float(np.mean([abs(math.log(self.summary(a, method, "z_sd@1e-4")[0])) for a in self.angles]))


def verdict(found: Results) -> list[str]:
    """The rule of the docstring, in words."""
    complete = [m for m in found.variants if all(found.values(a, m, "gain") for a in found.angles)]
    if not complete:
        return ["No variant has rows for all numbers of angles."]
    good = [m for m in complete if all(found.calibrated(a, m) for a in found.angles)]
    title = f"{' and '.join(map(str, found.angles))} angles"
    lines = [
        f"Calibrated at {title} (mean z-sd in {list(Z_RANGE)}, mean 95 % coverage in {list(COVERAGE_RANGE)}): "
        + ("; ".join(f"{p}: {m}" for p, m in good) or "none")
        + "."
    ]
    if good:
        best = max(good, key=lambda m: np.mean([*found.score(m).values()]))
        reason = "the largest log-likelihood above the oracle of these"
    else:
        best = min(complete, key=found.miss)
        reason = "the z-sd nearest to one"
    own, equals = found.score(best), []
    for other in good:
        theirs = found.score(other)
        pairs = [own[key] - theirs[key] for key in own.keys() & theirs.keys()]
        difference, error = mean_error(pairs)
        if other != best and difference <= error:
            equals.append(f"{other[0]}: {other[1]} ({difference:.3f} ± {error:.3f} below)")
    lines.append(
        f"**Default by the rule: {best[0]}: {best[1]}**, {reason}"
        + (f"; within one standard error of it: {'; '.join(equals)}" if equals else "")
        + "."
    )
    for angles in found.angles:
        gain, error = found.summary(angles, best, "gain")
        rank, rank_error = found.summary(angles, best, "rank")
        covered, z = (found.summary(angles, best, c) for c in ("coverage_95@1e-4", "z_sd@1e-4"))
        lines.append(
            f"{angles} angles: {gain:+.2f} ± {error:.2f} nats per pixel above the oracle "
            f"({'meets' if gain >= TARGET_GAIN else 'misses'} {TARGET_GAIN}), Spearman {rank:.2f} ± {rank_error:.2f} "
            f"({'meets' if rank >= TARGET_RANK else 'misses'} {TARGET_RANK}), 95 % intervals cover "
            f"{100 * covered[0]:.1f} ± {100 * covered[1]:.1f} %, z-sd {z[0]:.2f} ± {z[1]:.2f}."
        )
    return [*lines, *comparisons(found)]


def comparisons(found: Results) -> list[str]:
    """The questions of the literature, answered by paired differences over glyphs and angles."""
    lines = []
    for part in dict.fromkeys(m[0] for m in found.variants):
        for first, second in (("block θ⋆", "single θ⋆"), ("single θ̃", "single θ⋆"), ("block θ̃", "block θ⋆")):
            ours, theirs = found.score((part, first)), found.score((part, second))
            difference, error = mean_error([ours[key] - theirs[key] for key in ours.keys() & theirs.keys()])
            if math.isnan(error):
                continue
            word = "no clear difference" if abs(difference) <= 2 * error else "better" if difference > 0 else "worse"
            lines.append(f"{part}: {first} against {second}: {difference:+.2f} ± {error:.2f} nats per pixel, {word}.")
    return lines


COLUMNS = {
    "PSNR": ("psnr", 2), "LL @1e-4": ("full@1e-4", 2), "− oracle": ("gain", 2), "LL @1.3e-6": ("full@1.3e-6", 1),
    "LL @pinv": ("full@pinv", 2), "diagonal @1e-4": ("diagonal@1e-4", 2), "Spearman": ("rank", 2),
    "95 % covers": ("coverage_95@1e-4", 3), "z-sd": ("z_sd@1e-4", 2), "joint z": ("whitened_sd@1e-4", 2),
    "evidence s": ("evidence_s", 1), "s": ("seconds", 0),
}  # fmt: skip


def report(found: Results) -> str:
    """Tables and the verdict."""
    count = len({row["glyph"] for row in found.rows})
    lines = ["# Tomography of glyphs: which error maps can be trusted", "",
             "Made by `python scripts/ct_kmnist.py`; how, and the rule of the verdict: its docstring. Noise levels "
             f"are\nestimated with ν = {SMOOTHNESS:g}; the library's default has chosen ν by the evidence since. "
             f"{count} glyphs; mean ± standard error.", "", "## Verdict", "",
             *(f"- {line}" for line in verdict(found)), ""]  # fmt: skip
    for angles in found.angles:
        lines += [f"## {angles} angles", "", f"| method | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for method in found.methods:
            here = found.cells.get((angles, *method))
            if not here:
                continue
            name = method[1] if method[0] not in NETS else f"{method[0]}: {method[1]}"
            mark = " ✓" if method in found.variants and found.calibrated(angles, method) else ""
            cells = []
            for column, digits in COLUMNS.values():
                mean, error = found.summary(angles, method, column)
                bar = "" if math.isnan(error) or column.endswith(("_s", "seconds")) else f" ± {error:.{digits}f}"
                cells.append("" if math.isnan(mean) else f"{mean:.{digits}f}{bar}")
            lines.append(f"| {name}{mark} ({len(here)}) | {' | '.join(cells)} |")
        lines.append("")
    lines += ["✓ calibrated by the rule; in brackets the number of glyphs.", "", "## Fits", ""]
    for part in NETS:
        for angles in found.angles:
            own = [r for r in found.rows if r["part"] == part and r["angles"] == angles and r["method"] == "single θ⋆"]
            if own:
                seconds, iterations = (np.mean([r[c] for r in own]) for c in ("dip_s", "iterations"))
                ratio, error = mean_error([r["noise_ratio"] for r in own])
                met = sum(r["stopped_by"] == "discrepancy" for r in own)
                lines.append(
                    f"- {part}, {angles} angles: {iterations:.0f} iterations in {seconds:.0f} s, the discrepancy was "
                    f"met in {met} of {len(own)}; estimated over true noise {ratio:.3f} ± {error:.3f}; whole pipeline "
                    f"at most {max(r['seconds'] for r in own):.0f} s, evidence at most "
                    f"{max(r['evidence_s'] for r in own):.1f} s."
                )
    return "\n".join([*lines, ""])


def draw(found: Results, path: Path) -> None:
    """Calibration of every variant, and gains over the oracle."""
    figure, axes = new_figure(2, len(found.angles), (5.6 * len(found.angles), 8.4))
    parts = list(dict.fromkeys(m[0] for m in found.variants))
    for column, angles in enumerate(found.angles):
        upper, lower = axes[column], axes[len(found.angles) + column]
        upper.axvspan(*Z_RANGE, color="0.9", lw=0)
        upper.axhspan(*COVERAGE_RANGE, color="0.9", lw=0)
        for method in found.variants:
            z, covered = (found.summary(angles, method, c) for c in ("z_sd@1e-4", "coverage_95@1e-4"))
            color = COLORS[parts.index(method[0])]
            upper.errorbar(z[0], covered[0], covered[1], z[1], fmt="o", ms=3.5, color=color, lw=0.8)
            upper.annotate(method[1], (z[0], covered[0]), fontsize=5, xytext=(3, 2), textcoords="offset points")
        upper.set(xscale="log", xlabel="z-sd", ylabel="coverage of 95 % intervals", title=f"{angles} angles")
        shown = [m for m in found.methods if not math.isnan(found.summary(angles, m, "gain")[0])]
        shown.sort(key=lambda m: found.summary(angles, m, "gain")[0])
        shown = [m for m in shown if found.summary(angles, m, "gain")[0] > -3][-24:]
        for place, method in enumerate(shown):
            gain, error = found.summary(angles, method, "gain")
            color = COLORS[parts.index(method[0])] if method[0] in parts else "0.4"
            lower.errorbar(gain, place, xerr=error, fmt="o", ms=3.5, color=color, lw=1.0)
        lower.axvline(0, color="0.6", lw=0.8)
        lower.set_yticks(range(len(shown)), [m[1] for m in shown], fontsize=6)
        lower.set(xlabel="log-likelihood per pixel above the oracle, floor 1e-4")
    for index, part in enumerate(parts):
        axes[0].plot([], [], "o", ms=3.5, color=COLORS[index], label=part)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = common.parser(__doc__, quick="two glyphs")
    parser.add_argument("--glyphs", type=int, nargs="+", help="others than the 30")
    parser.add_argument("--angles", type=int, nargs="+", default=list(ANGLES))
    parser.add_argument("--nets", nargs="+", choices=[*NETS, REFERENCES, TRAINED], default=[*NETS, REFERENCES, TRAINED])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    arguments = parser.parse_args()
    if common.absent(arguments.data, "ct/kmnist_glyphs.npz"):
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    glyphs = arguments.glyphs or (GLYPHS[:2] if arguments.quick else GLYPHS)
    other = "_".join(map(str, arguments.glyphs)) if arguments.glyphs else "quick" if arguments.quick else ""
    path = arguments.out / f"ct_kmnist{'_' if other else ''}{other}.csv"
    rows = load(path)
    done = {(int(row["glyph"]), int(row["angles"]), row["part"]) for row in rows}
    wanted = {
        (glyph, angles, part): None
        for part, count in STAGES
        for glyph in sorted(glyphs, key=lambda g: (g % 30, g))
        for angles in arguments.angles
        if part in arguments.nets and (arguments.glyphs or glyph % 30 in TILES[:count])
    }
    jobs: list[Job] = [(*key, str(arguments.data), str(arguments.out)) for key in wanted if key not in done]
    start = time.perf_counter()
    if jobs and not arguments.report:
        with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
            for count, found in enumerate(pool.imap_unordered(work, jobs), 1):
                rows += found
                common.write_rows(path, rows)
                glyph, angles, part = (found[0][key] for key in ("glyph", "angles", "part"))
                seconds = time.perf_counter() - start
                print(f"[{count}/{len(jobs)}] glyph {glyph}, {angles} angles, {part}: {seconds:.0f} s", flush=True)
    results = Results(
        sorted(rows, key=lambda r: ([*NETS, REFERENCES, TRAINED].index(r["part"]), r["angles"], r["glyph"]))
    )
    text = report(results)
    print(text)
    common.write(path.with_suffix(".md"), text)
    draw(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
