"""What is said to be the cost, and the choice that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import ntkgp
from ntkgp.linearization.grams.cost import Block, choose, ways
from ntkgp.linearization.grams.plan import Shape
from tests import reference as ref
from tests.linearization.grams.helper import DOUBLE, NETS, cnn, mlp, noise


def shape(i: int, o: int, t: int, kind: str = "outer", r: int = 1) -> Shape:
    return Shape(kind, r, i, o, t, (r * i * t, r * o * t))


@pytest.mark.parametrize(("n1", "n2", "k1", "k2"), [(5, 7, 3, 3), (1, 9, 2, 4), (6, 6, 10, 10)])
@pytest.mark.parametrize(("i", "o", "t", "r"), [(784, 512, 1, 1), (27, 16, 100, 1), (9, 1, 49, 8), (64, 3, 1, 2)])
def test_flops_by_hand(n1: int, n2: int, k1: int, k2: int, i: int, o: int, t: int, r: int) -> None:
    found = ways(shape(i, o, t, r=r), Block.of(n1, n2, k1, k2, False))
    rows1, rows2 = n1 * k1, n2 * k2
    one_side = 2 * t * o * i * r
    assert found["rows"].flops == one_side * (rows1 + rows2) + 2 * rows1 * rows2 * o * i * r
    if t == 1:
        # a·a' for pairs of samples, g·g' for pairs of rows, and their product.
        assert found["product"].flops == r * (2 * n1 * n2 * i + 2 * rows1 * rows2 * o + 2 * rows1 * rows2)
        assert found.keys() == {"rows", "product"}
    else:
        seen, passed, last = n1 * n2 * t * t * i, n1 * n2 * t * t * k2 * o, n1 * t * k1 * n2 * k2 * o
        assert found["positions"].flops == 2 * r * (seen + passed + last)
        assert found.keys() == {"rows", "positions"}


def test_flops_of_tables_and_rows() -> None:
    block = Block.of(5, 7, 3, 3, False)
    table = ways(shape(1000, 6, 4, "lookup"), block)
    # No more than 4·(5 + 7) of the thousand entries are read.
    assert table["rows"].flops == 2 * (15 + 21) * 4 * 6 * 48 + 2 * 15 * 21 * 6 * 48
    assert table["positions"].flops == 2 * 35 * (16 * 3 * 6 + 4 * 9 * 6)
    plain = ways(Shape("rows", 1, 1, 50, 1, (0, 50)), block)
    assert plain.keys() == {"rows"}
    assert plain["rows"].flops == 2 * 15 * 21 * 50


def test_a_symmetric_block_costs_half_and_its_diagonal() -> None:
    n, k, i, o = 40, 3, 20, 10
    found = ways(shape(i, o, 1), Block.of(n, n, k, k, True))
    full = ways(shape(i, o, 1), Block.of(n, n, k, k, False))
    assert found["product"].flops == pytest.approx(full["product"].flops * (n + 1) / (2 * n))
    half = n * (n + 1) / 2 * k * k
    assert found["rows"].flops == pytest.approx(2 * n * k * i * o + 2 * half * i * o)


def test_a_bias_is_one_more_input() -> None:
    block = Block.of(5, 7, 3, 3, False)
    assert ways(shape(20, 10, 1), block, bias=True) == ways(shape(21, 10, 1), block)


@pytest.mark.parametrize(
    ("kind", "i", "o", "t", "n", "k", "best"),
    [
        ("outer", 784, 512, 1, 256, 10, "product"),  # a dense layer: rows have 400 000 columns
        ("outer", 50, 1, 1, 256, 1, "rows"),  # one output neuron: its row is its input
        ("outer", 27, 16, 1024, 64, 10, "rows"),  # an early convolution: many positions, few weights
        ("outer", 2304, 256, 16, 64, 1, "positions"),  # a late one: few positions, many weights
        ("lookup", 50000, 256, 8, 64, 1, "positions"),
        ("rows", 1, 64, 1, 64, 3, "rows"),
    ],
)
def test_the_known_best_is_chosen(kind: str, i: int, o: int, t: int, n: int, k: int, best: str) -> None:
    sizes = shape(i, o, t, kind)
    assert choose(sizes, Block.of(n, n, k, k, True)) == best
    assert choose(sizes, Block.of(n, n, k, k, False)) == best


@pytest.mark.parametrize("k", [1, 10])
def test_the_choice_turns_once(k: int) -> None:
    """From few to many positions the choice goes from positions to rows, near where their flops are equal."""
    block = Block.of(128, 128, k, k, False)
    counts = [2**e for e in range(1, 11)]
    chosen = [choose(shape(288, 64, t), block) for t in counts]
    assert chosen[0] == "positions"
    assert chosen[-1] == "rows"
    turn = chosen.index("rows")
    assert set(chosen[turn:]) == {"rows"}
    flops = [ways(shape(288, 64, t), block) for t in counts]
    equal = next(i for i, found in enumerate(flops) if found["rows"].flops < found["positions"].flops)
    assert abs(turn - equal) <= 4
    assert flops[turn]["rows"].flops < 16 * flops[turn]["positions"].flops


def noting(taken: set[str], way: str, add: Callable[..., None], *args: Any) -> None:
    taken.add(way)
    add(*args)


def test_what_is_chosen_is_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkgp.linearization.grams import engine

    for name, (build, inputs) in NETS.items():
        lin = ntkgp.LinearizedNetwork(build(), inputs(0, 2), groups="single")
        told = {line.way for line in lin.explain(6).lines}
        taken: set[str] = set()
        for way in ("rows", "positions", "product"):
            add = getattr(engine, f"add_{way}")
            monkeypatch.setattr(engine, f"add_{way}", partial(noting, taken, way, add))
        lin.grams(inputs(1, 6))
        monkeypatch.undo()
        assert taken == told, name


def test_explain_adds_up() -> None:
    lin = ntkgp.LinearizedNetwork(mlp(), noise(0, 2, 4), groups="single")
    found = lin.explain(10, 20)
    # Forward and three backward chains through 4·7 + 7·6 + 6·5 + 5·3 weights for thirty rows; the chains end at the
    # first layer, whose inputs are data.
    forward, back = 2 * (28 + 42 + 30 + 15), 2 * (42 + 30 + 15)
    assert found.passes == 30 * (forward + 3 * back)
    best = sum(min(cost.flops for cost in line.costs.values()) for line in found.lines)
    assert found.flop_limit == found.passes + best
    assert found.flops == found.passes + sum(line.costs[line.way].flops for line in found.lines)
    assert found.flops >= found.flop_limit
    with ref.seeded(0):
        net = nn.Linear(6, 4).to(DOUBLE)
    half = ntkgp.LinearizedNetwork(net, noise(0, 2, 6), groups="single").explain(9)
    # Without a diagonal to compute, an exact half: 9²/2 pairs of samples, 6 + 1 inputs, 16 pairs of outputs.
    assert half.flop_limit == pytest.approx(half.passes + 81 * (7 + 16 * 4 + 16))


def test_explain_prints_every_parameter() -> None:
    for name, (build, inputs) in NETS.items():
        lin = ntkgp.LinearizedNetwork(build(), inputs(0, 2), groups="tensor")
        text = str(lin.explain(8))
        assert all(key in text for key in lin.frozen.theta), name
        assert text.splitlines()[-1].startswith("Gram block 8·3 x 8·3, symmetric: passes")
    conv = str(ntkgp.LinearizedNetwork(cnn(), noise(0, 2, 2, 6, 6)).explain(8, 5))
    assert "8·3 x 5·3: passes" in conv


def test_explain_runs_nothing() -> None:
    lin = ntkgp.LinearizedNetwork(cnn(), noise(0, 2, 2, 6, 6))
    state = torch.get_rng_state()
    assert lin.explain(10**6).flops > 1e12
    assert torch.equal(torch.get_rng_state(), state)
