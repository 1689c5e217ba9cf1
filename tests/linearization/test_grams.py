"""Per-group Grams against dense Jacobians, whatever the budget."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.linearization.grams import block_memory, block_rows
from ntkgp.linearization.memory import format_memory, parse_memory
from tests import reference as ref
from tests.architectures import CASES

DOUBLE = torch.float64


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == DOUBLE
    return float((found - expected).abs().max() / expected.abs().max())


def dense(lin: ntkgp.LinearizedNetwork, j1: Tensor, j2: Tensor) -> Tensor:
    a, b = j1.flatten(0, 1), j2.flatten(0, 1)
    groups = [lin.groups.index == g for g in range(len(lin.groups))]
    return torch.stack([a[:, m] @ b[:, m].T for m in groups])


def deep() -> nn.Sequential:
    with ref.seeded(0):
        return nn.Sequential(
            nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6), nn.BatchNorm1d(6), nn.GELU(),
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3),
        ).to(DOUBLE).eval()  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if name != "hf_gpt2_language_model"])
def test_every_architecture(name: str) -> None:
    case = CASES[name]()
    lin = ntkgp.LinearizedNetwork(case.net, case.example)
    j = ref.jacobian(case.net, case.example)
    tolerance = 1e-5 if name == "hf_llama" else 1e-10
    x = lin.pack(case.example)
    expected = dense(lin, j, j)
    found = lin.grams(x)
    assert error(found, expected) < tolerance
    assert error(found, found.mT) < 1e-13
    assert error(lin.grams(x[:4], x[2:]), dense(lin, j[:4], j[2:])) < tolerance
    assert error(lin.gram_diagonals(x), torch.stack([(j[..., lin.groups.index == g]
                 @ j[..., lin.groups.index == g].mT) for g in range(len(lin.groups))])) < tolerance  # fmt: skip
    variance = noise(1, len(lin.groups)).exp()
    weighted = (variance[:, None, None] * dense(lin, j[:4], j[2:])).sum(0)
    assert error(lin.weighted_gram(x[:4], x[2:], variance), weighted) < tolerance
    assert error(lin.weighted_gram(x[:4], lin.rows(x[2:]), variance), weighted) < tolerance


@pytest.mark.parametrize("name", ["mlp_layer_norm", "resnet_batch_norm", "transformer_encoder_pre_norm", "lstm"])
def test_float32_passes_accumulate_in_float64(name: str) -> None:
    case = CASES[name]()
    net = copy.deepcopy(case.net).float()
    lin = ntkgp.LinearizedNetwork(net, case.example)
    j = ref.jacobian(net, case.example)
    assert error(lin.grams(case.example), dense(lin, j, j)) < 1e-4
    # The products are those of the float32 rows, exactly: eigenvalues stay non-negative to float64 rounding.
    rows = lin.jacobian(case.example).double()
    assert error(lin.grams(case.example), dense(lin, rows, rows)) < 1e-6
    values = torch.linalg.eigvalsh(lin.grams(case.example).sum(0))
    assert values[0] > -1e-12 * values[-1]


@pytest.mark.parametrize("groups", ["normalization", "single"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 100])
def test_blocks_of_any_size_give_the_same(rows: int, groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lin = ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4), groups=groups)
    x, z = noise(1, 11, 4), noise(2, 7, 4)
    j, k = ref.jacobian(deep(), x), ref.jacobian(deep(), z)
    monkeypatch.setattr("ntkgp.linearization.grams.block_rows", lambda *args: rows)
    variance = noise(1, len(lin.groups)).exp()
    kept = lin.rows(z)
    assert error(lin.grams(x), dense(lin, j, j)) < 1e-12
    assert error(lin.grams(x, z), dense(lin, j, k)) < 1e-12
    assert error(lin.grams(x, kept), dense(lin, j, k)) < 1e-12
    assert error(lin.grams(kept, x), dense(lin, k, j)) < 1e-12
    assert error(lin.grams(kept), dense(lin, k, k)) < 1e-12
    weighted = (variance[:, None, None] * dense(lin, j, k)).sum(0)
    assert error(lin.weighted_gram(x, z, variance), weighted) < 1e-12
    assert error(lin.weighted_gram(x, kept, variance), weighted) < 1e-12
    diagonals = torch.stack([torch.stack([b[3 * n : 3 * n + 3, 3 * n : 3 * n + 3] for n in range(11)])
                             for b in dense(lin, j, j)])  # fmt: skip
    assert error(lin.gram_diagonals(x), diagonals) < 1e-12


def test_pieces_of_columns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lin, x = ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4)), noise(1, 5, 4)
    j = ref.jacobian(deep(), x)
    monkeypatch.setattr("ntkgp.linearization.grams._CAST_ELEMENTS", 64)
    assert error(lin.grams(x), dense(lin, j, j)) < 1e-12
    assert error(lin.weighted_gram(x, x, torch.ones(len(lin.groups))), dense(lin, j, j).sum(0)) < 1e-12


def passes_over(lin: ntkgp.LinearizedNetwork, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each Jacobian that is computed from here on."""
    seen: list[int] = []
    whole = lin.jacobian_by_tensor
    monkeypatch.setattr(lin, "jacobian_by_tensor", lambda x: (seen.append(len(x)), whole(x))[1])
    return seen


