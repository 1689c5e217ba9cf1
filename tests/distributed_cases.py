"""Runs by 1, 2 and 4 processes: ``python -m tests.distributed_cases FOLDER`` forks them after one import."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpytorch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkgp
from ntkgp.checkpoint import Checkpoint
from ntkgp.cli import main
from ntkgp.distributed import Shards, broadcast_object, gather_rows, ordered_sum, rank, symmetric_tiles, world_size
from ntkgp.evidence import one_pass, sampled_evidence
from ntkgp.evidence.probes import DualProbes, Settings
from ntkgp.fingerprint import digest
from ntkgp.kernels import NeuralTangentKernel
from ntkgp.means import NetworkMean
from ntkgp.solvers import sharded, solve

# Zero is one process without a process group.
WORLDS = (0, 1, 2, 4)
DOUBLE = torch.float64


def problem() -> tuple[ntkgp.LinearizedNetwork, Tensor, Tensor]:
    """Law E1: N = 512, P = 745, 4-24-24-1 tanh; three right-hand sides."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
        x, b = torch.randn(512, 4, dtype=DOUBLE), torch.randn(512, 3, dtype=DOUBLE)
    return ntkgp.LinearizedNetwork(net, x, groups="single"), x, b


def deep(
    outputs: int, rows: int = 150, dtype: torch.dtype = torch.float32, groups: str = "normalization"
) -> tuple[ntkgp.LinearizedNetwork, Tensor, Tensor]:
    """Three normalised hidden layers; targets (N, C), or labels where there are three outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for width in (3, 8, 8):
            layers += [nn.Linear(width, 8), nn.LayerNorm(8), nn.Tanh()]
        net, x = nn.Sequential(*layers, nn.Linear(8, outputs)).to(dtype), torch.randn(rows, 3).to(dtype)
    y = torch.stack([torch.sin(2 * x.sum(-1) + c) for c in range(outputs)], -1)
    return ntkgp.LinearizedNetwork(net, x, groups=groups), x, y.argmax(-1) if outputs == 3 else y.squeeze(-1)


def reductions(_: Path) -> dict[str, Any]:
    """Law E1: accumulator, Gram and 60 unconverged steps of CG in data space and in weight space."""
    lin, x, b = problem()
    shards = Shards(len(x), 8)
    z = x[:: len(x) // 16]
    rows = {s: lin.jacobian(shards.rows(x, s)).flatten(0, 1) for s in shards.own()}
    landmarks = lin.jacobian(z).flatten(0, 1)
    features = {s: rows[s] @ landmarks.mT for s in rows}
    accumulator = ordered_sum({s: f.mT @ f for s, f in features.items()}, shards)

    def tile(s: int, t: int) -> Tensor:
        return lin.grams(shards.rows(x, s), None if s == t else shards.rows(x, t))[0]

    gram = symmetric_tiles(tile, shards)

    def dual(v: Tensor) -> Tensor:
        return gather_rows({s: shards.rows(gram, s) @ v + 1e-4 * shards.rows(v, s) for s in shards.own()}, shards)

    def primal(v: Tensor, fast: bool = False) -> Tensor:
        return ordered_sum({s: rows[s].mT @ (rows[s] @ v) for s in rows}, shards, fast) + 1e-4 * v

    rhs = ordered_sum({s: rows[s].mT @ shards.rows(b, s) for s in rows}, shards)
    options: dict[str, Any] = {"tolerance": 1e-14, "max_iterations": 60}
    return {
        "accumulator": accumulator,
        "gram": gram,
        "dual": solve(dual, b, **options).solution,
        "primal": solve(primal, rhs, **options).solution,
        "fast": solve(lambda v: primal(v, True), rhs, **options).solution,
    }


def passed(folder: Path | None) -> dict[str, Any]:
    """One pass over a shuffled loader of 75 batches, two outputs with a noise each, and its evidence."""
    lin, x, y = deep(2, dtype=DOUBLE)
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(2, has_global_noise=False)
    torch.manual_seed(rank())
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    kept = None if folder is None else Checkpoint(folder, every=0, keep_last=1000)
    found = one_pass(lin, loader, likelihood, num_landmarks=9, checkpoint=kept)
    report = ntkgp.fit_evidence(found)
    directions = found.features.pull(torch.eye(found.features.size, dtype=DOUBLE))
    return {
        **vars(found.statistics), "evidence": report.log_evidence, "precision": report.precision,
        "directions": directions,
    }  # fmt: skip


def one_pass_case(folder: Path) -> dict[str, Any]:
    return passed(folder / f"kept-{world_size()}" if dist.is_initialized() else None)


def resumed_case(folder: Path) -> dict[str, Any]:
    """The pass from the middle of what other numbers of processes had kept."""
    found: dict[str, Any] = {}
    for origin in WORLDS[1:]:
        own = folder / f"resumed-{origin}-{world_size()}"
        if rank() == 0:
            states = Checkpoint(folder / f"kept-{origin}").files()
            own.mkdir()
            # In the middle of a shard, where one process wrote it.
            shutil.copy(states[len(states) // 2], own)
            found[f"seen-{origin}"] = torch.load(own / states[len(states) // 2].name)["state"]["seen"].sum()
        found |= {f"{name}-{origin}": value for name, value in passed(own).items()}
    return found


def refused_case(folder: Path) -> dict[str, Any]:
    """What the ranks are told that were given different rows, order or networks."""
    found: dict[str, Any] = {"data": "", "order": "", "network": "", "sampled": "", "folder": ""}
    if world_size() == 1:
        return found
    lin, x, y = deep(1)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    loader = DataLoader(TensorDataset(x.flip(0) if rank() else x, y.flip(0) if rank() else y), batch_size=8)
    other, options = deep(1)[0], {"landmarks": x[:9]}
    if rank():
        with torch.no_grad():
            other = ntkgp.LinearizedNetwork(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), x)
    for name, call in {
        "data": lambda: one_pass(lin, (x + rank(), y), likelihood, **options),
        "order": lambda: one_pass(lin, loader, likelihood, **options),
        "network": lambda: one_pass(other, (x, y), likelihood, **options),
        "sampled": lambda: sampled_evidence(other, (x, y), likelihood, 2),
        "folder": lambda: one_pass(lin, (x, y), likelihood, checkpoint=folder / f"apart-{rank()}", **options),
    }.items():
        try:
            call()
        except ValueError as reason:
            found[name] = str(reason)
    return found


def ella_case(_: Path) -> dict[str, Any]:
    """ELLA of a classifier with mixed landmarks, 19 batches."""
    lin, x, y = deep(3)
    model = ntkgp.NystromNTKGP(
        (x, y), ntkgp.CategoricalLikelihood(3), lin, num_landmarks=12, num_features=6, batch_size=8
    )
    report = ntkgp.fit_evidence(model.fit(progress=False))
    validated = ntkgp.NystromNTKGP(
        (x, y), ntkgp.CategoricalLikelihood(3), lin, num_landmarks=12, num_features=6, batch_size=8
    ).fit(progress=False, validation=(x[:20], y[:20]), search_frequency=30)
    return {
        **vars(model.statistics), "evidence": report.log_evidence, "precision": report.precision,
        "covariance": model(x[:5]).covariance_matrix.detach(), "validated": validated.statistics.second,
    }  # fmt: skip


def sampled_case(_: Path) -> dict[str, Any]:
    """A step of the sampled evidence in weight space by CG that has not converged: regression, and a softmax."""
    found: dict[str, Any] = {}
    for outputs, likelihood in ((1, gpytorch.likelihoods.GaussianLikelihood()), (3, ntkgp.CategoricalLikelihood(3))):
        lin, x, y = deep(outputs, 60, groups="single")
        run = sampled_evidence(lin, (x, y), likelihood, 2, form="weights", batch_size=8, max_steps=1, max_iterations=5)
        for name in ("precision", "noise", "samples", "theta_star", "log_precision_error"):
            found[f"{name}-{outputs}"] = getattr(run, name)
    return found


def dual_case(_: Path) -> dict[str, Any]:
    """The sampled evidence in data space by kept rows, and a step of a softmax's by passes; CG has not converged."""
    sharded._SHARDS, before = 4, sharded._SHARDS  # of the passes, which take a time each
    lin, x, labels = deep(3, 342, DOUBLE, "single")
    run = sampled_evidence(
        lin, (x, torch.sin(2 * x)), gpytorch.likelihoods.GaussianLikelihood(), 2, form="dual", num_landmarks=8,
        max_steps=1, max_iterations=4, bounds=False,
    )  # fmt: skip
    probes = DualProbes(lin, x, labels, None, Settings(2, 8, 1e-6, 2, 2**19, 0, "quadratic"))
    if dist.is_initialized():
        assert isinstance(probes.gram, sharded.SharedGram)
        assert not probes.gram.is_kept
    step = probes(torch.ones(1, dtype=DOUBLE), torch.empty(0, dtype=DOUBLE))
    sharded._SHARDS = before
    return {
        **{name: getattr(run, name) for name in ("precision", "noise", "samples", "theta_star", "log_noise_error")},
        "passes: draws": step.draws, "passes: mode": step.theta_star, "passes: traces": step.traces,
    }  # fmt: skip


