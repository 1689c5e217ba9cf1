"""The posterior covariance as a linear operator."""

from __future__ import annotations

import torch
from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator, MatmulLinearOperator, SumLinearOperator
from torch import Tensor


class PosteriorCovariance(SumLinearOperator):
    r"""Prior covariance minus what the data explain, :math:`K_{xx} - R R^\top`, formed only when asked for.

    :param prior: K(x, x), shape (*batch, T·C, T·C).
    :param root: R, shape (*batch, T·C, r).
    :param blocks: per-input blocks of the prior, (*batch, T, C, C), or None to take them from `prior`.

    Cost: the diagonal O(T·C·r) and :meth:`point_blocks` O(T·C²·r), besides the prior's own.
    """

    def __init__(self, prior: LinearOperator | Tensor, reduction: LinearOperator) -> None:
        super().__init__(to_linear_operator(prior), reduction)
        self.prior, self.reduction = self.linear_ops

    @classmethod
    def from_root(cls, prior: LinearOperator | Tensor, root: Tensor) -> PosteriorCovariance:
        """Build K − R Rᵀ."""
        return cls(prior, MatmulLinearOperator(-root, root.mT))

    def _diagonal(self) -> Tensor:
        # Rounding can leave a variance that the data explain entirely just below zero.
        return super()._diagonal().clamp_min(0.0)

    def point_blocks(self, num_outputs: int) -> Tensor:
        """The C × C covariances of single inputs, shape (*batch, T, C, C)."""
        left = self.reduction.left_linear_op.to_dense()
        rows = left.reshape(*left.shape[:-2], -1, num_outputs, left.shape[-1])
        prior = self.prior
        if isinstance(prior, LazyEvaluatedKernelTensor) and hasattr(prior.kernel, "point_blocks"):
            blocks = prior.kernel.point_blocks(prior.x1)
        else:
            dense = prior.to_dense()
            points = dense.shape[-1] // num_outputs
            blocks = dense.reshape(*dense.shape[:-2], points, num_outputs, points, num_outputs)
            blocks = torch.diagonal(blocks, dim1=-4, dim2=-2).movedim(-1, -3)
        return blocks - rows @ rows.mT


def without_rounding(blocks: Tensor) -> Tensor:
    """Covariances (..., C, C) that are differences, without what rounding took below zero."""
    if blocks.shape[-1] == 1:
        return blocks.clamp_min(0.0)
    lowest = torch.linalg.eigvalsh(blocks.detach())[..., :1].clamp_max(0.0)
    return blocks - torch.diag_embed(lowest.expand(blocks.shape[:-1]))
