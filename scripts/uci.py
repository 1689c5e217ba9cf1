"""UCI regression, all methods side by side, without a validation set but for the one row that needs it.

Per split a 2×50 tanh network is trained twice: with next to no decay, and, once the evidence at θ⋆ of its tangent model
(of at most 2000 rows) has found a prior precision λ and a noise σ², as the maximum a posteriori of that prior and that
noise (the penalty λσ²/N per weight on the mean squared error). All methods share the second network; ensembles and
dropout train their own by the same penalty. Precisions and noise come from the evidence, one λ for all weights unless
the row says otherwise; methods without evidence of their own (L2M, Laplace sampled, VaLLA, prior only) are given
those of the Gaussian process.

"GP θ⋆, posterior mean" is the row that the evidence itself stands for: precision, noise and mean are those of one
model, the tangent model at its mode. Beside it the same error bars around the network's own output, whose training
error that noise does not know.

Scores are test NLL, RMSE and CRPS in original units: mean ± standard error over the published standard and gap splits.

    python scripts/uci.py [--quick] [--sets ...] [--retry] [--data FOLDER] [--out docs/results] [--workers 2]
    torchrun --nproc-per-node 2 scripts/uci.py ...

FOLDER holds uci/<name>.npz with the published splits; without it the script says so and stops. What uci.csv in the
output folder already has is not computed again: an interrupted run goes on when it is called again. With --retry, the
rows that failed are computed again first. The rows and their order are the same for any number of workers or of
processes of ``torchrun``, which take splits in turn and write them into the one file; seconds and memory apart.
"""

from __future__ import annotations

import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor, nn

import common
import ntkgp
from jobs import Team, turn
from ntkgp.evaluation.comparison import Comparison, Method, compare
from ntkgp.evaluation.comparison.methods import GaussianProcess
from ntkgp.evaluation.datasets import RegressionData, UCIData, uci
from ntkgp.evaluation.training import seeded
from ntkgp.models.variational import VariationalNTKGP, kmeans_inducing_points

SETS = ("boston", "concrete", "wine", "power", "naval", "protein")
OURS = "GP θ⋆, posterior mean"
STEPS, BATCH, MEMBERS, INDUCING, PILOT = 1500, 1000, 5, 200, 2000
START = 1e-5
# Columns that are constant for all of the data have no gap.
NO_GAP = {("naval", "gap", 8), ("naval", "gap", 11)}
COLUMNS = ("nll", "rmse", "crps", "coverage", "seconds")
FIRST = "GP θ⋆, network mean"
Data = tuple[Tensor, Tensor]
Job = tuple[str, str, int, str, tuple[str, ...]]


def network(width: int, dropout: float = 0.0) -> nn.Sequential:
    """2×50 tanh."""
    parts: list[nn.Module] = []
    for inputs in (width, 50):
        parts += [nn.Linear(inputs, 50), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*parts, nn.Linear(50, 1)).double()


class Trainer:
    """Adam on mean squared error + penalty·‖θ‖², cosine schedule, batches of at most 1000."""

    def __init__(self, penalty: float, seed: int = 0) -> None:
        self.penalty, self.seed = penalty, seed

    def __call__(self, net: nn.Module, data: Data) -> nn.Module:
        """Train in place."""
        x, y = data
        # Adam's coupled decay adds w·θ to the gradient: that of w/2·‖θ‖².
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=2 * self.penalty, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        generator = torch.Generator().manual_seed(self.seed)
        net.train()
        for _ in range(STEPS):
            rows = slice(None) if len(x) <= BATCH else torch.randint(len(x), (BATCH,), generator=generator)
            optimizer.zero_grad()
            (net(x[rows]) - y[rows]).square().mean().backward()
            optimizer.step()
            schedule.step()
        return net.eval()

    def new(self, data: Data, dropout: float = 0.0) -> nn.Module:
        """A network from its initialisation on."""
        with seeded(self.seed):
            return self(network(data[0].shape[-1], dropout), data)


