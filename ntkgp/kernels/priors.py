"""Priors of positive scale parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from gpytorch.priors import LogNormalPrior
from torch import Tensor

__all__ = ["FlatLogPrior"]

_TWO_DECADES = 2 * math.log(10.0)


class FlatLogPrior(LogNormalPrior):
    r"""
    The improper prior that is flat in the logarithm, :math:`p(\log\lambda) \propto 1`, with starting points to sample.

    GPyTorch's marginal likelihoods add the log-density of every registered prior. This one adds exactly zero, so a
    kernel that carries it keeps *marginal likelihood × N·C = evidence*. It is registered nevertheless because BoTorch
    restarts a failed fit from ``sample_all_priors``: no law can be drawn from an improper prior, so ``sample`` draws
    starting points from a log-normal, by default of two decades around 1.

    :param loc: mean of the logarithm of a starting point.
    :param scale: standard deviation of the logarithm of a starting point.

    >>> prior = FlatLogPrior()
    >>> prior.log_prob(torch.tensor([1e-8, 1.0, 1e8]))
    tensor([0., 0., 0.])
    >>> prior.sample(torch.Size([3])).shape
    torch.Size([3])
    """

    def __init__(self, loc: float | Tensor = 0.0, scale: float | Tensor = _TWO_DECADES) -> None:
        super().__init__(loc, scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """Zero for every value."""
        return torch.zeros_like(x)

    def expand(self, batch_shape: Sequence[int]) -> FlatLogPrior:
        """The same prior for independent values of a shape."""
        return FlatLogPrior(self.loc.expand(torch.Size(batch_shape)), self.scale.expand(torch.Size(batch_shape)))
