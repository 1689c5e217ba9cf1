"""Hessian-free Laplace: what its variances are, and what they cover in, between and beyond the data.

Data sets of 60 points on [-3, -1] and [1, 3] with noise 0.2, of a sinusoid (sin 1.5x) and of a quadratic (x²/3 - 1),
and a network 1-20-1 (tanh), prior N(0, 1): constants of our own, for none were published. On the network itself the
limit of small steps is the Laplace approximation with the full Hessian, and not with the generalised Gauss-Newton
matrix; on the tangent model every step is exact; the amortised form gives covariances with the mean prediction
(McInerney & Kallus 2024).

Coverage (PICP) is that of mean ± 1.96 sd for a new y, computed under the true density, not by counting: it has no
sampling noise beyond that of the data sets.

    python scripts/hfl.py [--quick] [--sets 6] [--out docs/results]
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

import common
import ntkgp
from ntkgp.baselines import DeepEnsemble
from ntkgp.baselines.hessian_free import Drift, HessianFreeLaplace
from ntkgp.evaluation.plots import new_figure, predictive_bands
from ntkgp.evaluation.training import seeded, train

NOISE, PRECISION, MEMBERS = 0.04, 1.0, 5
STEPS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PROBLEMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sinusoid": lambda x: torch.sin(1.5 * x),
    "quadratic": lambda x: x.square() / 3 - 1,
}
REGIONS: dict[str, tuple[float, float]] = {"in the data": (1, 3), "between": (0, 1), "beyond": (3, 4)}
Data = tuple[Tensor, Tensor]


class Latent(NamedTuple):
    """Mean and variance of f on the grid, and the variance of the noise."""

    mean: Tensor
    variance: Tensor
    noise: float = NOISE


class Found(NamedTuple):
    """One data set: the predictions of all methods.

    :ivar negative: share of the inputs at which the amortised form is negative.
    :ivar unconverged: minimisations that did not reach their gradient norm.
    """

    data: Data
    predictions: dict[str, Latent]
    negative: float
    unconverged: int


def load(problem: str, seed: int) -> Data:
    """60 points with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(60, 1, generator=generator, dtype=torch.float64) - 3
    x[30:] += 4
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, PROBLEMS[problem](x) + NOISE**0.5 * noise


def network(seed: int) -> nn.Sequential:
    """1-20-1 from its initialisation."""
    with seeded(seed):
        return nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).double()


