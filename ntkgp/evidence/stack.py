"""The one face that per-group Grams show to the evidence, whole or stored as triangles."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ntkgp.linearization.symmetric import SymmetricGrams


class GramStack(Protocol):
    """What the evidence asks of G symmetric n × n matrices; see :class:`~ntkgp.linearization.symmetric.SymmetricGrams`.

    Every result is float64; no method makes another stack.
    """

    @property
    def shape(self) -> torch.Size:
        """(G, n, n)."""

    @property
    def device(self) -> torch.device:
        """Where results are made."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum of v_g K_g, shape (n, n)."""

    def diagonal(self) -> Tensor:
        """Diagonals, shape (G, n)."""

    def traces(self) -> Tensor:
        """Traces, shape (G,)."""

    def inner(self, matrix: Tensor) -> Tensor:
        """tr(K_g M) for a symmetric M, shape (G,)."""

    def quadratic(self, vector: Tensor) -> Tensor:
        """a^T K_g a, shape (G,)."""

    def matvec(self, vector: Tensor) -> Tensor:
        """K_g a, shape (G, n)."""

    def is_finite(self) -> bool:
        """Whether every number is finite."""


class DenseGrams:
    """A view of whole matrices, shape (G, n, n), float64, as a :class:`GramStack`."""

    def __init__(self, grams: Tensor) -> None:
        """Keep the tensor, no copy."""
        self.grams = grams
        self.flat = grams.reshape(len(grams), -1)

    @property
    def shape(self) -> torch.Size:
        """(G, n, n)."""
        return self.grams.shape

    @property
    def device(self) -> torch.device:
        """Where results are made."""
        return self.grams.device

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum of v_g K_g, shape (n, n)."""
        return (weights @ self.flat).reshape(self.shape[1:])

    def diagonal(self) -> Tensor:
        """Diagonals, shape (G, n)."""
        return self.grams.diagonal(dim1=-2, dim2=-1)

    def traces(self) -> Tensor:
        """Traces, shape (G,)."""
        return self.diagonal().sum(-1)

    def inner(self, matrix: Tensor) -> Tensor:
        """tr(K_g M) for a symmetric M, shape (G,)."""
        return self.flat @ matrix.reshape(-1)

    def quadratic(self, vector: Tensor) -> Tensor:
        """a^T K_g a, shape (G,)."""
        return self.matvec(vector) @ vector

    def matvec(self, vector: Tensor) -> Tensor:
        """K_g a, shape (G, n)."""
        return torch.stack([gram @ vector for gram in self.grams])

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return all(math.isfinite(float(end)) for gram in self.grams for end in torch.aminmax(gram))


def gram_stack(grams: Tensor | SymmetricGrams) -> GramStack:
    """Return the view of a stack of Grams; a tensor must be (G, n, n) in contiguous float64."""
    return grams if isinstance(grams, SymmetricGrams) else DenseGrams(grams)
