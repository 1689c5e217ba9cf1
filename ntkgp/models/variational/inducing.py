"""Where inducing inputs come from, and what may be one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ntkgp.linearization import LinearizedNetwork

_ROUNDS = 25
_DISTANCES = 2**24  # numbers held at once


def kmeans_inducing_points(
    x: Tensor, num_inducing: int, labels: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """
    Inducing inputs as the centres of k-means clusters, each class on its own where labels are given.

    Starts from distinct rows drawn at random and runs Lloyd's iterations; a cluster that loses all its points keeps its
    centre. The result is no row of x in general: integer inputs need rows (``x[torch.randperm(len(x))[:M]]``).

    :param x: packed inputs, shape (N, D), M ≤ N.
    :param num_inducing: M ≥ 1.
    :param labels: classes, shape (N,); every class gets M/C centres, the first ones the rest.
    :param seed: of the draw; the global random state is left alone.
    :return: centres (M, D) in float64 and, with labels, the class of each (M,), else None.
    :raises ValueError: shapes that do not fit, M out of range, a class with fewer rows than centres.

    Cost: O(N·M·D) per iteration, at most 25 of them.

    >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    >>> kmeans_inducing_points(x, 2)[0].flatten().sort().values
    tensor([0.0500, 5.0500], dtype=torch.float64)
    """
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        raise ValueError("x: expected packed floating-point inputs of shape (N, D); see lin.pack")
    if isinstance(num_inducing, bool) or not isinstance(num_inducing, int) or not 1 <= num_inducing <= len(x):
        raise ValueError(f"num_inducing: expected an integer from 1 to N = {len(x)}, got {num_inducing!r}")
    rows = x.detach().to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    if labels is None:
        return _lloyd(rows, num_inducing, generator), None
    if not isinstance(labels, Tensor) or labels.shape != x.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels: expected integers of shape ({len(x)},)")
    classes = labels.unique().tolist()
    shares = [num_inducing // len(classes) + (i < num_inducing % len(classes)) for i in range(len(classes))]
    centres, index = [], []
    for value, share in zip(classes, shares, strict=True):
        members = rows[labels == value]
        if share > len(members):
            raise ValueError(f"num_inducing: class {value} has {len(members)} rows, fewer than its {share} centres")
        if share:
            centres.append(_lloyd(members, share, generator))
            index += [value] * share
    return torch.cat(centres), torch.tensor(index, device=x.device)


def _lloyd(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Lloyd's iterations from `count` random rows."""
    centres = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)].clone()
    assigned = None
    for _ in range(_ROUNDS):
        now = torch.cat([_nearest(part, centres) for part in rows.split(max(1, _DISTANCES // count))])
        if assigned is not None and torch.equal(now, assigned):
            break
        assigned = now
        sums = torch.zeros_like(centres).index_add_(0, now, rows)
        sizes = torch.bincount(now, minlength=count).unsqueeze(-1)
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return centres


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(-1) - 2 * rows @ centres.mT).argmin(-1)


def checked_inducing_points(lin: LinearizedNetwork, points: Any, learned: bool) -> Tensor:
    """Inducing inputs packed in float64, (M, D), a copy.

    :raises ValueError: none at all, NaN, or integer inputs that are to be learned.
    """
    packing = lin.packing
    if learned and any(not dtype.is_floating_point for dtype in packing.dtypes):
        raise ValueError(
            "learn_inducing=True: the network takes integer inputs, which have no gradient; pass rows of the data as "
            "inducing_points with learn_inducing=False"
        )
    if isinstance(points, Tensor) and points.ndim == 1 and packing.width == 1 and not packing.is_raw(points):
        points = points.unsqueeze(-1)
    return packing.pack(points, "inducing_points").detach().to(torch.float64).clone()


def checked_output_index(lin: LinearizedNetwork, index: Any, num_points: int) -> Tensor | None:
    """One output per inducing point as int64 (M,), or None for all outputs of every point."""
    if index is None:
        return None
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool or index.is_complex():
        raise TypeError("output_index: expected None (all outputs of every point) or a tensor of integers")
    if index.shape != (num_points,):
        raise ValueError(f"output_index: expected shape ({num_points},), got {tuple(index.shape)}")
    index = index.detach().to(torch.int64)
    if int(index.min()) < 0 or int(index.max()) >= lin.num_outputs:
        raise ValueError(
            f"output_index: expected values 0 … {lin.num_outputs - 1}, got {int(index.min())} … {int(index.max())}"
        )
    return index.clone()
