"""The kernel matrix of the training inputs with its rows dealt to the processes of a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ntkgp.distributed import (
    Shards,
    alone,
    combined,
    gather_numbers,
    gather_rows,
    grouped,
    rank,
    sum_over_batches,
    world_size,
)
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.grams.products import LEAST_SHARED, mirror
from ntkgp.solvers.conjugate_gradients import Product
from ntkgp.solvers.nystrom import inverse_root
from ntkgp.solvers.tangent import TangentGram, pull, push
from ntkgp.solvers.whitened import WhitenedSystem

# Panels of the Gram: twice the number of processes among whom they are shared evenly.
_PANELS = 32
# Shards of a pass over the inputs.
_SHARDS = 16
# Numbers per entry of the preconditioner's columns, and of a right-hand side, while a system is solved.
_COLUMN_COPIES = 6
_SIDE_COPIES = 8
# Of the largest diagonal entry of FᵀF.
_JITTER = 1e-14


class SharedGram(TangentGram):
    r"""Products, columns and blocks of :math:`K = \sum_g v_g J_g J_g^\top`, computed and kept by rows.

    The rows are cut into 32 panels, whatever the number W of processes is: panel s has rows a … b − 1 and columns
    0 … b − 1. Panels s and 31 − s go together, for they have as many numbers as any other such pair, and pair u is that
    of process u mod W, which alone computes and keeps it. A product is the sum over the pairs, from zero and in their
    order, of

    .. math:: y_{a:b} \mathrel{+}= K_{a:b,\,:b}\, v_{:b}, \qquad y_{:a} \mathrel{+}= K_{a:b,\,:a}^\top v_{a:b},

    the same bits for every W and on all processes, each of which must make all calls. Where the panels of a process do
    not fit in the budget, a product is a backward and a forward pass over the inputs, which are shared by rows.

    :param lin: the linearised network.
    :param x: packed inputs, shape (N, D), the same on all processes.
    :param max_memory: budget of each process for what is held beside the operands.
    :param num_columns: of the preconditioner, which every process has; room is left for it.
    :param num_sides: right-hand sides, likewise.

    Memory of a process: (G + 1)·n²/(2W) numbers for n = N·C. Traffic of a product with k vectors: 16·n·k/W numbers.

    >>> import ntkgp
    >>> x = torch.randn(5, 3)
    >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(3, 2), x)
    >>> gram = SharedGram(lin, lin.pack(x))
    >>> gram.product(torch.ones(1))(torch.ones(10, 1, dtype=torch.float64)).shape
    torch.Size([10, 1])
    """

    def __init__(
        self,
        lin: LinearizedNetwork,
        x: Tensor,
        max_memory: str | int | float = "2GiB",
        num_columns: int = 0,
        num_sides: int = 0,
    ) -> None:
        super().__init__(lin, x, max_memory)
        self._passes = Shards(len(x), _SHARDS)
        cut, c = Shards(len(x), _PANELS), lin.num_outputs
        inputs = [cut.bounds(s) for s in range(cut.count)]
        self._pairs = [tuple(sorted({s, cut.count - 1 - s})) for s in range(-(-cut.count // 2))]
        self._bounds = [(c * a, c * b) for a, b in inputs]
        vectors = 8 * self.rows * (_COLUMN_COPIES * min(num_columns, self.rows) + _SIDE_COPIES * num_sides)
        # A part of the budget that does not depend on W: the cut into blocks, and with it the rounding, follows it.
        working = self.max_memory // 4
        kept = 8 * (len(lin.groups) + 1) * self._largest_share()
        fits = lin.gram_memory(1, len(x)) <= working and kept + working + vectors <= self.max_memory
        # A layer that broke its rule in rows that one process has seen changes what that one needs.
        self.is_kept = min(gather_numbers(int(fits)))[0] == 1
        self._panels: dict[int, Tensor] = {}
        self._weighted: tuple[Tensor, dict[int, Tensor]] | None = None
        if self.is_kept:
            own = self._own(rank())
            with alone():
                self._panels = self._computed(own, inputs, working)

    def _own(self, process: int) -> list[int]:
        """The panels of a process, by pairs."""
        return [s for pair in self._pairs[process :: world_size()] for s in pair]

    def _largest_share(self) -> int:
        """Numbers of one matrix that the process with most of them has."""
        sizes = [(b - a) * b for a, b in self._bounds]
        return max(sum(sizes[s] for s in self._own(process)) for process in range(world_size()))

    def _computed(self, own: list[int], inputs: list[tuple[int, int]], working: int) -> dict[int, Tensor]:
        """Some panels, (G, b − a, b)."""
        lin, x, factors, found = self.lin, self.x, None, {}
        if lin.factors_memory(len(x)) + lin.gram_memory(1, len(x)) <= working:
            factors = lin.factors(x, working)
            working -= factors.nbytes
        for s in own:
            (first, last), (a, b) = inputs[s], self._bounds[s]
            sides = (slice(first, last), slice(0, last))
            left, right = (x[rows] if factors is None else factors.block(rows) for rows in sides)
            panel = lin.grams(left, right, working + 8 * len(lin.groups) * (b - a) * b)
            for block in panel[:, :, a:]:
                mirror(block)
            found[s] = panel
        return found

    @property
    def precision(self) -> float:
        """Unit of rounding of the products: that of the network's passes where no panels are kept."""
        return torch.finfo(torch.float64 if self.is_kept else self.lin.dtype).eps

    def _sum(self, panels: dict[int, Tensor], v: Tensor) -> Tensor:
        """K V from the panels of K."""

        def visit(pair: tuple[int, ...]) -> Tensor:
            out = torch.zeros_like(v)
            for s in pair:
                (a, b), panel = self._bounds[s], panels[s]
                out[a:b] += panel @ v[:b]
                out[:a] += panel[:, :a].mT @ v[a:b]
            return out

        return sum_over_batches(self._pairs, visit, v)

    def product(self, variance: Tensor) -> Callable[[Tensor], Tensor]:
        """K as a function (n, k) -> (n, k) in float64, at v of shape (G,)."""
        variance = variance.detach().to(torch.float64)
        if self.is_kept:
            return partial(self._sum, self._at(variance))
        scale = self.lin.groups.expand(variance)
        return lambda v: self.push(self.pull(v) * scale)

    def _at(self, variance: Tensor) -> dict[int, Tensor]:
        """The panels of K itself; those of the last v are held."""
        variance = variance.detach().to(torch.float64)
        if self._weighted is None or not torch.equal(self._weighted[0], variance):
            self._weighted = None
            panels = {s: (variance @ p.flatten(1)).view(p.shape[1:]) for s, p in self._panels.items()}
            self._weighted = variance.clone(), panels
        return self._weighted[1]

    def columns(self, points: Tensor, variance: Tensor) -> Tensor:
        """K(X, x[points]), shape (n, M·C), float64, on every process."""
        if not self.is_kept:
            return self._by_rows(lambda x: self._columns_at(x, points, variance)).flatten(0, 1)
        c = self.lin.num_outputs
        chosen = (points.unsqueeze(-1) * c + torch.arange(c, device=points.device)).reshape(-1)
        own = torch.zeros(self.rows, len(chosen), dtype=torch.float64, device=self.x.device)
        for s, panel in self._at(variance).items():
            a, b = self._bounds[s]
            left, here = chosen < b, (chosen >= a) & (chosen < b)
            own[a:b, left] += panel[:, chosen[left]]
            own[:a, here] += panel[chosen[here] - a, :a].mT
        return combined(own)

    def _columns_at(self, x: Tensor, points: Tensor, variance: Tensor) -> Tensor:
        """K(x, x[points]) of some inputs, shape (N, C, M·C)."""
        found = self.lin.weighted_gram(x, self.x[points], variance.detach(), self.max_memory)
        return found.reshape(len(x), self.lin.num_outputs, -1)

    def _by_rows(self, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What is computed of the inputs of each shard, N rows."""
        own = self._passes.own()
        with alone():
            parts = {s: compute(self._passes.rows(self.x, s)) for s in own}
        return gather_rows(parts, self._passes)

    def push(self, v: Tensor) -> Tensor:
        """J V in float64, (k, P) -> (n, k)."""
        return self._by_rows(lambda x: push(self.lin, x, v)).flatten(0, 1)

    def pull(self, u: Tensor) -> Tensor:
        """Jᵀ U in float64, (n, k) -> (k, P)."""
        rows = u.reshape(len(self.x), -1, u.shape[-1])

        def visit(s: int) -> Tensor:
            return pull(self.lin, self._passes.rows(self.x, s), self._passes.rows(rows, s).flatten(0, 1))

        like = torch.zeros(u.shape[-1], self.lin.num_parameters, dtype=torch.float64, device=u.device)
        return sum_over_batches(range(self._passes.count), visit, like)

    def system(self, variance: Tensor, factor: Tensor) -> WhitenedSystem:
        """I + WᵀKW, for blocks of W (N, C, R)."""
        plain = super().system(variance, factor)
        return SharedSystem(plain.product, plain.columns, plain.blocks, factor, self._passes)

    def _diagonal_blocks(self) -> Tensor:
        budget = max(self.max_memory, self.lin.diagonals_memory(len(self.x)))
        found = self._by_rows(lambda x: self.lin.gram_diagonals(x, max_memory=budget).movedim(0, 1))
        return found.movedim(1, 0)


@dataclass(frozen=True)
class SharedSystem(WhitenedSystem):
    """:class:`~ntkgp.solvers.WhitenedSystem` with a preconditioner whose rows are dealt to the processes of a group.

    :param shards: of the inputs.
    """

    shards: Shards

    def preconditioner(self, points: Tensor) -> Product:
        """The inverse of the Nyström approximation from all outputs of some inputs, indices (M,)."""
        return SharedPreconditioner(*self.whitened_columns(points), self.shards)


class SharedPreconditioner:
    r"""Products with :math:`(I + FF^\top)^{-1} = I - F(I + F^\top F)^{-1}F^\top`, FFᵀ = K̂ of Nyström.

    Every process makes and keeps rows of F for its shards. A preconditioner only: unlike the sums of squares of
    :class:`~ntkgp.solvers.NystromPreconditioner`, of which all have all rows, the difference loses digits where K̂ is
    large, and certifies nothing.

    :param cross: K_XZ, whitened, shape (N·R, m), the same on all processes.
    :param gram: K_ZZ, shape (m, m).
    :param shards: of the N inputs.

    Cost: 4·n·m²/W flops, and O(m³) by each process; n·m/W numbers. Traffic of a product with k vectors: 2·n·k numbers.
    """

    def __init__(self, cross: Tensor, gram: Tensor, shards: Shards) -> None:
        self._shards = shards
        vectors, scale = inverse_root(gram)
        rows = cross.reshape(shards.num_rows, -1, cross.shape[-1])
        self._factor = {s: (shards.rows(rows, s).flatten(0, 1) @ vectors) * scale for s in shards.own()}
        inner = self._sum(lambda s: self._factor[s].mT @ self._factor[s], gram)
        # Rounding takes no more off the diagonal.
        inner.diagonal().add_(1.0 + _JITTER * float(inner.diagonal().max()))
        self._cholesky = torch.linalg.cholesky(inner)

    def _sum(self, visit: Callable[[int], Tensor], like: Tensor) -> Tensor:
        return sum_over_batches(range(self._shards.count), visit, like)

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply, (N·R, k) -> (N·R, k)."""
        rows = v.reshape(self._shards.num_rows, -1, v.shape[-1])

        def part(s: int) -> Tensor:
            return self._shards.rows(rows, s).flatten(0, 1)

        inside = self._sum(lambda s: self._factor[s].mT @ part(s), v.new_zeros(len(self._cholesky), v.shape[-1]))
        inside = torch.cholesky_solve(inside, self._cholesky)
        found = {s: (part(s) - factor @ inside).unflatten(0, (-1, rows.shape[1])) for s, factor in self._factor.items()}
        return gather_rows(found, self._shards).flatten(0, 1)


def tangent_gram(
    lin: LinearizedNetwork, x: Tensor, max_memory: str | int | float, num_columns: int, num_sides: int
) -> TangentGram:
    """Shared by the processes of a group where there are rows enough, otherwise this process's own."""
    if grouped() and len(x) * lin.num_outputs >= LEAST_SHARED:
        return SharedGram(lin, x, max_memory, num_columns, num_sides)
    return TangentGram.best(lin, x, max_memory)
