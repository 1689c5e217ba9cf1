"""The picture of how.md: ``python docs/how_picture.py`` writes docs/how.svg. Every panel is computed, none is drawn."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import nn

import ntkgp
from ntkgp.evaluation.datasets import toy_gap
from ntkgp.evaluation.training import seeded, train

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"


def curve(ax: Axes, grid: torch.Tensor, x: torch.Tensor, y: torch.Tensor, title: str) -> None:
    """Data and the frame around them."""
    ax.plot(x, y, ".", color="black", markersize=3)
    ax.set(title=title, ylim=(-2.6, 2.6), xlim=(grid[0].item(), grid[-1].item()), xticks=[], yticks=[])


def arrow(figure: Figure, left: Axes, right: Axes, text: str) -> None:
    """From one panel to the next, with what happens on the way."""
    link = ConnectionPatch((1.03, 0.5), (-0.03, 0.5), "axes fraction", "axes fraction", axesA=left, axesB=right)
    link.set(arrowstyle="-|>", mutation_scale=14, color=GREY)
    figure.add_artist(link)
    a, b = left.get_position(), right.get_position()
    figure.text((a.x1 + b.x0) / 2, (a.y0 + a.y1) / 2 + 0.06, text, ha="center", va="bottom", fontsize=8, color=GREY)


def main() -> None:
    """Train a small network, and draw it as a function, as Grams, as a prior and as a posterior."""
    x, y = toy_gap(60, seed=0)
    with seeded(0):
        net = nn.Sequential(
            nn.Linear(1, 30), nn.LayerNorm(30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1)
        )
    train(net, x, y, steps=600, learning_rate=1e-2)
    net, x, y = net.double(), x.double(), y.double()
    grid = torch.linspace(x.min() - 0.6, x.max() + 0.6, 200, dtype=torch.float64).unsqueeze(-1)
    model = ntkgp.from_network(net, (x, y), groups="layer")
    lin, kernel = model.lin, model.kernel
    order = x[:, 0].argsort()
    with torch.no_grad():
        f, latent = net(grid)[:, 0], model(grid)
        prior = kernel(grid).to_dense()
        grams = lin.grams(x[order]) / model.kernel.precision.reshape(-1, 1, 1)
        noise = torch.randn(len(grid), 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(prior)
        before = ntkgp.means.LinearizedMean(lin)(grid)[:, None] + vectors * values.clamp_min(0).sqrt() @ noise
        after = model.sample_functions(6, generator=torch.Generator().manual_seed(0))(grid)
    mpl.rcParams.update({"svg.hashsalt": "ntkgp", "font.size": 9, "axes.titlesize": 9, "axes.linewidth": 0.6})
    figure = Figure(figsize=(11, 2.9), facecolor="white")
    boxes = [figure.add_axes((0.012 + 0.2605 * i, 0.16, 0.19, 0.66)) for i in range(4)]
    curve(boxes[0], grid, x, y, "your trained network $f(x;\\tildeθ)$")
    boxes[0].plot(grid, f, color=BLUE)
    boxes[1].imshow(grams.sum(0), cmap="Blues", aspect="auto")
    boxes[1].set(title="kernel  $K=\\Sigma_g\\,K_g/λ_g$", xticks=[], yticks=[])
    curve(boxes[2], grid, x, y, "prior: what its weights could say")
    boxes[2].plot(grid, before, color=ORANGE, lw=0.8, alpha=0.8)
    boxes[2].set_ylim(-1.05 * before.abs().max().item(), 1.05 * before.abs().max().item())
    curve(boxes[3], grid, x, y, "posterior: your network, with error bars")
    sd = latent.variance.sqrt()
    boxes[3].fill_between(grid[:, 0], latent.mean - 2 * sd, latent.mean + 2 * sd, color=ORANGE, alpha=0.3, lw=0)
    boxes[3].plot(grid, after.T, color=ORANGE, lw=0.6, alpha=0.8)
    boxes[3].plot(grid, latent.mean, color=BLUE)
    for left, right, text in zip(
        boxes, boxes[1:], ("derivatives\nin θ", "evidence:\nλ, σ²", "condition\non the data"), strict=False
    ):
        arrow(figure, left, right, text)
    below = "data and its fit", "one Gram per group, built once", "θ ~ N(0, Λ⁻¹); a wider scale"
    for ax, text in zip(boxes, (*below, "mean: the network's output"), strict=True):
        ax.set_xlabel(text, color=GREY)
    figure.savefig(Path(__file__).with_name("how.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
