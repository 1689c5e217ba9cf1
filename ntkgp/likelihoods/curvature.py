"""Curvature of the logistic and softmax likelihoods, in factored form and without cancellation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["WhitenedTargets", "curvature_factor", "log_likelihood", "residual", "validate_labels", "whitened_targets"]


class WhitenedTargets(NamedTuple):
    """
    The second-order expansion of a classification log-likelihood, written as a Gaussian regression with unit noise.

    :ivar factor: S, ``(N, C, R)`` with S Sᵀ = B at the expansion point.
    :ivar targets: ẑ = Sᵀ(f − m0) + S⁺r, ``(N, R)``.
    :ivar constant: what the log-density of ẑ must be raised by to equal the log evidence of the expansion.
    """

    factor: Tensor
    targets: Tensor
    constant: Tensor


def validate_labels(labels: Tensor, num_classes: int, shape: torch.Size | None = None) -> Tensor:
    """
    Class labels as int64, or a ``ValueError`` that says what is wrong with them.

    :param labels: ``(*batch, N)``, an integer dtype; for two classes also bool, or floating point zeros and ones
        (what ``binary_cross_entropy_with_logits`` takes).
    :param num_classes: the number of classes, at least 2; the labels are 0 … num_classes − 1.
    :param shape: the shape that the labels must have, when it is known.
    :return: the labels, dtype ``torch.int64``.

    Example:
        >>> validate_labels(torch.tensor([2, 0, 1], dtype=torch.uint8), 3)
        tensor([2, 0, 1])
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: expected a tensor of class indices, got {type(labels).__name__}")
    if shape is not None and labels.shape != shape:
        raise ValueError(f"labels: expected shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.is_complex():
        raise ValueError(f"labels: expected an integer dtype, got {labels.dtype}")
    if labels.is_floating_point():
        if not bool(torch.isfinite(labels).all()):
            raise ValueError("labels: contain NaN or infinite values; expected integers")
        if num_classes != 2 or not bool(((labels == 0) | (labels == 1)).all()):
            expected = "only zeros and ones" if num_classes == 2 else "an integer dtype (torch.long)"
            raise ValueError(f"labels: got {labels.dtype}, expected {expected}")
    labels = labels.long()
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(
            f"labels: expected values 0 … {num_classes - 1} for {num_classes} classes, "
            f"got values from {int(labels.min())} to {int(labels.max())}"
        )
    return labels


def _check_logits(logits: Tensor) -> Tensor:
    """The logits in float64, finite."""
    if not isinstance(logits, Tensor) or logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError("logits: expected a tensor of shape (*batch, N, C) with C >= 1")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits: contain NaN or infinite values")
    return logits.double()


def _labels_for(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels checked against the logits that they belong to."""
    return validate_labels(labels, max(logits.shape[-1], 2), logits.shape[:-1])


def _log_tails(log_p: Tensor) -> Tensor:
    """Logarithms of the tail sums q_j = Σ_{k >= j} p_k for j = 0 … C−1: sums of positive terms only."""
    return log_p.flip(-1).logcumsumexp(-1).flip(-1)  # shape: (*batch, N, C)


def curvature_factor(logits: Tensor) -> Tensor:
    r"""
    A factor S of the curvature :math:`B = \mathrm{diag}(p) - pp^\top` of the negative log-likelihood in the logits.

    B has rank C − 1, so S has C − 1 columns and no inverse of B is ever needed. With the tail sums
    :math:`q_j = \sum_{k>j} p_k` (:math:`q_0 = 1`) the root-free Cholesky factor of a multinomial covariance is known in
    closed form,

    .. math::
        S_{jj} = \sqrt{p_j q_j / q_{j-1}}, \qquad S_{ij} = -p_i \sqrt{p_j / (q_j q_{j-1})} \quad (i > j),

    and holds only products of positive numbers: computed from the log-probabilities, every entry has full relative
    accuracy also where p underflows. A confident point gets a tiny curvature, never NaN and never a floor.
    For one logistic output S is the number :math:`\sqrt{\sigma(f)\sigma(-f)}`.

    :param logits: ``(*batch, N, C)``; C = 1 is one logistic output.
    :return: S, float64, ``(*batch, N, C, max(C − 1, 1))``, with S Sᵀ = B and 1ᵀS = 0 (C > 1).
    :raises ValueError: when the logits are not finite.

    Cost: time and memory O(N·C²).

    Source: Tanabe & Sagae, *An exact Cholesky decomposition and the generalized inverse of the variance-covariance
    matrix of the multinomial distribution*, JRSS B 54 (1992).

    Example:
        >>> S = curvature_factor(torch.tensor([[1.0, 0.0, -2.0]]))
        >>> p = torch.tensor([[1.0, 0.0, -2.0]], dtype=torch.float64).softmax(-1)
        >>> torch.allclose(S @ S.mT, torch.diag_embed(p) - p.mT @ p, atol=1e-15)
        True
    """
    logits = _check_logits(logits)
    if logits.shape[-1] == 1:
        return ((logsigmoid(logits) + logsigmoid(-logits)) / 2).exp().unsqueeze(-1)
    log_p = logits.log_softmax(-1)
    log_q = _log_tails(log_p)  # q_{j-1} at index j, counted from 0
    head, tail = log_q[..., :-1], log_q[..., 1:]
    diagonal = ((log_p[..., :-1] + tail - head) / 2).exp()  # shape: (*batch, N, C - 1)
    below = -(log_p.unsqueeze(-1) + ((log_p[..., :-1] - tail - head) / 2).unsqueeze(-2)).exp()
    factor = below.tril(-1)  # shape: (*batch, N, C, C - 1)
    return factor + torch.nn.functional.pad(torch.diag_embed(diagonal), (0, 0, 0, 1))


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    r"""
    Log-likelihood of each point, :math:`\log \mathrm{softmax}(f_n)_{y_n}`, or :math:`\log \sigma(\pm f_n)` for C = 1.

    :param logits: ``(*batch, N, C)``; C = 1 is one logistic output.
    :param labels: ``(*batch, N)``, values 0 … C − 1 (0 and 1 for C = 1).
    :return: ``(*batch, N)``, float64.
    :raises ValueError: when logits or labels are not valid; see :func:`validate_labels`.

    Cost: O(N·C).

    Example:
        >>> log_likelihood(torch.zeros(2, 4), torch.tensor([3, 1])).exp()
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    logits = _check_logits(logits)
    labels = _labels_for(logits, labels)
    if logits.shape[-1] == 1:
        return logsigmoid(logits.squeeze(-1) * (2 * labels - 1))
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def residual(logits: Tensor, labels: Tensor) -> Tensor:
    r"""
    Gradient of the log-likelihood in the logits, :math:`r = \mathrm{onehot}(y) - p`.

    The entry of the true class, 1 − p_y, is the sum of the other probabilities, which is accurate also when p_y
    rounds to 1.

    :param logits: ``(*batch, N, C)``; C = 1 is one logistic output, with r = y − σ(f).
    :param labels: ``(*batch, N)``, values 0 … C − 1 (0 and 1 for C = 1).
    :return: ``(*batch, N, C)``, float64.
    :raises ValueError: when logits or labels are not valid; see :func:`validate_labels`.

    Cost: O(N·C).

    Example:
        >>> residual(torch.zeros(1, 4), torch.tensor([3]))
        tensor([[-0.2500, -0.2500, -0.2500,  0.7500]], dtype=torch.float64)
    """
    logits = _check_logits(logits)
    labels = _labels_for(logits, labels)
    if logits.shape[-1] == 1:
        sign = (2 * labels - 1).unsqueeze(-1)
        return sign * torch.sigmoid(-sign * logits)
    index = labels.unsqueeze(-1)
    others = logits.softmax(-1).scatter(-1, index, 0.0)
    return (-others).scatter(-1, index, others.sum(-1, keepdim=True))


def _whitened_residual(logits: Tensor, labels: Tensor) -> Tensor:
    """S⁺r in closed form: with S = L√D, L⁻¹(e_y − p) = −p_j/q_{j−1} (j < y), q_y/q_{y−1} (j = y), 0 (j > y)."""
    if logits.shape[-1] == 1:
        sign = (2 * labels - 1).unsqueeze(-1)
        return sign * (-sign * logits / 2).exp()
    log_p = logits.log_softmax(-1)
    log_q = _log_tails(log_p)
    head, tail, log_p = log_q[..., :-1], log_q[..., 1:], log_p[..., :-1]
    position = torch.arange(logits.shape[-1] - 1, device=logits.device)
    label = labels.unsqueeze(-1)
    before = -((log_p - head - tail) / 2).exp()
    at = ((tail - head - log_p) / 2).exp()
    return torch.where(position < label, before, torch.where(position == label, at, 0.0))


def whitened_targets(logits: Tensor, labels: Tensor, offset: Tensor) -> WhitenedTargets:
    r"""
    The quadratic surrogate of a classification log-likelihood as a Gaussian likelihood with unit noise.

    With f the logits at θ̃, r and B = S Sᵀ the gradient and curvature there and h = m0 + Jθ the tangent model,

    .. math::
        \log p(y \mid h) \approx \log p(y \mid f) + r^\top (h - f) - \tfrac12 (h - f)^\top B (h - f)
        = \log \mathcal N(\hat z;\, S^\top J \theta,\, I) + \mathrm{constant}, \qquad
        \hat z = S^\top (f - m_0) + S^{+} r,

    because r lies in the range of S. The evidence of the surrogate is therefore
    :math:`\log \mathcal N(\hat z; 0, S^\top K S + I) + \mathrm{constant}` for every prior precision, where the constant
    :math:`\log p(y \mid f) + \tfrac12 \lVert S^{+} r \rVert^2 + \tfrac R2 \log 2\pi` does not depend on it.

    :param logits: f, ``(N, C)``; C = 1 is one logistic output.
    :param labels: ``(N,)``, values 0 … C − 1 (0 and 1 for C = 1).
    :param offset: m0 = f − Jθ̃, ``(N, C)``.
    :return: factor S ``(N, C, R)``, targets ẑ ``(N, R)`` and the constant, R = max(C − 1, 1), all float64.
    :raises ValueError: when the arguments are not valid or their shapes differ.

    Cost: O(N·C²).

    Source: Antorán et al., *Adapting the Linearised Laplace Model Evidence for Modern Deep Learning*, ICML 2022 (the
    expansion); S⁺r in closed form from the factor of :func:`curvature_factor`.

    Example:
        >>> f = torch.tensor([[0.3], [-1.0]])
        >>> whitened_targets(f, torch.tensor([1, 0]), torch.zeros(2, 1)).targets.shape
        torch.Size([2, 1])
    """
    logits = _check_logits(logits)
    labels = _labels_for(logits, labels)
    if offset.shape != logits.shape:
        raise ValueError(f"offset: expected shape {tuple(logits.shape)} like logits, got {tuple(offset.shape)}")
    if not bool(torch.isfinite(offset).all()):
        raise ValueError("offset: contains NaN or infinite values")
    factor = curvature_factor(logits)
    pull = _whitened_residual(logits, labels)  # shape: (N, R)
    targets = torch.einsum("...cr,...c->...r", factor, logits - offset.double()) + pull
    constant = log_likelihood(logits, labels).sum() + pull.square().sum() / 2 + pull.numel() / 2 * math.log(2 * math.pi)
    return WhitenedTargets(factor, targets, constant)
