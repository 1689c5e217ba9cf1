"""Products with the block-diagonal factor S of a classification's curvature, given as blocks of shape (N, C, R)."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_factor(factor: Tensor, reduced: Tensor) -> Tensor:
    """Multiply by the block-diagonal S: (N*R,) -> (N*C,)."""
    points, _, rank = factor.shape
    return torch.einsum("ncr,nr->nc", factor, reduced.reshape(points, rank)).reshape(-1)


def apply_factor_transpose(factor: Tensor, rows: Tensor) -> Tensor:
    """Multiply by the transpose of the block-diagonal S: (N*C,) -> (N*R,)."""
    points, outputs, _ = factor.shape
    return torch.einsum("ncr,nc->nr", factor, rows.reshape(points, outputs)).reshape(-1)


def project(gram: Tensor, factor: Tensor) -> Tensor:
    """Compute S^T K S for a block-diagonal S: (N*C, N*C) -> (N*R, N*R), symmetric up to rounding."""
    return _half(_half(gram, factor).mT, factor)


def _half(matrix: Tensor, factor: Tensor) -> Tensor:
    """Compute S^T M for a block-diagonal S: (N*C, m) -> (N*R, m)."""
    points, outputs, rank = factor.shape
    blocks = matrix.reshape(points, outputs, -1)
    return torch.bmm(factor.mT, blocks).reshape(points * rank, -1)


def expand(reduced: Tensor, factor: Tensor) -> Tensor:
    """Compute S M S^T for a block-diagonal S: (N*R, N*R) -> (N*C, N*C); adjoint of :func:`project`."""
    return project(reduced, factor.mT)
