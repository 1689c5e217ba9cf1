"""What takes part in a comparison of Grams: ntkgp in its variants, the peers, and a float64 reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

import ntkgp
from benchmarks import jax_peer, peers
from benchmarks.nets import make
from benchmarks.timing import Cost, measure, peak_memory, reset_peak


@dataclass(frozen=True)
class Cell:
    """One network with N samples, and how it is run: the same for all methods of a comparison."""

    net: str
    samples: int
    threads: int = 1
    budget: int = 2 * 2**30
    device: str = "cpu"
    jax_python: str | None = None

    @property
    def label(self) -> str:
        """For example ``b 64``."""
        return f"{self.net} {self.samples}"


@dataclass(frozen=True)
class Variant:
    """A call of ``LinearizedNetwork.grams``: the dtype of the products (passes are float32) and the groups."""

    dtype: torch.dtype
    groups: str


OURS = {
    "ntkgp float32": Variant(torch.float32, "single"),
    "ntkgp": Variant(torch.float64, "single"),
    "ntkgp float32, by layer": Variant(torch.float32, "layer"),
    "ntkgp, by layer": Variant(torch.float64, "layer"),
}

METHODS = (*OURS, *peers.PEERS, jax_peer.NAME)


class Unavailable(RuntimeError):
    """A method that cannot run here; the message says why."""


class Contender(Protocol):
    """A method bound to a network and its inputs."""

    def run(self) -> Cost:
        """One evaluation."""

    def run_with_peak(self) -> tuple[Cost, int | None]:
        """One evaluation, and the growth of peak memory by it, in bytes."""

    def kernel(self) -> Tensor:
        """The kernel (N, C, N, C) of the last evaluation, which is then forgotten."""

    def forget(self) -> None:
        """Free the last result."""

    def close(self) -> None:
        """Free everything."""


class InProcess:
    """A method that runs in this process."""

    def __init__(self, compute: Callable[[], Tensor], num_outputs: int, device: str) -> None:
        self._compute, self._num_outputs, self._device = compute, num_outputs, torch.device(device)
        self._last: Tensor | None = None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def run(self) -> Cost:
        """One evaluation; what the one before returned is freed first."""
        self._last = None
        cost, value = measure(self._compute, self._synchronize)
        assert isinstance(value, Tensor)
        self._last = value
        return cost

    def run_with_peak(self) -> tuple[Cost, int | None]:
        """One evaluation, and the growth of resident (on a GPU: allocated) memory by it."""
        self._last = None
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            cost = self.run()
            return cost, torch.cuda.max_memory_allocated(self._device) - before
        start = reset_peak()
        cost = self.run()
        peak = peak_memory()
        return cost, None if start is None or peak is None else peak - start

    def kernel(self) -> Tensor:
        """The last kernel; Grams of groups are summed."""
        assert self._last is not None
        value, self._last = self._last, None
        if value.ndim == 4:
            return value
        # shape: (G, N·C, N·C)
        rows = value.shape[-1] // self._num_outputs
        return value.sum(0).reshape(rows, self._num_outputs, rows, self._num_outputs)

    def forget(self) -> None:
        """Free the last result."""
        self._last = None

    def close(self) -> None:
        """Free the last result; nothing else is held."""
        self.forget()


class InWorker:
    """neural-tangents, which runs in a process of its own."""

    def __init__(self, worker: jax_peer.NeuralTangents) -> None:
        self._worker = worker
        self.run, self.run_with_peak = worker.run, worker.run_with_peak
        self.kernel, self.close = worker.kernel, worker.close

    def forget(self) -> None:
        """Nothing to free: the worker hands back clock readings only."""


def unavailable(method: str, cell: Cell) -> str:
    """Why a method cannot run here; "" if it can."""
    if method == jax_peer.NAME:
        return "no --jax-python given" if cell.jax_python is None else ""
    missing = peers.PEERS[method].missing() if method in peers.PEERS else ()
    return f"not installed: {', '.join(missing)}" if missing else ""


def contender(method: str, cell: Cell, samples: int | None = None) -> Contender:
    """A method bound to the float32 network and the inputs of a cell (or to fewer of them, to warm up).

    :raises Unavailable: a package or an argument that it needs is missing.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    reason = unavailable(method, cell)
    if reason:
        raise Unavailable(reason)
    net, x = make(cell.net, cell.samples)
    x = x[:samples]
    if method == jax_peer.NAME:
        assert cell.jax_python is not None
        return InWorker(jax_peer.NeuralTangents(cell.jax_python, cell.net, net, x, cell.threads))
    net, x = copy.deepcopy(net).to(cell.device), x.to(cell.device)
    with torch.no_grad():
        outputs = net(x[:1]).numel()
    if method in OURS:
        return InProcess(_ours(OURS[method], net, x, cell), outputs, cell.device)
    return InProcess(lambda: peers.run_peer(method, net, x, cell.budget), outputs, cell.device)


def _ours(variant: Variant, net: nn.Module, x: Tensor, cell: Cell) -> Callable[[], Tensor]:
    lin = ntkgp.LinearizedNetwork(net, x[:2], groups=variant.groups)
    size = len(lin.groups.names) * (len(x) * lin.num_outputs) ** 2 * torch.finfo(variant.dtype).bits // 8
    # The result counts against the budget, which must leave room beside a large one.
    max_memory = max(cell.budget, 2 * size)
    return lambda: lin.grams(x, max_memory=max_memory, dtype=variant.dtype)


@dataclass(frozen=True)
class Reference:
    """The float64 kernel of up to 4 samples and 16 outputs of each, by ``torch.func`` Jacobians."""

    rows: Tensor
    outputs: Tensor
    values: Tensor

    @classmethod
    def of(cls, cell: Cell) -> Reference:
        """The entries that are compared, spread over samples and outputs."""
        net, x = make(cell.net, cell.samples, torch.float64)
        with torch.no_grad():
            size = net(x[:1]).numel()
        rows = torch.linspace(0, cell.samples - 1, min(4, cell.samples)).round().long()
        outputs = torch.linspace(0, size - 1, min(16, size)).round().long()
        jacobians = peers.jacobian_rows(net, x[rows], outputs=outputs)
        return cls(rows, outputs, peers.contract(jacobians, jacobians))

    def error(self, kernel: Tensor) -> float:
        """max|K − R| / max|R| over the compared entries."""
        index = (self.rows[:, None, None, None], self.outputs[:, None, None], self.rows[:, None], self.outputs)
        picked = kernel[tuple(i.to(kernel.device) for i in index)].to("cpu", torch.float64)
        return float((picked - self.values).abs().max() / self.values.abs().max())


def flop_counts(cell: Cell) -> dict[str, float]:
    """FLOPs of a cell by ``lin.explain``: ``limit``, ``chosen``, and ``passes`` (the part both share)."""
    net, x = make(cell.net, cell.samples)
    explanation = ntkgp.LinearizedNetwork(net, x[:2], groups="single").explain(cell.samples)
    return {"limit": explanation.flop_limit, "chosen": explanation.flops, "passes": explanation.passes}
