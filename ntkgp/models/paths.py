"""Posterior samples as functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.grams import Factors
from ntkgp.means import LinearizedMean, NetworkMean


@dataclass(frozen=True)
class FixedMean:
    r"""A predictive mean that no later change of the model reaches: m(x), or :math:`m(x) + K(x, X)\alpha`.

    :param module: m.
    :param dual: X or its layers' factors, 1/λ_g and α; None for m alone.
    :param max_memory: budget for K(x, X).
    """

    module: NetworkMean
    dual: tuple[Factors | Tensor, Tensor, Tensor] | None = None
    max_memory: int = 2**31

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate at packed inputs, (N, D) -> (N, C)."""
        value = self.module(x).reshape(len(x), -1)
        if self.dual is None:
            return value
        source, variance, alpha = self.dual
        return value + (self.module.lin.weighted_gram(x, source, variance, self.max_memory) @ alpha).reshape_as(value)


class ShiftedMean:
    """m0(x) + J(x) θ⋆ with θ⋆ as weights."""

    def __init__(self, lin: LinearizedNetwork, base: LinearizedMean, weights: Tensor) -> None:
        self._lin, self._base, self._weights = lin, base, weights

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate at packed inputs, (N, D) -> (N, C)."""
        return self._base(x).reshape(len(x), -1) + self._lin.jvp(x, self._weights[0]).to(torch.float64)


class FunctionSamples:
    r"""S draws from the posterior, each one function: the same values wherever and however often it is evaluated.

    A draw is :math:`\mu(x) + J(x)\,w_s` with weights :math:`w_s` drawn by Matheron's rule (Wilson et al. 2020).

    :param lin: the linearised network.
    :param mean: the predictive mean, (N, D) -> (N, C).
    :param weights: :math:`w_s`, shape (S, P).

    Cost of a call: S forward-mode passes and the mean; memory S·N·C.
    """

    def __init__(self, lin: LinearizedNetwork, mean: Callable[[Tensor], Tensor], weights: Tensor) -> None:
        self._lin, self._mean, self.weights = lin, mean, weights

    def __len__(self) -> int:
        return len(self.weights)

    def __call__(self, x: Any) -> Tensor:
        """Values of the S functions: (S, N) for one output, else (S, N, C)."""
        packed = self._lin.pack(x).to(torch.float64)
        values = self._mean(packed) + self._lin.jvp(packed, self.weights).to(torch.float64)
        return values.squeeze(-1) if self._lin.num_outputs == 1 else values
