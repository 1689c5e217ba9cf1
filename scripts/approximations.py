"""How far VaLLA and ELLA are from the exact Laplace–GP on a 1-D toy: table of divergences, figure of bands.

A network 1-50-50-1 (tanh) is trained on 400 points with gaps; precision and noise come from its evidence and are the
same for all methods. Compared are the *predictive* covariances (latent + σ²I, no jitter) on 200 points of
[min − 5, max + 5]: Kullback–Leibler divergences in both directions and summed over the marginals. VaLLA with fixed
(k-means) and learned inducing inputs, α = 1 beside the ELBO, and ELLA with M landmarks and as many features.

    python scripts/approximations.py [--quick] [--data FOLDER] [--out docs/results]

With FOLDER/toys/agw1d.npz the data are those of the paper's illustration; otherwise similar ones are generated.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gpytorch
import torch
from torch import Tensor, nn

import common
import ntkgp
from ntkgp.evaluation.divergence import gaussian_kl
from ntkgp.evaluation.plots import new_figure, predictive_bands
from ntkgp.evaluation.training import seeded
from ntkgp.models.nystrom import NystromNTKGP
from ntkgp.models.variational import VariationalNTKGP, kmeans_inducing_points

SIZES = (5, 10, 20, 50)
ELLA_SEEDS = 20
STEPS = 12000


class Row(NamedTuple):
    """One line of the table; divergences as (exact‖approx, approx‖exact, their sums over the marginals)."""

    size: int
    method: str
    divergence: tuple[float, float, float, float]
    sd_ratio: float
    seconds: float
    cpu: float


def trained(x: Tensor, y: Tensor, steps: int, seed: int) -> nn.Module:
    """Adam 1e-3, batches of 100, no weight decay."""
    with seeded(seed):
        net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    generator, done = torch.Generator().manual_seed(seed), 0
    while done < steps:
        for rows in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            (net(x[rows]) - y[rows]).square().mean().backward()
            optimizer.step()
            done += 1
    return net.eval()


class Comparison:
    """The exact model at its evidence's hyper-parameters, and what is measured against it."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, at: str) -> None:
        self.data = x, y.squeeze(-1)
        self.lin = ntkgp.LinearizedNetwork(net, x[:8], groups="single")
        constraint = gpytorch.constraints.GreaterThan(1e-8)
        self._likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=constraint)
        self.exact = ntkgp.ExactNTKGP(*self.data, self.likelihood(), self.lin)
        self.report = ntkgp.fit_evidence(self.exact, at=at)
        self.exact.eval()
        self.points = torch.linspace(float(x.min()) - 5, float(x.max()) + 5, 200, dtype=torch.float64).unsqueeze(-1)
        self.covariance = self.predictive(self.exact)

    def likelihood(self) -> gpytorch.likelihoods.GaussianLikelihood:
        """One with the fitted noise, for a model of its own."""
        return copy.deepcopy(self._likelihood)

    def predictive(self, model: Callable[[Tensor], gpytorch.distributions.MultivariateNormal]) -> Tensor:
        """Predictive covariance, latent + σ²I."""
        with torch.no_grad():
            latent = model(self.points).covariance_matrix
        return latent + float(self.report.noise) * torch.eye(len(latent), dtype=torch.float64)

    def measure(self, size: int, method: str, covariance: Tensor, spent: tuple[float, float]) -> Row:
        """Divergences from the exact model."""
        kl = gaussian_kl(self.covariance, covariance)
        ratio = float((covariance.diagonal() / self.covariance.diagonal()).sqrt().mean())
        divergence = (kl.forward, kl.reverse, kl.marginal_forward, kl.marginal_reverse)
        return Row(size, method, tuple(float(v) for v in divergence), ratio, *spent)

    def valla(self, size: int, learned: bool, objective: str | float = "elbo") -> tuple[Row, VariationalNTKGP]:
        """Fit VaLLA at the exact model's hyper-parameters."""
        start, cpu = time.perf_counter(), time.process_time()
        points, _ = kmeans_inducing_points(self.data[0], size)
        model = VariationalNTKGP(
            points, self.likelihood(), self.lin, len(self.data[0]), learn_inducing=learned,
            objective=objective,
        )  # fmt: skip
        model.set_hyperparameters(self.report.precision, self.report.noise)
        options = {} if objective == "elbo" else {"iterations": 400, "batch_size": 100, "learning_rate": 1e-2}
        model.fit(self.data, evidence=None, progress=False, **options)
        spent = time.perf_counter() - start, time.process_time() - cpu
        name = "VaLLA, " + ("ELBO" if objective == "elbo" else f"α = {objective:g}")
        name += ", learned Z" if learned else ", k-means Z"
        return self.measure(size, name, self.predictive(model.eval()), spent), model

    def ella(self, size: int, seed: int, residual: bool = False) -> tuple[Row, NystromNTKGP]:
        """ELLA at the same hyper-parameters."""
        start, cpu = time.perf_counter(), time.process_time()
        rows = torch.randperm(len(self.data[0]), generator=torch.Generator().manual_seed(seed))[:size]
        model = NystromNTKGP(
            self.data, self.likelihood(), self.lin, landmarks=self.data[0][rows], num_features=size, residual=residual
        )
        model.set_hyperparameters(self.report.precision, self.report.noise)
        model.fit(progress=False)
        spent = time.perf_counter() - start, time.process_time() - cpu
        return self.measure(size, "ELLA", self.predictive(model.eval()), spent), model


