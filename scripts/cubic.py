"""The cubic with every method side by side: y = x³ + noise of standard deviation 3, 20 points in [-4, 4].

Two networks, one hidden layer of 100 ReLU (the toy of Hernández-Lobato & Adams 2015) and two of 50 tanh. What works on
a trained network gets the same one; ensembles and dropout train their own. The Hessian-free and the variational Laplace
need second derivatives: for the ReLU network they get its softplus twin, trained alike. Methods find their noise and
prior themselves, except that the corrected L2M, NUTS and the Hessian-free Laplace take a prior (the latter two a noise,
too) from the evidence at θ⋆.

NUTS needs numpyro (``pip install numpyro``); without it the panel says so.

    python scripts/cubic.py [--quick] [--out docs/results]
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import common
import ntkgp
from ntkgp.baselines import (
    L2M,
    SWAG,
    Baseline,
    DeepEnsemble,
    HessianFreeLaplace,
    Laplace,
    MCDropout,
    Point,
    PriorOnly,
    VariationalLaplace,
)
from ntkgp.baselines.variational_laplace import smooth
from ntkgp.evaluation.plots import COLORS, new_figure, predictive_bands
from ntkgp.evaluation.training import seeded

NUM_DATA, NOISE_SD, BATCH, DECAY, DROPOUT = 20, 3.0, 10, 0.1, 0.05
# Of softplus: near to ReLU on standardised data.
SHARPNESS = 10.0
NETS = {"1 × 100 ReLU": ((100,), nn.ReLU), "2 × 50 tanh": ((50, 50), nn.Tanh)}
GRID = torch.linspace(-6, 6, 97, dtype=torch.float64)
INSIDE = GRID.abs() <= 4
TRUTH = GRID**3
# The smallest NLL that any prediction can have.
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * NOISE_SD**2)


Found = dict[str, "tuple[Prediction | str, Score | None]"]


class Missing(Exception):
    """Why a method was not run."""


class Prediction(NamedTuple):
    """Mean and variance of f on the grid and the noise variance, standardised; and what is to be said of the run."""

    mean: Tensor
    variance: Tensor
    noise: float
    remark: str = ""


class Score(NamedTuple):
    """Of one method on one data set, in units of y."""

    nll: float
    nll_true_noise: float
    coverage: float
    left: float
    right: float
    noise: float
    seconds: float


@dataclass
class Problem:
    """One data set with one trained network."""

    kind: str
    seed: int
    steps: int
    draws: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        x = 8 * torch.rand(NUM_DATA, 1, generator=generator, dtype=torch.float64) - 4
        y = x**3 + NOISE_SD * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        self.raw = x, y
        self.center, self.scale = float(y.mean()), float(y.std())
        self.data = (x - x.mean()) / x.std(), (y - self.center) / self.scale
        self.grid = ((GRID - x.mean()) / x.std()).unsqueeze(-1)
        with seeded(0):
            self.net = network(self.kind)
        self.optimizer = train(self.net, *self.data, self.steps)

    @cached_property
    def ours(self) -> ntkgp.ExactNTKGP:
        """The GP of the network, at its defaults."""
        return ntkgp.from_network(self.net, self.data)

    @cached_property
    def twin(self) -> nn.Module:
        """The network, or its softplus twin where it has kinks."""
        if NETS[self.kind][1] is not nn.ReLU:
            return self.net
        with seeded(0):
            net = smooth(network(self.kind), SHARPNESS)
        train(net, *self.data, self.steps)
        return net

    def score(self, found: Prediction, seconds: float) -> Score:
        """Expectations over y of the true density, averaged over [-4, 4]."""
        mean, variance, noise = self.in_units(found)
        error = mean - TRUTH
        parts = []
        for each in (noise, NOISE_SD**2):
            total = variance + each
            parts.append((2 * math.pi * total).log() / 2 + (NOISE_SD**2 + error.square()) / (2 * total))
        half = 1.959964 * (variance + noise).sqrt()
        inside = torch.special.ndtr((error + half) / NOISE_SD) - torch.special.ndtr((error - half) / NOISE_SD)
        ratio = variance.sqrt() / error.abs()
        means = [float(values[INSIDE].mean()) for values in (*parts, inside)]
        return Score(*means, float(ratio[0]), float(ratio[-1]), noise**0.5, seconds)

    def in_units(self, found: Prediction) -> tuple[Tensor, Tensor, float]:
        """Mean, variance of f and noise variance in units of y."""
        return found.mean * self.scale + self.center, found.variance * self.scale**2, found.noise * self.scale**2


def network(kind: str, dropout: float = 0.0) -> nn.Sequential:
    widths, activation = NETS[kind]
    layers: list[nn.Module] = []
    for before, width in zip((1, *widths), widths, strict=False):
        layers += [nn.Linear(before, width), activation(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1)).double()


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> torch.optim.Optimizer:
    """AdamW to a learning rate of zero; its state is what L2M reads."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    net.train()
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:BATCH]
        optimizer.zero_grad()
        mse_loss(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    net.eval()
    return optimizer


# --- methods: a problem -> its prediction ---


def fitted(method: Baseline, p: Problem, remark: str = "") -> Prediction:
    """Fit a comparator and predict on the grid."""
    found = method.fit(p.data).predict(p.grid)
    noise = float(method.state_dict()["noise"])
    latent = getattr(found, "latent", None)
    if latent is None:
        return Prediction(found.mean, torch.zeros_like(found.mean), noise, remark)
    return Prediction(latent.mean, latent.variance, noise, remark)


def ensemble(p: Problem) -> Prediction:
    def train_member(net: nn.Module, data: Any) -> None:
        train(net, *data, p.steps)

    return fitted(DeepEnsemble(p.net, train=train_member, size=5), p)


def dropout(p: Problem) -> Prediction:
    with seeded(0):
        net = network(p.kind, DROPOUT)
        train(net, *p.data, p.steps)
    return fitted(MCDropout(net, num_samples=200), p)


def l2m(p: Problem, **options: Any) -> Prediction:
    if options.get("variant") != "paper":
        options |= {"batch_size": BATCH, "precision": p.ours.report.precision}
    return fitted(L2M(p.net, optimizer=p.optimizer, **options), p)


def variational(p: Problem) -> Prediction:
    method = VariationalLaplace(p.twin, precision=None, epochs=300, batch_size=BATCH)
    return fitted(method, p, "softplus" if p.twin is not p.net else "")


def hessian_free(p: Problem) -> Prediction:
    if p.draws == 0:
        raise Missing("left out by --quick")
    evidence = Laplace(p.twin).fit(p.data)
    method = HessianFreeLaplace(p.twin, precision=evidence.precision, noise=evidence.noise, tolerance=1e-3)
    found = fitted(method, p)
    assert method.drift is not None
    remark = f"weights moved by {method.drift.weights:.0%} to the mode" + "; softplus" * (p.twin is not p.net)
    if not method.drift.converged or method.unconverged:
        remark += f"; {method.unconverged} refits did not converge"
    return found._replace(remark=remark)


def ours(p: Problem, net: nn.Module | None = None, **options: Any) -> Prediction:
    model = p.ours if net is None and not options else ntkgp.from_network(net or p.net, p.data, **options)
    with torch.no_grad():
        latent = model(p.grid)
    return Prediction(latent.mean, latent.variance, model.likelihood.noise.item())


def nuts(p: Problem) -> Prediction:
    """Draws from the posterior of the network itself, under the prior and noise of the GP."""
    if p.draws == 0:
        raise Missing("left out by --quick")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    try:
        import jax
        import numpyro
        from numpyro.diagnostics import split_gelman_rubin
        from numpyro.infer import MCMC, NUTS
    except ImportError:
        raise Missing("numpyro is not installed") from None
    numpyro.enable_x64()
    activation = jax.nn.relu if NETS[p.kind][1] is nn.ReLU else jax.numpy.tanh
    shapes = [tuple(layer.weight.shape) for layer in p.net if isinstance(layer, nn.Linear)]
    x, y, grid = (jax.numpy.asarray(values.numpy()) for values in (*p.data, p.grid))
    prior = numpyro.distributions.Normal(0, float(p.ours.report.precision) ** -0.5)
    noise = p.ours.likelihood.noise.item()

    def outputs(weights: list[Any], inputs: Any) -> Any:
        for depth, (w, b) in enumerate(weights):
            inputs = inputs @ w.T + b
            inputs = activation(inputs) if depth < len(weights) - 1 else inputs
        return inputs

    def model() -> None:
        weights = [
            (
                numpyro.sample(f"w{depth}", prior.expand(shape).to_event(2)),
                numpyro.sample(f"b{depth}", prior.expand(shape[:1]).to_event(1)),
            )
            for depth, shape in enumerate(shapes)
        ]
        numpyro.deterministic("f", outputs(weights, grid)[:, 0])
        numpyro.sample("y", numpyro.distributions.Normal(outputs(weights, x), noise**0.5), obs=y)

    chains = MCMC(
        NUTS(model, max_tree_depth=8), num_warmup=p.draws, num_samples=p.draws, num_chains=2,
        chain_method="sequential", progress_bar=False,
    )  # fmt: skip
    chains.run(jax.random.PRNGKey(0), extra_fields=("diverging",))
    by_chain = jax.device_get(chains.get_samples(group_by_chain=True)["f"])
    f = torch.tensor(by_chain).flatten(0, 1)
    divergent = int(chains.get_extra_fields()["diverging"].sum())
    remark = (
        f"2 × {p.draws} draws, R̂ of f at most {float(split_gelman_rubin(by_chain).max()):.2f}, {divergent} divergent"
    )
    return Prediction(f.mean(0), f.var(0), noise, remark)


def laplace(structure: str, evidence: str = "theta") -> Callable[[Problem], Prediction]:
    return lambda p: fitted(Laplace(p.net, structure=structure, evidence=evidence), p)


# One panel each, in the order of the figure.
PANELS: dict[str, Callable[[Problem], Prediction]] = {
    "deep ensemble": ensemble,
    "MC dropout": dropout,
    "SWAG": lambda p: fitted(SWAG(p.net, batch_size=BATCH, num_samples=100), p),
    "L2M, as printed": lambda p: l2m(p, variant="paper"),
    "L2M, corrected": lambda p: l2m(p, prediction="glm"),
    "variational Laplace": variational,
    "NUTS": nuts,
    "prior only": lambda p: fitted(PriorOnly(p.net), p),
    "Laplace, diagonal": laplace("diagonal"),
    "Laplace, KFAC": laplace("kfac"),
    "Laplace, last layer": laplace("last_layer"),
    "Laplace, full": laplace("full"),
    "Hessian-free Laplace": hessian_free,
    "ntkgp": ours,
}
# Rows of the tables only.
OTHERS: dict[str, Callable[[Problem], Prediction]] = {
    "network alone": lambda p: fitted(Point(p.net), p),
    "L2M, corrected, sampled weights": lambda p: l2m(p, prediction="weights"),
    "Laplace, full, sampled weights": lambda p: fitted(Laplace(p.net, evidence="theta", prediction="weights"), p),
    "Laplace, diagonal, θ⋆": laplace("diagonal", "theta_star"),
    "Laplace, KFAC, θ⋆": laplace("kfac", "theta_star"),
    "Laplace, last layer, θ⋆": laplace("last_layer", "theta_star"),
    "Laplace, full, θ⋆": laplace("full", "theta_star"),
    "ntkgp, mean posterior": lambda p: ours(p, mean="posterior"),
    "ntkgp, λ per layer": lambda p: ours(p, groups="layer"),
}
# Where the network has a twin.
OF_THE_TWIN = {"ntkgp, softplus": lambda p: ours(p, p.twin)}
SLOW = ("NUTS", "Hessian-free Laplace")


def run(p: Problem, methods: dict[str, Callable[[Problem], Prediction]]) -> Found:
    _ = p.twin, p.ours  # in nobody's time
    found: Found = {}
    for name, method in methods.items():
        start = time.process_time()
        try:
            prediction = method(p)
        except Missing as reason:
            found[name] = str(reason), None
            continue
        found[name] = prediction, p.score(prediction, time.process_time() - start)
    return found


def draw(results: dict[str, tuple[Problem, Found]], path: Path) -> None:
    """Two rows of panels for each network, all on the same axes."""
    columns = (len(PANELS) + 1) // 2
    figure, axes = new_figure(2 * len(results), columns, (1.85 * columns, 3.75 * len(results) + 0.3))
    for block, (kind, (p, found)) in enumerate(results.items()):
        for place, name in enumerate(PANELS):
            number = block * 2 * columns + place
            panel(axes[number], p, name, *found[name])
            if place % columns:
                axes[number].set_yticklabels([])
            else:
                axes[number].set_ylabel(kind, fontsize=9)
            if number < len(axes) - columns:
                axes[number].set_xticklabels([])
            else:
                axes[number].set_xlabel("x", fontsize=9)
    key = new_figure()[1][0]
    flat = torch.ones_like(GRID)
    predictive_bands(GRID, TRUTH, flat, flat, data=results[kind][0].raw, truth=TRUTH, color="#555555", ax=key)
    handles = key.get_legend_handles_labels()[0]
    labels = ["y, ± 2 sd", "f, ± 2 sd", "x³", "data"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def panel(ax: Any, p: Problem, name: str, prediction: Prediction | str, score: Score | None) -> None:
    """One method on one data set."""
    color = {"ntkgp": COLORS[1], "NUTS": COLORS[2]}.get(name, COLORS[0])
    lines = [name]
    if isinstance(prediction, str) or score is None:
        ax.text(0, 0, prediction, ha="center", va="center", fontsize=7)
    else:
        predictive_bands(GRID, *p.in_units(prediction), data=p.raw, truth=TRUTH, color=color, ax=ax)
        ax.get_legend().remove()
        lines = [name + " (softplus)" * ("softplus" in prediction.remark), f"NLL {score.nll:.2f}"]
    ax.set_title("\n".join(lines), fontsize=8, color=color if name == "ntkgp" else "#333333", pad=2)
    ax.grid(False)
    for low, high in ((-6, -4), (4, 6)):
        ax.axvspan(low, high, color="#F1F1F1", lw=0, zorder=-1)
    ax.set(xlim=(-6, 6), ylim=(-220, 220), xticks=(-4, 0, 4), yticks=(-200, 0, 200), xlabel="", ylabel="")


def one_table(kind: str, found: Found) -> list[str]:
    lines = [
        f"### {kind}", "",
        "| | NLL | NLL, σ = 3 | 95 % band covers | sd of f over error, x = −6 | x = 6 | σ | seconds | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, (prediction, score) in found.items():
        if isinstance(prediction, str) or score is None:
            lines.append(f"| {name} | | | | | | | | {prediction} |")
            continue
        cells = [f"{score.nll:.3f}", f"{score.nll_true_noise:.3f}", f"{score.coverage:.1%}", f"{score.left:.2f}"]
        cells += [f"{score.right:.2f}", f"{score.noise:.2f}", f"{score.seconds:.1f}", prediction.remark]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def mean_table(scores: dict[tuple[str, str], list[Score]], count: int) -> list[str]:
    def cell(values: list[float], pattern: str) -> str:
        numbers = torch.tensor(values, dtype=torch.float64)
        return f"{float(numbers.mean()):{pattern}} ± {float(numbers.std()) / math.sqrt(len(numbers)):{pattern}}"

    lines = [
        f"## {count} data sets", "", "Mean ± s.e.; the last column is the root of the mean square over both ends.", "",
        "| | | NLL | less that of ntkgp | NLL, σ = 3 | 95 % band covers | sd of f over error, x = ±6 |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (kind, name), values in scores.items():
        ends = [math.sqrt((s.left**2 + s.right**2) / 2) for s in values]
        excess = [s.nll - own.nll for s, own in zip(values, scores[kind, "ntkgp"], strict=True)]
        cells = [cell([s.nll for s in values], ".3f"), cell(excess, "+.3f").replace("± +", "± ")]
        cells.append(cell([s.nll_true_noise for s in values], ".3f"))
        cells += [cell([100 * s.coverage for s in values], ".1f") + " %", cell(ends, ".2f")]
        lines.append(f"| {kind} | {name} | {' | '.join(cells)} |")
    for kind in NETS:
        means = {name: sum(s.nll for s in values) / len(values) for (k, name), values in scores.items() if k == kind}
        best = sorted((name for name in means if name in PANELS), key=means.__getitem__)[:5]
        lines += ["", f"{kind}, lowest NLL of the panels: {', '.join(f'{name} {means[name]:.3f}' for name in best)}."]
    return [*lines, ""]


def equal(found: Found) -> float:
    """Largest relative difference in the variance of f between the GP and full Laplace at θ⋆."""
    one, two = found["ntkgp"][0], found["Laplace, full, θ⋆"][0]
    assert isinstance(one, Prediction)
    assert isinstance(two, Prediction)
    return float((one.variance / two.variance - 1).abs().max())


def introduction(results: dict[str, tuple[Problem, Found]], arguments: argparse.Namespace, seconds: float) -> list[str]:
    """What was run, and what the columns are."""
    same = max(equal(found) for _, found in results.values())
    return [
        f"20 points, batches of {BATCH}, AdamW (decay {DECAY:g}), {arguments.steps} steps, standardised data; softplus "
        f"of sharpness {SHARPNESS:g}; {seconds:.0f} s of processor time.",
        "",
        "NLL and coverage are expectations under the true density, averaged over [−4, 4]; no prediction has an NLL "
        f"below {ENTROPY:.3f}. “NLL, σ = 3” takes the method's distribution of f and the true noise. An error bar as "
        "large as the error has 1 in the columns of x = ±6. Laplace has one λ from the evidence at θ̃ where nothing "
        "else is said; ntkgp is `from_network` at its defaults, one λ here, at θ⋆, and has the variance of full "
        f"Laplace at θ⋆ (largest relative difference {same:.0e}). NUTS samples the network itself under the prior and "
        "noise of ntkgp.",
        "",
        f"## The data set of the figure (seed {arguments.seed})",
        "",
    ]


def main() -> None:
    parser = common.parser(__doc__, quick="one data set, without NUTS and the Hessian-free Laplace", data=False)
    parser.add_argument("--seed", type=int, default=0, help="of the first data set, which is the one of the figure")
    parser.add_argument("--sets", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--draws", type=int, default=200, help="of each of two chains")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    count = 1 if arguments.quick else arguments.sets
    results: dict[str, tuple[Problem, Found]] = {}
    scores: dict[tuple[str, str], list[Score]] = {}
    rows = []
    for kind in NETS:
        for seed in range(arguments.seed, arguments.seed + count):
            p = Problem(kind, seed, arguments.steps, 0 if arguments.quick else arguments.draws)
            methods = PANELS | OTHERS | (OF_THE_TWIN if p.twin is not p.net else {})
            if seed == arguments.seed:
                results[kind] = p, run(p, methods)
                found = results[kind][1]
            else:
                found = run(p, {name: method for name, method in methods.items() if name not in SLOW})
            for name, (_, score) in found.items():
                if score is not None:
                    rows.append({"network": kind, "method": name, "data_set": seed, **score._asdict()})
                    if name not in SLOW:
                        scores.setdefault((kind, name), []).append(score)
            print(f"{kind}, data set {seed}: {time.process_time() - start:.0f} s", flush=True)
    lines = introduction(results, arguments, time.process_time() - start)
    for kind, (_, found) in results.items():
        lines += one_table(kind, found)
    if count > 1:
        lines += mean_table(scores, count)
    text = "\n".join(lines).rstrip()
    print(text)
    page = common.page_of(arguments, "cubic")
    command = "Made by `python scripts/cubic.py" + " --quick" * arguments.quick + f"`.\n\n![cubic]({page.stem}.png)\n\n"
    common.write(page, "# The cubic, all methods side by side\n\n" + command + text)
    common.write_rows(page.with_suffix(".csv"), rows)
    draw(results, page.with_suffix(".png"))


if __name__ == "__main__":
    main()
