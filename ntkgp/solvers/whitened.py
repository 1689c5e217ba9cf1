"""I + WᵀKW: the linear system of every likelihood, with unit noise and never factored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkgp.solvers.conjugate_gradients import Product
from ntkgp.solvers.nystrom import NystromPreconditioner


@dataclass(frozen=True)
class WhitenedSystem:
    r""":math:`A = I + W^\top K W`, with a block of W for each input: what a Gaussian posterior inverts.

    Gaussian noise D: :math:`WW^\top = D^{-1}`. Classification: :math:`WW^\top = B`, the curvature, singular for
    softmax.
    In both cases the data take :math:`k^\top W A^{-1} W^\top k` off a prior variance.

    :param product: multiplies by K: (n, k) -> (n, k), n = N·C, input-major rows.
    :param columns: the columns of K of given inputs: indices (M,) -> (n, M·C).
    :param blocks: K(x_n, x_n), shape (N, C, C).
    :param factor: the blocks of W, shape (N, C, R).

    >>> K, points = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, 1, dtype=torch.float64)
    >>> system = WhitenedSystem(lambda v: K @ v, lambda i: K[:, i], points, 2 * points)
    >>> system(torch.ones(2, 1, dtype=torch.float64)).flatten()
    tensor([5., 5.], dtype=torch.float64)
    """

    product: Callable[[Tensor], Tensor]
    columns: Callable[[Tensor], Tensor]
    blocks: Tensor
    factor: Tensor

    @property
    def size(self) -> int:
        """Number N·R of whitened rows."""
        return self.factor.shape[0] * self.factor.shape[2]

    def reduce(self, rows: Tensor) -> Tensor:
        """Wᵀ V, shape (n, k) -> (N·R, k)."""
        return reduce_rows(rows, self.factor)

    def expand(self, rows: Tensor) -> Tensor:
        """W V, shape (N·R, k) -> (n, k)."""
        return expand_rows(rows, self.factor)

    def __call__(self, rows: Tensor) -> Tensor:
        """A V, shape (N·R, k) -> (N·R, k)."""
        return rows + self.reduce(self.product(self.expand(rows)))

    def diagonal(self) -> Tensor:
        """Diagonal of WᵀKW, shape (N·R,)."""
        return torch.einsum("ncr,ncd,ndr->nr", self.factor, self.blocks, self.factor).reshape(-1)

    def pointwise_logdet(self) -> Tensor:
        """Σ_n logdet of the diagonal blocks of A, never below logdet A (Fischer)."""
        inner = torch.einsum("ncr,ncd,nds->nrs", self.factor, self.blocks, self.factor)
        return torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp_min(0.0).log1p().sum()

    def landmarks(self, num_points: int | None = None, seed: int = 0) -> Tensor:
        """Indices of random inputs, by default about 8·√n rows and 200 at least; the global generator is left alone."""
        total, rank = self.factor.shape[0], self.factor.shape[2]
        if num_points is None:
            num_points = -(-default_rows(self.size) // rank)
        if num_points < 1:
            raise ValueError(f"num_points: expected a positive number of landmarks, got {num_points}")
        generator = torch.Generator().manual_seed(seed)
        points = torch.randperm(total, generator=generator)[: min(num_points, total)].sort().values
        return points.to(self.factor.device)

    def whitened_columns(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of WᵀKW of all outputs of some inputs, (N·R, M·R), and their own rows, (M·R, M·R)."""
        columns = self.columns(points)
        m, (c, r) = len(points), self.factor.shape[1:]
        chosen = torch.einsum("nmc,mcr->nmr", columns.reshape(-1, m, c), self.factor[points]).reshape(-1, m * r)
        cross = self.reduce(chosen)
        rows = (points.unsqueeze(-1) * r + torch.arange(r, device=points.device)).reshape(-1)
        return cross, cross[rows]

    def nystrom(self, points: Tensor) -> NystromPreconditioner:
        """The Nyström approximation of A from all outputs of some inputs, indices (M,)."""
        return NystromPreconditioner(*self.whitened_columns(points))

    def preconditioner(self, points: Tensor) -> Product:
        """The inverse of that approximation, for solvers."""
        return self.nystrom(points)

    def random_nystrom(self, num_points: int | None = None, seed: int = 0) -> NystromPreconditioner:
        """The same from the random inputs of :meth:`landmarks`."""
        return self.nystrom(self.landmarks(num_points, seed))


def default_rows(size: int) -> int:
    """Landmark rows of a preconditioner for so many rows."""
    return max(200, int(8 * size**0.5))


def reduce_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """Multiply by the transpose of the block-diagonal W: (N·C, k) -> (N·R, k)."""
    points, outputs, rank = factor.shape
    return torch.bmm(factor.mT, rows.reshape(points, outputs, -1)).reshape(points * rank, -1)


def expand_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """Multiply by the block-diagonal W: (N·R, k) -> (N·C, k)."""
    points, outputs, rank = factor.shape
    return torch.bmm(factor, rows.reshape(points, rank, -1)).reshape(points * outputs, -1)
