"""The kernel matrix of the training inputs, from kept Grams or matrix-free."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import parse_memory
from ntkgp.linearization.symmetric import SymmetricGrams
from ntkgp.operators import NetworkHandle, NeuralTangentOperator
from ntkgp.solvers.whitened import WhitenedSystem


class TangentGram:
    r"""Products, columns and diagonal blocks of :math:`K = \sum_g v_g J_g J_g^\top` at N inputs, for any v.

    With Grams kept, a product is one of a dense matrix (where its n² numbers fit in the budget) or of the kept
    triangles; without them it is matrix-free, one backward and one forward pass over the inputs per vector.

    :param lin: the linearised network.
    :param x: packed inputs, shape (N, D).
    :param max_memory: budget for what is held beside the operands.
    :param grams: kept Grams of x; None for matrix-free products. See :meth:`best`.

    >>> import ntkgp
    >>> x = torch.randn(5, 3)
    >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(3, 2), x)
    >>> gram = TangentGram(lin, lin.pack(x))
    >>> gram.product(torch.ones(1))(torch.ones(10, 1, dtype=torch.float64)).shape
    torch.Size([10, 1])
    """

    def __init__(
        self,
        lin: LinearizedNetwork,
        x: Tensor,
        max_memory: str | int | float = "2GiB",
        grams: SymmetricGrams | None = None,
    ) -> None:
        self.lin, self.x, self.grams = lin, x, grams
        self.max_memory = parse_memory(max_memory)
        self.rows = len(x) * lin.num_outputs
        self._last: tuple[Tensor, Tensor] | None = None
        self._blocks: Tensor | None = None  # shape: (G, N, C, C)
        if grams is not None and grams.shape[-1] != self.rows:
            raise ValueError(f"grams: expected {self.rows} rows, N·C of the inputs, got {grams.shape[-1]}")

    @classmethod
    def best(cls, lin: LinearizedNetwork, x: Tensor, max_memory: str | int | float = "2GiB") -> TangentGram:
        """With the Grams where they and one matrix of their size fit in the budget, otherwise matrix-free."""
        budget, rows = parse_memory(max_memory), len(x) * lin.num_outputs
        working = max(3 * 8 * rows**2, 8 * rows**2 + lin.gram_memory(1, len(x)))
        if SymmetricGrams.size_of(len(lin.groups), rows) + working > budget:
            return cls(lin, x, budget)
        return cls(lin, x, budget, lin.symmetric_grams(x, budget, storage="memory"))

    @property
    def precision(self) -> float:
        """Unit of rounding of the products: that of the network's passes where they are matrix-free."""
        return torch.finfo(self.lin.dtype if self.grams is None else torch.float64).eps

    def product(self, variance: Tensor) -> Callable[[Tensor], Tensor]:
        """K as a function (n, k) -> (n, k) in float64, at v of shape (G,)."""
        variance = variance.detach().to(torch.float64)
        grams = self.grams
        if grams is None:
            operator = NeuralTangentOperator(self.x, self.x, variance, NetworkHandle(self.lin, self.max_memory))
            return lambda v: operator.matmul(v.to(operator.dtype)).to(torch.float64)
        matrix = self._dense(variance)
        if matrix is not None:
            return lambda v: matrix @ v
        return lambda v: torch.stack([variance @ grams.matvec(column) for column in v.mT], -1)

    def _dense(self, variance: Tensor) -> Tensor | None:
        """K itself where Grams are kept and its n² numbers fit in the budget; that of the last v is held."""
        if self.grams is None or 8 * self.rows**2 > self.max_memory:
            return None
        variance = variance.detach().to(torch.float64)
        if self._last is None or not torch.equal(self._last[0], variance):
            self._last = None
            self._last = variance.clone(), self.grams.weighted_sum(variance)
        return self._last[1]

    def columns(self, points: Tensor, variance: Tensor) -> Tensor:
        """K(X, x[points]), shape (n, M·C), float64."""
        matrix = self._dense(variance)
        if matrix is None:
            return self.lin.weighted_gram(self.x, self.x[points], variance.detach(), self.max_memory)
        c = self.lin.num_outputs
        return matrix[:, (points.unsqueeze(-1) * c + torch.arange(c, device=points.device)).reshape(-1)]

    def blocks(self, variance: Tensor) -> Tensor:
        """K(x_n, x_n), shape (N, C, C), float64."""
        if self._blocks is None:
            self._blocks = self._diagonal_blocks()
        return torch.einsum("g,gncd->ncd", variance.detach().to(self._blocks), self._blocks)

    def system(self, variance: Tensor, factor: Tensor) -> WhitenedSystem:
        """I + WᵀKW, for blocks of W (N, C, R)."""
        return WhitenedSystem(
            self.product(variance), lambda points: self.columns(points, variance), self.blocks(variance), factor
        )

    def _diagonal_blocks(self) -> Tensor:
        """K_g(x_n, x_n), shape (G, N, C, C)."""
        budget = max(self.max_memory, self.lin.diagonals_memory(len(self.x)))
        return self.lin.gram_diagonals(self.x, max_memory=budget)

    def push(self, v: Tensor) -> Tensor:
        """J V in float64, (k, P) -> (n, k)."""
        return push(self.lin, self.x, v).flatten(0, 1)

    def pull(self, u: Tensor) -> Tensor:
        """Jᵀ U in float64, (n, k) -> (k, P)."""
        return pull(self.lin, self.x, u)

    def traces(self) -> Tensor:
        """Tr K_g, shape (G,)."""
        self.blocks(torch.ones(len(self.lin.groups)))
        assert self._blocks is not None
        return torch.einsum("gncc->g", self._blocks)


def push(lin: LinearizedNetwork, x: Tensor, v: Tensor) -> Tensor:
    """J(x) V in float64, (k, P) -> (N, C, k)."""
    return lin.features(x, v.to(lin.dtype)).to(torch.float64)


def pull(lin: LinearizedNetwork, x: Tensor, u: Tensor) -> Tensor:
    """J(x)ᵀ U in float64, (N·C, k) -> (k, P)."""
    rows = u.mT.reshape(u.shape[-1], len(x), -1).to(lin.dtype)
    return lin.vjp(x, rows).to(torch.float64)