def covariances(net: nn.Module, theta: Tensor, x: Tensor, y: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """Joint covariances (N, N) at test inputs with the Hessian of the loss and with its Gauss-Newton part."""
    named = dict(net.named_parameters())

    def f(t: Tensor, inputs: Tensor) -> Tensor:
        parts = t.split([p.numel() for p in named.values()])
        weights = {n: q.reshape(p.shape) for (n, p), q in zip(named.items(), parts, strict=True)}
        return torch.func.functional_call(net, weights, inputs)[:, 0]

    def loss(t: Tensor) -> Tensor:
        return (f(t, x) - y[:, 0]).square().sum() / (2 * NOISE) + 0.5 * PRECISION * t.square().sum()

    hessian = torch.autograd.functional.hessian(loss, theta)
    test, j = (torch.autograd.functional.jacobian(lambda t, i=inputs: f(t, i), theta) for inputs in (x_test, x))
    ggn = j.T @ j / NOISE + PRECISION * torch.eye(len(theta), dtype=theta.dtype)
    return test @ torch.linalg.solve(hessian, test.T), test @ torch.linalg.solve(ggn, test.T)


def covariances_of_tangent(hfl: HessianFreeLaplace, x: Tensor, points: Tensor) -> Tensor:
    """Variances of the tangent model at its posterior, (N,)."""
    j, test = (hfl.lin.jacobian(inputs)[:, 0] for inputs in (x, points))
    ggn = j.T @ j / NOISE + PRECISION * torch.eye(j.shape[-1], dtype=j.dtype)
    return (test * torch.linalg.solve(ggn, test.T).T).sum(-1)


class Limits:
    """What the variances of one data set of the sinusoid tend to, by step and by form.

    :param steps: of training.
    """

    def __init__(self, seed: int, steps: int) -> None:
        self.x, self.y = load("sinusoid", seed)
        self.net = network(seed)
        train(self.net, self.x, self.y, steps=steps, learning_rate=1e-2, seed=seed)
        self.points = torch.tensor([[-3.5], [-2.0], [0.0], [2.0], [3.5]], dtype=torch.float64)
        self.exact = covariances(self.net, self.fitted().state_dict()["theta"], self.x, self.y, self.points)

    def fitted(self, **options: Any) -> HessianFreeLaplace:
        """Hessian-free Laplace with these options."""
        shared = {"noise": NOISE, "precision": PRECISION, "max_iterations": 60}
        return HessianFreeLaplace(self.net, **shared, **options).fit((self.x, self.y))

    def row(self, step: float) -> str:
        """Ratios to the dense variances at one step."""
        cells = []
        for form in ("central", "signed"):
            variance = self.fitted(step=step, form=form).covariance(self.points)[:, 0, 0]
            ratio = variance / self.exact[0].diag()
            cells.append(f"{float(ratio.min()):.5f} to {float(ratio.max()):.5f}")
        tangent = self.fitted(step=step, model="tangent")
        expected = covariances_of_tangent(tangent, self.x, self.points)
        error = float((tangent.covariance(self.points)[:, 0, 0] / expected - 1).abs().max())
        return f"| {step:g} | {' | '.join(cells)} | {error:.1e} |"

    def amortised(self, grid: Tensor) -> str:
        """What one refit for all inputs gives."""
        theta = self.fitted().state_dict()["theta"]
        everywhere, _ = covariances(self.net, theta, self.x, self.y, grid)
        found = self.fitted(amortised=True).average_covariance(grid)[:, 0, 0]
        fraction = found / everywhere.diag()
        agreement = float((found - everywhere.mean(1)).abs().max() / everywhere.mean(1).abs().max())
        return (
            f"Amortised: the covariance with the mean prediction, relative error {agreement:.0e}; of the variance it "
            f"is {float(fraction.min()):.2f} to {float(fraction.max()):.2f}, negative at "
            f"{float((fraction < 0).double().mean()):.0%} of {len(grid)} inputs."
        )

    def lines(self, grid: Tensor, steps: tuple[float, ...]) -> list[str]:
        """The first part of the page."""
        ratio = self.exact[0].diag() / self.exact[1].diag()
        drift = self.fitted().drift
        assert isinstance(drift, Drift)
        return [
            "## What the variances are", "",
            f"One data set of the sinusoid. The control, a minimisation without perturbation, moved the weights by "
            f"{drift.weights:.0%} and the outputs by up to {drift.outputs:.2f}, to a gradient norm of "
            f"{drift.gradient_after:.0e}.", "",
            "| step | network, central / full Hessian | network, one-sided / full Hessian | tangent, relative error |",
            "|---|---|---|---|", *(self.row(step) for step in steps), "",
            f"Full Hessian / Gauss-Newton variance: {float(ratio.min()):.3f} to {float(ratio.max()):.3f}.",
            self.amortised(grid), "",
        ]  # fmt: skip


def member(net: nn.Module, data: Data, steps: int) -> None:
    """A network of the ensemble: the same loss as the others, by Adam."""
    x, y = data
    # Coupled decay: the gradient of the prior, for a loss that is a mean and lacks the factor 1/2σ².
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=2 * NOISE * PRECISION / len(x))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        schedule.step()


def predictions(problem: str, seed: int, grid: Tensor, steps: int) -> Found:
    """All methods on one data set, at the same weights: the mode that the control found."""
    data = load(problem, seed)
    net = network(seed)
    train(net, *data, steps=steps, learning_rate=1e-2, seed=seed)
    options = {"noise": NOISE, "precision": PRECISION}
    theta = HessianFreeLaplace(net, **options).fit(data).state_dict()["theta"]
    vector_to_parameters(theta, net.parameters())
    hfl = HessianFreeLaplace(net, **options).fit(data)
    own = hfl.predict(grid).latent  # type: ignore[attr-defined]
    average = HessianFreeLaplace(net, amortised=True, **options).fit(data).average_covariance(grid)[:, 0, 0]
    hessian, ggn = covariances(net, theta, *data, grid)
    model = ntkgp.from_network(net, data)
    with torch.no_grad():
        process = model(grid)
    ensemble = DeepEnsemble(copy.deepcopy(net), train=lambda n, d: member(n, d, steps), size=MEMBERS).fit(data)
    spread = ensemble.predict(grid).latent  # type: ignore[attr-defined]
    found = {
        "network alone": Latent(own.mean, torch.zeros_like(own.mean)),
        "HFL": Latent(own.mean, own.variance),
        "HFL, amortised, absolute value": Latent(own.mean, average.abs()),
        "Laplace, full Hessian": Latent(own.mean, hessian.diag()),
        "Laplace, Gauss-Newton": Latent(own.mean, ggn.diag()),
        "ntkgp, own evidence": Latent(process.mean, process.variance, model.likelihood.noise.item()),
        f"ensemble of {MEMBERS}": Latent(spread.mean, spread.variance),
    }
    assert hfl.drift is not None
    return Found(data, found, float((average < 0).double().mean()), hfl.unconverged + (not hfl.drift.converged))


