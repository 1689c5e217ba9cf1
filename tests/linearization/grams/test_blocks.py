"""Per-group Grams against dense Jacobians: every architecture, way of summation, budget and partition."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.linearization.grams import engine
from ntkgp.linearization.memory import parse_memory
from tests import reference as ref
from tests.architectures import CASES, linearized
from tests.linearization.grams.helper import (
    DOUBLE,
    NETS,
    TOLERANCE,
    cnn,
    dense,
    diagonals,
    error,
    forced,
    mlp,
    noise,
    smallest,
)

WAYS = ("rows", "positions", "product")


@functools.cache
def problem(name: str) -> tuple[ntkgp.LinearizedNetwork, Tensor, Tensor, Tensor, Tensor]:
    """A linearised net, two packed sets of inputs, and their Jacobians."""
    build, inputs = NETS[name]
    net = build()
    lin = ntkgp.LinearizedNetwork(net, inputs(0, 2))
    x, z = inputs(1, 7), inputs(2, 5)
    return lin, lin.pack(x), lin.pack(z), ref.jacobian(net, x), ref.jacobian(net, z)


@pytest.mark.parametrize("name", CASES)
def test_every_architecture(name: str) -> None:
    shared = linearized(name)
    lin, raw, x, j = shared.lin, shared.raw, shared.x, shared.jacobian
    tolerance = 1e-5 if name == "hf_llama" else TOLERANCE  # the net itself computes a part in float32
    n = len(x)
    x1, j1, x2, j2 = x[: n - 1], j[: n - 1], x[1:], j[1:]
    expected = dense(lin, j)
    found = lin.grams(raw)
    assert error(found, expected) < tolerance
    assert torch.equal(found, found.mT)
    assert error(lin.grams(x1, x2), dense(lin, j1, j2)) < tolerance
    assert error(lin.gram_diagonals(raw), diagonals(lin, j)) < tolerance
    assert error(lin.gram_diagonals(x1, x2), diagonals(lin, j1, j2)) < tolerance
    variance = noise(1, len(lin.groups)).exp()
    weighted = lin.weighted_gram(x, None, variance)
    assert error(weighted, (variance[:, None, None] * expected).sum(0)) < tolerance
    assert torch.equal(weighted, weighted.mT)
    assert error(lin.weighted_gram(x, None, torch.ones(len(lin.groups))), found.sum(0)) < TOLERANCE

    kept = lin.factors(x2)
    assert error(lin.grams(x1, kept), dense(lin, j1, j2)) < tolerance
    assert error(lin.grams(kept, x1), dense(lin, j2, j1)) < tolerance
    assert error(lin.grams(kept), dense(lin, j2)) < tolerance
    assert error(lin.grams(kept, lin.factors(x1)), dense(lin, j2, j1)) < tolerance
    cross = (variance[:, None, None] * dense(lin, j1, j2)).sum(0)
    assert error(lin.weighted_gram(x1, kept, variance), cross) < tolerance
    chosen = torch.arange(n) % lin.num_outputs
    some = lin.factors(x, outputs=chosen)
    js = j[torch.arange(n), chosen].unsqueeze(1)
    assert error(lin.grams(some), dense(lin, js)) < tolerance
    assert error(lin.grams(x1, some), dense(lin, j1, js)) < tolerance
    assert error(lin.grams(some, kept), dense(lin, js, j2)) < tolerance

    v = noise(3, 4, lin.num_parameters)
    assert error(lin.features(raw, v), j @ v.T) < tolerance
    by_group = torch.stack([j[..., m] @ v[:, m].T for m in (lin.groups.index == g for g in range(len(lin.groups)))])
    assert error(lin.features(x, v, per_group=True), by_group) < tolerance


@pytest.mark.parametrize("name", ["mlp_batch_norm", "cnn_group_norm", "resnet_batch_norm", "transformer_pre_norm"])
@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_storage(name: str, storage: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    lin = ntkgp.LinearizedNetwork(case.net, case.example)
    j = ref.jacobian(case.net, case.example)
    stack = lin.symmetric_grams(case.example, storage=storage, dtype=dtype)
    assert stack.storage == storage
    assert stack.dtype == dtype
    tolerance = TOLERANCE if dtype == DOUBLE else 1e-6
    variance = noise(1, len(lin.groups)).exp()
    expected = (variance[:, None, None] * dense(lin, j)).sum(0)
    assert error(stack.weighted_sum(variance), expected) < tolerance
    for g, matrix in enumerate(dense(lin, j)):
        one = torch.zeros(len(lin.groups))
        one[g] = 1
        assert error(stack.weighted_sum(one), matrix) < tolerance


@pytest.mark.parametrize("fraction", [1.0, 1.1, 2.0])
def test_packed_storage_in_blocks(fraction: float) -> None:
    lin, x, _, j, _ = problem("cnn")
    least = parse_memory(smallest_of(lambda budget: lin.symmetric_grams(x, max_memory=budget)))
    stack = lin.symmetric_grams(x, max_memory=fraction * least)
    assert error(stack.weighted_sum(torch.ones(len(lin.groups))), dense(lin, j).sum(0)) < TOLERANCE


@pytest.mark.parametrize("groups", ["normalization", "layer", "tensor", "single"])
@pytest.mark.parametrize("name", NETS)
def test_every_partition(name: str, groups: str) -> None:
    build, inputs = NETS[name]
    net, x, z = build(), inputs(1, 6), inputs(2, 4)
    lin = ntkgp.LinearizedNetwork(net, inputs(0, 2), groups=groups)
    j, k = ref.jacobian(net, x), ref.jacobian(net, z)
    for way in (None, *WAYS):
        assert error(forced(lin, x, None, way), dense(lin, j)) < TOLERANCE
        assert error(forced(lin, x, z, way), dense(lin, j, k)) < TOLERANCE
    assert error(lin.gram_diagonals(x), diagonals(lin, j)) < TOLERANCE
    v = noise(3, 2, lin.num_parameters)
    assert error(lin.features(x, v, per_group=True).sum(0), j @ v.T) < TOLERANCE
    slots = [name for slot in lin.engine.slots(engine.Block.of(6, 6, 3, 3, True)) for name in slot.names]
    assert sorted(slots) == sorted(lin.frozen.theta)
    assert sum(lin.frozen.theta[name].numel() for name in slots) == lin.num_parameters


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETS)
def test_the_ways_are_really_taken(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lin, x, _, j, _ = problem(name)
    taken = []
    for other in WAYS:
        add = getattr(engine, f"add_{other}")
        monkeypatch.setattr(engine, f"add_{other}", lambda *a, add=add, other=other: (taken.append(other), add(*a))[1])
    assert error(forced(lin, x, None, way), dense(lin, j)) < TOLERANCE
    assert way in taken or (name, way) == ("mlp", "positions")
    if way == "rows":
        assert set(taken) == {"rows"}


@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("name", NETS)
def test_any_budget_gives_the_same(name: str, way: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    lin, x, z, j, k = problem(name)
    monkeypatch.setattr(engine, "_LEAST_WORKSPACE", 2**12)
    kept = lin.factors(z)
    seen: set[int] = set()
    build = engine.build
    monkeypatch.setattr(engine, "build", lambda lin, plan, x, *a: (seen.add(len(x)), build(lin, plan, x, *a))[1])
    pairs = [(x, None, dense(lin, j)), (x, z, dense(lin, j, k)), (z[:1], x, dense(lin, k[:1], j)),
             (x, kept, dense(lin, j, k)), (kept, x, dense(lin, k, j)), (x[:1], None, dense(lin, j[:1]))]  # fmt: skip
    for left, right, expected in pairs:
        size, least = smallest(lin, left, right, way)
        for factor in (1, 1.5, 3):
            assert error(forced(lin, left, right, way, size + factor * least), expected) < TOLERANCE
    assert len(seen) >= 4
    assert 1 in seen


def test_blocks_of_weighted_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    lin, x, z, j, k = problem("cnn")
    variance = noise(5, len(lin.groups)).exp()
    cross, symmetric = ((variance[:, None, None] * dense(lin, j, other)).sum(0) for other in (k, j))
    for right, expected in ((z, cross), (None, symmetric), (lin.factors(z), cross)):
        least = parse_memory(smallest_of(lambda budget, right=right: lin.weighted_gram(x, right, variance, budget)))
        for factor in (1, 1.5, 3):
            assert error(lin.weighted_gram(x, right, variance, factor * least), expected) < TOLERANCE


def smallest_of(call) -> str:
    """The budget that the error of a call with too little memory names."""
    with pytest.raises(ValueError, match=r"max_memory: .* smallest possible is .*B") as caught:
        call(7)
    return str(caught.value).rpartition("is ")[2]


def test_a_budget_too_small_names_the_smallest_that_works() -> None:
    lin, x, z, _, _ = problem("mlp")
    variance = torch.ones(len(lin.groups))
    for call in (
        lambda budget: lin.grams(x, max_memory=budget),
        lambda budget: lin.grams(x, z, max_memory=budget),
        lambda budget: lin.grams(x, lin.factors(z), max_memory=budget),
        lambda budget: lin.weighted_gram(x, z, variance, max_memory=budget),
        lambda budget: lin.factors(x, max_memory=budget),
        lambda budget: lin.symmetric_grams(x, max_memory=budget),
        lambda budget: lin.symmetric_grams(x, max_memory=budget, storage="memory"),
    ):
        least = smallest_of(call)
        call(least)
        with pytest.raises(ValueError, match="max_memory"):
            call(0.98 * parse_memory(least))
        with pytest.raises(ValueError, match="max_memory: expected"):
            call("plenty")


def test_blocks_turn_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    lin, x, _, j, _ = problem("cnn")
    monkeypatch.setattr(engine, "_LEAST_WORKSPACE", 2**12)
    seen = []
    build = engine.build
    monkeypatch.setattr(engine, "build", lambda lin, plan, x, *a: (seen.append(len(x)), build(lin, plan, x, *a))[1])
    size, least = smallest(lin, x)
    assert error(lin.grams(x, max_memory=size + least), dense(lin, j)) < TOLERANCE
    # Seven blocks of one row: of 28 products the seven on the diagonal and those at the turns need one visit at most.
    assert set(seen) == {1}
    assert len(seen) <= 28


def test_one_row_and_repeated_rows() -> None:
    for name in NETS:
        lin, x, _, j, _ = problem(name)
        one = lin.grams(x[:1])
        assert error(one, dense(lin, j[:1])) < TOLERANCE
        assert error(lin.grams(x[:1].repeat(4, *[1] * (x.dim() - 1))), one.repeat(1, 4, 4)) < TOLERANCE


def test_no_rows_at_all_are_refused() -> None:
    lin, x, _, _, _ = problem("mlp")
    for call in (lambda: lin.grams(x[:0]), lambda: lin.grams(x, x[:0]), lambda: lin.factors(x[:0]),
                 lambda: lin.gram_diagonals(x[:0])):  # fmt: skip
        with pytest.raises(ValueError, match="inputs has N = 0 rows; expected at least one"):
            call()


@pytest.mark.parametrize("way", [None, *WAYS])
def test_single_precision_passes(way: str | None) -> None:
    """More rows than parameters: what is not zero must not be negative, however rows are cut."""
    with ref.seeded(0):
        net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Conv1d(4, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1),
                            nn.Flatten(), nn.Linear(4, 2))  # fmt: skip
    x = noise(1, 56, 3, 9).float()
    lin = ntkgp.LinearizedNetwork(net, x[:2], groups="single")
    assert lin.num_parameters < 112
    j = ref.jacobian(net, x)
    size, least = smallest(lin, x, None, way)
    for factor in (1.3, 2, 8, 1000):
        found = forced(lin, x, None, way, size + factor * least)
        assert found.dtype == DOUBLE
        assert error(found, dense(lin, j)) < 1e-5
        values = torch.linalg.eigvalsh(found[0])
        assert values[0] > -1e-12 * values[-1]
    low = forced(lin, x, None, way, "2GiB", torch.float32)
    assert low.dtype == torch.float32
    assert error(low.double(), dense(lin, j)) < 1e-5
    assert torch.equal(low, low.mT)


def test_blocks_do_not_mix_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways round differently in float32: a Gram pieced together of several would have negative eigenvalues."""
    with ref.seeded(0):
        net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))
    x = noise(1, 40, 3, 9).float()
    lin = ntkgp.LinearizedNetwork(net, x[:2], groups="single")
    monkeypatch.setattr(engine, "choose", lambda shape, block, bias: "positions" if "positions" in
                        engine.ways(shape, block, bias) and block.n1 == block.n2 else "rows")  # fmt: skip
    size, least = smallest(lin, x)
    for factor in (1.5, 2, 3):
        values = torch.linalg.eigvalsh(lin.grams(x, max_memory=size + factor * least)[0])
        assert values[0] > -1e-12 * values[-1]


