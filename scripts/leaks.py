"""Does anything grow? Public calls, a thousand times each: memory, files, threads, tensors, hooks.

    PYTHONPATH=. python scripts/leaks.py [--repetitions 1000] [--calls fit save ...] [--log FILE] [--out docs/results]

Each call is repeated in a process of its own, on a network with a normalised hidden layer and on data of other sizes
every time. After a quarter of the repetitions as warm-up, resident memory is read at forty places (the allocator having
given back what is free), and a line is fitted to it. Open files, threads, temporary files, live tensors, their bytes,
children of the process and hooks on the user's module are counted at the same places and must not be more at the end.
The exit status is 1 where a count has grown, or memory by more than 200 bytes and three standard errors a repetition.
What FILE, a CSV file, has already is not run again.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpytorch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from benchmarks.report import insert
from ntkgp import baselines
from ntkgp.checkpoint import Checkpoint
from ntkgp.evaluation.training import seeded
from ntkgp.evidence import one_pass, sampled_evidence
from tests.fuzzing.watch import resources

PAGE = "fuzzing.md"
PLACES = 40
GROWTH = 200.0  # bytes a repetition
DOUBLE = torch.float64
CALLS: dict[str, Callable[[nn.Module, int], Any]] = {}


class Broken(Exception):
    """Raised in the middle of a call."""


def call(function: Callable[[nn.Module, int], Any]) -> Callable[[nn.Module, int], Any]:
    CALLS[function.__name__] = function
    return function


def network(outputs: int = 2) -> nn.Sequential:
    with seeded(0):
        layers = [nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.Dropout(0.1), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(5, outputs)).double()


def data(repetition: int, labels: bool = False) -> tuple[Tensor, Tensor]:
    """Of 8 to 19 rows."""
    generator = torch.Generator().manual_seed(repetition)
    x = torch.randn(8 + repetition % 12, 3, generator=generator, dtype=DOUBLE)
    y = torch.stack([torch.sin(2 * x.sum(-1)), x[:, 0] * x[:, 1]], -1)
    return x, y.argmax(-1) if labels else y


def gaussian() -> gpytorch.likelihoods.Likelihood:
    return gpytorch.likelihoods.GaussianLikelihood().double()


def batches(x: Tensor, y: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=5)


def broken(x: Tensor, y: Tensor, after: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in range(len(x) // 2):
        if batch == after:
            raise Broken
        yield x[2 * batch : 2 * batch + 2], y[2 * batch : 2 * batch + 2]


class Raising:
    """Batches that end in an error."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return broken(self.x, self.y)

    def __len__(self) -> int:
        return len(self.x) // 2


@call
def passes(net: nn.Module, repetition: int) -> None:
    """Linearising, Grams in memory and on disk, products, factors."""
    x, _ = data(repetition)
    lin = ntkgp.LinearizedNetwork(net, x)
    stored = lin.symmetric_grams(x, storage="disk")
    stored.weighted_sum(torch.ones(len(lin.groups), dtype=DOUBLE))
    lin.weighted_gram(lin.factors(x), None, torch.ones(len(lin.groups), dtype=DOUBLE))
    lin.gram_diagonals(x)
    lin.jvp(x.requires_grad_(), lin.theta).sum().backward()
    lin.groups.verify(x)


@call
def exact(net: nn.Module, repetition: int) -> None:
    """Fit, evidence, prediction, draws and bounds, in data space and in weight space, conditioning."""
    x, y = data(repetition)
    form = ("dual", "primal")[repetition % 2]
    model = ntkgp.ExactNTKGP(x, y, gaussian(), ntkgp.LinearizedNetwork(net, x), form=form).eval()
    ntkgp.fit_evidence(model, max_evaluations=4)
    _ = model.likelihood(model(x[:3])).variance
    model.sample_functions(2, torch.Generator().manual_seed(0))(x)
    if form == "dual":
        model.posterior_bounds(x[:2], max_iterations=3)
    _ = model.condition_on_observations(x[:1], y[:1])(x[:2]).variance


@call
def predictions(net: nn.Module, repetition: int) -> None:
    """One model for all repetitions, asked at ever other numbers of inputs."""
    if not hasattr(net, "served"):
        x, y = data(11)
        model = ntkgp.ExactNTKGP(x, y, gaussian(), ntkgp.LinearizedNetwork(net, x)).eval()
        net.served = SimpleNamespace(model=model)
    model = net.served.model
    generator = torch.Generator().manual_seed(repetition)
    points = torch.randn(1 + 311 * repetition % 997, 3, generator=generator, dtype=DOUBLE)
    with torch.no_grad():
        _ = model(points).variance
    leaf = points[:2].clone().requires_grad_()
    model(leaf).variance.sum().backward()


@call
def classification(net: nn.Module, repetition: int) -> None:
    """Labels, all links."""
    x, y = data(repetition, labels=True)
    model = ntkgp.ExactNTKGP(x, y, ntkgp.CategoricalLikelihood(2), ntkgp.LinearizedNetwork(net, x)).eval()
    ntkgp.fit_evidence(model, max_evaluations=3)
    _ = model.likelihood(model(x[:3])).probs


