"""Products with a linear map and its transpose that autograd, vmap and forward mode go through."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import scipy
import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator
from linear_operator.operators._linear_operator import IndexType
from torch import Tensor

from ntkgp.inverse.rays import CompressedRows

Product = Callable[[Tensor], Tensor]


class Pair:
    """A linear map (k, n) -> (k, m) of rows, and its transpose (k, m) -> (k, n).

    A plain object: an autograd Function may hold no sparse tensors among its arguments, and linear_operator leaves it
    alone (see :class:`~ntkgp.operators.NetworkHandle`).
    """

    __slots__ = ("adjoint", "forward", "shape")

    def __init__(self, forward: Product, adjoint: Product, shape: tuple[int, int]) -> None:
        self.forward, self.adjoint, self.shape = forward, adjoint, shape

    @property
    def transposed(self) -> Pair:
        """The transpose as the map."""
        return Pair(self.adjoint, self.forward, (self.shape[1], self.shape[0]))

    def part(self, rows: Tensor, columns: Tensor) -> Pair:
        """Some rows and columns of the matrix, by their numbers, which may repeat."""
        m, n = self.shape

        def forward(x: Tensor) -> Tensor:
            return self.forward(x.new_zeros(len(x), n).index_add(1, columns, x))[:, rows]

        def adjoint(y: Tensor) -> Tensor:
            return self.adjoint(y.new_zeros(len(y), m).index_add(1, rows, y))[:, columns]

        return Pair(forward, adjoint, (len(rows), len(columns)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Pair:
        return self


class LinearProduct(torch.autograd.Function):
    """A x for a pair; its derivatives are products with the same pair, so all orders exist."""

    @staticmethod
    def forward(pair: Pair, x: Tensor) -> Tensor:  # shape: (*batch, n) -> (*batch, m)
        """Products with all rows at once."""
        out = pair.forward(x.reshape(-1, pair.shape[1]))
        return out.reshape(*x.shape[:-1], pair.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Pair, Tensor], output: Tensor) -> None:
        """Keep the pair; a linear map needs no tensors for its derivative."""
        ctx.pair = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """The transpose times the gradient."""
        return None, LinearProduct.apply(ctx.pair.transposed, grads[0])

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        """The map itself."""
        return LinearProduct.apply(ctx.pair, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[None, int], pair: Pair, x: Tensor) -> tuple[Tensor, int]:
        """One more batch dimension."""
        return LinearProduct.apply(pair, x.movedim(in_dims[1], 0)), 0


def multiply(
    matrix: CompressedRows,
    x: Tensor,  # shape: (k, n)
    num_rows: int,
) -> Tensor:  # shape: (k, m)
    """X Aᵀ for a sparse A of (m × n), in the dtype of both."""
    size = (num_rows, x.shape[-1])
    if x.device.type == "cpu" and not torch.backends.mkl.is_available():
        return _multiply_by_scipy(matrix, x, size)
    _hear_that_rows_are_beta()
    rows = torch.sparse_csr_tensor(matrix.starts, matrix.columns, matrix.values, size, check_invariants=False)
    return (rows @ x.mT).mT.contiguous()


@cache
def _hear_that_rows_are_beta() -> None:
    """Once in a process torch warns that compressed rows are in beta: take that warning here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        start = torch.tensor([0, 1], dtype=torch.int32)
        torch.sparse_csr_tensor(start, start[:1], torch.ones(1), (1, 1), check_invariants=False)


def _multiply_by_scipy(matrix: CompressedRows, x: Tensor, size: tuple[int, int]) -> Tensor:
    """The same where torch was built without a sparse library."""
    arrays = (matrix.values.numpy(), matrix.columns.numpy(), matrix.starts.numpy())
    return torch.from_numpy(scipy.sparse.csr_array(arrays, shape=size) @ x.detach().numpy().T).mT.contiguous()


