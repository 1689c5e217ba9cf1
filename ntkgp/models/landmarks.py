"""Landmarks: which inputs stand for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import format_memory
from ntkgp.models.variational.inducing import kmeans_inducing_points

SELECTIONS = ("random", "balanced", "kmeans", "greedy")
# Candidates per landmark that k-means and the greedy choice look at.
_CANDIDATES = {"kmeans": 50, "greedy": 10}
_LEAST_CANDIDATES = 2000


def choose_landmarks(
    batches: Iterable[tuple[Tensor, Tensor]],
    lin: LinearizedNetwork,
    num_landmarks: int,
    selection: str | Any = "random",
    *,
    classification: bool = False,
    precision: Tensor | None = None,
    seed: int = 0,
    max_memory: int = 2**31,
) -> Tensor:
    """Choose M landmarks in one pass over the inputs; all inputs where there are no more than M.

    - ``"random"``: uniformly, without replacement.
    - ``"balanced"``: as many of every class, as far as they have them, the rest at random.
    - ``"kmeans"``: centres of k-means clusters of a random part of the data; for integer inputs, of which there are no
      means, the nearest data to them.
    - ``"greedy"``: pivoted Cholesky on a random part of the data: always the input of the largest remaining variance.
    - inputs as the network takes them, or packed: these.

    :param batches: pairs of packed inputs (B, D) and targets or labels.
    :param precision: of the kernel of the greedy choice, shape (G,); ones by default.
    :param seed: of every draw; the global random state is left alone.
    :return: packed, shape (M, D), float64.
    :raises ValueError: an unknown selection, M < 1, "balanced" without classes, NaN, or no gradients for "greedy".

    Cost: one pass over the inputs; "greedy" holds up to 10·M·M·C² numbers.
    """
    if not isinstance(selection, str):
        return lin.packing.pack(selection, "landmarks").detach().to(torch.float64).clone()
    if selection not in SELECTIONS:
        raise ValueError(f"landmarks: expected one of {SELECTIONS} or inputs, got {selection!r}")
    if isinstance(num_landmarks, bool) or not isinstance(num_landmarks, int) or num_landmarks < 1:
        raise ValueError(f"num_landmarks: expected a positive integer, got {num_landmarks!r}")
    if selection == "balanced" and not classification:
        raise ValueError("landmarks='balanced' needs class labels; use 'random' for a regression")
    generator = torch.Generator().manual_seed(seed)
    if selection == "balanced":
        return _balanced(batches, num_landmarks, generator)
    size = candidates_of(selection, num_landmarks)
    sample = _Reservoir(size, generator)
    for x, _ in batches:
        sample.add(x)
    rows = sample.rows()
    if len(rows) <= num_landmarks or selection == "random":
        return rows
    if selection == "greedy":
        return rows[_pivots(lin, rows, num_landmarks, precision, max_memory)]
    centres = kmeans_inducing_points(rows, num_landmarks, seed=seed)[0]
    if all(dtype.is_floating_point for dtype in lin.packing.dtypes):
        return centres
    nearest = torch.cat([torch.cdist(part, rows).argmin(-1) for part in centres.split(256)])
    return rows[nearest.unique()]


def candidates_of(selection: str, num_landmarks: int) -> int:
    """How many data a selection looks at, where there are as many."""
    return max(_CANDIDATES.get(selection, 1) * num_landmarks, _LEAST_CANDIDATES * (selection in _CANDIDATES))


class _Reservoir:
    """A uniform sample without replacement of rows that come in batches (smallest random keys)."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._size, self._generator = size, generator
        self._keys: Tensor | None = None
        self._rows: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Offer rows."""
        keys = torch.rand(len(x), generator=self._generator, dtype=torch.float64)
        if self._keys is None or self._rows is None:
            self._keys, self._rows = keys, x.detach().to(torch.float64)
        else:
            if len(self._keys) == self._size:
                better = keys < self._keys.max()
                keys, x = keys[better], x[better.to(x.device)]
            self._keys, self._rows = torch.cat([self._keys, keys]), torch.cat([self._rows, x.to(self._rows)])
        if len(self._keys) > self._size:
            kept = self._keys.topk(self._size, largest=False, sorted=False).indices.sort().values
            self._keys, self._rows = self._keys[kept], self._rows[kept.to(self._rows.device)]

    def rows(self) -> Tensor:
        """The sample in random order, so that its beginning is a sample too."""
        assert self._rows is not None
        assert self._keys is not None
        return self._rows[self._keys.argsort().to(self._rows.device)].clone()


def _balanced(batches: Iterable[tuple[Tensor, Tensor]], count: int, generator: torch.Generator) -> Tensor:
    """Equal numbers of every class; classes that have fewer leave their places to the others."""
    samples: dict[int, _Reservoir] = {}
    for x, y in batches:
        for label in y.unique().tolist():
            samples.setdefault(label, _Reservoir(count, generator)).add(x[y == label])
    left = {label: samples[label].rows() for label in sorted(samples)}
    chosen: list[Tensor] = []
    places = count
    for position, (_, rows) in enumerate(sorted(left.items(), key=lambda item: len(item[1]))):
        take = min(len(rows), -(-places // (len(left) - position)))
        chosen.append(rows[:take])
        places -= take
    return torch.cat(chosen)


def _pivots(lin: LinearizedNetwork, x: Tensor, count: int, precision: Tensor | None, max_memory: int) -> Tensor:
    """Indices of the inputs that a pivoted Cholesky factorisation by blocks of C outputs takes first."""
    c, groups = lin.num_outputs, len(lin.groups)
    variance = torch.ones(groups, dtype=torch.float64) if precision is None else precision.detach().reciprocal()
    needed = 8 * len(x) * c * count * c
    if needed > max_memory:
        raise ValueError(
            f"landmarks='greedy': the factor of {len(x)} candidates needs {format_memory(needed)} of max_memory = "
            f"{format_memory(max_memory)}; choose fewer landmarks or another selection"
        )
    with torch.no_grad():
        blocks = torch.einsum("g,gncd->ncd", variance.to(x), lin.gram_diagonals(x, max_memory=max_memory))
        residual = blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
        fits = lin.factors_memory(len(x)) <= max_memory // 2
        source = lin.factors(x, max_memory // 2) if fits else x
        factor = x.new_zeros(len(x) * c, 0)
        chosen: list[int] = []
        floor = 1e-12 * float(residual.max())
        while len(chosen) < count:
            best = int(residual.argmax())
            if float(residual[best]) <= floor:
                break
            chosen.append(best)
            rows = slice(best * c, best * c + c)
            column = lin.weighted_gram(source, x[best : best + 1], variance, max_memory) - factor @ factor[rows].mT
            values, vectors = torch.linalg.eigh(column[rows])
            keep = values > 1e-12 * values[-1]
            step = column @ (vectors[:, keep] / values[keep].sqrt())
            factor = torch.cat([factor, step], dim=-1)
            residual = residual - step.square().sum(-1).view(-1, c).sum(-1)
            residual[best] = -1.0
    if not chosen:
        raise ValueError("landmarks: the network's gradients are zero at all of the candidates")
    return torch.tensor(chosen, device=x.device)
