"""The four rows of the demo's table, each from a trained network and its data: plain functions, no printing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import gpytorch
import torch
from torch import Tensor, nn

from ntkgp.evaluation import metrics
from ntkgp.evaluation.datasets import CORRUPTIONS, ClassificationData, RegressionData, corrupt
from ntkgp.evidence import EvidenceReport, fit_evidence
from ntkgp.likelihoods import CategoricalLikelihood
from ntkgp.linearization import LinearizedNetwork
from ntkgp.models import ExactNTKGP

_ROWS_PER_CALL = 128
_FEATURE_NOISE = 2.0
_TOLERANCE = 1e-5  # projected gradient of the evidence per row of data, in nats: beyond what the table shows


@dataclass(frozen=True)
class Method:
    """One row: how the precisions are partitioned and where the evidence is evaluated; neither = the network alone."""

    name: str
    groups: str | None = None
    at: str | None = None


METHODS = (
    Method("network alone"),
    Method("single λ at θ̃", "single", "theta_map"),
    Method("single λ at θ⋆", "single", "theta_star"),
    Method("groups at θ⋆", "normalization", "theta_star"),
)


@dataclass(frozen=True)
class Row:
    """Scores of one method on one data set; ``None`` where a score does not apply."""

    data: str
    method: str
    nll: float
    error: float
    ece: float | None
    coverage: float | None
    ood_auc: float
    seconds: float


@dataclass(frozen=True)
class RegressionResult:
    """A row with what the figure needs: predictive mean and total variance of the test points, original units."""

    row: Row
    mean: Tensor
    variance: Tensor
    report: EvidenceReport | None


@dataclass(frozen=True)
class ClassificationResult:
    """A row with what the figure needs: predictive probabilities of the test points."""

    row: Row
    probabilities: Tensor
    report: EvidenceReport | None


def gaussian_model(net: nn.Module, x: Tensor, y: Tensor, method: Method) -> tuple[ExactNTKGP, EvidenceReport]:
    """Regression GP around the network with precisions and noise from the evidence."""
    return _fitted(net, x, y, gpytorch.likelihoods.GaussianLikelihood(), method)


def categorical_model(net: nn.Module, x: Tensor, labels: Tensor, method: Method) -> tuple[ExactNTKGP, EvidenceReport]:
    """Classification GP around the network with precisions from the evidence."""
    num_classes = net(x[:1]).shape[-1]
    return _fitted(net, x, labels, CategoricalLikelihood(num_classes=num_classes), method)


def latent_moments(model: ExactNTKGP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the latent posterior at each input, in chunks of inputs."""
    parts = [(latent.mean, latent.variance) for latent in _latents(model, x)]
    return torch.cat([mean for mean, _ in parts]).double(), torch.cat([variance for _, variance in parts]).double()


def class_probabilities(model: ExactNTKGP, x: Tensor) -> Tensor:
    """Predictive class probabilities at each input, in chunks of inputs: ``(N, C)``."""
    return torch.cat([model.likelihood(latent).probs for latent in _latents(model, x)]).double()


def regression_row(net: nn.Module, data: RegressionData, method: Method, seed: int = 0) -> RegressionResult:
    """Fit one method to a regression set and score it; corrupted inputs are ranked by predictive variance."""
    start = time.perf_counter()
    noisy = _noisy_features(data.x_test, seed)
    report = None
    if method.groups is None:
        mean, variance, shifted = _constant_variance(net, data, noisy)
    else:
        model, report = gaussian_model(net, data.x_train, data.y_train, method)
        noise = model.likelihood.noise.detach().double()
        mean, latent = latent_moments(model, data.x_test)
        variance, shifted = latent + noise, latent_moments(model, noisy)[1] + noise
    auc = metrics.ood_auc(variance, shifted)
    mean, variance = metrics.original_units(mean, variance, data.target_mean, data.target_std)
    target = data.y_test.double() * data.target_std + data.target_mean
    seconds = time.perf_counter() - start
    row = Row(
        data=data.name,
        method=method.name,
        nll=float(metrics.gaussian_nll(mean, variance, target)),
        error=float(metrics.rmse(mean, target)),
        ece=None,
        coverage=float(metrics.coverage(mean, variance, target).fraction),
        ood_auc=float(auc),
        seconds=seconds,
    )
    return RegressionResult(row, mean, variance, report)


