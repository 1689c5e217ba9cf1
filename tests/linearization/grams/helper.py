"""Nets, the dense oracle by groups, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.linearization.grams import products
from tests import reference as ref

DOUBLE = torch.float64
TOLERANCE = 1e-12


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found.detach() - expected).abs().max() / expected.abs().max())


def apart(lin: ntkgp.LinearizedNetwork, j: Tensor) -> list[Tensor]:
    """Jacobian columns of each group."""
    return [j[..., lin.groups.index == g] for g in range(len(lin.groups))]


def dense(lin: ntkgp.LinearizedNetwork, j1: Tensor, j2: Tensor | None = None) -> Tensor:
    """Per-group Grams of Jacobians (N, K, P)."""
    j2 = j1 if j2 is None else j2
    return torch.stack(
        [a.flatten(0, 1) @ b.flatten(0, 1).T for a, b in zip(apart(lin, j1), apart(lin, j2), strict=True)]
    )


def diagonals(lin: ntkgp.LinearizedNetwork, j1: Tensor, j2: Tensor | None = None) -> Tensor:
    """Per-group blocks of matching rows, (G, N, C, C)."""
    j2 = j1 if j2 is None else j2
    return torch.stack([a @ b.mT for a, b in zip(apart(lin, j1), apart(lin, j2), strict=True)])


def forced(
    lin: ntkgp.LinearizedNetwork, x1: Any, x2: Any, way: str | None, budget: float | str = "2GiB",
    dtype: torch.dtype = DOUBLE,
) -> Tensor:  # fmt: skip
    """``lin.grams`` with one order of summation wherever it is open."""
    return products.grams(lin, lin._side(x1), None if x2 is None else lin._side(x2), budget, False, dtype, way)


def smallest(lin: ntkgp.LinearizedNetwork, x1: Any, x2: Any = None, way: str | None = None) -> tuple[int, int]:
    """Bytes of the result, and the least that is needed beside it."""
    left, right = lin._side(x1), None if x2 is None else lin._side(x2)
    k1 = left.num_outputs(lin)
    k2 = k1 if right is None else right.num_outputs(lin)
    size = 8 * len(lin.groups) * len(left) * len(left if right is None else right) * k1 * k2
    return size, lin.engine.smallest_budget(left, right, way)


def linear(inputs: int, outputs: int, **options: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=DOUBLE, **options)


class Net(nn.Module):
    """Modules and parameters by name, and what is done with them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.compute = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self, *args, **kwargs)


def mlp() -> nn.Sequential:
    with ref.seeded(0):
        return nn.Sequential(
            nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6), nn.BatchNorm1d(6), nn.GELU(),
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3),
        ).to(DOUBLE).eval()  # fmt: skip


def cnn() -> nn.Sequential:
    """Plain, strided, grouped and transposed convolutions: P = 413."""
    with ref.seeded(1):
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, groups=2),
            nn.GELU(), nn.ConvTranspose2d(6, 4, 2), nn.Tanh(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(18, 3),
        ).to(DOUBLE).eval()  # fmt: skip


class Words(nn.Module):
    """Embedding, bare positions, one attention block, mean over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(9, 6, padding_idx=0), nn.Parameter(torch.randn(5, 6))
        self.block = nn.TransformerEncoderLayer(6, 2, 8, 0.1, "gelu", batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x) + self.position).mean(1).tanh())


def words() -> Words:
    with ref.seeded(2):
        return Words().to(DOUBLE).eval()


def tokens(seed: int, n: int) -> Tensor:
    return torch.randint(0, 9, (n, 5), generator=torch.Generator().manual_seed(seed))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor]]] = {
    "mlp": (mlp, lambda seed, n: noise(seed, n, 4)),
    "cnn": (cnn, lambda seed, n: noise(seed, n, 2, 6, 6)),
    "words": (words, tokens),
}
