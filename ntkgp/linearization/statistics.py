"""Jacobian rows in float64, and what a pass over them leaves behind: a triangle, or their second moments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy
import scipy
import torch
from torch import Tensor

from ntkgp.linearization.grams.factors import Deviation, arrange, build
from ntkgp.linearization.rules.terms import Term

if TYPE_CHECKING:
    from ntkgp.linearization.network import LinearizedNetwork

# Strips of a symmetric product, which skip what lies right of the diagonal.
_STRIPS = 8
_LEAST_STRIP = 128
# Columns of a panel of the QR decomposition.
_PANEL = 64
# Bytes of Jacobian rows at a time: products of this size run at full speed.
_MOST_ROWS = 2**27
# Bytes of Jacobian rows that are made at a time: what stays in the cache is written once.
_ROWS_MADE = 2**24


def rows_at_a_time(lin: LinearizedNetwork, budget: int) -> int:
    """Inputs whose Jacobian rows, with what is made on the way, take at most an eighth of the budget; at least one."""
    return max(1, min(budget // 8, _MOST_ROWS) // (8 * lin.num_outputs * lin.num_parameters))


def jacobian_rows(lin: LinearizedNetwork, x: Tensor, budget: int = 2**31, keep_graph: bool = False) -> Tensor:
    r"""J(x) in float64, shape (N, C, P), columns in the order of ``lin.theta``.

    Rows are products of what the layers saw and what came back to them, multiplied in float64 also where the network
    computes in float32: the same Jacobian whose Grams the layer-wise engine forms.

    :param x: packed inputs (N, D).
    :param budget: bytes for the passes.
    :param keep_graph: keep the graph to x.

    Cost: one forward pass and C backward chains per row, N·C·P multiplications; N·C·P numbers and, on the way, as many
    as the largest layer's rows again.
    """
    row = 8 * lin.num_outputs * lin.num_parameters
    out = torch.zeros(len(x), lin.num_outputs, lin.num_parameters, dtype=torch.float64, device=x.device)
    start, most = 0, len(x) if keep_graph else max(1, _ROWS_MADE // row)
    while start < len(x):
        piece = slice(start, start + most)
        try:
            _write_rows(lin, x[piece], out[piece], budget, keep_graph)
            start += most
        except Deviation as deviation:
            lin.engine.plan.distrust(deviation.names)
            out, start = torch.zeros_like(out), 0
    return out


def _write_rows(lin: LinearizedNetwork, x: Tensor, out: Tensor, budget: int, keep_graph: bool) -> None:
    plan = lin.engine.plan
    slots = arrange(lin, plan, set())
    block = build(lin, plan, x, slots, budget, keep_graph=keep_graph)
    sizes = {name: p.numel() for name, p in lin.frozen.theta.items()}
    ends = dict(zip(sizes, torch.tensor(list(sizes.values())).cumsum(0).tolist(), strict=True))
    for slot, term in zip(slots, block.terms, strict=True):
        rows = _double(term).dense()
        if slot.factored and len(slot.names) == 2:
            table = rows.unflatten(-1, (sizes[slot.names[1]], -1))
            parts: Sequence[Tensor] = [table[..., :-1].flatten(2), table[..., -1]]
        else:
            parts = rows.split([sizes[name] for name in slot.names], dim=-1)
        for name, part in zip(slot.names, parts, strict=True):
            out[..., ends[name] - sizes[name] : ends[name]] = part


def _double(term: Term) -> Term:
    return term.with_tensors([t.to(torch.float64) if t.is_floating_point() else t for t in term.tensors()])


class RowTriangle:
    r"""As few rows as have the second moments of all, from rows that come piece by piece, in float64.

    Of rows J and targets t it keeps the triangle of the QR decomposition :math:`[J, t] = Q\,[R, Q^\top t]`, updated
    with every piece. So :math:`R^\top R = J^\top J` and :math:`R^\top (Q^\top t) = J^\top t`, but neither product is
    formed: small singular values keep their digits, of which the square would lose half, and every column has the
    accuracy of its own scale.

    :param num_parameters: P.

    Up to P rows are kept as they are.

    Cost: 2·m·P² flops for m rows; P² numbers, and m·P for a piece.

    >>> rows = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    >>> triangle = RowTriangle(2)
    >>> triangle.add(rows, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    >>> root, targets, unreached, squares = triangle.result()
    >>> bool((root.mT @ root - rows.mT @ rows).abs().max() < 1e-14), targets.shape, unreached
    (True, torch.Size([2]), 1)
    """

    def __init__(self, num_parameters: int) -> None:
        self._size, self.count = num_parameters, 0
        self._few: list[Tensor] = []
        self._triangle: Any = None

    @staticmethod
    def nbytes(num_parameters: int) -> int:
        """Bytes of one object, its result included."""
        return 16 * (num_parameters + 1) ** 2

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Add rows (m, P) with their targets (m,)."""
        if len(rows) == 0:
            return
        self.count += len(rows)
        joined = torch.cat([rows, targets.unsqueeze(-1)], dim=1)
        if self.count <= self._size:
            self._few.append(joined)
            return
        if self._few:
            joined, self._few = torch.cat([*self._few, joined]), []
        self._triangle = _update(self._triangle, joined)

    def result(self) -> tuple[Tensor, Tensor, int, float]:
        """R (n, P) and Qᵀt (n,) with n = min(rows, P), the number of other rows of Qᵀ, and the squares of t there."""
        if self._triangle is None:
            found = torch.cat(self._few)
            return found[:, :-1].contiguous(), found[:, -1].clone(), 0, 0.0
        triangle = self._triangle
        found = triangle if isinstance(triangle, Tensor) else torch.from_numpy(triangle)
        n = self._size
        root, targets = found[:n, :-1].triu().contiguous(), found[:n, -1].clone()
        return root, targets, self.count - n, float(found[n, -1].square())


def _update(triangle: Any, rows: Tensor) -> Any:
    """The triangle of a QR decomposition with more rows, (m, P + 1): LAPACK's update of it on the CPU."""
    if rows.device.type != "cpu":
        return torch.linalg.qr(rows if triangle is None else torch.cat([triangle, rows]), mode="r").R
    size = rows.shape[1]
    triangle = numpy.zeros((size, size), order="F") if triangle is None else triangle
    below = numpy.asfortranarray(rows.numpy())
    return scipy.linalg.lapack.dtpqrt(0, min(_PANEL, size), triangle, below, overwrite_a=1, overwrite_b=1)[0]


def add_symmetric(matrix: Tensor, rows: Tensor) -> None:
    """Add JᵀJ to the lower triangle of a (P, P) matrix; some of what is above it changes too."""
    size = len(matrix)
    count = max(1, min(_STRIPS, size // _LEAST_STRIP))
    for a, b in pairwise([size * i // count for i in range(count + 1)]):
        matrix[a:b, :b].addmm_(rows[:, a:b].mT, rows[:, :b])
