"""Where the rays of a tomograph run: parallel beam, fan beam on a flat detector, and any list of rays."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from numbers import Real
from operator import index
from typing import Any, TypeVar

import torch
from torch import Tensor

_Self = TypeVar("_Self", bound="Geometry")

_FULL_TURN = 2 * math.pi
# A coordinate that differs from another by less than this fraction of a pixel is the same.
_ROUNDING = 1e-9


class Geometry:
    """Rays through an image of square pixels; the base of :class:`ParallelBeam`, :class:`FanBeam` and :class:`Rays`.

    **Coordinates**, in millimetres: the origin is the rotation axis, x runs to the right and y up. Row 0 of the image
    is the top and column 0 the left, so pixel (r, c) of an H × W image has its centre at
    x = (c − (W − 1)/2)·pixel_size and y = ((H − 1)/2 − r)·pixel_size, plus ``image_centre``.

    :param image_shape: (H, W).
    :param pixel_size: side of a pixel in mm.
    :param image_centre: (x, y) in mm of the middle of the image, from the rotation axis.
    :raises ValueError: a shape that is not two positive integers, sizes that are not positive and finite.

    ``geometry[index]`` and :meth:`subset` take a part of the views (rays, for :class:`Rays`).
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        pixel_size: float = 1.0,
        image_centre: Sequence[float] = (0.0, 0.0),
    ) -> None:
        self.image_shape = _image_shape(image_shape)
        self.pixel_size = _positive(pixel_size, "pixel_size")
        centre = tuple(image_centre)
        if len(centre) != 2 or not all(_is_number(c) for c in centre):
            raise ValueError(f"image_centre: expected two finite numbers (x, y) in mm, got {image_centre!r}")
        self.image_centre = (float(centre[0]), float(centre[1]))

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of the measurements of one image."""
        raise NotImplementedError

    @property
    def num_pixels(self) -> int:
        """H·W."""
        return math.prod(self.image_shape)

    @property
    def num_measurements(self) -> int:
        """Number of rays."""
        return math.prod(self.data_shape)

    def __len__(self) -> int:
        return self.data_shape[0]

    def rays(self) -> tuple[Tensor, Tensor]:
        """A point of every ray in mm and its unit direction, each (*data_shape, 2) in float64."""
        raise NotImplementedError

    def pixel_centres(self) -> tuple[Tensor, Tensor]:
        """The columns' x (W,) and the rows' y (H,), in mm from the rotation axis."""
        height, width = self.image_shape
        columns, rows = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (width, height))
        return columns * self.pixel_size + self.image_centre[0], -rows * self.pixel_size + self.image_centre[1]

    def subset(self: _Self, chosen: Any) -> _Self:
        """The geometry of a part of the views (rays).

        :param chosen: an integer, a slice, a list of integers or a mask, as for the first dimension of a tensor.
        :raises IndexError: an index out of range.
        :raises ValueError: what takes nothing, or is no index of one dimension.
        """
        return self._take(self.places(chosen))

    def places(self, chosen: Any) -> Tensor:
        """The numbers of the views (rays) that an index takes, as :meth:`subset` understands it.

        :raises IndexError, ValueError: as there.
        """
        places = range(len(self))
        picked = torch.tensor(list(places[chosen])) if isinstance(chosen, slice) else torch.as_tensor(chosen)
        if picked.ndim == 0 and picked.dtype != torch.bool:
            picked = picked[None]
        if not picked.numel():
            raise ValueError(f"chosen: takes none of the {len(self)} views")
        if picked.ndim != 1 or picked.is_floating_point():
            raise ValueError(f"chosen: expected a slice, integers or a mask of the {len(self)} views, got {chosen!r}")
        taken = torch.arange(len(self))[picked]
        if not len(taken):
            raise ValueError(f"chosen: takes none of the {len(self)} views")
        return taken

    def __getitem__(self: _Self, chosen: Any) -> _Self:
        return self.subset(chosen)

    def _take(self: _Self, chosen: Tensor) -> _Self:
        raise NotImplementedError


class _Scan(Geometry):
    """What scans with views and a line of detectors have in common."""

    def __init__(
        self,
        image_shape: Sequence[int],
        angles: Any,
        *,
        degrees: bool,
        pixel_size: float,
        detector_offset: float,
        rotation_axis: float | None,
        image_centre: Sequence[float],
    ) -> None:
        super().__init__(image_shape, pixel_size=pixel_size, image_centre=image_centre)
        self.angles = _angles(angles, degrees)
        if not _is_number(detector_offset):
            raise ValueError(f"detector_offset: expected a finite number in mm, got {detector_offset!r}")
        if rotation_axis is not None and (not _is_number(rotation_axis) or detector_offset != 0.0):
            raise ValueError(
                "rotation_axis: expected a (fractional) detector column and no detector_offset beside it, "
                f"got {rotation_axis!r} and {detector_offset!r}"
            )
        self.num_detectors, self.detector_size = 0, 1.0

    def _set_detector(
        self, num_detectors: int | None, needed: float, size: float, offset: float, axis: float | None
    ) -> None:
        """Detectors of this size: so many, or as many as see the whole image (an odd number)."""
        if num_detectors is None:
            num_detectors = 2 * math.ceil(needed / 2 - _ROUNDING) + 1
        count = as_count(num_detectors)
        if count is None:
            raise ValueError(f"num_detectors: expected a positive integer, got {num_detectors!r}")
        self.num_detectors, self.detector_size = count, size
        self.detector_offset = float(offset) if axis is None else ((count - 1) / 2 - float(axis)) * size

    @property
    def num_views(self) -> int:
        """Number of angles."""
        return len(self.angles)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """(views, detectors)."""
        return (self.num_views, self.num_detectors)

    @property
    def detector_coordinates(self) -> Tensor:
        """Positions s of the detectors' centres in mm, from where the rotation axis is projected to, shape (D,)."""
        d = self.num_detectors
        return (torch.arange(d, dtype=torch.float64) - (d - 1) / 2) * self.detector_size + self.detector_offset

    def _axes(self) -> tuple[Tensor, Tensor]:
        """Unit vectors u along the detector, and what is 90° ahead of it, (V, 2) each."""
        cos, sin = self.angles.cos(), self.angles.sin()
        return torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)

    def _take(self: _Self, chosen: Tensor) -> _Self:
        part = copy.copy(self)
        part.angles = self.angles[chosen]  # type: ignore[attr-defined]
        return part

    def __repr__(self) -> str:
        low, high = (float(torch.rad2deg(a)) for a in (self.angles.min(), self.angles.max()))
        return (
            f"{type(self).__name__}(image_shape={self.image_shape}, {self.num_views} views from {low:.4g}° to "
            f"{high:.4g}°, {self.num_detectors} detectors of {self.detector_size:.4g} mm)"
        )


