"""Σ_g v_g K_g over per-group Grams that are held in memory."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator
from linear_operator.operators._linear_operator import IndexType
from torch import Tensor

__all__ = ["GroupedGramOperator"]


class GroupedGramOperator(LinearOperator):
    r"""
    A weighted sum of per-group Grams,

    .. math:: K = \sum_{g=1}^G v_g K_g, \qquad \frac{\partial\, l^\top K r}{\partial v_g} = l^\top K_g r,

    the prior covariance of the tangent model with :math:`v_g = 1/\lambda_g` (Antorán et al. 2022, in function space).
    The Grams do not depend on the hyper-parameters and are shared by every operator made from them; the sum is
    formed once per operator.

    :param grams: ``(*batch, G, n, m)``, usually float64 from ``LinearizedNetwork.grams``; may require gradients.
    :param variance: ``(*batch, G)``; its dtype is that of the operator. Batch shapes are broadcast.
    :raises ValueError: other shapes, or a different number of groups.

    Cost: O(G·n·m) time and n·m numbers for the sum, once; then O(n·m) per product with a vector. A gradient is
    O(n·m·(G + k)) for k vectors.

    Example:
        >>> import torch, ntkgp
        >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(3, 2), torch.randn(2, 3), groups="tensor")
        >>> x = torch.randn(5, 3)
        >>> K = GroupedGramOperator(lin.grams(x), torch.tensor([0.5, 2.0]))
        >>> K.shape, K.dtype, (K @ torch.ones(10)).shape
        (torch.Size([10, 10]), torch.float32, torch.Size([10]))
    """

    def _check_args(self, grams: Any, variance: Any) -> str | None:
        if not isinstance(grams, Tensor) or grams.dim() < 3:
            came = tuple(grams.shape) if isinstance(grams, Tensor) else type(grams).__name__
            return f"grams: expected a tensor of shape (*batch, G, n, m), got {came}"
        if not isinstance(variance, Tensor) or variance.dim() < 1 or variance.shape[-1] != grams.shape[-3]:
            came = tuple(variance.shape) if isinstance(variance, Tensor) else type(variance).__name__
            return f"variance: expected a tensor of shape (*batch, {grams.shape[-3]}), got {came}"
        return None

    def __init__(
        self,
        grams: Tensor,  # shape: (*batch, G, n, m)
        variance: Tensor,  # shape: (*batch, G)
    ) -> None:
        error = self._check_args(grams, variance)
        if error is not None:
            raise ValueError(error)
        batch = torch.broadcast_shapes(grams.shape[:-3], variance.shape[:-1])
        grams = grams if grams.shape[:-3] == batch else grams.expand(*batch, *grams.shape[-3:])
        variance = variance if variance.shape[:-1] == batch else variance.expand(*batch, variance.shape[-1])
        super().__init__(grams, variance)
        self.grams, self.variance = grams, variance
        self._sum: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the variances: the Grams may be kept in a wider one."""
        return self.variance.dtype

    def _size(self) -> torch.Size:
        return self.grams.shape[:-3] + self.grams.shape[-2:]

    def _transpose_nonbatch(self) -> GroupedGramOperator:
        return self.__class__(self.grams.mT, self.variance)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> GroupedGramOperator:
        grams = self.grams.expand(*batch_shape, *self.grams.shape[-3:])
        return self.__class__(grams, self.variance.expand(*batch_shape, self.variance.shape[-1]))

    def _shared_grams(self) -> Tensor | None:  # shape: (G, n, m)
        """The Grams without their batch dimensions if these only repeat them."""
        if self.grams.requires_grad or any(
            size > 1 and stride for size, stride in zip(self.batch_shape, self.grams.stride(), strict=False)
        ):
            return None
        return self.grams[(0,) * len(self.batch_shape)]

    def to_dense(self) -> Tensor:  # shape: (*batch, n, m)
        """Form the sum, or return it if it was formed before; differentiable in the variances and the Grams."""
        if self._sum is None or (torch.is_grad_enabled() and self.requires_grad and not self._sum.requires_grad):
            variance, shared = self.variance.to(self.grams.dtype), self._shared_grams()
            if shared is not None:
                total = (variance.reshape(-1, variance.shape[-1]) @ shared.flatten(1)).reshape(self._size())
            else:
                total = torch.einsum("...g,...gnm->...nm", variance, self.grams)
            self._sum = total.to(self.dtype)
        return self._sum

    def _matmul(
        self,  # shape: (*batch, n, m)
        rhs: Tensor,  # shape: (*batch2, m, k) or (m,)
    ) -> Tensor:  # shape: (..., n, k) or (..., n)
        return self.to_dense() @ rhs

    def _t_matmul(
        self,  # shape: (*batch, n, m)
        rhs: Tensor,  # shape: (*batch2, n, k)
    ) -> Tensor:  # shape: (..., m, k)
        return self.to_dense().mT @ rhs

    def _bilinear_derivative(
        self,
        left_vecs: Tensor,  # shape: (*batch2, n, k)
        right_vecs: Tensor,  # shape: (*batch2, m, k)
    ) -> tuple[Tensor | None, ...]:
        if not (self.grams.requires_grad or self.variance.requires_grad):
            return None, None
        # One n × m outer product serves all groups; K_g r would cost k products with each of them.
        outer = (left_vecs @ right_vecs.mT).to(self.grams.dtype)
        outer = outer.expand(torch.broadcast_shapes(outer.shape, self._size())).sum_to_size(self._size())
        grams_grad = variance_grad = None
        if self.variance.requires_grad:
            shared = self._shared_grams()
            if shared is not None:
                variance_grad = (outer.flatten(-2) @ shared.flatten(1).mT).to(self.dtype)
            else:
                variance_grad = torch.einsum("...nm,...gnm->...g", outer, self.grams).to(self.dtype)
        if self.grams.requires_grad:
            grams_grad = self.variance.to(outer.dtype)[..., None, None] * outer.unsqueeze(-3)
        return grams_grad, variance_grad

    def _diagonal(self) -> Tensor:  # shape: (*batch, n)
        diagonals = self.grams.diagonal(dim1=-2, dim2=-1)  # shape: (*batch, G, n)
        return (self.variance.unsqueeze(-1) * diagonals).sum(-2).to(self.dtype)

    def _get_indices(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> Tensor:
        index = (*batch_indices, row_index, col_index)
        entries = self.grams.movedim(-3, -1)[index]  # shape: (..., G)
        variance = self.variance[batch_indices] if batch_indices else self.variance
        return (variance * entries).sum(-1).to(self.dtype)

    def _getitem(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> LinearOperator:
        variance = self.variance[batch_indices] if batch_indices else self.variance
        index = (*batch_indices, slice(None), row_index, col_index)
        return self.__class__(self.grams[index], variance)

    def _mul_matrix(self, other: Tensor | LinearOperator) -> LinearOperator:
        # linear_operator's elementwise product works on low-rank roots; the sum is dense anyway, so it is exact here.
        return DenseLinearOperator(self.to_dense() * other.to_dense())