def averaged(rows: list[Row]) -> Row:
    """The mean over seeds."""
    divergence = tuple(sum(column) / len(rows) for column in zip(*(row.divergence for row in rows), strict=True))
    return rows[0]._replace(
        method=f"ELLA, mean of {len(rows)} landmark draws", divergence=divergence,
        sd_ratio=sum(row.sd_ratio for row in rows) / len(rows), seconds=sum(row.seconds for row in rows) / len(rows),
        cpu=sum(row.cpu for row in rows) / len(rows),
    )  # fmt: skip


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| M | method | KL(exact‖approx) | KL(approx‖exact) | Σ marginal KL(exact‖approx) "
        "| Σ marginal KL(approx‖exact) | mean sd ratio | seconds | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = " | ".join(f"{value:.3g}" for value in row.divergence)
        lines.append(
            f"| {row.size} | {row.method} | {numbers} | {row.sd_ratio:.3f} | {row.seconds:.2f} | {row.cpu:.2f} |"
        )
    return lines


def figure(comparison: Comparison, models: dict[str, object], path: Path) -> None:
    """Bands of ± 2 standard deviations of the exact model and of the approximations."""
    fig, axes = new_figure(2, 2, (10.0, 6.5))
    x, y = comparison.data
    for ax, (name, model) in zip(axes, models.items(), strict=True):
        with torch.no_grad():
            latent = model(comparison.points)  # type: ignore[operator]
        predictive_bands(
            comparison.points, latent.mean, latent.variance, float(comparison.report.noise), data=(x, y), ax=ax
        )
        if isinstance(model, VariationalNTKGP):
            z = model.inducing_points.detach().flatten()
            ax.plot(z.numpy(), torch.full_like(z, float(y.min()) - 2.5).numpy(), "|", color="tab:red", ms=10)
        ax.set_title(name)
        ax.set_ylim(float(y.min()) - 3, float(y.max()) + 3)
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = common.parser(__doc__, quick="a few steps: no result")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--at", default="theta_map", choices=("theta_map", "theta_star"))
    parser.add_argument("--seed", type=int, default=2147483647)
    arguments = common.parse(parser, steps=100)
    x, y, source = common.agw1d(arguments.data)
    start = time.perf_counter()
    net = trained(x, y, arguments.steps, arguments.seed)
    training = time.perf_counter() - start
    comparison = Comparison(net, x, y, arguments.at)
    report = comparison.report
    rows, shown = [], {"exact": comparison.exact}
    for size in SIZES:
        fixed, _ = comparison.valla(size, learned=False)
        learned, model = comparison.valla(size, learned=True)
        draws = [comparison.ella(size, seed) for seed in range(ELLA_SEEDS)]
        rows += [fixed, learned, averaged([row for row, _ in draws])]
        if size == 20:
            alpha, other = comparison.valla(size, learned=True, objective=1.0)
            rows.append(alpha)
            shown |= {
                "VaLLA, 20 learned inducing inputs": model, "VaLLA with α = 1": other, "ELLA, M = K = 20": draws[0][1]
            }  # fmt: skip
    by = {(row.size, row.method): row for row in rows}
    best, ella = by[20, "VaLLA, ELBO, learned Z"], by[20, f"ELLA, mean of {ELLA_SEEDS} landmark draws"]
    fifty = by[50, "VaLLA, ELBO, learned Z"]
    lines = [
        f"Data: {source}, {len(x)} points; network 1-50-50-1 tanh, {arguments.steps} steps of Adam "
        f"({training:.0f} s); evidence at {arguments.at}: prior standard deviation "
        f"{float(report.precision.rsqrt()):.4f}, log noise {float(report.noise.log()):.4f}. Predictive covariances "
        "(latent + σ²I), 200 points, no jitter added; float64.",
        "",
        *table(rows),
        "",
        f"M = 20, KL(exact‖VaLLA): {best.divergence[0]:.3g} (asked: <= 1), ELLA's over it: "
        f"{ella.divergence[0] / best.divergence[0]:.0f} (asked: >= 10); fit {best.seconds:.1f} s, "
        f"{best.cpu:.1f} s of processor time (asked: <= 10).",
        f"M = 50, KL(exact‖VaLLA): {fifty.divergence[0]:.1e} (asked: <= 1e-3).",
    ]
    text = "\n".join(lines)
    print(text)
    page = common.page_of(arguments, "approximations")
    common.write(page, "# Approximations of the exact Laplace–GP\n\n" + text)
    figure(comparison, shown, page.with_suffix(".png"))


if __name__ == "__main__":
    main()
