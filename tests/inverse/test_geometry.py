"""Geometries and the system matrix: orientation, units, an independent scalar Joseph matrix, and everything refused."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkgp.inverse.geometry import FanBeam, Geometry, ParallelBeam, Rays
from ntkgp.inverse.operators import RayTransform
from ntkgp.inverse.rays import system_matrix

DOUBLE = torch.float64
FAN: dict[str, Any] = {"source_origin": 40.0, "source_detector": 70.0}


def spread(views: int, period: float = math.pi, start: float = 0.1) -> Tensor:
    return start + torch.arange(views, dtype=DOUBLE) * period / views


def joseph(geometry: Geometry) -> Tensor:
    """The matrix entry by entry, by walking along each ray."""
    height, width = geometry.image_shape
    xs, ys = (c.tolist() for c in geometry.pixel_centres())
    size = geometry.pixel_size
    points, directions = (r.reshape(-1, 2).tolist() for r in geometry.rays())
    out = torch.zeros(len(points), height, width, dtype=DOUBLE)
    for i, ((px, py), (dx, dy)) in enumerate(zip(points, directions, strict=True)):
        if abs(dy) >= abs(dx):
            for r in range(height):
                place = (px + (ys[r] - py) / dy * dx - xs[0]) / size
                c = math.floor(place)
                for column, weight in ((c, c + 1 - place), (c + 1, place - c)):
                    if 0 <= column < width:
                        out[i, r, column] += weight * size / abs(dy)
        else:
            for c in range(width):
                place = (ys[0] - (py + (xs[c] - px) / dx * dy)) / size
                r = math.floor(place)
                for row, weight in ((r, r + 1 - place), (r + 1, place - r)):
                    if 0 <= row < height:
                        out[i, row, c] += weight * size / abs(dx)
    return out.flatten(1)


GEOMETRIES: dict[str, Geometry] = {
    "parallel": ParallelBeam((7, 9), spread(11)),
    "parallel, axes and diagonals": ParallelBeam((6, 6), torch.arange(8) * 45.0, degrees=True),
    "parallel in mm": ParallelBeam(
        (8, 5), spread(7), 20, pixel_size=0.7, detector_size=0.4, detector_offset=0.33, image_centre=(0.5, -0.2)
    ),
    "fan": FanBeam((7, 9), spread(13, 2 * math.pi), **FAN),
    "fan in mm": FanBeam((6, 8), spread(9, 5.0), 30, pixel_size=0.5, rotation_axis=13.2, image_centre=(1, 2), **FAN),
    "rays": Rays((6, 5), torch.linspace(-2, 2, 24).reshape(3, 4, 2), torch.linspace(-1, 1.1, 24).reshape(3, 4, 2)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_matrix_is_that_of_a_walk_along_every_ray(name: str) -> None:
    geometry = GEOMETRIES[name]
    matrix = RayTransform(geometry).matrix()
    assert (matrix - joseph(geometry)).abs().max() < 1e-12
    assert matrix.shape == (geometry.num_measurements, geometry.num_pixels)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    angles=st.lists(st.floats(-7, 7), min_size=1, max_size=4),
    sizes=st.tuples(st.floats(0.2, 3), st.floats(0.2, 3)),
    offset=st.floats(-2, 2),
    detectors=st.integers(1, 9),
    fan=st.booleans(),
)
def test_any_geometry_is_a_walk_along_every_ray(
    shape: tuple[int, int], angles: list[float], sizes: tuple[float, float], offset: float, detectors: int, fan: bool
) -> None:
    options: dict[str, Any] = {"pixel_size": sizes[0], "detector_size": sizes[1], "detector_offset": offset}
    if fan:
        geometry: Geometry = FanBeam(shape, angles, detectors, **options, **FAN)
    else:
        geometry = ParallelBeam(shape, angles, detectors, **options)
    expected = joseph(geometry)
    if expected.max() < 1e-6:
        return
    A = RayTransform(geometry)
    assert (A.matrix() - expected).abs().max() < 1e-8 * sizes[0]
    assert A.dot_test() < 1e-12


def asymmetric() -> Tensor:
    """An F of brightness that grows to the right and downwards: no symmetry of the square leaves it as it is."""
    image = torch.zeros(8, 8, dtype=DOUBLE)
    image[1:7, 2] = image[1, 2:6] = image[3, 2:5] = 1.0
    return image * (1 + torch.arange(8) / 10 + torch.arange(8)[:, None] / 7)


def test_orientation_of_the_image() -> None:
    image = asymmetric()
    A = RayTransform(ParallelBeam((8, 8), [0, 90, 180, 270], 8, degrees=True, pixel_size=0.5))
    across, upwards, back, downwards = A(image) / 0.5
    assert torch.allclose(across, image.sum(0))
    assert torch.allclose(upwards, image.sum(1).flip(0))  # from the bottom row to the top one
    assert torch.allclose(back, image.sum(0).flip(0))
    assert torch.allclose(downwards, image.sum(1))


def test_a_fan_from_far_away_is_parallel() -> None:
    angles = spread(8, 2 * math.pi)
    parallel = RayTransform(ParallelBeam((8, 8), angles, 15))
    fan = RayTransform(FanBeam((8, 8), angles, 15, source_origin=1e7, source_detector=1e7 + 5))
    assert torch.allclose(parallel(asymmetric()), fan(asymmetric()), atol=1e-5)


def test_rays_of_a_fan_run_from_the_source_to_the_detector() -> None:
    geometry = FanBeam((8, 8), [0.0, 0.7], 5, detector_size=2.0, detector_offset=0.5, **FAN)
    points, directions = geometry.rays()
    for view, t in enumerate((0.0, 0.7)):
        source = torch.tensor([40 * math.sin(t), -40 * math.cos(t)], dtype=DOUBLE)
        assert torch.allclose(points[view], source.expand(5, 2))
        for j, s in enumerate((-3.5, -1.5, 0.5, 2.5, 4.5)):
            pixel = [-30 * math.sin(t) + s * math.cos(t), 30 * math.cos(t) + s * math.sin(t)]
            towards = torch.tensor(pixel, dtype=DOUBLE) - source
            assert torch.allclose(directions[view, j], towards / towards.norm())


@pytest.mark.parametrize("fan", [False, True])
def test_line_integrals_of_a_smooth_object_converge(fan: bool) -> None:
    """A Gaussian off the axis has known line integrals."""
    centre, width = torch.tensor([4.0, -2.5], dtype=DOUBLE), 3.0
    errors = []
    for n in (32, 64):
        size = 32 / n
        geometry: Geometry = (
            FanBeam((n, n), spread(9, 6.0), 64, pixel_size=size, detector_size=1.2, **FAN)
            if fan
            else ParallelBeam((n, n), spread(9), 49, pixel_size=size, detector_size=1.0)
        )
        x, y = geometry.pixel_centres()
        image = (-((x - centre[0]) ** 2 + (y[:, None] - centre[1]) ** 2) / (2 * width**2)).exp()
        points, directions = geometry.rays()
        normal = torch.stack([-directions[..., 1], directions[..., 0]], -1)
        distance = ((points - centre) * normal).sum(-1)
        exact = math.sqrt(2 * math.pi) * width * (-(distance**2) / (2 * width**2)).exp()
        errors.append(float((RayTransform(geometry)(image) - exact).norm() / exact.norm()))
    assert errors[0] < 8e-3
    assert errors[1] < 0.35 * errors[0]  # second order in the pixel size


def test_degrees_are_radians_with_another_name() -> None:
    degrees = ParallelBeam((8, 8), [0, 30, 45.5], degrees=True)
    assert torch.allclose(degrees.angles, torch.tensor([0, math.pi / 6, math.radians(45.5)], dtype=DOUBLE))
    assert torch.equal(ParallelBeam((8, 8), np.linspace(0, 3, 7)).angles, torch.linspace(0, 3, 7, dtype=DOUBLE))


def test_angles_in_the_wrong_unit_are_noticed() -> None:
    with pytest.raises(ValueError, match=r"angles: expected radians, got values up to 179.*degrees=True"):
        ParallelBeam((8, 8), torch.arange(180))
    with pytest.raises(ValueError, match="expected radians, got values up to 9"):
        ParallelBeam((8, 8), range(10))
    with pytest.warns(UserWarning, match=r"angles: with degrees=True they reach only 2.93°; are they radians"):
        ParallelBeam((8, 8), spread(10), degrees=True)
    ParallelBeam((8, 8), [0.0, 2 * math.pi, 4 * math.pi])
    FanBeam((8, 8), [0, 1, 2, 3], degrees=True, **FAN)


def test_every_pixel_is_seen_by_the_detectors_chosen_by_default() -> None:
    for shape, angles in (((28, 28), spread(5)), ((9, 31), spread(3)), ((1, 1), spread(1))):
        assert not RayTransform(ParallelBeam(shape, angles)).unseen.any()
        assert not RayTransform(FanBeam(shape, angles, **FAN)).unseen.any()
    assert ParallelBeam((28, 28), [0.0]).num_detectors == 41
    # The corner of the image is just within the outermost detectors.
    reach = float(ParallelBeam((28, 28), [0.0]).detector_coordinates[-1]) + 0.5
    assert 14 * math.sqrt(2) <= reach < 14 * math.sqrt(2) + 1


def test_detector_offset_and_rotation_axis_say_the_same() -> None:
    by_axis = ParallelBeam((8, 8), spread(3), 20, rotation_axis=11.25, detector_size=0.5)
    by_offset = ParallelBeam((8, 8), spread(3), 20, detector_offset=-0.875, detector_size=0.5)
    assert torch.equal(by_axis.detector_coordinates, by_offset.detector_coordinates)
    assert float(by_axis.detector_coordinates[11]) == pytest.approx(-0.125)


def test_a_moved_image_is_a_moved_detector_in_every_view() -> None:
    image = torch.rand(8, 8, dtype=DOUBLE)
    dx, dy = 1.5, -0.7
    moved = RayTransform(ParallelBeam((8, 8), spread(5), 25, image_centre=(dx, dy)))(image)
    for view, t in enumerate(spread(5).tolist()):
        offset = -(dx * math.cos(t) + dy * math.sin(t))
        same = RayTransform(ParallelBeam((8, 8), [t], 25, detector_offset=offset))(image)
        assert torch.allclose(moved[view], same[0], atol=1e-12)


def test_path_lengths_are_in_mm() -> None:
    image = torch.rand(9, 7, dtype=DOUBLE)
    one, large = (RayTransform(ParallelBeam((9, 7), spread(4), pixel_size=s)) for s in (1.0, 2.5))
    assert torch.allclose(2.5 * one(image), large(image))


@pytest.mark.parametrize("name", ["parallel", "fan in mm", "rays"])
@pytest.mark.parametrize(
    "chosen",
    [slice(None, None, 3), slice(1, 3), slice(None, None, -1), [0, 2], 1, -1, torch.tensor([2, 0, 2]), np.array([1])],
)
def test_subsets_are_rows_of_the_matrix(name: str, chosen: Any) -> None:
    geometry = GEOMETRIES[name]
    rows = RayTransform(geometry).matrix().reshape(*geometry.data_shape, -1)
    places = list(range(len(geometry)))[chosen] if isinstance(chosen, slice) else torch.as_tensor(chosen).reshape(-1)
    part = geometry[chosen]
    assert part.data_shape == (len(places), *geometry.data_shape[1:])
    assert torch.equal(RayTransform(part).matrix(), rows[places].flatten(0, -2))


def test_subsets_by_mask_and_by_view() -> None:
    geometry = ParallelBeam((8, 8), spread(5), 9)
    mask = torch.tensor([True, False, False, True, False])
    assert torch.equal(geometry.subset(mask).angles, geometry.angles[mask])
    assert torch.equal(geometry.subset(mask.tolist()).angles, geometry.angles[mask])
    assert [part.data_shape for part in geometry] == [(1, 9)] * 5
    assert geometry.data_shape == (5, 9)


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        (slice(5, None), ValueError, "takes none of the 5 views"),
        ([], ValueError, "takes none of the 5 views"),
        ([False] * 5, ValueError, "takes none of the 5 views"),
        ([[0, 1]], ValueError, "expected a slice, integers or a mask of the 5 views"),
        (0.5, ValueError, "expected a slice, integers or a mask"),
        ([0, 5], IndexError, "out of"),
        (5, IndexError, "out of"),
        ([True, False], IndexError, "mask"),
    ],
)
def test_bad_subsets(chosen: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ParallelBeam((8, 8), spread(5)).subset(chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"angles": []}, r"angles: expected at least one, in a list or tensor \(V,\), got shape \(0,\)"),
        ({"angles": [[0.0, 1.0]]}, r"angles: .* got shape \(1, 2\)"),
        ({"angles": 0.5}, r"angles: .* got shape \(\)"),
        ({"angles": [0.0, math.nan]}, "angles: 1 entries are NaN or infinite"),
        ({"angles": ["a"]}, "angles: expected numbers, got list"),
        ({"degrees": "yes"}, "degrees: expected True or False, got 'yes'"),
        ({"image_shape": (8,)}, r"image_shape: expected two positive integers \(rows, columns\), got \(8,\)"),
        ({"image_shape": (1, 8, 8)}, "image_shape: .* batch dimensions of the transform"),
        ({"image_shape": (8, 0)}, "image_shape"),
        ({"image_shape": (8, 8.5)}, "image_shape"),
        ({"image_shape": "88"}, "image_shape"),
        ({"num_detectors": 0}, "num_detectors: expected a positive integer, got 0"),
        ({"num_detectors": True}, "num_detectors"),
        ({"num_detectors": 4.0}, "num_detectors"),
        ({"pixel_size": 0.0}, "pixel_size: expected a positive number of mm, got 0.0"),
        ({"pixel_size": math.nan}, "pixel_size"),
        ({"detector_size": -1.0}, "detector_size: expected a positive number of mm, got -1.0"),
        ({"detector_offset": math.inf}, "detector_offset: expected a finite number"),
        ({"rotation_axis": math.nan}, "rotation_axis: expected a"),
        ({"rotation_axis": 3.0, "detector_offset": 1.0}, "rotation_axis: .* no detector_offset beside it"),
        ({"image_centre": (1.0,)}, r"image_centre: expected two finite numbers \(x, y\) in mm"),
        ({"source_origin": -1.0}, "source_origin: expected a positive number of mm"),
        ({"source_detector": 30.0}, "source_detector: expected a distance from the source not below that of the axis"),
        ({"source_origin": 5.0}, "source_origin: the source, 5 mm from the axis, passes through the image"),
    ],
)
def test_bad_scans_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"image_shape": (8, 8), "angles": spread(4), **FAN, **options}
    with pytest.raises(ValueError, match=message):
        FanBeam(**given)
    if not any(name.startswith("source") for name in options):
        with pytest.raises(ValueError, match=message):
            ParallelBeam(**{name: value for name, value in given.items() if not name.startswith("source")})


@pytest.mark.parametrize(
    ("points", "directions", "message"),
    [
        ([], [], r"points: expected at least one \(x, y\)"),
        ([[0.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]], r"directions: .* of shape \(1, 2\), got \(2, 2\)"),
        ([[0.0, math.nan]], [[1.0, 1.0]], "points: 1 entries are NaN"),
        ([[0.0, 1.0]], [[0.0, 0.0]], "directions: 1 of them have length zero"),
        ([0.0, 1.0], [0.0, 1.0], r"points: expected at least one \(x, y\), shape \(\*data_shape, 2\), got \(2,\)"),
        ([[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]], "points: expected"),
    ],
)
def test_bad_rays_are_refused_by_name(points: Any, directions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rays((8, 8), points, directions)


def test_rays_that_miss_and_matrices_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match="geometry: none of the rays meets the image"):
        RayTransform(ParallelBeam((8, 8), [0.0], 4, detector_offset=100.0))
    with pytest.raises(ValueError, match=r"max_memory: the matrix of 710 rays .* may take .* of 1 MiB"):
        RayTransform(ParallelBeam((501, 501), [0.0], 710), max_memory="1MiB")
    with pytest.raises(TypeError, match=r"dtype: expected torch.float32 or torch.float64, got torch.float16"):
        RayTransform(ParallelBeam((8, 8), [0.0]), dtype=torch.float16)
    with pytest.raises(
        TypeError, match=r"geometry: expected a ParallelBeam, FanBeam or Rays of ntkgp.inverse, got int"
    ):
        RayTransform(3)  # type: ignore[arg-type]


def test_a_ray_between_far_away_and_exactly_on_pixels() -> None:
    """A ray on a line of centres touches these alone; one half a pixel outside sees half of the edge; beyond, none."""
    points = [[-1.0, 0.0], [-1.5, 0.0], [-2.0, 0.0], [1e12, 0.0]]
    matrix = RayTransform(Rays((3, 3), points, [[0.0, 1.0]] * 4)).matrix().reshape(4, 3, 3)
    assert matrix[0].tolist() == [[1.0, 0.0, 0.0]] * 3
    assert matrix[1].tolist() == [[0.5, 0.0, 0.0]] * 3
    assert not matrix[2:].any()


def test_indices_are_int32_sorted_and_weights_of_the_dtype_asked() -> None:
    for dtype in (torch.float32, DOUBLE):
        for part in system_matrix(GEOMETRIES["fan"], dtype):
            assert part.starts.dtype == part.columns.dtype == torch.int32
            assert part.values.dtype == dtype
            assert part.values.min() > 0
            for first, last in zip(part.starts[:-1], part.starts[1:], strict=True):
                assert bool((part.columns[first:last].diff() > 0).all())


def test_an_unseen_pixel_is_reported_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    A = RayTransform(ParallelBeam((4, 6), [0.0, 0.0], 4))
    assert A.unseen.tolist() == [[True, False, False, False, False, True]] * 4
    assert "no ray crosses 8 of 24 pixels" in caplog.text
    y = torch.ones(2, 4, dtype=DOUBLE)
    assert not A.adjoint(y)[A.unseen].any()
    assert not A.pinv(y)[A.unseen].any()


def test_one_angle_is_enough_for_an_operator() -> None:
    A = RayTransform(ParallelBeam((6, 6), [0.0], 6))
    y = torch.arange(6, dtype=DOUBLE)
    assert torch.isfinite(A.fbp(y.unsqueeze(0))).all()
    assert torch.allclose(A.pinv(y.unsqueeze(0), 1e-9), (y / 6).expand(6, 6), atol=1e-6)


def test_geometries_copy_and_print() -> None:
    geometry = GEOMETRIES["fan in mm"]
    again = pickle.loads(pickle.dumps(copy.deepcopy(geometry)))
    assert all(torch.equal(a, b) for a, b in zip(again.rays(), geometry.rays(), strict=True))
    assert repr(geometry).startswith("FanBeam(image_shape=(6, 8), 9 views from 5.73° to")
    assert repr(GEOMETRIES["rays"]) == "Rays(image_shape=(6, 5), 12 rays)"
