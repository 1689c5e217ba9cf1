"""One Gaussian noise model for the outputs of a multi-output latent function."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.likelihoods.gaussian_likelihood import _GaussianLikelihoodBase
from gpytorch.likelihoods.noise_models import FixedGaussianNoise
from gpytorch.utils.warnings import GPInputWarning
from linear_operator.operators import ConstantDiagLinearOperator, DiagLinearOperator, LinearOperator, ZeroLinearOperator
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

__all__ = ["MultioutputGaussianLikelihood"]


class MultioutputGaussianLikelihood(_GaussianLikelihoodBase):
    r"""
    Lets a single-output Gaussian likelihood act on a :class:`~gpytorch.distributions.MultitaskMultivariateNormal`.

    .. math::
        p(Y \mid F) = \prod_{n, c} \mathcal N(y_{nc} \mid f_{nc}, \sigma^2_{nc}), \qquad
        \sigma^2_{nc} = \sigma^2 \text{, or the given } \sigma^2_n \text{ or } \sigma^2_{nc}.

    GPyTorch's own ``GaussianLikelihood`` builds its noise for N values where the covariance has N·C of them and fails
    by shape. This class adds the same noise to all N·C values. The noise module of the wrapped likelihood is *shared*,
    not copied: fitting or setting the noise here is seen by the wrapped likelihood and the other way round, and both
    have the same ``state_dict``.

    :param likelihood: a ``GaussianLikelihood``, or a ``FixedNoiseGaussianLikelihood`` whose noise has shape ``(N,)``
        (one value per input) or ``(*batch, N, C)`` (per input and output; C may be 1 for all outputs alike).
    :raises ValueError: for any other likelihood; one noise per output is GPyTorch's ``MultitaskGaussianLikelihood``.

    Cost: O(N·C) beyond the wrapped likelihood.

    Example:
        >>> stock = GaussianLikelihood()
        >>> likelihood = MultioutputGaussianLikelihood(stock)
        >>> stock.noise = 0.5
        >>> latent = MultitaskMultivariateNormal(torch.zeros(4, 3), torch.eye(12))
        >>> likelihood(latent).variance[0].detach()
        tensor([1.5000, 1.5000, 1.5000])
    """

    def __init__(self, likelihood: GaussianLikelihood | FixedNoiseGaussianLikelihood) -> None:
        if not isinstance(likelihood, (GaussianLikelihood, FixedNoiseGaussianLikelihood)):
            raise ValueError(
                "likelihood: expected gpytorch's GaussianLikelihood or FixedNoiseGaussianLikelihood, got "
                f"{type(likelihood).__name__}; for one noise per output use MultitaskGaussianLikelihood"
            )
        super().__init__(noise_covar=likelihood.noise_covar)
        self.second_noise_covar = getattr(likelihood, "second_noise_covar", None)
        self._fixed = isinstance(likelihood, FixedNoiseGaussianLikelihood)

    @property
    def noise(self) -> Tensor:
        """The noise variance of the wrapped likelihood (with the learned part, if there is one)."""
        if self.second_noise_covar is None:
            return self.noise_covar.noise
        return self.noise_covar.noise + self.second_noise_covar.noise

    @noise.setter
    def noise(self, value: float | Tensor) -> None:
        self.noise_covar.initialize(noise=value)

    @property
    def raw_noise(self) -> Tensor:
        """The unconstrained noise parameter, the very object of the wrapped likelihood; a fixed noise has none."""
        return self.noise_covar.raw_noise

    @property
    def second_noise(self) -> float | Tensor:
        """The learned part of a ``FixedNoiseGaussianLikelihood(learn_additional_noise=True)``, else 0."""
        return 0.0 if self.second_noise_covar is None else self.second_noise_covar.noise

    @second_noise.setter
    def second_noise(self, value: float | Tensor) -> None:
        if self.second_noise_covar is None:
            raise RuntimeError("second_noise: the wrapped likelihood has learn_additional_noise=False")
        self.second_noise_covar.initialize(noise=value)

    def _shaped_noise_covar(
        self,
        base_shape: torch.Size,
        *params: Any,
        noise: Tensor | None = None,
        interleaved: bool = True,
        **kwargs: Any,
    ) -> Tensor | LinearOperator:
        if len(base_shape) < 2:
            raise ValueError(f"values: expected shape (*batch, N, C), got {tuple(base_shape)}")
        batch, size = base_shape[:-2], base_shape[-2:].numel()
        terms: list[LinearOperator] = []
        if noise is not None:
            if _num_inputs(noise) != base_shape[-2]:
                expected = f"({base_shape[-2]},) or (*batch, {base_shape[-2]}, {base_shape[-1]})"
                raise ValueError(f"noise: expected shape {expected}, got {tuple(noise.shape)}")
            terms.append(_diagonal(noise, base_shape, interleaved))
        elif self._fixed and _num_inputs(self.noise_covar.noise) == base_shape[-2]:
            terms.append(_diagonal(self.noise_covar.noise, base_shape, interleaved))
        learned = self.second_noise_covar if self._fixed else None if terms else self.noise_covar
        if learned is not None:
            value = learned.noise  # shape: (*noise_batch, 1)
            value = value.expand(*torch.broadcast_shapes(value.shape[:-1], batch), 1)
            terms.append(ConstantDiagLinearOperator(value, diag_shape=size))
        if not terms:
            warnings.warn(
                "The fixed noise is for other inputs than these and no noise= was given: no noise is added.",
                GPInputWarning,
                stacklevel=3,
            )
            return ZeroLinearOperator(*batch, size, size, dtype=self.noise_covar.noise.dtype)
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def marginal(
        self, function_dist: MultitaskMultivariateNormal, *params: Any, **kwargs: Any
    ) -> MultitaskMultivariateNormal:
        r"""
        Distribution of noisy observations, :math:`\mathcal N(m, \Sigma + \mathrm{diag}(\sigma^2_{nc}))`.

        :param function_dist: the latent distribution, interleaved or not.
        :param noise: (keyword) a noise variance for these inputs, ``(N,)`` or ``(*batch, N, C)``.
        """
        _require_multitask(function_dist)
        interleaved = function_dist._interleaved
        noise = self._shaped_noise_covar(function_dist.mean.shape, *params, interleaved=interleaved, **kwargs)
        covar = function_dist.lazy_covariance_matrix + noise
        return function_dist.__class__(function_dist.mean, covar, interleaved=interleaved)

    def expected_log_prob(
        self, target: Tensor, input: MultitaskMultivariateNormal, *params: Any, **kwargs: Any
    ) -> Tensor:
        """
        Expected log-density of the observations of each input, summed over its outputs.

        :param target: ``(*batch, N, C)``.
        :param input: the latent distribution.
        :return: ``(*batch, N)``.
        """
        _require_multitask(input)
        return super().expected_log_prob(target, input, *params, **kwargs)

    def forward(self, function_samples: Tensor, *params: Any, **kwargs: Any) -> Distribution:
        """Distribution of the observations given function values ``(*batch, N, C)``."""
        noise = self._shaped_noise_covar(function_samples.shape, *params, **kwargs).diagonal(dim1=-1, dim2=-2)
        noise = noise.reshape(*noise.shape[:-1], *function_samples.shape[-2:])
        return Independent(Normal(function_samples, noise.sqrt().expand_as(function_samples)), 1)

    def get_fantasy_likelihood(self, **kwargs: Any) -> MultioutputGaussianLikelihood:
        """
        A copy for a model conditioned on more data; a fixed noise is extended by the keyword ``noise``.

        :raises RuntimeError: for a fixed noise without the noise of the new inputs.
        """
        if not self._fixed:
            return deepcopy(self)
        if kwargs.get("noise") is None:
            raise RuntimeError("noise: a fixed-noise likelihood needs the noise of the new observations")
        copy = deepcopy(self)
        copy.noise_covar = FixedGaussianNoise(noise=_extend(self.noise_covar.noise, kwargs["noise"]))
        return copy


def _num_inputs(noise: Tensor) -> int:
    """N of a noise of shape (N,) or (*batch, N, C)."""
    return noise.shape[0] if noise.dim() == 1 else noise.shape[-2]


def _diagonal(noise: Tensor, shape: torch.Size, interleaved: bool) -> DiagLinearOperator:
    """Given noise, (N,) or (*batch, N, C), on the N·C values in the order of their covariance."""
    entries = noise.unsqueeze(-1) if noise.dim() == 1 else noise
    if entries.shape[-1] not in (1, shape[-1]):
        raise ValueError(f"noise: expected {shape[-1]} outputs in the last dimension, got shape {tuple(noise.shape)}")
    entries = entries.expand(*torch.broadcast_shapes(entries.shape[:-2], shape[:-2]), *shape[-2:])
    return DiagLinearOperator((entries if interleaved else entries.mT).flatten(-2))


def _extend(old: Tensor, new: Tensor) -> Tensor:
    """Fixed noise of the old and the new inputs together."""
    if old.dim() == 1 and new.dim() == 1:
        return torch.cat([old, new])
    old, new = (value.unsqueeze(-1) if value.dim() == 1 else value for value in (old, new))
    width = max(old.shape[-1], new.shape[-1])
    if not {old.shape[-1], new.shape[-1]} <= {1, width}:
        raise ValueError(
            f"noise: got {new.shape[-1]} outputs, the noise of the training data has {old.shape[-1]} outputs"
        )
    batch = torch.broadcast_shapes(old.shape[:-2], new.shape[:-2])
    return torch.cat([value.expand(*batch, value.shape[-2], width) for value in (old, new)], -2)


def _require_multitask(function_dist: MultivariateNormal) -> None:
    """Single-output distributions belong to the wrapped likelihood itself."""
    if not isinstance(function_dist, MultitaskMultivariateNormal):
        raise ValueError(
            f"latent distribution: expected a MultitaskMultivariateNormal, got {type(function_dist).__name__}; "
            "use the wrapped likelihood for a single output"
        )
