"""Which weights form the subnetwork."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ntkgp.baselines.laplace.capture import own_module
from ntkgp.baselines.laplace.structures import Diagonal
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.frozen import pass_environment
from ntkgp.models.batches import Batches

SCORES = ("laplace", "swag", "random")

_BATCH = 32


def chosen_by_mask(lin: LinearizedNetwork, mask: Tensor) -> Tensor:
    """Places of the weights that a mask (P,) of booleans picks, or that indices (k,) name.

    :raises ValueError: another shape, no weight, or an index out of range.
    """
    p = lin.num_parameters
    if mask.dtype == torch.bool:
        if mask.shape != (p,):
            raise ValueError(f"mask: expected shape ({p},), got {tuple(mask.shape)}")
        found = torch.where(mask)[0]
    else:
        if mask.ndim != 1 or mask.is_floating_point() or mask.is_complex():
            raise ValueError(f"mask: expected booleans ({p},) or indices (k,), got {mask.dtype} {tuple(mask.shape)}")
        found = mask.long().unique()
        if len(found) != len(mask) or (len(found) and (int(found[0]) < 0 or int(found[-1]) >= p)):
            raise ValueError(f"mask: expected different indices from 0 to {p - 1}")
    if len(found) == 0:
        raise ValueError("mask: picks no weight; expected at least one")
    return found


def largest(scores: Tensor, size: int) -> Tensor:
    """Places of the largest scores, in the order of the weights; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:size].sort().values


def laplace_scores(diagonal: Diagonal, precision: Tensor, weights: Tensor) -> Tensor:
    """Marginal variances of the diagonal Laplace approximation.

    Weights that no output depends on have the largest variance of all, 1/λ, and would be chosen first although they
    change nothing: their score is 0.
    """
    diagonal.update(precision, weights)
    return torch.where(diagonal.moments.sum(0) > 0, diagonal.variance, 0.0)


def swag_scores(
    lin: LinearizedNetwork, batches: Batches, classification: bool, *,
    snapshots: int, lr: float, weight_decay: float, seed: int,
) -> Tensor:  # fmt: skip
    """Variances of the weights along SGD (momentum 0.9) from θ̃, one snapshot per epoch: diagonal SWAG.

    The loss is the mean cross-entropy, or half the squared error. The copy stays in evaluation mode: statistics of
    normalisers are those of the network that is linearised.
    """
    module = own_module(lin)
    parameters = [p for _, p in module.named_parameters() if p.requires_grad]
    momenta = [torch.zeros_like(p) for p in parameters]
    first = torch.zeros(lin.num_parameters, dtype=torch.float64)
    second = torch.zeros_like(first)
    theta = lin.theta.double()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(snapshots):
        for x, y in _epoch(batches, generator):
            with pass_environment(x.device):
                f = lin.frozen.run(module, lin.packing.leaves(x)).reshape(len(x), -1)
                loss = _training_loss(f, y, classification)
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for p, m, g in zip(parameters, momenta, grads, strict=True):
                    m.mul_(0.9).add_(weight_decay * p if g is None else g + weight_decay * p)
                    p.sub_(lr * m)
        with torch.no_grad():
            moved = torch.cat([p.reshape(-1) for p in parameters]).double() - theta
        if not torch.isfinite(moved).all():
            raise ValueError(f"swag_lr: SGD with {lr} diverged; expected a smaller step")
        first += moved
        second += moved.square()
    return (second / snapshots - (first / snapshots).square()).clamp_min(0)


def _epoch(batches: Batches, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass in minibatches: tensors are shuffled, a loader has its own order."""
    if not batches.in_memory:
        yield from batches
        return
    x, y = batches.collect()
    for rows in torch.randperm(len(x), generator=generator).split(_BATCH):
        yield x[rows], y[rows]


def _training_loss(f: Tensor, y: Tensor, classification: bool) -> Tensor:
    if not classification:
        return (f - y.reshape(f.shape).to(f.dtype)).square().sum(-1).mean() / 2
    if f.shape[1] == 1:
        return torch.nn.functional.binary_cross_entropy_with_logits(f[:, 0], y.to(f.dtype))
    return torch.nn.functional.cross_entropy(f, y.long())
