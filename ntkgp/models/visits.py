"""What a pass over the training data gathers in weight space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ntkgp.evidence.primal import DataSummary
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.statistics import RowTriangle, jacobian_rows, rows_at_a_time
from ntkgp.linearization.symmetric import SymmetricGrams
from ntkgp.models.batches import Batches
from ntkgp.models.dual import matrices_of_fit

_REPEATED = 1e-12


class Visits:
    """Passes over the training data in pieces that suit products with P columns.

    :param batches: the data.
    :param device: of the passes.
    :param max_memory: budget of a pass.
    :param keep: keep the rows J from the first whole pass on where they take no more than half of the budget.
    :param progress: show a progress bar for each pass.
    """

    def __init__(
        self,
        lin: LinearizedNetwork,
        batches: Batches,
        device: torch.device,
        max_memory: int,
        keep: bool,
        progress: bool,
    ) -> None:
        self._lin, self._batches, self._device, self._budget = lin, batches, device, max_memory
        self._keep, self._progress = keep, progress
        self._kept: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, as many at a time as rows are made at a time."""
        size = rows_at_a_time(self._lin, self._budget)
        held: list[tuple[Tensor, Tensor]] = []
        count = 0
        for x, y in tqdm(self._batches, desc="pass over the data", unit=" batches", disable=not self._progress):
            for a, b in zip(x.split(size), y.split(size), strict=True):
                if count + len(a) > size:
                    yield self._joined(held)
                    held, count = [], 0
                held.append((a, b))
                count += len(a)
        if held:
            yield self._joined(held)

    def _joined(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return tuple(torch.cat(column).to(self._device) for column in zip(*pairs, strict=True))  # type: ignore[return-value]

    def __call__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows J (B, C, P), network outputs (B, C) and targets of one pass."""
        if self._kept is not None:
            yield from self._kept
            return
        keep: list[tuple[Tensor, Tensor, Tensor]] | None = [] if self._keep else None
        held = 0
        for x, y in self.pieces():
            with torch.inference_mode(False), torch.no_grad():
                outputs = self._lin(x).to(torch.float64)
                if not torch.isfinite(outputs).all():
                    raise ValueError("train_data: the network's outputs are NaN or infinite for some of the inputs")
                found = jacobian_rows(self._lin, x, self._budget), outputs, y
            held += found[0].numel() * 8
            if keep is not None:
                keep = [*keep, found] if held <= self._budget // 2 else None
            yield found
        self._kept = keep


@dataclass(frozen=True)
class Summary:
    """Sums over a pass that need no targets' scale: what the report says of the data."""

    squares: Tensor
    signatures: list[Tensor]
    low: list[Tensor]
    high: list[Tensor]

    @classmethod
    def empty(cls, num_parameters: int, device: torch.device) -> Summary:
        """Of no data yet."""
        return cls(torch.zeros(num_parameters, dtype=torch.float64, device=device), [], [], [])

    def add(self, rows: Tensor, y: Tensor, probes: Tensor) -> None:
        """One piece of a pass."""
        self.squares.add_(rows.square().sum((0, 1)))
        self.signatures.append((rows @ probes).flatten(1))
        values = y.reshape(len(y), -1)
        self.low.append(values.amin(0))
        self.high.append(values.amax(0))

    def close(self, lin: LinearizedNetwork) -> DataSummary:
        """The summary of the whole pass."""
        signatures = torch.cat(self.signatures)
        n, c = len(signatures), lin.num_outputs
        constant = n > 1 and torch.equal(torch.stack(self.low).amin(0), torch.stack(self.high).amax(0))
        means = lin.groups.sum_per_group(self.squares) / (n * c)
        return DataSummary(n, c, means, constant, _repeated(signatures))


def _repeated(signatures: Tensor) -> int:
    """Rows that equal an earlier one, up to rounding."""
    ordered = signatures[signatures[:, 0].argsort()]
    same = ordered.diff(dim=0).abs() <= _REPEATED * signatures.abs().amax(0)
    return int(same.all(-1).sum())


def probes(num_parameters: int, device: torch.device) -> Tensor:
    """Two directions (P, 2) whose products with the rows tell inputs apart."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_parameters, 2, generator=generator, dtype=torch.float64).to(device)


class Collector:
    """A triangle for each kind of rows.

    :param kind: kind of every row, (N·C,), where `known`, else of the rows of one input, (C,).
    :param num_kinds: K.
    :param num_parameters: P.
    :param known: whether rows come in the order of `kind`.
    """

    def __init__(self, kind: Tensor, num_kinds: int, num_parameters: int, known: bool) -> None:
        self._kind, self._known = kind, known
        self._triangles = [RowTriangle(num_parameters) for _ in range(num_kinds)]

    def add(self, rows: Tensor, targets: Tensor, start: int) -> None:
        """Rows that follow `start` others."""
        if len(self._triangles) == 1:
            self._triangles[0].add(rows, targets)
            return
        kind = self._kind[start : start + len(rows)] if self._known else self._kind.repeat(len(rows) // len(self._kind))
        for k in kind.unique().tolist():
            chosen = kind == k
            self._triangles[k].add(rows[chosen], targets[chosen])

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Rows (n, P), targets (n,) and kinds (n,); numbers and squares of what they do not reach, (K,)."""
        parts = []
        counts = torch.zeros(len(self._triangles), dtype=torch.float64, device=self._kind.device)
        squares = torch.zeros_like(counts)
        for k in range(len(counts)):
            rows, targets, unreached, lost = self._triangles[k].result()
            self._triangles[k] = RowTriangle(0)
            parts.append((rows, targets, torch.full((len(rows),), k, device=rows.device)))
            counts[k], squares[k] = unreached, lost
        rows, targets, kind = (torch.cat(column) for column in zip(*parts, strict=True))
        return rows, targets, kind, counts, squares


def grams_of_rows(rows: Tensor, index: Tensor, num_groups: int, max_memory: int) -> SymmetricGrams:
    """Per-group Grams R_g R_gᵀ of rows (n, P), on disk where they do not fit. Cost: n²·P flops."""
    n = len(rows)
    fits = SymmetricGrams.size_of(num_groups, n) + matrices_of_fit(n) <= max_memory
    stack = SymmetricGrams(
        num_groups, n, device=rows.device, storage="memory" if fits or rows.device.type != "cpu" else "disk"
    )
    for g in range(num_groups):
        part = rows if num_groups == 1 else rows[:, index == g]
        for k, (a, b) in enumerate(stack.bounds):
            torch.mm(part[a:b], part[:b].mT, out=stack.strip(g, k))
    return stack
