"""Posterior distributions, and their covariances as linear operators."""

from __future__ import annotations

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator import to_linear_operator
from linear_operator.operators import (
    BlockDiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from torch import Tensor

# The square root of a variance has a derivative, and its logarithm is finite.
LEAST_VARIANCE = 1e-30


class LatentNormal(MultivariateNormal):
    """GPyTorch's distribution with variances as they are: its own are raised to 1e-10, whatever the units."""

    @property
    def variance(self) -> Tensor:
        """Variances (*batch, N)."""
        diagonal = self.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2)
        return diagonal.expand(self._batch_shape + self._event_shape).clamp_min(LEAST_VARIANCE)


class LatentMultitaskNormal(MultitaskMultivariateNormal, LatentNormal):
    """The same for several outputs per input."""


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


class LowRankCovariance(RootLinearOperator):
    """R Rᵀ, which knows the C × C blocks of single inputs."""

    def point_blocks(self, num_outputs: int) -> Tensor:
        """Covariances of single inputs, shape (*batch, T, C, C)."""
        rows = self.root.to_dense()
        rows = rows.unflatten(-2, (-1, num_outputs))
        return rows @ rows.mT


class ResidualCovariance(SumLinearOperator):
    """R Rᵀ plus a matrix of C × C blocks at single inputs."""

    def __init__(self, low_rank: LowRankCovariance, blocks: BlockDiagLinearOperator) -> None:
        super().__init__(low_rank, blocks)
        self.low_rank, self.blocks = self.linear_ops

    def point_blocks(self, num_outputs: int) -> Tensor:
        """Covariances of single inputs, shape (*batch, T, C, C)."""
        return self.low_rank.point_blocks(num_outputs) + self.blocks.base_linear_op.to_dense()


def without_rounding(blocks: Tensor) -> Tensor:
    """Covariances (..., C, C) that are differences, without what rounding took below zero."""
    if blocks.shape[-1] == 1:
        return blocks.clamp_min(0.0)
    lowest = torch.linalg.eigvalsh(blocks.detach())[..., :1].clamp_max(0.0)
    return blocks - torch.diag_embed(lowest.expand(blocks.shape[:-1]))
