"""Covariances between data and inducing rows, for the tangent kernel and for any other kernel."""

from __future__ import annotations

import functools
import sys

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel
from linear_operator import to_dense
from torch import Tensor

from ntkgp.kernels import NeuralTangentKernel
from ntkgp.kernels.composition import SharedKernel, outputs_of
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.grams import products
from ntkgp.linearization.grams.cost import Block
from ntkgp.linearization.grams.engine import Side
from ntkgp.linearization.grams.factors import Factors, kept_bytes
from ntkgp.linearization.memory import require
from ntkgp.operators.handle import same


class KernelProducts:
    r"""Products of a kernel with M inducing inputs, all C outputs of each or one.

    The tangent kernel with fixed precisions goes by weighted Grams, and fixed inducing inputs are visited once: their
    layers' factors are kept. Graphs to precisions, inducing inputs and data are kept where they are asked for.

    :param kernel: with C outputs per input.
    :param lin: the network.
    :param outputs: one output per inducing input (M,), or None.
    :param max_memory: of one product.
    """

    def __init__(self, kernel: Kernel, lin: LinearizedNetwork, outputs: Tensor | None, max_memory: int) -> None:
        self.kernel, self.lin, self.outputs, self.max_memory = kernel, lin, outputs, max_memory
        # The tangent kernel of this network alone, on all columns; its subclasses have other values.
        self.is_tangent = type(kernel) is NeuralTangentKernel and kernel.active_dims is None and kernel.lin is lin
        self._kept: tuple[Tensor, Factors] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}

    def num_rows(self, num_points: int) -> int:
        """Inducing rows, M or M·C."""
        return num_points if self.outputs is not None else num_points * self.lin.num_outputs

    def cross(self, x: Tensor | Factors, z: Tensor) -> Tensor:
        """K(x, Z), shape (N·C, rows)."""
        if self.is_tangent:
            left = Side(x.x, x.outputs, x) if isinstance(x, Factors) else Side(x)
            return self._tangent(left, self._side(z))
        assert isinstance(x, Tensor)
        columns = self._columns(len(z), z.device)
        dense = to_dense(self.kernel(x, z))
        return dense if columns is None else dense.index_select(-1, columns)

    def inducing(self, z: Tensor) -> Tensor:
        """K(Z, Z), shape (rows, rows), symmetric."""
        if self.is_tangent:
            gram = self._tangent(self._side(z), None)
        else:
            gram, columns = to_dense(self.kernel(z)), self._columns(len(z), z.device)
            gram = gram if columns is None else gram.index_select(0, columns).index_select(1, columns)
        return 0.5 * (gram + gram.mT)

    def blocks(self, x: Tensor) -> Tensor:
        """Prior covariance of the outputs of single inputs, (*batch, N, C, C)."""
        return point_blocks(self.kernel, x)

    def fits(self, num_data: int, num_points: int) -> bool:
        """Whether K(x, Z) of so many inputs with a graph to Z is within the budget."""
        if self.is_tangent:
            return self.lin.gram_memory(num_data, num_points, graph=True) <= self.max_memory
        return 8 * 4 * num_data * self.lin.num_outputs * self.num_rows(num_points) <= self.max_memory

    def memory(self, num_points: int, num_rows: int = 1) -> int:
        """Smallest budget of all products with so many inducing inputs, and so many data at a time.

        Only of the tangent kernel; others have no budget.
        """
        if not self.is_tangent:
            return 0
        lin, c = self.lin, self.lin.num_outputs
        k, rows = 1 if self.outputs is not None else c, self.num_rows(num_points)
        slots = lin.engine.slots(Block.of(num_points, num_points, k, k, True))
        per_row = kept_bytes(lin, lin.engine.plan, slots, c) + lin.engine.transient_bytes(slots, c)
        # One input alone may be kept in another form than the inducing inputs are.
        cross = lin.gram_memory(1, 1) + 2 * per_row + (24 * c * k + 8 * c * k * num_rows) * num_points
        # K(Z, Z), its eigenvectors, what is made of them, and the parameter; those of a single input's evidence.
        matrices = 64 * max(rows, c) ** 2 + per_row
        kept, blocks = lin.engine.factors_memory(num_points, k), lin.diagonals_memory(max(num_points, num_rows))
        return max(kept, matrices, cross, 72 * c * c + lin.gram_memory(1, 1), blocks)

    def rows_at_a_time(self, num_points: int) -> int:
        """Data whose products, and what is made of them, fit in the budget."""
        if not self.is_tangent:
            return sys.maxsize
        c, rows = self.lin.num_outputs, self.num_rows(num_points)
        per_row = 8 * (5 * c * rows + 2 * len(self.lin.groups) * c * c)
        return max(1, (self.max_memory - self.memory(num_points)) // (2 * per_row))

    def check_memory(self, num_points: int, num_rows: int = 1) -> None:
        """Refuse a budget that does not hold the products; see :meth:`memory`."""
        what = f"products of {num_rows} input(s) with {self.num_rows(num_points)} inducing rows"
        require(self.memory(num_points, num_rows), self.max_memory, what)

    def _columns(self, num_points: int, device: torch.device) -> Tensor | None:
        if self.outputs is None:
            return None
        return torch.arange(num_points, device=device) * self.lin.num_outputs + self.outputs.to(device)

    def _side(self, z: Tensor) -> Side:
        """The inducing inputs: with a graph, or as factors that are kept while they stay the same."""
        outputs = None if self.outputs is None else self.outputs.to(z.device)
        if torch.is_grad_enabled() and z.requires_grad:
            return Side(z, outputs)
        if self._kept is None or not same(self._kept[0], z):
            with torch.inference_mode(False), torch.no_grad():
                points = z.detach().clone()
                self._kept = points, self.lin.factors(points, self.max_memory, outputs)
        factors = self._kept[1]
        return Side(factors.x, factors.outputs, factors)

    def _tangent(self, left: Side, right: Side | None) -> Tensor:
        """The weighted Gram, with a graph to whatever asks for one."""
        lin, kernel = self.lin, self.kernel
        assert isinstance(kernel, NeuralTangentKernel)
        variance = kernel.precision.reciprocal().to(torch.float64)
        to_inputs = left.needs_graph or (right is not None and right.needs_graph)
        if not to_inputs and not (torch.is_grad_enabled() and variance.requires_grad):
            return products.weighted_gram(lin, left, right, variance, self.max_memory)
        if to_inputs:
            totals = lin.engine.graph(left, right, torch.float64)
            terms = [v * t for v, t in zip(variance, totals, strict=True) if t is not None]
            return functools.reduce(torch.add, terms)
        grams = products.grams(lin, left, right, self.max_memory, False, torch.float64)
        return torch.einsum("g,gab->ab", variance, grams)


def point_blocks(kernel: Kernel, x: Tensor) -> Tensor:
    """Covariance of the outputs of single inputs under any kernel, (*batch, N, C, C)."""
    if hasattr(kernel, "point_blocks"):
        return kernel.point_blocks(x)
    if isinstance(kernel, AdditiveKernel):
        return torch.stack([point_blocks(part, x) for part in kernel.kernels]).sum(0)
    if isinstance(kernel, ProductKernel):
        return torch.stack([point_blocks(part, x) for part in kernel.kernels]).prod(0)
    if isinstance(kernel, SharedKernel):
        variance = to_dense(kernel.base_kernel(x, diag=True))[..., None, None]
        outputs = torch.ones(kernel.num_outputs, kernel.num_outputs, dtype=x.dtype, device=x.device)
        return variance * (outputs if kernel.identical else outputs.tril().triu())
    if outputs_of(kernel, x.shape[-1]) == 1:
        return to_dense(kernel(x, diag=True))[..., None, None]
    return to_dense(kernel(x.unsqueeze(-2)))