def coverage(found: Latent, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Probability that mean ± 1.96 sd covers a new y, and the width of that interval, at each input."""
    half = 1.959964 * (found.variance + found.noise).sqrt()
    error = found.mean - truth
    upper, lower = ((error + sign * half) / NOISE**0.5 for sign in (1, -1))
    return torch.special.ndtr(upper) - torch.special.ndtr(lower), 2 * half


def table(problem: str, sets: list[Found], grid: Tensor) -> list[str]:
    """Coverage and width of each method by region."""
    truth, where = PROBLEMS[problem](grid[:, 0]), grid[:, 0].abs()
    inside = {name: (where >= low) & (where <= high) for name, (low, high) in REGIONS.items()}
    columns = [f"{what} {name}" for name in inside for what in ("covers", "width")]
    lines = [f"### {problem}", "", f"| | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for method in sets[0].predictions:
        each = [coverage(one.predictions[method], truth) for one in sets]
        cells = []
        for rows in inside.values():
            covered, error = common.mean_error(torch.stack([pair[0][rows].mean() for pair in each]))
            width, spread = common.mean_error(torch.stack([pair[1][rows].mean() for pair in each]))
            cells += [f"{100 * covered:.1f} ± {100 * error:.1f} %", f"{width:.2f} ± {spread:.2f}"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    negative = [100 * one.negative for one in sets]
    return [
        *lines, "",
        f"The amortised form is negative at {min(negative):.0f} to {max(negative):.0f} % of the {len(grid)} inputs of "
        f"its refit. Minimisations that did not converge: {sum(one.unconverged for one in sets)}.", "",
    ]  # fmt: skip


def draw(studies: dict[str, list[Found]], grid: Tensor, path: Path) -> None:
    """The first data set of each problem."""
    panels = [name for name in next(iter(studies.values()))[0].predictions if name not in ("network alone",)]
    panels.remove("Laplace, full Hessian")
    figure, axes = new_figure(len(studies), len(panels), (2.9 * len(panels), 3.0 * len(studies)))
    spots = iter(axes)
    for problem, sets in studies.items():
        for name in panels:
            ax, latent = next(spots), sets[0].predictions[name]
            truth = PROBLEMS[problem](grid[:, 0])
            predictive_bands(
                grid, latent.mean, latent.variance, latent.noise, data=sets[0].data, truth=truth, label="f ± 2 sd",
                ax=ax,
            )  # fmt: skip
            ax.axvspan(-1, 1, color="#F1F1F1", lw=0, zorder=-1)
            ax.set_title(f"{name}\n{problem}", fontsize=9)
            ax.set_ylim(-3, 4)
            if ax is not axes[0]:
                ax.get_legend().remove()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = common.parser(__doc__, quick="one data set, nine inputs, one step: no result", data=False)
    parser.add_argument("--seed", type=int, default=0, help="of the first data set")
    parser.add_argument("--sets", type=int, default=6, help="data sets of each problem")
    arguments = parser.parse_args()
    start = time.process_time()
    quick, page = arguments.quick, common.page_of(arguments, "hfl")
    count, steps, points = (1, 200, 9) if quick else (arguments.sets, 2000, 49)
    grid = torch.linspace(-4, 4, points, dtype=torch.float64).unsqueeze(-1)
    limits = Limits(arguments.seed, steps).lines(
        torch.linspace(-4, 4, 9 if quick else 61, dtype=torch.float64).unsqueeze(-1), STEPS[2:3] if quick else STEPS
    )
    studies: dict[str, list[Found]] = {}
    for problem in PROBLEMS:
        for seed in range(arguments.seed, arguments.seed + count):
            studies.setdefault(problem, []).append(predictions(problem, seed, grid, steps))
            print(f"{problem}, data set {seed}: {time.process_time() - start:.0f} s", flush=True)
    tables = [line for problem, sets in studies.items() for line in table(problem, sets, grid)]
    lines = [
        "# Hessian-free Laplace", "", f"Made by `python scripts/hfl.py{' --quick' * quick}`.", "",
        f"![bands of HFL, amortised HFL, Laplace, ntkgp and an ensemble]({page.stem}.png)", "",
        *(part.replace("\n", " ") + "\n" for part in (__doc__ or "").split("\n\n")[1:3]),
        *limits, "## What they cover", "",
        f"{count} data sets of each problem; mean ± s.e. over them. All but the last two rows have the same mean (the "
        f"mode θ̂), λ = {PRECISION:g} and the true noise; ntkgp finds λ and noise by its evidence at θ⋆, and the "
        "ensemble has its own means. An interval of f ± noise alone is "
        f"{2 * 1.959964 * NOISE**0.5:.2f} wide. The amortised form is refitted once with the mean prediction of all "
        f"{points} inputs of [-4, 4].", "",
        *tables, f"{time.process_time() - start:.0f} s of processor time.",
    ]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    common.write(page, text)
    draw(studies, grid, page.with_suffix(".png"))


if __name__ == "__main__":
    main()
