"""What networks without a posterior of their own have in common: outputs of several networks, calibrated and mixed."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import scipy
import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.distributions import MultivariateNormal as JointNormal
from linear_operator.operators import BlockDiagLinearOperator, DiagLinearOperator
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ntkgp.baselines.protocol import Baseline, labelled, normal
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from ntkgp.linearization.frozen import pass_environment
from ntkgp.models.batches import Batches

_SMALLEST = 1e-30  # of a noise variance: exact fits keep a distribution


class OutputSamples(Baseline):
    r"""A comparator that is S networks: their outputs :math:`f_s(x)` are mixed with equal weights.

    Regression predicts the Gaussian with the mixture's mean and covariance, :math:`\bar f`,
    :math:`\frac1S\sum_s (f_s - \bar f)(f_s - \bar f)^\top + \mathrm{diag}(\sigma^2)`, with the noise variances that
    make this most likely on ``validation``, or on the training data where there is none. Classification predicts
    :math:`\frac1S\sum_s \mathrm{softmax}(f_s/T)` with the temperature T that does so on ``validation``, or T = 1.

    :param validation: held-out data in the forms that ``fit`` takes.
    """

    _state: tuple[str, ...] = ("noise", "temperature")
    noise: Tensor  # (C,)
    temperature: Tensor  # scalar

    def __init__(
        self, net: nn.Module, likelihood: str = "regression", *, validation: Any = None, **common: Any
    ) -> None:
        super().__init__(net, likelihood, **common)
        self.validation = validation

    def _outputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """f(x) of a module of the network's kind in the mode it is in, float64 (N, C)."""
        frozen, device = self.lin.frozen, self.lin.frozen.device
        rows = max(1, self.max_memory // self.lin.activation_bytes)
        with torch.no_grad():
            parts = [frozen.run(module, self.lin.packing.leaves(part.to(device))) for part in x.split(rows)]
        return torch.cat([part.reshape(len(part), -1) for part in parts]).to(x.device, torch.float64)

    def _environment(self) -> Any:
        """Where passes run: the global random state is put back afterwards."""
        return pass_environment(self.lin.frozen.device)

    @abstractmethod
    def _prepare(self, batches: Batches) -> None:
        """Make the networks."""

    @abstractmethod
    def _samples(self, x: Tensor) -> Tensor:
        """Outputs of the S networks at packed inputs, float64 (S, N, C)."""

    def _fit(self, batches: Batches) -> None:
        self._prepare(batches)
        held_out = batches
        if self.validation is not None:
            held_out = Batches.of(self.validation, self.lin, self._shape_of_targets(), name="validation")
        self.noise = torch.ones(self.lin.num_outputs, dtype=torch.float64)
        self.temperature = torch.ones((), dtype=torch.float64)
        if not self.is_classification:
            moments = [(y.reshape(len(y), -1), *_moments(self._samples(x))) for x, y in held_out]
            y, mean, variance = (torch.cat(parts) for parts in zip(*moments, strict=True))
            self.noise = likely_noise(y - mean, variance)
        elif self.validation is not None:
            pairs = [(self._samples(x), y) for x, y in held_out]
            self.temperature = likely_temperature(torch.cat([f for f, _ in pairs], 1), torch.cat([y for _, y in pairs]))

    def _predict(self, x: Tensor) -> Distribution:
        samples = self._samples(x)
        mean, centred = samples.mean(0), samples - samples.mean(0)
        covariance = torch.einsum("snc,snd->ncd", centred, centred) / len(samples)
        latent = None
        if len(samples) > 1:
            # S networks span S − 1 directions: the rest gets what keeps a Cholesky factor.
            floor = 1e-10 * covariance.diagonal(dim1=-2, dim2=-1).mean(-1) + _SMALLEST
            latent = normal(mean, covariance + torch.diag_embed(floor.unsqueeze(-1).expand_as(mean)))
        if self.is_classification:
            return labelled(mixed(samples, self.temperature.to(x.device)), latent)
        found = normal(mean, covariance + torch.diag_embed(self.noise.to(x.device).expand_as(mean)))
        if latent is not None:
            found.latent = latent  # type: ignore[attr-defined]
        return found


def _moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the first dimension."""
    return samples.mean(0), samples.var(0, correction=0)


def mixed(samples: Tensor, temperature: Tensor) -> Tensor:
    """Mean over S of the probabilities of logits (S, N, C) at a temperature: (N, C), or (N,) for one output."""
    logits = samples / temperature
    return logits.sigmoid().mean(0).squeeze(-1) if logits.shape[-1] == 1 else logits.softmax(-1).mean(0)


def minimum(value: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one number is smallest: the best of 60 points, refined between its neighbours."""
    grid = torch.linspace(low, high, 60, dtype=torch.float64).tolist()
    values = [value(point) for point in grid]
    best = min(range(len(grid)), key=values.__getitem__)
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = scipy.optimize.minimize_scalar(value, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return float(found.x) if found.fun <= values[best] else grid[best]


def likely_noise(residual: Tensor, variance: Tensor) -> Tensor:
    r"""The :math:`\sigma_c^2` that maximise :math:`\sum_n \log N(r_{nc}; 0, v_{nc} + \sigma_c^2)`, of (N, C) each."""
    return torch.tensor(
        [_likely_noise(r2, v) for r2, v in zip(residual.square().T, variance.T, strict=True)], dtype=torch.float64
    )


def _likely_noise(squares: Tensor, variance: Tensor) -> float:
    """The same for one output, of (N,) each."""
    mean, largest = float(squares.mean()), float(squares.max())
    if largest <= _SMALLEST or not bool(variance.any()):
        return max(mean, _SMALLEST)

    def loss(log_ratio: float) -> float:
        total = variance + mean * math.exp(log_ratio)
        return float((total.log() + squares / total).mean())

    # Above the largest square every variance is too large, so the likelihood only falls.
    return mean * math.exp(minimum(loss, -25.0, math.log(largest / mean) + 1e-3))


def likely_temperature(samples: Tensor, labels: Tensor) -> Tensor:
    """The temperature at which labels (N,) are most likely under mixed logits (S, N, C), between e⁻⁵ and e⁵."""

    def loss(log_temperature: float) -> float:
        log_p = label_log_probabilities(samples / torch.tensor(log_temperature, dtype=torch.float64).exp(), labels)
        return -float(log_p.logsumexp(0).mean())

    return torch.tensor(minimum(loss, -5.0, 5.0), dtype=torch.float64).exp()


def label_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of labels (N,), shape (..., N), from logits (..., N, C); logistic for one output."""
    if logits.shape[-1] == 1:
        sign = 2 * labels.to(logits.dtype) - 1
        return nn.functional.logsigmoid(sign * logits.squeeze(-1))
    index = labels.long().unsqueeze(-1).expand(*logits.shape[:-1], 1)
    return logits.log_softmax(-1).gather(-1, index).squeeze(-1)


def check_link(link: str, num_outputs: int = 2) -> None:
    """Refuse what is no link.

    :raises ValueError: an unknown one, or the Laplace bridge with a single output.
    """
    links = ("probit", "mc", "bridge") if num_outputs > 1 else ("probit", "mc")
    if link not in links:
        raise ValueError(f"link: expected one of {links} for C = {num_outputs} outputs, got {link!r}")


def probabilities_through(link: str, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Probabilities (N, C), or (N,) for one output, of Gaussian logits with mean (N, C) and covariance (N, C, C)."""
    parts = []
    for m, v in zip(mean.split(256), covariance.split(256), strict=True):
        if mean.shape[-1] == 1:
            joint = JointNormal(m[:, 0], DiagLinearOperator(v[:, 0, 0]))
            parts.append(BernoulliLikelihood(link=link, seed=seed)(joint).probs)
        else:
            latent = MultitaskMultivariateNormal(m, BlockDiagLinearOperator(v))
            parts.append(CategoricalLikelihood(mean.shape[-1], link=link, seed=seed)(latent).probs)
    return torch.cat(parts)


def gaussian_logits(mean: Tensor, covariance: Tensor) -> Distribution:
    """Logits as a distribution; of covariances that have no Cholesky factor their diagonal."""
    _, info = torch.linalg.cholesky_ex(covariance)
    if mean.shape[-1] > 1 and bool(info.any()):
        return Independent(Normal(mean, covariance.diagonal(dim1=-2, dim2=-1).clamp_min(_SMALLEST).sqrt()), 1)
    return normal(mean, covariance)


def minibatches(batches: Batches, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass in random order; a DataLoader has its own batches and order.

    Rows beyond the last whole batch are left out, other ones in each pass.
    """
    if not batches.in_memory:
        yield from batches
        return
    x, y = batches.collect()
    size = min(size, len(x))
    order = torch.randperm(len(x), generator=generator).to(x.device)
    for start in range(0, len(x) - size + 1, size):
        rows = order[start : start + size]
        yield x[rows], y[rows]


def training_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error or cross-entropy of (N, C) outputs."""
    if y.is_floating_point():
        return (outputs - y.reshape(outputs.shape).to(outputs)).square().mean()
    return -label_log_probabilities(outputs, y.to(outputs.device)).mean()


def positive(name: str, value: Any, kind: type = int) -> Any:
    """The value if it is a positive number.

    :raises ValueError: otherwise.
    """
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive {'integer' if kind is int else 'number'}, got {value!r}")
    return value