class ForwardLinearOperator(LinearOperator):
    r"""A forward operator times a number, as a ``linear_operator`` matrix: :math:`sA`, never formed.

    :param scale: s, (*batch,), usually 1; its dtype, device and batch shape are those of the operator.
    :param pair: the products with A (m × n) and its transpose.
    :raises ValueError: no tensor, or no :class:`Pair`.

    A product with k vectors is one product of A with k images. :math:`\partial\, l^\top sA r/\partial s = l^\top A r`.
    """

    def _check_args(self, scale: Any, pair: Any) -> str | None:
        if not isinstance(scale, Tensor):
            return f"scale: expected a tensor of shape (*batch,), got {type(scale).__name__}"
        if not isinstance(pair, Pair):
            return f"pair: expected the products of a forward operator, got {type(pair).__name__}"
        return None

    def __init__(self, scale: Tensor, pair: Pair) -> None:
        error = self._check_args(scale, pair)
        if error is not None:
            raise ValueError(error)
        super().__init__(scale, pair=pair)
        self.scale, self.pair = scale, pair

    def _size(self) -> torch.Size:
        return torch.Size((*self.scale.shape, *self.pair.shape))

    def _transpose_nonbatch(self) -> ForwardLinearOperator:
        return self.__class__(self.scale, pair=self.pair.transposed)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> ForwardLinearOperator:
        return self.__class__(self.scale.expand(*batch_shape), pair=self.pair)

    def _unsqueeze_batch(self, dim: int) -> ForwardLinearOperator:
        return self.__class__(self.scale.unsqueeze(dim), pair=self.pair)

    def _matmul(
        self,  # shape: (*batch, m, n)
        rhs: Tensor,  # shape: (*batch2, n, k) or (n,)
    ) -> Tensor:  # shape: (..., m, k) or (..., m)
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        return self.scale[..., None, None] * LinearProduct.apply(self.pair, rhs.mT).mT

    def _t_matmul(
        self,  # shape: (*batch, m, n)
        rhs: Tensor,  # shape: (*batch2, m, k)
    ) -> Tensor:  # shape: (..., n, k)
        return self._transpose_nonbatch()._matmul(rhs)

    def _bilinear_derivative(
        self,
        left_vecs: Tensor,  # shape: (*batch2, m, k)
        right_vecs: Tensor,  # shape: (*batch2, n, k)
    ) -> tuple[Tensor | None, ...]:
        if not self.scale.requires_grad:
            return (None,)
        if left_vecs.dim() == 1:
            left_vecs, right_vecs = left_vecs.unsqueeze(-1), right_vecs.unsqueeze(-1)
        products = LinearProduct.apply(self.pair, right_vecs.mT)
        found = (left_vecs.mT * products).sum((-2, -1))
        batch = torch.broadcast_shapes(found.shape, self.scale.shape)
        return (found.expand(batch).sum_to_size(self.scale.shape),)

    def _get_indices(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> Tensor:
        rows, row = torch.unique(row_index, return_inverse=True)
        columns, column = torch.unique(col_index, return_inverse=True)
        if len(rows) <= len(columns):
            unit = self._unit(rows, self.pair.shape[0])
            entries = LinearProduct.apply(self.pair.transposed, unit)[row, col_index]
        else:
            entries = LinearProduct.apply(self.pair, self._unit(columns, self.pair.shape[1]))[column, row_index]
        return entries * (self.scale[batch_indices] if batch_indices else self.scale)

    def _getitem(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> LinearOperator:
        indices = (row_index, col_index)
        # Several tensors of indices go together, entry by entry.
        if sum(isinstance(i, Tensor) for i in (*indices, *batch_indices)) > 1 or not all(
            isinstance(i, slice) or i.ndim == 1 for i in indices
        ):
            return DenseLinearOperator(self.to_dense())._getitem(row_index, col_index, *batch_indices)
        rows, columns = (torch.arange(n, device=self.device)[i] for n, i in zip(self.pair.shape, indices, strict=True))
        scale = self.scale[batch_indices] if batch_indices else self.scale
        whole = all(isinstance(i, slice) and i == slice(None) for i in indices)
        return self.__class__(scale, pair=self.pair if whole else self.pair.part(rows, columns))

    def _unit(self, places: Tensor, size: int) -> Tensor:
        unit = torch.zeros(len(places), size, dtype=self.dtype, device=self.device)
        unit[torch.arange(len(places), device=self.device), places] = 1
        return unit