def variational_case(_: Path) -> dict[str, Any]:
    """VaLLA by minibatches and by Monte Carlo on the likelihood, two epochs of four steps."""
    lin, x, y = deep(3, 60, DOUBLE)
    model = ntkgp.VariationalNTKGP(x[:6].clone(), ntkgp.CategoricalLikelihood(3), lin, len(x), objective=0.5)
    model.fit((x, y), epochs=2, batch_size=15, evidence=None, progress=False)
    return {"root": model.variational_strategy.variational_root.detach(), "points": model.inducing_points.detach()}


class StockGP(gpytorch.models.ApproximateGP):
    """GPyTorch's own strategy around the network, 16 inducing inputs; it is initialised at the first forward pass."""

    def __init__(self, lin: ntkgp.LinearizedNetwork, points: Tensor) -> None:
        strategy = gpytorch.variational.VariationalStrategy(
            self, points, gpytorch.variational.CholeskyVariationalDistribution(len(points)).double()
        )
        super().__init__(strategy)
        self.mean, self.kernel = NetworkMean(lin), NeuralTangentKernel(lin)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


class Loss(nn.Module):
    """Minus the ELBO of a batch, as DDP wants it: in one forward pass."""

    def __init__(self, model: Any, likelihood: Any, num_data: int) -> None:
        super().__init__()
        self.model, self.likelihood = model, likelihood
        self.elbo = gpytorch.mlls.VariationalELBO(likelihood, model, num_data)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.elbo(self.model(x), y)


