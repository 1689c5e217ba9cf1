"""Hessian-free Laplace: the ratio of its variances to the full-Hessian Laplace ones, by step and by form.

60 data of y = sin 1.5x with noise 0.2 on two intervals, a network 1-20-1. On the network itself the limit of small
steps is the Laplace approximation with the full Hessian, and not with the generalised Gauss-Newton matrix; on the
tangent model every step is exact; the amortised form gives covariances with the mean prediction (McInerney & Kallus
2024).

    python scripts/hfl.py [--out docs/results]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ntkgp.baselines.hessian_free import HessianFreeLaplace
from ntkgp.evaluation.plots import new_figure, predictive_bands
from ntkgp.evaluation.training import seeded, train

NOISE, PRECISION = 0.04, 1.0
STEPS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def load(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(60, 1, generator=generator, dtype=torch.float64) - 3
    x[30:] += 4
    return x, torch.sin(1.5 * x) + 0.2 * torch.randn(x.shape, generator=generator, dtype=torch.float64)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    x, y = load(arguments.seed)
    with seeded(arguments.seed):
        net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    train(net, x, y, steps=2000, learning_rate=1e-2, seed=arguments.seed)
    points = torch.tensor([[-3.5], [-2.0], [0.0], [2.0], [3.5]], dtype=torch.float64)
    grid = torch.linspace(-4, 4, 61, dtype=torch.float64).unsqueeze(-1)
    options = {"noise": NOISE, "precision": PRECISION, "max_iterations": 60}
    rows = []
    for step in STEPS:
        cells = []
        for form in ("central", "signed"):
            hfl = HessianFreeLaplace(net, step=step, form=form, **options).fit((x, y))
            joint, ggn = covariances(net, hfl.state_dict()["theta"], x, y, points)
            ratio = hfl.covariance(points)[:, 0, 0] / joint.diag()
            cells.append(f"{float(ratio.min()):.5f} to {float(ratio.max()):.5f}")
        tangent = HessianFreeLaplace(net, step=step, model="tangent", **options).fit((x, y))
        exact = covariances_of_tangent(tangent, x, points)
        error = (tangent.covariance(points)[:, 0, 0] / exact - 1).abs().max()
        rows.append((step, *cells, float(error)))
    best = HessianFreeLaplace(net, **options).fit((x, y))
    theta, drift = best.state_dict()["theta"], best.drift
    curvature = joint.diag() / ggn.diag()
    everywhere, _ = covariances(net, theta, x, y, grid)
    amortised = HessianFreeLaplace(net, amortised=True, **options).fit((x, y)).average_covariance(grid)[:, 0, 0]
    fraction = amortised / everywhere.diag()
    agreement = float((amortised - everywhere.mean(1)).abs().max() / everywhere.mean(1).abs().max())
    lines = [
        f"60 data, 1-20-1 tanh, σ² = {NOISE:g}, λ = {PRECISION:g}; {time.perf_counter() - start:.0f} s.",
        f"Control: {drift}.",
        "",
        "| step | network, central / full Hessian | network, one-sided / full Hessian | tangent, relative error |",
        "|---|---|---|---|",
    ]
    lines += [f"| {step:g} | {central} | {signed} | {error:.1e} |" for step, central, signed, error in rows]
    lines += [
        "",
        f"Full Hessian / Gauss-Newton variance: {float(curvature.min()):.3f} to {float(curvature.max()):.3f}.",
        f"Amortised: the covariance with the mean prediction, relative error {agreement:.0e}; "
        f"of the variance it is {float(fraction.min()):.2f} to {float(fraction.max()):.2f}, "
        f"negative at {float((fraction < 0).double().mean()):.0%} of {len(grid)} inputs.",
    ]
    text = "\n".join(lines)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = "Made by `python scripts/hfl.py`.\n\n"
    (arguments.out / "hfl.md").write_text("# Hessian-free Laplace\n\n" + command + text + "\n")
    figure, axes = new_figure(1, 2, (9.0, 3.5))
    mean = best.predict(grid).latent.mean
    panels = (("variance", best.covariance(grid)[:, 0, 0]), ("amortised, |covariance with the mean|", amortised.abs()))
    for ax, (title, variance) in zip(axes, panels, strict=True):
        predictive_bands(grid, mean, variance, data=(x, y), ax=ax)
        ax.set_title(f"HFL, {title}")
        ax.set_ylim(-4, 4)
    figure.savefig(arguments.out / "hfl.png", dpi=120)


def covariances_of_tangent(hfl: HessianFreeLaplace, x: Tensor, points: Tensor) -> Tensor:
    """Variances of the tangent model at its posterior, (N,)."""
    j, test = (hfl.lin.jacobian(inputs)[:, 0] for inputs in (x, points))
    ggn = j.T @ j / NOISE + PRECISION * torch.eye(j.shape[-1], dtype=j.dtype)
    return (test * torch.linalg.solve(ggn, test.T).T).sum(-1)


if __name__ == "__main__":
    main()
