"""The tangent model over the training data: products with its rows, and the minimiser of its convex loss."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from tqdm import tqdm

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.statistics import jacobian_rows, rows_at_a_time
from ntkgp.models.batches import Batches

_MAX_NEWTON = 100
_MAX_CG = 1000
_MAX_HALVINGS = 20

logger = logging.getLogger("ntkgp")


class View(ABC):
    """Some rows of data with products of their Jacobian, restricted to the structure's weights.

    :ivar x: packed inputs (B, D).
    :ivar y: targets (B, C), or labels (B,).
    :ivar f: the network's outputs, float64 (B, C).
    """

    def __init__(self, x: Tensor, y: Tensor, f: Tensor) -> None:
        self.x, self.y, self.f = x, y, f

    @abstractmethod
    def jvp(self, v: Tensor) -> Tensor:
        """J v, (B, C)."""

    @abstractmethod
    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀ u, (p,)."""


class DenseView(View):
    """Rows J (B, C, p) in memory."""

    def __init__(self, x: Tensor, y: Tensor, f: Tensor, rows: Tensor) -> None:
        super().__init__(x, y, f)
        self.rows = rows

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (B, C)."""
        return self.rows @ v

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀ u, (p,)."""
        return torch.einsum("bcp,bc->p", self.rows, u)


class PassView(View):
    """Products by passes through the network."""

    def __init__(self, x: Tensor, y: Tensor, f: Tensor, lin: LinearizedNetwork, columns: Tensor | None) -> None:
        super().__init__(x, y, f)
        self._lin, self._columns = lin, columns

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (B, C)."""
        if self._columns is not None:
            v = v.new_zeros(self._lin.num_parameters).index_copy(0, self._columns, v)
        return self._lin.jvp(self.x, v.to(self._lin.dtype)).double()

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀ u, (p,)."""
        full = self._lin.vjp(self.x, u.to(self._lin.dtype)).double()
        return full if self._columns is None else full[self._columns]


class HeadView(View):
    """Features φ (B, F) of a linear head, whose rows φᵀ ⊗ I are never formed; weights in the order (C, F)."""

    def __init__(self, x: Tensor, y: Tensor, f: Tensor, features: Tensor) -> None:
        super().__init__(x, y, f)
        self.features = features

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (B, C)."""
        return self.features @ v.reshape(self.f.shape[1], -1).T

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀ u, (p,)."""
        return (u.T @ self.features).reshape(-1)