def classification_row(
    net: nn.Module, data: ClassificationData, method: Method, num_corrupted: int, seed: int = 0
) -> ClassificationResult:
    """Fit one method to a classification set and score it; corrupted images are ranked by predictive entropy."""
    start = time.perf_counter()
    corrupted = torch.cat([corrupt(data.x_test[:num_corrupted], kind, seed) for kind in CORRUPTIONS])
    report = None
    if method.groups is None:
        with torch.no_grad():
            inside, outside = (torch.softmax(net(x).double(), -1) for x in (data.x_test, corrupted))
    else:
        model, report = categorical_model(net, data.x_train, data.labels_train, method)
        inside, outside = class_probabilities(model, data.x_test), class_probabilities(model, corrupted)
    auc = metrics.ood_auc(metrics.predictive_entropy(inside), metrics.predictive_entropy(outside))
    seconds = time.perf_counter() - start
    row = Row(
        data=data.name,
        method=method.name,
        nll=float(metrics.categorical_nll(inside, data.labels_test)),
        error=float(metrics.accuracy(inside, data.labels_test)),
        ece=float(metrics.expected_calibration_error(inside, data.labels_test)),
        coverage=None,
        ood_auc=float(auc),
        seconds=seconds,
    )
    return ClassificationResult(row, inside, report)


def format_rows(rows: Iterable[Row]) -> str:
    """Format rows as a table of fixed-width columns for a terminal."""
    header = ("data", "method", "test NLL", "RMSE | acc.", "ECE", "95 % cov.", "OOD-AUC", "seconds")
    cells = [
        (
            row.data,
            row.method,
            f"{row.nll:.3f}",
            f"{row.error:.2f}" if row.ece is None else f"{row.error:.3f}",
            "–" if row.ece is None else f"{row.ece:.3f}",
            "–" if row.coverage is None else f"{row.coverage:.3f}",
            f"{row.ood_auc:.3f}",
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    widths = [max(_width(line[i]) for line in (header, *cells)) for i in range(len(header))]
    lines = [_line(header, widths), "  ".join("-" * width for width in widths)]
    for index, line in enumerate(cells):
        if index and line[0] != cells[index - 1][0]:
            lines.append("")
        lines.append(_line(line, widths))
    return "\n".join(lines)


def _fitted(
    net: nn.Module, x: Tensor, y: Tensor, likelihood: gpytorch.likelihoods.Likelihood, method: Method
) -> tuple[ExactNTKGP, EvidenceReport]:
    """A model with its evidence fitted."""
    if method.groups is None or method.at is None:
        raise ValueError(f"method: {method.name!r} has no GP")
    lin = LinearizedNetwork(net, x[: min(8, len(x))], groups=method.groups)
    model = ExactNTKGP(lin.pack(x), y, likelihood, lin, mean="network")
    report = fit_evidence(model, at=method.at, tolerance=_TOLERANCE)
    model.eval()
    return model, report


def _latents(model: ExactNTKGP, x: Tensor) -> Iterator[gpytorch.distributions.MultivariateNormal]:
    """Latent posteriors of consecutive chunks of the inputs."""
    model.eval()
    packed = model.kernel.lin.pack(x)
    with torch.no_grad():
        for start in range(0, len(packed), _ROWS_PER_CALL):
            yield model(packed[start : start + _ROWS_PER_CALL])


def _constant_variance(net: nn.Module, data: RegressionData, noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Network output with the mean squared training residual as variance everywhere."""
    with torch.no_grad():
        residual = data.y_train.double() - net(data.x_train).double().reshape(data.y_train.shape)
        mean = net(data.x_test).double().reshape(data.y_test.shape)
    variance = residual.square().mean()
    return mean, variance.expand(mean.shape), variance.expand(len(noisy))


def _noisy_features(x: Tensor, seed: int) -> Tensor:
    """Inputs with noise of two standard deviations on every (standardised) feature."""
    generator = torch.Generator().manual_seed(seed)
    return x + _FEATURE_NOISE * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def _width(text: str) -> int:
    """Columns that a text takes in a terminal: combining marks take none."""
    return sum(not "\u0300" <= letter <= "\u036f" for letter in text)


def _line(cells: Iterable[str], widths: list[int]) -> str:
    """One line of the table: names to the left, numbers to the right."""
    padded = []
    for index, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        space = " " * (width - _width(cell))
        padded.append(cell + space if index < 2 else space + cell)
    return "  ".join(padded).rstrip()
