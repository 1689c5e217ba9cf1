"""``ntkgp fit``: a trained network from a file and data from another become a Gaussian process, written to a folder."""

from __future__ import annotations

import importlib
import pickle
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import torch
from torch import Tensor, nn

from ntkgp.cli.comparison import class_probabilities, latent_moments
from ntkgp.evaluation import metrics, plots
from ntkgp.evaluation.training import seeded
from ntkgp.evidence import EvidenceReport, fit_evidence
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from ntkgp.linearization import LinearizedNetwork
from ntkgp.models import ExactNTKGP


class CommandError(Exception):
    """A mistake in what the user gave, said in one line."""


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


@dataclass(frozen=True)
class FitData:
    """Arrays of the data file as tensors: inputs in the network's dtype, labels as integers."""

    x: Tensor
    y: Tensor
    x_test: Tensor | None
    y_test: Tensor | None
    is_classification: bool


def load_network(target: str) -> nn.Module:
    """
    Call a factory named ``package.module:factory``; the current folder is searched first.

    :param target: module and function without arguments that returns the network.
    :return: the network.
    :raises CommandError: no such module or function, or something else than a network returned.
    """
    module_name, _, function_name = target.partition(":")
    if not module_name or not function_name:
        raise CommandError(f"--network: expected package.module:factory, got {target!r}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise CommandError(
            f"--network: cannot import {module_name!r} from {here} or the environment: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise CommandError(f"--network: {module_name!r} has no function {function_name!r}")
    with seeded(0):
        net = factory()
    if not isinstance(net, nn.Module):
        raise CommandError(f"--network: {target} returned {type(net).__name__}, expected a torch.nn.Module")
    return net


def load_weights(net: nn.Module, path: Path) -> None:
    """
    Load a state dict, tensors only, into a network.

    :param net: changed in place.
    :param path: file written by ``torch.save(net.state_dict(), path)``.
    :raises CommandError: no such file, a file that holds more than tensors, names or shapes that do not fit.
    """
    if not path.is_file():
        raise CommandError(f"--weights: no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CommandError(
            f"--weights: {path} is not a file of tensors only; write it with torch.save(net.state_dict(), path)"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CommandError(f"--weights: {path} holds {type(state).__name__}, expected a state dict of tensors")
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise CommandError(f"--weights: {path} does not fit the network: {error}") from error


def load_data(path: Path, likelihood: str, dtype: torch.dtype) -> FitData:
    """
    Read ``x``, ``y`` and optionally ``x_test``, ``y_test`` from an ``.npz`` file without pickled objects.

    :param path: the file.
    :param likelihood: ``"regression"``, ``"classification"`` or ``"auto"`` (integer targets are labels).
    :param dtype: of the network; floating-point inputs are converted to it, integer inputs stay integers.
    :return: :class:`FitData`.
    :raises CommandError: no such file, missing arrays, lengths that differ, labels that are not integers.
    """
    if not path.is_file():
        raise CommandError(f"--data: no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, AttributeError, zipfile.BadZipFile) as error:
        raise CommandError(f"--data: {path} is not an .npz file of plain arrays: {error}") from error
    if not {"x", "y"} <= arrays.keys():
        raise CommandError(f"--data: {path} needs arrays x and y (and may have x_test, y_test), got {sorted(arrays)}")
    if "y_test" in arrays and "x_test" not in arrays:
        raise CommandError(f"--data: {path} has y_test but no x_test")
    for inputs, targets in (("x", "y"), ("x_test", "y_test")):
        if targets in arrays and len(arrays[inputs]) != len(arrays[targets]):
            raise CommandError(f"--data: {len(arrays[inputs])} rows in {inputs}, {len(arrays[targets])} in {targets}")
    integer = np.issubdtype(arrays["y"].dtype, np.integer)
    classification = integer if likelihood == "auto" else likelihood == "classification"
    if classification and not integer:
        raise CommandError(f"--data: classification needs integer labels in y, got {arrays['y'].dtype}")
    tensors = {}
    for name in ("x", "y", "x_test", "y_test"):
        if name in arrays:
            target = torch.long if name.startswith("y") and classification else dtype
            tensors[name] = _tensor(name, arrays[name], target)
    return FitData(tensors["x"], tensors["y"], tensors.get("x_test"), tensors.get("y_test"), bool(classification))


def run_fit(options: FitOptions) -> EvidenceReport:
    """
    Build the GP, fit its evidence, and write ``report.txt``, ``posterior.pt``, ``predictions.npz`` and ``figure.png``.

    :param options: arguments of the command.
    :return: the evidence report.
    :raises CommandError: a mistake in the arguments or files.
    """
    net = load_network(options.network)
    load_weights(net, options.weights)
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    data = load_data(options.data, options.likelihood, dtype)
    lin = LinearizedNetwork(net, data.x[: min(8, len(data.x))], groups=options.groups)
    likelihood = _likelihood(data, lin.num_outputs)
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


def predict(model: ExactNTKGP, data: FitData) -> dict[str, Tensor]:
    """
    Predict at ``x_test``, or at ``x`` where there is none.

    :param model: in evaluation mode, hyper-parameters fitted.
    :param data: the data.
    :return: ``mean``, ``latent_variance`` and ``noise_variance`` (regression) or ``latent_mean``, ``latent_variance``
        and ``probabilities`` ``(N, C)`` (classification), float64.
    """
    x = data.x if data.x_test is None else data.x_test
    mean, variance = latent_moments(model, x)
    if not data.is_classification:
        noise = model.likelihood.noise.detach().double()
        return {"mean": mean, "latent_variance": variance, "noise_variance": noise}
    probabilities = class_probabilities(model, x)
    if probabilities.dim() == 1:
        probabilities = torch.stack([1 - probabilities, probabilities], dim=-1)
    return {"latent_mean": mean, "latent_variance": variance, "probabilities": probabilities}


def scores(data: FitData, predictions: dict[str, Tensor]) -> dict[str, float]:
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
    data: FitData,
    report: EvidenceReport,
    predictions: dict[str, Tensor],
) -> str:
    """Text of ``report.txt``."""
    where = "x" if data.x_test is None else "x_test"
    kind = "classification" if data.is_classification else "regression"
    lines = [
        f"network      {options.network}, weights {options.weights}",
        f"data         {options.data}: {len(data.x)} points, {kind}",
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


def draw(data: FitData, report: EvidenceReport, predictions: dict[str, Tensor]) -> plots.Figure:
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


def _likelihood(data: FitData, num_outputs: int) -> gpytorch.likelihoods.Likelihood:
    """Gaussian noise, logistic for one output, softmax for several."""
    if not data.is_classification:
        return gpytorch.likelihoods.GaussianLikelihood()
    if num_outputs == 1:
        return BernoulliLikelihood()
    return CategoricalLikelihood(num_classes=num_outputs)


def _tensor(name: str, array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Array as a tensor: floats in the given dtype; integer inputs stay integers (tokens)."""
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise CommandError(f"--data: {name} holds {array.dtype}, expected numbers")
    if array.ndim == 0 or len(array) == 0:
        raise CommandError(f"--data: {name} has shape {array.shape}, expected at least one row")
    if name.startswith("x") and np.issubdtype(array.dtype, np.integer):
        dtype = torch.long
    return torch.as_tensor(np.ascontiguousarray(array)).to(dtype)
