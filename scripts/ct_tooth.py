"""A tooth from a part of its views: reconstruction and error map of real synchrotron data.

181 parallel views of 640 columns (raw counts with white and dark fields; tomopy's example), detectors binned by five.
`--views` of them, at equal distances, are reconstructed on 128 × 128 pixels by a deep image prior, whose tangent model
gets precisions and noise from the evidence (Poisson weights, one learned factor) and an error map from 64 draws. The
others check it twice: as a reference image (regularised least squares of all 181 views, which has errors of its own),
and as rays that were not seen.

    python scripts/ct_tooth.py [--views 30] [--size 128] [--data FOLDER] [--out docs/results]

FOLDER holds ct/tooth.npz; without it the script says so and stops. At most 8 GiB and 30 minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import resource
import time
from pathlib import Path
from typing import Any

import torch

from ntkgp.cli.ct import CTOptions, Scan, Tomogram, reconstruct
from ntkgp.evaluation.metrics.images import psnr, ssim
from ntkgp.evaluation.plots_images import image_report
from ntkgp.inverse import RayTransform, load_sinogram
from ntkgp.inverse.references import fbp_reference, tv_reference

AXIS, BINNING = 296.0, 5
DAMPING = 1e-4  # of the reference
CHECKED = 15


def load(data: Path, size: int, views: int) -> tuple[Scan, torch.Tensor]:
    """The views that are used, with others to check, and the reference image."""
    scan = load_sinogram(data / "ct" / "tooth.npz", (size, size), binning=BINNING, rotation_axis=AXIS)
    total = len(scan.data)
    reference = RayTransform(scan.geometry).pinv(scan.data, DAMPING)
    taken = (torch.arange(views) * total) // views
    rest = torch.ones(total, dtype=torch.bool)
    rest[taken] = False
    part, left = scan[taken], scan[rest]
    left = left[(torch.arange(CHECKED) * len(left.data)) // CHECKED]
    assert part.variance is not None
    others = left.data, left.geometry
    return Scan(part.data, part.geometry, sd=part.variance.sqrt(), truth=reference, others=others), reference


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--views", type=int, default=30)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--norm", choices=("group", "none"), default="none")
    parser.add_argument("--groups", choices=("single", "block"), default="single")
    parser.add_argument("--iterations", type=int, default=20_000)
    parser.add_argument("--max-memory", default="5GiB")
    arguments = parser.parse_args()
    if not (arguments.data / "ct" / "tooth.npz").is_file():
        print(f"skipped: no {arguments.data / 'ct' / 'tooth.npz'}")
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
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    scores = found.scores
    assert scores is not None
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in found.seconds.items())
    lines = [
        f"# A tooth from {len(scan.y)} of 181 views", "",
        f"Made by `python scripts/ct_tooth.py --views {arguments.views} --size {arguments.size}`; what it does: its "
        "docstring.", "",
        f"{scan.geometry}; {found.model.form} form, {found.model.lin.num_parameters} weights. {spent}; "
        f"{seconds:.0f} s in all, {peak:.1f} GiB at the most.", "",
        "| method | PSNR against the reference | SSIM | s |", "|---|---|---|---|",
        *(f"| {r['method']} | {r['psnr']:.2f} | {r['ssim']:.3f} | {r['seconds']:.0f} |" for r in rows), "",
        f"Rays that were not seen: {found.check}.", "",
        "Against the reference, which is least squares of all views and noisy itself:", "",
        "```", str(scores), "```", "",
        f"Noise factor of the Poisson weights: {float(found.model.likelihood.noise.detach()):.3g} learned variance at "
        "the geometric mean weight.",
        *(f"Warning: {text}." for text in found.warnings), "", "```", str(found.report), "```", "",
    ]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "ct_tooth.md").write_text(text, encoding="utf-8")
    with (arguments.out / "ct_tooth.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = image_report(
        found.image, found.sd.square(), reference, floor=0.0, unit="per mm",
        title=f"tooth, {len(scan.y)} of 181 views; 'truth' is least squares of all",
    )  # fmt: skip
    figure.savefig(arguments.out / "ct_tooth.png", dpi=120)


if __name__ == "__main__":
    main()
