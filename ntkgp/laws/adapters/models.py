"""The Gaussian-process models of this package."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import gpytorch
import torch
from gpytorch.constraints import Positive
from torch import Tensor

import ntkgp
from ntkgp.evidence import evidence_objective
from ntkgp.laws.oracle import point_blocks
from ntkgp.laws.protocol import Fitted, Optimum, Structure, Task

DOUBLE = torch.float64


class ModelsAdapter:
    """``ExactNTKGP`` in data space and in weight space, ``NystromNTKGP`` and ``VariationalNTKGP``.

    >>> sorted(ModelsAdapter().structures)
    ['Nyström', 'exact, dual', 'exact, primal', 'variational']
    """

    name = "ntkgp"
    structures: Mapping[str, Structure] = {
        "exact, dual": Structure("exact"),
        "exact, primal": Structure("exact"),
        "Nyström": Structure("nystrom"),
        "variational": Structure("variational"),
    }

    def fit(self, task: Task) -> Fitted:
        """Build the model at the task's hyper-parameters."""
        return (_Exact if task.kind == "exact" else _Sparse)(task)


def _likelihood(task: Task) -> gpytorch.likelihoods.Likelihood:
    if task.classify:
        return ntkgp.CategoricalLikelihood(num_classes=int(task.y.max()) + 1)
    return gpytorch.likelihoods.GaussianLikelihood(noise_constraint=Positive())


class _Model(Fitted):
    """A model with the network as its mean."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.lin = ntkgp.LinearizedNetwork(task.net, task.x, groups="tensor")
        self.model = self._build("network")

    def _build(self, mean: str):
        raise NotImplementedError

    def _set(self, model):
        model.kernel.precision = self.task.precision
        if not self.task.classify:
            model.likelihood.noise = torch.tensor(self.task.noise, dtype=DOUBLE)
        return model

    def _shaped(self, mean: Tensor) -> Tensor:
        return mean.detach().reshape(-1, self.lin.num_outputs)

    def mean(self, x: Tensor) -> Tensor:
        """The network."""
        return self._shaped(self.model(x).mean)

    def posterior_mean(self, x: Tensor) -> Tensor:
        """By ``mean="posterior"``."""
        return self._shaped(self._build("posterior")(x).mean)

    def joint_covariance(self, x: Tensor) -> Tensor:
        """Of ``model(x)``."""
        return self.model(x).covariance_matrix.detach()

    def covariance(self, x: Tensor) -> Tensor:
        """Its blocks."""
        return point_blocks(self.joint_covariance(x), self.lin.num_outputs)

    def probabilities(self, x: Tensor) -> Tensor:
        """Of the likelihood, by probit."""
        return self.model.likelihood(self.model(x)).probs.detach()

    def samples(self, x: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """``sample_functions``."""
        return self.model.sample_functions(size, generator)(x).detach().reshape(size, len(x), -1)


class _Exact(_Model):
    """``ExactNTKGP``."""

    def _build(self, mean: str) -> ntkgp.ExactNTKGP:
        form = self.task.structure.rpartition(" ")[2]
        y = self.task.y
        model = ntkgp.ExactNTKGP(self.task.x, y, _likelihood(self.task), self.lin, mean=mean, form=form)
        return self._set(model).eval()

    def prior_covariance(self, x: Tensor) -> Tensor:
        """By the kernel."""
        return self.model.kernel(self.lin.pack(x).double()).to_dense().detach()

    def _evidence(self, at: str, precision: Tensor | None, noise: float | None):
        objective, task = evidence_objective(self.model.evidence_problem(at=at), at), self.task.at(precision, noise)
        noises = () if task.classify else (torch.tensor([task.noise], dtype=DOUBLE),)
        return objective.evaluate(task.precision, *noises)

    def log_evidence(self, precision: Tensor | None = None, noise: float | None = None) -> float:
        """The objective of ``fit_evidence``."""
        return float(self._evidence("theta_star", precision, noise).value)

    def log_evidence_map(self, precision: Tensor | None = None, noise: float | None = None) -> float:
        """The same at θ̃."""
        return float(self._evidence("theta_map", precision, noise).value)

    def effective_dimension(self) -> Tensor:
        """As in its report."""
        return self._evidence("theta_star", None, None).effective_dimension.detach()

    def optimum(self) -> Optimum:
        """``fit_evidence``; of a classification at θ̃, where the reference has a value."""
        at = "theta_map" if self.task.classify else "theta_star"
        report = ntkgp.fit_evidence(self._build("network"), at=at)
        return Optimum(report.precision, None if self.task.classify else float(report.noise), at)

    def update(self, x: Tensor, y: Tensor) -> Fitted:
        """``get_fantasy_model``."""
        grown = copy.copy(self)
        grown.task = replace(self.task, x=torch.cat([self.task.x, x]), y=torch.cat([self.task.y, y]))
        grown.model = self.model.get_fantasy_model(x, y)
        return grown


class _Sparse(_Model):
    """``NystromNTKGP`` and ``VariationalNTKGP`` with all data as landmarks or inducing points."""

    def _build(self, mean: str):
        task, likelihood = self.task, _likelihood(self.task)
        if task.kind == "nystrom":
            model = ntkgp.NystromNTKGP(
                (task.x, task.y), likelihood, self.lin, num_landmarks=len(task.x), num_features=None, mean=mean
            )
            self._set(model)
            return model.fit(progress=False)
        variational = ntkgp.VariationalNTKGP(
            task.x, likelihood, self.lin, num_data=len(task.x), learn_inducing=False, mean=mean
        )
        self._set(variational)
        return variational.fit((task.x, task.y), progress=False)

    def hyperparameters(self) -> tuple[Tensor, float]:
        """As the model has them now."""
        noise = self.task.noise if self.task.classify else float(self.model.likelihood.noise)
        return self.model.kernel.precision.detach(), noise
