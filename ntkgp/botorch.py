"""The models as BoTorch models: importing this module makes ``isinstance(model, botorch.models.model.Model)`` true."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator import to_linear_operator
from torch import Tensor

try:
    from botorch.models.model import FantasizeMixin, Model
    from botorch.posteriors.gpytorch import GPyTorchPosterior
except ImportError as error:  # pragma: no cover - exercised in an environment without botorch
    raise ImportError("this needs botorch: pip install 'ntkgp[bo]'") from error

from ntkgp.models.conditioned import ConditionedNTKGP
from ntkgp.models.exact import ExactNTKGP
from ntkgp.models.noise import has_fixed_noise, learned_on_fixed
from ntkgp.models.nystrom import NystromNTKGP
from ntkgp.models.variational import VariationalNTKGP

Model.register(ExactNTKGP)
Model.register(ConditionedNTKGP)
Model.register(NystromNTKGP)
Model.register(VariationalNTKGP)


def posterior(
    model: ExactNTKGP | ConditionedNTKGP,
    X: Tensor,
    output_indices: list[int] | None = None,
    observation_noise: bool | Tensor = False,
    posterior_transform: Any = None,
) -> Any:
    """BoTorch posterior of the latent function, or of observations.

    :param X: packed inputs (*batch, q, D), or raw inputs; packed where it could be either.
    :param output_indices: not supported: outputs are correlated; use a posterior transform.
    :param observation_noise: False for the latent function, True for noisy observations (a fixed noise by its mean over
        the training data), or the variances themselves, (*batch, q or 1, C or 1).
    :param posterior_transform: applied last.
    :return: ``GPyTorchPosterior`` of event shape (q, C).
    :raises ValueError: observation noise of a classification model, or `output_indices`.

    >>> import gpytorch, ntkgp
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
        # BoTorch means (*batch, 1, D), also where the network takes rows of shape (1, D).
        packing = model.lin.packing
        ambiguous = isinstance(X, Tensor) and X.ndim > 2 and packing.is_packed(X) and packing.is_raw(X)
        latent = model(X.unsqueeze(0))[0] if ambiguous else model(X)
    finally:
        model.train(was_training)
    if observation_noise is not False:
        if model.is_classification:
            raise ValueError("observation_noise: a classification model has none; use model.likelihood(model(X))")
        known = observation_noise if isinstance(observation_noise, Tensor) else _mean_of_fixed_noise(model)
        if known is not None:
            learned = learned_on_fixed(model.likelihood)
            latent = _with_variances(latent, known if learned is None else known + learned, model.num_outputs)
        else:
            latent = model.likelihood(latent)
    found = GPyTorchPosterior(latent)
    return found if posterior_transform is None else posterior_transform(found)


def fantasize(
    model: ExactNTKGP | ConditionedNTKGP,
    X: Tensor,
    sampler: Any,
    observation_noise: Tensor | None = None,
    **kwargs: Any,
) -> ConditionedNTKGP:
    """Condition on noisy draws from the posterior, as :meth:`botorch.models.model.Model.fantasize` does.

    :param X: packed inputs (*batch, q, D).
    :param sampler: a BoTorch sampler, of S draws.
    :param observation_noise: variances, (*batch, q or 1, C); by default the likelihood's, a fixed noise by its mean.
    :return: a model of batch shape (S, *batch).

    >>> import gpytorch, ntkgp
    >>> from botorch.sampling import SobolQMCNormalSampler
    >>> x = torch.randn(10, 2)
    >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(2, 1), x)
    >>> model = ntkgp.ExactNTKGP(x, x[:, 0], gpytorch.likelihoods.GaussianLikelihood(), lin).eval()
    >>> sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    >>> model.fantasize(torch.randn(3, 1, 2), sampler).posterior(torch.randn(3, 5, 2)).mean.shape
    torch.Size([4, 3, 5, 1])
    """
    noise = _mean_of_fixed_noise(model) if observation_noise is None else observation_noise
    return FantasizeMixin.fantasize(model, X, sampler, observation_noise=noise, **kwargs)


def _mean_of_fixed_noise(model: ExactNTKGP | ConditionedNTKGP) -> Tensor | None:
    """Mean variance over the training data, shape (1, C or 1), where the likelihood's noise is given per input."""
    likelihood = model.likelihood
    if not has_fixed_noise(likelihood):
        return None
    noise = likelihood.noise_covar.noise.detach()
    return (noise if noise.ndim > 1 else noise.unsqueeze(-1)).mean(-2, keepdim=True)


def _with_variances(latent: Any, variances: Tensor, num_outputs: int) -> Any:
    """Add given variances (*batch, q, C) to the latent distribution."""
    event = latent.mean.shape if num_outputs > 1 else (*latent.mean.shape, 1)
    covariance = latent.covariance_matrix
    try:
        values = variances.to(covariance).expand(torch.broadcast_shapes(event, variances.shape))
    except RuntimeError:
        values = None
    if values is None or values.shape[-2:] != event[-2:]:
        raise ValueError(
            f"observation_noise: expected variances that expand to {tuple(event)}, got {tuple(variances.shape)}"
        )
    return type(latent)(latent.mean, to_linear_operator(covariance + torch.diag_embed(values.flatten(-2))))


__all__ = ["fantasize", "posterior"]
