"""``ntkgp ct``: a tomogram with an error map, from a sinogram or from a slice in DICOM whose scan is simulated."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gpytorch
import numpy as np
import torch
from torch import Tensor

from ntkgp.cli.inputs import CommandError
from ntkgp.evaluation.metrics.images import FLOORS, ImageScores, score_image
from ntkgp.evidence import EvidenceReport, fit_evidence
from ntkgp.inverse.diagnosis import diagnose
from ntkgp.inverse.dip import DeepImagePrior
from ntkgp.inverse.geometry import FanBeam, ParallelBeam
from ntkgp.inverse.measured import WATER, load_dicom, load_sinogram
from ntkgp.inverse.noise import estimate_noise
from ntkgp.inverse.operators import RayTransform
from ntkgp.inverse.packages import optional
from ntkgp.models.inverse import InverseNTKGP

VIEWS = 30  # of a simulated scan
_EXACT = 4096  # pixels up to which variances are exact
_DRAWS = 64  # beyond
_CHECKED_VIEWS = 10  # of those left out, for the predictive check
T = TypeVar("T")


@dataclass(frozen=True)
class CTOptions:
    """Arguments of ``ntkgp ct``."""

    data: Path | None
    out: Path
    example: bool = False
    size: int = 64
    views: int | None = None
    noise: float = 0.01
    layer: int = 0
    binning: int = 1
    rotation_axis: float | None = None
    groups: str = "single"
    at: str = "theta_star"
    prior: str = "predcp"
    norm: str = "none"
    output: str = "sigmoid"
    iterations: int = 20_000
    max_memory: str = "4GiB"
    seed: int = 0


@dataclass(frozen=True)
class Scan:
    """What is reconstructed.

    :param y: line integrals, (views, detectors).
    :param sd: relative standard deviations of the entries, where they are known to differ.
    :param truth: the image, where the scan was simulated or the file holds it.
    :param others: views that were measured and left out, with their geometry.
    :param about: lines for the report.
    """

    y: Tensor
    geometry: ParallelBeam | FanBeam
    sd: Tensor | None = None
    truth: Tensor | None = None
    others: tuple[Tensor, ParallelBeam | FanBeam] | None = None
    is_slice: bool = False
    about: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tomogram:
    """What was found."""

    dip: DeepImagePrior
    model: InverseNTKGP
    report: EvidenceReport
    image: Tensor
    sd: Tensor
    draws: Tensor | None
    warnings: tuple[str, ...]
    scores: ImageScores | None
    check: str | None
    seconds: dict[str, float]


class PredictiveCheck(NamedTuple):
    """Errors of views that were left out, beside what the model expects."""

    views: int
    rmse: float
    z_sd: float
    covered: float

    def __str__(self) -> str:
        return (
            f"{self.views} views left out: RMS error {self.rmse:.4g}, z RMS {self.z_sd:.2f}, "
            f"{100 * self.covered:.1f} % of the rays in the 95 % intervals"
        )


def run_ct(options: CTOptions) -> Tomogram:
    """
    Reconstruct, and write ``result.npz``, ``report.txt`` and ``figure.png``.

    :param options: arguments of the command.
    :return: everything that was found.
    :raises CommandError: a mistake in the arguments or files.
    """
    scan = read_scan(options)
    found = reconstruct(scan, options)
    options.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out / "result.npz", **arrays(scan, found))
    text = describe(scan, options, found)
    (options.out / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    try:
        draw(scan, found).savefig(options.out / "figure.png", dpi=150)
    except ImportError as error:
        print(f"no figure: {error}")
    print(f"\nwritten to {options.out}: {', '.join(sorted(p.name for p in options.out.iterdir() if p.is_file()))}")
    return found


def read_scan(options: CTOptions) -> Scan:
    """
    Read the file that the options name, or simulate a scan of the slice in it.

    :raises CommandError: no file, another format, data or options that do not fit.
    """
    if options.example == (options.data is not None):
        raise CommandError("--data, --example: expected one of the two")
    for name, least in (("size", 8), ("views", 1), ("binning", 1), ("iterations", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise CommandError(f"--{name}: expected at least {least}, got {value}")
    try:
        if options.example:
            data = optional("pydicom.data", "ntkgp[ct]")
            return _simulated(Path(data.get_testdata_file("CT_small.dcm")), options)
        assert options.data is not None
        if not options.data.is_file():
            raise CommandError(f"--data: no file {options.data}")
        if _is_dicom(options.data):
            return _simulated(options.data, options)
        return _measured(options.data, options)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CommandError(f"--data: {' '.join(str(error).split())}") from error


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


def _simulated(path: Path, options: CTOptions) -> Scan:
    """A parallel scan of a slice at its own resolution with detectors that average, and white noise."""
    if not (math.isfinite(options.noise) and options.noise > 0):
        raise CommandError(f"--noise: expected a positive part of the mean line integral, got {options.noise:g}")
    found = load_dicom(path)
    height, width = found.attenuation.shape
    side = max(height, width)
    if options.size > side:
        raise CommandError(f"--size: the slice has {side} pixels, fewer than {options.size}")
    fine = torch.zeros(side, side, dtype=torch.float64)
    top, left = (side - height) // 2, (side - width) // 2
    fine[top : top + height, left : left + width] = found.attenuation
    views, field_of_view = options.views or VIEWS, side * found.pixel_size
    angles, parts = torch.arange(views, dtype=torch.float64) * math.pi / views, max(1, round(side / options.size))
    geometry = ParallelBeam((options.size, options.size), angles, pixel_size=field_of_view / options.size)
    finer = ParallelBeam(
        (side, side), angles, parts * geometry.num_detectors, pixel_size=found.pixel_size,
        detector_size=geometry.detector_size / parts,
    )  # fmt: skip
    clean = RayTransform(finer)(fine).unflatten(-1, (geometry.num_detectors, parts)).mean(-1)
    sd = options.noise * float(clean.abs().mean())
    generator = torch.Generator().manual_seed(options.seed)
    y = clean + sd * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    truth = torch.nn.functional.interpolate(fine[None, None], (options.size, options.size), mode="area")[0, 0]
    about = [
        f"slice        {path.name}, {height} × {width} pixels of {found.pixel_size:.4g} mm; water is {WATER} per mm",
        f"simulated    {views} views of {geometry.num_detectors} detectors, scanned at {side} × {side} pixels, noise "
        f"{100 * options.noise:g} % of the mean line integral: sd {sd:.4g}",
    ]
    return Scan(y, geometry, truth=truth, is_slice=True, about=about)


def _measured(path: Path, options: CTOptions) -> Scan:
    """A sinogram with its geometry; views at equal distances of it, the others for the check."""
    given: dict[str, Any] = {} if options.rotation_axis is None else {"rotation_axis": options.rotation_axis}
    scan = load_sinogram(path, (options.size, options.size), layer=options.layer, binning=options.binning, **given)
    total = len(scan.data)
    views = options.views or total
    if views > total:
        raise CommandError(f"--views: the sinogram has {total}, fewer than {views}")
    taken = (torch.arange(views) * total) // views
    rest = torch.ones(total, dtype=torch.bool)
    rest[taken] = False
    part = scan[taken]
    about = [f"sinogram     {path.name}: {part.geometry}", f"views        {views} of {total}"]
    others = None
    if bool(rest.any()):
        left = scan[rest]
        count = min(_CHECKED_VIEWS, len(left.data))
        left = left[(torch.arange(count) * len(left.data)) // count]
        others = left.data, left.geometry
    sd = None if part.variance is None else part.variance.sqrt()
    return Scan(part.data, part.geometry, sd=sd, truth=_truth(path, options.size), others=others, about=about)


def _truth(path: Path, size: int) -> Tensor | None:
    """The array ``truth`` of an npz file."""
    if path.suffix != ".npz":
        return None
    with np.load(path, allow_pickle=False) as file:
        if "truth" not in file.files:
            return None
        truth = torch.as_tensor(np.asarray(file["truth"], dtype=np.float64))
    if tuple(truth.shape) != (size, size) or not bool(truth.isfinite().all()):
        raise ValueError(f"truth: expected finite numbers of shape {(size, size)} (--size), got {tuple(truth.shape)}")
    return truth


def reconstruct(scan: Scan, options: CTOptions) -> Tomogram:
    """
    Fit the deep image prior, its evidence and its error map.

    :raises CommandError: a scan without signal.
    """
    seconds: dict[str, float] = {}
    shown, caught = sys.stderr.isatty(), []
    A = RayTransform(scan.geometry)
    if not bool(scan.y.any()):
        raise CommandError("--data: all line integrals are zero")
    if options.output == "sigmoid" and not float(scan.y.mean()) > 0:
        raise CommandError(
            f"--output: sigmoid is for images >= 0, and the line integrals have the mean {float(scan.y.mean()):.4g}; "
            "use linear"
        )
    level = _timed(seconds, "noise", lambda: estimate_noise(scan.y, A, weights=scan.sd, progress=shown).sd)
    noise: Any = level if scan.sd is None else level * scan.sd
    unet = {"norm": None if options.norm == "none" else options.norm, "output": options.output}
    scale = 1.5 * float(A.pinv(scan.y).abs().max()) if options.output == "sigmoid" else None
    dip = DeepImagePrior(
        A, unet=unet, noise=noise, scale=scale, max_iterations=options.iterations, seed=options.seed, progress=shown
    )
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        _timed(seconds, "deep image prior", lambda: dip.fit(scan.y))
        caught += [" ".join(str(entry.message).split()) for entry in record if entry.category is UserWarning]
    weights = None if scan.sd is None else scan.sd.square().reciprocal()
    lin = dip.linearize(options.groups)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.Positive()).double()
    model = InverseNTKGP(scan.y, A, likelihood, lin, weights=weights, max_memory=options.max_memory, progress=shown)
    if model.form == "matrix_free":
        report = _timed(seconds, "evidence", lambda: model.fit_sampled_evidence(progress=shown).report)
    else:
        prior = dip.predcp(lin) if options.prior == "predcp" else None
        report = _timed(seconds, "evidence", lambda: fit_evidence(model, at=options.at, prior=prior, progress=shown))
    model.eval()
    sd, covariance, draws = _timed(seconds, "error map", lambda: _error_map(model, options.seed))
    image = model.reconstruction
    scores = None
    if scan.truth is not None:
        floors = tuple(floor * float(scan.truth.max() - scan.truth.min()) ** 2 for floor in FLOORS)
        scores = score_image(scan.truth, image, covariance, samples=draws, floors=floors)
    check = None if scan.others is None else str(predictive_check(model, draws, *scan.others))
    said = (*caught, *diagnose(model, sd))
    if model.form == "matrix_free" and options.prior != "none":
        said = (*said, f"the evidence of the matrix_free form has no hyper-prior: {options.prior} was left out")
    if report.at != options.at:
        said = (*said, f"the evidence of the {model.form} form is at {report.at}, not at {options.at} as asked for")
    if bool(A.unseen.any()):
        said = (*said, f"no ray crosses {int(A.unseen.sum())} of {A.num_pixels} pixels: only the prior speaks of them")
    return Tomogram(dip, model, report, image, sd, draws, said, scores, check, seconds)


def _timed(seconds: dict[str, float], name: str, work: Callable[[], T]) -> T:
    start = time.perf_counter()
    found = work()
    seconds[name] = time.perf_counter() - start
    return found


def _error_map(model: InverseNTKGP, seed: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Standard deviations of the pixels, and what they are of: the covariance of few pixels, or draws of many."""
    pixels = model.operator.num_pixels
    if pixels <= _EXACT and model.form != "matrix_free" and 32 * pixels**2 <= model.max_memory:
        covariance = model.pixel_covariance()
        sd = covariance.diagonal().clamp_min(0.0).sqrt()
        return sd.reshape(model.image_shape), covariance, None
    draws = model.sample(_DRAWS, torch.Generator().manual_seed(seed))
    return (draws - model.reconstruction).square().mean(0).sqrt(), None, draws


