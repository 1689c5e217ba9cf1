"""Forward operators that have nothing to do with tomography: a blur, an inpainting mask, and any dense matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ntkgp.inverse.geometry import as_shape
from ntkgp.inverse.operators import ForwardOperator

BOUNDARIES = ("zero", "valid")


class Blur(ForwardOperator):
    r"""Convolution of an image with a kernel: deblurring is its inverse problem.

    :param image_shape: (*channels, H, W); channels are blurred one by one.
    :param kernel: (h, w), as it is seen in the blurred image of a single bright pixel.
    :param boundary: ``"zero"``: as large a result, the image taken to be zero outside (h and w odd); ``"valid"``: only
        pixels that no outside contributes to, H − h + 1 by W − w + 1, which assumes nothing.
    :raises ValueError: a kernel that is not two-dimensional, finite and not all zero, or does not fit the boundary.

    >>> A = Blur((8, 8), torch.ones(3, 3) / 9)
    >>> A(torch.ones(8, 8))[0, :3]
    tensor([0.4444, 0.6667, 0.6667])
    """

    _kernel: Tensor

    def __init__(self, image_shape: Sequence[int], kernel: Any, boundary: str = "zero") -> None:
        shape = as_shape(image_shape)
        if len(shape) < 2:
            raise ValueError(f"image_shape: expected positive integers (*channels, H, W), got {image_shape!r}")
        kernel = _real(kernel, "kernel")
        if kernel.ndim != 2 or not kernel.any():
            raise ValueError(f"kernel: expected (h, w) with entries that are not all zero, got {tuple(kernel.shape)}")
        if boundary not in BOUNDARIES:
            raise ValueError(f"boundary: expected one of {BOUNDARIES}, got {boundary!r}")
        height, width = kernel.shape
        if boundary == "zero" and not (height % 2 and width % 2):
            raise ValueError(f"kernel: expected odd sizes for boundary='zero', got {(height, width)}")
        if boundary == "valid" and (height > shape[-2] or width > shape[-1]):
            raise ValueError(f"kernel: {(height, width)} is larger than the image {shape[-2:]}")
        lost = (height - 1, width - 1) if boundary == "valid" else (0, 0)
        super().__init__(shape, (*shape[:-2], shape[-2] - lost[0], shape[-1] - lost[1]))
        self.boundary = boundary
        self.register_buffer("_kernel", kernel.flip(0, 1).clone(), persistent=False)

    @classmethod
    def gaussian(cls, image_shape: Sequence[int], width: float, boundary: str = "zero") -> Blur:
        """A Gaussian of this standard deviation in pixels, cut off beyond three and of sum 1.

        :raises ValueError: a width that is not positive, and what the class itself refuses.
        """
        if not isinstance(width, int | float) or not (math.isfinite(width) and width > 0):
            raise ValueError(f"width: expected a positive number of pixels, got {width!r}")
        reach = math.ceil(3 * width)
        profile = (-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / width).square()).exp()
        kernel = profile[:, None] * profile
        return cls(image_shape, kernel / kernel.sum(), boundary)

    def _product(self, x: Tensor) -> Tensor:
        return self._convolve(functional.conv2d, x, self.image_shape, self.num_measurements)

    def _adjoint_product(self, y: Tensor) -> Tensor:
        return self._convolve(functional.conv_transpose2d, y, self.data_shape, self.num_pixels)

    def _convolve(self, convolution: Any, rows: Tensor, shape: tuple[int, ...], size: int) -> Tensor:
        kernel = self._entries("_kernel", rows.dtype)
        padding = (kernel.shape[0] // 2, kernel.shape[1] // 2) if self.boundary == "zero" else (0, 0)
        planes = rows.reshape(len(rows) * math.prod(shape[:-2]), 1, *shape[-2:])
        return convolution(planes, kernel[None, None], padding=padding).reshape(len(rows), size)


class Inpainting(ForwardOperator):
    """The pixels that a mask leaves: filling in the others is its inverse problem.

    :param mask: bool tensor of the image's shape, true where a pixel is measured.
    :raises ValueError: a mask that is not of bools, or measures nothing.

    >>> mask = torch.ones(4, 4, dtype=torch.bool).tril()
    >>> A = Inpainting(mask)
    >>> A(torch.rand(2, 4, 4)).shape, torch.equal(A.adjoint(A(mask.double())).bool(), mask)
    (torch.Size([2, 10]), True)
    """

    _places: Tensor

    def __init__(self, mask: Any) -> None:
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or not mask.ndim or not mask.any():
            raise ValueError(f"mask: expected bools, some of them true, got {mask.dtype} of shape {tuple(mask.shape)}")
        super().__init__(mask.shape, (int(mask.sum()),))
        self.register_buffer("_places", mask.flatten().nonzero()[:, 0], persistent=False)

    def _product(self, x: Tensor) -> Tensor:
        return x[:, self._places]

    def _adjoint_product(self, y: Tensor) -> Tensor:
        return y.new_zeros(len(y), self.num_pixels).index_copy(1, self._places, y)


class DenseOperator(ForwardOperator):
    """A dense matrix as forward operator.

    :param matrix: A, (num_measurements, num_pixels), float32 or float64.
    :param image_shape: shape of one image; (num_pixels,) by default.
    :param data_shape: shape of its measurements; (num_measurements,) by default.
    :raises ValueError: no matrix, NaN or infinite entries, shapes of other sizes.

    >>> DenseOperator(torch.eye(6), (2, 3))(torch.ones(2, 3)).shape
    torch.Size([6])
    """

    _matrix: Tensor

    def __init__(
        self, matrix: Any, image_shape: Sequence[int] | None = None, data_shape: Sequence[int] | None = None
    ) -> None:
        matrix = _real(matrix, "matrix")
        if matrix.ndim != 2:
            raise ValueError(f"matrix: expected (num_measurements, num_pixels), got shape {tuple(matrix.shape)}")
        rows, columns = matrix.shape
        super().__init__(
            check_size(image_shape, columns, "image_shape"), check_size(data_shape, rows, "data_shape")
        )  # fmt: skip
        self.register_buffer("_matrix", matrix.clone(), persistent=False)

    def _product(self, x: Tensor) -> Tensor:
        return x @ self._entries("_matrix", x.dtype).mT

    def _adjoint_product(self, y: Tensor) -> Tensor:
        return y @ self._entries("_matrix", y.dtype)


def check_size(shape: Sequence[int] | None, size: int, name: str) -> Sequence[int]:
    """A shape of so many entries; one-dimensional where none is given."""
    if shape is None:
        return (size,)
    if math.prod(as_shape(shape) or (0,)) != size:
        raise ValueError(f"{name}: expected a shape of {size} entries, as the matrix has, got {shape!r}")
    return shape


def _real(value: Any, name: str) -> Tensor:
    found = torch.as_tensor(value).detach()
    if found.dtype not in (torch.float32, torch.float64):
        if found.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {found.dtype}")
        found = found.to(torch.float64)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name}: {int((~torch.isfinite(found)).sum())} entries are NaN or infinite")
    return found
