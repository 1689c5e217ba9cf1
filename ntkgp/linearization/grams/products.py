"""The Grams of a network as its users ask for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkgp.distributed import Shards, computed_in_turn, gather_numbers, grouped
from ntkgp.linearization.grams.engine import Side
from ntkgp.linearization.grams.packed import PackedWriter
from ntkgp.linearization.memory import format_memory, parse_memory
from ntkgp.linearization.symmetric import SymmetricGrams

if TYPE_CHECKING:
    from ntkgp.linearization.network import LinearizedNetwork

# Tile of the copy from below to above the diagonal.
_MIRROR = 512
# Panels of a symmetric Gram that the processes of a group share, and rows from which on they do.
_PANELS = 16
LEAST_SHARED = 1024


def grams(
    lin: LinearizedNetwork, left: Side, right: Side | None, max_memory: str | int | float, progress: bool,
    dtype: torch.dtype, force: str | None = None,
) -> Tensor:  # fmt: skip
    """See :meth:`ntkgp.LinearizedNetwork.grams`."""
    n1 = len(left) * left.num_outputs(lin)
    n2 = n1 if right is None else len(right) * right.num_outputs(lin)
    budget, size = parse_memory(max_memory), len(lin.groups) * n1 * n2 * dtype.itemsize
    if right is None and _is_shared(lin, left, budget - size, dtype):
        out = torch.zeros(len(lin.groups), n1, n2, dtype=dtype, device=left.x.device)
        for rows, panel in _panels(lin, left, budget - size, dtype):
            out[:, rows, : rows.stop] = panel
    else:
        out = _fill(lin, left, right, (len(lin.groups), n1, n2), budget, dtype, None, progress, force)
    if right is None:
        for matrix in out:
            mirror(matrix)
    return out


def weighted_gram(
    lin: LinearizedNetwork, left: Side, right: Side | None, variance: Tensor, max_memory: str | int | float
) -> Tensor:
    """See :meth:`ntkgp.LinearizedNetwork.weighted_gram`."""
    weights = variance.detach().to(torch.float64).tolist()
    n1 = len(left) * left.num_outputs(lin)
    n2 = n1 if right is None else len(right) * right.num_outputs(lin)
    out = _fill(lin, left, right, (1, n1, n2), parse_memory(max_memory), torch.float64, weights, False, None)[0]
    if right is None:
        mirror(out)
    return out


def symmetric_grams(
    lin: LinearizedNetwork, side: Side, max_memory: str | int | float, progress: bool, storage: str,
    dtype: torch.dtype, directory: str | None,
) -> SymmetricGrams:  # fmt: skip
    """See :meth:`ntkgp.LinearizedNetwork.symmetric_grams`."""
    budget, k, groups = parse_memory(max_memory), side.num_outputs(lin), len(lin.groups)
    n = len(side) * k
    working = 8 * n * n + lin.engine.smallest_budget(side, None)
    held = SymmetricGrams.size_of(groups, n, dtype)
    if storage == "auto":
        storage = "memory" if held + working <= budget or side.x.device.type != "cpu" else "disk"
    smallest = working + (held if storage == "memory" else 0)
    if smallest > budget:
        raise ValueError(
            f"max_memory: {format_memory(budget)} is too small for {groups} Gram block(s) of {n} x {n} kept on "
            f"{storage}; the smallest possible is {format_memory(smallest)}"
        )
    stack = SymmetricGrams(groups, n, dtype=dtype, device=side.x.device, storage=storage, directory=directory)
    writer = PackedWriter(stack, k, torch.float64)
    rest = budget - 8 * n * n - (held if storage == "memory" else 0)
    if _is_shared(lin, side, rest, torch.float64):
        for rows, panel in _panels(lin, side, rest, torch.float64):
            for i, (a, b) in enumerate(stack.bounds):
                top, bottom, end = max(a, rows.start), min(b, rows.stop), min(b, rows.stop)
                if top < bottom:
                    stack.strips(i)[:, top - a : bottom - a, :end] = panel[
                        :, top - rows.start : bottom - rows.start, :end
                    ]
        return stack
    lin.engine.fill(side, None, rest, torch.float64, writer, writer.start, None, progress)
    writer.flush()
    return stack


def _is_shared(lin: LinearizedNetwork, side: Side, budget: int, dtype: torch.dtype) -> bool:
    """Whether there are processes to share a symmetric Gram with, and room for its factors and a panel or two."""
    rows = len(side) * side.num_outputs(lin)
    if not grouped() or rows < LEAST_SHARED:
        return False
    panel = len(lin.groups) * dtype.itemsize * rows * -(-rows // _PANELS)
    fits = lin.factors_memory(len(side)) + 3 * panel + lin.gram_memory(1, len(side)) <= budget
    # A layer that broke its rule in rows that one process has seen changes what that one needs.
    return min(gather_numbers(int(fits)))[0] == 1


def _panels(lin: LinearizedNetwork, side: Side, budget: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows a … b − 1, columns 0 … b − 1 of a symmetric Gram, (G, b − a, b), each computed by one of the processes."""
    factors = side.factors or lin.engine.factors(side.x, side.outputs, budget)
    shards, k = Shards(len(side), _PANELS), side.num_outputs(lin)
    blocks = [shards.bounds(s) for s in range(shards.count)]

    def part(start: int, stop: int) -> Side:
        block = factors.block(slice(start, stop))
        return Side(block.x, block.outputs, block)

    def compute(s: int) -> Tensor:
        a, b = blocks[s]
        return grams(lin, part(a, b), part(0, b), budget, False, dtype)

    for s, panel in computed_in_turn(shards.count, compute):
        yield slice(blocks[s][0] * k, blocks[s][1] * k), panel


def _fill(
    lin: LinearizedNetwork, left: Side, right: Side | None, shape: tuple[int, int, int], budget: int,
    dtype: torch.dtype, weights: Sequence[float] | None, progress: bool, force: str | None,
) -> Tensor:  # fmt: skip
    size = shape[0] * shape[1] * shape[2] * torch.finfo(dtype).bits // 8
    smallest = size + lin.engine.smallest_budget(left, right, force)
    if smallest > budget:
        raise ValueError(
            f"max_memory: {format_memory(budget)} is too small for {shape[0]} Gram block(s) of {shape[1]} x {shape[2]} "
            f"with P = {lin.num_parameters}; the smallest possible is {format_memory(smallest)}"
        )
    out = torch.zeros(shape, dtype=dtype, device=left.x.device)
    k1 = left.num_outputs(lin)
    k2 = k1 if right is None else right.num_outputs(lin)

    def start() -> None:
        out.zero_()

    def write(g: int, rows: slice, columns: slice) -> Tensor:
        return out[g, rows.start * k1 : rows.stop * k1, columns.start * k2 : columns.stop * k2]

    lin.engine.fill(left, right, budget - size, dtype, write, start, weights, progress, force)
    return out


def mirror(matrix: Tensor) -> None:
    """Copy what is below the diagonal to above it, in place."""
    for a in range(0, len(matrix), _MIRROR):
        b = min(a + _MIRROR, len(matrix))
        matrix[:a, a:b] = matrix[a:b, :a].mT
        tile = matrix[a:b, a:b]
        tile.copy_(tile.tril() + tile.tril(-1).mT)


def stack(totals: list[Tensor | None], shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """One tensor of all groups; those without a contribution are zero."""
    return torch.stack([like.new_zeros(shape, dtype=dtype) if t is None else t for t in totals])