def predictive_check(
    model: InverseNTKGP, draws: Tensor | None, y: Tensor, geometry: ParallelBeam | FanBeam
) -> PredictiveCheck:
    """
    Whether other views are where the model expects them.

    :param model: in evaluation mode.
    :param draws: images of its posterior, or none for exact variances.
    :param y: the views, (views, detectors), of noise like that of the model's.
    :param geometry: of them.
    """
    B = RayTransform(geometry)
    error = (y - B(model.reconstruction)).flatten()
    if draws is None:
        variance = model(B).variance
    else:
        variance = B(draws - model.reconstruction).square().mean(0).flatten()
    z = error / (variance + float(model.noise_variance.mean())).sqrt()
    return PredictiveCheck(
        len(y), float(error.square().mean().sqrt()), float(z.square().mean().sqrt()),
        float((z.abs() < 1.96).double().mean()),
    )  # fmt: skip


def arrays(scan: Scan, found: Tomogram) -> dict[str, Any]:
    """What ``result.npz`` holds."""
    out = {"reconstruction": found.image.numpy(), "standard_deviation": found.sd.numpy(), "sinogram": scan.y.numpy()}
    out |= {"angles": scan.geometry.angles.numpy(), "pixel_size": np.array(scan.geometry.pixel_size)}
    out |= {"precision": found.report.precision.numpy(), "noise_variance": found.model.noise_variance.numpy()}
    if scan.truth is not None:
        out["truth"] = scan.truth.numpy()
    if scan.is_slice:
        out["hounsfield"] = (1000 * (found.image / WATER - 1)).numpy()
        out["hounsfield_sd"] = (1000 * found.sd / WATER).numpy()
    return out


