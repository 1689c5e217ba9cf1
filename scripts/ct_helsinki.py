"""Thirty degrees of a turn: what a limited-angle scan leaves open, on real data of the Helsinki challenge 2022.

An acrylic disc with holes in a fan beam, 61 views over 30°, 560 detectors binned by five. Every second view of the
first 25° is reconstructed on 128 × 128 pixels by a deep image prior; its tangent model gives 64 draws. There is no true
image in the file, so three things are checked instead:

* views in between, and views beyond the last one used, against what the model expects of them;
* the directions of the uncertainty: a view measures the Fourier coefficients of the image along its detector, so the
  posterior variance should lie in the wedge of directions that no ray looked across. Reported is the posterior variance
  relative to the prior's, for frequencies inside and outside of what was measured.

    python scripts/ct_helsinki.py [--quick] [--phantom ta | tb] [--size 128] [--data FOLDER] [--out docs/results]

FOLDER holds ct/htc2022/<phantom>_category7.mat; without it the script says so and stops.
"""

from __future__ import annotations

import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import common
from ntkgp.cli.ct import CTOptions, PredictiveCheck, Scan, Tomogram, predictive_check, reconstruct
from ntkgp.evaluation.plots import new_figure
from ntkgp.inverse import FanBeam, RayTransform, load_sinogram
from ntkgp.inverse.measured import Sinogram
from ntkgp.inverse.references import tv_reference
from ntkgp.models import InverseNTKGP

BINNING, USED, DRAWS = 5, 50, 64
LOW, HIGH = 0.05, 0.45  # of the sampling rate: below all directions are alike, above nothing is


def covered(geometry: FanBeam) -> tuple[float, float]:
    """First and last direction in degrees along which frequencies were measured: of the detector, fan included."""
    reach = float(geometry.detector_coordinates.abs().max()) / geometry.source_detector
    # Rays outside the image say nothing: the fan is that of the field.
    field = geometry.image_shape[1] * geometry.pixel_size / 2 / geometry.source_origin
    fan = math.degrees(min(math.atan(reach), math.asin(min(field, 1.0))))
    return float(torch.rad2deg(geometry.angles.min())) - fan, float(torch.rad2deg(geometry.angles.max())) + fan


def directions(size: int) -> tuple[Tensor, Tensor]:
    """Direction in degrees (mod 180, x to the right and y up) and length in cycles per pixel of every frequency."""
    k = torch.fft.fftfreq(size, dtype=torch.float64)
    rows, columns = torch.meshgrid(k, k, indexing="ij")
    return torch.rad2deg(torch.atan2(-rows, columns)) % 180, torch.hypot(rows, columns)


def power(images: Tensor) -> Tensor:
    """Mean power of images around zero at every frequency."""
    return torch.fft.fft2(images).abs().square().mean(0) / images[0].numel()


def inside(direction: Tensor, first: float, last: float) -> Tensor:
    """Whether directions are between two, modulo half a turn."""
    return (direction - first) % 180 <= last - first


@dataclass(frozen=True)
class Spectrum:
    """The posterior's power by frequency beside the prior's.

    :param first: and ``last``, the directions in degrees between which frequencies were measured.
    :param ratio: posterior over prior standard deviation at every frequency.
    :param measured: and ``missing``, the same of all frequencies of the band in and out of these directions.
    :param share: of the posterior variance in the missing wedge.
    :param unseen: standard deviation of the pixels by the missing wedge alone.
    """

    first: float
    last: float
    ratio: Tensor
    measured: float
    missing: float
    share: float
    unseen: Tensor


def spectrum(geometry: FanBeam, deviations: Tensor, prior: Tensor) -> Spectrum:
    """Of draws around the reconstruction, and of draws of the prior."""
    direction, length = directions(deviations.shape[-1])
    first, last = covered(geometry)
    band = (length > LOW) & (length < HIGH)
    seen = inside(direction, first, last)
    left = power(deviations), power(prior)
    measured, missing = (
        math.sqrt(float(left[0][band & part].sum() / left[1][band & part].sum())) for part in (seen, ~seen)
    )
    share = float(left[0][band & ~seen].sum() / left[0][band].sum())
    wedge = torch.where(band & ~seen, 1.0, 0.0)
    unseen = torch.fft.ifft2(torch.fft.fft2(deviations) * wedge).real.square().mean(0).sqrt()
    return Spectrum(first, last, (left[0] / left[1]).sqrt(), measured, missing, share, unseen)


def prior_draws(model: InverseNTKGP, size: int) -> Tensor:
    """Images drawn from the fitted prior, around zero."""
    weights = torch.randn(DRAWS, model.lin.num_parameters, generator=torch.Generator().manual_seed(1))
    scale = model.lin.groups.expand(model.kernel.precision.detach()).rsqrt()
    with torch.no_grad():
        return model.lin.jvp(model.lin.rows_of(1), weights.to(scale) * scale)[..., 0].reshape(DRAWS, size, size)


