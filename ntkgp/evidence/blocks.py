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
    """Compute S^T K S for a block-diagonal S: (N*C, N*C) -> (N*R, N*R)."""
    points, outputs, rank = factor.shape
    left = torch.bmm(factor.mT, gram.reshape(points, outputs, points * outputs))
    left = left.reshape(points * rank, points, outputs).transpose(0, 1)
    out = torch.bmm(left, factor).transpose(0, 1).reshape(points * rank, points * rank)
    return 0.5 * (out + out.mT)
