"""Linear forward operators: from an image to its noise-free measurements, and back by the exact transpose."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntkgp.inverse.fbp import FilteredBackprojection, least_squares, refuse_infinite
from ntkgp.inverse.geometry import Geometry, as_shape
from ntkgp.inverse.products import ForwardLinearOperator, LinearProduct, Pair, multiply
from ntkgp.inverse.rays import CompressedRows, system_matrix
from ntkgp.linearization.memory import format_memory, parse_memory

logger = logging.getLogger("ntkgp")

_FLOATS = (torch.float32, torch.float64)


class ForwardOperator(nn.Module):
    r"""A linear map A from images to measurements, with its exact transpose; the base of all forward operators.

    ``A(x)`` takes (\*batch, \*image_shape) to (\*batch, \*data_shape) and ``A.adjoint(y)`` goes back by
    :math:`A^\top`. Both run in the dtype of their argument, float32 or float64, and are differentiable to any order,
    in backward and forward mode, and under ``vmap``: the derivative of a linear map is the map.

    A subclass has :meth:`_product` and :meth:`_adjoint_product` of flat rows.

    :param image_shape: shape of one image.
    :param data_shape: shape of its measurements.
    :raises ValueError: a shape that is not made of positive integers.
    """

    def __init__(self, image_shape: Sequence[int], data_shape: Sequence[int]) -> None:
        super().__init__()
        self.image_shape = _shape(image_shape, "image_shape")
        self.data_shape = _shape(data_shape, "data_shape")
        self._converted: dict[str, Tensor] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ForwardOperator:
        self._converted = {}
        return super()._apply(fn, recurse)

    def _entries(self, name: str, dtype: torch.dtype) -> Tensor:
        """A buffer in this dtype, converted once."""
        stored = getattr(self, name)
        if stored.dtype == dtype:
            return stored
        if name not in self._converted:
            # A copy made in inference mode would break later gradients.
            with torch.inference_mode(False):
                self._converted[name] = stored.to(dtype)
        return self._converted[name]

    @property
    def num_pixels(self) -> int:
        """Entries of an image, d_x."""
        return math.prod(self.image_shape)

    @property
    def num_measurements(self) -> int:
        """Entries of the measurements of one image, d_y."""
        return math.prod(self.data_shape)

    @property
    def dtype(self) -> torch.dtype:
        """In which A is stored; products in another one use rounded entries."""
        return next((b.dtype for b in self.buffers() if b.is_floating_point()), torch.float64)

    @property
    def device(self) -> torch.device:
        """Where A is stored, and where its arguments are expected."""
        return next((b.device for b in self.buffers()), torch.device("cpu"))

    def _product(self, x: Tensor) -> Tensor:  # shape: (k, num_pixels) -> (k, num_measurements)
        """A times each row; no gradients are asked of it."""
        raise NotImplementedError

    def _adjoint_product(self, y: Tensor) -> Tensor:  # shape: (k, num_measurements) -> (k, num_pixels)
        """The transpose times each row."""
        raise NotImplementedError

    @property
    def pair(self) -> Pair:
        """The products of flat rows, as what :class:`~ntkgp.inverse.products.LinearProduct` takes."""
        return Pair(self._product, self._adjoint_product, (self.num_measurements, self.num_pixels))

    def forward(self, x: Tensor) -> Tensor:
        """A x.

        :param x: (*batch, *image_shape), float32 or float64, on the device of A.
        :returns: (*batch, *data_shape), in the dtype of x.
        :raises ValueError: another shape or device.
        :raises TypeError: another dtype.
        """
        batch = self._check(x, "x", self.image_shape, self.data_shape)
        flat = LinearProduct.apply(self.pair, x.reshape(*batch, self.num_pixels))
        return flat.reshape(*batch, *self.data_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """The transpose times measurements: (*batch, *data_shape) -> (*batch, *image_shape).

        :raises ValueError: another shape or device.
        :raises TypeError: another dtype.
        """
        batch = self._check(y, "y", self.data_shape, self.image_shape)
        flat = LinearProduct.apply(self.pair.transposed, y.reshape(*batch, self.num_measurements))
        return flat.reshape(*batch, *self.image_shape)

    def _check(self, value: Any, name: str, shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
        """Batch shape of an argument of these trailing dimensions."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor (*batch, {_print(shape)}), got {type(value).__name__}")
        if value.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected float32 or float64, got {value.dtype}")
        came, split = tuple(value.shape), value.ndim - len(shape)
        if split < 0 or came[split:] != shape:
            hint = ""
            if len(shape) == 2 and came[split:] == shape[::-1]:
                hint = "; it looks transposed"
            elif came[-len(other) :] == other:
                hint = f"; this is the shape of {'images' if name == 'y' else 'measurements'}"
            elif math.prod(came[-1:]) == math.prod(shape):
                hint = "; it looks flat: reshape it"
            raise ValueError(f"{name}: expected shape (*batch, {_print(shape)}), got {came}{hint}")
        if value.device != self.device:
            raise ValueError(f"{name}: is on {value.device}, the operator on {self.device}; move one with .to(device)")
        return came[:split]

    def check_data(self, y: Any, name: str = "y") -> Tensor:
        """Measurements of one image as a tensor of ``data_shape``, or an error that says what is wrong with them.

        :param y: a tensor or array of shape ``data_shape``, finite; integers become float64.
        :raises ValueError: another shape, NaN or infinite entries.
        """
        y = torch.as_tensor(y, device=self.device)
        y = y if y.dtype in _FLOATS else y.to(torch.float64)
        if self._check(y, name, self.data_shape, self.image_shape):
            raise ValueError(f"{name}: expected one set of measurements {self.data_shape}, got {tuple(y.shape)}")
        if not bool(torch.isfinite(y).all()):
            bad = int((~torch.isfinite(y)).sum())
            raise ValueError(f"{name}: {bad} of {y.numel()} measurements are NaN or infinite")
        return y

    @property
    def operator(self) -> ForwardLinearOperator:
        """A as a ``linear_operator`` matrix (num_measurements × num_pixels) of this dtype; ``.float()`` for float32."""
        return ForwardLinearOperator(torch.ones((), dtype=self.dtype, device=self.device), pair=self.pair)

    def matrix(self, dtype: torch.dtype = torch.float64, max_memory: str | int | float = "2GiB") -> Tensor:
        """The dense matrix, shape (num_measurements, num_pixels).

        :param dtype: float32 or float64.
        :param max_memory: budget for the result.
        :raises ValueError: a matrix beyond the budget.

        Cost: min(num_measurements, num_pixels) products.
        """
        if dtype not in _FLOATS:
            raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        m, n = self.num_measurements, self.num_pixels
        if m * n * dtype.itemsize > parse_memory(max_memory):
            raise ValueError(
                f"max_memory: the dense matrix ({m} × {n}, {dtype}) takes {format_memory(m * n * dtype.itemsize)}, "
                f"beyond the budget {max_memory}; use A(x), A.adjoint(y) or A.operator"
            )
        out = torch.empty(m, n, dtype=dtype, device=self.device)
        side, product, rows = (m, self._adjoint_product, out) if m <= n else (n, self._product, out.mT)
        for first in range(0, side, 256):
            unit = torch.zeros(min(256, side - first), side, dtype=dtype, device=self.device)
            unit[torch.arange(len(unit)), first + torch.arange(len(unit))] = 1
            with torch.no_grad():
                rows[first : first + len(unit)] = product(unit)
        return out

    def select(self, kept: Any) -> ForwardOperator:
        """The operator of a part of the measurements: the others can be held out.

        :param kept: mask of ``data_shape``, or the flat numbers of measurements.
        :returns: an operator with ``data_shape`` (number kept,), which shares this one's entries.
        :raises ValueError: a mask of another shape, or that keeps nothing.
        :raises IndexError: a number out of range.

        For whole views ``RayTransform(geometry[chosen])`` is faster: it leaves the others out of the products.
        """
        return _Selection(self, kept)

    def norm(self, iterations: int = 30) -> float:
        """The largest singular value of A, from below, by power iterations in float64."""
        with torch.no_grad():
            x = self._adjoint_product(self._product(self._start()))
            for _ in range(iterations):
                x = self._adjoint_product(self._product(x / x.norm()))
        return math.sqrt(float(x.norm()))

    def _start(self) -> Tensor:
        """Positive entries that no singular vector of a system matrix is orthogonal to, and some variation."""
        n = self.num_pixels
        wave = torch.arange(n, dtype=torch.float64, device=self.device).mul(math.sqrt(2)).sin()
        return (1 + 0.5 * wave).unsqueeze(0)

    def dot_test(self, dtype: torch.dtype = torch.float64, draws: int = 4, seed: int = 0) -> float:
        r"""How far the adjoint is from the transpose.

        :returns: the largest :math:`|\langle Ax, y\rangle - \langle x, A^\top y\rangle| / \|Ax\|\|y\|` over random
            images x and measurements y near Ax: rounding for an exact adjoint (1e-7 in float32, 1e-16 in float64),
            0.01 for one that is a percent off.
        """
        generator = torch.Generator().manual_seed(seed)

        def random(size: int, low: float) -> Tensor:
            return torch.rand(1, size, generator=generator, dtype=torch.float64).add(low).to(self.device, dtype)

        worst = 0.0
        with torch.no_grad():
            for draw in range(draws):
                x = random(self.num_pixels, 0.0 if draw % 2 else -0.5)
                product = self._product(x)
                # Ax alone has a large inner product; the noise is in no range.
                noise = random(self.num_measurements, -0.5)
                y = product + noise * (product.norm() / noise.norm())
                left = (product.double() * y.double()).sum()
                right = (x.double() * self._adjoint_product(y).double()).sum()
                scale = product.double().norm() * y.double().norm()
                mismatch = float((left - right).abs() / scale.clamp_min(torch.finfo(dtype).tiny))
                worst = max(worst, mismatch if math.isfinite(mismatch) else math.inf)
        return worst

    def pinv(self, y: Tensor, damping: float = 1e-3, *, tolerance: float = 1e-6, max_iterations: int = 500) -> Tensor:
        r"""The image that minimises :math:`\|Ax - y\|^2 + \text{damping}\,\|A\|^2\|x\|^2`: a first look.

        It exists for every operator, however few the measurements. See :func:`~ntkgp.inverse.fbp.least_squares`.
        """
        self._check(y, "y", self.data_shape, self.image_shape)
        return least_squares(self, y, damping, tolerance=tolerance, max_iterations=max_iterations)


