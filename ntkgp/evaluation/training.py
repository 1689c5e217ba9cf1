"""A small trainer, so that demos and experiments start from a trained network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["seeded", "train"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """
    Seed torch's CPU random numbers inside the block, for module initialisation, and restore their state after it.

    Example:
        >>> with seeded(0):
        ...     first = torch.rand(1)
        >>> with seeded(0):
        ...     bool(first == torch.rand(1))
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def train(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.0,
    batch_size: int | None = None,
    seed: int = 0,
) -> float:
    """
    Fit a network in place with AdamW and a cosine schedule, and leave it in evaluation mode.

    Integer targets are labels and are fitted by cross-entropy, others by squared error.

    :param net: maps ``(B, …)`` to ``(B,)``, ``(B, 1)`` or ``(B, C)``.
    :param x: inputs ``(N, …)``.
    :param y: labels ``(N,)`` or targets with as many numbers per point as the network has outputs.
    :param steps: number of optimiser steps.
    :param learning_rate: at the start; it falls to zero.
    :param weight_decay: decoupled, as AdamW has it.
    :param batch_size: points per step, drawn as a random permutation per epoch without a short last batch; default:
        all points.
    :param seed: of the batches and of dropout. The global random state is restored.
    :return: loss of the last step.
    :raises ValueError: lengths of x and y that differ, no step, a batch size out of range.
    :raises FloatingPointError: a loss that is not finite.

    Cost: ``steps`` forward and backward passes over a batch.

    Example:
        >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
        >>> train(nn.Linear(1, 1), x, 3 * x.squeeze(-1), steps=300, learning_rate=0.1) < 1e-4
        True
    """
    size = len(x) if batch_size is None else batch_size
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x, y: expected the same positive number of points, got {len(x)} and {len(y)}")
    if steps < 1 or not 1 <= size <= len(x):
        raise ValueError(f"steps, batch_size: expected steps >= 1 and 1 to {len(x)} points, got {steps} and {size}")
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    with seeded(seed):
        batches = _batches(len(x), size)
        for _ in range(steps):
            rows = next(batches)
            optimizer.zero_grad()
            output = net(x[rows])
            if y.is_floating_point():
                loss = (output.reshape(y[rows].shape) - y[rows]).square().mean()
            else:
                loss = nn.functional.cross_entropy(output, y[rows])
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"the training loss became {float(loss.detach())}; lower learning_rate")
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    return float(loss.detach())


def _batches(n: int, size: int) -> Iterator[Tensor]:
    """Endless batches of row numbers, each epoch a new permutation."""
    while True:
        order = torch.randperm(n)
        for start in range(0, n - size + 1, size):
            yield order[start : start + size]
