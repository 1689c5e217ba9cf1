"""First reconstructions: filtered backprojection, and regularised least squares for every other operator."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkgp.inverse.geometry import FanBeam, Geometry, ParallelBeam
from ntkgp.solvers import solve

if TYPE_CHECKING:
    from ntkgp.inverse.operators import ForwardOperator

FILTERS = ("ram-lak", "shepp-logan", "cosine", "hamming", "hann")

# A gap between neighbouring angles so many times the median, and no less than this, is a wedge that was not measured.
_WEDGE, _SMALLEST_WEDGE = 3.0, math.radians(10.0)
_TAPER = math.radians(10.0)


class FilteredBackprojection:
    r"""Filtered backprojection for parallel and fan beams, linear in the data and differentiable.

    Parallel: :math:`x(p) = \sum_v w_v\,(h * y_v)(p\cdot u_v)`, h the ramp filter sampled in space, w_v the part of the
    half turn that view v stands for: half the gaps to the neighbouring angles (modulo π), so that spacing may be
    irregular. A gap of more than 10° and three times the median is a missing wedge, which nothing is made up for: the
    views beside it count for the median gap, and the image keeps the streaks of a limited angle.

    Fan (flat detector at distance R of the virtual detector through the axis): the data are weighted by
    :math:`R/\sqrt{R^2 + s^2}` and by how often their ray was measured, filtered, and backprojected with
    :math:`1/U^2`, U the distance from the source along the axis in units of R. Rays measured
    twice share their weight smoothly (:math:`c(\beta)/(c(\beta) + c(\beta'))` with a taper c at both ends of the scan);
    full scans, short scans and limited angles are one formula.

    :param geometry: of the data.
    :param filter: window on the ramp, one of ``"ram-lak"`` (none), ``"shepp-logan"``, ``"cosine"``, ``"hamming"``,
        ``"hann"``, from sharp to smooth.
    :param cutoff: frequency where the window ends, as a fraction of the highest that the detector resolves, in (0, 1].
    :raises ValueError: another filter or cutoff; a list of rays, which has no views to filter.

    Cost: a Fourier transform of every view and V·H·W interpolations per image.

    Sources: Kak & Slaney 1988, *Principles of computerized tomographic imaging*, sections 3.3 and 3.4; Noo, Defrise,
    Clackdoyle & Kudo 2002, *Image reconstruction from fan-beam projections on less than a short scan*, for the weights.

    >>> geometry = ParallelBeam((16, 16), torch.arange(12) * torch.pi / 12)
    >>> FilteredBackprojection(geometry, "hann")(torch.rand(3, 12, 25)).shape
    torch.Size([3, 16, 16])
    """

    def __init__(self, geometry: Geometry, filter: str = "ram-lak", cutoff: float = 1.0) -> None:
        if not isinstance(geometry, ParallelBeam | FanBeam):
            raise ValueError(
                f"geometry: filtered backprojection needs a ParallelBeam or a FanBeam, got {type(geometry).__name__}; "
                "use A.pinv(y), regularised least squares"
            )
        if filter not in FILTERS:
            raise ValueError(f"filter: expected one of {FILTERS}, got {filter!r}")
        if not isinstance(cutoff, int | float) or not 0 < cutoff <= 1:
            raise ValueError(f"cutoff: expected a number in (0, 1], got {cutoff!r}")
        self.geometry, self.filter, self.cutoff = geometry, filter, float(cutoff)

    def __call__(self, y: Tensor) -> Tensor:  # shape: (*batch, V, D) -> (*batch, H, W)
        """The reconstruction, in the dtype of y."""
        geometry = self.geometry
        detectors = geometry.detector_coordinates
        if isinstance(geometry, FanBeam):
            shrink = geometry.source_origin / geometry.source_detector
            detectors = detectors * shrink
            spacing = geometry.detector_size * shrink
            obliqueness = geometry.source_origin / (geometry.source_origin**2 + detectors**2).sqrt()
            y = y * (obliqueness * _redundancy(geometry, detectors)).to(y)
            weights = _shares(geometry.angles, 2 * math.pi)
        else:
            spacing, weights = geometry.detector_size, _shares(geometry.angles, math.pi)
        return self._backproject(self._filtered(y, spacing), detectors, spacing, weights)

    def _filtered(self, y: Tensor, spacing: float) -> Tensor:
        """The ramp filter along the last dimension."""
        size = y.shape[-1]
        length = 2 ** math.ceil(math.log2(2 * size)) if size > 1 else 2
        # Sampled in space, not in frequency: the constant part of the image stays right.
        distance = torch.arange(length, dtype=torch.float64)
        distance = torch.minimum(distance, length - distance)
        kernel = torch.where(distance % 2 == 1, -1 / (math.pi * distance.clamp_min(1) * spacing) ** 2, 0.0)
        kernel[0] = 1 / (4 * spacing**2)
        response = torch.fft.rfft(kernel).real * spacing
        frequency = torch.linspace(0, 1, length // 2 + 1, dtype=torch.float64) / self.cutoff
        response = response * _window(self.filter, frequency)
        return torch.fft.irfft(torch.fft.rfft(y, length) * response.to(y), length)[..., :size]

    def _backproject(self, filtered: Tensor, detectors: Tensor, spacing: float, weights: Tensor) -> Tensor:
        """Σ over views of the filtered data at each pixel's shadow, interpolated linearly, zero beyond the detector."""
        geometry = self.geometry
        height, width = geometry.image_shape
        x, y = geometry.pixel_centres()
        image = filtered.new_zeros(*filtered.shape[:-2], height * width)
        padded = torch.nn.functional.pad(filtered, (1, 1))
        for view, angle in enumerate(geometry.angles.tolist()):
            along = x * math.cos(angle) + y[:, None] * math.sin(angle)  # shape: (H, W)
            scale = weights[view]
            if isinstance(geometry, FanBeam):
                distance = 1 + (y[:, None] * math.cos(angle) - x * math.sin(angle)) / geometry.source_origin
                along, scale = along / distance, scale / distance.square()
            place = ((along - detectors[0]) / spacing + 1).clamp(0, len(detectors) + 1).flatten()
            lower = place.floor().clamp_max(len(detectors))
            share, lower = (place - lower).to(filtered.device, filtered.dtype), lower.long().to(filtered.device)
            values = padded[..., view, :]
            found = values[..., lower] * (1 - share) + values[..., lower + 1] * share
            image = image + found * (scale.expand(height, width).flatten().to(found))
        return image.unflatten(-1, (height, width))