def describe(scan: Scan, options: CTOptions, found: Tomogram) -> str:
    """Text of ``report.txt``."""
    geometry, dip = scan.geometry, found.dip
    sigma = float(found.model.noise_variance.mean().sqrt())
    level = float(torch.as_tensor(dip.noise, dtype=torch.float64).square().mean().sqrt())
    lines = [
        *scan.about,
        f"image        {options.size} × {options.size} pixels of {geometry.pixel_size:.4g} mm, values per mm",
        f"network      U-Net, norm {options.norm}, {options.output} output, {found.model.lin.num_parameters} weights; "
        f"stopped by {dip.stopped_by} at iteration {dip.best_iteration} of {dip.iteration}",
        f"GP           groups {options.groups}, hyper-prior {options.prior}, evidence at {found.report.at}, "
        f"{found.model.form}; error map " + ("exact" if found.draws is None else f"from {len(found.draws)} draws"),
        f"noise        sd {level:.4g} before the fit, {sigma:.4g} by the evidence",
        "",
        str(found.report),
        "",
        f"standard deviation of the pixels: median {float(found.sd.median()):.4g}, largest {float(found.sd.max()):.4g}"
        + (f" ({1000 * float(found.sd.max()) / WATER:.0f} HU)" if scan.is_slice else ""),
    ]
    if found.check is not None:
        lines.append(found.check)
    if found.scores is not None:
        lines += ["", "against the truth", str(found.scores)]
        if scan.is_slice:
            lines.append(f"RMSE {1000 * found.scores.rmse / WATER:.0f} HU")
    if found.warnings:
        lines += ["", *(f"warning: {text}" for text in found.warnings)]
    total = sum(found.seconds.values())
    lines += [
        "",
        "seconds      " + ", ".join(f"{k} {v:.1f}" for k, v in found.seconds.items()) + f"; {total:.1f} in all",
    ]
    return "\n".join(lines)


def draw(scan: Scan, found: Tomogram) -> Any:
    """The picture: in Hounsfield units from water where the slice is one."""
    from ntkgp.evaluation.plots_images import image_report

    unit, factor, shift = ("HU", 1000 / WATER, 1000.0) if scan.is_slice else ("per mm", 1.0, 0.0)
    truth = None if scan.truth is None else factor * scan.truth - shift
    floor = 0.0
    if found.scores is not None:
        floor = found.scores.likelihoods[0].floor * factor**2
    names = found.model.lin.groups.names
    groups = "one precision" if len(names) == 1 else f"{len(names)} precisions"
    return image_report(
        factor * found.image - shift, (factor * found.sd).square(), truth, floor=floor, unit=unit,
        title=f"{len(scan.y)} views; {groups}, evidence at {found.report.at}",
    )  # fmt: skip
