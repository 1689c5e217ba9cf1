"""Evidence at θ⋆ and at θ̃ for a BatchNorm network whose weights are scaled by k: table and figure.

A network 1-50-50-1 with BatchNorm represents the same function for every scale k of the weights before a BatchNorm (its
running statistics follow the scale). The error bars should not depend on k either. The script fits the evidence for
{one precision, one per normalisation group} × {at the trained weights θ̃, at θ⋆} and prints the predictive standard
deviation outside the data (Antorán et al. 2022).

    python scripts/theta_star.py [--quick] [--data FOLDER] [--out docs/results]

With FOLDER/toys/agw1d.npz the data are those of the paper's illustration; otherwise similar ones are generated.
"""

from __future__ import annotations

import copy
import time

import gpytorch
import torch
from torch import Tensor, nn

import common
import ntkgp
from ntkgp.evaluation.plots import new_figure, predictive_bands
from ntkgp.evaluation.training import seeded, train

SCALES = (0.1, 1.0, 10.0)
METHODS = (
    ("single", "theta_map"),
    ("single", "theta_star"),
    ("normalization", "theta_map"),
    ("normalization", "theta_star"),
)
LABELS = {
    ("single", "theta_map"): "single λ, θ̃",
    ("single", "theta_star"): "single λ, θ⋆",
    ("normalization", "theta_map"): "groups, θ̃",
    ("normalization", "theta_star"): "groups, θ⋆",
}


def network() -> nn.Sequential:
    # eps far below the statistics: only then is the function exactly the same for every scale.
    layers = [nn.Linear(1, 50), nn.BatchNorm1d(50, eps=1e-12), nn.ReLU()]
    layers += [nn.Linear(50, 50), nn.BatchNorm1d(50, eps=1e-12), nn.ReLU(), nn.Linear(50, 1)]
    return nn.Sequential(*layers).double()


def scaled(net: nn.Sequential, k: float) -> nn.Sequential:
    """The same function with the weights before each BatchNorm multiplied by k."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for linear, norm in ((other[0], other[1]), (other[3], other[4])):
            linear.weight.mul_(k)
            linear.bias.mul_(k)
            norm.running_mean.mul_(k)
            norm.running_var.mul_(k**2)
    return other


def fit(net: nn.Module, x: Tensor, y: Tensor, groups: str, at: str) -> tuple[ntkgp.ExactNTKGP, object]:
    lin = ntkgp.LinearizedNetwork(net, x[:8], groups=groups)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-8))
    model = ntkgp.ExactNTKGP(x, y, likelihood, lin)
    report = ntkgp.fit_evidence(model, at=at)
    return model.eval(), report


def main() -> None:
    parser = common.parser(__doc__, quick="a few steps: no result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = common.parse(parser, steps=100)
    start = time.perf_counter()
    x, y, source = common.agw1d(arguments.data)
    with seeded(arguments.seed):
        net = network()
    train(net, x, y, steps=arguments.steps, learning_rate=1e-2, seed=arguments.seed)
    with torch.no_grad():
        mse = float((net(x) - y).square().mean())
    outside = torch.tensor([[12.0]], dtype=torch.float64)
    inside_gap = torch.tensor([[-3.0]], dtype=torch.float64)
    grid = torch.linspace(-12, 12, 241, dtype=torch.float64).unsqueeze(-1)
    rows, bands = [], {}
    for k in SCALES:
        scaled_net = scaled(net, k)
        with torch.no_grad():
            torch.testing.assert_close(scaled_net(grid), net(grid), rtol=1e-6, atol=1e-8)
        for groups, at in METHODS:
            model, report = fit(scaled_net, x, y, groups, at)
            with torch.no_grad():
                predictive = model.likelihood(model(torch.cat([outside, inside_gap])))
                sd = predictive.variance.sqrt().tolist()
                if k == 1.0:
                    latent = model(grid)
                    bands[groups, at] = (latent.mean, latent.variance, float(report.noise))
            rows.append((k, LABELS[groups, at], *sd, float(report.noise), report.log_evidence, report.converged))
    lines = [
        f"Data: {source} ({len(x)} points, |x| <= {float(x.abs().max()):.1f}); training MSE {mse:.3e}; "
        f"{time.perf_counter() - start:.0f} s.",
        "",
        "| k | evidence | sd at x = 12 | sd at x = -3 | noise | log evidence | converged |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {k:g} | {label} | {a:.4f} | {b:.4f} | {s:.3e} | {m:.2f} | {c} |" for k, label, a, b, s, m, c in rows]
    by = {(k, label): a for k, label, a, *_ in rows}
    best = [by[k, LABELS["normalization", "theta_star"]] for k in SCALES]
    drift = (max(best) - min(best)) / best[1]
    ratio = min(by[k, LABELS["single", "theta_map"]] / by[k, LABELS["normalization", "theta_star"]] for k in SCALES)
    lines += ["", f"groups, θ⋆: relative change over k {drift:.1e} (asked: <= 1e-3)."]
    lines += [f"single λ, θ̃ over groups, θ⋆: smallest ratio {ratio:.1f} (asked: >= 3)."]
    text = "\n".join(lines)
    print(text)
    page = common.page_of(arguments, "theta_star")
    common.write(page, f"# Evidence at θ⋆ and at θ̃, and the scale of the weights\n\n{text}")
    figure, axes = new_figure(2, 2, (10.0, 6.5))
    for ax, key in zip(axes, METHODS, strict=True):
        predictive_bands(grid, *bands[key], data=(x, y), ax=ax)
        ax.set_title(f"{LABELS[key]} (k = 1)")
        ax.set_ylim(float(y.min()) - 3, float(y.max()) + 3)
    figure.savefig(page.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
