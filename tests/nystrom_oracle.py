"""Dense float64 formulas of Nyström models, from explicit Jacobians; shares no code with the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests import reference as ref


def pseudo_inverse_root(matrix: Tensor, cut: float = 1e-13) -> Tensor:
    """R with R Rᵀ = the pseudo-inverse of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    keep = values > cut * values[-1]
    return vectors[:, keep] / values[keep].sqrt()


@dataclass(frozen=True)
class Nystrom:
    """A Nyström kernel from rows of weight space.

    :param rows: J_u, shape (m, P).
    :param entries: λ of each weight, shape (P,).
    :param cut: directions of smaller eigenvalues, relative to the largest, are left out.
    """

    rows: Tensor
    entries: Tensor
    cut: float = 1e-13

    def phi(self, j: Tensor) -> Tensor:
        """Features of Jacobian rows, (n, P) -> (n, r)."""
        scaled = self.rows / self.entries
        return j @ scaled.T @ pseudo_inverse_root(scaled @ self.rows.T, self.cut)

    def gram(self, j1: Tensor, j2: Tensor | None = None) -> Tensor:
        """The kernel matrix."""
        return self.phi(j1) @ self.phi(j1 if j2 is None else j2).T


def log_normal(t: Tensor, covariance: Tensor) -> float:
    """log N(t; 0, covariance)."""
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, t[:, None], upper=False)
    return float(-0.5 * white.square().sum() - factor.diagonal().log().sum() - len(t) / 2 * math.log(2 * math.pi))


def whitening(logits: Tensor) -> Tensor:
    """Block-diagonal B^{1/2} as a dense matrix, (NC, NC), by eigendecomposition of every block."""
    blocks = []
    for row in logits:
        if len(row) == 1:
            s = torch.sigmoid(row)
            blocks.append((s * (1 - s)).sqrt().reshape(1, 1))
            continue
        p = row.softmax(-1)
        values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        blocks.append(vectors * values.clamp_min(0.0).sqrt() @ vectors.T)
    return torch.block_diag(*blocks)


def onehot_residual(logits: Tensor, labels: Tensor) -> Tensor:
    """onehot(y) − p (y − σ(f) for one logit), (NC,)."""
    if logits.shape[1] == 1:
        return labels.double() - torch.sigmoid(logits[:, 0])
    return (torch.nn.functional.one_hot(labels, logits.shape[1]) - logits.softmax(-1)).flatten()


def classification_posterior(phi: Tensor, phi_test: Tensor, logits: Tensor) -> Tensor:
    """φ⋆ (I + Σ φᵀBφ)⁻¹ φ⋆ᵀ."""
    root = whitening(logits)
    precision = torch.eye(phi.shape[1], dtype=phi.dtype) + phi.T @ root @ root @ phi
    return phi_test @ torch.linalg.solve(precision, phi_test.T)


def expansion_bound(q: Tensor, k: Tensor, logits: Tensor, offset: Tensor, labels: Tensor) -> float:
    """Collapsed bound of the second-order expansion of a classification, in weight-free form.

    The expansion is log p(y|f) + rᵀd − dᵀBd/2 with d = g − (f − m0), g ~ N(0, Q): a Gaussian integral over g.
    """
    root, r = whitening(logits), onehot_residual(logits, labels)
    b, shift = root @ root, (logits - offset).flatten()
    constant = ref.label_log_likelihood(logits, labels) - float(r @ shift) - 0.5 * float(shift @ b @ shift)
    linear = r + b @ shift
    # ∫ exp(linearᵀg − gᵀBg/2) N(g; 0, Q) dg = exp(½ linearᵀ(Q − QB^½(I+B^½QB^½)⁻¹B^½Q)linear) / |I+B^½QB^½|^½
    inner = torch.eye(len(q), dtype=q.dtype) + root @ q @ root
    explained = q - q @ root @ torch.linalg.solve(inner, root @ q)
    value = constant + 0.5 * float(linear @ explained @ linear) - 0.5 * float(torch.logdet(inner))
    return value - 0.5 * float(((k - q) * b).sum())
