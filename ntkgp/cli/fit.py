"""``ntkgp fit``: a trained network from a file and data from another become a Gaussian process, written to a folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkgp.baselines.protocol import likelihood_of
from ntkgp.cli.inputs import CommandData, load_data, load_network, load_weights, network_dtype
from ntkgp.evaluation import metrics, plots
from ntkgp.evaluation.comparison.methods import GaussianProcess
from ntkgp.evidence import EvidenceReport, fit_evidence
from ntkgp.linearization import LinearizedNetwork
from ntkgp.models import ExactNTKGP


@dataclass(frozen=True)
class FitOptions:
    """Arguments of ``ntkgp fit``."""

    network: str
    weights: Path
    data: Path
    out: Path
    likelihood: str = "auto"
    groups: str = "normalization"
    mean: str = "network"
    at: str = "theta_star"
    method: str = "mackay"


def run_fit(options: FitOptions) -> EvidenceReport:
    """
    Build the GP, fit its evidence, and write ``report.txt``, ``posterior.pt``, ``predictions.npz`` and ``figure.png``.

    :param options: arguments of the command.
    :return: the evidence report.
    :raises CommandError: a mistake in the arguments or files.
    """
    net = load_network(options.network)
    load_weights(net, options.weights)
    data = load_data(options.data, options.likelihood, network_dtype(net))
    lin = LinearizedNetwork(net, data.x[: min(8, len(data.x))], groups=options.groups)
    likelihood = likelihood_of(data.kind, lin.num_outputs)
    model = ExactNTKGP(lin.pack(data.x), data.y, likelihood, lin, mean=options.mean)
    report = fit_evidence(model, method=options.method, at=options.at, progress=sys.stderr.isatty())
    model.eval()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.detach().cpu() for name, value in model.state_dict().items()}, options.out / "posterior.pt")
    predictions = predict(model, data)
    arrays: dict[str, Any] = {name: value.numpy() for name, value in predictions.items()}
    np.savez(options.out / "predictions.npz", **arrays)
    text = describe(options, lin, data, report, predictions)
    (options.out / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    try:
        draw(data, report, predictions).savefig(options.out / "figure.png")
    except ImportError as error:
        print(f"no figure: {error}")
    print(f"\nwritten to {options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")
    return report


def predict(model: ExactNTKGP, data: CommandData) -> dict[str, Tensor]:
    """
    Predict at ``x_test``, or at ``x`` where there is none.

    :param model: in evaluation mode, hyper-parameters fitted.
    :param data: the data.
    :return: ``mean``, ``latent_variance`` and ``noise_variance`` (regression) or ``latent_mean``, ``latent_variance``
        and ``probabilities`` ``(N, C)`` (classification), float64.
    """
    x = data.x if data.x_test is None else data.x_test
    found = GaussianProcess(model).predict(x)
    latent = found.latent  # type: ignore[attr-defined]
    mean, variance = latent.mean, latent.variance
    if not data.is_classification:
        noise = model.likelihood.noise.detach().double()
        return {"mean": mean, "latent_variance": variance, "noise_variance": noise}
    probabilities = found.probs  # type: ignore[attr-defined]
    if probabilities.dim() == 1:
        probabilities = torch.stack([1 - probabilities, probabilities], dim=-1)
    return {"latent_mean": mean, "latent_variance": variance, "probabilities": probabilities}


def scores(data: CommandData, predictions: dict[str, Tensor]) -> dict[str, float]:
    """Scores on the test data, empty where the file has no ``y_test``."""
    if data.y_test is None:
        return {}
    if data.is_classification:
        p = predictions["probabilities"]
        return {
            "test NLL": float(metrics.categorical_nll(p, data.y_test)),
            "accuracy": float(metrics.accuracy(p, data.y_test)),
            "Brier": float(metrics.brier_score(p, data.y_test)),
            "ECE": float(metrics.expected_calibration_error(p, data.y_test)),
        }
    mean, variance = predictions["mean"], _total_variance(predictions)
    target = data.y_test.reshape(mean.shape)
    inside = metrics.coverage(mean, variance, target)
    return {
        "test NLL": float(metrics.gaussian_nll(mean, variance, target)),
        "RMSE": float(metrics.rmse(mean, target)),
        "CRPS": float(metrics.gaussian_crps(mean, variance, target)),
        "95 % coverage": float(inside.fraction),
        "95 % interval width": float(inside.width),
    }


def describe(
    options: FitOptions,
    lin: LinearizedNetwork,
    data: CommandData,
    report: EvidenceReport,
    predictions: dict[str, Tensor],
) -> str:
    """Text of ``report.txt``."""
    where = "x" if data.x_test is None else "x_test"
    lines = [
        f"network      {options.network}, weights {options.weights}",
        f"data         {options.data}: {len(data.x)} points, {data.kind}",
        f"GP           {lin.num_parameters} parameters, {lin.num_outputs} outputs, {len(lin.groups.names)} groups "
        f"({options.groups}), mean={options.mean}",
        "",
        str(report),
    ]
    found = scores(data, predictions)
    if found:
        lines += ["", *(f"{name:20s} {value:.5g}" for name, value in found.items())]
    lines += [
        "",
        f"predictions.npz   {', '.join(predictions)} at {where}",
        "posterior.pt      state dict of the GP (tensors only); load it into an ExactNTKGP built on the same data",
    ]
    return "\n".join(lines)


def draw(data: CommandData, report: EvidenceReport, predictions: dict[str, Tensor]) -> plots.Figure:
    """Evidence trace beside the picture that fits the data: bands, coverage or reliability."""
    x, y = (data.x, data.y) if data.x_test is None else (data.x_test, data.y_test)
    one_dimensional = not data.is_classification and x[0].numel() == 1 and predictions["mean"][0].numel() == 1
    figure, axes = plots.new_figure(1, 2 if one_dimensional or y is not None else 1)
    plots.evidence_trace({f"{report.at}, {report.method}": report.trace}, ax=axes[0])
    if one_dimensional:
        order = x.flatten().argsort()
        mean, variance = predictions["mean"].flatten()[order], predictions["latent_variance"].flatten()[order]
        noise = float(predictions["noise_variance"].mean())
        plots.predictive_bands(x.flatten()[order], mean, variance, noise, data=(data.x, data.y), ax=axes[1])
    elif y is not None and data.is_classification:
        plots.reliability_diagram({"GP": predictions["probabilities"]}, y, ax=axes[1])
    elif y is not None:
        mean, variance = predictions["mean"], _total_variance(predictions)
        plots.coverage_curve({"GP": (mean, variance)}, y.reshape(mean.shape), ax=axes[1])
    return figure


def _total_variance(predictions: dict[str, Tensor]) -> Tensor:
    """Latent plus noise variance."""
    return predictions["latent_variance"] + predictions["noise_variance"]