class Tangent:
    """Training data as views of the tangent model, kept in memory where they fit in a quarter of the budget.

    :param max_memory: bytes for the kept views and the passes.
    :param columns: the weights of the structure, as places in ``lin.theta``; None for all.
    :param features: of a linear head at packed inputs, instead of rows.
    """

    def __init__(
        self,
        lin: LinearizedNetwork,
        batches: Batches,
        classification: bool,
        max_memory: int,
        columns: Tensor | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        progress: bool = False,
    ) -> None:
        self.lin, self.classification, self.columns = lin, classification, columns
        self._batches, self._budget, self._features = batches, max_memory, features
        self._progress = progress
        self._kept: list[View] | None = None
        self.num_data = 0
        self.size = lin.num_parameters if columns is None else len(columns)
        # Rows known to be too many to keep are not formed.
        self._dense = features is not None or self._rows_fit()

    def __iter__(self) -> Iterator[View]:
        """One pass."""
        if self._kept is not None:
            yield from self._kept
            return
        kept, held, rows = [], 0, 0
        for x, y in tqdm(self._batches, desc="pass over the data", unit=" batches", disable=not self._progress):
            rows += len(x)
            for view in self._views(x, y):
                if self._dense:
                    held += 8 * (view.f.numel() + view.x.numel() + _width(view))
                    kept.append(view)
                    if held > self._budget // 4:
                        self._dense, kept = False, []
                yield view
        self.num_data = rows
        if self._dense:
            self._kept = kept

    def _rows_fit(self) -> bool:
        try:
            n = self._batches.num_data
        except ValueError:
            n = 1
        return 8 * n * self.lin.num_outputs * self.size <= self._budget // 4

    @property
    def most_held(self) -> int:
        """Bytes that the kept views take at most."""
        return self._budget // 4 if self.is_kept else 0

    @property
    def is_kept(self) -> bool:
        """Whether the rows, or the features, are in memory."""
        return self._kept is not None

    def count(self) -> int:
        """N; a pass over the data where nothing says it."""
        if not self.num_data:
            try:
                self.num_data = self._batches.num_data
            except ValueError:
                self.num_data = sum(len(x) for x, _ in self._batches)
        return self.num_data

    def _views(self, x: Tensor, y: Tensor) -> Iterator[View]:
        y = y if self.classification else y.reshape(len(x), -1)
        at_once = inputs_at_a_time(self.lin, self._budget)
        for inputs, targets in zip(x.split(at_once), y.split(at_once), strict=True):
            f = self.lin(inputs).double()
            if self._features is not None:
                yield HeadView(inputs, targets, f, self._features(inputs))
            elif self._dense:
                step = rows_at_a_time(self.lin, self._budget)
                for part in zip(inputs.split(step), targets.split(step), f.split(step), strict=True):
                    yield DenseView(*part, self.rows(part[0]))
            else:
                yield PassView(inputs, targets, f, self.lin, self.columns)

    def rows(self, x: Tensor) -> Tensor:
        """J at the structure's weights, float64 (B, C, p)."""
        rows = jacobian_rows(self.lin, x, self._budget // 4)
        return rows if self.columns is None else rows[..., self.columns]

    def blocks(self, view: View) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs and dense rows of a view, few rows at a time."""
        if isinstance(view, DenseView):
            yield view.f, view.rows
            return
        step = rows_at_a_time(self.lin, self._budget)
        for x, f in zip(view.x.split(step), view.f.split(step), strict=True):
            yield f, self.rows(x)


def inputs_at_a_time(lin: LinearizedNetwork, budget: int) -> int:
    """Inputs whose passes, with a graph, take at most a quarter of the budget; at least one."""
    return max(1, budget // (4 * 3 * lin.activation_bytes))


def squared_errors(tangent: Tangent) -> Tensor:
    """Squared errors of the network itself, (C,)."""
    total = torch.zeros(tangent.lin.num_outputs, dtype=torch.float64)
    for view in tangent:
        total += (view.y - view.f).square().sum(0)
    return total


def _width(view: View) -> int:
    if isinstance(view, DenseView):
        return view.rows.numel()
    return view.features.numel() if isinstance(view, HeadView) else 0


def curvature(logits: Tensor) -> Tensor:
    """B (N, C, C) of softmax, or of the logistic likelihood for C = 1."""
    if logits.shape[1] == 1:
        return (logits.sigmoid() * (-logits).sigmoid()).unsqueeze(-1)
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def curvature_root(logits: Tensor) -> Tensor:
    """S (N, C, C) with S Sᵀ = B: diag(√p) − p√pᵀ."""
    if logits.shape[1] == 1:
        return curvature(logits).sqrt()
    p = logits.softmax(-1)
    return torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)


def label_residual(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the log-likelihood in the logits, (N, C)."""
    if logits.shape[1] == 1:
        return labels.double().unsqueeze(-1) - logits.sigmoid()
    return nn.functional.one_hot(labels.long(), logits.shape[1]).double() - logits.softmax(-1)


def label_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of log p(y | logits)."""
    if logits.shape[1] == 1:
        return logsigmoid(logits[:, 0] * (2 * labels.double() - 1)).sum()
    return -cross_entropy(logits, labels.long(), reduction="sum")


class Fit:
    r"""How the tangent model at θ̃ + δ fits the data.

    :ivar errors: squared errors of each output, (C,); empty for classification.
    :ivar log_likelihood: of the labels; 0 for regression.
    :ivar gradient: :math:`J^\top` (gradient of the log-likelihood in the outputs), (p,), for unit noise over the noise.
    """

    def __init__(self, tangent: Tangent, delta: Tensor | None, weights: Tensor) -> None:
        c = tangent.lin.num_outputs
        self.errors = torch.zeros(c, dtype=torch.float64)
        self.log_likelihood = 0.0
        self.gradient = torch.zeros(tangent.size, dtype=torch.float64)
        for view in tangent:
            h = view.f if delta is None else view.f + view.jvp(delta)
            if tangent.classification:
                self.log_likelihood += float(label_log_likelihood(h, view.y))
                self.gradient += view.vjp(label_residual(h, view.y))
            else:
                self.errors += (view.y - h).square().sum(0)
                self.gradient += view.vjp((view.y - h) * weights)

    def loss(self, weights: Tensor) -> float:
        """Negative log-likelihood up to what the weights of the network do not change."""
        return float((self.errors * weights).sum()) / 2 - self.log_likelihood


def _hessian_product(tangent: Tangent, delta: Tensor, weights: Tensor, v: Tensor) -> Tensor:
    total = torch.zeros_like(v)
    for view in tangent:
        u = view.jvp(v)
        if tangent.classification:
            u = torch.einsum("bcd,bd->bc", curvature(view.f + view.jvp(delta)), u)
        else:
            u = u * weights
        total += view.vjp(u)
    return total


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], solve: Callable[[Tensor], Tensor], target: Tensor, tolerance: float
) -> Tensor:
    """A⁻¹ target by preconditioned conjugate gradients, to a relative residual in the norm of the preconditioner."""
    found = torch.zeros_like(target)
    residual = target.clone()
    z = solve(residual)
    direction, energy = z.clone(), float(residual @ z)
    start = energy
    for _ in range(_MAX_CG):
        if energy <= tolerance**2 * start:
            break
        image = product(direction)
        step = energy / float(direction @ image)
        found += step * direction
        residual -= step * image
        z = solve(residual)
        before, energy = energy, float(residual @ z)
        direction = z + (energy / before) * direction
    return found


def minimise(
    tangent: Tangent,
    theta: Tensor,
    precision: Tensor,
    weights: Tensor,
    solve: Callable[[Tensor], Tensor],
    start: Tensor,
) -> tuple[Tensor, Fit]:
    r"""δ = θ⋆ − θ̃, the minimum of :math:`\sum_n \ell(f + J\delta) + \tfrac12 \|\tilde\theta + \delta\|^2_\Lambda`.

    The loss is convex: Newton steps by conjugate gradients, preconditioned by the structure's own posterior
    covariance, with halving.

    :param theta: θ̃ of the structure's weights, (p,).
    :param precision: (p,).
    :param weights: 1/σ² of each output, (C,).
    :param solve: the posterior covariance times a vector.
    :param start: δ of the step before.
    """
    single = tangent.lin.dtype != torch.float64
    # The evidence errs by the square of it.
    tolerance = 1e-5 if single else (1e-9 if tangent.is_kept else 1e-6)
    delta = start
    fit = Fit(tangent, delta, weights)

    def total(delta: Tensor, fit: Fit) -> float:
        return fit.loss(weights) + float((precision * (theta + delta).square()).sum()) / 2

    loss = total(delta, fit)
    for _ in range(_MAX_NEWTON):
        gradient = fit.gradient - precision * (theta + delta)
        energy = float(gradient @ solve(gradient))  # about twice what the loss can still fall
        if energy <= tolerance**2 * max(1.0, abs(loss)):
            return delta, fit

        def product(v: Tensor, at: Tensor = delta) -> Tensor:
            return _hessian_product(tangent, at, weights, v) + precision * v

        accuracy = max(tolerance, min(0.1, energy**0.5)) if tangent.classification else tolerance
        step = _conjugate_gradients(product, solve, gradient, accuracy)
        for halvings in range(_MAX_HALVINGS):
            trial = delta + 0.5**halvings * step
            tried = Fit(tangent, trial, weights)
            reached = total(trial, tried)
            if reached <= loss + 1e-14 * abs(loss):
                break
        else:
            return delta, fit  # rounding hides what is left
        stalled = loss - reached <= (1e-8 if single else 1e-15) * abs(loss)
        delta, fit, loss = trial, tried, reached
        if stalled:
            return delta, fit
    logger.warning("Laplace: θ⋆ was not reached in %d Newton steps", _MAX_NEWTON)
    return delta, fit
