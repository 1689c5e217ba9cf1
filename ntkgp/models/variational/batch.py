"""The objective of one batch and its gradient, by one process or shared by many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkgp.distributed import Shards, alone, ordered_sum, rank, world_size

if TYPE_CHECKING:
    from ntkgp.models.variational import VariationalNTKGP


def shared_gradient(model: VariationalNTKGP, x: Tensor, y: Tensor, learned: list[Tensor]) -> float:
    """Value of the objective of a batch, and minus its gradient per data point in ``grad`` of what is learned.

    The ranks of a process group share the rows; gradients are added in the order of the ranks, and equal on all.
    """
    if world_size() == 1 or len(x) < world_size():
        value = batch_objective(model, x, y)
        (-value / model.num_data).backward()
        return float(value.detach())
    rows = Shards(len(x), world_size())
    first, stop = rows.bounds(rank())
    model.objective.share = first, len(x)
    try:
        with alone():
            value = batch_objective(model, x[first:stop], y[first:stop], len(x), priced=first == 0)
            (-value / model.num_data).backward()
    finally:
        model.objective.share = None
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
    own = torch.cat([value.detach().reshape(1), *(part.flatten() for part in parts)])
    total = ordered_sum({rank(): own}, rows)
    for parameter, part in zip(learned, total[1:].split([p.numel() for p in learned]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
    return float(total[0])


def batch_objective(
    model: VariationalNTKGP, x: Tensor, y: Tensor, rows: int | None = None, priced: bool = True
) -> Tensor:
    """Unbiased estimate of the objective of all data, with a graph to what is learned.

    :param rows: of the batch, where x and y are a part of it.
    :param priced: whether the divergence from the prior is in it, which one of the parts has.

    With learned hyper-parameters a second process of the same covariance, whose mean is free and pays ½ aᵀK_Z a, is
    fitted to the same data: it ties the kernel's scale and the noise to them (Ortega et al. 2024b).
    """
    strategy = model.variational_strategy
    found, cross = strategy.reduction(), strategy.cross(x)
    root, scale = cross @ found.root, model.num_data / (rows or len(x))
    value = scale * model.objective.terms(model, x, y, root, None).sum() - priced * found.kl
    if not model.learn_hyperparameters:
        return value
    mean = model.prior_mean(x) + (cross @ model.dual_mean).reshape(len(x), -1)
    price = 0.5 * model.dual_mean @ found.gram @ model.dual_mean
    return value + scale * model.objective.terms(model, x, y, root, mean).sum() - priced * (found.kl + price)