class Split:
    """The network of one split, its Gaussian process, and the methods."""

    def __init__(self, data: RegressionData) -> None:
        self.data = data
        self.train: Data = (data.x_train, data.y_train.reshape(-1, 1))
        size = len(self.train[0])
        rows = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:PILOT]
        pilot = ntkgp.from_network(Trainer(START).new(self.train), (self.train[0][rows], self.train[1][rows]))
        prior = prior_of(pilot)
        self.trainer = Trainer(float(prior["precision"] * prior["noise"]) / size)
        self.net = self.trainer.new(self.train)
        self.model: Any = None
        self.prior: dict[str, Tensor] = {}

    def process(self, net: nn.Module, data: Data) -> GaussianProcess:
        """One λ, evidence at θ⋆, mean of the network."""
        self.model = ntkgp.from_network(net, data)
        self.prior = prior_of(self.model)
        return GaussianProcess(self.model)

    def posterior_mean(self, net: nn.Module, data: Data) -> GaussianProcess:
        """Ours: the same model with its own mean, that of the tangent model at θ⋆."""
        self.model.mean = "posterior"
        return GaussianProcess(self.model)

    def at_map(self, net: nn.Module, data: Data) -> GaussianProcess:
        """The same statistics with the evidence at θ̃."""
        self.model.mean = "network"
        ntkgp.fit_evidence(self.model, at="theta_map")
        return GaussianProcess(self.model)

    def valla(self, net: nn.Module, data: Data) -> GaussianProcess:
        """Variational, at the prior and the noise of the exact model."""
        lin = ntkgp.LinearizedNetwork(net, data[0], groups="single")
        likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-8)).double()
        likelihood.noise = self.prior["noise"]
        points = kmeans_inducing_points(data[0], min(INDUCING, len(data[0])))[0]
        model = VariationalNTKGP(points, likelihood, lin, len(data[0]), learn_inducing=False)
        model.kernel.precision = self.prior["precision"]
        model.set_optimum(data)
        return GaussianProcess(model)

    def at_our_prior(self, name: str, **options: Any) -> Any:
        """A method with the precision and the noise of the exact model, which is fitted before it."""

        def build(net: nn.Module, data: Data) -> Any:
            return Method(name, **self.prior, **options).build(net, data, {"groups": "single"})

        return build

    def methods(self, only: tuple[str, ...] = ()) -> dict[str, Any]:
        """By label; the exact model first, for others take its prior. All, or it and those named."""
        size = len(self.train[0])
        held = size // 10
        kept = (self.train[0][held:], self.train[1][held:])
        validation = (self.train[0][:held], self.train[1][:held])
        trained = {
            "network, σ validated": lambda: Method(
                "network-validated", net=self.trainer.new(kept), validation=validation
            ),
            "MC dropout": lambda: Method("dropout", net=self.trainer.new(self.train, 0.05)),
        }
        layers = {} if size > PILOT else {"GP θ⋆, λ per layer": Method("gp", groups="layer")}
        methods = {
            FIRST: self.process,
            OURS: self.posterior_mean,
            "GP θ̃": self.at_map,
            **layers,
            "ELLA": "gp-nystrom",
            "VaLLA": self.valla,
            "network": "network",
            "network, σ validated": None,
            "deep ensemble": Method("ensemble", train=self.trainer, size=MEMBERS),
            "MC dropout": None,
            "SWAG": Method("swag", batch_size=128 if size > 1000 else 32),
            "Laplace KFAC": Method("laplace-kfac", groups="layer"),
            "Laplace diagonal": Method("laplace-diagonal"),
            "Laplace last layer": Method("laplace-last-layer"),
            "Laplace subnetwork": Method("laplace-subnetwork", size=500),
            "Laplace sampled": self.at_our_prior("laplace-sampled", evidence=None),
            "L2M": self.at_our_prior("l2m"),
            "L2M as printed": "l2m-paper",
            "VL": Method("vl", epochs=math.ceil(1500 / math.ceil(size / 128))),
            "prior only": self.at_our_prior("prior-only"),
        }
        chosen = [label for label in methods if not only or label in (FIRST, *only)]
        return {label: trained[label]() if label in trained else methods[label] for label in chosen}


