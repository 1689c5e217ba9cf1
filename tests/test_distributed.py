"""Virtual shards in one process; law E1 has the processes."""

from __future__ import annotations

import pytest
import torch

from ntkgp.distributed import Shards, broadcast, gather_rows, ordered_sum, symmetric_tiles


@pytest.mark.parametrize(("rows", "count"), [(10, 4), (64, 64), (65, 64), (3, 64), (1, 1), (1000, 7)])
def test_shards_are_a_partition_in_order(rows, count):
    shards = Shards(rows, count)
    bounds = [shards.bounds(s) for s in range(shards.count)]
    assert [row for a, b in bounds for row in range(a, b)] == list(range(rows))
    sizes = {b - a for a, b in bounds}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert shards.own() == list(range(shards.count))


def test_sums_are_taken_from_zero_in_the_order_of_the_shards():
    shards = Shards(3, 3)
    parts = {s: torch.tensor([v], dtype=torch.float64) for s, v in ((2, -1e16), (1, 3.0), (0, 1e16))}
    assert ordered_sum(parts, shards).item() == ((0.0 + 1e16) + 3.0) - 1e16 == 4.0
    assert ordered_sum(parts, shards, fast=True).item() == ordered_sum(parts, shards).item()
    assert parts[0].item() == 1e16  # the parts stay as they were


def test_rows_and_tiles_come_back_in_order():
    x = torch.randn(11, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shards = Shards(11, 4)
    assert torch.equal(gather_rows({s: shards.rows(x, s) for s in range(4)}, shards), x)
    rows = x.repeat_interleave(2, 0) * torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(11).unsqueeze(-1)

    def tile(s, t):
        (a, b), (c, d) = shards.bounds(s), shards.bounds(t)
        return rows[2 * a : 2 * b] @ rows[2 * c : 2 * d].mT

    torch.testing.assert_close(symmetric_tiles(tile, shards, width=2), rows @ rows.mT, rtol=1e-14, atol=1e-14)
    assert broadcast(x, 0) is x


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: Shards(0), "num_rows: expected a positive integer"),
        (lambda s: Shards(4, True), "count: expected a positive integer"),
        (lambda s: s.bounds(4), "shard: expected a number in 0 ... 3"),
        (lambda s: s.rows(torch.ones(5), 0), "x: expected N = 6 rows, got 5"),
        (lambda s: ordered_sum({0: torch.ones(1)}, s), "rank 0 of 1 owns"),
        (lambda s: gather_rows({i: torch.ones(1) for i in range(4)}, s), "parts: shard 0 has 2 rows, got 1"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call(Shards(6, 4))
