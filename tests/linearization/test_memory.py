"""Memory budgets."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from torch import nn

import ntkgp
from ntkgp.evaluation.training import seeded
from ntkgp.linearization.memory import format_memory, parse_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2**31), ("1 kib", 1024), ("1.5MB", 1500000), (".5 kB", 500), ("7", 7), (12, 12), (12.9, 12), ("3 B", 3)],
)
def test_parse(text, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("bad", ["", "two GiB", "2 GiBs", "-1GiB", "0", 0, -5, float("inf"), float("nan"), True, None])
def test_refused(bad) -> None:
    with pytest.raises(ValueError, match="max_memory: expected a positive number of bytes"):
        parse_memory(bad)


def test_what_is_printed_is_enough() -> None:
    rng = random.Random(0)
    sizes = [2**k + d for k in range(2, 44) for d in (-1, 0, 1)] + [int(2 ** rng.uniform(0, 44)) for _ in range(5000)]
    for size in sizes:
        assert size <= parse_memory(format_memory(size)) <= 1.011 * size + 1


@pytest.mark.parametrize("name", ["grams", "pairs", "diagonals", "diagonals of pairs", "factors", "features"])
@pytest.mark.parametrize("groups", ["normalization", "tensor"])
def test_the_smallest_budget_that_is_named_is_enough(name: str, groups: str) -> None:
    with seeded(0):
        layers: list[nn.Module] = [nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh()]
        net, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)).double(), torch.randn(6, 1, 8, 8).double()
    lin = ntkgp.LinearizedNetwork(net, x[:2], groups=groups)
    v = torch.ones(2, lin.num_parameters, dtype=torch.float64)
    calls: dict[str, Any] = {
        "grams": lambda m: lin.grams(x, max_memory=m), "pairs": lambda m: lin.grams(x[:2], x, max_memory=m),
        "diagonals": lambda m: lin.gram_diagonals(x, max_memory=m),
        "diagonals of pairs": lambda m: lin.gram_diagonals(x[:3], x[3:], max_memory=m),
        "factors": lambda m: lin.weighted_gram(lin.factors(x, m), None, torch.ones(len(lin.groups)).double()),
        "features": lambda m: lin.features(x, v, m),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"max_memory: 1 B .* smallest possible is") as refused:
        calls[name](1)
    least = parse_memory(re.search(r"smallest possible is (.*)", str(refused.value))[1])  # type: ignore[index]
    torch.testing.assert_close(calls[name](least), calls[name]("2GiB"), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"max_memory: .* smallest possible is"):
        calls[name](int(0.97 * least))