def prior_of(model: Any) -> dict[str, Tensor]:
    """λ and σ² as numbers that stay when the model is fitted anew."""
    return {
        "precision": model.kernel.precision.detach().clone(), "noise": model.likelihood.noise.detach().double().clone()
    }  # fmt: skip


def work(job: Job) -> Comparison:
    """One split: all methods, or those named, which may need the prior of the first."""
    name, kind, index, folder, only = job
    torch.set_num_threads(1)
    source = uci(name, folder)
    data = (source.standard if kind == "standard" else source.gap)(index, torch.float64)
    split = Split(data)
    found = compare(
        split.net, split.train, (data.x_test, data.y_test.reshape(-1, 1)), split.methods(only), groups="single",
        target_scale=(data.target_mean, data.target_std), isolate=False, name=f"{name} {kind}/{index}",
    )  # fmt: skip
    return Comparison([row for row in found.rows if not only or row.method in only], "regression")


def jobs_of(sets: dict[str, UCIData], found: Comparison, folder: Path, quick: bool, retry: bool) -> list[Job]:
    """The rows that failed, if they are wanted again, then the splits that are not there yet."""
    failed: dict[str, tuple[str, ...]] = {}
    for method, data in found.failures if retry else {}:
        failed[data] = (*failed.get(data, ()), method)
    again = []
    for data, only in failed.items():
        name, kind, index = data.replace("/", " ").split(" ")
        if name in sets:
            again.append((name, kind, int(index), str(folder), only))
    there = {row.data for row in found.rows}
    kinds = sorted(product(sets, ("standard", "gap")), key=lambda pair: (pair[0] in SETS[3:], pair[1] == "gap"))
    new = [
        (name, kind, index, str(folder), ())
        for name, kind in kinds
        for index in range(len(sets[name].standard_splits if kind == "standard" else sets[name].gap_splits))
        if f"{name} {kind}/{index}" not in there
        and (name, kind, index) not in NO_GAP and (not quick or index < 2)
    ]  # fmt: skip
    return [*again, *new]


def kept(path: Path) -> Comparison:
    """The rows of a file, none where there is none."""
    return Comparison.from_csv(path, "regression") if path.is_file() else Comparison([], "regression")


def joined(whole: Comparison, found: Comparison) -> Comparison:
    """Rows in the place of older ones, in the order of the splits whichever were done first."""

    def place(data: str) -> tuple[int, str, bool, int]:
        name, kind, index = data.replace("/", " ").split(" ")
        return SETS.index(name) if name in SETS else len(SETS), name, kind == "gap", int(index)

    new = {(row.method, row.data) for row in found.rows}
    rows = [row for row in whole.rows if (row.method, row.data) not in new] + found.rows
    return Comparison(sorted(rows, key=lambda row: place(row.data)), "regression")