class ParallelBeam(_Scan):
    r"""Parallel rays: at angle t the detector lies along u = (cos t, sin t), and detector j measures the line

    .. math:: \{\,s_j u + \tau\,(\sin t, -\cos t)\,\}, \qquad s_j = (j - (D-1)/2)\,\text{size} + \text{offset}.

    At t = 0 the rays run down the columns of the image, from left to right: the first view is ``pixel_size`` times its
    column sums. At 90° they run along the rows, **from the bottom** row to the top one. These are the angles of ASTRA's
    ``parallel`` geometry.

    :param image_shape: (H, W).
    :param angles: (V,), any order and spacing, **in radians**; in degrees with ``degrees=True``.
    :param num_detectors: D; by default as many as see the whole image from everywhere.
    :param degrees: whether the angles are in degrees. Radians beyond two turns (or whole numbers beyond one) are
        refused: they are degrees.
    :param pixel_size: side of a pixel in mm. Path lengths are in mm, so a reconstruction is per mm.
    :param detector_size: distance of the detectors in mm; ``pixel_size`` by default.
    :param detector_offset: s in mm of the middle of the detector, 0 where it faces the rotation axis.
    :param rotation_axis: instead of the offset, the detector column (counted from 0, maybe a fraction) to which the
        rotation axis is projected.
    :param image_centre: (x, y) in mm of the middle of the image, from the rotation axis.
    :raises ValueError: no angles, NaN, angles in the wrong unit, sizes that are not positive.

    >>> geometry = ParallelBeam((28, 28), torch.arange(10) * torch.pi / 10)
    >>> geometry.data_shape, geometry[::2].data_shape
    ((10, 41), (5, 41))
    >>> ParallelBeam((28, 28), [0, 45, 90], 40, degrees=True)
    ParallelBeam(image_shape=(28, 28), 3 views from 0° to 90°, 40 detectors of 1 mm)
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        angles: Any,
        num_detectors: int | None = None,
        *,
        degrees: bool = False,
        pixel_size: float = 1.0,
        detector_size: float | None = None,
        detector_offset: float = 0.0,
        rotation_axis: float | None = None,
        image_centre: Sequence[float] = (0.0, 0.0),
    ) -> None:
        super().__init__(
            image_shape, angles, degrees=degrees, pixel_size=pixel_size, detector_offset=detector_offset,
            rotation_axis=rotation_axis, image_centre=image_centre,
        )  # fmt: skip
        size = _positive(self.pixel_size if detector_size is None else detector_size, "detector_size")
        diagonal = math.hypot(*self.image_shape) * self.pixel_size / size
        self._set_detector(num_detectors, diagonal, size, detector_offset, rotation_axis)

    def rays(self) -> tuple[Tensor, Tensor]:
        """A point of every ray in mm and its unit direction, each (V, D, 2) in float64."""
        u, ahead = self._axes()
        points = self.detector_coordinates[:, None] * u[:, None]
        return points, (-ahead)[:, None].expand_as(points)


class FanBeam(_Scan):
    r"""Rays from a point source to a flat detector, both turning about the axis.

    At angle t the source is at :math:`R(\sin t, -\cos t)`, R = ``source_origin``, and detector j at
    :math:`(S - R)(-\sin t, \cos t) + s_j u`, S = ``source_detector``, with u = (cos t, sin t) and
    :math:`s_j = (j - (D-1)/2)\,\text{size} + \text{offset}`: ASTRA's ``fanflat``. At t = 0 the source is below the
    image, and detectors go from left to right.

    :param image_shape: (H, W).
    :param angles: (V,), **in radians**; in degrees with ``degrees=True``, as for :class:`ParallelBeam`.
    :param num_detectors: D; by default as many as see the whole image.
    :param source_origin: distance R from the source to the rotation axis in mm.
    :param source_detector: distance S from the source to the detector in mm.
    :param degrees: whether the angles are in degrees.
    :param pixel_size: side of a pixel in mm.
    :param detector_size: distance of the detectors in mm, on the detector; by default ``pixel_size`` magnified to
        there, S/R times.
    :param detector_offset: s in mm of the middle of the detector.
    :param rotation_axis: instead of the offset, the detector column to which the rotation axis is projected.
    :param image_centre: (x, y) in mm of the middle of the image, from the rotation axis.
    :raises ValueError: as :class:`ParallelBeam`; a source inside the image; a detector between source and axis.

    >>> angles = torch.arange(60) * torch.pi / 30
    >>> FanBeam((32, 32), angles, source_origin=100.0, source_detector=150.0).data_shape
    (60, 49)
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        angles: Any,
        num_detectors: int | None = None,
        *,
        source_origin: float,
        source_detector: float,
        degrees: bool = False,
        pixel_size: float = 1.0,
        detector_size: float | None = None,
        detector_offset: float = 0.0,
        rotation_axis: float | None = None,
        image_centre: Sequence[float] = (0.0, 0.0),
    ) -> None:
        super().__init__(
            image_shape, angles, degrees=degrees, pixel_size=pixel_size, detector_offset=detector_offset,
            rotation_axis=rotation_axis, image_centre=image_centre,
        )  # fmt: skip
        self.source_origin = _positive(source_origin, "source_origin")
        self.source_detector = _positive(source_detector, "source_detector")
        if self.source_detector < self.source_origin:
            raise ValueError(
                "source_detector: expected a distance from the source not below that of the axis "
                f"(source_origin={source_origin:g}), got {source_detector:g}"
            )
        reach = math.hypot(*self.image_shape) / 2 * self.pixel_size + math.hypot(*self.image_centre)
        if self.source_origin <= reach:
            raise ValueError(
                f"source_origin: the source, {source_origin:g} mm from the axis, passes through the image, which "
                f"reaches out to {reach:g} mm"
            )
        magnification = self.source_detector / self.source_origin
        size = _positive(self.pixel_size * magnification if detector_size is None else detector_size, "detector_size")
        edge = self.source_detector * reach / math.sqrt(self.source_origin**2 - reach**2)
        self._set_detector(num_detectors, 2 * edge / size, size, detector_offset, rotation_axis)

    def rays(self) -> tuple[Tensor, Tensor]:
        """The source of every ray in mm and its unit direction, each (V, D, 2) in float64."""
        u, ahead = self._axes()
        sources = (-self.source_origin * ahead)[:, None].expand(-1, self.num_detectors, -1)
        towards = self.source_detector * ahead[:, None] + self.detector_coordinates[:, None] * u[:, None]
        return sources, towards / towards.norm(dim=-1, keepdim=True)