def _window(name: str, frequency: Tensor) -> Tensor:
    """Values of a window at frequencies of which 1 is its end."""
    inside = (frequency <= 1 + 1e-12).to(frequency)
    if name == "shepp-logan":
        return inside * torch.sinc(frequency / 2)
    if name == "cosine":
        return inside * torch.cos(frequency * math.pi / 2)
    if name in ("hamming", "hann"):
        constant = 0.54 if name == "hamming" else 0.5
        return inside * (constant + (1 - constant) * torch.cos(frequency * math.pi))
    return inside


def _gaps(angles: Tensor, period: float) -> tuple[Tensor, Tensor, float]:
    """Angles modulo the period in ascending order, the gap after each, and the usual gap; all (V,) of two or more."""
    around = (angles % period).sort().values
    gaps = torch.cat([around.diff(), around[:1] + period - around[-1:]])
    # Views that are repeated, up to rounding, leave no gap.
    apart = gaps[gaps > 1e-3 * period / len(angles)]
    return around, gaps, float(apart.median())


def _wedges(gaps: Tensor, usual: float) -> Tensor:
    """Which gaps are angles that were left out, and not a coarse or irregular spacing."""
    return (gaps > _WEDGE * usual) & (gaps > _SMALLEST_WEDGE)


def _shares(angles: Tensor, period: float) -> Tensor:
    """The part of the period that each angle stands for, (V,): half of the gaps to its neighbours, wedges apart."""
    if len(angles) == 1:
        return torch.full_like(angles, period)
    _, gaps, usual = _gaps(angles, period)
    gaps = torch.where(_wedges(gaps, usual), usual, gaps)
    shares = torch.empty_like(angles)
    shares[(angles % period).argsort()] = (gaps + gaps.roll(1)) / 2
    return shares


