"""The comparators of this package that have a dense reference: Laplace in its structures, and Hessian-free Laplace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ntkgp.baselines import HessianFreeLaplace, Laplace
from ntkgp.laws.protocol import Fitted, NotApplicableError, Optimum, Structure, Task


class BaselinesAdapter:
    """``baselines.Laplace`` with each structure and ``baselines.HessianFreeLaplace`` on the tangent model.

    Sampled networks, L2M and variational Laplace approximate something else and obey none of these laws.

    >>> BaselinesAdapter().structures["KFAC"].kind
    'kfac'
    """

    name = "ntkgp.baselines"
    structures: Mapping[str, Structure] = {
        "full": Structure("exact"),
        "last layer": Structure("last_layer"),
        "subnetwork": Structure("subnetwork"),
        "diagonal": Structure("diagonal"),
        "KFAC": Structure("kfac"),
        # Its minimisations end at a gradient of 1e-6 of the perturbation.
        "Hessian-free": Structure("exact", rounding=1e-5),
    }

    def fit(self, task: Task) -> Fitted:
        """Fit at the task's hyper-parameters."""
        if task.structure != "Hessian-free":
            return _Laplace(task)
        if task.classify:
            raise NotApplicableError("its curvature is that at the optimum of the loss, not at θ̃")
        if task.noise < 1e-5:
            raise NotApplicableError("minimisations by conjugate gradients do not end at such a condition number")
        return _HessianFree(task)


def _blocks(predicted: torch.distributions.Distribution) -> Tensor:
    latent = predicted.latent  # type: ignore[attr-defined]
    return latent.covariance_matrix if latent.mean.ndim == 2 else latent.variance[:, None, None]


class _Comparator(Fitted):
    """What both predict."""

    method: Laplace | HessianFreeLaplace

    def __init__(self, task: Task) -> None:
        self.task = task
        self.method = self._build(task)

    def _build(self, task: Task):
        raise NotImplementedError

    def mean(self, x: Tensor) -> Tensor:
        """Of the latent distribution."""
        return self.method.predict(x).latent.mean.reshape(len(x), -1)  # type: ignore[attr-defined]

    def covariance(self, x: Tensor) -> Tensor:
        """Of the latent distribution."""
        return _blocks(self.method.predict(x))

    def probabilities(self, x: Tensor) -> Tensor:
        """By probit."""
        return self.method.predict(x).probs  # type: ignore[attr-defined]

    def refit(self) -> None:
        """``fit`` again."""
        self.method.fit((self.task.x, self.task.y))


class _HessianFree(_Comparator):
    """Refits of the tangent model."""

    def _build(self, task: Task) -> HessianFreeLaplace:
        method = HessianFreeLaplace(
            task.net, task.likelihood, groups="tensor", model="tangent", precision=task.precision, noise=task.noise
        )
        return method.fit((task.x, task.y))

    def mean(self, x: Tensor) -> Tensor:
        """That of the control."""
        raise NotApplicableError("its mean is at the control's weights, not at θ̃")

    def covariance(self, x: Tensor) -> Tensor:
        """Differences, made symmetric."""
        found = self.method.covariance(x)  # type: ignore[union-attr]
        return (found + found.mT) / 2


class _Laplace(_Comparator):
    """One structure of Laplace."""

    method: Laplace

    def _build(self, task: Task, mean: str = "network", evidence: str | None = None) -> Laplace:
        structure = task.structure.lower().replace(" ", "_")
        options: dict[str, Any] = {} if task.classify else {"noise": task.noise}
        if structure == "subnetwork":
            options["mask"] = task.indices
        return Laplace(
            task.net, task.likelihood, structure=structure, groups="tensor", evidence=evidence, mean=mean,
            precision=task.precision, **options,
        ).fit(task.loader)  # fmt: skip

    def _at(self, precision: Tensor | None, noise: float | None) -> Laplace:
        task = self.task.at(precision, noise)
        return self.method if task is self.task else self._build(task)

    def posterior_mean(self, x: Tensor) -> Tensor:
        """By ``mean="posterior"``."""
        return self._build(self.task, mean="posterior").predict(x).latent.mean  # type: ignore[attr-defined]

    def log_evidence(self, precision: Tensor | None = None, noise: float | None = None) -> float:
        """The evidence at θ⋆."""
        return self._at(precision, noise).log_evidences["theta_star"]

    def log_evidence_map(self, precision: Tensor | None = None, noise: float | None = None) -> float:
        """The evidence at θ̃."""
        return self._at(precision, noise).log_evidences["theta"]

    def optimum(self) -> Optimum:
        """``evidence="theta"``."""
        if not self.task.classify:
            raise NotApplicableError("fits a noise for each output, tasks have one")
        return Optimum(self._build(self.task, evidence="theta").precision, None, "theta_map")

    def samples(self, x: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """``sample_weights`` through the tangent model."""
        seed = int(torch.randint(2**31, (), generator=generator))
        method = self.method
        moves = method.sample_weights(size, seed) - method.lin.theta.double()
        return method.lin(x).double() + method.lin.jvp(x, moves).double()