@call
def nystrom(net: nn.Module, repetition: int) -> None:
    """Landmarks, one pass, evidence without a model."""
    x, y = data(repetition)
    lin = ntkgp.LinearizedNetwork(net, x)
    model = ntkgp.NystromNTKGP(batches(x, y), gaussian(), lin, num_landmarks=4).fit(progress=False)
    _ = model(x[:3]).variance
    ntkgp.fit_evidence(one_pass(lin, batches(x, y), gaussian(), num_landmarks=3), max_evaluations=3)


@call
def variational(net: nn.Module, repetition: int) -> None:
    """VaLLA, two steps."""
    x, y = data(repetition)
    lin = ntkgp.LinearizedNetwork(net, x)
    model = ntkgp.VariationalNTKGP(x[:3].clone(), gaussian(), lin, len(x), learn_inducing=repetition % 2 == 0)
    model.fit(batches(x, y), iterations=2, progress=False)
    _ = model(x[:3]).variance


@call
def streaming(net: nn.Module, repetition: int) -> None:
    """A loader in weight space, and sampled evidence."""
    x, y = data(repetition)
    lin = ntkgp.LinearizedNetwork(net, x)
    model = ntkgp.ExactNTKGP(batches(x, y), None, gaussian(), lin).eval()
    ntkgp.fit_evidence(model, max_evaluations=3)
    _ = model(x[:3]).variance
    sampled_evidence(lin, batches(x, y), gaussian(), 2, form=("dual", "weights")[repetition % 2], max_steps=2)


@call
def save(net: nn.Module, repetition: int) -> None:
    """Save, load, a checkpointed fit that goes on."""
    x, y = data(repetition)
    lin = ntkgp.LinearizedNetwork(net, x)
    with tempfile.TemporaryDirectory() as folder:
        model = ntkgp.NystromNTKGP((x, y), gaussian(), lin, num_landmarks=3).fit(progress=False)
        model.save(Path(folder) / "model")
        _ = ntkgp.load(Path(folder) / "model", net)(x[:2]).variance
        for evaluations in (2, 4):
            exact = ntkgp.ExactNTKGP(x, y, gaussian(), lin)
            kept = Checkpoint(Path(folder) / "run", every=0)
            ntkgp.fit_evidence(exact, max_evaluations=evaluations, checkpoint=kept)


@call
def compare(net: nn.Module, repetition: int) -> None:
    """Two methods that are functions, one of which fails."""
    x, y = data(repetition)

    def laplace(net: nn.Module, train: Any) -> Any:
        return baselines.Laplace(net, evidence=None).fit(train)

    def failing(net: nn.Module, train: Any) -> Any:
        raise Broken

    ntkgp.compare(net, (x, y), (x, y), {"laplace": laplace, "failing": failing}, isolate=False)


@call
def comparators(net: nn.Module, repetition: int) -> None:
    """Laplace in all structures, dropout, SWAG, variational Laplace."""
    x, y = data(repetition)
    structure = ("full", "diagonal", "kfac", "last_layer", "subnetwork")[repetition % 5]
    options = {"size": 5} if structure == "subnetwork" else {}
    found = baselines.Laplace(net, structure=structure, evidence=None, **options).fit((x, y))
    found.predict(x[:3])
    baselines.MCDropout(net, num_samples=2).fit((x, y)).predict(x[:3])
    baselines.SWAG(net, num_snapshots=2, rank=2, num_samples=2).fit((x, y)).predict(x[:3])
    baselines.VariationalLaplace(net, precision=1.0, noise=0.1, epochs=1).fit((x, y)).predict(x[:3])


@call
def errors(net: nn.Module, repetition: int) -> None:
    """Calls that end in an error half-way: of a loader, of the network, of a budget, of a checkpoint."""
    x, y = data(repetition)
    lin = ntkgp.LinearizedNetwork(net, x)

    def interrupted(*_: Any) -> None:
        raise Broken

    hook = net[2].register_forward_hook(interrupted)
    other = network()
    attempts: list[Callable[[], Any]] = [
        lambda: one_pass(lin, Raising(x, y), gaussian(), num_landmarks=3),
        lambda: ntkgp.NystromNTKGP(Raising(x, y), gaussian(), lin, num_landmarks=3).fit(progress=False),
        lambda: ntkgp.ExactNTKGP(Raising(x, y), None, gaussian(), lin).eval()(x),
        lambda: sampled_evidence(lin, Raising(x, y), gaussian(), 2, form="weights"),
        lambda: baselines.Laplace(other, structure="kfac").fit(Raising(x, y)),
        lambda: ntkgp.LinearizedNetwork(net, x),
        lambda: lin.grams(x, max_memory=1),
        lambda: lin.symmetric_grams(x, storage="disk", max_memory=1),
        lambda: lin(x.new_full((2, 3), float("nan"))),
        lambda: ntkgp.ExactNTKGP(x, y.new_full(y.shape, float("inf")), gaussian(), lin),
        lambda: ntkgp.load("nowhere", net),
        lambda: killed_checkpoint(lin, x, y),
    ]
    raised = 0
    for attempt in attempts:
        try:
            attempt()
        except (Broken, ValueError, TypeError, OSError, RuntimeError):
            raised += 1
    hook.remove()
    assert raised == len(attempts), f"{raised} of {len(attempts)} calls were refused"


