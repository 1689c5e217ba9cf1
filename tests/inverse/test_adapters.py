"""Adapters: against stand-ins with the interface of the other package, and the package itself where it is installed."""

from __future__ import annotations

import copy
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from ntkgp.inverse.adapters import from_astra, from_callables, from_deepinv, from_matrix, to_cuqi
from ntkgp.inverse.geometry import FanBeam, ParallelBeam
from ntkgp.inverse.operators import RayTransform, SparseOperator

DOUBLE = torch.float64


def sparse_matrix() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(9, 12)) * (rng.random((9, 12)) < 0.4)


@pytest.mark.parametrize(
    "convert",
    [
        scipy.sparse.csr_array,
        scipy.sparse.csc_matrix,
        scipy.sparse.coo_array,
        lambda m: torch.from_numpy(m).to_sparse_coo(),
        torch.from_numpy,
        np.asarray,
    ],
)
def test_matrices_of_any_kind(convert: Callable[[np.ndarray], Any]) -> None:
    matrix = sparse_matrix()
    A = from_matrix(convert(matrix), (3, 4), (9, 1))
    assert isinstance(A, SparseOperator) == (convert not in (torch.from_numpy, np.asarray))
    assert torch.allclose(A.matrix(), torch.from_numpy(matrix))
    x = torch.rand(2, 3, 4, dtype=DOUBLE)
    assert torch.allclose(A(x).flatten(1), x.flatten(1) @ torch.from_numpy(matrix).mT)
    assert A(x).shape == (2, 9, 1)
    assert A.dot_test() < 1e-12


def test_a_matrix_is_copied_and_its_dtype_kept() -> None:
    matrix = scipy.sparse.csr_array(sparse_matrix().astype(np.float32))
    A = from_matrix(matrix)
    matrix.data[:] = 0
    assert A.dtype == torch.float32
    assert A.image_shape == (12,)
    assert A.data_shape == (9,)
    assert A(torch.ones(12)).abs().sum() > 0
    assert from_matrix(scipy.sparse.csr_array(np.eye(3, dtype=np.int64))).dtype == DOUBLE


def test_matrices_too_large_for_their_indices_are_refused() -> None:
    matrix = scipy.sparse.coo_array(([1.0], ([0], [2**31])), shape=(2, 2**31 + 1))
    with pytest.raises(ValueError, match="matrix: expected below 2³¹ entries, rows and columns, got 1 in"):
        from_matrix(matrix)


