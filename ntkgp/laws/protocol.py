"""What a library has to offer to be checked: an adapter, what it fits, and what the fit can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

KINDS = ("exact", "last_layer", "subnetwork", "diagonal", "kfac", "subset", "nystrom", "variational")


class NotApplicableError(Exception):
    """The library makes no such claim: the law says nothing about it."""


@dataclass(frozen=True)
class Structure:
    r"""One of the approximations that a library offers.

    :param kind: what it approximates by, which decides the laws and the dense reference:

        ===========  ===============================================================================================
        exact        all of H = JᵀBJ in the weights, or all of K in function space
        last_layer   the weights of the last module with parameters; the others stay at θ̃
        subnetwork   the weights ``task.indices``; the others stay at θ̃
        diagonal     the diagonal of H
        kfac         :math:`\tfrac1N (\sum a a^\top) \otimes (\sum g B g^\top)` for each Linear weight, other
                     parameters exact among themselves
        subset       exact inference on ``task.subset`` of the N data
        nystrom      the kernel replaced by features of landmarks (ELLA): all data are landmarks, all features kept
        variational  inducing inputs (VaLLA) at all training inputs
        ===========  ===============================================================================================

    :param single_precision: it has one prior precision for all weights, and laws about several are not applicable.
    :param rounding: relative error that is accepted besides the tolerance of a law, of libraries known to compute in
        single precision. Law U8 does without, so that this defect is counted once.
    """

    kind: str
    single_precision: bool = False
    rounding: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {self.kind!r}")


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network, its data and hyper-parameters.

    :param net: the network as its user has it; a copy of its own for each fit, and to be given as it is.
    :param x: inputs, (N, *input).
    :param y: targets (N, *output), or labels (N,).
    :param likelihood: ``"regression"`` (Gaussian) or ``"classification"`` (softmax).
    :param precision: λ of the prior N(0, Λ⁻¹), one for each parameter tensor in the order of ``net.parameters()``, all
        equal where the structure has a single one, (T,).
    :param noise: σ² of a regression.
    :param structure: name of the structure among the adapter's.
    :param kind: its kind.
    :param batch_size: rows at a time, for libraries that take loaders.
    :param indices: weights of a subnetwork, in the order of ``net.parameters()``.
    :param subset: number of data of a subset.
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    likelihood: str
    precision: Tensor
    noise: float
    structure: str = "exact"
    kind: str = "exact"
    batch_size: int = 7
    indices: Tensor | None = None
    subset: int = 5

    @property
    def classify(self) -> bool:
        """Whether the targets are labels."""
        return self.likelihood == "classification"

    @property
    def loader(self) -> DataLoader:
        """The data in batches, in order; the seed that every loader draws is taken from a generator of its own."""
        own = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(self.x, self.y), batch_size=self.batch_size, generator=own)

    def at(self, precision: Tensor | None = None, noise: float | None = None) -> Task:
        """The task with other hyper-parameters; the task itself where none is given."""
        if precision is None and noise is None:
            return self
        return replace(
            self, precision=self.precision if precision is None else precision,
            noise=self.noise if noise is None else float(noise),
        )  # fmt: skip


@dataclass(frozen=True)
class Optimum:
    """What a library takes for the best hyper-parameters.

    :param precision: one for each tensor, (T,), or one.
    :param noise: σ², or None where it was not tuned.
    :param at: whose evidence was maximised, that of ``"theta_star"`` or of ``"theta_map"``.
    """

    precision: Tensor
    noise: float | None = None
    at: str = "theta_map"


class Fitted:
    """What an adapter's ``fit`` returns; each method that it lacks makes the laws that need it not applicable.

    N are the inputs of the call, C the outputs with their event flattened. All results are detached. Rows of joint
    matrices are input-major: the C outputs of an input are adjacent.

    ==========================================  ========================================================================
    ``mean(x)``                                 predictive mean, (N, C)
    ``posterior_mean(x)``                       h(x; θ⋆), the mean of the tangent model given the data, (N, C)
    ``covariance(x)``                           latent covariance of each input, without noise, (N, C, C)
    ``joint_covariance(x)``                     latent covariance of all inputs, (N·C, N·C)
    ``prior_covariance(x)``                     J(x)Λ⁻¹J(x)ᵀ, (N·C, N·C)
    ``log_evidence(precision, noise)``          log marginal likelihood of the tangent model (the evidence at θ⋆)
    ``log_evidence_map(precision, noise)``      classical Laplace evidence, at θ̃
    ``optimum()``                               an :class:`Optimum`
    ``effective_dimension()``                   γ of each tensor, (T,)
    ``samples(x, size, generator)``             draws of the latent function at all inputs jointly, (size, N, C)
    ``probabilities(x)``                        of the classes, by the probit approximation, (N, C)
    ``random_prediction(x, generator)``         any prediction that draws random numbers
    ``hyperparameters()``                       (precision (T,) or (1,), σ²) at the end of a fit that learns them
    ``update(x, y)``                            the posterior given further data, a :class:`Fitted`
    ``refit()``                                 fit the same object to the same data once more
    ==========================================  ========================================================================

    ``precision`` and ``noise`` of the evidences are as in :class:`Task`, or None for those of the fit.
    """

    def mean(self, x: Tensor) -> Tensor:
        """Predictive mean."""
        raise NotApplicableError("has no predictive mean")

    def posterior_mean(self, x: Tensor) -> Tensor:
        """H at θ⋆."""
        raise NotApplicableError("has no mean at θ⋆")

    def covariance(self, x: Tensor) -> Tensor:
        """Latent covariance of each input."""
        raise NotApplicableError("has no covariance of single inputs")

    def joint_covariance(self, x: Tensor) -> Tensor:
        """Latent covariance of all inputs."""
        raise NotApplicableError("has no covariance between inputs")

    def prior_covariance(self, x: Tensor) -> Tensor:
        """Covariance under the prior."""
        raise NotApplicableError("does not show its prior")

    def log_evidence(self, precision: Tensor | None = None, noise: float | None = None) -> float:
        """Log evidence at θ⋆."""
        raise NotApplicableError("has no evidence at θ⋆")

    def log_evidence_map(self, precision: Tensor | None = None, noise: float | None = None) -> float:
        """Log evidence at θ̃."""
        raise NotApplicableError("has no evidence at the trained weights")

    def optimum(self) -> Optimum:
        """Hyper-parameters by the evidence."""
        raise NotApplicableError("does not tune hyper-parameters by an evidence")

    def effective_dimension(self) -> Tensor:
        """γ of each tensor."""
        raise NotApplicableError("does not report effective dimensions")

    def samples(self, x: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Draws of functions."""
        raise NotApplicableError("draws no functions")

    def probabilities(self, x: Tensor) -> Tensor:
        """Of the classes."""
        raise NotApplicableError("has no probabilities")

    def random_prediction(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A prediction that draws random numbers."""
        raise NotApplicableError("predicts without random numbers")

    def hyperparameters(self) -> tuple[Tensor, float]:
        """At the end of the fit."""
        raise NotApplicableError("keeps the hyper-parameters that it is given")

    def update(self, x: Tensor, y: Tensor) -> Fitted:
        """Further data."""
        raise NotApplicableError("takes no further data")

    def refit(self) -> None:
        """Once more."""
        raise NotApplicableError("is made anew for each fit")


@runtime_checkable
class Adapter(Protocol):
    """A library under test.

    :ivar name: of the library, with its version.
    :ivar structures: its approximations by name; a task says which one it asks for.
    """

    name: str
    structures: Mapping[str, Structure]

    def fit(self, task: Task) -> Any:
        """Fit the task's structure; return a :class:`Fitted`, or an object with some of its methods."""
