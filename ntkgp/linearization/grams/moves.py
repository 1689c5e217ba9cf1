"""Which nodes of an autograd graph may move rows, or positions of different rows, to places that depend on the data."""

from __future__ import annotations

import re
from typing import Any

# Indexing, sorting and whatever else is told by its name alone.
_BY_NAME = (
    "Index", "Gather", "Scatter", "Masked", "Sort", "Topk", "Take", "Put", "Flip", "Roll", "Unique", "Pack", "Solve",
    "AsStrided", "Cdist",
)  # fmt: skip
# Nodes of torch itself; others are a user's functions, compiled code, or writes into views.
_KNOWN = re.compile(r"Backward\d*$")
_OWN = re.compile(r"Backward\d+$")
# Where the two factors of a product are among the inputs.
_PRODUCTS = {
    "Mm": (0, 1), "Bmm": (0, 1), "Mv": (0, 1), "Dot": (0, 1), "Vdot": (0, 1), "Addmm": (1, 2), "Addmv": (1, 2),
    "Baddbmm": (1, 2), "Addbmm": (1, 2),
}  # fmt: skip
# What may stand between a parameter and the product that it is a factor of.
_VIEWS = {"T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Unsqueeze", "Squeeze",
          "ToCopy", "Slice", "Select", "Clone", "Alias", "Detach"}  # fmt: skip
_DIMS = ("_saved_dim", "_saved_dims", "_saved_dimension", "_saved_dim1", "_saved_dim2")
# They have a dimension, but leave every row where it is, or have their pieces from nodes that are looked at.
_STILL = {"Softmax", "LogSoftmax", "Cat", "Stack", "Unsqueeze", "Squeeze", "Glu", "Transpose", "Permute"}


def may_move(node: Any, num_rows: int) -> bool:
    """Whether a node may permute rows by the values of the data: only products and sums over all rows, parts of their
    dimension, indices, and functions that are not torch's own.

    :param num_rows: of the batch; a dimension that holds all rows, folded or not, is a multiple of it.
    """
    name = node.name()
    if not _OWN.search(name) or any(part in name for part in _BY_NAME):
        return True
    kind = _KNOWN.sub("", name)
    if kind in _PRODUCTS:
        return _contracts(node, _PRODUCTS[kind], num_rows)
    if kind == "Convolution":
        return not _is_parameter(node.next_functions[1]) and _holds(_shape(node.next_functions[0]), [1], num_rows)
    if kind == "Embedding":
        return not _is_parameter(node.next_functions[0])
    if kind in _STILL or not node.next_functions:
        return False
    return _holds(_shape(node.next_functions[0]), _dims(node, kind), num_rows)


def _contracts(node: Any, places: tuple[int, int], num_rows: int) -> bool:
    """Whether a product sums over rows: a factor that is a parameter is multiplied by features."""
    factors = [node.next_functions[place] for place in places]
    if any(_is_parameter(factor) for factor in factors):
        return False
    for factor, dim in zip(factors, (-1, -2), strict=True):
        shape = _shape(factor)
        if shape:
            return _holds(shape, [max(dim, -len(shape))], num_rows)
    return True


def _dims(node: Any, kind: str) -> list[int] | None:
    """Dimensions that a node takes parts of or sums over; None for all."""
    found: list[int] = []
    for name in _DIMS:
        value = getattr(node, name, ())
        if value is None:
            return None
        found += [value] if isinstance(value, int) else list(value)
    if not found and kind in ("Sum", "Mean", "Prod", "Max", "Min"):
        return None
    return [dim - 2**64 if dim >= 2**63 else dim for dim in found]  # torch saves them without a sign


def _holds(shape: tuple[int, ...] | None, dims: list[int] | None, num_rows: int) -> bool:
    """Whether one of these dimensions may be that of the rows."""
    if shape is None:
        return False
    return any(shape[dim] % num_rows == 0 for dim in (range(len(shape)) if dims is None else dims))


def _shape(function: tuple[Any, int]) -> tuple[int, ...] | None:
    """Shape of what came in; None for what has no graph."""
    child, place = function
    if child is None:
        return None
    variable = getattr(child, "variable", None)
    return tuple(child._input_metadata[place].shape if variable is None else variable.shape)


def _is_parameter(function: tuple[Any, int]) -> bool:
    """Whether a leaf comes in, as it is or through views."""
    child = function[0]
    while child is not None and getattr(child, "variable", None) is None:
        if _KNOWN.sub("", child.name()) not in _VIEWS:
            return False
        child = child.next_functions[0][0]
    return child is not None
