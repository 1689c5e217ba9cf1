"""What a case of the zoo is, and how one is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

N = 6
DTYPE = torch.float64


@dataclass
class Case:
    """One network, ``N`` example rows, and the groups that the definition of a normalised set gives.

    ``tolerance`` is the relative error to which the invariance can hold in floating point: above 1e-9 only where the
    network itself carries an eps that is no argument of a normaliser, or a forced float32 section.
    """

    net: nn.Module
    example: Any
    groups: list[set[str]] = field(default_factory=list)
    tolerance: float = 1e-9

    def run(self, net: nn.Module | None = None) -> Tensor:
        """Output tensor of ``net`` (default: the case's own) on the example rows."""
        net = self.net if net is None else net
        if isinstance(self.example, dict):
            output = net(**self.example)
        elif isinstance(self.example, tuple):
            output = net(*self.example)
        else:
            output = net(self.example)
        return output if isinstance(output, Tensor) else output.logits


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def case(
    seed: int,
    build: Callable[[], nn.Module],
    example: Callable[[], Any],
    groups: list[set[str]],
    tolerance: float = 1e-9,
    scale_weights: float | None = None,
) -> Case:
    """Build under ``seed`` in float64 and randomise what initialisation leaves trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build().to(DTYPE)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if parameter.ndim <= 1 and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                elif parameter.ndim <= 1 or not parameter.any():
                    parameter.normal_(0.0, 0.5)
                elif scale_weights is not None:
                    parameter.normal_(0.0, scale_weights)
            for name, buffer in net.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0.0, 0.5)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
        return Case(net.eval(), example(), groups, tolerance)


def pair(*layers: str) -> list[set[str]]:
    """One group of weight and bias per layer."""
    return [{f"{layer}.weight", f"{layer}.bias"} for layer in layers]


def rows(*shape: int) -> Callable[[], Tensor]:
    """Standard-normal example rows."""
    return lambda: torch.randn(N, *shape, dtype=DTYPE)


def tokens(length: int = 5, vocabulary: int = 11) -> Callable[[], Tensor]:
    """Integer example rows."""
    return lambda: torch.randint(1, vocabulary, (N, length))
