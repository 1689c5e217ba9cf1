"""What a rule says of a parameter: its Jacobian rows, factored by sample, output, position and fan-in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """Jacobian rows as they are.

    :param rows: shape (N, K, p) with p the parameter's entries in its own order.
    """

    rows: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored, sample by sample along the first dimension."""
        return (self.rows,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Rows:
        """The same term of other samples."""
        return Rows(*tensors)

    def dense(self) -> Tensor:
        """Jacobian rows, shape (N, K, p)."""
        return self.rows

    def merge(self, uses: int) -> Rows:
        """Sum over the ``uses`` rows that belong to one sample, (N·uses, K, p) -> (N, K, p)."""
        return Rows(self.rows.unflatten(0, (-1, uses)).sum(1))


@dataclass(frozen=True)
class Summed:
    r"""A bias: :math:`J_{nk} = \sum_t g_{nkt}`.

    :param cotangents: shape (N, K, r, O, T).
    """

    cotangents: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored, sample by sample along the first dimension."""
        return (self.cotangents,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Summed:
        """The same term of other samples."""
        return Summed(*tensors)

    def dense(self) -> Tensor:
        """Jacobian rows, shape (N, K, r·O)."""
        return self.cotangents.sum(-1).flatten(2)

    def merge(self, uses: int) -> Summed:
        """Positions of the rows that belong to one sample, side by side."""
        return Summed(_positions(self.cotangents, uses))


@dataclass(frozen=True)
class Outer:
    r"""A weight that multiplies: :math:`J_{nk} = \sum_t g_{nkt} \otimes a_{nt}`, r times side by side.

    :param inputs: what is kept of the forward pass, N rows.
    :param cotangents: what is kept of the backward passes, shape (N, K, ...).
    :param unfold: ``inputs`` -> a, shape (N, r, I, T).
    :param unfold_cotangents: (N', ...) -> g, shape (N', r, O, T), where N' runs over samples and outputs.
    :param swapped: the parameter is (r, I, O) rather than (r, O, I).
    """

    inputs: Tensor
    cotangents: Tensor
    unfold: Map | None = None
    unfold_cotangents: Map | None = None
    swapped: bool = False

    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored, sample by sample along the first dimension."""
        return self.inputs, self.cotangents

    def with_tensors(self, tensors: Sequence[Tensor]) -> Outer:
        """The same term of other samples."""
        return replace(self, inputs=tensors[0], cotangents=tensors[1])

    def left(self) -> Tensor:
        """Inputs a, shape (N, r, I, T)."""
        return self.inputs if self.unfold is None else self.unfold(self.inputs)

    def right(self) -> Tensor:
        """Cotangents g, shape (N, K, r, O, T)."""
        if self.unfold_cotangents is None:
            return self.cotangents
        n, k = self.cotangents.shape[:2]
        return self.unfold_cotangents(self.cotangents.flatten(0, 1)).unflatten(0, (n, k))

    def dense(self) -> Tensor:
        """Jacobian rows, shape (N, K, r·O·I)."""
        return outer_rows(self.left(), self.right(), self.swapped)

    def merge(self, uses: int) -> Outer:
        """Positions of the rows that belong to one sample, side by side."""
        return Outer(_positions(self.left(), uses), _positions(self.right(), uses), swapped=self.swapped)


@dataclass(frozen=True)
class Lookup:
    r"""A table of which rows are read: :math:`J_{nk} = \sum_t e_{i_{nt}} \otimes g_{nkt}`.

    :param indices: i, shape (N, T); -1 where a position reads nothing that is trained.
    :param cotangents: g, shape (N, K, T, O).
    :param size: number of rows of the table.
    """

    indices: Tensor
    cotangents: Tensor
    size: int

    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored, sample by sample along the first dimension."""
        return self.indices, self.cotangents

    def with_tensors(self, tensors: Sequence[Tensor]) -> Lookup:
        """The same term of other samples."""
        return replace(self, indices=tensors[0], cotangents=tensors[1])

    def dense(self) -> Tensor:
        """Jacobian rows, shape (N, K, size·O)."""
        return self.scatter(torch.arange(self.size, device=self.indices.device)).flatten(2)

    def scatter(self, entries: Tensor) -> Tensor:
        """Jacobian rows of some rows of the table, shape (N, K, len(entries), O)."""
        n, k, _, o = self.cotangents.shape
        place = self.indices.new_full((self.size + 1,), len(entries))
        place[entries] = torch.arange(len(entries), device=place.device)
        slot = place[self.indices]  # an index of -1 reads the last, which is no entry
        out = self.cotangents.new_zeros(n, k, len(entries) + 1, o)
        return out.scatter_add(2, slot[:, None, :, None].expand_as(self.cotangents), self.cotangents)[:, :, :-1]

    def merge(self, uses: int) -> Lookup:
        """Positions of the rows that belong to one sample, side by side."""
        cotangents = self.cotangents.unflatten(0, (-1, uses)).transpose(1, 2).flatten(2, 3)
        return Lookup(self.indices.unflatten(0, (-1, uses)).flatten(1), cotangents, self.size)


Term = Rows | Summed | Outer | Lookup
T = TypeVar("T", bound=Term)


def _positions(x: Tensor, uses: int) -> Tensor:
    """(N·uses, ..., T) -> (N, ..., uses·T)."""
    return x.unflatten(0, (-1, uses)).movedim(1, -2).flatten(-2)


def outer_rows(inputs: Tensor, cotangents: Tensor, swapped: bool = False) -> Tensor:
    """Σ_t g ⊗ a: inputs (N, r, I, T), cotangents (N, K, r, O, T) -> (N, K, r·O·I)."""
    n, k, r, o, t = cotangents.shape
    i = inputs.shape[2]
    if r == 1:
        rows = torch.bmm(cotangents.reshape(n, k * o, t), inputs.reshape(n, i, t).mT).reshape(n, k, 1, o, i)
    else:
        left = cotangents.transpose(1, 2).reshape(n * r, k * o, t)
        rows = torch.bmm(left, inputs.reshape(n * r, i, t).mT).reshape(n, r, k, o, i).transpose(1, 2)
    return (rows.mT if swapped else rows).flatten(2)


def combine(terms: Sequence[Term]) -> Term:
    """One term for a parameter that is used several times: cross terms between the uses included."""
    if len(terms) == 1:
        return terms[0]
    first = terms[0]
    if all(isinstance(term, Outer) and term.swapped == getattr(first, "swapped", None) for term in terms):
        left = torch.cat([term.left() for term in terms if isinstance(term, Outer)], dim=-1)
        right = torch.cat([term.right() for term in terms if isinstance(term, Outer)], dim=-1)
        return Outer(left, right, swapped=bool(getattr(first, "swapped", False)))
    if all(isinstance(term, Lookup) for term in terms):
        lookups = [term for term in terms if isinstance(term, Lookup)]
        cotangents = torch.cat([term.cotangents for term in lookups], dim=2)
        return Lookup(torch.cat([term.indices for term in lookups], dim=1), cotangents, lookups[0].size)
    total = first.dense()
    for term in terms[1:]:
        total = total + term.dense()
    return Rows(total)