class Rays(Geometry):
    """Any straight lines through the image, each given by a point and a direction.

    :param image_shape: (H, W).
    :param points: (*data_shape, 2): x and y in mm of a point on every ray.
    :param directions: (*data_shape, 2), of any length but zero. Rays are whole lines: the sign does not matter.
    :param pixel_size: side of a pixel in mm.
    :param image_centre: (x, y) in mm of the middle of the image.
    :raises ValueError: no rays, shapes that differ, NaN or infinite entries, a direction of length zero.

    >>> Rays((8, 8), [[0.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]).data_shape
    (2,)
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        points: Any,
        directions: Any,
        *,
        pixel_size: float = 1.0,
        image_centre: Sequence[float] = (0.0, 0.0),
    ) -> None:
        super().__init__(image_shape, pixel_size=pixel_size, image_centre=image_centre)
        self.points = _vectors(points, "points")
        directions = _vectors(directions, "directions")
        if self.points.shape != directions.shape:
            raise ValueError(
                f"directions: expected one for each of the points, of shape {tuple(self.points.shape)}, "
                f"got {tuple(directions.shape)}"
            )
        lengths = directions.norm(dim=-1, keepdim=True)
        if not bool((lengths > 0).all()):
            raise ValueError(f"directions: {int((lengths == 0).sum())} of them have length zero")
        self.directions = directions / lengths

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of the points without their last dimension."""
        return tuple(self.points.shape[:-1])

    def rays(self) -> tuple[Tensor, Tensor]:
        """A point of every ray in mm and its unit direction, each (*data_shape, 2) in float64."""
        return self.points, self.directions

    def _take(self: _Self, chosen: Tensor) -> _Self:
        part = copy.copy(self)
        part.points, part.directions = self.points[chosen], self.directions[chosen]  # type: ignore[attr-defined]
        return part

    def __repr__(self) -> str:
        return f"Rays(image_shape={self.image_shape}, {self.num_measurements} rays)"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any, name: str) -> float:
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name}: expected a positive number of mm, got {value!r}")
    return float(value)