def _redundancy(geometry: FanBeam, detectors: Tensor) -> Tensor:
    """Weights (V, D) of rays that sum to one over the times that the same line was measured."""
    turn, views = 2 * math.pi, len(geometry.angles)
    if views == 1:
        return torch.ones(1, len(detectors), dtype=torch.float64)
    around, gaps, usual = _gaps(geometry.angles, turn)
    if not bool(_wedges(gaps, usual).any()):
        return torch.full((views, len(detectors)), 0.5, dtype=torch.float64)
    widest = int(gaps.argmax())
    start = float(around[(widest + 1) % views]) - usual / 2
    extent = turn - float(gaps[widest]) + usual
    fan = torch.atan(detectors / geometry.source_origin)
    overlap = extent - (math.pi - 2 * float(fan.abs().max()))
    if overlap <= 0:
        return torch.ones(views, len(detectors), dtype=torch.float64)
    taper = max(min(_TAPER, overlap / 2), 1e-6)

    def certainty(beta: Tensor) -> Tensor:
        """One inside the scan, zero outside, smooth at both ends."""
        inside = (beta - start) % turn
        edge = torch.minimum(inside, extent - inside) / taper
        return (edge.clamp(0, 1) * (math.pi / 2)).sin().square()

    angles = geometry.angles[:, None]
    own = certainty(angles).clamp_min(1e-6)
    return own / (own + certainty(angles + math.pi - 2 * fan))


def least_squares(
    operator: ForwardOperator, y: Tensor, damping: float, *, tolerance: float, max_iterations: int
) -> Tensor:
    r"""The image that minimises :math:`\|Ax - y\|^2 + \text{damping}\,\|A\|^2\,\|x\|^2`, by conjugate gradients.

    :param operator: A.
    :param y: (*batch, *data_shape).
    :param damping: above 0, relative to the largest eigenvalue of :math:`A^\top A`: directions that A scales by less
        than the root of it, relative to the most, are left out smoothly.
    :param tolerance: relative residual of the normal equations.
    :param max_iterations: largest number of products with :math:`A^\top A`; a warning says where it was not enough.
    :returns: (*batch, *image_shape), in the dtype of y; without gradients.
    :raises ValueError: a damping that is not positive, NaN or infinite data.
    """
    if not isinstance(damping, int | float) or not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping: expected a positive number, got {damping!r}")
    refuse_infinite(y)
    data = y.detach().to(torch.float64).reshape(-1, operator.num_measurements)
    forward, adjoint = operator.pair.forward, operator.pair.adjoint
    ridge = damping * operator.norm() ** 2
    with torch.no_grad():
        found = solve(
            lambda x: adjoint(forward(x.mT.contiguous())).mT + ridge * x,
            adjoint(data).mT,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
    if not found.converged:
        warnings.warn(
            f"pinv: {max_iterations} iterations left a relative residual of "
            f"{float(found.relative_residual.max()):.1e}; raise max_iterations or damping",
            UserWarning,
            stacklevel=3,
        )
    batch = y.shape[: y.ndim - len(operator.data_shape)]
    return found.solution.mT.reshape(*batch, *operator.image_shape).to(y.dtype)


def refuse_infinite(y: Tensor) -> None:
    """An error where data are NaN or infinite: one such ray would spoil a whole image."""
    if not bool(torch.isfinite(y).all()):
        raise ValueError(f"y: {int((~torch.isfinite(y)).sum())} measurements are NaN or infinite")
