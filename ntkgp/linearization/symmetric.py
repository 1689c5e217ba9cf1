"""Stacks of symmetric matrices stored as strips of their lower triangles, in memory or on disk."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ntkgp.linearization.memory import format_memory

STORAGES = ("memory", "disk")
_STRIP_HEIGHT = 256
_ASYMMETRY = 1e-5


class SymmetricGrams:
    r"""G symmetric n × n matrices :math:`K_g`, about half of their numbers stored, in memory or on disk.

    Strip k holds rows a … b−1 and columns 0 … b−1 of every matrix, where (a, b) = ``bounds[k]``. Of its last b − a
    columns, the diagonal block, only the lower triangle counts; the rest must be finite. New objects are zero and are
    filled through :meth:`strips` or :meth:`strip`, or made by :meth:`from_dense`. Sums and products are accumulated in
    float64 whatever the storage.

    ``storage="disk"`` maps a temporary file that has no name: it needs no memory but the system's page cache, and the
    disk is free again when the object dies. Its whole size is reserved at once. Concurrent reading is safe;
    ``copy.deepcopy`` shares the numbers; pickles carry them by value.

    :param num_groups: G ≥ 1.
    :param size: n ≥ 1.
    :param dtype: of the storage, ``torch.float64`` or ``torch.float32``.
    :param device: of the storage in memory and of every result.
    :param storage: ``"memory"`` or ``"disk"``.
    :param directory: of the file (default: the system's temporary directory, which some systems keep in memory).
    :param strip_height: rows of a strip; the last may have fewer.
    :raises ValueError: other arguments.
    :raises OSError: the disk is full, or the directory cannot be written.

    Cost: G·(n² + n·strip_height)/2 numbers. Methods read each of them once and hold one strip of one matrix beside
    their result.

    >>> stack = SymmetricGrams.from_dense(torch.tensor([[[2.0, 1.0], [1.0, 3.0]], [[1.0, 0.0], [0.0, 1.0]]]))
    >>> stack.weighted_sum(torch.tensor([1.0, 10.0]))
    tensor([[12.,  1.],
            [ 1., 13.]], dtype=torch.float64)
    """

    def __init__(
        self,
        num_groups: int,
        size: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        storage: str = "memory",
        directory: str | os.PathLike[str] | None = None,
        strip_height: int = _STRIP_HEIGHT,
    ) -> None:
        for name, value in (("num_groups", num_groups), ("size", size), ("strip_height", strip_height)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {dtype}")
        if storage not in STORAGES:
            raise ValueError(f"storage: expected one of {STORAGES}, got {storage!r}")
        if storage == "disk" and torch.device(device).type != "cpu":
            raise ValueError(f"device: storage='disk' is read by the CPU, got {device}")
        self.storage, self.directory = storage, None if directory is None else os.fspath(directory)
        self.bounds = tuple((a, min(a + strip_height, size)) for a in range(0, size, strip_height))
        self._offsets = (0, *accumulate((b - a) * b for a, b in self.bounds))
        self._shape = torch.Size((num_groups, size, size))
        count = num_groups * self._offsets[-1]
        if storage == "disk":
            numbers = torch.frombuffer(_map_file(count * dtype.itemsize, self.directory), dtype=dtype)
        else:
            numbers = torch.zeros(count, dtype=dtype, device=device)
        self._flat = numbers.view(num_groups, -1)  # shape: (G, numbers of one matrix)

    @staticmethod
    def size_of(num_groups: int, size: int, dtype: torch.dtype = torch.float64) -> int:
        """Bytes of a stack before it is made."""
        strips = range(0, size, _STRIP_HEIGHT)
        return (
            num_groups
            * dtype.itemsize
            * sum((min(a + _STRIP_HEIGHT, size) - a) * min(a + _STRIP_HEIGHT, size) for a in strips)
        )

    @classmethod
    def from_dense(cls, grams: Tensor, **options: Any) -> SymmetricGrams:
        """Store symmetric matrices, shape (G, n, n); the options are those of the constructor.

        The storage has the dtype and device of the tensor unless an option says otherwise.

        :raises ValueError: another shape or dtype, or matrices that are not symmetric beyond rounding.
        """
        if not isinstance(grams, Tensor):
            raise TypeError(f"grams: expected a tensor, got {type(grams).__name__}")
        if grams.ndim != 3 or grams.shape[1] != grams.shape[2] or 0 in grams.shape:
            raise ValueError(f"grams: expected shape (G, n, n) with G, n >= 1, got {tuple(grams.shape)}")
        if not grams.is_floating_point():
            raise ValueError(f"grams: expected real numbers, got {grams.dtype}")
        grams = grams.detach()
        options.setdefault("dtype", torch.float32 if grams.dtype == torch.float32 else torch.float64)
        if options.get("storage") != "disk":
            options.setdefault("device", grams.device)
        stack = cls(grams.shape[0], grams.shape[1], **options)
        for g, gram in enumerate(grams):
            scale = float(gram.diagonal().abs().max())
            for k, (a, b) in enumerate(stack.bounds):
                rows = gram[a:b, :b]
                if float((rows - gram[:b, a:b].mT).abs().max()) > _ASYMMETRY * scale:
                    raise ValueError(f"grams: matrix {g} is not symmetric")
                stack.strip(g, k).copy_(rows)
        return stack

    @property
    def shape(self) -> torch.Size:
        """(G, n, n)."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the storage; results are float64."""
        return self._flat.dtype

    @property
    def device(self) -> torch.device:
        """Where the numbers are and the results are made."""
        return self._flat.device

    @property
    def nbytes(self) -> int:
        """Size in memory or on disk."""
        return self._flat.numel() * self._flat.element_size()

    def __repr__(self) -> str:
        where = f"{self.device}" if self.storage == "memory" else "disk"
        return f"SymmetricGrams(shape={tuple(self.shape)}, dtype={self.dtype}, {format_memory(self.nbytes)} on {where})"

    def strips(self, k: int) -> Tensor:
        """Strip k of every matrix, a writable view of shape (G, b − a, b)."""
        a, b = self.bounds[k]
        return self._flat[:, self._offsets[k] : self._offsets[k + 1]].view(-1, b - a, b)

    def strip(self, g: int, k: int) -> Tensor:
        """Strip k of matrix g, a writable view of shape (b − a, b)."""
        return self.strips(k)[g]

    def weighted_sum(self, weights: Tensor) -> Tensor:
        r""":math:`\sum_g v_g K_g`, shape (n, n), exactly symmetric.

        :param weights: v, shape (G,).
        """
        weights = self._vector("weights", weights, 0)
        out = torch.empty(self.shape[1:], dtype=torch.float64, device=self.device)
        for k in range(len(self.bounds)):
            self._write(out, k, self._combine(k, weights))
        return out

    def dense(self, g: int) -> Tensor:
        """Matrix g, shape (n, n), float64."""
        out = torch.empty(self.shape[1:], dtype=torch.float64, device=self.device)
        for k in range(len(self.bounds)):
            self._write(out, k, self.strip(g, k))
        return out

    def diagonal(self) -> Tensor:
        """Diagonals, shape (G, n)."""
        parts = [self.strips(k)[:, :, a:].diagonal(dim1=1, dim2=2) for k, (a, _) in enumerate(self.bounds)]
        return torch.cat(parts, -1).to(torch.float64)

    def traces(self) -> Tensor:
        """Traces, shape (G,)."""
        return self.diagonal().sum(-1)

    def inner(self, matrix: Tensor) -> Tensor:
        r""":math:`\mathrm{tr}(K_g M)`, shape (G,), for a symmetric M, whose lower triangle alone is read.

        :param matrix: M, shape (n, n).
        """
        self._check("matrix", matrix, tuple(self.shape[1:]))
        out = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        for k, (a, b) in enumerate(self.bounds):
            rows = 2.0 * matrix[a:b, :b].to(out)
            out += self._contract(k, _lower_once(rows, a))
        return out

    def quadratic(self, vector: Tensor) -> Tensor:
        r""":math:`a^\top K_g a`, shape (G,).

        :param vector: a, shape (n,).
        """
        vector = self._vector("vector", vector, 1)
        out = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        for k, (a, b) in enumerate(self.bounds):
            rows = torch.outer(2.0 * vector[a:b], vector[:b])
            out += self._contract(k, _lower_once(rows, a))
        return out

    def matvec(self, vector: Tensor) -> Tensor:
        r""":math:`K_g a`, shape (G, n).

        :param vector: a, shape (n,).
        """
        vector = self._vector("vector", vector, 1)
        out = torch.zeros(self.shape[:2], dtype=torch.float64, device=self.device)
        for k, (a, b) in enumerate(self.bounds):
            for strip, row in zip(self.strips(k), out, strict=True):
                rows = strip.to(torch.float64)
                block = rows[:, a:].tril()
                row[a:b] += rows[:, :a] @ vector[:a] + block @ vector[a:b] + block.tril(-1).mT @ vector[a:b]
                row[:a] += vector[a:b] @ rows[:, :a]
        return out

    def is_finite(self) -> bool:
        """Whether every stored number is finite."""
        return all(math.isfinite(float(end)) for k in range(len(self.bounds)) for end in self._ends(k))

    def _ends(self, k: int) -> list[Tensor]:
        """Smallest and largest entries of strip k; NaN where there is any."""
        return [end for row in self._rows(k) for end in torch.aminmax(row)]

    def _rows(self, k: int) -> Tensor:
        """Strip k of every matrix in one row each, a view."""
        return self._flat[:, self._offsets[k] : self._offsets[k + 1]]

    def _combine(self, k: int, weights: Tensor) -> Tensor:
        """Weighted sum of strip k, shape (b - a, b), float64."""
        a, b = self.bounds[k]
        rows = self._rows(k)
        if rows.dtype == torch.float64:
            return (weights @ rows).view(b - a, b)
        total = torch.zeros_like(rows[0], dtype=torch.float64)
        for row, weight in zip(rows, weights.tolist(), strict=True):
            total.add_(row, alpha=weight)
        return total.view(b - a, b)

    def _contract(self, k: int, matrix: Tensor) -> Tensor:
        """Sums of the products of strip k with the entries of a matrix (b - a, b), shape (G,), float64."""
        rows, flat = self._rows(k), matrix.reshape(-1)
        if rows.dtype == torch.float64:
            return rows @ flat
        return torch.stack([row.to(torch.float64) @ flat for row in rows])

    def _write(self, out: Tensor, k: int, strip: Tensor) -> None:
        """Write a strip and its mirror image into a whole matrix."""
        a, b = self.bounds[k]
        out[a:b, :a] = strip[:, :a]
        out[:a, a:b] = strip[:, :a].mT
        block = strip[:, a:].to(out.dtype).tril()
        out[a:b, a:b] = block + block.tril(-1).mT

    def _check(self, name: str, value: Any, shape: tuple[int, ...]) -> None:
        """Refuse what is no tensor of a shape."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")

    def _vector(self, name: str, value: Any, dimension: int) -> Tensor:
        """Check a vector as long as one dimension; to float64 on the device."""
        self._check(name, value, (self.shape[dimension],))
        return value.detach().to(device=self.device, dtype=torch.float64)

    def __deepcopy__(self, memo: dict[int, Any]) -> SymmetricGrams:
        """Itself: the numbers are shared."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Carry the numbers by value; a mapped file has no meaning elsewhere."""
        return {
            "num_groups": self.shape[0],
            "size": self.shape[1],
            "storage": self.storage,
            "directory": self.directory,
            "strip_height": self.bounds[0][1],
            "numbers": self._flat,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Allocate anew, in the default directory where the old one does not exist."""
        numbers = state.pop("numbers")
        if state["directory"] is not None and not os.path.isdir(state["directory"]):
            state["directory"] = None
        self.__init__(**state, dtype=numbers.dtype, device=numbers.device)  # type: ignore[misc]
        self._flat.copy_(numbers)


def _lower_once(doubled: Tensor, a: int) -> Tensor:
    """Weights of a strip's entries in a sum over the whole matrix, of twice its rows; changes and returns them."""
    block = doubled[:, a:].tril_()
    block.diagonal().mul_(0.5)
    return doubled


def _map_file(num_bytes: int, directory: str | None) -> mmap.mmap:
    """Map a new file without a name, of zeros; the disk is free again when the last view of the map dies."""
    directory = tempfile.gettempdir() if directory is None else directory
    if not os.path.isdir(directory):
        raise ValueError(f"directory: expected an existing directory, got {directory!r}")
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            _reserve(file.fileno(), num_bytes, directory)
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        free = format_memory(shutil.disk_usage(directory).free)
        raise OSError(
            error.errno,
            f"directory: cannot store Grams of {format_memory(num_bytes)} in {directory!r}, where {free} are free "
            f"({error.strerror}); free disk space, choose another directory or dtype=torch.float32",
        ) from error


def _reserve(descriptor: int, num_bytes: int, directory: str) -> None:
    """Give a file its size with the disk behind it: writing into a map that the disk cannot hold ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
        return
    if shutil.disk_usage(directory).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, num_bytes)
