"""Small deep networks, and their kernel by row-by-row autograd in float64, independent of ntkgp."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from ntkgp import LinearizedNetwork, ParameterGroups

WIDTH = 3


def seeded(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that leave the global random state alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def deep_net(outputs: int, dtype: torch.dtype = torch.float64, width: int = WIDTH, seed: int = 0) -> nn.Module:
    """Three layers with two LayerNorms, every weight, bias, gain and shift random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(width, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(),
            nn.Linear(5, outputs),
        )  # fmt: skip
        for p in net.parameters():
            nn.init.normal_(p, 0.3 if p.ndim == 1 else 0.0, 0.8)
    return net.to(dtype)


@functools.cache
def linearized(outputs: int, dtype: torch.dtype = torch.float64) -> LinearizedNetwork:
    """The deep network, linearised, with G = 3 groups: what each LayerNorm normalises, and the rest, not contiguous."""
    groups = ParameterGroups({"first": "0.*", "second": "3.*", "rest": ["1.*", "4.*", "6.*"]})
    return LinearizedNetwork(deep_net(outputs, dtype), seeded(2, WIDTH, seed=1, dtype=dtype), groups=groups)


def dense_jacobian(net: nn.Module, x: Tensor) -> Tensor:  # (N, D) -> (N, C, P)
    """Rows of J one by one, in float64, with a graph to x."""
    net = copy.deepcopy(net).double().eval()
    params = [p for p in net.parameters() if p.requires_grad]
    rows = []
    with torch.enable_grad():
        for row in x.double():
            out = net(row.unsqueeze(0))[0]
            grads = [torch.autograd.grad(o, params, retain_graph=True, create_graph=x.requires_grad) for o in out]
            rows.append(torch.stack([torch.cat([g.reshape(-1) for g in grad]) for grad in grads]))
    return torch.stack(rows)


def dense_kernel(net: nn.Module, lin: LinearizedNetwork, x1: Tensor, x2: Tensor, variance: Tensor) -> Tensor:
    """J(x1) diag(variance of each parameter's group) J(x2)ᵀ, with batch dimensions, differentiable in everything."""
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], variance.shape[:-1])
    if batch:
        x1, x2 = (x.expand(*batch, *x.shape[-2:]) for x in (x1, x2))
        variance = variance.expand(*batch, variance.shape[-1])
        return torch.stack([dense_kernel(net, lin, *entry) for entry in zip(x1, x2, variance, strict=True)])
    ids = torch.cat(
        [
            torch.full((p.numel(),), next(g for g, m in enumerate(lin.groups.members) if name in m))
            for name, p in net.named_parameters()
        ]
    )
    j1, j2 = dense_jacobian(net, x1).flatten(0, 1), dense_jacobian(net, x2).flatten(0, 1)
    return (j1 * variance.double()[ids]) @ j2.mT


def rel(a: Tensor, b: Tensor) -> float:
    """max|a − b| / max|b|."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


class AnyWidthNet(nn.Module):
    """A three-layer network that takes inputs of any width: gpytorch's shared suites feed many."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.unsqueeze(-1)).mean(-2))


class AnyWidth(LinearizedNetwork):
    """A linearised network that repacks itself for the width of each input."""

    def __init__(self, outputs: int = 1) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = AnyWidthNet(outputs)
        super().__init__(self.net, seeded(2, 4, seed=1, dtype=torch.float32), groups="layer")
        self.by_width = {4: self.packing}

    def pack(self, inputs: Tensor) -> Tensor:
        width = inputs.shape[-1]
        if width not in self.by_width:
            self.by_width[width] = type(self.packing)(inputs)
        self.packing = self.by_width[width]
        self.frozen._to_tree = self.packing.tree
        return super().pack(inputs)
