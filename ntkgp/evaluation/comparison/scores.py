"""What a predictive distribution is worth on test data: every score of the table, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import scipy
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, MultivariateNormal, Normal

from ntkgp.evaluation import metrics
from ntkgp.evaluation.metrics.crps import gaussian_crps

LARGER_IS_BETTER = frozenset({"accuracy", "ood_auc", "ood_aupr", "ood_auc_variance"})
_SMALLEST = 1e-300


@dataclass(frozen=True)
class Scale:
    """Units of the targets: y = standardised·std + mean, per output."""

    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    std: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))

    @classmethod
    def of(cls, given: Any) -> Scale:
        """From None or ``(mean, std)``."""
        if given is None:
            return cls()
        try:
            mean, std = (torch.as_tensor(part, dtype=torch.float64).flatten() for part in given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"target_scale: expected a pair (mean, std), got {given!r}") from error
        if not (bool((std > 0).all()) and bool(torch.isfinite(torch.cat([mean, std])).all())):
            raise ValueError(f"target_scale: expected finite numbers and a positive std, got {given!r}")
        return cls(mean, std)


@dataclass(frozen=True)
class Predicted:
    """What is kept of predictive distributions: enough for the scores and the curves.

    :param mean, variance: of y, (N, C); regression, in original units.
    :param probabilities: (N, C), two columns for a binary network; classification.
    :param latent: of each input, the variance of its outputs summed, (N,), where the method has one; for classification
        of the differences between outputs.
    :param log_density: of y, (N,), jointly over the outputs; regression with test targets.
    """

    mean: Tensor | None = None
    variance: Tensor | None = None
    probabilities: Tensor | None = None
    latent: Tensor | None = None
    log_density: Tensor | None = None

    @property
    def entropy(self) -> Tensor:
        """Of the predicted classes, (N,)."""
        assert self.probabilities is not None
        return metrics.predictive_entropy(self.probabilities)


def collect(found: Distribution, y: Tensor | None = None, scale: Scale | None = None) -> Predicted:
    """
    Moments or probabilities of a predictive distribution, in float64 on the CPU.

    :param found: ``Normal`` (N,) or, for outputs without correlations, (N, C); ``MultivariateNormal`` (N, C),
        ``Categorical`` (N, C) or ``Bernoulli`` (N,).
    :param y: test targets in the units of `found`.
    :param scale: original units.
    :raises TypeError: another distribution.
    :raises ValueError: one distribution of all inputs together, or of other inputs than the targets.
    """
    if isinstance(found, MultivariateNormal) and len(found.batch_shape) != 1:
        raise ValueError(
            f"predict: expected a distribution of the outputs at each input, batch shape (N,), got one of shape "
            f"{tuple(found.batch_shape)} over {tuple(found.event_shape)}"
        )
    latent = _latent_variance(getattr(found, "latent", None))
    if isinstance(found, Bernoulli | Categorical):
        rows = found.batch_shape if isinstance(found, Categorical) else found.probs.flatten().shape
        if len(rows) != 1 or (y is not None and len(y) != rows[0]):
            shape = "labels" if y is None else f"{len(y)} labels"
            raise ValueError(f"predict: expected a distribution of {shape}, got batch shape {tuple(found.batch_shape)}")
    if isinstance(found, Bernoulli):
        p = _numbers(found.probs).flatten()
        return Predicted(probabilities=torch.stack([1 - p, p], -1), latent=latent)
    if isinstance(found, Categorical):
        return Predicted(probabilities=_numbers(found.probs), latent=latent)
    if not isinstance(found, Normal | MultivariateNormal):
        raise TypeError(
            f"predict: expected Normal, MultivariateNormal, Categorical or Bernoulli over y, got {type(found).__name__}"
        )
    scale = scale or Scale()
    mean, deviation = (_numbers(part).reshape(len(found.mean), -1) for part in (found.mean, found.stddev))
    # In float32 the square of a small standard deviation is zero.
    variance = deviation.square().clamp_min(_SMALLEST)
    density = None
    if y is not None and found.mean.numel() != y.numel():
        raise ValueError(f"predict: expected a mean of {y.numel()} numbers, got shape {tuple(found.mean.shape)}")
    if y is not None:
        target = y.to(found.mean.device, found.mean.dtype).reshape(found.mean.shape)
        joint = _numbers(found.log_prob(target)).reshape(len(mean), -1).sum(-1)
        density = joint - scale.std.log().expand(mean.shape[-1]).sum()
    return Predicted(mean * scale.std + scale.mean, variance * scale.std**2, latent=latent, log_density=density)


def score(found: Predicted, y: Tensor, outside: Predicted | None, scale: Scale) -> dict[str, tuple[float, float]]:
    """
    Scores with their standard errors over the test points (nan where a score is no mean over points).

    :param found: predictions of the test inputs.
    :param y: labels (N,), or targets (N, C) as the method saw them.
    :param outside: predictions of inputs from elsewhere.
    :param scale: units of the targets.
    """
    rows = _classification(found, y) if found.probabilities is not None else _regression(found, y, scale)
    scores = dict(rows)
    if outside is not None:
        scores |= dict(_detection(found, outside))
    return scores


def _regression(found: Predicted, y: Tensor, scale: Scale) -> Iterator[tuple[str, tuple[float, float]]]:
    mean, variance, density = found.mean, found.variance, found.log_density
    assert mean is not None
    assert variance is not None
    assert density is not None
    target = _numbers(y).reshape(mean.shape) * scale.std + scale.mean
    # Per target, so that sets with several outputs read like those with one.
    yield "nll", _mean(-density / mean.shape[-1])
    squares, error = _mean((mean - target).square().mean(-1))
    yield "rmse", (math.sqrt(squares), error / max(2 * math.sqrt(squares), _SMALLEST))
    points = torch.stack([gaussian_crps(*row) for row in zip(mean, variance, target, strict=True)])
    yield "crps", _mean(points)
    yield "cqm", (float(metrics.centered_quantile_metric(mean, variance, target)), math.nan)
    inside = (mean - target).abs() <= _two_sided(0.95) * variance.sqrt()
    yield "coverage", _mean(inside.double().mean(-1))
    yield "width", (float(metrics.coverage(mean, variance, target).width), math.nan)


def _classification(found: Predicted, y: Tensor) -> Iterator[tuple[str, tuple[float, float]]]:
    p = found.probabilities
    assert p is not None
    labels = y.flatten().to("cpu", torch.long)
    if int(labels.max()) >= p.shape[-1]:
        raise ValueError(f"predict: expected a probability of label {int(labels.max())}, got {p.shape[-1]} classes")
    picked = p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    yield "nll", _mean(-picked.clamp_min(torch.finfo(p.dtype).tiny).log())
    right = (p.argmax(-1) == labels).double()
    yield "accuracy", _mean(right)
    yield "ece", (float(metrics.expected_calibration_error(p, labels)), math.nan)
    yield "adaptive_ece", (float(metrics.adaptive_calibration_error(p, labels)), math.nan)
    yield "brier", _mean((p - torch.nn.functional.one_hot(labels, p.shape[-1])).square().sum(-1))
    yield "calibrated_nll", _mean(_tempered(p, labels))
    yield "aurc", (float(metrics.aurc(1 - p.amax(-1), 1 - right)), math.nan)


def _detection(found: Predicted, outside: Predicted) -> Iterator[tuple[str, tuple[float, float]]]:
    """Telling test inputs from others: by entropy for classes, by variance for numbers."""
    pairs = []
    if found.probabilities is not None:
        pairs.append(("", found.entropy, outside.entropy))
    elif found.variance is not None and outside.variance is not None:
        pairs.append(("", found.variance.sum(-1), outside.variance.sum(-1)))
    if found.probabilities is not None and found.latent is not None and outside.latent is not None:
        pairs.append(("_variance", found.latent, outside.latent))
    for suffix, inner, outer in pairs:
        result = metrics.ood_detection(inner, outer)
        yield f"ood_auc{suffix}", (float(result.auroc), math.nan)
        if not suffix:
            yield "ood_aupr", (float(result.aupr_out), math.nan)
            yield "ood_fpr95", (float(result.fpr95), math.nan)


def _tempered(p: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihoods after the best temperature of the other half of the points (Ashukha et al. 2020)."""
    logs = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    rows = torch.arange(len(logs))
    losses = torch.empty(len(logs), dtype=p.dtype)
    for half in (0, 1):
        fit, held = rows % 2 != half, rows % 2 == half
        if not bool(fit.any()):
            fit = held
        losses[held] = _cross_entropy(logs[held] / _temperature(logs[fit], labels[fit]), labels[held])
    return losses


def _temperature(logs: Tensor, labels: Tensor) -> float:
    def loss(log_temperature: float) -> float:
        return float(_cross_entropy(logs / math.exp(log_temperature), labels).mean())

    return math.exp(float(scipy.optimize.minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded").x))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _latent_variance(latent: Distribution | None) -> Tensor | None:
    if latent is None:
        return None
    if isinstance(latent, MultivariateNormal):
        covariance = _numbers(latent.covariance_matrix)
        return metrics.total_variance(covariance, contrasts=covariance.shape[-1] > 1)
    return _numbers(latent.variance).reshape(len(latent.variance), -1).sum(-1)


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean over points and its standard error."""
    n = len(values)
    return float(values.mean()), float(values.std() / math.sqrt(n)) if n > 1 else math.nan


def _numbers(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def _two_sided(level: float) -> float:
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