def five_steps(kind: str, initialised: bool) -> dict[str, Tensor]:
    """Law E2: five steps of Adam by DDP on a global batch of 64."""
    lin, x, y = problem()
    y = y[:, 0]
    torch.manual_seed(rank())
    points = x[::32].clone()
    if kind == "own":
        model: Any = ntkgp.VariationalNTKGP(points, gpytorch.likelihoods.GaussianLikelihood(), lin, len(x))
        likelihood = model.likelihood
    else:
        model, likelihood = StockGP(lin, points).double(), gpytorch.likelihoods.GaussianLikelihood().double()
    model.train()
    if initialised:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model(x[:2])
    loss: nn.Module = Loss(model, likelihood, len(x))
    if dist.is_initialized():
        loss = nn.parallel.DistributedDataParallel(loss)
    learned = [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=0.01)
    for step in range(5):
        rows = torch.arange(64 * step, 64 * (step + 1))[rank() :: world_size()]
        optimizer.zero_grad()
        loss(x[rows], y[rows]).backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def ddp_case(_: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, kind, initialised in (("own", "own", False), ("stock", "stock", True), ("raw", "stock", False)):
        found |= {f"{label}: {name}": value for name, value in five_steps(kind, initialised).items()}
    return found


def gram_rows(lin: ntkgp.LinearizedNetwork, x: Tensor) -> Any:
    """The Gram as a DTensor of its rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    shards = Shards(len(x), world_size())
    rows = lin.grams(shards.rows(x, rank()), x)[0]
    return DTensor.from_local(rows, init_device_mesh("cpu", (world_size(),)), [Shard(0)])


def stored_case(folder: Path) -> dict[str, Any]:
    """Law E4: a Gram sharded by rows and a counter, saved by two processes, loaded by one and by four."""
    from torch.distributed import checkpoint as dcp

    lin, x, _ = problem()
    gram = gram_rows(lin, x)
    state = {"gram": gram, "step": torch.tensor(7)}
    if world_size() == 2:
        dcp.save(state, checkpoint_id=folder / "gram")
    else:
        state = {"gram": torch.zeros_like(gram), "step": torch.tensor(0)}
        dcp.load(state, checkpoint_id=folder / "gram")
    return {"gram": state["gram"].full_tensor(), "step": state["step"]}


def compare_case(folder: Path) -> dict[str, Any]:
    """Methods over the ranks; one of them had been computed before, one fails."""
    _, x, y = deep(1, 40)
    kept = folder / f"methods-{world_size()}"
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def fails(net: nn.Module, data: Any) -> Any:
        raise RuntimeError("this one fails")

    if rank() == 0:
        with ntkgp.distributed.alone():
            ntkgp.compare(net, (x, y), (x, y), ["network"], isolate=False, folder=kept)
    if world_size() > 1:
        dist.barrier()
    methods = {"network": "network", "diagonal": "laplace-diagonal", "broken": fails, "gp": "gp"}
    found = ntkgp.compare(net, (x, y), (x, y), methods, isolate=False, folder=kept)
    scores = {row.method: row.scores.get("nll", 0.0) for row in found.rows}
    return {"methods": found.methods, **scores, "failure": found["broken"].failure, "files": len(list(kept.iterdir()))}


def gram_case(_: Path) -> dict[str, Any]:
    """Grams behind ``lin.grams`` and in symmetric storage, 1,200 rows: digests, and a corner to look at."""
    lin, x, _ = deep(2, 600)
    grams, stack = lin.grams(x), lin.symmetric_grams(x)
    dense = torch.stack([stack.dense(g) for g in range(len(grams))])
    return {
        "dense": digest(grams),
        "stored": digest(dense),
        "corner": grams[:, -70:, :70],
        "same": torch.equal(grams, dense),
    }


def command_case(folder: Path) -> dict[str, Any]:
    """``ntkgp evidence`` on made-up data; what it says of its sums."""
    out = folder / f"command-{world_size()}"
    code = main(["evidence", "--example", "200", "--landmarks", "5", "--batch-size", "16", "--out", str(out)])
    said = (out / "report.txt").read_text() if rank() == 0 else ""
    return {"code": code, "state": broadcast_object(said).partition("sha256 ")[2].split()[0]}


FIRST: dict[str, Callable[[Path], dict[str, Any]]] = {
    "reductions": reductions, "one_pass": one_pass_case, "ella": ella_case, "sampled": sampled_case, "dual": dual_case,
    "variational": variational_case, "ddp": ddp_case, "refused": refused_case, "compare": compare_case,
    "gram": gram_case, "command": command_case,
}  # fmt: skip
SECOND: dict[str, Callable[[Path], dict[str, Any]]] = {"resumed": resumed_case}


def fork(folder: Path, world: int, cases: dict[str, Callable[[Path], dict[str, Any]]]) -> None:
    """Run cases by so many processes; each writes what it found."""
    children = []
    for number in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            store = f"file://{folder}/store-{world}-{next(iter(cases))}"
            dist.init_process_group("gloo", init_method=store, rank=number, world_size=world)
            for name, case in cases.items():
                torch.save(case(folder), folder / f"{name}-{world}-{number}.pt")
            dist.barrier()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children), f"a process of {world} failed"


def run(folder: str) -> None:
    """All cases by all numbers of processes."""
    torch.set_num_threads(1)
    # Here, not in a fork: what is imported on first use then is so for all.
    from torch.distributed import checkpoint, tensor  # noqa: F401

    for name in ("one_pass", "ella", "sampled", "dual"):
        torch.save(FIRST[name](Path(folder)), Path(folder) / f"{name}-0-0.pt")
    for world in WORLDS[1:]:
        fork(Path(folder), world, FIRST)
    for world in WORLDS[1:]:
        fork(Path(folder), world, SECOND)
    for world in (2, 1, 4):
        fork(Path(folder), world, {"stored": stored_case})


if __name__ == "__main__":
    run(*sys.argv[1:])
