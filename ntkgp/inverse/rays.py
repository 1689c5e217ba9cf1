"""The matrix of line integrals through an image of pixels, by Joseph's method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from ntkgp.inverse.geometry import Geometry
from ntkgp.linearization.memory import format_memory

# Entries of one block of rays: small enough for the processor's cache.
_BLOCK = 1 << 16
# Distance from a pixel's centre, in pixels, below which a ray passes through it.
_ON_CENTRE = 1e-9


class CompressedRows(NamedTuple):
    """A sparse matrix by rows: row i has the columns ``columns[starts[i]:starts[i + 1]]``, in ascending order."""

    starts: Tensor  # shape: (rows + 1,), int32
    columns: Tensor  # shape: (entries,), int32
    values: Tensor  # shape: (entries,)


def system_matrix(
    geometry: Geometry, dtype: torch.dtype = torch.float64, max_memory: int = 4 << 30
) -> tuple[CompressedRows, CompressedRows]:
    r"""The matrix A of line integrals and its transpose, (rays × pixels) and (pixels × rays).

    A ray is followed along the axis it runs along most, one row (or column) of pixels after the other; where it crosses
    the line through their centres, the image is interpolated linearly between the two nearest, and the
    value counts for the length of the ray from one row to the next, :math:`\text{pixel\_size}/|d|`, d the component of
    its direction along that axis. Outside the image the interpolated values are zero.

    :param geometry: the rays.
    :param dtype: of the entries, float32 or float64. They are computed in float64.
    :param max_memory: bytes for the two matrices.
    :raises ValueError: no ray that meets the image, a matrix beyond the budget or beyond 2³¹ entries.

    Cost: up to two entries per ray and row (column) crossed: rays × max(H, W) × 2 × (4 bytes + those of the dtype),
    twice. About 0.1 µs per entry.

    Source: Joseph 1982, *An improved algorithm for reprojecting rays through pixel images*.

    >>> from ntkgp.inverse.geometry import ParallelBeam
    >>> matrix, transpose = system_matrix(ParallelBeam((3, 3), [0.0], 3))
    >>> matrix.columns.tolist(), matrix.values.tolist()
    ([0, 3, 6, 1, 4, 7, 2, 5, 8], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    points, directions = (r.reshape(-1, 2).numpy() for r in geometry.rays())
    along_rows = np.abs(directions[:, 1]) >= np.abs(directions[:, 0])
    steps = np.where(along_rows, *geometry.image_shape).sum(dtype=np.int64)
    most = 2 * int(steps)
    needed = 2 * most * (4 + dtype.itemsize)
    if needed > max_memory or most >= 2**31:
        raise ValueError(
            f"max_memory: the matrix of {len(points)} rays through {geometry.image_shape} may take "
            f"{format_memory(needed)} in {dtype}, of {format_memory(max_memory)}; take fewer views, fewer detectors or "
            "larger pixels, dtype=torch.float32, or a larger budget (2³¹ entries at most)"
        )
    # Neighbouring rays mostly run along the same axis.
    changes = np.flatnonzero(along_rows[1:] != along_rows[:-1]) + 1
    runs = zip([0, *changes.tolist()], [*changes.tolist(), len(points)], strict=True)
    parts = [
        part for first, last in runs for part in _followed(geometry, points[first:last], directions[first:last], dtype)
    ]
    counts, columns, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    del parts
    starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    matrix = scipy.sparse.csr_array((values, columns, starts), shape=(len(points), geometry.num_pixels))
    if matrix.nnz == 0:
        raise ValueError("geometry: none of the rays meets the image; look at offsets, sizes and the image's centre")
    return as_pair(matrix)


def as_pair(matrix: scipy.sparse.csr_array) -> tuple[CompressedRows, CompressedRows]:
    """A matrix and its transpose, both by rows.

    :raises ValueError: too large for indices of 32 bits.
    """
    if max(matrix.nnz, *matrix.shape) >= 2**31:
        raise ValueError(f"matrix: expected below 2³¹ entries, rows and columns, got {matrix.nnz} in {matrix.shape}")
    # Transposing twice sorts the columns of every row.
    transpose = matrix.tocsc()
    return _compressed(transpose.tocsr()), _compressed(transpose)


def _compressed(matrix: scipy.sparse.csr_array | scipy.sparse.csc_array) -> CompressedRows:
    """The arrays of a matrix by rows, or of the transpose of one by columns."""
    starts, columns = (torch.from_numpy(a.astype(np.int32, copy=False)) for a in (matrix.indptr, matrix.indices))
    return CompressedRows(starts, columns, torch.from_numpy(matrix.data))


def _followed(
    geometry: Geometry, points: np.ndarray, directions: np.ndarray, dtype: torch.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Number of entries, columns and values of rays that all run along rows of pixels more than columns, or all not."""
    along_rows = abs(directions[0, 1]) >= abs(directions[0, 0])
    height, width = geometry.image_shape
    size = geometry.pixel_size
    x, y = (c.numpy() for c in geometry.pixel_centres())
    # Pixel coordinates: rows count downwards, columns to the right.
    column, row = (points[:, 0] - x[0]) / size, (y[0] - points[:, 1]) / size
    if along_rows:
        slope, lengths = -directions[:, 0] / directions[:, 1], size / np.abs(directions[:, 1])
        start, steps, across = column - slope * row, height, width
        stride_along, stride_across = width, 1
    else:
        slope, lengths = -directions[:, 1] / directions[:, 0], size / np.abs(directions[:, 0])
        start, steps, across = row - slope * column, width, height
        stride_along, stride_across = 1, width
    along = np.arange(steps, dtype=np.float64)
    offsets = np.repeat(np.arange(steps, dtype=np.int32) * np.int32(stride_along), 2).reshape(steps, 2)
    kind = np.float32 if dtype == torch.float32 else np.float64
    block = max(1, _BLOCK // steps)
    for first in range(0, len(points), block):
        part = slice(first, first + block)
        crossing = start[part, None] + slope[part, None] * along
        nearest = np.rint(crossing)
        np.copyto(crossing, nearest, where=np.abs(crossing - nearest) < _ON_CENTRE)
        # Rays may pass far from the image: keep what is outside within the range of int32.
        np.clip(crossing, -2.0, across + 1.0, out=crossing)
        lower = np.floor(crossing)
        crossing -= lower
        weights = np.empty((*crossing.shape, 2))
        np.multiply(crossing, lengths[part, None], out=weights[..., 1])
        np.subtract(lengths[part, None], weights[..., 1], out=weights[..., 0])
        pixels = np.empty(weights.shape, dtype=np.int32)
        pixels[..., 0] = lower
        np.add(pixels[..., 0], 1, out=pixels[..., 1])
        # As unsigned numbers, negative ones are beyond the image too.
        kept = (pixels.view(np.uint32) < across) & (weights > 0)
        pixels *= np.int32(stride_across)
        pixels += offsets
        yield kept.reshape(len(kept), -1).sum(1), pixels[kept], weights[kept].astype(kind, copy=False)
