"""Many smooth minimisations side by side: truncated Newton steps by conjugate gradients, to a stated gradient norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_HALVINGS = 30
_ARMIJO = 1e-4
_ROUNDING = 1e-14  # relative, of values: smaller decreases cannot be seen
_HALVINGS_UNSEEN = 3


class Objectives(Protocol):
    """K functions of P variables; ``index`` (k,) names those that the k rows of theta belong to."""

    def value_and_gradient(self, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Values (k,) and gradients (k, P) at theta (k, P)."""

    def hessian_product(self, theta: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
        """Products (k, P) of the k Hessians at theta with the k vectors."""


class Minima(NamedTuple):
    """What :func:`minimise` found.

    :ivar theta: (K, P).
    :ivar gradient_norms: (K,).
    :ivar converged: (K,), whether the gradient norm is within the tolerance.
    :ivar stuck: (K,), whether no step along the last direction was a progress: rounding, or a bad preconditioner.
    :ivar iterations: Newton steps of the slowest.
    """

    theta: Tensor
    gradient_norms: Tensor
    converged: Tensor
    stuck: Tensor
    iterations: int


def minimise(
    objectives: Objectives,
    theta: Tensor,
    tolerance: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    forcing: float,
    max_iterations: int,
    step_done: Callable[[], None] = lambda: None,
) -> Minima:
    """Minimise K functions from theta (K, P) until each gradient norm is at most its tolerance (K,).

    :param precondition: the inverse of a positive matrix that the Hessians resemble, times vectors (k, P).
    :param forcing: relative residual of a Newton step's linear system, unless the tolerance asks for less.
    :param step_done: called after each step.

    Cost: per step tens to hundreds of Hessian products, one for all K functions at a time.
    """
    theta = theta.clone()
    everything = torch.arange(len(theta), device=theta.device)
    value, gradient = objectives.value_and_gradient(theta, everything)
    stuck = torch.zeros(len(theta), dtype=torch.bool, device=theta.device)
    iterations = 0
    for _ in range(max_iterations):
        norms = gradient.norm(dim=-1)
        index = everything[(norms > tolerance) & ~stuck]
        if not len(index):
            break
        target = (0.5 * tolerance[index]).maximum(forcing * norms[index])
        direction, convex = _newton_direction(objectives, theta[index], gradient[index], index, target, precondition)
        moved, new_value, new_gradient, failed = _line_search(
            objectives, theta[index], value[index], gradient[index], direction, convex, index
        )
        theta[index], value[index], gradient[index], stuck[index] = moved, new_value, new_gradient, failed
        iterations += 1
        step_done()
    norms = gradient.norm(dim=-1)
    return Minima(theta, norms, norms <= tolerance, stuck, iterations)


def _newton_direction(
    objectives: Objectives,
    theta: Tensor,
    gradient: Tensor,
    index: Tensor,
    target: Tensor,
    precondition: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Directions d with ‖Hd + g‖ at most the target, and whether no negative curvature was met on the way."""
    direction, residual = torch.zeros_like(gradient), -gradient
    search = precondition(residual).clone()
    first = search.clone()
    inner = (residual * search).sum(-1)
    convex = torch.ones(len(theta), dtype=torch.bool, device=theta.device)
    running = residual.norm(dim=-1) > target
    for _ in range(4 * theta.shape[-1] + 20):
        rows = running.nonzero()[:, 0]
        if not len(rows):
            break
        product = objectives.hessian_product(theta[rows], search[rows], index[rows])
        curvature = (search[rows] * product).sum(-1)
        positive = curvature > 0
        convex[rows] &= positive
        # What the steps before it found descends too, and far more than the first one where the preconditioner knows
        # nothing of the Hessian; at the first step itself the preconditioned gradient leaves saddles.
        bent = rows[~positive]
        bent = bent[(direction[bent] == 0).all(-1)]
        direction[bent] = first[bent]
        running[rows] &= positive
        rows, product, curvature = rows[positive], product[positive], curvature[positive]
        step = (inner[rows] / curvature).unsqueeze(-1)
        direction[rows] += step * search[rows]
        residual[rows] -= step * product
        running[rows] &= residual[rows].norm(dim=-1) > target[rows]
        preconditioned = precondition(residual[rows])
        renewed = (residual[rows] * preconditioned).sum(-1)
        search[rows] = preconditioned + (renewed / inner[rows]).unsqueeze(-1) * search[rows]
        inner[rows] = renewed
    return direction, convex


def _line_search(
    objectives: Objectives,
    theta: Tensor,
    value: Tensor,
    gradient: Tensor,
    direction: Tensor,
    convex: Tensor,
    index: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps halved until the value decreases; where it is convex a smaller gradient is enough.

    Near a minimum values differ by less than they are rounded, gradients do not.
    """
    slope = (gradient * direction).sum(-1)
    norms = gradient.norm(dim=-1)
    visible = slope.abs() > _ROUNDING * value.abs()
    step = torch.ones_like(value)
    new = [theta.clone(), value.clone(), gradient.clone()]
    open_rows = torch.arange(len(theta), device=theta.device)
    for halvings in range(_HALVINGS):
        tried = theta[open_rows] + step[open_rows].unsqueeze(-1) * direction[open_rows]
        found, found_gradient = objectives.value_and_gradient(tried, index[open_rows])
        decrease = visible[open_rows] & (found <= value[open_rows] + _ARMIJO * step[open_rows] * slope[open_rows])
        smaller = convex[open_rows] & (found_gradient.norm(dim=-1) < 0.9 * norms[open_rows])
        accepted = torch.isfinite(found) & (decrease | smaller)
        rows = open_rows[accepted]
        new[0][rows], new[1][rows], new[2][rows] = tried[accepted], found[accepted], found_gradient[accepted]
        open_rows = open_rows[~accepted]
        if halvings >= _HALVINGS_UNSEEN:
            open_rows = open_rows[visible[open_rows]]
        if not len(open_rows):
            break
        step[open_rows] /= 2
    return new[0], new[1], new[2], (new[0] == theta).all(-1)
