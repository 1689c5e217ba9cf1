"""Per-group Gram blocks K_g = J_g J_gᵀ, built block by block within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from ntkgp.linearization.memory import format_memory, parse_memory

if TYPE_CHECKING:
    from ntkgp.linearization.network import LinearizedNetwork

_CAST_ELEMENTS = 2**22


@dataclass(frozen=True)
class JacobianRows:
    """Jacobian rows of fixed inputs, kept so that products with them need no pass over these inputs again.

    :param x: the packed inputs, shape (N, D).
    :param tensors: one matrix (N·C, p_t) per parameter tensor, in the network's dtype.
    :param num_outputs: C.
    """

    x: Tensor
    tensors: tuple[Tensor, ...]
    num_outputs: int

    def __len__(self) -> int:
        return self.x.shape[0]

    def block(self, rows: slice) -> list[Tensor]:
        """The rows of some inputs."""
        c = self.num_outputs
        return [tensor[rows.start * c : rows.stop * c] for tensor in self.tensors]


Source = Tensor | JacobianRows


def _column_pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices over the columns of a Jacobian block such that its float64 copy stays small."""
    step = max(1, _CAST_ELEMENTS // max(1, rows))
    for start in range(0, columns, step):
        yield slice(start, min(start + step, columns))


def _accumulate(out: Tensor, left: Sequence[Tensor], right: Sequence[Tensor], group: Sequence[int]) -> None:
    """out[g] += J_t J_tᵀ over the tensors t of group g, products in float64."""
    for a, b, g in zip(left, right, group, strict=True):
        for piece in _column_pieces(a.shape[0] + b.shape[0], a.shape[1]):
            wide = a[:, piece].to(torch.float64)
            out[g].addmm_(wide, wide.mT if b is a else b[:, piece].to(torch.float64).mT)


def _blocks(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def block_memory(lin: LinearizedNetwork) -> tuple[int, int]:
    """Bytes that products of Jacobian blocks take: of casts to float64, and per input of a block."""
    c = lin.num_outputs
    item = torch.finfo(lin.dtype).bits // 8
    # Two blocks are held at a time; vmap(jacrev) keeps about one more copy and the C cotangents of every activation.
    per_row = 2 * (3 * c * lin.num_parameters * item + (c + 2) * lin.activation_bytes)
    return 16 * min(c * lin.num_parameters, _CAST_ELEMENTS), per_row


def block_rows(lin: LinearizedNetwork, n1: int, n2: int, budget: int) -> int:
    """Largest number of inputs per Jacobian block with which the Grams fit in the budget.

    :raises ValueError: not even one input at a time fits; the message gives the smallest possible budget.
    """
    c = lin.num_outputs
    result = 8 * len(lin.groups) * n1 * c * n2 * c
    workspace, per_row = block_memory(lin)
    smallest = result + workspace + per_row
    if smallest > budget:
        raise ValueError(
            f"max_memory: {format_memory(budget)} is too small for {len(lin.groups)} Gram block(s) of "
            f"{n1 * c} x {n2 * c} with P = {lin.num_parameters}; the smallest possible is {format_memory(smallest)}"
        )
    return max(1, (budget - result - workspace) // per_row)


def _rows(lin: LinearizedNetwork, source: Source, rows: slice) -> list[Tensor]:
    """Jacobian rows of one block, one (rows·C, p_t) matrix per parameter tensor."""
    if isinstance(source, JacobianRows):
        return source.block(rows)
    return [_by_row(tensor) for tensor in lin.jacobian_by_tensor(source[rows]).values()]


def _by_row(tensor: Tensor) -> Tensor:
    """Jacobian rows of one parameter tensor, (N, C, *shape) -> (N·C, p_t)."""
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], -1)


def jacobian_rows(lin: LinearizedNetwork, x: Tensor, max_memory: str | int | float) -> JacobianRows:
    """See :meth:`ntkgp.LinearizedNetwork.rows`."""
    smallest, budget = lin.rows_memory(len(x)), parse_memory(max_memory)
    if smallest > budget:
        raise ValueError(
            f"max_memory: {format_memory(budget)} is too small for the Jacobian rows of {len(x)} inputs; "
            f"the smallest possible is {format_memory(smallest)}"
        )
    c, step = lin.num_outputs, 1 + (budget - smallest) // block_memory(lin)[1]
    tensors = [torch.empty(len(x) * c, p.numel(), dtype=p.dtype, device=x.device) for p in lin.frozen.theta.values()]
    for block in _blocks(len(x), step):
        for out, part in zip(tensors, _rows(lin, x, block), strict=True):
            out[block.start * c : block.stop * c] = part
    return JacobianRows(x, tuple(tensors), c)


def grams(
    lin: LinearizedNetwork, x1: Source, x2: Source | None, max_memory: str | int | float, progress: bool
) -> Tensor:
    """See :meth:`ntkgp.LinearizedNetwork.grams`."""
    symmetric = x2 is None
    other = x1 if x2 is None else x2
    n1, n2, c = len(x1), len(other), lin.num_outputs
    rows = block_rows(lin, n1, n2, parse_memory(max_memory))
    device = x1.x.device if isinstance(x1, JacobianRows) else x1.device
    out = torch.zeros(len(lin.groups), n1 * c, n2 * c, dtype=torch.float64, device=device)
    left, right = _blocks(n1, rows), _blocks(n2, rows)
    held: tuple[slice, list[Tensor]] | None = None
    with tqdm(total=len(left), desc="Gram", disable=not progress) as bar:
        for i, a in enumerate(left):
            j_a = held[1] if symmetric and held is not None and held[0] == a else _rows(lin, x1, a)
            # Even rows of blocks run backwards, odd ones forwards: the block at a turn need not be computed again.
            targets = right[: i + 1] if symmetric else right
            for b in targets[:: -1 if i % 2 == 0 else 1]:
                if symmetric and b == a:
                    j_b = j_a
                elif held is not None and held[0] == b:
                    j_b = held[1]
                else:
                    j_b = _rows(lin, other, b)
                held = (b, j_b)
                block = out[:, a.start * c : a.stop * c, b.start * c : b.stop * c]
                _accumulate(block, j_a, j_b, lin.groups.of_tensor)
                if symmetric and b != a:
                    out[:, b.start * c : b.stop * c, a.start * c : a.stop * c] = block.mT
            bar.update()
    return out


def weighted_gram(
    lin: LinearizedNetwork, x1: Tensor, other: Source, variance: Tensor, max_memory: str | int | float
) -> Tensor:
    """See :meth:`ntkgp.LinearizedNetwork.weighted_gram`."""
    c = lin.num_outputs
    weights = variance.detach().to(torch.float64).tolist()
    out = torch.zeros(len(x1) * c, len(other) * c, dtype=torch.float64, device=x1.device)
    step = block_rows(lin, 1, 1, parse_memory(max_memory))
    kept = isinstance(other, JacobianRows)
    for a in _blocks(len(x1), step):
        left = _rows(lin, x1, a)
        for b in [slice(0, len(other))] if kept else _blocks(len(other), step):
            block = out[a.start * c : a.stop * c, b.start * c : b.stop * c]
            for j, k, g in zip(left, _rows(lin, other, b), lin.groups.of_tensor, strict=True):
                for piece in _column_pieces(j.shape[0] + k.shape[0], j.shape[1]):
                    block.addmm_(j[:, piece].to(torch.float64), k[:, piece].to(torch.float64).mT, alpha=weights[g])
    return out


def differentiable_weighted_gram(lin: LinearizedNetwork, x1: Tensor, other: Source, variance: Tensor) -> Tensor:
    """The same with a graph to the inputs (not to the variances)."""
    weights = variance.detach().to(torch.float64)
    left = [_by_row(rows) for rows in lin.jacobian_by_tensor(x1).values()]
    if isinstance(other, JacobianRows):
        right = list(other.tensors)
    else:
        right = [_by_row(rows) for rows in lin.jacobian_by_tensor(other).values()]
    terms = [
        weights[g] * (a.to(torch.float64) @ b.to(torch.float64).mT)
        for a, b, g in zip(left, right, lin.groups.of_tensor, strict=True)
    ]
    return torch.stack(terms).sum(0)


def gram_diagonals(lin: LinearizedNetwork, x: Tensor, max_memory: str | int | float) -> Tensor:
    """See :meth:`ntkgp.LinearizedNetwork.gram_diagonals`."""
    c = lin.num_outputs
    out = torch.zeros(len(lin.groups), x.shape[0], c, c, dtype=torch.float64, device=x.device)
    rows = block_rows(lin, 1, 1, parse_memory(max_memory))
    for block in _blocks(x.shape[0], rows):
        for tensor, g in zip(lin.jacobian_by_tensor(x[block]).values(), lin.groups.of_tensor, strict=True):
            flat = tensor.reshape(*tensor.shape[:2], -1)
            for piece in _column_pieces(flat.shape[0] * c, flat.shape[2]):
                wide = flat[:, :, piece].to(torch.float64)
                out[g, block] += wide @ wide.mT
    return out


def differentiable(
    left: dict[str, Tensor], right: dict[str, Tensor], groups: Sequence[int], num_groups: int,
    product: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Per-group products of Jacobians that carry a graph to the inputs."""
    out: list[Tensor | None] = [None] * num_groups
    for a, b, g in zip(left.values(), right.values(), groups, strict=True):
        wide = [rows.reshape(*rows.shape[:2], -1).to(torch.float64) for rows in (a, b)]
        term = product(*wide)
        previous = out[g]
        out[g] = term if previous is None else previous + term
    return torch.stack([term for term in out if term is not None])
