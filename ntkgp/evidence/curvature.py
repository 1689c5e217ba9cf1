"""Softmax and logistic likelihoods in the logits: value, residual and the full-rank factor of the curvature.

For C >= 2 classes the curvature :math:`B = diag(p) - p p^T` has rank C - 1. With the tail sums
:math:`q_j = p_{j+1} + ... + p_C` its trapezoidal Cholesky factor is known in closed form (Tanabe & Sagae 1992),

.. math:: S_{jj} = \\sqrt{p_j q_j / q_{j-1}}, \\qquad S_{ij} = -p_i \\sqrt{p_j / (q_{j-1} q_j)} \\quad (i > j),

which has C - 1 columns and is evaluated in logarithms, so that nothing cancels for confident predictions.
For C = 1 (one logistic output) :math:`S = \\sqrt{p (1 - p)}`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of log p(y_n | h_n) over the points; `logits` (N, C), `labels` (N,)."""
    if logits.shape[-1] == 1:
        return torch.nn.functional.logsigmoid(logits[:, 0] * (2 * labels - 1)).sum()
    return logits.log_softmax(-1).gather(-1, labels[:, None]).sum()


def residual(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the log-likelihood in the logits, onehot(y) - p, shape (N, C)."""
    if logits.shape[-1] == 1:
        sign = 2.0 * labels[:, None] - 1.0
        return sign * torch.sigmoid(-sign * logits)
    prob = logits.softmax(-1)
    out = (-prob).scatter_add(-1, labels[:, None], torch.ones_like(prob[:, :1]))
    # The label's entry 1 - p_y is summed from the other classes: 1 - p cancels when p is close to one.
    others = prob.scatter(-1, labels[:, None], 0.0).sum(-1, keepdim=True)
    return out.scatter(-1, labels[:, None], others)


def _log_tails(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, C) and log tail sums log q_0 = 0, ..., log q_{C-1} = log p_C, shape (N, C)."""
    log_p = logits.log_softmax(-1)
    log_q = log_p.flip(-1).logcumsumexp(-1).flip(-1)
    return log_p, log_q


def curvature_factor(logits: Tensor) -> Tensor:
    """Factor S of the curvature, S S^T = diag(p) - p p^T; `logits` (N, C) -> (N, C, C-1), or (N, 1, 1) for C = 1."""
    if logits.shape[-1] == 1:
        log_s = torch.nn.functional.logsigmoid(logits) + torch.nn.functional.logsigmoid(-logits)
        return (0.5 * log_s).exp()[..., None]
    log_p, log_q = _log_tails(logits)
    before, after, head = log_q[:, :-1], log_q[:, 1:], log_p[:, :-1]  # log q_{j-1}, log q_j, log p_j
    diagonal = (0.5 * (head + after - before)).exp()
    ratio = 0.5 * (head - before - after)
    lower = -(log_p[:, :, None] + ratio[:, None, :]).exp()  # shape: (N, C, C-1)
    rows, columns = torch.meshgrid(torch.arange(logits.shape[-1]), torch.arange(logits.shape[-1] - 1), indexing="ij")
    rows, columns = rows.to(logits.device), columns.to(logits.device)
    out = torch.where(rows > columns, lower, torch.zeros_like(lower))
    return torch.where(rows == columns, diagonal[:, None, :], out)


def whitened_residual(logits: Tensor, labels: Tensor) -> Tensor:
    """Solution q of S q = onehot(y) - p for the factor of :func:`curvature_factor`, shape (N, C-1), or (N, 1) for C = 1.

    Its entries are the standardised increments of stick breaking: (1[y = j] - pi_j) / sqrt(q_{j-1} pi_j (1 - pi_j)) while
    y >= j with pi_j = p_j / q_{j-1}, and zero after the label.
    """
    if logits.shape[-1] == 1:
        sign = 2.0 * labels[:, None] - 1.0
        return sign * (-0.5 * sign * logits).exp()
    log_p, log_q = _log_tails(logits)
    before, after, head = log_q[:, :-1], log_q[:, 1:], log_p[:, :-1]
    index = torch.arange(logits.shape[-1] - 1, device=logits.device)
    passed = -(0.5 * (head - before - after)).exp()
    hit = (0.5 * (after - head - before)).exp()
    zero = torch.zeros_like(passed)
    return torch.where(index < labels[:, None], passed, torch.where(index == labels[:, None], hit, zero))


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
