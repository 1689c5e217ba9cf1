"""The ray transform against ASTRA's CPU projector: time to build, time per product, exactness of the adjoint.

    python -m benchmarks.projector [--quick] [--threads 1] [--repeats 7] [--write]

Parallel beam, as many detectors as see the whole image, float32 images; CPU seconds / threads, medians of runs in turn
in one process. ASTRA (`pip install astra-toolbox`) computes its rays anew in every product and has nothing to build;
without it only ntkgp is measured. The adjoint's error is ⟨Ax, y⟩ − ⟨x, Aᵀy⟩ relative to ‖Ax‖‖y‖, the last column
the difference of the projections from ntkgp's in float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.timing import alternate, measure
from ntkgp.inverse.geometry import ParallelBeam
from ntkgp.inverse.operators import RayTransform

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "projector.md"
SIZES = ((128, 60), (256, 60), (501, 60))
QUICK = ((24, 6),)
HEADINGS = (
    "pixels",
    "views × detectors",
    "projector",
    "build s",
    "forward ms",
    "adjoint ms",
    "adjoint error",
    "to ntkgp",
)

Product = Callable[[Tensor], Tensor]


@dataclass
class Projector:
    """Two products and what it took to make them."""

    name: str
    forward: Product
    adjoint: Product
    build: float


def ours(geometry: ParallelBeam, dtype: torch.dtype) -> Projector:
    cost, operator = measure(lambda: RayTransform(geometry, dtype=dtype))
    assert isinstance(operator, RayTransform)
    name = "ntkgp" if dtype == torch.float32 else "ntkgp float64"

    def cast(product: Product) -> Product:
        return lambda value: product(value.to(dtype))

    return Projector(name, cast(operator), cast(operator.adjoint), cost.cpu / torch.get_num_threads())


def astras(geometry: ParallelBeam) -> Projector | None:
    try:
        import astra
    except ImportError:
        return None
    height, width = geometry.image_shape
    scan = astra.create_proj_geom(
        "parallel", geometry.detector_size, geometry.num_detectors, geometry.angles.numpy()
    )  # fmt: skip
    tomograph: Any = astra.OpTomo(astra.create_projector("linear", scan, astra.create_vol_geom(height, width)))

    def product(function: Callable[[np.ndarray], np.ndarray]) -> Product:
        return lambda value: torch.from_numpy(np.asarray(function(value.numpy())))

    return Projector("ASTRA linear", product(tomograph.FP), product(tomograph.BP), 0.0)


def mismatch(projector: Projector, x: Tensor, y: Tensor) -> float:
    """Of the adjoint, with y near Ax."""
    forward = projector.forward(x).double()
    y = (y - 0.5) * float(forward.norm() / (y - 0.5).norm()) + forward.float()
    backward = projector.adjoint(y).double()
    return float(((forward * y).sum() - (x * backward).sum()).abs() / (forward.norm() * y.double().norm()))


def compare(pixels: int, views: int, repeats: int) -> list[tuple[str, ...]]:
    """One line of the table for each projector."""
    geometry = ParallelBeam((pixels, pixels), torch.arange(views) * math.pi / views)
    found = [ours(geometry, torch.float32), ours(geometry, torch.float64), astras(geometry)]
    projectors = [projector for projector in found if projector is not None]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(geometry.image_shape, generator=generator)
    y = torch.rand(geometry.data_shape, generator=generator)
    forwards = alternate({p.name: partial(p.forward, x) for p in projectors}, repeats)
    adjoints = alternate({p.name: partial(p.adjoint, y) for p in projectors}, repeats)
    expected = projectors[0].forward(x).double()
    lines = []
    for p in projectors:
        forward, adjoint = (1000 * seconds[p.name] / torch.get_num_threads() for seconds in (forwards, adjoints))
        apart = float((p.forward(x).double() - expected).norm() / expected.norm())
        lines.append(
            (
                f"{pixels}²", f"{views} × {geometry.num_detectors}", p.name, f"{p.build:.2f}", f"{forward:.1f}",
                f"{adjoint:.1f}", f"{mismatch(p, x, y):.0e}", f"{apart:.0e}",
            )
        )  # fmt: skip
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small size, to see that everything runs")
    parser.add_argument("--write", action="store_true", help="write the table to docs/results/projector.md")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    rows: list[tuple[str, ...]] = []
    for pixels, views in QUICK if chosen.quick else SIZES:
        new = compare(pixels, views, chosen.repeats)
        print(report.text_table(HEADINGS, new) + "\n", flush=True)
        rows += new
    if chosen.write:
        words = __doc__.split("\n\n")
        PAGE.write_text(
            f"# {words[0].rstrip('.')}\n\n{words[2]}\n{report.markdown_table(HEADINGS, rows)}\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
