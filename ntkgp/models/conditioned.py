"""A posterior conditioned on further observations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood
from gpytorch.models import GP
from linear_operator import to_linear_operator
from torch import Tensor

from ntkgp.evidence.system import cholesky_with_jitter
from ntkgp.models.noise import has_fixed_noise, learned_on_fixed
from ntkgp.models.posterior import LatentMultitaskNormal, LatentNormal

if TYPE_CHECKING:
    from ntkgp.models.exact import ExactNTKGP


class Conditionable:
    """What a model offers once new observations come in, by GPyTorch's and by BoTorch's names."""

    @property
    def num_outputs(self) -> int:
        """C."""
        return self.lin.num_outputs  # type: ignore[attr-defined]

    def get_fantasy_model(self, inputs: Any, targets: Tensor, noise: Tensor | None = None) -> ConditionedNTKGP:
        """The posterior given new observations; see :class:`ConditionedNTKGP`."""
        return ConditionedNTKGP(self, self._inputs(inputs), targets, noise)  # type: ignore[arg-type, attr-defined]

    def condition_on_observations(self, X: Any, Y: Tensor, noise: Tensor | None = None) -> ConditionedNTKGP:
        """BoTorch's name and shape (*batch, q, C) of targets and noise for :meth:`get_fantasy_model`."""
        return self.get_fantasy_model(X, *event_shaped(self.num_outputs, Y, noise))

    def transform_inputs(self, X: Tensor, input_transform: Any = None) -> Tensor:
        """BoTorch's hook: the identity, the network holds its own preprocessing."""
        return X

    def posterior(self, X: Any, output_indices: Any = None, observation_noise: Any = False, **kwargs: Any) -> Any:
        """BoTorch posterior at X; see :func:`ntkgp.botorch.posterior`. Needs botorch."""
        from ntkgp.botorch import posterior

        return posterior(self, X, output_indices, observation_noise, **kwargs)  # type: ignore[arg-type]

    def fantasize(
        self, X: Any, sampler: Any, observation_noise: Tensor | None = None, **kwargs: Any
    ) -> ConditionedNTKGP:
        """Condition on draws from the posterior at X; see :func:`ntkgp.botorch.fantasize`. Needs botorch."""
        from ntkgp.botorch import fantasize

        return fantasize(self, X, sampler, observation_noise, **kwargs)  # type: ignore[arg-type]


