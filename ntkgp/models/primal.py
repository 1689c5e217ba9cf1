"""The training side of an exact Gaussian process in weight space: what one pass over the data leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from gpytorch.likelihoods import Likelihood
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from ntkgp.checkpoint import moved_to
from ntkgp.evidence.primal import DataSummary, PrimalGaussianEvidence, Unreached
from ntkgp.evidence.primal_softmax import PrimalSoftmaxEvidence, find_mode
from ntkgp.evidence.problem import NoiseModel
from ntkgp.evidence.weight_space import CompressedRows, TangentLogits
from ntkgp.fingerprint import digest
from ntkgp.likelihoods import log_likelihood, whitened_targets
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.statistics import RowTriangle, jacobian_rows, rows_at_a_time
from ntkgp.linearization.symmetric import SymmetricGrams
from ntkgp.means import LinearizedMean
from ntkgp.models.batches import Batches
from ntkgp.models.factors import GaussianFactors
from ntkgp.models.forms import Form
from ntkgp.models.noise import NoiseLink, has_fixed_noise, is_classification, learned_on_fixed
from ntkgp.models.visits import Collector, Summary, Visits, grams_of_rows, probes


@dataclass(frozen=True)
class PrimalFactors:
    """Conditioning on compressed rows.

    :param inner: factors of R Λ⁻¹ Rᵀ + D.
    :param rows: the compressed rows R, (n, P).
    :param theta_star: θ⋆, (P,).
    """

    inner: GaussianFactors
    rows: Tensor
    theta_star: Tensor

    def root(self, cross: Tensor) -> Tensor:
        """What the data take off the prior covariance, see :meth:`~ntkgp.models.factors.GaussianFactors.root`."""
        return self.inner.root(cross)


class PrimalSide:
    """What the passes over the training data leave behind in weight space; independent of the precisions.

    :param lin: the linearised network.
    :param prior_mean: the prior mean.
    :param batches: the data.
    :param likelihood: decides which rows share a noise variance.
    :param max_memory: budget, see :func:`~ntkgp.models.forms.choose_form`.
    :param device: of the algebra.
    :param progress: show a progress bar for passes over the data.
    """

    form = "primal"
    grams: SymmetricGrams

    def __init__(
        self, lin: LinearizedNetwork, prior_mean: LinearizedMean, batches: Batches, likelihood: Likelihood,
        max_memory: int, device: torch.device, progress: bool = False,
    ) -> None:  # fmt: skip
        self.lin, self.prior_mean, self.max_memory = lin, prior_mean, max_memory
        self.index = lin.groups.index.to(device)
        self.theta = lin.theta.to(device, torch.float64)
        self._make_grams: Callable[[Tensor], SymmetricGrams] = partial(
            grams_of_rows, index=self.index, num_groups=len(lin.groups), max_memory=max_memory
        )
        self._visits = Visits(lin, batches, device, max_memory, is_classification(likelihood), progress)
        self._signature = noise_signature(likelihood, lin.num_outputs)
        self._fixed = likelihood.noise_covar.noise.detach().clone() if has_fixed_noise(likelihood) else None
        self.x: Tensor | None = None
        self._targets: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PrimalSide:
        # Nothing in it ever changes.
        return self

    @classmethod
    def build(
        cls, lin: LinearizedNetwork, prior_mean: LinearizedMean, batches: Batches, likelihood: Likelihood,
        max_memory: int, device: torch.device, data: tuple[Tensor, Tensor] | None, progress: bool = False,
    ) -> PrimalSide:  # fmt: skip
        """Visit the training data once.

        :param data: inputs and targets where they are tensors of the model.
        """
        kind = PrimalClassification if is_classification(likelihood) else PrimalRegression
        with torch.inference_mode(False), torch.no_grad():
            side = kind(lin, prior_mean, batches, likelihood, max_memory, device, progress)
            if data is not None:
                side.x, side._targets = data[0], data[1].clone()
            side._visit(batches, likelihood)
        return side

    def _visit(self, batches: Batches, likelihood: Likelihood) -> None:
        raise NotImplementedError

    def saved(self, model: Any, factors: PrimalFactors) -> dict[str, Any]:
        """What predictions at the model's present hyper-parameters need, as tensors and plain values."""
        precision = model.kernel.precision.detach()
        return {
            "form": tuple(model._form), "max_memory": self.max_memory, "num_data": self.num_data,
            "inner": dict(vars(factors.inner)), "rows": factors.rows, "theta_star": factors.theta_star,
            "hyperparameters": _hyperparameters(precision, model.likelihood, model.curvature),
        }  # fmt: skip

    data: DataSummary

    @property
    def num_data(self) -> int:
        """N."""
        return self.data.num_data

    def is_of(self, x: Tensor | None, targets: Tensor | None, likelihood: Likelihood) -> bool:
        """Whether the visit was to these data, with this noise."""
        if self.x is not x or self._signature != noise_signature(likelihood, self.lin.num_outputs):
            return False
        if targets is not None and (self._targets is None or not torch.equal(self._targets, targets)):
            return False
        return self._fixed is None or torch.equal(self._fixed, likelihood.noise_covar.noise)

    def gram(self, precision: Tensor) -> Tensor:
        """R Λ⁻¹ Rᵀ of the compressed rows."""
        return self.grams.weighted_sum(precision.reciprocal().to(torch.float64))

    def noise(self, likelihood: Likelihood, targets: Tensor | None) -> DiagLinearOperator:
        """Covariance of the noise of the compressed rows."""
        raise NotImplementedError

    def _each_piece(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """A product with the rows of x, piece by piece unless a graph to x is wanted."""
        if torch.is_grad_enabled() and x.requires_grad:
            return product(jacobian_rows(self.lin, x, 2**62, keep_graph=True).flatten(0, 1))
        step = rows_at_a_time(self.lin, self.max_memory)
        with torch.no_grad():
            return torch.cat(
                [
                    product(jacobian_rows(self.lin, part, self.max_memory).flatten(0, 1))
                    for part in x.detach().split(step)
                ]
            )

    def cross(self, x: Tensor, precision: Tensor, factors: PrimalFactors) -> Tensor:
        """J(x) Λ⁻¹ Rᵀ, shape (T·C, n)."""
        weighted = (factors.rows / precision.detach()[self.index]).mT
        return self._each_piece(x, lambda rows: rows @ weighted)

    def shift(self, x: Tensor, factors: PrimalFactors, precision: Tensor, cross: Tensor | None = None) -> Tensor:
        """J(x) θ⋆, shape (T, C)."""
        return self._each_piece(x, lambda rows: rows @ factors.theta_star).reshape(len(x), -1)

    def posterior_mean(self, factors: PrimalFactors, precision: Tensor) -> WeightMean:
        """The posterior mean as a function, whatever becomes of the model."""
        return WeightMean(self.prior_mean, factors.theta_star)

    def pathwise(
        self, weights: Tensor, precision: Tensor, factors: PrimalFactors, generator: torch.Generator | None
    ) -> Tensor:
        """What Matheron's rule adds to prior draws of the weights, (S, P); no pass over the data."""
        dual = factors.inner.pathwise(weights @ factors.rows.mT, generator)
        return (dual @ factors.rows) / precision[self.index]

    def _shared(self, targets: str) -> dict[str, Any]:
        """What every problem holds."""
        known = targets == "data"
        return {
            "grams": self.grams,
            "data": self.data,
            "theta": self.theta if known else torch.zeros_like(self.theta),
            "index": self.index,
            "group_names": self.lin.groups.names,
            "group_sizes": self.lin.groups.sizes,
            "knows_theta": known,
        }

    def problem(self, likelihood: Likelihood, y: Tensor | None, curvature: str, targets: str) -> Any:
        """What determines the evidence."""
        raise NotImplementedError

    def condition(
        self, precision: Tensor, likelihood: Likelihood, targets: Tensor | None, curvature: str
    ) -> PrimalFactors:
        """Factors of the posterior at hyper-parameters."""
        raise NotImplementedError


class PrimalRegression(PrimalSide):
    """Triangles of the rows of every noise variance; rows with known noise are divided by its root."""

    def _visit(self, batches: Batches, likelihood: Likelihood) -> None:
        c, p, device = self.lin.num_outputs, len(self.theta), self.theta.device
        n = batches.num_data if self._fixed is not None else 1
        noise = NoiseLink(likelihood, n, c).model().to(device)
        self._roots = noise.fixed.sqrt() if noise.num_learned == 0 else None
        if self._roots is None:
            pairs = torch.stack([noise.fixed, noise.component.to(noise.fixed)])
            kinds, kind = torch.unique(pairs, dim=1, return_inverse=True)
        else:
            kinds, kind = noise.fixed.new_tensor([[1.0], [0.0]]), torch.zeros_like(noise.component)
        collector = Collector(kind, len(kinds[0]), p, self._fixed is not None)
        summary, directions = Summary.empty(p, device), probes(p, device)
        squares = residuals = 0.0
        start = 0
        for rows, outputs, y in self._visits():
            residual = y.reshape_as(outputs) - outputs
            summary.add(rows, y, directions)
            squares += float((residual + rows @ self.theta).square().sum())
            residuals += float(residual.square().sum())
            flat, values, stop = rows.flatten(0, 1), residual.reshape(-1), start + outputs.numel()
            if self._roots is not None:
                scale = self._roots[start:stop]
                flat, values = flat / scale.unsqueeze(-1), values / scale
            collector.add(flat, values, start)
            start = stop
        self.data = summary.close(self.lin)
        self._mean_square, self._residual_square = squares / start, residuals / start
        self.rows, self.residual, self.kind, counts, lost = collector.result()
        self._unreached = Unreached(counts, lost, kinds[0], kinds[1].long())
        self.grams = self._make_grams(self.rows)

    def _noise_model(self, likelihood: Likelihood) -> NoiseModel:
        """Noise of the compressed rows as it is now."""
        c = self.lin.num_outputs
        now = NoiseLink(likelihood, self.num_data if self._fixed is not None else 1, c).model()
        rest = self._unreached
        return NoiseModel(rest.fixed[self.kind], rest.component[self.kind], now.values, now.minimum)

    def noise(self, likelihood: Likelihood, targets: Tensor | None) -> DiagLinearOperator:
        """Covariance of the noise of the compressed rows."""
        return DiagLinearOperator(self._noise_model(likelihood).to(self.theta.device).diagonal())

    def condition(
        self, precision: Tensor, likelihood: Likelihood, targets: Tensor | None, curvature: str
    ) -> PrimalFactors:
        """Factors of the posterior at hyper-parameters."""
        rows = self.residual + self.rows @ self.theta
        inner = GaussianFactors.build(self.gram(precision), self.noise(likelihood, targets), rows)
        return PrimalFactors(inner, self.rows, (inner.alpha @ self.rows) / precision[self.index])

    def problem(self, likelihood: Likelihood, y: Tensor | None, curvature: str, targets: str) -> PrimalGaussianEvidence:
        """What determines the evidence."""
        if curvature != "simple":
            raise ValueError(
                f"curvature={curvature!r} applies to classification; a Gaussian likelihood has one curvature"
            )
        return PrimalGaussianEvidence(
            **self._shared(targets),
            root=self.rows,
            residual=self.residual,
            noise=self._noise_model(likelihood),
            unreached=self._unreached,
            mean_square=self._mean_square if targets == "data" else self._residual_square,
            residual_square=self._residual_square,
            log_whitening=None if self._roots is None else 2.0 * float(self._roots.log().sum()),
        )


class PrimalClassification(PrimalSide):
    """The triangle of rows whitened by the curvature at the network's logits, and passes for θ⋆."""

    def _visit(self, batches: Batches, likelihood: Likelihood) -> None:
        p, device = len(self.theta), self.theta.device
        summary, directions, triangle = Summary.empty(p, device), probes(p, device), RowTriangle(p)
        self._log_likelihood = 0.0
        for rows, logits, labels in self._visits():
            summary.add(rows, labels, directions)
            found = whitened_targets(logits, labels, logits)
            triangle.add(torch.bmm(found.factor.mT, rows).flatten(0, 1), found.targets.reshape(-1))
            self._log_likelihood += float(log_likelihood(logits, labels).sum())
        self.data = summary.close(self.lin)
        rows, targets, unreached, _ = triangle.result()
        self._compressed = CompressedRows(rows, targets, unreached)
        self.grams = self._make_grams(rows)

    def noise(self, likelihood: Likelihood, targets: Tensor | None) -> DiagLinearOperator:
        """One for every whitened row."""
        return DiagLinearOperator(torch.ones_like(self._compressed.targets))

    def _logits(self, centre: Tensor) -> TangentLogits:
        return TangentLogits(self._visits, centre)

    def condition(
        self, precision: Tensor, likelihood: Likelihood, targets: Tensor | None, curvature: str
    ) -> PrimalFactors:
        """Factors of the posterior at hyper-parameters; θ⋆ by passes over the data unless it is a linear solve."""
        compressed, each = self._compressed, precision[self.index]
        gram, theta_star = None, None
        if curvature != "quadratic":
            logits = self._logits(self.theta)
            theta_star = find_mode(logits, each, compressed).theta
            if curvature == "full":
                compressed = logits.compress(theta_star)
                gram = self._make_grams(compressed.root).weighted_sum(precision.reciprocal())
        gram = self.gram(precision) if gram is None else gram
        shifted = compressed.targets + compressed.root @ self.theta
        unit = DiagLinearOperator(torch.ones_like(shifted))
        inner = GaussianFactors.build(gram, unit, shifted)
        theta_star = (inner.alpha @ compressed.root) / each if theta_star is None else theta_star
        return PrimalFactors(inner, compressed.root, theta_star)

    def problem(self, likelihood: Likelihood, y: Tensor | None, curvature: str, targets: str) -> PrimalSoftmaxEvidence:
        """What determines the evidence."""
        shared = self._shared(targets)
        return PrimalSoftmaxEvidence(
            **shared,
            root=self._compressed.root,
            logits=self._logits(shared["theta"]),
            compressed=self._compressed,
            point=shared["theta"],
            make_grams=self._make_grams,
            log_likelihood=self._log_likelihood,
            variant=curvature,
        )


class SavedSide(PrimalSide):
    """What a file holds in place of the training data: the factors, at the hyper-parameters of the file.

    :param lin: the linearised network.
    :param state: of :meth:`PrimalSide.saved`.
    """

    def __init__(self, lin: LinearizedNetwork, state: dict[str, Any]) -> None:
        self.lin, self.max_memory, self.state = lin, state["max_memory"], state
        self.saved_form = Form(*state["form"])
        self.factors = PrimalFactors(GaussianFactors(**state["inner"]), state["rows"], state["theta_star"])
        self.index = lin.groups.index.to(self.factors.rows.device)
        self.x = None

    @property
    def num_data(self) -> int:
        """N."""
        return self.state["num_data"]

    def is_of(self, x: Tensor | None, targets: Tensor | None, likelihood: Likelihood) -> bool:
        """There is nothing else to visit."""
        return True

    def moved(self, fn: Callable[[Tensor], Tensor]) -> SavedSide:
        """The same on the device where `fn` moves tensors."""
        out = SavedSide(self.lin, moved_to(self.state, fn(self.factors.rows).device))
        out.prior_mean = self.prior_mean
        return out

    def condition(
        self, precision: Tensor, likelihood: Likelihood, targets: Tensor | None, curvature: str
    ) -> PrimalFactors:
        """The factors of the file.

        :raises RuntimeError: other hyper-parameters than they were made at.
        """
        if self.state["hyperparameters"] != _hyperparameters(precision, likelihood, curvature):
            self._refuse()
        return self.factors

    def saved(self, model: Any, factors: PrimalFactors) -> dict[str, Any]:
        """The same again."""
        return self.state

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            "this model was loaded without its training data: it predicts at the precisions, noise and curvature that "
            "it was saved with; for others save it with training_data=True"
        )

    def gram(self, precision: Tensor) -> Tensor:
        """Refused: it is wanted for other factors."""
        self._refuse()

    def noise(self, likelihood: Likelihood, targets: Tensor | None) -> DiagLinearOperator:
        """Refused: it is wanted for other factors."""
        self._refuse()

    def problem(self, likelihood: Likelihood, y: Tensor | None, curvature: str, targets: str) -> Any:
        """Refused: the evidence is that of the training data."""
        self._refuse()


def _hyperparameters(precision: Tensor, likelihood: Likelihood, curvature: str) -> str:
    """Digest of what factors depend on beside the data."""
    values = [precision.to(torch.float64), [p.to(torch.float64) for p in likelihood.parameters()]]
    return digest([values, curvature if is_classification(likelihood) else None])


def noise_signature(likelihood: Likelihood, num_outputs: int) -> tuple[bool, bool, int]:
    """What of a likelihood decides how rows are compressed: labels, known variances, number of learned ones."""
    if is_classification(likelihood):
        return True, False, 0
    if has_fixed_noise(likelihood):
        return False, True, int(learned_on_fixed(likelihood) is not None)
    return False, False, NoiseLink(likelihood, 1, num_outputs).model().num_learned


@dataclass(frozen=True)
class WeightMean:
    """A predictive mean that no later change of the model reaches: m₀(x) + J(x) θ⋆."""

    module: LinearizedMean
    theta_star: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate at packed inputs, (N, D) -> (N, C)."""
        value = self.module(x).reshape(len(x), -1)
        return value + self.module.lin.jvp(x, self.theta_star).to(value.dtype)
