"""The networks and data that the laws are tried on: trained, at least three hidden layers, several outputs."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

DOUBLE = torch.float64
NAMES = ("normalised", "plain", "relu", "batchnorm", "softmax", "images")
N, N_TEST, WIDTH = 20, 6, 8
NOISE = 0.09


@dataclass(frozen=True, eq=False)
class Problem:
    """A trained network with data, test inputs and hyper-parameters.

    :ivar precision: one for each tensor, from 0.3 to 3.3, (T,).
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    x_test: Tensor
    likelihood: str
    precision: Tensor
    noise: float = NOISE


def _mlp(activation: type[nn.Module], norm: str, outputs: int) -> nn.Sequential:
    """Three hidden layers; those before a normaliser without affine parameters have no biases."""
    layers: list[nn.Module] = []
    for width in (3, WIDTH, WIDTH):
        layers.append(nn.Linear(width, WIDTH, bias=norm != "layer"))
        if norm == "layer":
            layers.append(nn.LayerNorm(WIDTH, eps=0.0, elementwise_affine=False))
        elif norm == "batch":
            layers.append(nn.BatchNorm1d(WIDTH))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs)).double()


def _network(name: str) -> nn.Sequential:
    if name == "images":
        return nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 1)
        ).double()  # fmt: skip
    activation = nn.ReLU if name == "relu" else nn.Tanh
    return _mlp(activation, {"normalised": "layer", "softmax": "layer", "batchnorm": "batch"}.get(name, "none"), 3)


def _targets(name: str, x: Tensor, generator: torch.Generator) -> Tensor:
    if name == "softmax":
        return torch.randint(0, 3, (len(x),), generator=generator)
    if name == "images":
        clean = torch.sin(2 * x)
    else:
        clean = torch.sin(x @ torch.randn(3, 3, generator=generator, dtype=DOUBLE))
    return clean + 0.3 * torch.randn(clean.shape, generator=generator, dtype=DOUBLE)


@functools.cache
def problem(name: str) -> Problem:
    """Build and train one of :data:`NAMES` (full-batch Adam, a fixed seed); the same object in every call.

    ==========  ====================================================================================================
    normalised  regression, C = 3; three layers of 8 tanh, LayerNorm without affine parameters and eps = 0
    plain       the same without normalisers, with biases
    relu        as ``plain`` with ReLU
    batchnorm   as ``plain`` with affine BatchNorm, to be used in evaluation mode
    softmax     as ``normalised``, three classes with random labels
    images      three convolutions from 1 × 3 × 3 images to 1 × 3 × 3 images
    ==========  ====================================================================================================

    :raises ValueError: another name.

    >>> problem("normalised").y.shape
    torch.Size([20, 3])
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {NAMES}, got {name!r}")
    seed = 1 + NAMES.index(name)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net, generator = _network(name), torch.Generator().manual_seed(seed)
        shape = (1, 3, 3) if name == "images" else (3,)
        n = 8 if name == "images" else N
        x = torch.randn(n, *shape, generator=generator, dtype=DOUBLE)
        x_test = 2 * torch.randn(N_TEST, *shape, generator=generator, dtype=DOUBLE)
        y = _targets(name, x, generator)
        loss = nn.functional.cross_entropy if name == "softmax" else nn.functional.mse_loss
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-3)
        for _ in range(60 if name == "softmax" else 150):
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()
        net.zero_grad(set_to_none=True)
        count = len(list(net.parameters()))
        precision = 0.3 + 3 * torch.rand(count, generator=generator, dtype=DOUBLE)
    likelihood = "classification" if name == "softmax" else "regression"
    return Problem(net.eval(), x, y, x_test, likelihood, precision)


# --- changes that must not matter, or in a known way ----------------------------------------------


def _layers(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


def _factors(net: nn.Module, of: dict[int, float]) -> Tensor:
    """The factor of each tensor, (T,), from those of some by id."""
    return torch.tensor([of.get(id(p), 1.0) for p in net.parameters()], dtype=DOUBLE)


def permuted(p: Problem) -> Problem:
    """The same function with the units of the first hidden layer in another order."""
    net = copy.deepcopy(p.net)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3))
    first, second = _layers(net)[:2]
    with torch.no_grad():
        first.weight.copy_(first.weight[order].clone())
        if first.bias is not None:
            first.bias.copy_(first.bias[order].clone())
        second.weight.copy_(second.weight[:, order].clone())
    return replace(p, net=net)


def rescaled(p: Problem, factors: tuple[float, float, float] = (5.0, 0.2, 3.0)) -> tuple[Problem, Tensor]:
    """The same function with the weights before each normaliser times k; and k of each tensor, (T,)."""
    net, of = copy.deepcopy(p.net), {}
    with torch.no_grad():
        for layer, k in zip(_layers(net), factors, strict=False):
            layer.weight.mul_(k)
            of[id(layer.weight)] = k
    return replace(p, net=net), _factors(net, of)


def relu_rescaled(p: Problem, a: float = 3.0) -> tuple[Problem, Tensor]:
    """(aW₁, ab₁, W₂/a): the same function of a ReLU network; and the factor of each tensor, (T,)."""
    net = copy.deepcopy(p.net)
    first, second = _layers(net)[:2]
    of = {id(first.weight): a, id(first.bias): a, id(second.weight): 1 / a}
    with torch.no_grad():
        for q in net.parameters():
            q.mul_(of.get(id(q), 1.0))
    return replace(p, net=net), _factors(net, of)


def head_scaled(p: Problem, c: float) -> tuple[Problem, Tensor]:
    """Head and targets times c (of labels nothing changes); and the factor of each tensor, (T,)."""
    net = copy.deepcopy(p.net)
    head = _layers(net)[-1]
    of = {id(q): c for q in head.parameters()}
    with torch.no_grad():
        for q in head.parameters():
            q.mul_(c)
    y = p.y if p.likelihood == "classification" else c * p.y
    return replace(p, net=net, y=y, noise=p.noise * c * c), _factors(net, of)