def killed_checkpoint(lin: ntkgp.LinearizedNetwork, x: Tensor, y: Tensor) -> None:
    """A run that ends in an error with its checkpoint open."""
    with tempfile.TemporaryDirectory() as folder, Checkpoint(folder, every=0).run(data=x) as run:
        run.offer(lambda: {"x": x})
        raise Broken


def counts(net: nn.Module) -> dict[str, int]:
    """What must not grow, apart from resident memory."""
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in net.modules()
    )
    tasks = Path("/proc/self/task")
    children = sum(len((task / "children").read_text().split()) for task in tasks.iterdir()) if tasks.is_dir() else 0
    temporary = sum(1 for _ in Path(tempfile.gettempdir()).rglob("*"))
    return {**resources(), "hooks": hooks, "children": children, "temporary files": temporary}


def resident() -> int:
    """Bytes of resident memory, after the allocator has given back what is free."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(at: list[int], values: list[int]) -> tuple[float, float]:
    """Least-squares slope and its standard error."""
    x, y = torch.tensor(at, dtype=DOUBLE), torch.tensor(values, dtype=DOUBLE)
    x = x - x.mean()
    found = float(x @ y / x.square().sum())
    left = y - y.mean() - found * x
    return found, float((left.square().sum() / max(1, len(at) - 2) / x.square().sum()).sqrt())


def measure(name: str, repetitions: int, num_places: int = PLACES) -> dict[str, Any]:
    """Repeat a call and say what has grown: growth of counts, and slope of resident memory in bytes a repetition."""
    net, warm = network(), max(1, repetitions // 4)
    places = {warm + (repetitions - 1 - warm) * k // (num_places - 1) for k in range(num_places)}
    at: list[int] = []
    memory: list[int] = []
    before: dict[str, int] = {}
    started = time.process_time()
    for repetition in range(repetitions):
        CALLS[name](net, repetition)
        if repetition in places:
            for _ in range(3):  # caches of the last inputs hold the same ones at all places
                CALLS[name](net, 0)
            found = counts(net)
            before = before or found
            at.append(repetition)
            memory.append(resident())
    per_repetition, error = slope(at, memory)
    grown = {what: found[what] - before[what] for what in found if found[what] > before[what]}
    return {
        "call": name, "repetitions": repetitions, "slope": per_repetition, "error": error,
        "grown": ", ".join(f"{what} +{more}" for what, more in grown.items()),
        "resident": memory[-1], "seconds": time.process_time() - started,
    }  # fmt: skip


def leaks(row: dict[str, Any]) -> bool:
    return bool(row["grown"]) or float(row["slope"]) > GROWTH + 3 * float(row["error"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| call | repetitions | bytes a repetition | resident at the end | grown | CPU s |", "|---" * 6 + "|"]
    for row in rows:
        doc = (CALLS[row["call"]].__doc__ or "").strip().removesuffix(".")
        lines.append(
            f"| {row['call']}: {doc} | {row['repetitions']} | {float(row['slope']):.0f} ± {float(row['error']):.0f} | "
            f"{int(row['resident']) / 2**20:.0f} MiB | {row['grown'] or 'nothing'} | {float(row['seconds']):.0f} |"
        )
    return "\n".join(lines)


def read(log: Path | None, repetitions: int) -> dict[str, dict[str, Any]]:
    if log is None or not log.is_file():
        return {}
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["call"]: row for row in rows if int(row["repetitions"]) == repetitions}


def in_a_process(name: str, repetitions: int) -> dict[str, Any]:
    """The row of a call, measured by a fresh interpreter that has a folder for temporary files to itself."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", name, "--repetitions", str(repetitions)],
            env={**os.environ, "TMPDIR": folder}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000, help="of each call")
    parser.add_argument("--calls", nargs="+", choices=list(CALLS), default=list(CALLS), help="these calls only")
    parser.add_argument("--log", type=Path, help="a CSV file of all calls, from which an interrupted run goes on")
    parser.add_argument("--out", type=Path, help=f"a folder with {PAGE}, whose table is replaced")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(1)
        logging.getLogger("ntkgp").setLevel(logging.ERROR)
        print(json.dumps(measure(options.measure, options.repetitions)))
        return 0
    known, rows = read(options.log, options.repetitions), []
    for name in options.calls:
        row = known.get(name) or in_a_process(name, options.repetitions)
        if name not in known and options.log:
            new = not options.log.exists()
            with options.log.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if new:
                    writer.writeheader()
                writer.writerow(row)
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    if options.out:
        command = f"PYTHONPATH=. python scripts/leaks.py --repetitions {options.repetitions} --out docs/results"
        insert(options.out / PAGE, "leaks", f"    {command}\n\n{table(rows)}")
    return int(any(map(leaks, rows)))


if __name__ == "__main__":
    sys.exit(main())
