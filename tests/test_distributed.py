"""Virtual shards in one process; law E1 has the processes."""

from __future__ import annotations

from functools import reduce
from operator import add

import pytest
import torch

from ntkgp.cli import main
from ntkgp.distributed import (
    OrderedFold,
    Shards,
    Turns,
    broadcast,
    broadcast_object,
    checksum,
    computed_in_turn,
    gather_numbers,
    gather_objects,
    gather_rows,
    ordered_sum,
    smallest,
    sum_over_batches,
    symmetric_tiles,
)


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


def test_a_fold_adds_in_order_and_from_its_start():
    fold = OrderedFold(torch.tensor([1.0], dtype=torch.float64))
    fold.add([torch.tensor([v], dtype=torch.float64) for v in (1e16, 3.0)])
    fold.add([torch.tensor([-1e16], dtype=torch.float64)])
    assert fold.total().item() == ((1.0 + 1e16) + 3.0) - 1e16 == 4.0


@pytest.mark.parametrize(("batches", "length"), [(1, 1), (64, 1), (65, 2), (245, 4), (6400, 100)])
def test_there_are_about_64_shards_of_whole_batches(batches, length):
    turns = Turns(range(batches))
    shards = [turns.shard(i) for i in range(batches)]
    assert turns.length == length
    assert shards == sorted(shards)
    assert max(shards) + 1 == -(-batches // length) <= 64
    assert sum(turns.closes(i) for i in range(batches)) == batches // length


def test_a_stream_has_shards_of_eight_batches():
    assert Turns(i for i in range(3)).length == 8


def test_batches_are_summed_from_zero_in_each_shard():
    values = [1e16, 1.0, -1e16, 1.0] * 33  # 132 batches, three to a shard
    found = sum_over_batches(values, lambda v: torch.tensor([v], dtype=torch.float64), torch.zeros(1).double())
    parts = [reduce(add, values[i : i + 3], 0.0) for i in range(0, len(values), 3)]
    assert found.item() == reduce(add, parts, 0.0)
    assert found.item() != reduce(add, values, 0.0)


def test_without_a_group_calls_to_all_give_back_what_they_get():
    x = torch.arange(3.0)
    assert smallest(x) is x
    assert broadcast_object("x") == "x"
    assert gather_objects(x) == [x]
    assert gather_numbers(1, 2) == [(1, 2)]
    assert checksum(0, x, x) == checksum(checksum(0, x), x) != checksum(0, x, x.flip(0))
    assert [(i, int(v)) for i, v in computed_in_turn(3, torch.tensor)] == [(0, 0), (1, 1), (2, 2)]


def test_the_command_goes_on_where_it_was(tmp_path, capsys):
    arguments = ["evidence", "--example", "100", "--landmarks", "4", "--batch-size", "16", "--out", str(tmp_path)]
    said = []
    for _ in range(2):
        assert main(arguments) == 0
        said.append(capsys.readouterr().out)
    states = [text.partition("sha256 ")[2].split()[0] for text in said]
    assert states[0] == states[1]
    kept = torch.load(tmp_path / "evidence.pt", weights_only=True)
    assert kept["statistics"]["num_data"] == 100
    assert "100 rows" in (tmp_path / "report.txt").read_text()
    assert main([*arguments, "--landmarks", "5"]) == 2
    assert "num_landmarks (4 there, 5 here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--network, --weights, --data: expected all three, or --example ROWS"),
        (["--example", "0"], "--example: expected a positive number of rows, got 0"),
        (["--example", "5", "--network", "a:b"], "--example: expected without --network"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, said, tmp_path, capsys):
    assert main(["evidence", "--out", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err
