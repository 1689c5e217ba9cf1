"""From a trained network and its data to a fitted Gaussian process, in one call."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

from gpytorch.constraints import GreaterThan
from gpytorch.likelihoods import GaussianLikelihood, Likelihood, MultitaskGaussianLikelihood
from torch import Tensor, nn

from ntkgp.evidence import fit_evidence
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from ntkgp.linearization import LinearizedNetwork, ParameterGroups
from ntkgp.linearization.memory import format_memory, parse_memory
from ntkgp.models.batches import collect_raw
from ntkgp.models.exact import ExactNTKGP, matrices_of_fit
from ntkgp.models.noise import noise_floor

logger = logging.getLogger("ntkgp")


def from_network(
    net: nn.Module,
    train_data: Any,
    likelihood: str | Likelihood = "regression",
    inference: str = "auto",
    *,
    groups: str | ParameterGroups = "normalization",
    mean: str = "network",
    fit: bool = True,
    output: Callable[[Any], Tensor] | None = None,
    max_memory: str | int | float | None = None,
    **fit_options: Any,
) -> ExactNTKGP:
    """Linearise a trained network, build its Gaussian process and fit the evidence.

    :param net: the trained network.
    :param train_data: ``(x, y)`` with x as the network takes it, or a ``Dataset`` or ``DataLoader`` of ``(x, y)`` pairs
        or of dicts with ``"labels"``. Targets are (N, C), (N, *output shape) or class labels (N,).
    :param likelihood: ``"regression"`` (Gaussian noise, one per output of a vector, not below the rounding noise of the
        targets: see :func:`~ntkgp.models.noise.noise_floor`), ``"classification"`` (softmax, or logistic for one
        output), or a likelihood.
    :param inference: ``"auto"`` or ``"exact"``.
    :param groups: parameter groups, see :class:`~ntkgp.LinearizedNetwork`.
    :param mean: ``"network"`` or ``"posterior"``, see :class:`~ntkgp.ExactNTKGP`.
    :param fit: fit precisions and noise by the evidence; the report is ``model.report``.
    :param output: picks the output tensor from what the network returns.
    :param max_memory: budget for the Grams (which go to disk where they do not fit), their factorisation, and what is
        kept of the training inputs; a third of the machine's memory by default.
    :param fit_options: passed to :func:`~ntkgp.fit_evidence` (``method``, ``at``, ``progress``, …).
    :return: the model, in eval mode.
    :raises ValueError: data too large for exact inference (the message says how large N·C may be and what this one
        would need), other inference, or data that the model refuses.

    Cost: see :class:`~ntkgp.ExactNTKGP` and :func:`~ntkgp.fit_evidence`.

    >>> x = torch.linspace(-1, 1, 30).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> model = from_network(net, (x, torch.sin(3 * x)), likelihood="regression")
    >>> model.likelihood(model(torch.zeros(2, 1))).variance.shape, model.report.converged
    (torch.Size([2]), True)
    """
    if inference not in ("auto", "exact"):
        raise ValueError(f"inference: expected 'auto' or 'exact', got {inference!r}")
    x, y = collect_raw(train_data)
    lin = LinearizedNetwork(net, x, groups=groups, output=output)
    budget = _machine_memory() // 3 if max_memory is None else parse_memory(max_memory)
    rows = len(lin.pack(x)) * lin.num_outputs
    _check_size(rows, budget)
    logger.info("exact inference: N·C = %d, P = %d, %d group(s)", rows, lin.num_parameters, len(lin.groups))
    model = ExactNTKGP(x, y, _likelihood(likelihood, lin, y), lin, mean, max_memory=budget)
    model.eval()
    model.report = fit_evidence(model, **fit_options) if fit else None
    return model


def _check_size(rows: int, budget: int) -> None:
    needed = matrices_of_fit(rows)
    if needed > budget:
        largest = math.isqrt(budget // matrices_of_fit(1))
        raise ValueError(
            f"train_data: exact inference with N·C = {rows} rows needs {format_memory(needed)} beside the Grams, which "
            f"may go to disk; the budget of {format_memory(budget)} allows N·C up to {largest}. "
            "Use fewer data or a larger max_memory"
        )


def _machine_memory() -> int:
    """Bytes of physical memory; 8 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30


def _likelihood(likelihood: str | Likelihood, lin: LinearizedNetwork, y: Tensor) -> Likelihood:
    if isinstance(likelihood, Likelihood):
        return likelihood
    c = lin.num_outputs
    if likelihood == "classification":
        return BernoulliLikelihood() if c == 1 else CategoricalLikelihood(num_classes=c)
    if likelihood != "regression":
        raise ValueError(f"likelihood: expected 'regression', 'classification' or a Likelihood, got {likelihood!r}")
    # GPyTorch's floor of 1e-4 is meant for standardised targets; this one follows their units and their rounding.
    floor = GreaterThan(noise_floor(y)) if isinstance(y, Tensor) else None
    if c > 1 and len(lin.output_shape) == 1:
        return MultitaskGaussianLikelihood(num_tasks=c, has_global_noise=False, noise_constraint=floor)
    return GaussianLikelihood(noise_constraint=floor)
