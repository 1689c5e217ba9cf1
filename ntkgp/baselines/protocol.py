"""What every comparator has in common: its arguments, its data, and the distributions that it predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, MultivariateNormal, Normal

from ntkgp.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from ntkgp.linearization import LinearizedNetwork, ParameterGroups
from ntkgp.linearization.memory import parse_memory
from ntkgp.models.batches import Batches, collect_raw
from ntkgp.models.posterior import LEAST_VARIANCE

if TYPE_CHECKING:
    from typing_extensions import Self

KINDS = ("regression", "classification")


class Baseline(ABC):
    """A comparator: ``fit(train_data)`` once, then ``predict(x)``.

    :param net: the trained network; copied, never modified.
    :param likelihood: ``"regression"`` (Gaussian, one noise per output) or ``"classification"`` (softmax; logistic for
        one output).
    :param groups: parameter groups, where the method has a precision for each.
    :param output: picks the output tensor from what the network returns.
    :param max_memory: of what is held at a time.
    :param seed: of all that is random; the global random state is left alone.
    :param progress: show a progress bar.
    :raises ValueError: an unknown likelihood.

    The fitted state is the attributes named in ``_state``, tensors, unless a method keeps more.
    """

    _state: tuple[str, ...] = ()

    def __init__(
        self,
        net: nn.Module,
        likelihood: str = "regression",
        *,
        groups: str | ParameterGroups = "normalization",
        output: Callable[[Any], Tensor] | None = None,
        max_memory: str | int | float = "2GiB",
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        if likelihood not in KINDS:
            raise ValueError(f"likelihood: expected one of {KINDS}, got {likelihood!r}")
        self.net, self.kind = net, likelihood
        self.max_memory, self.seed, self.progress = parse_memory(max_memory), seed, progress
        self._groups, self._output = groups, output
        self._lin: LinearizedNetwork | None = None

    @property
    def lin(self) -> LinearizedNetwork:
        """The linearised network, made by the first fit.

        :raises RuntimeError: before it.
        """
        if self._lin is None:
            raise RuntimeError(f"{type(self).__name__}: call fit(train_data) first")
        return self._lin

    @property
    def is_classification(self) -> bool:
        """Whether targets are labels."""
        return self.kind == "classification"

    def fit(self, train_data: Any) -> Self:
        """Fit to ``(x, y)``, a Dataset or a DataLoader; return itself."""
        # Always anew: the network may have been trained on since the last fit.
        self._linearize(collect_raw(train_data, limit=0).example)
        self._fit(Batches.of(train_data, self.lin, self._shape_of_targets()))
        return self

    def _linearize(self, example: Any) -> None:
        if example is None:
            raise ValueError("example: expected inputs as the network takes them, for nothing was fitted yet")
        self._lin = LinearizedNetwork(self.net, example, groups=self._groups, output=self._output)

    def predict(self, x: Any) -> Distribution:
        """The predictive distribution over y at N inputs.

        Regression: ``Normal`` (N,) for one output, else ``MultivariateNormal`` with batch shape (N,) and C outputs.
        Classification: ``Categorical`` (N,), or ``Bernoulli`` (N,) for one output. Its ``latent`` is the distribution
        of the network's outputs before the likelihood, where the method has one.
        """
        packed = self.lin.pack(x).to(torch.float64)
        with torch.no_grad():
            return self._predict(packed)

    def state_dict(self) -> dict[str, Tensor]:
        """What the fit found, tensors only; with the network and the constructor's arguments it is the whole method.

        ``"method"`` holds the name of the method and of its likelihood, as bytes.

        :raises RuntimeError: not fitted.
        """
        _ = self.lin
        found = {name: tensor.detach().clone() for name, tensor in self._get_state().items()}
        return {"method": torch.tensor(list(self._label), dtype=torch.uint8), **found}

    def load_state_dict(self, state: Mapping[str, Tensor], example: Any = None) -> Self:
        """Take the state of a comparator of the same network and options; return itself.

        :param example: inputs as the network takes them; needed where ``fit`` was never called.
        :raises ValueError: the state of another method, other names or shapes than :meth:`state_dict` gives, or no
            example; nothing is changed then.
        """
        before = dict(vars(self))
        try:
            state = dict(state)
            came = bytes(state.pop("method").to(torch.uint8).reshape(-1).tolist())
            if came != self._label:
                raise ValueError(f"state: expected that of {self._label.decode()}, got {came.decode(errors='replace')}")
            if self._lin is None:
                self._linearize(state.get("example") if example is None else example)
            self._set_state({name: tensor.detach().clone() for name, tensor in state.items()})
        except Exception as error:
            vars(self).clear()
            vars(self).update(before)
            if isinstance(error, KeyError | IndexError | RuntimeError):
                what = f"missing {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"state: none of a {type(self).__name__} with these options: {what}") from error
            raise
        return self

    @property
    def _label(self) -> bytes:
        """What a state says that it is of."""
        return f"{type(self).__name__} for {self.kind}".encode()

    def _get_state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._state}

    def _set_state(self, state: dict[str, Tensor]) -> None:
        check_entries(state, self._state)
        c, p = self.lin.num_outputs, self.lin.num_parameters
        known: dict[str, tuple[int, ...]] = {
            "noise": (c,), "temperature": (), "precision": (len(self.lin.groups),),
            "mean": (p,), "variance": (p,), "fisher": (p,), "deviations": (p,), "weights": (p,),
        }  # fmt: skip
        for name, shape in known.items():
            came = tuple(state[name].shape) if name in state else shape
            # SWAG has several rows of these.
            if came != shape and not (name in ("deviations", "weights") and came[1:] == shape):
                raise ValueError(f"state: expected {name} of shape {shape}, got {came}")
        for name in self._state:
            setattr(self, name, state[name])

    @abstractmethod
    def _fit(self, batches: Batches) -> None:
        """Fit to checked data."""

    @abstractmethod
    def _predict(self, x: Tensor) -> Distribution:
        """Predict at packed inputs (N, D)."""

    def _shape_of_targets(self) -> Likelihood:
        """A likelihood that has the method's targets."""
        return likelihood_of(self.kind, self.lin.num_outputs)


