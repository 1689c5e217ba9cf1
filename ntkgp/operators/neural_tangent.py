"""J(x1) Λ⁻¹ J(x2)ᵀ by Jacobian products, without any matrix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator
from linear_operator.operators._linear_operator import IndexType
from torch import Tensor

from ntkgp.linearization.second_order import needs_graph
from ntkgp.operators.handle import NetworkHandle, point_grams

__all__ = ["NeuralTangentOperator"]

_ALL = slice(None, None, None)
# As many rows or columns are evaluated when they are taken out one by one.
_FEW = 64
_Index = tuple[int, ...]


class NeuralTangentOperator(LinearOperator):
    r"""
    The prior covariance of the tangent model between two sets of inputs, never formed,

    .. math:: K = J(x_1) \Lambda^{-1} J(x_2)^\top, \qquad \Lambda^{-1} = \oplus_g v_g I, \qquad
        \frac{\partial\, l^\top K r}{\partial v_g} = \langle (J_1^\top l)_g, (J_2^\top r)_g \rangle.

    Rows are input-major: the C outputs of one input are adjacent. A product pulls back with :math:`J_2^\top`, scales,
    and pushes forward with :math:`J_1`. Gradients with respect to inputs come from differentiating
    :math:`x \mapsto \langle J(x)^\top l, v \rangle` with the other factor held fixed, in chunks of
    rows. Pearlmutter 1994, *Fast exact multiplication by the Hessian*, for products without forming the matrix.

    :param x1: packed inputs ``(*batch, N1, D)``.
    :param x2: packed inputs ``(*batch, N2, D)``.
    :param variance: :math:`v_g = 1/\lambda_g`, ``(*batch, G)``. Batch shapes are broadcast.
    :param handle: the network, in a :class:`NetworkHandle` so that ``to``, ``double`` or ``half`` never reach it.
    :raises ValueError: another shape, or no handle.

    Cost: a product with k vectors is k vjp's over N2 and k jvp's over N1 inputs, and O(k·P) memory, k in chunks. Passes
    run in the network's dtype; the result has that of ``x1``. ``to_dense`` without gradients goes layer by layer
    (:meth:`ntkgp.LinearizedNetwork.grams`), and so does a product with k ≥ N2·C vectors, for which the matrix takes no
    more memory than they do; derivatives with k > N2·C vectors cost N2·C of them.

    Example:
        >>> import torch, ntkgp
        >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(3, 2), torch.randn(2, 3), groups="tensor")
        >>> x1, x2 = torch.randn(5, 3), torch.randn(4, 3)
        >>> K = NeuralTangentOperator(x1, x2, torch.tensor([0.5, 2.0]), NetworkHandle(lin))
        >>> K.shape, (K @ torch.ones(8)).shape
        (torch.Size([10, 8]), torch.Size([10]))
    """

    def _check_args(self, x1: Any, x2: Any, variance: Any, handle: Any) -> str | None:
        if not isinstance(handle, NetworkHandle):
            return f"handle: expected a ntkgp.operators.NetworkHandle, got {type(handle).__name__}"
        for name, x in (("x1", x1), ("x2", x2)):
            if not isinstance(x, Tensor) or x.dim() < 2:
                came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                return f"{name}: expected packed inputs of shape (*batch, N, D), got {came}"
        groups = len(handle.lin.groups.names)
        if not isinstance(variance, Tensor) or variance.dim() < 1 or variance.shape[-1] != groups:
            came = tuple(variance.shape) if isinstance(variance, Tensor) else type(variance).__name__
            return f"variance: expected a tensor of shape (*batch, {groups}), got {came}"
        return None

    def __init__(
        self,
        x1: Tensor,  # shape: (*batch, N1, D)
        x2: Tensor,  # shape: (*batch, N2, D)
        variance: Tensor,  # shape: (*batch, G)
        handle: NetworkHandle,
    ) -> None:
        error = self._check_args(x1, x2, variance, handle)
        if error is not None:
            raise ValueError(error)
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], variance.shape[:-1])
        x1 = x1 if x1.shape[:-2] == batch else x1.expand(*batch, *x1.shape[-2:])
        x2 = x2 if x2.shape[:-2] == batch else x2.expand(*batch, *x2.shape[-2:])
        variance = variance if variance.shape[:-1] == batch else variance.expand(*batch, variance.shape[-1])
        super().__init__(x1, x2, variance, handle=handle)
        self.x1, self.x2, self.variance, self.handle = x1, x2, variance, handle
        self.lin, self.num_outputs = handle.lin, handle.lin.num_outputs

    def _size(self) -> torch.Size:
        c = self.num_outputs
        return torch.Size((*self.x1.shape[:-2], self.x1.shape[-2] * c, self.x2.shape[-2] * c))

    def _transpose_nonbatch(self) -> NeuralTangentOperator:
        return self.__class__(self.x2, self.x1, self.variance, handle=self.handle)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> NeuralTangentOperator:
        return self.__class__(
            self.x1.expand(*batch_shape, *self.x1.shape[-2:]),
            self.x2.expand(*batch_shape, *self.x2.shape[-2:]),
            self.variance.expand(*batch_shape, self.variance.shape[-1]),
            handle=self.handle,
        )

    def _by_inputs(self, separate: bool = False) -> Iterator[tuple[Tensor, Tensor, list[_Index]]]:
        """Pairs of unbatched inputs, with the batch indices that share them (expanded batches share their memory)."""
        shared: dict[Any, list[_Index]] = {}
        for index in product(*map(range, self.batch_shape)):
            place = (self.x1[index].data_ptr(), self.x2[index].data_ptr())
            shared.setdefault(index if separate else place, []).append(index)
        for indices in shared.values():
            yield self.x1[indices[0]], self.x2[indices[0]], indices

    def _columns(
        self,
        indices: list[_Index],
        *vectors: Tensor,  # shape: (*batch, N·C, k)
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Chunks of the columns of all batch entries: their position (entry, column), and one (k, N, C) per operand."""
        k = vectors[0].shape[-1]
        places = torch.cartesian_prod(torch.arange(len(indices)), torch.arange(k)).reshape(-1, 2)
        stacked = [torch.stack([v[i].mT for i in indices]).flatten(0, 1).unflatten(-1, (-1, self.num_outputs))
                   for v in vectors]  # fmt: skip
        step = self.handle.columns()
        for start in range(0, len(places), step):
            yield places[start : start + step], [s[start : start + step] for s in stacked]

    def _scale(self, indices: list[_Index], places: Tensor) -> Tensor:  # shape: (k, P)
        """Λ⁻¹ of each column."""
        weights = torch.stack([self.variance[i] for i in indices])[places[:, 0]]
        return self.lin.groups.expand(weights.to(self.lin.dtype))

    def _matmul(
        self,  # shape: (*batch, N1·C, N2·C)
        rhs: Tensor,  # shape: (*batch2, N2·C, k) or (N2·C,)
    ) -> Tensor:  # shape: (..., N1·C, k) or (..., N1·C)
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        batch = torch.broadcast_shapes(self.batch_shape, rhs.shape[:-2])
        rhs = rhs.expand(*batch, *rhs.shape[-2:])
        operator = self if self.batch_shape == batch else self._expand_batch(batch)
        out = torch.empty(*batch, self.shape[-2], rhs.shape[-1], dtype=self.dtype, device=self.device)
        if not out.numel():
            return out
        formed = rhs.shape[-1] >= self.shape[-1] and self._is_formed_by_layers(*self.shape[-2:])
        for x1, x2, indices in operator._by_inputs():
            if formed:
                for index, matrix in operator._matrices(x1, x2, indices):
                    out[index] = (matrix @ rhs[index].to(matrix.dtype)).to(self.dtype)
                continue
            results = []
            for places, (u,) in operator._columns(indices, rhs):
                v = self.lin.vjp(x2, u) * operator._scale(indices, places)
                results.append(self.lin.jvp(x1, v).flatten(-2))
            product_ = torch.cat(results).unflatten(0, (len(indices), -1)).mT.to(self.dtype)
            for entry, index in enumerate(indices):
                out[index] = product_[entry]
        return out

    def _bilinear_derivative(
        self,
        left_vecs: Tensor,  # shape: (*batch2, N1·C, k)
        right_vecs: Tensor,  # shape: (*batch2, N2·C, k)
    ) -> tuple[Tensor | None, ...]:
        wanted = [arg.requires_grad for arg in (self.x1, self.x2, self.variance)]
        if not any(wanted):
            return None, None, None
        if right_vecs.shape[-1] > self.shape[-1]:
            # Σ_k l_kᵀ K r_k = Σ_j (L Rᵀ e_j)ᵀ K e_j
            # Half precision has no room for such a sum.
            dtype = torch.promote_types(self.lin.dtype, left_vecs.dtype)
            left_vecs = left_vecs.to(dtype) @ right_vecs.to(dtype).mT
            right_vecs = torch.eye(self.shape[-1], dtype=left_vecs.dtype, device=left_vecs.device)
        batch = torch.broadcast_shapes(self.batch_shape, left_vecs.shape[:-2], right_vecs.shape[:-2])
        left = left_vecs.expand(*batch, *left_vecs.shape[-2:])
        right = right_vecs.expand(*batch, *right_vecs.shape[-2:])
        op = self._expand_batch(batch)
        grads = [torch.zeros_like(a, memory_format=torch.contiguous_format) for a in (op.x1, op.x2, op.variance)]
        with torch.no_grad():
            for x1, x2, indices in op._by_inputs(separate=wanted[0] or wanted[1]):
                for places, (l_k, r_k) in op._columns(indices, left, right):
                    a, b = self.lin.vjp(x1, l_k), self.lin.vjp(x2, r_k)  # shape: (k, P)
                    if wanted[2]:
                        per_column = self.lin.groups.sum_per_group(a * b).to(grads[2].dtype)
                        for (entry, _), term in zip(places.tolist(), per_column, strict=True):
                            grads[2][indices[entry]] += term
                    scale = op._scale(indices, places)
                    if wanted[0]:
                        grads[0][indices[0]] += self._input_gradient(x1, l_k, scale * b)
                    if wanted[1]:
                        grads[1][indices[0]] += self._input_gradient(x2, r_k, scale * a)
        args = (self.x1, self.x2, self.variance)
        return tuple(
            g.sum_to_size(arg.shape) if want else None for g, arg, want in zip(grads, args, wanted, strict=True)
        )

    def _input_gradient(
        self,
        x: Tensor,  # shape: (N, D)
        u: Tensor,  # shape: (k, N, C)
        v: Tensor,  # shape: (k, P)
    ) -> Tensor:  # shape: (N, D)
        """∂/∂x Σ_k ⟨u_k, J(x) v_k⟩."""
        rows = self.handle.rows_with_graph(len(v))
        grads = []
        for block, weights in zip(x.split(rows), u.split(rows, dim=1), strict=True):
            with torch.enable_grad():
                leaf = block.detach().requires_grad_()
                total = (self.lin.vjp(leaf, weights) * v).sum()
                grad = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
            grads.append(torch.zeros_like(block) if grad is None else grad)
        return torch.cat(grads)

    def _diagonal(self) -> Tensor:  # shape: (*batch, N·C)
        out = torch.empty(*self.batch_shape, self.shape[-1], dtype=self.dtype, device=self.device)
        for x1, x2, indices in self._by_inputs(separate=needs_graph(self.x1, self.x2)):
            # One tensor given twice is one leaf of the graph, also after indexing.
            blocks = point_grams(self.handle, x1, x1 if self.x1 is self.x2 else x2)
            diagonals = blocks.diagonal(dim1=-2, dim2=-1).flatten(1)  # shape: (G, N·C)
            for index in indices:
                out[index] = (self.variance[index].to(diagonals.dtype) @ diagonals).to(self.dtype)
        return out

    def _get_indices(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> Tensor:
        shape = torch.broadcast_shapes(*(i.shape for i in (row_index, col_index, *batch_indices)))
        row, col, *batch = (i.expand(shape).reshape(-1) for i in (row_index, col_index, *batch_indices))
        out = torch.empty(row.shape, dtype=self.dtype, device=self.device)
        entries = torch.stack(batch, dim=-1) if batch else row.new_zeros(len(row), 0)
        for entry in torch.unique(entries, dim=0) if batch else entries[:1]:
            chosen = (entries == entry).all(-1).nonzero()[:, 0]
            part = self[tuple(entry.tolist())] if batch else self
            out = out.index_put((chosen,), part._select_entries(row[chosen], col[chosen]))
        return out.reshape(shape)

    def _select_entries(self, row: Tensor, col: Tensor) -> Tensor:
        """Entries of an unbatched operator, from full rows or columns of the inputs involved, whichever are fewer."""
        c = self.num_outputs
        rows, r = torch.unique(row, return_inverse=True)
        if len(rows) > len(torch.unique(col)):
            return self._transpose_nonbatch()._select_entries(col, row)
        points1, at1 = torch.unique(rows // c, return_inverse=True)
        points2, at2 = torch.unique(col // c, return_inverse=True)
        part = self.__class__(self.x1[points1], self.x2[points2], self.variance, handle=self.handle)
        unit = torch.zeros(part.shape[-2], len(rows), dtype=self.dtype, device=self.device)
        unit[at1 * c + rows % c, torch.arange(len(rows), device=unit.device)] = 1
        return part.mT.matmul(unit)[at2 * c + col % c, r]

    def _aligned(self, index: IndexType, size: int) -> IndexType | None:
        """An index of rows as an index of inputs, or None where it takes a part of an input's outputs."""
        c = self.num_outputs
        if c == 1:
            return index
        if not isinstance(index, slice):
            return None
        start, stop, step = index.indices(size)
        return slice(start // c, stop // c) if step == 1 and start % c == 0 and stop % c == 0 else None

    def _getitem(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> LinearOperator:
        rows, cols = self._aligned(row_index, self.shape[-2]), self._aligned(col_index, self.shape[-1])
        batch_is_slices = not any(isinstance(i, Tensor) for i in batch_indices)
        simple = batch_is_slices or (isinstance(rows, slice) and isinstance(cols, slice))
        if rows is None or cols is None or not simple:
            return self._getitem_unaligned(row_index, col_index, *batch_indices)
        variance = self.variance[batch_indices] if batch_indices else self.variance
        of_rows, of_cols = (*batch_indices, rows), (*batch_indices, cols)
        return self.__class__(self.x1[of_rows], self.x2[of_cols], variance, handle=self.handle)

    def _getitem_unaligned(
        self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType
    ) -> LinearOperator:
        """A part of some inputs' outputs: a few rows or columns are evaluated, a large part is interpolated."""
        rows = torch.arange(self.shape[-2], device=self.device)[row_index]
        cols = torch.arange(self.shape[-1], device=self.device)[col_index]
        if min(rows.numel(), cols.numel()) > _FEW or rows.dim() > 1 or cols.dim() > 1:
            return super()._getitem(row_index, col_index, *batch_indices)
        whole = self._getitem(_ALL, _ALL, *batch_indices) if batch_indices else self
        c = self.num_outputs
        points1, at1 = torch.unique(rows // c, return_inverse=True)
        points2, at2 = torch.unique(cols // c, return_inverse=True)
        x1, x2 = whole.x1[..., points1, :], whole.x2[..., points2, :]
        part = self.__class__(x1, x2, whole.variance, handle=self.handle).to_dense()
        return DenseLinearOperator(part[..., at1 * c + rows % c, :][..., at2 * c + cols % c])

    def to_dense(self) -> Tensor:  # shape: (*batch, N1·C, N2·C)
        """
        Evaluate the matrix layer by layer, in blocks of rows that fit in the handle's budget.

        With gradients, or where not even one row fits, by one product per column, whose derivative keeps nothing.
        """
        if not self._is_formed_by_layers(1, 1):
            return super().to_dense()
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for x1, x2, indices in self._by_inputs():
            for index, matrix in self._matrices(x1, x2, indices):
                out[index] = matrix.to(self.dtype)
        return out

    def _is_formed_by_layers(self, rows: int, columns: int) -> bool:
        """Whether a matrix of so many rows and columns can be made by layers: no graph is wanted, and it fits."""
        n1, n2 = -(-rows // self.num_outputs), -(-columns // self.num_outputs)
        return (
            not needs_graph(self.x1, self.x2, self.variance) and self.lin.gram_memory(n1, n2) <= self.handle.max_memory
        )

    def _matrices(self, x1: Tensor, x2: Tensor, indices: list[_Index]) -> Iterator[tuple[_Index, Tensor]]:
        """The matrix of each batch entry of the same inputs, float64."""
        place, matrix = None, None
        for index in indices:
            variance = self.variance[index]
            # Entries of an expanded batch share their memory.
            if matrix is None or variance.data_ptr() != place:
                place, matrix = variance.data_ptr(), self.lin.weighted_gram(x1, x2, variance, self.handle.max_memory)
            yield index, matrix
