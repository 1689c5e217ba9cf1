"""How operators, kernels and means hold a network, and what they remember of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import parse_memory
from ntkgp.linearization.second_order import needs_graph

# Cotangents share one forward pass in a vjp; beyond this many its cost is negligible.
_MOST_COLUMNS = 32


class NetworkHandle:
    """
    An opaque reference to a linearised network.

    linear_operator's ``to``, ``double``, ``half``, ``cuda`` and ``clone`` call the method of the same name of every
    argument that has one, and ``deepcopy`` copies every attribute of a module. A handle has no such method and copies
    as itself, so the network is shared by all operators, kernels and means and never moved or duplicated.

    :param lin: the linearised network.
    :param max_memory: budget of what a product holds besides its operands and result.
    :raises ValueError: a budget that is not a positive number of bytes or a string like ``"2GiB"``.

    >>> import copy, torch, ntkgp
    >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(3, 2), torch.randn(2, 3))
    >>> handle = ntkgp.operators.NetworkHandle(lin)
    >>> copy.deepcopy(handle).lin is lin
    True
    """

    __slots__ = ("lin", "max_memory")

    def __init__(self, lin: LinearizedNetwork, max_memory: str | int | float = "2GiB") -> None:
        self.lin = lin
        self.max_memory = parse_memory(max_memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkHandle:
        return self

    def __reduce__(self) -> tuple[type[NetworkHandle], tuple[LinearizedNetwork, int]]:
        return NetworkHandle, (self.lin, self.max_memory)

    def columns(self) -> int:
        """Number of vectors of parameter space that are handled at a time."""
        item = torch.finfo(self.lin.dtype).bits // 8
        per_column = 4 * self.lin.num_parameters * item + 2 * self.lin.activation_bytes
        return min(max(1, self.max_memory // per_column), _MOST_COLUMNS)

    def rows_with_graph(self, columns: int) -> int:
        """Number of inputs whose vjp with ``columns`` cotangents is differentiated at a time."""
        return max(1, self.max_memory // (4 * (3 + columns) * self.lin.activation_bytes))


class ValueCache:
    """
    The most recent results for given tensors, recognised by their values.

    GPyTorch slices, detaches and repeats inputs, so the tensor that comes again is seldom the same object. A copy of
    the inputs is kept: an in-place change of the caller's tensor is another input. Copies and pickles start empty.

    :param max_entries: number of results kept; the least recently used goes first.
    :param max_memory: bytes of all results together; the newest is kept whatever its size.
    """

    def __init__(self, max_entries: int, max_memory: int) -> None:
        self._limits = (max_entries, max_memory)
        self._entries: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def fetch(self, keys: tuple[Tensor, ...], num_bytes: int, compute: Callable[[], Tensor]) -> Tensor:
        """The stored result for these inputs, or that of ``compute``, which will take ``num_bytes``."""
        for i, (stored, result) in enumerate(self._entries):
            if len(stored) == len(keys) and all(map(same, stored, keys)):
                self._entries.append(self._entries.pop(i))
                return result
        max_entries, max_memory = self._limits
        while self._entries and (
            len(self._entries) >= max_entries
            or num_bytes + sum(r.numel() * r.element_size() for _, r in self._entries) > max_memory
        ):
            self._entries.pop(0)
        result = compute().detach()
        # Kept tensors made in inference mode would break every later gradient.
        with torch.inference_mode(False):
            result = result.clone() if result.is_inference() else result
            self._entries.append((tuple(key.detach().clone() for key in keys), result))
        return result

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> ValueCache:
        return ValueCache(*self._limits)

    def __reduce__(self) -> tuple[type[ValueCache], tuple[int, int]]:
        return ValueCache, self._limits


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values in the same shape, dtype and place."""
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


def point_grams(handle: NetworkHandle, x1: Tensor, x2: Tensor) -> Tensor:
    r"""Blocks :math:`J_g(x_{1,n}) J_g(x_{2,n})^\top` of each group, (G, N, C, C) in float64; differentiable in x."""
    one = x1 is x2 or (not needs_graph(x1, x2) and same(x1, x2))
    budget = max(handle.max_memory, handle.lin.diagonals_memory(len(x1), not one))
    return handle.lin.gram_diagonals(x1, None if one else x2, budget)
