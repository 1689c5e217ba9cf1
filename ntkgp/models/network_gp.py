"""What the exact, the Nyström and the variational model have in common."""

from __future__ import annotations

import os
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from linear_operator.operators import LinearOperator
from torch import Tensor

from ntkgp.linearization import LinearizedNetwork
from ntkgp.models.batches import packed_inputs
from ntkgp.models.conditioned import Conditionable
from ntkgp.models.noise import is_classification
from ntkgp.models.posterior import LatentMultitaskNormal, LatentNormal

MEANS = ("network", "posterior")


class NetworkGP(Conditionable):
    """A Gaussian process around a linearised network: its inputs, its reported mean, its distributions."""

    lin: LinearizedNetwork
    likelihood: Likelihood
    kernel: Kernel

    @property
    def mean(self) -> str:
        """Which predictive mean is reported, ``"network"`` or ``"posterior"``; may be changed at any time."""
        return self._reported_mean

    @mean.setter
    def mean(self, value: str) -> None:
        if value not in MEANS:
            raise ValueError(f"mean: expected one of {MEANS}, got {value!r}")
        self._check_mean(value)
        self._reported_mean = value

    def _check_mean(self, value: str) -> None:
        """Refuse a mean that the model does not have."""

    @property
    def covar_module(self) -> Kernel:
        """The kernel, by GPyTorch's usual name."""
        return self.kernel

    @property
    def batch_shape(self) -> torch.Size:
        """Empty: one model, however many batches of inputs it is asked about."""
        return torch.Size()

    @property
    def is_classification(self) -> bool:
        """Whether the likelihood is categorical or Bernoulli."""
        return is_classification(self.likelihood)

    def save(self, path: str | os.PathLike[str], training_data: bool = False) -> None:
        """Write the model to a file that :func:`ntkgp.load` binds to its network again; the network is not in it.

        The file holds tensors and plain values, no code (``torch.load(path, weights_only=True)`` reads it), and digests
        of the network's weights. Training data are not in it unless asked for, but for the inputs that a prediction
        needs: landmarks and inducing inputs. An :class:`~ntkgp.ExactNTKGP` in weight space is saved with its factors:
        it predicts and draws, but its hyper-parameters cannot change any more.

        :param path: a file; written whole or not at all.
        :param training_data: whether the training inputs and targets are written too.
        :raises ValueError: an :class:`~ntkgp.ExactNTKGP` in data space, or an :class:`~ntkgp.InverseNTKGP`, without its
            training data, which every prediction needs; data of a DataLoader, which are not the model's.
        :raises TypeError: a model without a file format.
        """
        from ntkgp.models.saving import save

        save(self, path, training_data)

    def _network_of_file(self) -> LinearizedNetwork:
        """The network that a file is bound to."""
        return self.lin

    def _inputs(self, x: Any) -> Tensor:
        """Raw or packed inputs as packed float64, packed ones with any batch dimensions."""
        packing = self.lin.packing
        if packing.is_packed(x) and x.ndim > 2 and not packing.is_raw(x):
            return packed_inputs(x.reshape(-1, x.shape[-1]), self.lin, "inputs").reshape(x.shape)
        return packed_inputs(x, self.lin, "inputs")

    def _distribution(self, mean: Tensor, covariance: LinearOperator | Tensor) -> MultivariateNormal:
        """Means (*batch, N), or (*batch, N, C), with interleaved covariances (*batch, N·C, N·C)."""
        c = self.num_outputs
        if c == 1:
            return LatentNormal(mean.reshape(covariance.shape[:-1]), covariance)
        return LatentMultitaskNormal(mean.reshape(*covariance.shape[:-2], -1, c), covariance)