def as_count(value: Any) -> int | None:
    """A positive integer of any kind as an int, or None for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    return index(value) if index(value) > 0 else None


def as_shape(shape: Any) -> tuple[int, ...]:
    """A shape of positive integers as a tuple, or () for anything else."""
    entries = tuple(shape) if isinstance(shape, Sequence | torch.Size) and not isinstance(shape, str) else ()
    counts = tuple(count for count in map(as_count, entries) if count is not None)
    return counts if len(counts) == len(entries) else ()


def _image_shape(shape: Any) -> tuple[int, int]:
    counts = as_shape(shape)
    if len(counts) != 2:
        raise ValueError(
            f"image_shape: expected two positive integers (rows, columns), got {shape!r}; channels and stacks of "
            "images are batch dimensions of the transform"
        )
    return counts[0], counts[1]


def _float64(value: Any, name: str) -> Tensor:
    try:
        # Numbers go to float64 at once: a list would become float32 first.
        found = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as reason:
        raise ValueError(f"{name}: expected numbers, got {type(value).__name__} ({reason})") from reason
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name}: {int((~torch.isfinite(found)).sum())} entries are NaN or infinite")
    return found


def _vectors(value: Any, name: str) -> Tensor:
    found = _float64(value, name)
    if found.ndim < 2 or found.shape[-1] != 2 or found.numel() == 0:
        raise ValueError(f"{name}: expected at least one (x, y), shape (*data_shape, 2), got {tuple(found.shape)}")
    return found


def _angles(value: Any, degrees: bool) -> Tensor:
    """Angles in radians, (V,), where the unit is believable."""
    angles = _float64(value, "angles")
    if not isinstance(degrees, bool):
        raise ValueError(f"degrees: expected True or False, got {degrees!r}")
    if angles.ndim != 1 or not len(angles):
        raise ValueError(f"angles: expected at least one, in a list or tensor (V,), got shape {tuple(angles.shape)}")
    largest = float(angles.abs().max())
    if not degrees:
        whole = bool((angles == angles.round()).all())
        if largest > 2 * _FULL_TURN or (largest > _FULL_TURN and whole):
            raise ValueError(
                f"angles: expected radians, got values up to {largest:g}; are they degrees? Then say degrees=True"
            )
        return angles
    if len(angles) > 2 and largest <= _FULL_TURN and largest > 1 and not bool((angles == angles.round()).all()):
        warnings.warn(
            f"angles: with degrees=True they reach only {largest:.3g}°; are they radians?", UserWarning, stacklevel=5
        )
    return torch.deg2rad(angles)
