r"""Sums over positions, fan-in and fan-out: one slot's contribution to a Gram block, in three orders.

For a weight with inputs a (T × I) and cotangents g (K × T × O) of each sample,

.. math:: K[nk, md] = \Big\langle \sum_t g_{nkt} \otimes a_{nt}, \sum_{t'} g_{mdt'} \otimes a_{mt'} \Big\rangle
    = \sum_{t,t'} (a_{nt} \cdot a_{mt'}) (g_{nkt} \cdot g_{mdt'}) .

*product* (T = 1): the Hadamard product of two Grams. *jacobian*: the rows Σ_t g ⊗ a, a slice of columns at a time.
*positions*: Σ_{t'} (a_{nt}·a_{mt'}) g_{mdt'} for every t, then the contraction with g_{nkt}.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ntkgp.linearization.rules.terms import Lookup, Outer, Term, outer_rows

# Elements of a temporary: small enough for a cache, large enough for a matrix product.
_TILE = 2**19
# Row strips of a symmetric block, which skip what lies right of the diagonal.
_STRIPS = 8
_LEAST_STRIP = 96
# Outputs from which on products with a short inner dimension cost more than a copy.
_MANY_OUTPUTS = 24


class Target(NamedTuple):
    """Where a product goes.

    :param out: shape (N1·K1, N2·K2); its dtype is that of the products. Of a symmetric block only entries up to the
        diagonal (and some more) are written.
    :param scale: factor of what is added.
    :param symmetric: both sides are the same rows.
    :param workspace: bytes for temporaries.
    """

    out: Tensor
    scale: float
    symmetric: bool
    workspace: int


def strips(size: int, symmetric: bool, least: int = _LEAST_STRIP) -> list[tuple[int, int, int | None]]:
    """Row ranges and the end of their columns (None for all)."""
    if not symmetric:
        return [(0, size, None)]
    count = max(1, min(_STRIPS, size // least))
    edges = [size * i // count for i in range(count + 1)]
    return [(a, b, b) for a, b in pairwise(edges)]


def add_product(target: Target, left: Outer, right: Outer) -> None:
    """Layers that are applied once per sample: (A₁A₂ᵀ) ∘ (G₁G₂ᵀ)."""
    out, dtype = target.out, target.out.dtype
    a1, g1 = left.left().to(dtype), left.right().to(dtype)  # shape: (N, r, I, 1), (N, K, r, O, 1)
    a2, g2 = (a1, g1) if right is left else (right.left().to(dtype), right.right().to(dtype))
    n1, k1, n2, k2 = *g1.shape[:2], *g2.shape[:2]
    for block in range(a1.shape[1]):
        x1, x2 = a1[:, block, :, 0], a2[:, block, :, 0]
        y1, y2 = g1[:, :, block, :, 0].flatten(0, 1), g2[:, :, block, :, 0].flatten(0, 1)
        step = max(1, min(_TILE, target.workspace // 16) // (k1 * n2 * k2))
        for a in range(0, n1, step):
            b = min(a + step, n1)
            end = b if target.symmetric else n2
            seen = torch.mm(x1[a:b], x2[:end].mT).mul_(target.scale)
            tile = torch.mm(y1[a * k1 : b * k1], y2[: end * k2].mT).view(b - a, k1, end * k2)
            # Each entry of the small Gram stands for K₂ neighbours: written out once, it serves all K₁ rows.
            wide = seen.repeat_interleave(k2, dim=1) if k2 > 1 else seen
            out[a * k1 : b * k1, : end * k2].view(b - a, k1, end * k2).addcmul_(tile, wide.unsqueeze(1))


def add_rows(target: Target, left: Term, right: Term) -> None:
    """J₁J₂ᵀ, a slice of columns at a time."""
    out = target.out
    width = max(64, target.workspace // (2 * (out.element_size() + 4) * sum(out.shape)))
    same = right is left
    for one, two in _column_slices(left, right, width):
        j1 = one.to(out.dtype)
        j2 = j1 if same else two.to(out.dtype)
        for a, b, end in strips(len(j1), target.symmetric):
            out[a:b, :end].addmm_(j1[a:b], j2[:end].mT, alpha=target.scale)


def _column_slices(left: Term, right: Term, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching columns of two Jacobians, (N·K, ≤ width) each; the same object twice where both are one."""
    same = right is left
    if isinstance(left, Lookup) and isinstance(right, Lookup):
        yield from _entry_slices(left, right, width)
        return
    if isinstance(left, Outer) and isinstance(right, Outer) and left.swapped == right.swapped:
        yield from _fan_out_slices(left, right, width)
        return
    rows1 = left.dense().flatten(0, 1)
    rows2 = rows1 if same else right.dense().flatten(0, 1)
    for start in range(0, rows1.shape[1], width):
        one = rows1[:, start : start + width]
        yield one, one if same else rows2[:, start : start + width]


