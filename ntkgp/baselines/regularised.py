"""The regularised loss of a network or its tangent model, perturbed by its own outputs, for many weights at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vjp, vmap
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.frozen import FrozenNetwork, pass_environment
from ntkgp.linearization.second_order import second_order

_PASSES = 12  # activations that a Hessian product of one set of weights holds at a time
_MOST_DENSE = 1000
_DIFFERENCE = 1e-5  # relative step of Hessian products by differences

Loss = Callable[..., Tensor]


class WeightedOutputs(NamedTuple):
    """Linear forms of a model's outputs, one per problem: Σ_r wᵀ f(x_r; θ).

    :ivar leaves: inputs as the network takes them, each (K, R, *shape).
    :ivar weights: w, (K, R, C).
    """

    leaves: tuple[Tensor, ...]
    weights: Tensor


class RegularisedLoss:
    r"""K functions :math:`L(\theta) + \sum_r w_{kr}^\top f(x_{kr}; \theta)` with the negative log joint

    .. math:: L(\theta) = -\sum_n \log p(y_n \mid f(x_n; \theta)) + \tfrac12 \theta^\top \Lambda \theta,

    their gradients and Hessian products, in float64.

    :param lin: the linearised network.
    :param frozen: the same network with float64 weights.
    :param tangent: whether f is the tangent model at the network's weights instead of the network.
    :param noise: variances (C,); None for labels.
    :param precision: Λ, (P,).
    :param max_memory: bytes of activations held at a time.
    """

    def __init__(
        self, lin: LinearizedNetwork, frozen: FrozenNetwork, x: Tensor, y: Tensor, *, tangent: bool,
        noise: Tensor | None, precision: Tensor, max_memory: int,
    ) -> None:  # fmt: skip
        self._lin, self._frozen, self._tangent = lin, frozen, tangent
        self._forms: WeightedOutputs | None = None
        self._noise, self._precision, self._max_memory = noise, precision, max_memory
        self.theta = torch.cat([p.reshape(-1) for p in frozen.theta.values()])
        y = y.to(self.theta.device)
        self._row_bytes = _PASSES * frozen.activation_bytes([leaf[:2] for leaf in self.leaves(x[:2])])
        size = max(1, max_memory // self._row_bytes)
        self._batches = [(self.leaves(part), labels) for part, labels in zip(x.split(size), y.split(size), strict=True)]

    def perturbed(self, forms: WeightedOutputs | None) -> RegularisedLoss:
        """The same loss with other perturbations."""
        other = copy.copy(self)
        other._forms = forms
        return other

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """Outputs (N, C) of the model at weights (P,)."""
        with pass_environment(self.theta.device), torch.no_grad():
            size = max(1, self._max_memory // self._row_bytes)
            return torch.cat([self._model(theta, self.leaves(part)) for part in x.split(size)])

    def outputs_in_forms(self, theta: Tensor) -> Tensor:
        """Outputs (K, R, C) of the model at each perturbation's own inputs, weights (K, P)."""
        assert self._forms is not None
        found = [
            self._each(lambda t, *leaves: self._model(t, list(leaves)), (theta[rows], *self._own_leaves(chunk)))
            for rows, chunk in self._chunks(torch.arange(len(theta), device=theta.device))
        ]
        return torch.cat(found).detach()

    def _own_leaves(self, chunk: Tensor) -> list[Tensor]:
        assert self._forms is not None
        return [leaf[chunk] for leaf in self._forms.leaves]

    def output_gradient_norms(self) -> Tensor:
        """‖∇θ Σ_r wᵀf(x_r; θ̃)‖ of each perturbation, (K,)."""
        assert self._forms is not None
        found = []
        for _, chunk in self._chunks(torch.arange(len(self._forms.weights), device=self.theta.device)):
            start = self.theta.expand(len(chunk), -1)
            own = (self._forms.weights[chunk], *self._own_leaves(chunk))
            found.append(self._each(_gradient_of(self._form, ()), (start, *own))[1].detach().norm(dim=-1))
        return torch.cat(found)

    def leaves(self, x: Tensor) -> list[Tensor]:
        """Packed inputs as float64 leaves."""
        found = self._lin.packing.leaves(x.to(self.theta.device))
        return [leaf.to(torch.float64) if leaf.is_floating_point() else leaf for leaf in found]

    def _tree(self, theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split([p.numel() for p in self._frozen.theta.values()])
        return {n: part.reshape(p.shape) for (n, p), part in zip(self._frozen.theta.items(), parts, strict=True)}

    def _model(self, theta: Tensor, leaves: list[Tensor]) -> Tensor:
        if not self._tangent:
            return self._frozen(self._tree(theta), leaves)
        shift = self._tree(theta - self.theta)
        value = jvp(lambda w: self._frozen(w, leaves), (self._frozen.theta,), (shift,))
        return value[0] + value[1]

    def _data_loss(self, theta: Tensor, leaves: list[Tensor], y: Tensor) -> Tensor:
        f = self._model(theta, leaves)
        if self._noise is not None:
            return 0.5 * ((f - y.reshape(f.shape)).square() / self._noise).sum()
        if f.shape[-1] == 1:
            return binary_cross_entropy_with_logits(f[:, 0], y.to(f.dtype), reduction="sum")
        return cross_entropy(f, y, reduction="sum")

    def _form(self, theta: Tensor, weights: Tensor, *leaves: Tensor) -> Tensor:
        return (weights * self._model(theta, list(leaves))).sum()

    def value_and_gradient(self, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Values (k,) and gradients (k, P) at theta (k, P) of the functions named by index."""

        def evaluate(loss: Loss, rows: slice, shared: Sequence[Any], own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            value, gradient = self._each(_gradient_of(loss, shared), (theta[rows], *own))
            return value.detach(), gradient.detach()

        total, slope = self._sum(evaluate, index)
        scaled = self._precision * theta
        return total + 0.5 * (scaled * theta).sum(-1), slope + scaled

    def hessian_product(self, theta: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
        """Products (k, P) of the Hessians at theta (k, P) with vectors (k, P)."""
        if not self._frozen.twice_differentiable:
            size = _DIFFERENCE * (1 + theta.norm(dim=-1, keepdim=True)) / vectors.norm(dim=-1, keepdim=True)
            ahead, behind = (self.value_and_gradient(theta + s * size * vectors, index)[1] for s in (1, -1))
            return (ahead - behind) / (2 * size)

        def evaluate(loss: Loss, rows: slice, shared: Sequence[Any], own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            product = self._each(_product_of(loss, shared), (theta[rows], vectors[rows], *own)).detach()
            return product[:, 0], product

        return self._sum(evaluate, index)[1] + self._precision * vectors

    def preconditioner(self, theta: Tensor) -> Callable[[Tensor], Tensor]:
        """The inverse of the unperturbed Hessian at theta (P,), made positive; of Λ beyond 1000 weights.

        Cost: P Hessian products and 3·P² numbers.
        """
        p = len(theta)
        if p > _MOST_DENSE or 24 * p**2 > self._max_memory:
            return lambda v: v / self._precision
        unit = torch.eye(p, dtype=theta.dtype, device=theta.device)
        hessian = self.perturbed(None).hessian_product(theta.expand(p, -1), unit, torch.arange(p, device=theta.device))
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        values = values.abs().clamp_min(1e-3 * float(self._precision.min()))
        return lambda v: (v @ vectors / values) @ vectors.mT

    def _each(self, function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Any:
        """The function of each row of the arguments, side by side where the network allows it."""
        with pass_environment(self.theta.device), second_order(torch.zeros((), requires_grad=True)):
            if self._frozen.vectorized:
                return vmap(function)(*arguments)
            found = [function(*row) for row in zip(*arguments, strict=True)]
        return tuple(map(torch.stack, zip(*found, strict=True))) if isinstance(found[0], tuple) else torch.stack(found)

    def _sum(self, evaluate: Callable[..., tuple[Tensor, Tensor]], index: Tensor) -> tuple[Tensor, Tensor]:
        """Data and perturbations added up, as many functions at a time as the memory allows."""
        totals: list[tuple[Tensor, Tensor]] = []
        for rows, chunk in self._chunks(index):
            parts = [evaluate(self._data_loss, rows, batch, ()) for batch in self._batches]
            if self._forms is not None:
                parts.append(evaluate(self._form, rows, (), (self._forms.weights[chunk], *self._own_leaves(chunk))))
            totals.append((torch.stack([p[0] for p in parts]).sum(0), torch.stack([p[1] for p in parts]).sum(0)))
        return torch.cat([t[0] for t in totals]), torch.cat([t[1] for t in totals])

    def _chunks(self, index: Tensor) -> list[tuple[slice, Tensor]]:
        rows = max(len(self._batches[0][1]), 1 if self._forms is None else self._forms.weights.shape[1])
        each = rows * self._row_bytes + 8 * _PASSES * len(self.theta)
        size = max(1, self._max_memory // each)
        return [(slice(s, s + size), index[s : s + size]) for s in range(0, len(index), size)]


def _gradient_of(loss: Loss, shared: Sequence[Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(theta: Tensor, *own: Tensor) -> tuple[Tensor, Tensor]:
        gradient, value = grad_and_value(lambda t: loss(t, *own, *shared))(theta)
        return value, gradient

    return function


def _product_of(loss: Loss, shared: Sequence[Any]) -> Callable[..., Tensor]:
    def function(theta: Tensor, vector: Tensor, *own: Tensor) -> Tensor:
        def slope(t: Tensor) -> Tensor:
            return grad_and_value(lambda s: loss(s, *own, *shared))(t)[0]

        # Reverse over reverse: fewer operations lack it than forward over reverse.
        return vjp(slope, theta)[1](vector)[0]

    return function
