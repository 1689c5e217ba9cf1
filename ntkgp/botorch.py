"""The models as BoTorch models: importing this module makes ``isinstance(model, botorch.models.model.Model)`` true."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from botorch.models.model import Model
    from botorch.posteriors.gpytorch import GPyTorchPosterior
except ImportError as error:  # pragma: no cover - exercised in an environment without botorch
    raise ImportError("this needs botorch: pip install 'ntkgp[bo]'") from error

from ntkgp.models.conditioned import ConditionedNTKGP
from ntkgp.models.exact import ExactNTKGP

Model.register(ExactNTKGP)
Model.register(ConditionedNTKGP)


def posterior(
    model: ExactNTKGP | ConditionedNTKGP,
    X: Tensor,  # noqa: N803 - BoTorch's name
    output_indices: list[int] | None = None,
    observation_noise: bool | Tensor = False,
    posterior_transform: Any = None,
) -> Any:
    """BoTorch posterior of the latent function, or of observations.

    :param X: packed inputs (*batch, q, D), or raw inputs.
    :param output_indices: not supported: outputs are correlated; use a posterior transform.
    :param observation_noise: False for the latent function, True for noisy observations, or the variances themselves,
        (*batch, q, C).
    :param posterior_transform: applied last.
    :return: ``GPyTorchPosterior`` of event shape (q, C).
    :raises ValueError: observation noise of a classification model, or `output_indices`.

    >>> x = torch.randn(10, 2)
    >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(2, 1), x)
    >>> model = ntkgp.ExactNTKGP(x, x[:, 0], gpytorch.likelihoods.GaussianLikelihood(), lin)
    >>> model.posterior(torch.randn(3, 4, 2)).mean.shape
    torch.Size([3, 4, 1])
    """
    if output_indices is not None:
        raise ValueError("output_indices: the outputs are correlated; use a posterior_transform to select some")
    was_training = model.training
    model.eval()
    try:
        latent = model(X)
    finally:
        model.train(was_training)
    if observation_noise is not False:
        if model.is_classification:
            raise ValueError("observation_noise: a classification model has none; use model.likelihood(model(X))")
        if isinstance(observation_noise, Tensor):
            latent = _with_variances(latent, observation_noise)
        else:
            latent = model.likelihood(latent)
    found = GPyTorchPosterior(latent)
    return found if posterior_transform is None else posterior_transform(found)


def _with_variances(latent: Any, variances: Tensor) -> Any:
    """Add given variances (*batch, q, C) to the latent distribution."""
    covariance = latent.covariance_matrix
    flat = variances.to(covariance).flatten(-2)
    if flat.shape[-1] != covariance.shape[-1]:
        raise ValueError(f"observation_noise: expected (*batch, q, C) variances, got {tuple(variances.shape)}")
    return type(latent)(latent.mean, covariance + torch.diag_embed(flat))


__all__ = ["posterior"]
