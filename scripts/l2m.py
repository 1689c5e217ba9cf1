"""The second moment of an optimiser as a posterior: printed form, corrected form and diagonal Gauss-Newton.

y = x³ + noise of standard deviation 3, a network with two hidden layers of 40 ReLU units. For N = 20 … 2000 data it
prints the standard deviation of the weights, how much of their precision the data give, and how the corrected form
compares with diag(Σ JᵀJ/σ²) + λ (Perone et al. 2021).

    python scripts/l2m.py [--quick] [--data FOLDER] [--out docs/results]

With FOLDER/toys/cubic_l2m.npz the 20 data of the figure are those.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import common
from ntkgp.baselines.l2m import L2M
from ntkgp.evaluation.plots import new_figure, predictive_bands
from ntkgp.evaluation.training import seeded

DECAY, BATCH, PRECISION = 0.1, 10, 1.0
SIZES = (20, 200, 2000)


def load(folder: Path, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Some points of the cubic on [-4, 4]; the published 20 where they are at hand."""
    path = folder / "toys" / "cubic_l2m.npz"
    if n == 20 and path.is_file():
        arrays = np.load(path)
        x, y = (torch.from_numpy(arrays[name]).double().reshape(-1, 1) for name in ("x", "y"))
        return x, y
    generator = torch.Generator().manual_seed(seed)
    x = 8 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 4
    return x, x**3 + 3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)


def trained(x: Tensor, y: Tensor, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network and its AdamW, whose last steps are small enough to stay at a mode."""
    with seeded(seed):
        net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:BATCH]
        optimizer.zero_grad()
        mse_loss(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return net, optimizer


def gauss_newton(l2m: L2M, x: Tensor) -> Tensor:
    """Diagonal of Σ JᵀJ/σ² + λ, (P,)."""
    total = torch.zeros(l2m.lin.num_parameters, dtype=torch.float64)
    for rows in x.split(256):
        total += l2m.lin.jacobian(rows).square().sum((0, 1))
    return total / float(l2m.state_dict()["noise"]) + PRECISION


def main() -> None:
    parser = common.parser(__doc__, quick="a few steps: no result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = common.parse(parser, steps=50)
    start = time.perf_counter()
    grid = torch.linspace(-6, 6, 121, dtype=torch.float64).unsqueeze(-1)
    rows, bands, ratios = [], {}, []
    for n in SIZES:
        x, y = load(arguments.data, n, arguments.seed)
        centre, scale = y.mean(), y.std()
        standard = (y - centre) / scale
        net, optimizer = trained(x, standard, arguments.steps, arguments.seed)
        fits = {
            "printed": L2M(net, optimizer=optimizer, variant="paper"),
            "corrected": L2M(net, optimizer=optimizer, batch_size=BATCH, precision=PRECISION, prediction="glm"),
        }
        for name, l2m in fits.items():
            l2m.fit((x, standard))
            sd = l2m.weight_precision.rsqrt()
            latent = l2m.predict(grid).latent
            share = float(l2m.data_share.median())
            rows.append((n, name, float(sd.min()), float(sd.median()), float(sd.max()), share))
            if n == SIZES[0]:
                bands[name] = latent.mean * scale + centre, latent.variance * scale**2
        expected = gauss_newton(fits["corrected"], x).rsqrt()
        rows.append((n, "diagonal GGN", float(expected.min()), float(expected.median()), float(expected.max()), None))
        ratio = fits["corrected"].weight_precision.rsqrt() / expected
        within = float(((ratio > 0.5) & (ratio < 2)).double().mean())
        ratios.append((n, float(ratio.median()), within))
    lines = [
        f"Two hidden layers of 40 ReLU, AdamW (decay {DECAY:g}), {arguments.steps} steps, batches of {BATCH}, "
        f"standardised targets; {time.perf_counter() - start:.0f} s.",
        "",
        "| N | form | smallest sd of a weight | median | largest | data's share of the precision (median) |",
        "|---|---|---|---|---|---|",
    ]
    for n, name, low, middle, high, part in rows:
        lines.append(
            f"| {n} | {name} | {low:.4f} | {middle:.4f} | {high:.4f} | {'' if part is None else f'{part:.2g}'} |"
        )
    lines += ["", "| N | corrected / diagonal GGN, median ratio of sd | weights within a factor 2 |", "|---|---|---|"]
    lines += [f"| {n} | {ratio:.3f} | {within:.1%} |" for n, ratio, within in ratios]
    text = "\n".join(lines)
    print(text)
    page = common.page_of(arguments, "l2m")
    head = "# L2M: as printed and corrected\n\nMade by `python scripts/l2m.py`.\n\n![bands on the cubic](l2m.png)\n\n"
    common.write(page, head + text)
    figure, axes = new_figure(1, 2, (9.0, 3.5))
    data = load(arguments.data, SIZES[0], arguments.seed)
    for ax, (name, (mean, variance)) in zip(axes, bands.items(), strict=True):
        predictive_bands(grid, mean, variance, data=data, truth=grid**3, ax=ax)
        ax.set_title(f"L2M, {name}, N = {SIZES[0]}")
        ax.set_ylim(-200, 200)
    figure.savefig(page.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
