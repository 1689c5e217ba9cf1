"""A tooth from a part of its views: reconstruction and error map of real synchrotron data.

181 parallel views of 640 columns (raw counts with white and dark fields; tomopy's example), detectors binned by five.
`--views` of them, at equal distances, are reconstructed on 128 × 128 pixels by a deep image prior, whose tangent model
gets precisions and noise from the evidence (Poisson weights, one learned factor) and an error map from 64 draws. The
others check it twice: as rays that were not seen, and as a reference image, regularised least squares of all 181 views.
The reference has errors of its own. Their standard deviation is half of the difference of the reference images of the
even and the odd views, smoothed over 9 × 9 pixels, and z-scores are of the error over both deviations together. Errors
that both halves share (pixels, rings, the axis) are not in it.

    python scripts/ct_tooth.py [--quick] [--views 30] [--size 128] [--data FOLDER] [--out docs/results]

FOLDER holds ct/tooth.npz; without it the script says so and stops. At most 8 GiB and 30 minutes on one core.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

import common
from ntkgp.cli.ct import CTOptions, Scan, Tomogram, reconstruct
from ntkgp.evaluation.metrics.images import psnr, ssim
from ntkgp.evaluation.plots_images import image_report
from ntkgp.inverse import RayTransform, load_sinogram
from ntkgp.inverse.references import fbp_reference, tv_reference

AXIS, BINNING = 296.0, 5
DAMPING = 1e-4  # of the reference
CHECKED = 15
WINDOW = 9  # pixels over which the error of the reference is averaged
TOOTH = 0.25  # of the largest value of the reconstruction: what is above it, and what is near it, is the tooth


class Reference(NamedTuple):
    """Least squares of all views, and the standard deviation of its error from two halves of them."""

    image: Tensor
    sd: Tensor


def load(data: Path, size: int, views: int) -> tuple[Scan, Reference]:
    """The views that are used, with others to check, and the reference image."""
    scan = load_sinogram(data / "ct" / "tooth.npz", (size, size), binning=BINNING, rotation_axis=AXIS)
    total = len(scan.data)
    halves = [RayTransform(half.geometry).pinv(half.data, DAMPING) for half in (scan[::2], scan[1::2])]
    # The mean of two images with independent errors errs by half of their difference.
    square = (0.5 * (halves[0] - halves[1])).square()[None, None]
    sd = torch.nn.functional.avg_pool2d(square, WINDOW, 1, WINDOW // 2, count_include_pad=False)[0, 0].sqrt()
    reference = Reference(RayTransform(scan.geometry).pinv(scan.data, DAMPING), sd)
    taken = (torch.arange(views) * total) // views
    rest = torch.ones(total, dtype=torch.bool)
    rest[taken] = False
    part, left = scan[taken], scan[rest]
    left = left[(torch.arange(CHECKED) * len(left.data)) // CHECKED]
    assert part.variance is not None
    others = left.data, left.geometry
    return Scan(part.data, part.geometry, sd=part.variance.sqrt(), truth=reference.image, others=others), reference


def tooth_of(image: Tensor) -> Tensor:
    """Pixels in the tooth or at most three away from it."""
    inside = (image > TOOTH * image.max()).double()[None, None]
    return torch.nn.functional.max_pool2d(inside, 7, 1, 3)[0, 0] > 0


def z_lines(found: Tomogram, reference: Reference) -> list[str]:
    """A table of z-scores in the tooth and in the air."""
    inside, error = tooth_of(found.image), reference.image - found.image
    both = (found.sd.square() + reference.sd.square()).sqrt()
    lines = ["| pixels | number | RMS error | of the reference | sd of the map | z RMS | 95 % cover | Spearman |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, part in (("tooth", inside), ("air", ~inside)):
        z = (error / both)[part]
        rank = float(spearmanr(error[part].abs(), found.sd[part]).statistic)
        values = (error, reference.sd, found.sd)
        rms = " | ".join(f"{float(value[part].square().mean().sqrt()):.3g}" for value in values)
        lines.append(
            f"| {name} | {int(part.sum())} | {rms} | {float(z.square().mean().sqrt()):.2f} | "
            f"{100 * float((z.abs() < 1.96).double().mean()):.1f} % | {rank:.2f} |"
        )
    return lines


def rows_of(scan: Scan, found: Tomogram) -> list[dict[str, Any]]:
    """The deep image prior beside FBP and total variation, against the reference of all views."""
    A, noise = RayTransform(scan.geometry), found.model.noise_variance.sqrt()
    seconds = sum(found.seconds.values())
    images = {"deep image prior": (found.image, seconds)}
    for name, method in (("FBP", fbp_reference), ("TV", tv_reference)):
        start = time.perf_counter()
        images[name] = method(scan.y, A, noise).mean, time.perf_counter() - start
    assert scan.truth is not None
    return [
        {"method": name, "psnr": psnr(image, scan.truth), "ssim": ssim(image, scan.truth), "seconds": spent}
        for name, (image, spent) in images.items()
    ]


def page(scan: Scan, found: Tomogram, reference: Reference, rows: list[dict[str, Any]], seconds: float) -> str:
    """Tables, and what they are of."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in found.seconds.items())
    views, size = len(scan.y), scan.geometry.image_shape[0]
    lines = [
        f"# A tooth from {views} of 181 views", "",
        f"Made by `python scripts/ct_tooth.py --views {views} --size {size}`; what it does: its docstring.", "",
        "![reference, reconstruction, error, deviations, z-scores and calibration](ct_tooth.png)", "",
        f"{scan.geometry}; {found.model.form} form, {found.model.lin.num_parameters} weights. {spent}; "
        f"{seconds:.0f} s in all on one thread beside other work, {peak:.1f} GiB at the most. The fit was stopped by "
        f"{found.dip.stopped_by} after {found.dip.iteration} iterations.", "",
        "| method | PSNR against the reference | SSIM | s |", "|---|---|---|---|",
        *(f"| {r['method']} | {r['psnr']:.2f} | {r['ssim']:.3f} | {r['seconds']:.0f} |" for r in rows), "",
        f"Rays that were not seen: {found.check}.", "",
        "Against the reference, per mm:", "", *z_lines(found, reference), "",
        *(f"Warning: {text}." for text in found.warnings), "", "```", str(found.report), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__, quick="few pixels and iterations: no result")
    parser.add_argument("--views", type=int, default=30)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--norm", choices=("group", "none"), default="none")
    parser.add_argument("--groups", choices=("single", "block"), default="single")
    parser.add_argument("--iterations", type=int, default=20_000)
    parser.add_argument("--max-memory", default="5GiB")
    arguments = common.parse(parser, size=32, iterations=60, views=10)
    if common.absent(arguments.data, "ct/tooth.npz"):
        return
    torch.set_num_threads(1)
    options = CTOptions(
        None, arguments.out, size=arguments.size, norm=arguments.norm, groups=arguments.groups,
        iterations=arguments.iterations, max_memory=arguments.max_memory,
    )  # fmt: skip
    start = time.perf_counter()
    scan, reference = load(arguments.data, arguments.size, arguments.views)
    found = reconstruct(scan, options)
    rows = rows_of(scan, found)
    text = page(scan, found, reference, rows, time.perf_counter() - start)
    print(text)
    written = common.page_of(arguments, "ct_tooth")
    common.write(written, text)
    common.write_rows(written.with_suffix(".csv"), rows)
    figure = image_report(
        found.image, found.sd.square() + reference.sd.square(), reference.image, floor=0.0, unit="per mm",
        title=f"tooth, {len(scan.y)} of 181 views; 'truth' is least squares of all, and the deviations hold its own",
    )  # fmt: skip
    figure.savefig(written.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