def test_duplicate_entries_add_up() -> None:
    twice = scipy.sparse.coo_array(([1.0, 2.0, 0.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    A = from_matrix(twice)
    assert isinstance(A, SparseOperator)
    assert A.num_entries == 1
    assert A.matrix().tolist() == [[0.0, 3.0], [0.0, 0.0]]


@pytest.mark.parametrize("dense", [False, True])
def test_pixels_that_no_measurement_sees_are_logged(dense: bool, caplog: pytest.LogCaptureFixture) -> None:
    matrix = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    from_matrix(matrix if dense else scipy.sparse.csr_array(matrix))
    assert "no measurement sees 1 of 3 pixels" in caplog.text


@pytest.mark.parametrize(
    ("matrix", "shapes", "error", "message"),
    [
        (np.eye(3), ((2, 2), None), ValueError, "image_shape: expected a shape of 3 entries"),
        (scipy.sparse.csr_array(np.eye(3)), ((3,), (4,)), ValueError, "data_shape: expected a shape of 3 entries"),
        (np.full((2, 2), math.nan), (None, None), ValueError, "matrix: 4 entries are NaN"),
        (scipy.sparse.csr_array([[math.inf, 0.0]]), (None, None), ValueError, "matrix: 1 entries are NaN"),
        (np.zeros((2, 2)), (None, None), ValueError, "matrix: has no entry that is not zero"),
        (scipy.sparse.csr_array((2, 2)), (None, None), ValueError, "matrix: has no entry that is not zero"),
        (np.eye(2) * 1j, (None, None), TypeError, "matrix: expected real numbers"),
        (scipy.sparse.csr_array(np.eye(2) * 1j), (None, None), TypeError, "matrix: expected real numbers"),
    ],
)
def test_bad_matrices(matrix: Any, shapes: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_matrix(matrix, *shapes)


def test_callables_of_tensors_arrays_and_batches_are_the_same_operator() -> None:
    dense = torch.from_numpy(sparse_matrix())
    array = dense.numpy()
    ways = [
        from_callables(
            lambda x: dense.to(x) @ x.flatten(), lambda y: (dense.to(y).mT @ y).reshape(3, 4), (3, 4), (9,)
        ),
        from_callables(lambda x: array @ x.ravel(), lambda y: (y @ array).reshape(3, 4), (3, 4), (9,), numpy=True),
        from_callables(
            lambda x: x.flatten(1) @ dense.to(x).mT, lambda y: (y @ dense.to(y)).unflatten(1, (3, 4)), (3, 4), (9,),
            batched=True,
        ),
        from_callables(lambda x: dense.to(x) @ x.flatten(), None, (3, 4), (9,)),
        from_callables(lambda x: x.flatten(1) @ dense.to(x).mT, None, (3, 4), (9,), batched=True),
        from_callables(lambda x: dense.float() @ x.flatten(), None, (3, 4), (9,), dtype=torch.float32),
    ]  # fmt: skip
    x, y = torch.rand(2, 3, 4, dtype=DOUBLE), torch.rand(2, 9, dtype=DOUBLE)
    for A in ways:
        tolerance = 1e-5 if A.dtype == torch.float32 else 1e-13
        assert torch.allclose(A(x), x.flatten(1) @ dense.mT, atol=tolerance)
        assert A(x).dtype == DOUBLE
        assert torch.allclose(A.adjoint(y).flatten(1), y @ dense, atol=tolerance)
        leaf = x.clone().requires_grad_()
        (A(leaf) * y).sum().backward()
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad.flatten(1), y @ dense, atol=tolerance)
        assert torch.allclose(copy.deepcopy(A)(x), A(x))


def test_functions_that_give_back_their_argument() -> None:
    for batched in (False, True):
        A = from_callables(lambda x: x, lambda y: y, (3,), (3,), batched=batched)
        x = torch.rand(2, 3, dtype=DOUBLE, requires_grad=True)
        assert torch.autograd.gradcheck(A, x, check_forward_ad=True, check_batched_forward_grad=True)


def roll(x: Tensor) -> Tensor:
    return torch.roll(x, 1, 0)


@pytest.mark.parametrize(
    ("forward", "adjoint", "message"),
    [
        (roll, roll, r"adjoint: is not the transpose of forward: .* differ by .* of ‖Ax‖‖y‖, beyond .* 1e-04"),
        (roll, lambda y: 1.001 * torch.roll(y, -1, 0), "adjoint: is not the transpose"),
        (roll, lambda y: torch.roll(y, -1, 0) * math.nan, "adjoint: is not the transpose"),
        (roll, lambda y: y[:3], r"adjoint: expected a result of shape \(4, 4\), got \(3, 4\)"),
        (lambda x: x[:3], lambda y: y, r"forward: expected a result of shape \(4, 4\), got \(3, 4\)"),
        (lambda x: x + 1, lambda y: y, "forward: is not linear: .* a constant part belongs to the data"),
        (lambda x: x.square(), None, "forward: is not linear"),
        (lambda x: 0 * x, lambda y: 0 * y, "forward: its result for a positive image is zero everywhere"),
        (lambda x: x / 0, lambda y: y, "forward: its result for a finite image is NaN or infinite"),
    ],
)
def test_callables_that_are_no_operator_are_refused(forward: Any, adjoint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_callables(forward, adjoint, (4, 4), (4, 4))


def test_the_tolerance_of_the_dot_test_can_be_chosen() -> None:
    A = from_callables(roll, lambda y: 1.001 * torch.roll(y, -1, 0), (4, 4), (4, 4), tolerance=0.01)
    assert 1e-4 < A.dot_test() < 2e-3
    with pytest.raises(ValueError, match="adjoint: expected a function; autograd needs tensors"):
        from_callables(roll, None, (4, 4), (4, 4), numpy=True)
    with pytest.raises(TypeError, match=r"dtype: expected torch.float32, torch.float64 or None, got torch.int32"):
        from_callables(roll, None, (4, 4), (4, 4), dtype=torch.int32)


def test_an_interpolated_backprojection_is_no_adjoint() -> None:
    """What many toolboxes call the adjoint: another discretisation of the same integral, here a percent off."""
    A = RayTransform(ParallelBeam((16, 16), torch.arange(8) * math.pi / 8))

    def smoothed(y: Tensor) -> Tensor:
        return A.adjoint(0.98 * y + 0.01 * (y.roll(1, -1) + y.roll(-1, -1)))

    with pytest.raises(ValueError, match="is not the transpose of forward"):
        from_callables(A, smoothed, A.image_shape, A.data_shape)
    assert from_callables(A, A.adjoint, A.image_shape, A.data_shape).dot_test() < 1e-12


class Physics:
    """What deepinv's linear physics have: A and A_adjoint on (batch, channels, height, width), in float32."""

    def __init__(self, operator: RayTransform, factor: float = 1.0) -> None:
        self.operator, self.factor = operator, factor

    def A(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return self.operator(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.operator.adjoint(y)


def transform() -> RayTransform:
    return RayTransform(ParallelBeam((6, 5), [0.1, 0.9, 2.0], 8))


@pytest.mark.parametrize(
    ("image_shape", "data_shape"), [((6, 5), (3, 8)), ((1, 6, 5), (1, 3, 8)), ((2, 6, 5), (2, 3, 8))]
)
def test_deepinv_by_its_interface(image_shape: tuple[int, ...], data_shape: tuple[int, ...]) -> None:
    A = from_deepinv(Physics(transform()), image_shape)
    assert A.data_shape == data_shape
    x = torch.rand(2, *image_shape, dtype=DOUBLE)
    assert torch.allclose(A(x), transform()(x), atol=1e-5)
    y = A(x)
    assert torch.allclose(A.adjoint(y), transform().adjoint(y), atol=1e-4)
    with pytest.raises(ValueError, match="adjoint: is not the transpose"):
        from_deepinv(Physics(transform(), 1.006), image_shape)


def test_deepinv_needs_a_linear_physics() -> None:
    with pytest.raises(TypeError, match="physics: expected a linear physics with A and A_adjoint, got int"):
        from_deepinv(3, (6, 5))


def test_deepinv_itself() -> None:
    deepinv = pytest.importorskip("deepinv")
    physics = deepinv.physics.Tomography(angles=9, img_width=16, adjoint_via_backprop=True, normalize=False)
    A = from_deepinv(physics, (16, 16))
    x = torch.rand(1, 1, 16, 16)
    assert torch.allclose(A(x[0, 0]), physics.A(x)[0, 0], atol=1e-5)
    inexact = deepinv.physics.Tomography(angles=9, img_width=16, adjoint_via_backprop=False, normalize=False)
    with pytest.raises(ValueError, match="adjoint: is not the transpose"):
        from_deepinv(inexact, (16, 16))


def astra_stand_in(cuda: bool, deleted: list[int]) -> types.ModuleType:
    """ASTRA's interface to projector 7, whose matrix is that of `transform`."""
    A, module = transform(), types.ModuleType("astra")

    class OpTomo:
        def __init__(self, proj_id: int) -> None:
            self.proj_id, self.vshape, self.sshape = proj_id, A.image_shape, A.data_shape

        def FP(self, x: np.ndarray) -> np.ndarray:
            assert x.dtype == np.float32
            return A(torch.from_numpy(x)).numpy()

        def BP(self, y: np.ndarray) -> np.ndarray:
            return A.adjoint(torch.from_numpy(y)).numpy()

    vars(module).update(
        OpTomo=OpTomo,
        projector=types.SimpleNamespace(is_cuda=lambda i: cuda, matrix=lambda i: 10 * i),
        matrix=types.SimpleNamespace(
            get=lambda i: {70: scipy.sparse.csr_matrix(A.matrix(torch.float32).numpy())}[i], delete=deleted.append
        ),
    )
    return module


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("by_number", [False, True])
def test_astra_by_its_interface(cuda: bool, by_number: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[int] = []
    module = astra_stand_in(cuda, deleted)
    monkeypatch.setitem(sys.modules, "astra", module)
    A = from_astra(7 if by_number else module.OpTomo(7))  # type: ignore[attr-defined]
    assert isinstance(A, SparseOperator) != cuda
    assert deleted == ([] if cuda else [70])
    x = torch.rand(2, 6, 5)
    assert torch.allclose(A(x), transform()(x), atol=1e-5)
    assert A.dot_test(torch.float32) < 1e-6
    with pytest.raises(TypeError, match=r"projector: expected a projector's number or an astra.OpTomo, got str"):
        from_astra("linear")


def test_astra_itself() -> None:
    astra = pytest.importorskip("astra", exc_type=ImportError)
    for n, tolerance in ((28, 1e-3), (96, 1e-3)):
        geometry = ParallelBeam((n, n), 0.05 + torch.arange(20) * math.pi / 20)
        scan = astra.create_proj_geom("parallel", 1.0, geometry.num_detectors, geometry.angles.numpy())
        B = from_astra(astra.create_projector("linear", scan, astra.create_vol_geom(n, n)))
        ours, theirs = RayTransform(geometry), B
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(4, n, n, generator=generator, dtype=DOUBLE)
        assert (ours(x) - theirs(x)).norm() < tolerance * ours(x).norm()
        if n == 28:
            assert (ours.matrix() - theirs.matrix()).norm() < tolerance * ours.matrix().norm()
    fan = FanBeam((32, 32), torch.arange(24) * math.pi / 12, 80, source_origin=80, source_detector=140)
    scan = astra.create_proj_geom("fanflat", fan.detector_size, 80, fan.angles.numpy(), 80.0, 60.0)
    B = from_astra(astra.create_projector("line_fanflat", scan, astra.create_vol_geom(32, 32)))
    x, y = fan.pixel_centres()
    image = (-((x - 5) ** 2 + (y[:, None] - 4) ** 2) / 50).exp()
    assert (RayTransform(fan)(image) - B(image)).norm() < 0.01 * B(image).norm()


def test_cuqi_by_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, model, cuqi = (types.ModuleType(name) for name in ("cuqi.geometry", "cuqi.model", "cuqi"))
    vars(geometry).update(Image2D=lambda shape: ("Image2D", shape), Continuous1D=lambda size: ("Continuous1D", size))
    vars(model)["LinearModel"] = lambda forward, adjoint, **geometries: (forward, adjoint, geometries)
    for module in (cuqi, geometry, model):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    A = transform()
    forward, adjoint, geometries = to_cuqi(A)
    assert geometries == {"range_geometry": ("Image2D", (3, 8)), "domain_geometry": ("Image2D", (6, 5))}
    x, y = np.random.default_rng(0).random(30), np.random.default_rng(1).random(24)
    assert np.allclose(forward(x), A.matrix().numpy() @ x)
    assert np.allclose(adjoint(y), A.matrix().numpy().T @ y)
    assert to_cuqi(from_matrix(np.eye(5)))[2]["domain_geometry"] == ("Continuous1D", 5)


def test_cuqi_itself() -> None:
    pytest.importorskip("cuqi")
    model, x, y = to_cuqi(transform()), np.ones(30), np.ones(24)
    assert np.allclose(model @ x, transform().matrix().numpy() @ x)
    assert np.allclose(model.T @ y, transform().matrix().numpy().T @ y)


def test_packages_that_are_missing_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("astra", "cuqi.geometry"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"astra: .*; it comes with `pip install astra-toolbox`"):
        from_astra(1)
    with pytest.raises(ImportError, match=r"cuqi.geometry: .*; it comes with `pip install cuqipy`"):
        to_cuqi(transform())