def page(
    phantom: str, used: Sinogram, found: Tomogram, checks: dict[str, PredictiveCheck], wedge: Spectrum,
    seconds: float,
) -> str:  # fmt: skip
    """Tables, and what they say of the missing wedge."""
    size = used.geometry.image_shape[0]
    lines = [
        f"# Helsinki challenge, phantom {phantom}: 25° of a turn", "",
        f"Made by `python scripts/ct_helsinki.py --phantom {phantom} --size {size}`; what it does: its "
        "docstring.", "",
        "![tomograms, error map, its part in the missing wedge, and its spectrum](ct_helsinki.png)", "",
        f"{used.geometry}; {found.model.form} form. "
        + ", ".join(f"{name} {value:.0f} s" for name, value in found.seconds.items())
        + f"; {seconds:.0f} s in all on one thread beside other work. The fit was stopped by "
        f"{found.dip.stopped_by} after {found.dip.iteration} iterations.", "",
        "| views left out | number | RMS error | z RMS | in the 95 % intervals |", "|---|---|---|---|---|",
        *(f"| {n} | {c.views} | {c.rmse:.4g} | {c.z_sd:.2f} | {100 * c.covered:.1f} % |" for n, c in checks.items()),
        "",
        f"Frequencies along {wedge.first:.0f}° to {wedge.last:.0f}° were measured, "
        f"{100 * (wedge.last - wedge.first) / 180:.0f} % of all directions. Posterior over prior standard deviation: "
        f"{wedge.measured:.3f} there, {wedge.missing:.3f} in the missing wedge, which holds {100 * wedge.share:.0f} % "
        "of the posterior variance. The error map "
        + ("marks the missing wedge." if wedge.missing > 2 * wedge.measured else "does not mark it."), "",
        *(f"Warning: {text}." for text in found.warnings), "", "```", str(found.report), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def write_csv(path: Path, checks: dict[str, PredictiveCheck], wedge: Spectrum) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["views", "number", "rmse", "z_sd", "covered"])
        writer.writerows([name, *check] for name, check in checks.items())
        writer.writerow(["posterior over prior sd, measured", "", wedge.measured, "", ""])
        writer.writerow(["posterior over prior sd, missing", "", wedge.missing, "", ""])


def draw(path: Path, used: Sinogram, found: Tomogram, wedge: Spectrum, tv: Tensor) -> None:
    """Tomograms, the error map and its part in the missing wedge, and the spectrum."""
    figure, axes = new_figure(2, 3, (11.0, 7.0))
    top = float(found.image.max())
    panels = (
        ("FBP", RayTransform(used.geometry).fbp(used.data), "gray", (0.0, top)),
        ("total variation", tv, "gray", (0.0, top)),
        ("deep image prior", found.image, "gray", (0.0, top)),
        ("standard deviation", found.sd, "magma", (0.0, float(found.sd.max()))),
        ("its part in the missing wedge", wedge.unseen, "magma", (0.0, float(found.sd.max()))),
    )
    for ax, (title, image, cmap, (low, high)) in zip(axes, panels, strict=False):
        shown = ax.imshow(image.numpy(), cmap=cmap, vmin=low, vmax=high)
        ax.set(title=title, xticks=[], yticks=[])
        figure.colorbar(shown, ax=ax, fraction=0.046, pad=0.02)
    ratio = torch.fft.fftshift(wedge.ratio).clamp(0, 1)
    axes[5].imshow(ratio.numpy(), cmap="viridis", vmin=0, vmax=1, extent=(-0.5, 0.5, -0.5, 0.5))
    for angle in (wedge.first, wedge.last):
        x, y = 0.5 * math.cos(math.radians(angle)), 0.5 * math.sin(math.radians(angle))
        axes[5].plot([-x, x], [-y, y], color="w", lw=0.8)
    axes[5].set(title="posterior / prior sd by frequency", xlabel="measured between the lines", xlim=(-0.5, 0.5))
    axes[5].grid(visible=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = common.parser(__doc__, quick="few pixels and iterations: no result")
    parser.add_argument("--phantom", choices=("ta", "tb"), default="ta")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--norm", choices=("group", "none"), default="none")
    parser.add_argument("--groups", choices=("single", "block"), default="single")
    parser.add_argument("--iterations", type=int, default=20_000)
    parser.add_argument("--max-memory", default="5GiB")
    arguments = common.parse(parser, size=32, iterations=60)
    file = f"ct/htc2022/{arguments.phantom}_category7.mat"
    if common.absent(arguments.data, file):
        return
    torch.set_num_threads(1)
    size, start = arguments.size, time.perf_counter()
    whole = load_sinogram(arguments.data / file, (size, size), binning=BINNING)
    used, between, beyond = whole[:USED:2], whole[1:USED:6], whole[USED + 1 :: 2]
    assert isinstance(used.geometry, FanBeam)
    options = CTOptions(
        None, arguments.out, size=size, norm=arguments.norm, groups=arguments.groups, iterations=arguments.iterations,
        max_memory=arguments.max_memory,
    )  # fmt: skip
    found = reconstruct(Scan(used.data, used.geometry), options)
    model = found.model
    draws = found.draws
    if draws is None:
        draws = model.sample(DRAWS, torch.Generator().manual_seed(0))
    checks = {
        "between the views used": predictive_check(model, draws, between.data, between.geometry),
        "beyond the last of them": predictive_check(model, draws, beyond.data, beyond.geometry),
    }
    wedge = spectrum(used.geometry, draws - found.image, prior_draws(model, size))
    tv = tv_reference(used.data, RayTransform(used.geometry), float(model.noise_variance.mean().sqrt()))
    text = page(arguments.phantom, used, found, checks, wedge, time.perf_counter() - start)
    print(text)
    written = common.page_of(arguments, "ct_helsinki")
    common.write(written, text)
    write_csv(written.with_suffix(".csv"), checks, wedge)
    draw(written.with_suffix(".png"), used, found, wedge, tv.mean)


if __name__ == "__main__":
    main()
