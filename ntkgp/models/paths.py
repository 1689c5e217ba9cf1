"""Posterior samples as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ntkgp.linearization import LinearizedNetwork


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