class _Selection(ForwardOperator):
    """Some measurements of another operator."""

    _places: Tensor

    def __init__(self, whole: ForwardOperator, kept: Any) -> None:
        kept = torch.as_tensor(kept, device=whole.device)
        if kept.dtype == torch.bool and tuple(kept.shape) != whole.data_shape:
            raise ValueError(f"kept: expected a mask of shape {whole.data_shape}, got {tuple(kept.shape)}")
        if kept.dtype != torch.bool and (kept.is_floating_point() or kept.ndim != 1):
            raise ValueError(f"kept: expected a mask or numbers of measurements, got {kept.dtype} {tuple(kept.shape)}")
        numbers = torch.arange(whole.num_measurements, device=whole.device)
        places = numbers[kept.flatten()]
        if not len(places):
            raise ValueError(f"kept: none of the {whole.num_measurements} measurements")
        super().__init__(whole.image_shape, (len(places),))
        self.whole = whole
        self.register_buffer("_places", places, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def _product(self, x: Tensor) -> Tensor:
        return self.whole._product(x)[:, self._places]

    def _adjoint_product(self, y: Tensor) -> Tensor:
        whole = y.new_zeros(len(y), self.whole.num_measurements)
        return self.whole._adjoint_product(whole.index_add(1, self._places, y))


class SparseOperator(ForwardOperator):
    r"""A sparse matrix as forward operator: its compressed rows and those of its transpose, int32 indices.

    :param matrix: A, (num_measurements × num_pixels).
    :param transpose: :math:`A^\top`.
    :param image_shape: shape of one image.
    :param data_shape: shape of its measurements.

    The arrays are buffers that no ``state_dict`` holds: they move with ``.to(device)`` and ``.to(dtype)``. Products in
    the other dtype use a copy of the entries that is made once.

    Cost: a product reads every entry once, 8 bytes in float32 and 12 in float64; several images share a reading.
    """

    _starts: Tensor
    _columns: Tensor
    _values: Tensor
    _transpose_starts: Tensor
    _transpose_columns: Tensor
    _transpose_values: Tensor

    def __init__(
        self,
        matrix: CompressedRows,
        transpose: CompressedRows,
        image_shape: Sequence[int],
        data_shape: Sequence[int],
    ) -> None:
        super().__init__(image_shape, data_shape)
        for prefix, arrays in (("", matrix), ("_transpose", transpose)):
            for name, array in zip(arrays._fields, arrays, strict=True):
                self.register_buffer(f"{prefix}_{name}", array, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """That of the stored entries."""
        return self._values.dtype

    def _product(self, x: Tensor) -> Tensor:
        rows = CompressedRows(self._starts, self._columns, self._entries("_values", x.dtype))
        return multiply(rows, x, self.num_measurements)

    def _adjoint_product(self, y: Tensor) -> Tensor:
        entries = self._entries("_transpose_values", y.dtype)
        return multiply(CompressedRows(self._transpose_starts, self._transpose_columns, entries), y, self.num_pixels)

    @property
    def num_entries(self) -> int:
        """Entries of the matrix that are stored."""
        return len(self._values)

    @property
    def unseen(self) -> Tensor:
        """Which entries of an image no measurement depends on (zero columns), (*image_shape,) of bool.

        Nothing but the prior says anything about them.
        """
        return (self._transpose_starts.diff() == 0).reshape(self.image_shape)

    def extra_repr(self) -> str:
        """Shapes and number of entries."""
        return f"{self.image_shape} -> {self.data_shape}, {self.num_entries} entries, {self.dtype}"


class RayTransform(SparseOperator):
    r"""Line integrals of an image: tomography.

    :math:`(Ax)_i = \int x` along ray i in units of mm × image, by Joseph's method
    (:func:`~ntkgp.inverse.rays.system_matrix`); see :class:`~ntkgp.inverse.geometry.Geometry` for the
    orientation of images.

    :param geometry: :class:`~ntkgp.inverse.ParallelBeam`, :class:`~ntkgp.inverse.FanBeam` or
        :class:`~ntkgp.inverse.Rays`.
    :param dtype: in which the matrix is stored. Products run in the dtype of their argument; where it is the other one,
        a copy of the entries in it is kept, so give float32 where only float32 images come and memory is short.
    :param max_memory: budget for the matrix and its transpose.
    :raises ValueError: a matrix beyond the budget; rays that all miss the image.

    Cost: 27 million entries for 501² pixels and 60 views of 711 detectors: a few seconds to build, 430 MB in float32
    and 640 MB in float64, about 30 to 50 ms per product on one thread.

    >>> from ntkgp.inverse.geometry import ParallelBeam
    >>> A = RayTransform(ParallelBeam((28, 28), torch.arange(10) * torch.pi / 10))
    >>> image = torch.rand(3, 28, 28)
    >>> A(image).shape, A.adjoint(A(image)).shape, A.fbp(A(image)).shape, A.operator.shape
    (torch.Size([3, 10, 41]), torch.Size([3, 28, 28]), torch.Size([3, 28, 28]), torch.Size([410, 784]))
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        dtype: torch.dtype = torch.float64,
        max_memory: str | int | float = "4GiB",
    ) -> None:
        if not isinstance(geometry, Geometry):
            raise TypeError(
                f"geometry: expected a ParallelBeam, FanBeam or Rays of ntkgp.inverse, got {type(geometry).__name__}"
            )
        matrix, transpose = system_matrix(geometry, dtype, parse_memory(max_memory))
        super().__init__(matrix, transpose, geometry.image_shape, geometry.data_shape)
        self.geometry = geometry
        unseen = int(self.unseen.sum())
        if unseen:
            logger.warning(
                "RayTransform: no ray crosses %d of %d pixels; only the prior will say anything about them (A.unseen)",
                unseen, self.num_pixels,
            )  # fmt: skip

    def fbp(self, y: Tensor, filter: str = "ram-lak", cutoff: float = 1.0) -> Tensor:
        """Filtered backprojection: (*batch, *data_shape) -> (*batch, *image_shape).

        See :class:`~ntkgp.inverse.fbp.FilteredBackprojection` for the filters and what is done about missing angles.

        :raises ValueError: NaN or infinite data, another shape, a geometry without views.
        """
        self._check(y, "y", self.data_shape, self.image_shape)
        refuse_infinite(y)
        return FilteredBackprojection(self.geometry, filter, cutoff)(y)


def _shape(shape: Any, name: str) -> tuple[int, ...]:
    counts = as_shape(shape)
    if not counts:
        raise ValueError(f"{name}: expected positive integers, got {shape!r}")
    return counts


def _print(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