def check_entries(state: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    """An error where a state has other entries than those expected."""
    unknown, missing = set(state) - set(expected), set(expected) - set(state)
    if unknown or missing:
        raise ValueError(f"state: unexpected {sorted(unknown)}, missing {sorted(missing)}")


def likelihood_of(kind: str, num_outputs: int) -> Likelihood:
    """A likelihood whose targets are of this kind."""
    if kind == "regression":
        return GaussianLikelihood()
    return BernoulliLikelihood() if num_outputs == 1 else CategoricalLikelihood(num_classes=num_outputs)


def normal(mean: Tensor, covariance: Tensor) -> Distribution:
    """Outputs with mean (N, C) and covariance (N, C, C) as a distribution: ``Normal`` (N,) for C = 1."""
    if mean.shape[-1] == 1:
        return Normal(mean[:, 0], covariance[:, 0, 0].clamp_min(LEAST_VARIANCE).sqrt())
    return MultivariateNormal(mean, covariance_matrix=_definite(covariance))


def _definite(covariance: Tensor) -> Tensor:
    """Covariances (N, C, C) with as little on the diagonal as gives each of them a Cholesky factor."""
    size = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)
    for ulps in (0, *(4**power for power in range(12))):
        added = (ulps * torch.finfo(covariance.dtype).eps * size).clamp_min(LEAST_VARIANCE * (ulps > 0))
        raised = covariance + torch.diag_embed(added.unsqueeze(-1).expand(covariance.shape[:-1]))
        failed = torch.linalg.cholesky_ex(raised).info > 0
        if not bool(failed.any()):
            return raised
        covariance = torch.where(failed[:, None, None], covariance, raised)
        size = torch.where(failed, size, 0.0)
    return covariance


def observed(latent_mean: Tensor, latent_covariance: Tensor, noise: Tensor) -> Distribution:
    """A regression's predictive distribution with its ``latent``.

    :param latent_mean: (N, C).
    :param latent_covariance: (N, C, C).
    :param noise: variances, (C,).
    """
    found = normal(latent_mean, latent_covariance + torch.diag_embed(noise))
    found.latent = normal(latent_mean, latent_covariance)  # type: ignore[attr-defined]
    return found


def labelled(probabilities: Tensor, latent: Distribution | None = None) -> Distribution:
    """A classification's predictive distribution: ``Categorical`` of (N, C) or ``Bernoulli`` of (N,)."""
    found: Distribution = Bernoulli(probs=probabilities) if probabilities.ndim == 1 else Categorical(probabilities)
    if latent is not None:
        found.latent = latent  # type: ignore[attr-defined]
    return found
