"""``ntkgp evidence``: evidence of any number of data from one pass over them, shared by the processes of torchrun."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ntkgp.baselines.protocol import likelihood_of
from ntkgp.checkpoint import plain
from ntkgp.cli.inputs import CommandData, CommandError, load_data, load_network, load_weights, network_dtype
from ntkgp.distributed import rank, world_size
from ntkgp.evaluation.training import seeded
from ntkgp.evidence import OnePassEvidence, fit_evidence, one_pass
from ntkgp.fingerprint import digest
from ntkgp.linearization import LinearizedNetwork


@dataclass(frozen=True)
class EvidenceOptions:
    """Arguments of ``ntkgp evidence``."""

    out: Path
    network: str | None = None
    weights: Path | None = None
    data: Path | None = None
    example: int | None = None
    likelihood: str = "auto"
    groups: str = "normalization"
    landmarks: int = 128
    features: int | None = None
    batch_size: int = 4096
    max_memory: str = "2GiB"
    seed: int = 0


@contextmanager
def processes() -> Iterator[None]:
    """The process group of ``torchrun`` where it has started this process; nothing where it has not."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_evidence(options: EvidenceOptions) -> OnePassEvidence:
    """
    Pass over the data once, fit precisions and noise, and write ``report.txt`` and ``evidence.pt``.

    States of the pass are kept in the folder ``checkpoint`` beside them: a command that was killed goes on where it
    was, by any number of processes.

    :param options: arguments of the command.
    :return: the evidence, with its hyper-parameters fitted.
    :raises CommandError: a mistake in the arguments or files.
    """
    net, data = _given(options)
    lin = LinearizedNetwork(net, data.x[: min(8, len(data.x))], groups=options.groups)
    likelihood = likelihood_of(data.kind, lin.num_outputs)
    start, cpu = time.perf_counter(), time.process_time()
    found = one_pass(
        lin, (lin.pack(data.x), data.y), likelihood, num_landmarks=options.landmarks, num_features=options.features,
        batch_size=options.batch_size, seed=options.seed, max_memory=options.max_memory,
        checkpoint=options.out / "checkpoint", progress=rank() == 0 and sys.stderr.isatty(),
    )  # fmt: skip
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    state = plain({"features": found.features.state(), "statistics": dict(vars(found.statistics))})
    report = fit_evidence(found)
    if rank() != 0:
        return found
    lines = [
        f"data         {len(data.x)} rows",
        f"network      {lin.num_parameters} parameters, {lin.num_outputs} outputs, {len(lin.groups)} groups",
        f"pass         {found.features.size} features, {world_size()} process{'es' * (world_size() > 1)}, "
        f"{seconds:.1f} s, {cpu:.1f} CPU s of the first",
        f"state        sha256 {digest(state)}",
        "",
        str(report),
    ]
    print("\n".join(lines))
    (options.out / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    torch.save({**state, "precision": report.precision, "noise": report.noise}, options.out / "evidence.pt")
    return found


def _given(options: EvidenceOptions) -> tuple[nn.Module, CommandData]:
    """The network and the data."""
    files = (options.network, options.weights, options.data)
    if options.example is not None:
        if any(part is not None for part in files):
            raise CommandError("--example: expected without --network, --weights and --data")
        return made_up(options.example)
    if options.network is None or options.weights is None or options.data is None:
        raise CommandError("--network, --weights, --data: expected all three, or --example ROWS")
    net = load_network(options.network)
    load_weights(net, options.weights)
    return net, load_data(options.data, options.likelihood, network_dtype(net))


def made_up(rows: int) -> tuple[nn.Module, CommandData]:
    """
    A network of random weights, three normalised hidden layers of 32, and a regression on 8 inputs.

    :raises CommandError: no row.
    """
    if rows < 1:
        raise CommandError(f"--example: expected a positive number of rows, got {rows}")
    with seeded(0):
        x = torch.randn(rows, 8)
        y: Tensor = (2.0 * x[:, :2]).sin().sum(-1) + 0.1 * torch.randn(rows)
        layers: list[nn.Module] = []
        for width in (8, 32, 32):
            layers += [nn.Linear(width, 32), nn.LayerNorm(32), nn.Tanh()]
        net = nn.Sequential(*layers, nn.Linear(32, 1))
    return net, CommandData(x, y, None, None, None, is_classification=False)