def _fan_out_slices(left: Outer, right: Outer, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    a1, g1 = left.left(), left.right()
    a2, g2 = (a1, g1) if right is left else (right.left(), right.right())
    step = max(1, width // (a1.shape[1] * a1.shape[2]))
    for start in range(0, g1.shape[3], step):
        piece = slice(start, start + step)
        one = outer_rows(a1, g1[:, :, :, piece]).flatten(0, 1)
        yield one, one if right is left else outer_rows(a2, g2[:, :, :, piece]).flatten(0, 1)


def _entry_slices(left: Lookup, right: Lookup, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Only entries of the table that both sides read."""
    read = torch.unique(left.indices)
    if right is not left:
        read = read[torch.isin(read, torch.unique(right.indices))]
    read = read[read >= 0]
    step = max(1, width // left.cotangents.shape[-1])
    for entries in read.split(step):
        one = left.scatter(entries).flatten(2).flatten(0, 1)
        yield one, one if right is left else right.scatter(entries).flatten(2).flatten(0, 1)


def add_positions(target: Target, left: Outer | Lookup, right: Outer | Lookup) -> None:
    """Σ_t (Σ_t' (a_t·a'_t') g'_t') · g_t, a few samples on the left at a time."""
    out, dtype = target.out, target.out.dtype
    seen1, back1 = _by_position(left, dtype)  # shape: (r, N, T, I) or (N, T), (r, N, T, K, O)
    seen2, back2 = (seen1, back1) if right is left else _by_position(right, dtype)
    (r, n1, t1, k1, o), (n2, t2, k2) = back1.shape, back2.shape[1:4]
    per_sample = t1 * n2 * k2 * (o + k1) * out.element_size()
    step = max(1, min(target.workspace, 2**26) // per_sample)
    for a in range(0, n1, step):
        b = min(a + step, n1)
        end = b if target.symmetric else n2
        for block in range(r):
            if isinstance(left, Lookup):
                gram = (seen1[a:b, :, None, None] == seen2[:end]) & (seen1[a:b, :, None, None] >= 0)
                weights = gram.permute(2, 0, 1, 3).reshape(end, (b - a) * t1, t2).to(dtype)
            else:
                flat = seen1[block, a:b].flatten(0, 1) @ seen2[block, :end].flatten(0, 1).mT
                weights = flat.view((b - a) * t1, end, t2).transpose(0, 1)
            passed = torch.empty((b - a) * t1, end, k2 * o, dtype=dtype, device=out.device)
            torch.bmm(weights, back2[block, :end].flatten(2), out=passed.transpose(0, 1))
            if k1 < _MANY_OUTPUTS:
                tile = torch.bmm(back1[block, a:b].flatten(0, 1), passed.view((b - a) * t1, end * k2, o).mT)
                total = tile.view(b - a, t1, k1, end * k2).sum(1)
            else:
                # Positions join the inner dimension: a copy, instead of T products of the size of the result.
                whole = passed.view(b - a, t1, end * k2, o).transpose(1, 2).reshape(b - a, end * k2, t1 * o)
                total = torch.bmm(back1[block, a:b].transpose(1, 2).reshape(b - a, k1, t1 * o), whole.mT)
            out[a * k1 : b * k1, : end * k2].add_(total.flatten(0, 1), alpha=target.scale)


def _by_position(term: Outer | Lookup, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if isinstance(term, Lookup):
        return term.indices, term.cotangents.transpose(1, 2).unsqueeze(0).to(dtype).contiguous()
    inputs = term.left().permute(1, 0, 3, 2).to(dtype).contiguous()
    return inputs, term.right().permute(2, 0, 4, 1, 3).to(dtype).contiguous()


def matrix(left: Term, right: Term, dtype: torch.dtype) -> Tensor:
    """The same as a new tensor with a graph to the factors, (N1·K1, N2·K2)."""
    if isinstance(left, Outer) and isinstance(right, Outer) and left.right().shape[-1] == right.right().shape[-1] == 1:
        a1, g1 = left.left()[..., 0].to(dtype), left.right()[..., 0].to(dtype)
        a2, g2 = (a1, g1) if right is left else (right.left()[..., 0].to(dtype), right.right()[..., 0].to(dtype))
        (n1, k1), (n2, k2) = g1.shape[:2], g2.shape[:2]
        terms = []
        for r in range(a1.shape[1]):
            seen = a1[:, r] @ a2[:, r].mT
            back = g1[:, :, r].flatten(0, 1) @ g2[:, :, r].flatten(0, 1).mT
            terms.append((back.view(n1, k1, n2, k2) * seen[:, None, :, None]).view(n1 * k1, n2 * k2))
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)
    rows = [slices for slices in _column_slices(left, right, 2**62)]
    parts = [one.to(dtype) @ (one if two is one else two).to(dtype).mT for one, two in rows]
    return parts[0] if parts else _no_columns(left, right, dtype)


def _no_columns(left: Term, right: Term, dtype: torch.dtype) -> Tensor:
    sizes = [term.tensors()[-1].shape[:2].numel() for term in (left, right)]
    return left.tensors()[-1].new_zeros(*sizes, dtype=dtype)


def pointwise(left: Term, right: Term, dtype: torch.dtype, by_positions: bool, workspace: int) -> Tensor:
    """J_n J'_nᵀ of matching samples, shape (N, K1, K2)."""
    if isinstance(left, Outer) and isinstance(right, Outer):
        if left.right().shape[-1] == right.right().shape[-1] == 1:
            a1, g1 = left.left()[..., 0].to(dtype), left.right()[..., 0].transpose(1, 2).to(dtype)
            a2, g2 = a1, g1
            if right is not left:
                a2, g2 = right.left()[..., 0].to(dtype), right.right()[..., 0].transpose(1, 2).to(dtype)
            return ((g1 @ g2.mT) * (a1 * a2).sum(-1)[..., None, None]).sum(1)
        if by_positions:
            return _pointwise_positions(left, right, dtype)
    n, k1 = left.tensors()[-1].shape[:2]
    k2 = right.tensors()[-1].shape[1]
    total = left.tensors()[-1].new_zeros(n, k1, k2, dtype=dtype)
    width = max(64, workspace // (2 * (total.element_size() + 4) * n * (k1 + k2)))
    for one, two in _column_slices(left, right, width):
        j1 = one.view(n, k1, -1).to(dtype)
        j2 = j1 if two is one else two.view(n, k2, -1).to(dtype)
        total = total + j1 @ j2.mT
    return total


def _pointwise_positions(left: Outer, right: Outer, dtype: torch.dtype) -> Tensor:
    seen1, back1 = _by_position(left, dtype)
    seen2, back2 = (seen1, back1) if right is left else _by_position(right, dtype)
    passed = (seen1 @ seen2.mT) @ back2.flatten(3)  # shape: (r, N, T, K2·O)
    r, n, t, k1, o = back1.shape
    passed = passed.view(r, n, t, -1, o).transpose(2, 3).flatten(3)
    return (back1.transpose(2, 3).reshape(r, n, k1, t * o) @ passed.mT).sum(0)
