"""Forward operators: exact transposes, derivatives of every kind, dtypes, first reconstructions, what is refused."""

from __future__ import annotations

import copy
import math
import pickle
import unittest
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
from linear_operator.operators import LinearOperator
from linear_operator.test import linear_operator_test_case as suites
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ntkgp.inverse.adapters import from_callables
from ntkgp.inverse.fbp import FILTERS, FilteredBackprojection
from ntkgp.inverse.geometry import FanBeam, Geometry, ParallelBeam, Rays
from ntkgp.inverse.imaging import Blur, DenseOperator, Inpainting
from ntkgp.inverse.operators import ForwardOperator, RayTransform
from ntkgp.inverse.products import ForwardLinearOperator

DOUBLE, SINGLE = torch.float64, torch.float32
FAN: dict[str, Any] = {"source_origin": 120.0, "source_detector": 180.0}


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def spread(views: int, period: float = math.pi) -> Tensor:
    return 0.1 + torch.arange(views, dtype=DOUBLE) * period / views


@cache
def operators() -> dict[str, ForwardOperator]:
    """One of every kind; none is square."""
    mask = seeded(2, 5, 4) > -0.3
    return {
        "parallel": RayTransform(ParallelBeam((6, 5), spread(4))),
        "fan, float32": RayTransform(FanBeam((6, 5), spread(5, 6.0), 7, **FAN), dtype=SINGLE),
        "rays": RayTransform(Rays((5, 6), seeded(2, 7, 2), seeded(2, 7, 2, seed=1))),
        "blur": Blur((2, 6, 5), seeded(3, 5)),
        "valid blur": Blur((6, 5), seeded(2, 3), "valid"),
        "inpainting": Inpainting(mask),
        "dense": DenseOperator(seeded(7, 12), (3, 4)),
        "selection": RayTransform(ParallelBeam((6, 5), spread(4))).select(seeded(4, 9) > 0),
        "callables": from_callables(lambda x: x.cumsum(-1)[::2], None, (4, 5), (2, 5)),
    }


NAMES = ["parallel", "fan, float32", "rays", "blur", "valid blur", "inpainting", "dense", "selection", "callables"]


@pytest.mark.parametrize("name", NAMES)
def test_the_adjoint_is_the_transpose(name: str) -> None:
    A = operators()[name]
    assert A.dot_test(DOUBLE) < 1e-12
    assert A.dot_test(SINGLE) < 1e-6
    x, y = seeded(*A.image_shape), seeded(*A.data_shape, seed=1)
    matrix = A.matrix()
    assert torch.allclose(A(x).flatten(), matrix @ x.flatten(), atol=1e-13)
    assert torch.allclose(A.adjoint(y).flatten(), matrix.mT @ y.flatten(), atol=1e-13)


