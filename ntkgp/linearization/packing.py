"""Any pytree of per-row tensors as the ``(N, D)`` matrix that GPyTorch works on, and back, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def _flatten(tree: Any, leaves: list[Any], like: Any) -> Any:
    """Collect the leaves in order; the structure returned has their positions in their places."""
    if isinstance(tree, Mapping):
        # Two dicts are one structure in whatever order their keys were written.
        alike = isinstance(like, dict) and set(like) == set(tree)
        return {key: _flatten(tree[key], leaves, like[key] if alike else None) for key in (like if alike else tree)}
    if isinstance(tree, tuple | list):
        alike = isinstance(like, tuple | list) and len(like) == len(tree)
        parts = [_flatten(value, leaves, like[i] if alike else None) for i, value in enumerate(tree)]
        # A data loader returns lists for tuples.
        kind = type(like) if alike else type(tree)
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    leaves.append(tree)
    return len(leaves) - 1


def tree_flatten(tree: Any, like: Any = None) -> tuple[list[Any], Any]:
    """Leaves and structure of nested mappings, tuples, named tuples and lists.

    :param like: a structure whose order of keys is followed.

    >>> tree_flatten({"a": 1, "b": (2, [3])})
    ([1, 2, 3], {'a': 0, 'b': (1, [2])})
    >>> tree_flatten({"b": 1, "a": 2}, like={"a": 0, "b": 1})
    ([2, 1], {'a': 0, 'b': 1})
    """
    leaves: list[Any] = []
    structure = _flatten(tree, leaves, like)
    return leaves, structure


def tree_unflatten(leaves: list[Any], structure: Any) -> Any:
    """Inverse of :func:`tree_flatten`."""
    if isinstance(structure, dict):
        return {key: tree_unflatten(leaves, value) for key, value in structure.items()}
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(tree_unflatten(leaves, value) for value in structure))
    if isinstance(structure, tuple | list):
        return type(structure)(tree_unflatten(leaves, value) for value in structure)
    return leaves[structure]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return type(value).__name__


class InputPacking:
    r"""Layout of the network's inputs: which tensors, of which row shape and dtype, side by side in one matrix.

    Floating, integer and boolean leaves are flattened per row and concatenated. One floating leaf keeps its dtype;
    anything else is packed in float64, which holds every float32, float16, bool and integer up to :math:`2^{53}`
    exactly, so that :meth:`unpack` returns the very same values.

    :param example: one tensor, or a dict, tuple or list (nested at will) of tensors that share their first dimension.
    :raises TypeError: a leaf is not a tensor, or is complex.
    :raises ValueError: no leaf, no rows, or leaves whose first dimensions differ.

    Cost: O(N·D) time and memory for either direction; a single floating leaf is a view.

    >>> packing = InputPacking({"ids": torch.tensor([[1, 2], [3, 4]]), "x": torch.ones(2, 3)})
    >>> packing.width, packing.pack({"ids": torch.tensor([[7, 9]]), "x": torch.zeros(1, 3)}).tolist()
    (5, [[7.0, 9.0, 0.0, 0.0, 0.0]])
    """

    def __init__(self, example: Any) -> None:
        leaves, self._spec = tree_flatten(example)
        self._check_leaves(leaves, "example")
        self.shapes: tuple[torch.Size, ...] = tuple(leaf.shape[1:] for leaf in leaves)
        self.dtypes: tuple[torch.dtype, ...] = tuple(leaf.dtype for leaf in leaves)
        self.widths: tuple[int, ...] = tuple(math.prod(shape) for shape in self.shapes)
        self.width = sum(self.widths)
        self._single = len(leaves) == 1 and leaves[0].is_floating_point()

    @staticmethod
    def _check_leaves(leaves: list[Any], name: str) -> None:
        if not leaves:
            raise ValueError(f"{name} holds no tensor; expected a tensor or a dict/tuple/list of tensors")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} holds a {type(leaf).__name__}; expected tensors only")
            if leaf.is_complex():
                raise TypeError(f"{name} holds a complex tensor; split it into real and imaginary parts")
            if leaf.ndim == 0:
                raise ValueError(f"{name} holds a scalar tensor; expected a first dimension over the N rows")
        rows = {leaf.shape[0] for leaf in leaves}
        if len(rows) > 1:
            raise ValueError(f"{name}: tensors disagree on the number of rows N: {sorted(rows)}")
        if rows == {0}:
            raise ValueError(f"{name} has N = 0 rows; expected at least one")

    def is_packed(self, x: Any) -> bool:
        """Whether ``x`` has the shape and dtype that :meth:`pack` returns (any number of leading dimensions)."""
        return isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2 and x.shape[-1] == self.width

    def is_raw(self, x: Any) -> bool:
        """Whether ``x`` has the structure of the example."""
        leaves, spec = tree_flatten(x, self._spec)
        return spec == self._spec and all(
            isinstance(leaf, Tensor)
            and leaf.shape[1:] == shape
            and leaf.ndim > 0
            and leaf.is_floating_point() == dtype.is_floating_point
            for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True)
        )

    def pack(self, inputs: Any, name: str = "inputs") -> Tensor:
        """Inputs as they are given to the network, or already packed ones -> ``(N, D)``.

        :param inputs: a pytree like the example with any number N of rows, or a packed tensor (returned as it is).
        :param name: what the errors call the inputs.
        :raises ValueError: another structure, other row shapes, N = 0, NaN or infinite values, integers beyond 2^53.
        :raises TypeError: floating values where the example has integers, or the reverse.
        """
        if not self.is_raw(inputs):
            if self.is_packed(inputs) and inputs.ndim == 2:
                self._check_leaves([inputs], name)
                return self._finite(inputs, name)
            self._explain(inputs, name)
        leaves = tree_flatten(inputs, self._spec)[0]
        self._check_leaves(leaves, name)
        if self._single:
            return self._finite(leaves[0].reshape(leaves[0].shape[0], -1), name)
        columns = []
        for leaf in leaves:
            if leaf.dtype == torch.int64 and not torch.equal(leaf.to(torch.float64).to(leaf.dtype), leaf):
                raise ValueError(f"{name}: an integer beyond 2^53 cannot be packed exactly into float64")
            columns.append(leaf.reshape(leaf.shape[0], -1).to(torch.float64))
        return self._finite(torch.cat(columns, dim=-1), name)

    @staticmethod
    def _finite(x: Tensor, name: str) -> Tensor:
        if not torch.isfinite(x.detach()).all():
            row = int((~torch.isfinite(x.detach())).any(-1).nonzero()[0, 0])
            raise ValueError(f"{name}: NaN or infinite values (first in row {row}); expected finite numbers")
        return x

    def _explain(self, inputs: Any, name: str) -> None:
        """Raise the error that says how ``inputs`` differs from the example."""
        expected = ", ".join(
            f"{str(dtype).removeprefix('torch.')} of shape (N, {', '.join(map(str, shape))})"
            for dtype, shape in zip(self.dtypes, self.shapes, strict=True)
        )
        leaves, spec = tree_flatten(inputs, self._spec)
        came = ", ".join(_describe(leaf) for leaf in leaves)
        message = f"{name}: expected {expected}, or a packed (N, {self.width}) tensor; got {came}"
        if spec == self._spec and all(
            isinstance(leaf, Tensor) and leaf.shape[1:] == shape
            for leaf, shape in zip(leaves, self.shapes, strict=True)
        ):
            raise TypeError(message)
        raise ValueError(message)

    def leaves(self, x: Tensor) -> list[Tensor]:
        """Packed ``(N, D)`` -> the tensors of the example's leaves, cast back to their dtypes."""
        if self._single:
            return [x.reshape(x.shape[0], *self.shapes[0])]
        parts = x.split(self.widths, dim=-1)
        return [
            (part if dtype.is_floating_point else part.round()).reshape(x.shape[0], *shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]

    def tree(self, leaves: list[Tensor]) -> Any:
        """The leaves in the structure of the example."""
        return tree_unflatten(leaves, self._spec)

    def unpack(self, x: Tensor) -> Any:
        """Packed ``(N, D)`` -> inputs as the network takes them; inverse of :meth:`pack`."""
        if not (isinstance(x, Tensor) and x.ndim == 2 and x.shape[-1] == self.width):
            raise ValueError(f"x: expected a packed (N, {self.width}) tensor, got {_describe(x)}")
        return self.tree(self.leaves(x))
