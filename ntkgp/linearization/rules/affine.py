"""y = γ ∘ x̂ + β: what the rules of all normalizations share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ntkgp.linearization.rules.terms import Rows, Term


def affine_terms(layer: nn.Module, normalized: Tensor, cotangents: Tensor, over: int) -> dict[str, Term]:
    """J_γ = Σ g ∘ x̂ and J_β = Σ g, of those of the two that the layer has.

    :param normalized: x̂, shape (N, A, B).
    :param cotangents: g, shape (N, K, A, B).
    :param over: the dimension of g that is summed over, 2 or 3.
    """
    found: dict[str, Term] = {}
    if getattr(layer, "weight", None) is not None:
        found["weight"] = Rows(_sum_of_products(cotangents, normalized, over))
    if getattr(layer, "bias", None) is not None:
        found["bias"] = Rows(cotangents.sum(over))
    return found


def _sum_of_products(g: Tensor, x: Tensor, over: int) -> Tensor:
    """Σ g ∘ x in blocks: a product of the size of g would cost more than everything else."""
    k, each = g.shape[1], max(1, g[:1, :1].numel())
    block = max(1, (2**20 if g.device.type == "cpu" else 2**24) // each)
    if g.shape[0] * k <= block:
        return (g * x.unsqueeze(1)).sum(over)
    rows = max(1, block // k)
    found = []
    for cotangents, factor in zip(g.split(rows), x.unsqueeze(1).split(rows), strict=True):
        found.append(torch.cat([(part * factor).sum(over) for part in cotangents.split(block, dim=1)], dim=1))
    return torch.cat(found)
