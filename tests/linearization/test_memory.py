"""Memory budgets."""

from __future__ import annotations

import random

import pytest

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
