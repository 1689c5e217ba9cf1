"""Products J V with many directions of parameter space, from what the layers saw and what came back to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntkgp.linearization.grams.factors import (
    Factors,
    Slot,
    arrange,
    build,
    interleaved,
    kept_bytes,
    pass_bytes,
)
from ntkgp.linearization.memory import require
from ntkgp.linearization.rules.terms import Lookup, Outer, Term

if TYPE_CHECKING:
    from ntkgp.linearization.network import LinearizedNetwork

# Numbers of rows that are formed at a time.
_PIECE = 2**23


def features(lin: LinearizedNetwork, x: Tensor, v: Tensor, budget: int, per_group: bool) -> Tensor:
    """See :meth:`ntkgp.LinearizedNetwork.features`."""
    c, plan = lin.num_outputs, lin.engine.plan
    if len(v) == 0:
        return torch.zeros(*([len(lin.groups)] if per_group else []), len(x), c, 0, dtype=lin.dtype, device=x.device)
    slots = arrange(lin, plan, set())
    parts = v.to(x.device, lin.dtype).split([p.numel() for p in lin.frozen.theta.values()], dim=1)
    directions = dict(zip(lin.frozen.theta, parts, strict=True))
    item, groups = torch.finfo(lin.dtype).bits // 8, len(lin.groups) if per_group else 1
    size = item * groups * len(x) * c * len(v)
    per_row = kept_bytes(lin, plan, slots, c) + _transient(lin, slots, len(v)) * item
    require(size + room_of_features(lin, len(v)), budget, f"{len(v)} features of {len(x)} inputs")
    out = torch.zeros(groups, len(x), c, len(v), dtype=lin.dtype, device=x.device)
    # A half for factors and what is made of them, a quarter for passes, a quarter for rows.
    rest = budget - size
    step, piece = max(1, min(rest // 2, 2**28) // per_row), min(_PIECE, rest // (8 * item))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        block: Factors = build(lin, plan, x[rows], slots, rest // 4)
        for slot, term in zip(slots, block.terms, strict=True):
            out[slot.group if per_group else 0, rows] += _product(slot, term, directions, piece)
    return out if per_group else out[0]


def room_of_features(lin: LinearizedNetwork, num_features: int) -> int:
    """Bytes besides the result without which not even one input can be handled."""
    plan, c, item = lin.engine.plan, lin.num_outputs, torch.finfo(lin.dtype).bits // 8
    slots = arrange(lin, plan, set())
    per_row = kept_bytes(lin, plan, slots, c) + _transient(lin, slots, num_features) * item
    return 4 * max(per_row, pass_bytes(lin, plan, c))


def _transient(lin: LinearizedNetwork, slots: Sequence[Slot], num_features: int) -> int:
    """Numbers per row that are made of a slot's factors."""
    c, sizes = lin.num_outputs, [0]
    for slot in slots:
        if slot.factored:
            shape = lin.engine.plan.known[slot.names[0]]
            seen, back = (shape.blocks * shape.positions * width for width in (shape.fan_in, shape.fan_out))
            pushed = num_features * shape.positions * shape.fan_out
            sizes.append(2 * (pushed + c * back + (seen if shape.kind == "outer" else 0)) + c * shape.fan_in)
        else:
            sizes.append(c * sum(lin.frozen.theta[name].numel() for name in slot.names))
    return max(sizes)


def _product(slot: Slot, term: Term, directions: dict[str, Tensor], piece: int) -> Tensor:
    """J V of one slot, shape (N, C, K)."""
    k = len(directions[slot.names[0]])
    if isinstance(term, Lookup):
        table = directions[slot.names[0]].view(k, term.size, -1)
        padded = torch.cat([table, torch.zeros_like(table[:, :1])], dim=1)  # an index of -1 reads the last
        read = padded[:, term.indices]  # shape: (K, N, T, O)
        return term.cotangents.flatten(2) @ read.permute(1, 2, 3, 0).flatten(1, 2).to(term.cotangents.dtype)
    if isinstance(term, Outer):
        return _outer_product(slot, term, directions, k, piece)
    rows, parts = term.dense(), [directions[name] for name in slot.names]
    v = interleaved(*parts) if slot.factored and len(parts) == 2 else torch.cat(parts, dim=1)
    return rows @ v.mT.to(rows.dtype)


def _outer_product(slot: Slot, term: Outer, directions: dict[str, Tensor], k: int, most: int) -> Tensor:
    a, g = term.left(), term.right()
    (n, c, r, o, t), i = g.shape, a.shape[2]
    weights = directions[slot.names[0]]
    weights = weights.reshape(k, r, -1, o).mT if term.swapped else weights.reshape(k, r, o, -1)
    if len(slot.names) == 2:
        weights = torch.cat([weights, directions[slot.names[1]].view(k, r, o, 1)], dim=-1)
    weights = weights.to(g.dtype)
    total = g.new_zeros(n, c, k)
    for block in range(r):
        w, back, seen = weights[:, block], g[:, :, block], a[:, block]
        if t * k * (i + c) <= c * i * (t + k):
            pushed = (seen.mT.reshape(n * t, i) @ w.reshape(k * o, i).mT).view(n, t, k, o)
            total += back.reshape(n, c, o * t) @ pushed.permute(0, 3, 1, 2).reshape(n, o * t, k)
            continue
        step = max(1, most // (n * c * i))
        for start in range(0, o, step):
            piece = back[:, :, start : start + step]
            rows = torch.bmm(piece.reshape(n, -1, t), seen.mT).view(n, c, -1)
            total += rows @ w[:, start : start + step].flatten(1).mT
    return total
