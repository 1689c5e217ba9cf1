"""Which inputs become landmarks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.models.landmarks import choose_landmarks
from tests import reference as ref
from tests.models.test_nystrom import DOUBLE, Case


def batches(x: Tensor, y: Tensor, size: int = 9) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def index_of(x: Tensor, rows: Tensor) -> list[int]:
    return [int((x == row).all(-1).nonzero()[0]) for row in rows]


def test_random_is_a_uniform_sample_without_replacement() -> None:
    case = Case("single")
    counts = torch.zeros(len(case.x))
    for seed in range(300):
        chosen = index_of(case.x, choose_landmarks(batches(case.x, case.y), case.lin, 8, seed=seed))
        assert len(set(chosen)) == 8
        counts[chosen] += 1
    # 300 draws of 8 of 40: 60 each, standard deviation 7 (without the correlation between inputs).
    assert float((counts - 60).abs().max()) < 5 * 7
    again = choose_landmarks(batches(case.x, case.y), case.lin, 8, seed=3)
    assert torch.equal(again, choose_landmarks(batches(case.x, case.y), case.lin, 8, seed=3))
    assert len(choose_landmarks(batches(case.x, case.y), case.lin, 99)) == len(case.x)


def test_balanced_has_equal_numbers_and_fills_up() -> None:
    case = Case("softmax")
    y = torch.tensor([0] * 30 + [1] * 2 + [2] * 4 + [3] * 4)
    chosen = choose_landmarks(batches(case.x, y), case.lin, 12, "balanced", classification=True)
    labels = y[index_of(case.x, chosen)]
    counts = torch.bincount(labels).tolist()
    assert counts[1] == 2
    assert sorted(counts) == [2, 3, 3, 4]


def test_greedy_takes_the_largest_remaining_variance() -> None:
    case = Case("shared")
    chosen = index_of(
        case.x, choose_landmarks(batches(case.x, case.y), case.lin, 5, "greedy", precision=case.precision)
    )
    k = ref.gram(case.j, case.entries)
    taken: list[int] = []
    for pick in chosen:
        rows = [3 * n + c for n in taken for c in range(3)]
        left = k - k[:, rows] @ torch.linalg.pinv(k[rows][:, rows], hermitian=True) @ k[rows] if rows else k
        traces = left.diagonal().view(-1, 3).sum(-1)
        assert float(traces[pick]) >= float(traces.max()) * (1 - 1e-8)
        taken.append(pick)
    assert len(set(taken)) == 5


def test_kmeans_centres_and_integer_inputs() -> None:
    case = Case("single")
    centres = choose_landmarks(batches(case.x, case.y), case.lin, 5, "kmeans")
    nearest = torch.cdist(case.x, centres).argmin(-1)
    for k in range(5):
        torch.testing.assert_close(centres[k], case.x[nearest == k].mean(0))
    tokens = torch.randint(0, 7, (30, 4), generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 1)).double()
    lin = ntkgp.LinearizedNetwork(net, tokens)
    chosen = choose_landmarks(batches(lin.pack(tokens).double(), torch.zeros(30)), lin, 5, "kmeans")
    assert len(set(index_of(tokens.double(), chosen))) == len(chosen) <= 5


def test_given_landmarks_are_packed_and_checked() -> None:
    case = Case("single")
    given = choose_landmarks([], case.lin, 3, case.x[:4].clone())
    assert given.dtype == DOUBLE
    assert len(given) == 4
    with pytest.raises(ValueError, match="landmarks"):
        choose_landmarks([], case.lin, 3, torch.full((2, 3), torch.inf))
    with pytest.raises(ValueError, match="max_memory"):
        choose_landmarks(batches(case.x, case.y), case.lin, 5, "greedy", max_memory=100)


def test_greedy_needs_gradients() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 1, bias=False))
    x = torch.zeros(9, 2)
    lin = ntkgp.LinearizedNetwork(net, x)
    with pytest.raises(ValueError, match="landmarks: the network's gradients are zero"):
        choose_landmarks([(x.double(), x[:, 0])], lin, 3, "greedy")