def summary(found: Comparison) -> list[str]:
    """NLL of ours and of the best on every set, and mean ranks over the standard sets and over the gaps."""
    lines = [
        "## Summary of NLL",
        "",
        "| data | splits | ours | best other | its NLL |",
        "| --- | --: | --: | --- | --: |",
    ]
    for data in found.datasets:
        count = len({row.data for row in found.rows if row.data.split("/")[0] == data})
        others = {m: found.summary("nll", m, data) for m in found.methods if m != OURS}
        whole = {m: value for m, value in others.items() if value[2] == count}
        best = min(whole, key=lambda m: whole[m][0], default="")
        theirs = "{:.3f} ± {:.3f}".format(*whole[best][:2]) if whole else ""
        ours, error, _ = found.summary("nll", OURS, data)
        lines.append(f"| {data} | {count} | {ours:.3f} ± {error:.3f} | {best} | {theirs} |")
    lines += ["", f"Ours: {OURS}. Mean ranks of NLL, 1 is best; a method that failed on a split ranks last:", ""]
    ranks: dict[str, dict[str, float]] = {}
    for kind in ("standard", "gap"):
        rows = [row for row in found.rows if row.data.split("/")[0].endswith(kind)]
        part = Comparison(rows, "regression")
        if len(part.datasets) > 1:
            test = part.rank_test("nll")
            ranks[kind] = dict(zip(test.names, test.average.tolist(), strict=True))
    lines += [f"| method | {' | '.join(ranks)} |", "| --- " + "| --: " * len(ranks) + "|"]
    names = {name: None for kind in ranks for name in sorted(ranks[kind], key=ranks[kind].__getitem__)}
    for name in names:
        lines.append(f"| {name} | {' | '.join(f'{r[name]:.1f}' if name in r else '' for r in ranks.values())} |")
    return [*lines, ""]


def report(found: Comparison, seconds: float | None) -> str:
    """Tables per set, the counts that matter, and what failed."""
    lines = ["# UCI regression: all methods", "", (__doc__ or "").split("\n\n")[1].replace("\n", " "), "",
             "`*` best; `°`: its mean difference from the best, split by split, is within one standard error. Command: "
             "`python scripts/uci.py`. Seconds are of a machine with other work.", "",
             *summary(found)]  # fmt: skip
    for data in found.datasets:
        part = Comparison([row for row in found.rows if row.data.split("/")[0] == data], "regression")
        count = len({row.data for row in part.rows})
        lines += [f"## {data} splits ({count})", "", part.table_of(COLUMNS).to_markdown(), ""]
        found_by = {method: part.summary("nll", method, data) for method in part.methods}
        # A mean over some of the splits is none of the set.
        whole = {method: (mean, error) for method, (mean, error, splits) in found_by.items() if splits == count}
        if OURS not in whole:
            lines += [f"{OURS}: no NLL on {count - found_by.get(OURS, (0.0, 0.0, 0))[2]} of {count} splits.", ""]
            continue
        worst = max(row.value("nll") for row in part.rows if row.method == OURS)
        mean = whole[OURS][0]
        near = {"*": "best", "°": "within one s.e. of the best"}.get(part.mark("nll", OURS, data), "not the best")
        lines += [f"{OURS}: NLL {mean:.3f}, {near}; worst split {worst:.2f}.", ""]
    failures = [f"- {method}, {data}: {why}" for (method, data), why in found.failures.items()]
    lines += ["## Failures", "", *(failures or ["none"]), ""]
    if seconds is not None:
        lines.append(f"This run: {seconds / 60:.0f} minutes.")
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__, quick="two splits of each kind of the three small sets")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--retry", action="store_true", help="the rows that failed, again")
    parser.add_argument("--workers", type=int, default=2, help="processes, where torchrun has not started them")
    arguments = parser.parse_args()
    names = SETS[:3] if arguments.quick else arguments.sets
    try:
        sets = {name: uci(name, arguments.data) for name in names}
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / ("uci_quick.csv" if arguments.quick else "uci.csv")
    team = Team.of_this_run(arguments.workers)
    jobs = team.agreed(lambda: jobs_of(sets, kept(path), arguments.data, arguments.quick, arguments.retry))
    start = time.perf_counter()
    for count, found in team.results(work, jobs):
        with turn(arguments.out), common.replacing(path) as part:
            joined(kept(path), found).to_csv(part)
        print(f"[{count}/{len(jobs)}] {found.rows[0].data}: {time.perf_counter() - start:.0f} s", flush=True)
    if not team.is_last():
        return
    whole = kept(path)
    text = report(whole, time.perf_counter() - start if jobs else None)
    print(text)
    common.write(path.with_suffix(".md"), text)
    whole.plot(["nll", "coverage"]).savefig(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