class ConditionedNTKGP(Conditionable, GP):
    r"""The posterior of a model, conditioned on q new observations that the network was not trained on.

    With the base posterior :math:`N(\mu, V)` at the new inputs and the test inputs together,

    .. math:: \mu_\star + V_{\star q}(V_{qq}+\sigma^2 I)^{-1}(y_q - \mu_q), \qquad
        V_{\star\star} - V_{\star q}(V_{qq}+\sigma^2 I)^{-1}V_{q\star},

    which is the same as conditioning on all data at once (law B10) and, with ``mean="network"``, moves the network's
    prediction by what the new data say.

    :param base: an :class:`~ntkgp.ExactNTKGP` with a Gaussian likelihood, or another conditioned model.
    :param inputs: packed, shape (*batch, q, D).
    :param targets: shape (*batch, q) for one output, else (*batch, q, C); its batch shape may extend the inputs'.
    :param noise: variances of the new observations, shape of `targets`; needed when the likelihood has fixed noise.
    :raises ValueError: a classification model, other shapes, NaN targets.

    Cost of a prediction at T inputs: that of the base at q + T inputs, and O((qC)²(q+T)C) per batch element.
    """

    def __init__(
        self, base: ExactNTKGP | ConditionedNTKGP, inputs: Tensor, targets: Tensor, noise: Tensor | None = None
    ) -> None:
        super().__init__()
        if base.is_classification:
            raise ValueError("conditioning on new observations needs a Gaussian likelihood; this model classifies")
        c = base.num_outputs
        event = inputs.shape[-2:-1] if c == 1 else torch.Size((inputs.shape[-2], c))
        for name, value in (("targets", targets), ("noise", noise)):
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
            if value.shape[-len(event) :] != event:
                expected = f"(*batch, {', '.join(map(str, event))})"
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
            if not torch.isfinite(value).all():
                raise ValueError(f"{name}: NaN or infinite values; expected finite numbers")
        if noise is not None and bool((noise < 0).any()):
            raise ValueError("noise: expected variances, got a negative number")
        batch = torch.broadcast_shapes(base.batch_shape, inputs.shape[:-2], targets.shape[: -len(event)])
        self.base = base
        self.likelihood: Likelihood = base.likelihood
        self.inputs = inputs
        self.targets = targets.to(torch.float64).expand(*batch, *event)
        self._noise = None if noise is None else noise.to(torch.float64).expand(*batch, *event)
        if has_fixed_noise(self.likelihood) and noise is None:
            raise ValueError("noise: the likelihood has fixed noise; pass the variances of the new observations")
        self.eval()

    @property
    def lin(self) -> Any:
        """The linearised network of the base model."""
        return self.base.lin

    @property
    def is_classification(self) -> bool:
        """Always False."""
        return False

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape of the new observations and of those before."""
        return self.targets.shape[:-1] if self.num_outputs == 1 else self.targets.shape[:-2]

    def _inputs(self, x: Any) -> Tensor:
        return self.base._inputs(x)

    def _noise_covariance(self) -> Tensor:
        """Covariance of the noise of the new observations, (*batch, qC, qC)."""
        if self._noise is not None:
            learned = learned_on_fixed(self.likelihood)
            total = self._noise if learned is None else self._noise + learned
            return torch.diag_embed(total.reshape(*self.batch_shape, -1))
        event = self.targets.shape[len(self.batch_shape) :]
        return self.likelihood._shaped_noise_covar(event).to_dense().detach().to(self.targets)

    def __call__(self, x: Any) -> MultivariateNormal:
        """Latent posterior at inputs (*batch, T, D)."""
        x = self._inputs(x)
        batch = torch.broadcast_shapes(x.shape[:-2], self.inputs.shape[:-2])
        new = self.inputs.expand(*batch, *self.inputs.shape[-2:])
        joint = self.base(torch.cat([new, x.expand(*batch, *x.shape[-2:])], dim=-2))
        c, q = self.num_outputs, self.inputs.shape[-2] * self.num_outputs
        mean = joint.mean.reshape(*joint.mean.shape[: -1 if c == 1 else -2], -1)
        covariance = joint.covariance_matrix
        observed = (covariance[..., :q, :q] + self._noise_covariance()).expand(*self._common(batch), q, q)
        gain = _solve(observed, covariance[..., :q, q:].expand(*self._common(batch), q, -1))
        shift = (self.targets.reshape(*self.batch_shape, q) - mean[..., :q]).unsqueeze(-1)
        posterior_mean = mean[..., q:] + (gain.mT @ shift).squeeze(-1)
        posterior_covariance = covariance[..., q:, q:] - covariance[..., q:, :q] @ gain
        # As an operator it may be singular: repeated inputs, fewer parameters than inputs.
        posterior_covariance = to_linear_operator(0.5 * (posterior_covariance + posterior_covariance.mT))
        if c == 1:
            return LatentNormal(posterior_mean, posterior_covariance)
        return LatentMultitaskNormal(posterior_mean.unflatten(-1, (-1, c)), posterior_covariance)

    def _common(self, batch: torch.Size) -> torch.Size:
        return torch.broadcast_shapes(batch, self.batch_shape)


def event_shaped(num_outputs: int, targets: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """BoTorch's (*batch, q, C) in GPyTorch's shape: (*batch, q) for one output."""
    for name, value in (("Y", targets), ("noise", noise)):
        if value is not None and (not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1] != num_outputs):
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected shape (*batch, q, {num_outputs}), got {came}")
    if num_outputs > 1:
        return targets, noise
    return targets.squeeze(-1), None if noise is None else noise.squeeze(-1)


def _solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Cholesky solve of a batch of symmetric positive definite matrices."""
    if matrix.ndim == 2 and not matrix.requires_grad:
        return torch.cholesky_solve(rhs, cholesky_with_jitter(matrix.clone())[0])
    return torch.cholesky_solve(rhs, torch.linalg.cholesky(matrix))