def test_the_adjoint_of_a_large_transform() -> None:
    A = RayTransform(ParallelBeam((96, 128), spread(30), pixel_size=0.7, rotation_axis=80.3))
    assert A.dot_test(DOUBLE) < 1e-12
    assert A.dot_test(SINGLE) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_all_kinds(name: str) -> None:
    A = operators()[name]
    matrix = A.matrix()
    for function, shape, dense in ((A, A.image_shape, matrix), (A.adjoint, A.data_shape, matrix.mT)):
        x = seeded(2, *shape).requires_grad_()
        assert gradcheck(function, x, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(function, x, check_fwd_over_rev=True, fast_mode=True)
        point, flat = seeded(*shape), (-1, math.prod(shape))
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            assert torch.allclose(jacobian(function)(point).reshape(*flat), dense, atol=1e-12)
        hessian = torch.func.hessian(lambda v, f=function: f(v).square().sum() / 2)(point)
        assert torch.allclose(hessian.reshape(flat[1], flat[1]), dense.mT @ dense, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_any_dimension_and_with_derivatives(name: str) -> None:
    A = operators()[name]
    x = seeded(2, 3, *A.image_shape)
    expected = A(x)
    assert torch.allclose(torch.func.vmap(A)(x), expected, atol=1e-14)
    assert torch.allclose(torch.func.vmap(A, in_dims=1, out_dims=1)(x), expected, atol=1e-14)
    assert torch.allclose(torch.func.vmap(torch.func.vmap(A))(x), expected, atol=1e-14)
    last = x[0].movedim(0, -1)  # shape: (*image_shape, 3)
    assert torch.allclose(torch.func.vmap(A, in_dims=-1)(last), expected[0], atol=1e-14)
    push = torch.func.vmap(lambda t: torch.func.jvp(A, (x[0, 0],), (t,))[1])(x[0])
    assert torch.allclose(push, expected[0], atol=1e-14)
    pull = torch.func.vmap(torch.func.vjp(A, x[0, 0])[1])(expected[0])[0]
    assert torch.allclose(pull, A.adjoint(expected[0]), atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_dtypes(name: str) -> None:
    A = operators()[name]
    x = seeded(2, 1, 3, *A.image_shape)
    y = A(x)
    assert y.shape == (2, 1, 3, *A.data_shape)
    assert y.dtype == DOUBLE
    assert torch.allclose(y[1, 0, 2], A(x[1, 0, 2]), atol=1e-14)
    single = A(x.float())
    assert single.dtype == SINGLE
    assert torch.allclose(single.double(), y, atol=1e-5)
    assert A.adjoint(single).dtype == SINGLE
    assert A(x.transpose(0, 2)).shape == (3, 1, 2, *A.data_shape)  # not contiguous
    assert A(x[:0]).shape == (0, 1, 3, *A.data_shape)
    with torch.inference_mode():
        A(x), A.adjoint(single)
    leaf = seeded(*A.image_shape, dtype=SINGLE).requires_grad_()
    A(leaf).sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("name", NAMES[:-1])
def test_modules_move_copy_and_pickle(name: str) -> None:
    A = operators()[name]
    x = seeded(*A.image_shape)
    A(x.float())
    for again in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert torch.equal(again(x), A(x))
    assert not A.state_dict()
    assert not list(A.parameters())
    single = copy.deepcopy(A).to(SINGLE)
    assert torch.allclose(single(x), A(x), atol=1e-5)
    if name != "inpainting":
        assert single.dtype == SINGLE
        # Rounded entries, then exact arithmetic: not the same numbers as before.
        assert name == "fan, float32" or not torch.equal(single(x), A(x))
    holder = torch.nn.Sequential(torch.nn.Identity(), A)
    assert torch.equal(holder(x), A(x))


def test_one_operator_in_both_dtypes() -> None:
    """The other dtype's entries are the stored ones, so a float32 operator is the same map for float64 images."""
    single = operators()["fan, float32"]
    assert torch.equal(single.matrix(), single.matrix(SINGLE).double())


def test_a_selection_is_rows_of_the_matrix() -> None:
    A = operators()["parallel"]
    kept = seeded(4, 9) > 0
    part = A.select(kept)
    assert part.data_shape == (int(kept.sum()),)
    assert torch.equal(part(seeded(6, 5)), A(seeded(6, 5))[kept])
    assert torch.equal(A.select([3, 3, -1]).matrix(), A.matrix()[[3, 3, -1]])
    assert A.select([3, 3, -1]).dot_test() < 1e-12
    for bad, message in (
        (kept.mT, r"kept: expected a mask of shape \(4, 9\), got \(9, 4\)"),
        (kept & False, "kept: none of the 36 measurements"),
        (seeded(3), "kept: expected a mask or numbers of measurements"),
        ([[1, 2]], "kept: expected a mask or numbers of measurements"),
    ):
        with pytest.raises(ValueError, match=message):
            A.select(bad)
    with pytest.raises(IndexError):
        A.select([36])


def test_without_a_sparse_library_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    A = operators()["parallel"]
    x, y = seeded(3, 6, 5), seeded(3, *A.data_shape)
    expected = A(x), A.adjoint(y), A(x.float())
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    found = A(x), A.adjoint(y), A(x.float())
    assert all(torch.allclose(a, b, atol=1e-6) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    assert gradcheck(A, seeded(2, 6, 5).requires_grad_(), check_forward_ad=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda A: A(torch.ones(5, 6)), ValueError, r"x: expected shape \(\*batch, 6, 5\), got \(5, 6\); it looks tr"),
        (lambda A: A.adjoint(torch.ones(2, 9, 4)), ValueError, r"y: .* \(\*batch, 4, 9\), got \(2, 9, 4\); it looks t"),
        (lambda A: A.fbp(torch.ones(9, 4)), ValueError, r"y: expected shape .* it looks transposed"),
        (lambda A: A.pinv(torch.ones(9, 4)), ValueError, r"y: expected shape .* it looks transposed"),
        (lambda A: A.adjoint(torch.ones(6, 5)), ValueError, r"y: .* this is the shape of images"),
        (lambda A: A(torch.ones(4, 9)), ValueError, r"x: .* this is the shape of measurements"),
        (lambda A: A(torch.ones(30)), ValueError, r"x: .* it looks flat"),
        (lambda A: A(torch.ones(5)), ValueError, r"x: expected shape \(\*batch, 6, 5\), got \(5,\)$"),
        (lambda A: A(torch.ones(())), ValueError, r"x: expected shape"),
        (lambda A: A(torch.ones(6, 5, dtype=torch.int64)), TypeError, "x: expected float32 or float64, got torch.int6"),
        (lambda A: A(torch.ones(6, 5, dtype=torch.float16)), TypeError, "x: expected float32 or float64"),
        (lambda A: A(np.ones((6, 5))), TypeError, "x: expected a tensor .*, got ndarray"),
        (lambda A: A(torch.ones(6, 5, device="meta")), ValueError, "x: is on meta, the operator on cpu"),
        (lambda A: A.matrix(torch.int64), TypeError, "dtype: expected torch.float32 or torch.float64"),
        (
            lambda A: A.matrix(max_memory=100),
            ValueError,
            r"max_memory: the dense matrix \(36 × 30, torch.float64\) tak",
        ),
        (lambda A: A.pinv(torch.ones(4, 9), 0.0), ValueError, "damping: expected a positive number, got 0.0"),
        (lambda A: A.pinv(torch.full((4, 9), math.nan)), ValueError, "y: 36 measurements are NaN or infinite"),
        (lambda A: A.fbp(torch.full((4, 9), math.nan)), ValueError, "y: 36 measurements are NaN or infinite"),
        (lambda A: A.fbp(torch.ones(4, 9), "ramp"), ValueError, r"filter: expected one of \('ram-lak'"),
        (lambda A: A.fbp(torch.ones(4, 9), cutoff=1.5), ValueError, r"cutoff: expected a number in \(0, 1\], got 1.5"),
        (lambda A: A.check_data(torch.ones(2, 4, 9)), ValueError, r"y: expected one set of measurements \(4, 9\)"),
        (lambda A: A.check_data([[math.inf] * 9] * 4), ValueError, "y: 36 of 36 measurements are NaN or infinite"),
        (lambda A: A.check_data(torch.ones(9, 4)), ValueError, "y: .* it looks transposed"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    A = operators()["parallel"]
    assert A.data_shape == (4, 9)
    with pytest.raises(error, match=message):
        call(A)


def test_check_data_takes_arrays_and_integers() -> None:
    A = operators()["parallel"]
    assert A.check_data(np.ones((4, 9), dtype=np.int32)).dtype == DOUBLE
    assert A.check_data(torch.ones(4, 9)).dtype == SINGLE


class OperatorSuite(suites.RectangularLinearOperatorTestCase):
    batch: tuple[int, ...] = ()
    which = "parallel"

    def create_linear_op(self) -> LinearOperator:
        scale = 1 + 0.1 * seeded(*self.batch, dtype=SINGLE)
        return ForwardLinearOperator(scale, operators()[self.which].pair)

    def evaluate_linear_op(self, op: LinearOperator) -> Tensor:
        (scale,) = op.representation()
        return scale[..., None, None] * operators()[self.which].matrix(SINGLE)


class TestLinearOperator(OperatorSuite, unittest.TestCase):
    pass


class TestLinearOperatorBatch(OperatorSuite, unittest.TestCase):
    batch = (3,)
    which = "dense"


class TestLinearOperatorTwoBatchDimensions(OperatorSuite, unittest.TestCase):
    batch = (2, 3)
    which = "inpainting"


def test_the_linear_operator_of_a_forward_operator() -> None:
    A = operators()["parallel"]
    matrix = A.matrix()
    assert A.operator.shape == (36, 30)
    assert A.operator.dtype == DOUBLE
    assert torch.equal(A.operator.to_dense(), matrix)
    assert torch.equal(A.operator.mT.to_dense(), matrix.mT)
    assert A.operator.float().to_dense().dtype == SINGLE
    kernel = A.operator @ A.operator.mT
    y = seeded(36)
    noisy = matrix @ matrix.mT + torch.eye(36, dtype=DOUBLE)
    assert torch.allclose(kernel.add_jitter(1.0).solve(y.unsqueeze(-1))[:, 0], torch.linalg.solve(noisy, y), atol=1e-9)
    assert torch.allclose(kernel.diagonal(), (matrix @ matrix.mT).diagonal())
    x = seeded(30, 2).requires_grad_()
    assert gradcheck(lambda v: A.operator @ v, x)
    with pytest.raises(ValueError, match=r"scale: expected a tensor of shape \(\*batch,\), got float"):
        ForwardLinearOperator(1.0, A.pair)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pair: expected the products of a forward operator, got RayTransform"):
        ForwardLinearOperator(torch.ones(()), A)  # type: ignore[arg-type]


def test_norm_and_regularised_least_squares_are_those_of_the_dense_matrix() -> None:
    A = operators()["parallel"]
    matrix = A.matrix()
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    assert A.norm(200) == pytest.approx(largest, rel=1e-8)
    y = seeded(2, 4, 9)
    ridge = 1e-2 * A.norm() ** 2 * torch.eye(30, dtype=DOUBLE)
    expected = torch.linalg.solve(matrix.mT @ matrix + ridge, matrix.mT @ y.flatten(1).mT).mT
    found = A.pinv(y, 1e-2, tolerance=1e-12)
    assert torch.allclose(found.flatten(1), expected, atol=1e-10)
    assert A.pinv(y[0].float()).dtype == SINGLE
    with pytest.warns(UserWarning, match="pinv: 2 iterations left a relative residual of"):
        A.pinv(y, 1e-8, max_iterations=2)
    assert operators()["blur"].pinv(seeded(2, 6, 5)).shape == (2, 6, 5)


BLOBS = ((5.0, 8.0, 3.0, 1.0), (-9.0, -3.0, 4.0, 0.5), (2.0, -10.0, 2.5, 0.8))


def blobs(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """An image of Gaussians, and its exact line integrals."""
    x, y = geometry.pixel_centres()
    points, directions = geometry.rays()
    normal = torch.stack([-directions[..., 1], directions[..., 0]], -1)
    image, data = torch.zeros(geometry.image_shape, dtype=DOUBLE), torch.zeros(geometry.data_shape, dtype=DOUBLE)
    for cx, cy, width, height in BLOBS:
        image += height * (-((x - cx) ** 2 + (y[:, None] - cy) ** 2) / (2 * width**2)).exp()
        distance = ((points - torch.tensor([cx, cy], dtype=DOUBLE)) * normal).sum(-1)
        data += height * math.sqrt(2 * math.pi) * width * (-(distance**2) / (2 * width**2)).exp()
    return image, data


SCANS: dict[str, tuple[Geometry, float]] = {
    "half turn": (ParallelBeam((48, 40), spread(90)), 0.02),
    "axis and image moved": (ParallelBeam((48, 40), spread(90), rotation_axis=30.3, image_centre=(2.0, -1.0)), 0.02),
    "full turn, both ends": (ParallelBeam((48, 40), torch.linspace(0, 2 * math.pi, 181)), 0.02),
    "irregular": (ParallelBeam((48, 40), (math.pi * torch.linspace(0, 1, 300) ** 1.5).flip(0)), 0.02),
    "small pixels": (ParallelBeam((96, 80), spread(90), pixel_size=0.5, detector_size=0.7), 0.01),
    "fan": (FanBeam((48, 40), spread(180, 2 * math.pi), **FAN), 0.02),
    "fan, detector moved": (FanBeam((48, 40), spread(180, 2 * math.pi), 100, detector_offset=0.4, **FAN), 0.02),
    "fan, 240°": (FanBeam((48, 40), spread(120, 4 * math.pi / 3), **FAN), 0.02),
    "fan, 270°": (FanBeam((48, 40), spread(135, 3 * math.pi / 2), **FAN), 0.02),
    "fan, 220° across zero": (FanBeam((48, 40), torch.arange(-55, 55) * 2.0, degrees=True, **FAN), 0.02),
}


@pytest.mark.parametrize("name", SCANS)
def test_filtered_backprojection_reconstructs(name: str) -> None:
    geometry, tolerance = SCANS[name]
    image, data = blobs(geometry)
    found = FilteredBackprojection(geometry)(data)
    assert found.shape == geometry.image_shape
    assert (found - image).norm() / image.norm() < tolerance


@pytest.mark.parametrize("fan", [False, True])
def test_a_limited_angle_is_not_made_up_for(fan: bool) -> None:
    """120 of 180 degrees: what is reconstructed is a part of the image, and no view is blown up."""
    angles = torch.arange(60) * 2.0
    geometry = FanBeam((48, 40), angles, degrees=True, **FAN) if fan else ParallelBeam((48, 40), angles, degrees=True)
    image, data = blobs(geometry)
    found = FilteredBackprojection(geometry)(data)
    assert found.norm() < image.norm()
    assert 0.4 < (found - image).norm() / image.norm() < 0.7
    first = FilteredBackprojection(geometry)(torch.cat([data[:1], torch.zeros_like(data[1:])]))
    middle = FilteredBackprojection(geometry)(torch.cat([data[:0], torch.zeros_like(data[:30]), data[30:31],
                                                         torch.zeros_like(data[31:])]))  # fmt: skip
    assert first.norm() < 2 * middle.norm()


def test_filtered_backprojection_is_linear_batched_and_differentiable() -> None:
    A = operators()["parallel"]
    assert isinstance(A, RayTransform)
    y = seeded(2, 3, 4, 9)
    assert A.fbp(y).shape == (2, 3, 6, 5)
    assert torch.allclose(A.fbp(y)[1, 2], A.fbp(y[1, 2]), atol=1e-14)
    assert torch.allclose(A.fbp(y.float()).double(), A.fbp(y), atol=1e-5)
    assert A.fbp(y.float()).dtype == SINGLE
    assert gradcheck(A.fbp, seeded(4, 9).requires_grad_(), check_forward_ad=True)
    sizes = [float(A.fbp(y, name).norm()) for name in FILTERS]
    assert sizes == sorted(sizes, reverse=True)  # from sharp to smooth
    assert A.fbp(y, cutoff=0.5).norm() < 0.8 * A.fbp(y).norm()


def test_a_list_of_rays_has_no_filtered_backprojection() -> None:
    A = operators()["rays"]
    assert isinstance(A, RayTransform)
    with pytest.raises(ValueError, match=r"needs a ParallelBeam or a FanBeam, got Rays; use A.pinv\(y\)"):
        A.fbp(torch.ones(A.data_shape))


@pytest.mark.parametrize("boundary", ["zero", "valid"])
def test_blur_is_a_convolution(boundary: str) -> None:
    image, kernel = seeded(2, 9, 8), seeded(3, 5, seed=1)
    expected = [scipy.signal.convolve2d(i, kernel, mode={"zero": "same", "valid": "valid"}[boundary]) for i in image]
    found = Blur((2, 9, 8), kernel, boundary)(image)
    assert np.allclose(found.numpy(), np.stack(expected), atol=1e-13)


def test_a_gaussian_blur_keeps_the_mean_and_spreads() -> None:
    A = Blur.gaussian((31, 31), 1.7)
    point = torch.zeros(31, 31, dtype=DOUBLE)
    point[15, 15] = 1.0
    spot, place = A(point), torch.arange(31) - 15.0
    assert float(spot.sum()) == pytest.approx(1.0)
    assert float((spot.sum(0) * place**2).sum()) == pytest.approx(1.7**2, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blur((8,), torch.ones(3, 3)), "image_shape: expected positive integers"),
        (lambda: Blur((8, 8), torch.ones(3)), r"kernel: expected \(h, w\)"),
        (lambda: Blur((8, 8), torch.zeros(3, 3)), "kernel: .* not all zero"),
        (lambda: Blur((8, 8), torch.full((3, 3), math.nan)), "kernel: 9 entries are NaN"),
        (lambda: Blur((8, 8), torch.ones(2, 3)), r"kernel: expected odd sizes for boundary='zero', got \(2, 3\)"),
        (lambda: Blur((8, 8), torch.ones(3, 9), "valid"), r"kernel: \(3, 9\) is larger than the image \(8, 8\)"),
        (lambda: Blur((8, 8), torch.ones(3, 3), "wrap"), "boundary: expected one of"),
        (lambda: Blur.gaussian((8, 8), 0.0), "width: expected a positive number of pixels"),
        (lambda: Inpainting(torch.ones(3, 3)), "mask: expected bools, some of them true, got torch.float32"),
        (lambda: Inpainting(torch.zeros(3, 3, dtype=torch.bool)), "mask: expected bools, some of them true"),
        (lambda: DenseOperator(torch.ones(3)), r"matrix: expected \(num_measurements, num_pixels\), got shape \(3,\)"),
        (lambda: DenseOperator(torch.ones(3, 4), (5,)), r"image_shape: expected a shape of 4 entries"),
        (lambda: DenseOperator(torch.ones(3, 4), None, (2, 2)), r"data_shape: expected a shape of 3 entries"),
        (lambda: DenseOperator([[math.inf]]), "matrix: 1 entries are NaN or infinite"),
        (lambda: ForwardOperator((), (3,)), r"image_shape: expected positive integers, got \(\)"),
        (lambda: ForwardOperator((3,), (-3,)), r"data_shape: expected positive integers, got \(-3,\)"),
    ],
)
def test_bad_operators_are_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_complex_matrices_are_refused() -> None:
    with pytest.raises(TypeError, match="matrix: expected real numbers"):
        DenseOperator(torch.ones(3, 3, dtype=torch.complex64))


def test_nothing_of_the_users_changes() -> None:
    state, kernel = torch.get_rng_state(), torch.ones(3, 3)
    matrix = torch.ones(4, 6)
    A, B = Blur((5, 5), kernel), DenseOperator(matrix)
    kernel.zero_()
    matrix.zero_()
    assert A(torch.ones(5, 5)).max() == 9
    assert B(torch.ones(6)).max() == 6
    A.dot_test()
    A.norm()
    assert torch.equal(torch.get_rng_state(), state)