def test_no_jacobian_larger_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    lin, x = ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4)), noise(1, 40, 4)
    expected = lin.grams(x)
    seen = passes_over(lin, monkeypatch)
    workspace, per_row = block_memory(lin)
    budget = 8 * expected.numel() + workspace + 5 * per_row
    assert error(lin.grams(x, max_memory=budget), expected) < 1e-12
    assert max(seen) == 5
    assert sum(seen) > 40


def test_rows_of_blocks_turn_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    lin, x = ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4)), noise(1, 8, 4)
    monkeypatch.setattr("ntkgp.linearization.grams.block_rows", lambda *args: 2)
    seen = passes_over(lin, monkeypatch)
    lin.grams(x)
    # Four blocks: ten products, of which the four on the diagonal and those at the turns need one new block at most.
    assert len(seen) <= 10


def test_a_budget_too_small_names_the_smallest_that_works() -> None:
    lin, x = ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4)), noise(1, 6, 4)
    variance = torch.ones(len(lin.groups))
    calls = {
        "grams": lambda budget: lin.grams(x, max_memory=budget),
        "cross": lambda budget: lin.grams(x, noise(2, 3, 4), max_memory=budget),
        "diagonals": lambda budget: lin.gram_diagonals(x, max_memory=budget),
        "weighted": lambda budget: lin.weighted_gram(x, x, variance, max_memory=budget),
        "rows": lambda budget: lin.rows(x, max_memory=budget),
    }
    for name, call in calls.items():
        for budget in (7, "1 kB"):
            with pytest.raises(ValueError, match=r"max_memory: .* smallest possible is .*B") as caught:
                call(budget)
            smallest = str(caught.value).rpartition("is ")[2]
            call(smallest)
        with pytest.raises(ValueError, match="max_memory"):
            call(0.98 * parse_memory(smallest))
        with pytest.raises(ValueError, match="max_memory: expected"):
            call("plenty")
        assert name


def test_block_rows_grow_with_the_budget() -> None:
    lin = ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4))
    counts = [block_rows(lin, 50, 50, budget) for budget in (10**6, 10**7, 10**8)]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] > counts[0]


def test_rows_memory_is_what_rows_needs() -> None:
    lin, x = ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4)), noise(1, 6, 4)
    lin.rows(x, lin.rows_memory(6))
    with pytest.raises(ValueError, match=f"smallest possible is {format_memory(lin.rows_memory(6))}"):
        lin.rows(x, lin.rows_memory(6) - 1)


def test_kept_rows_need_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lin, x = ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4)), noise(1, 6, 4)
    rows = lin.rows(x)
    seen = passes_over(lin, monkeypatch)
    lin.grams(rows)
    assert seen == []
    lin.weighted_gram(noise(2, 2, 4), rows, torch.ones(len(lin.groups)))
    assert seen == [2]


def test_a_progress_bar(capsys: pytest.CaptureFixture) -> None:
    lin, x = ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4)), noise(1, 3, 4)
    lin.grams(x)
    assert capsys.readouterr().err == ""
    lin.grams(x, progress=True)
    assert "Gram" in capsys.readouterr().err


def test_duplicated_rows_and_one_row() -> None:
    lin, x = ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4)), noise(1, 1, 4)
    one = lin.grams(x)
    assert one.shape == (len(lin.groups), 3, 3)
    assert error(lin.grams(x.repeat(4, 1)), one.repeat(1, 4, 4)) < 1e-12
