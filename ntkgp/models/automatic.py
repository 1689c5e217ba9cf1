"""From a trained network and its data to a fitted Gaussian process, in one call."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.likelihoods import GaussianLikelihood, Likelihood, MultitaskGaussianLikelihood
from torch import Tensor, nn

from ntkgp.evidence import fit_evidence
from ntkgp.evidence.accumulation import choice_memory
from ntkgp.evidence.single_pass import statistics_kind
from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from ntkgp.linearization import LinearizedNetwork, ParameterGroups
from ntkgp.linearization.memory import format_memory, parse_memory
from ntkgp.models.batches import Batches, collect_raw
from ntkgp.models.dual import matrices_of_fit
from ntkgp.models.exact import ExactNTKGP
from ntkgp.models.forms import choose_form
from ntkgp.models.noise import has_fixed_noise, is_classification, noise_floor
from ntkgp.models.nystrom import NystromNTKGP
from ntkgp.models.variational import VariationalNTKGP, kmeans_inducing_points

logger = logging.getLogger("ntkgp")

Model = ExactNTKGP | NystromNTKGP | VariationalNTKGP
_INFERENCES = ("auto", "exact", "nystrom", "variational")
# Work that exact inference may take before an approximation is chosen: some minutes on a few cores.
_EXACT_FLOPS = 2e13
_FACTORISATIONS = 20
# Rows of all landmarks, or of all inducing points, and features of each group.
_LANDMARK_ROWS, _INDUCING_ROWS, _FEATURES = 2048, 512, 256
# Of the matrices between inducing rows, their factors and what is held on the way.
_BYTES_PER_PAIR = 64


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
    progress: bool = False,
    **fit_options: Any,
) -> Model:
    """Linearise a trained network, build its Gaussian process and fit the evidence.

    The choice of ``inference="auto"`` is logged (``"ntkgp"``) with its numbers and kept in ``model.inference_reason``:

    * exact inference (:class:`~ntkgp.ExactNTKGP`, in data space or weight space, whichever is cheaper) where its
      matrices fit in the budget and its work is below 2·10¹³ flops;
    * else :class:`~ntkgp.NystromNTKGP` with ``residual=True``, the evidence of every precision from one pass, where its
      statistics, quadratic in the number of groups times features, fit;
    * else :class:`~ntkgp.VariationalNTKGP`, whose memory depends on neither.

    :param net: the trained network.
    :param train_data: ``(x, y)`` with x as the network takes it, or a ``Dataset`` or ``DataLoader`` of ``(x, y)`` pairs
        or of dicts with ``"labels"``. Targets are (N, C), (N, *output shape) or class labels (N,). Datasets and loaders
        whose inputs take more than a quarter of the budget are never held, but passed over.
    :param likelihood: ``"regression"`` (Gaussian noise, one per output of a vector, not below the rounding noise of the
        targets: see :func:`~ntkgp.models.noise.noise_floor`), ``"classification"`` (softmax, or logistic for one
        output), or a likelihood.
    :param inference: ``"auto"``, ``"exact"``, ``"nystrom"`` or ``"variational"``.
    :param groups: parameter groups, see :class:`~ntkgp.LinearizedNetwork`.
    :param mean: ``"network"`` or ``"posterior"``, see :class:`~ntkgp.ExactNTKGP`.
    :param fit: fit precisions and noise by the evidence; the report is ``model.report``. A variational model reports in
        ``model.history``.
    :param output: picks the output tensor from what the network returns.
    :param max_memory: budget for Grams (which go to disk where they do not fit), statistics, their factorisation, and
        what is kept of the training inputs; a third of the machine's memory by default.
    :param progress: show progress bars.
    :param fit_options: passed to :func:`~ntkgp.fit_evidence` (``method``, ``at``, …), or to
        :meth:`VariationalNTKGP.fit <ntkgp.VariationalNTKGP.fit>`.
    :return: the model, in eval mode.
    :raises ValueError: ``inference="exact"`` and data too large for it (the message says how large N·C may be and what
        this one would need), an unknown inference, or data that the model refuses.

    Cost: that of the model and of :func:`~ntkgp.fit_evidence`.

    >>> x = torch.linspace(-1, 1, 30).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> model = from_network(net, (x, torch.sin(3 * x)), likelihood="regression")
    >>> model.likelihood(model(torch.zeros(2, 1))).variance.shape, model.report.converged
    (torch.Size([2]), True)
    """
    if inference not in _INFERENCES:
        raise ValueError(f"inference: expected one of {_INFERENCES}, got {inference!r}")
    budget = _machine_memory() // 3 if max_memory is None else parse_memory(max_memory)
    data = collect_raw(train_data, limit=budget // 4)
    lin = LinearizedNetwork(net, data.example, groups=groups, output=output)
    chosen = _likelihood(likelihood, lin, data.y)
    held = data.x is not None
    n = len(lin.pack(data.x)) if held else len(data.y)
    choice, reason = _choose(inference, lin, chosen, n, held, budget)
    logger.info("%s inference: %s", choice, reason)
    request = _Request((data.x, data.y) if held else train_data, n, lin, chosen, mean, budget, fit, progress)
    builders: dict[str, Callable[..., Model]] = {
        "exact": request.exact, "nystrom": request.nystrom, "variational": request.variational
    }  # fmt: skip
    model = builders[choice](**fit_options)
    model.inference_reason = reason
    return model.eval()


@dataclass(frozen=True)
class _Request:
    """What is asked for, whatever the inference.

    :param source: ``(x, y)``, or a Dataset or DataLoader that is passed over.
    """

    source: Any
    num_data: int
    lin: LinearizedNetwork
    likelihood: Likelihood
    mean: str
    budget: int
    fit: bool
    progress: bool

    def exact(self, **options: Any) -> ExactNTKGP:
        """The exact model."""
        x, y = self.source if isinstance(self.source, tuple) else (self.source, None)
        model = ExactNTKGP(x, y, self.likelihood, self.lin, self.mean, max_memory=self.budget)
        model.report = fit_evidence(model, progress=self.progress, **options) if self.fit else None
        return model

    def nystrom(self, **options: Any) -> NystromNTKGP:
        """ELLA with its residual."""
        landmarks, features = nystrom_sizes(self.lin, self.num_data)
        selection = "balanced" if is_classification(self.likelihood) else "random"
        model = NystromNTKGP(
            self.source, self.likelihood, self.lin, landmarks, features, True, landmarks=selection, mean=self.mean,
            max_memory=self.budget,
        ).fit(progress=self.progress)  # fmt: skip
        model.report = None
        if self.fit:
            # The subspace of the features is chosen at the precisions: once more at those that the evidence asks for.
            fit_evidence(model, progress=self.progress, **options)
            model.fit(progress=self.progress)
            model.report = fit_evidence(model, progress=self.progress, **options)
        return model

    def variational(self, **options: Any) -> VariationalNTKGP:
        """VaLLA from centres of the data, or from rows of what is not held or holds integers."""
        lin, batches = self.lin, Batches.of(self.source, self.lin, self.likelihood)
        rows = min(_INDUCING_ROWS, math.isqrt(self.budget // _BYTES_PER_PAIR))
        count = min(self.num_data, max(1, rows // lin.num_outputs))
        learned = all(dtype.is_floating_point for dtype in lin.packing.dtypes)
        if learned and isinstance(self.source, tuple):
            points = kmeans_inducing_points(batches.collect()[0], count)[0]
        else:
            points = draw_rows(batches, self.num_data, count)
        model = VariationalNTKGP(
            points, self.likelihood, lin, self.num_data, mean=self.mean, max_memory=self.budget, learn_inducing=learned
        )
        if self.fit:
            return model.fit(batches, progress=self.progress, **options)
        model.set_optimum(batches, progress=self.progress)
        return model


def nystrom_sizes(lin: LinearizedNetwork, num_data: int) -> tuple[int, int]:
    """Landmarks M and features K that :func:`from_network` takes."""
    landmarks = min(num_data, max(64, _LANDMARK_ROWS // lin.num_outputs))
    return landmarks, min(landmarks * lin.num_outputs, _FEATURES)


def draw_rows(batches: Batches, num_data: int, count: int, seed: int = 0) -> Tensor:
    """Some rows of the inputs, drawn without replacement in one pass, (count, D) packed."""
    chosen = torch.randperm(num_data, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    parts, start = [], 0
    for x, _ in batches:
        parts.append(x[chosen[(chosen >= start) & (chosen < start + len(x))] - start])
        start += len(x)
    return torch.cat(parts)


def _choose(
    inference: str, lin: LinearizedNetwork, likelihood: Likelihood, n: int, held: bool, budget: int
) -> tuple[str, str]:
    """Which inference, and why."""
    unsuited = _unsuited(likelihood)
    if inference in ("nystrom", "variational"):
        if unsuited:
            raise ValueError(f"likelihood: {unsuited}, which inference={inference!r} has not; use inference='exact'")
        return inference, "as asked for"
    exact, obstacle = _exact_choice(lin, likelihood, n, held, budget)
    if not obstacle:
        return "exact", exact
    if inference == "exact" or unsuited:
        other = f"; {unsuited}, which no other inference has" if unsuited else ", or inference='nystrom'"
        raise ValueError(f"train_data: {obstacle}. Use fewer data, a larger max_memory{other}")
    groups, (landmarks, features) = len(lin.groups), nystrom_sizes(lin, n)
    width = groups * features
    kinds = lin.num_outputs if isinstance(likelihood, MultitaskGaussianLikelihood) else 1
    kind = statistics_kind(likelihood)
    needed = max(8 * (kinds + 4) * width**2, choice_memory(lin, landmarks, features, kind, budget)[1])
    sizes = f"{landmarks} landmarks, {features} features of each of {groups} group(s)"
    if needed <= budget:
        return "nystrom", f"{obstacle}; {sizes} need {format_memory(needed)}"
    return "variational", f"{obstacle}; and for a Nyström kernel {sizes} need {format_memory(needed)}"


def _unsuited(likelihood: Likelihood) -> str:
    """What a likelihood has that only exact inference can do ("" if nothing)."""
    if has_fixed_noise(likelihood):
        return "the likelihood has a noise for each row"
    if isinstance(likelihood, MultitaskGaussianLikelihood) and likelihood.rank > 0:
        return "the likelihood has a noise covariance between outputs"
    return ""


def _exact_choice(lin: LinearizedNetwork, likelihood: Likelihood, n: int, held: bool, budget: int) -> tuple[str, str]:
    """What exact inference takes, and what is in its way ("" if nothing)."""
    try:
        form = choose_form("auto" if held else "primal", lin, likelihood, n, budget)
    except ValueError as reason:
        return "", str(reason)
    rows = n * lin.num_outputs
    what = f"N·C = {rows:,}, P = {lin.num_parameters:,}, {len(lin.groups)} group(s), in {form.name} form"
    if form.nbytes > budget:
        largest = math.isqrt(budget // matrices_of_fit(1))
        return what, (
            f"exact inference with N·C = {rows} rows needs {format_memory(form.nbytes)} beside the Grams, which may go "
            f"to disk; the budget of {format_memory(budget)} allows N·C up to {largest}"
        )
    gather = 2 * rows * lin.num_parameters**2 if form.name == "primal" else lin.explain(n).flops
    flops = gather + _FACTORISATIONS * form.rows**3
    if flops > _EXACT_FLOPS:
        return what, f"exact inference with {what} takes {flops:.1e} flops, more than {_EXACT_FLOPS:.0e}"
    return what, ""


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
    if isinstance(y, Tensor) and y.is_complex():
        raise TypeError(f"train_data: expected targets that are real numbers, got {y.dtype}")
    floor = GreaterThan(noise_floor(y)) if isinstance(y, Tensor) else None
    if c > 1 and len(lin.output_shape) == 1:
        return MultitaskGaussianLikelihood(num_tasks=c, has_global_noise=False, noise_constraint=floor)
    return GaussianLikelihood(noise_constraint=floor)