@pytest.mark.parametrize("name", ["mlp_layer_norm", "resnet_batch_norm", "transformer_encoder_pre_norm", "lstm"])
def test_single_precision_architectures(name: str) -> None:
    case = CASES[name]()
    net = copy.deepcopy(case.net).float()
    lin = ntkgp.LinearizedNetwork(net, case.example)
    j = ref.jacobian(net, case.example)
    for dtype in (torch.float64, torch.float32):
        found = lin.grams(case.example, dtype=dtype)
        assert found.dtype == dtype
        assert error(found.double(), dense(lin, j)) < 1e-4
    values = torch.linalg.eigvalsh(lin.grams(case.example).sum(0))
    assert values[0] > -1e-12 * values[-1]


def test_a_progress_bar(capsys: pytest.CaptureFixture) -> None:
    lin, x, _, _, _ = problem("mlp")
    lin.grams(x)
    assert capsys.readouterr().err == ""
    lin.grams(x, progress=True)
    assert "Gram" in capsys.readouterr().err


def test_wrong_arguments_are_named() -> None:
    lin, x, z, _, _ = problem("mlp")
    with pytest.raises(ValueError, match=r"variance: expected shape \(3,\), got \(4,\)"):
        lin.weighted_gram(x, z, torch.ones(4))
    with pytest.raises(ValueError, match=r"x2: expected one input for each of the 7 of x, got 5"):
        lin.gram_diagonals(x, z)
    for outputs in (torch.full((7,), 3), torch.full((7,), -1), torch.ones(7, dtype=torch.bool)):
        with pytest.raises(ValueError, match="outputs: expected indices from 0 to 2"):
            lin.factors(x, outputs=outputs)
    for outputs in (torch.zeros(5, dtype=torch.long), torch.zeros(7)):
        with pytest.raises(ValueError, match="outputs: expected one index per input"):
            lin.factors(x, outputs=outputs)
    with pytest.raises(ValueError, match="v: expected shape"):
        lin.features(x, torch.ones(lin.num_parameters))
    other = ntkgp.LinearizedNetwork(cnn(), noise(0, 2, 2, 6, 6)).factors(noise(0, 3, 2, 6, 6))
    with pytest.raises(ValueError, match="factors: made by another network"):
        lin.grams(x, other)
    regrouped = ntkgp.LinearizedNetwork(mlp(), noise(0, 2, 4), groups="tensor")
    with pytest.raises(ValueError, match="factors: made by another network, or with other groups"):
        regrouped.grams(x, lin.factors(x))
