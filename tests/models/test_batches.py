"""Passes over training data: what they yield, what they refuse, and what they leave alone."""

from __future__ import annotations

from collections.abc import Iterator

import gpytorch
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ntkgp
from ntkgp.models.batches import Batches, collect_raw

GAUSSIAN = gpytorch.likelihoods.GaussianLikelihood()


def lin(outputs: int = 2) -> ntkgp.LinearizedNetwork:
    return ntkgp.LinearizedNetwork(nn.Linear(3, outputs), torch.zeros(2, 3))


def data(n: int = 10, outputs: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=generator), torch.randn(n, outputs, generator=generator)


class Named(nn.Linear):
    """Takes its input by name."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Stream(IterableDataset):
    """Batches as they are given, another list for each pass."""

    def __init__(self, *passes: list[tuple[Tensor, Tensor]]) -> None:
        self.passes = list(passes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.passes.pop(0) if len(self.passes) > 1 else self.passes[0])


def stream(*passes: list[tuple[Tensor, Tensor]]) -> DataLoader:
    return DataLoader(Stream(*passes), batch_size=None)


@pytest.mark.parametrize("form", ["tensors", "packed", "dataset", "loader", "dicts"])
def test_one_pass_is_all_rows(form: str) -> None:
    model, (x, y) = lin(), data()
    pairs = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    given = {
        "tensors": (x, y),
        "packed": (model.pack(x), y),
        "dataset": TensorDataset(x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=4),
        "dicts": DataLoader(pairs, batch_size=3),
    }[form]
    if form == "dicts":
        model = ntkgp.LinearizedNetwork(Named(), {"x": x})
    batches = Batches.of(given, model, GAUSSIAN, batch_size=4)
    assert len(batches) == len(list(batches))
    for _ in range(2):
        found = [torch.cat(parts) for parts in zip(*batches, strict=True)]
        assert torch.equal(found[0], x.double())
        assert torch.equal(found[1], y.double())
    assert batches.num_data == 10
    collected = batches.collect()
    assert torch.equal(collected[1], y.double())
    assert Batches.of(batches, model, GAUSSIAN) is batches


def test_labels_and_single_outputs() -> None:
    x = data()[0]
    labels = torch.arange(10) % 2
    _, y = next(iter(Batches.of((x, labels), lin(2), ntkgp.CategoricalLikelihood(num_classes=2), 10)))
    assert y.dtype == torch.int64
    assert torch.equal(y, labels)
    _, y = next(iter(Batches.of((x, x[:, :1]), lin(1), GAUSSIAN, 10)))
    assert y.shape == (10,)
    wrong = DataLoader(TensorDataset(x, torch.arange(10)), batch_size=2)
    with pytest.raises(ValueError, match="batch 1: y"):
        list(Batches.of(wrong, lin(2), ntkgp.CategoricalLikelihood(num_classes=2)))


def test_tensors_are_copied() -> None:
    x, y = data()
    x = x.double()
    batches = Batches.of((x, y), lin(), GAUSSIAN)
    before = x.clone()
    x.zero_()
    y.zero_()
    found = batches.collect()
    assert torch.equal(found[0], before)
    assert bool(found[1].any())


def test_shuffled_loaders_shuffle_anew_and_leave_the_random_state() -> None:
    x, y = data(40)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    model = lin()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    batches = Batches.of(loader, model, GAUSSIAN)
    first, second = (torch.cat([b for _, b in batches]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)
    drawn = []
    for _ in batches:
        drawn.append(torch.rand(1))
    torch.set_rng_state(state)
    assert torch.equal(torch.cat(drawn), torch.cat([torch.rand(1) for _ in drawn]))


def test_bad_batches_are_named() -> None:
    x, y = data()
    broken = x.clone()
    broken[7, 1] = float("nan")
    with pytest.raises(ValueError, match="train_data: batch 3: x"):
        list(Batches.of(DataLoader(TensorDataset(broken, y), batch_size=2), lin(), GAUSSIAN))
    infinite = y.clone()
    infinite[4, 0] = float("inf")
    with pytest.raises(ValueError, match="data: batch 2: y"):
        list(Batches.of(DataLoader(TensorDataset(x, infinite), batch_size=2), lin(), GAUSSIAN, name="data"))
    with pytest.raises(ValueError, match="batch 1: y: expected shape"):
        list(Batches.of(stream([(x[:4], y[:4]), (x[4:8], y[4:7])]), lin(), GAUSSIAN))
    with pytest.raises(TypeError, match="batch 0: expected"):
        list(Batches.of(DataLoader(TensorDataset(x), batch_size=2), lin(), GAUSSIAN))


def test_ragged_empty_and_missing_batches() -> None:
    x, y = data()
    ragged = [(x[:3], y[:3]), (x[:0], y[:0]), (x[3:8], y[3:8]), (x[8:], y[8:])]
    batches = Batches.of(stream(ragged), lin(), GAUSSIAN)
    with pytest.raises(ValueError, match="known after the first pass"):
        _ = batches.num_data
    assert [len(a) for a, _ in batches] == [3, 5, 2]
    assert batches.num_data == 10
    with pytest.raises(ValueError, match="no rows"):
        list(Batches.of(stream([(x[:0], y[:0])]), lin(), GAUSSIAN))
    with pytest.raises(ValueError, match="N = 0"):
        Batches.of(TensorDataset(x[:0], y[:0]), lin(), GAUSSIAN)
    dropped = Batches.of(DataLoader(TensorDataset(x, y), batch_size=4, drop_last=True), lin(), GAUSSIAN)
    assert sum(len(a) for a, _ in dropped) == dropped.num_data == 8


def test_passes_of_different_lengths() -> None:
    x, y = data()
    batches = Batches.of(stream([(x, y)], [(x[:6], y[:6])]), lin(), GAUSSIAN)
    list(batches)
    with pytest.raises(ValueError, match="6 rows, the one before 10"):
        list(batches)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="train_data: expected"):
        Batches.of(3, lin(), GAUSSIAN)
    with pytest.raises(ValueError, match="batch_size"):
        Batches.of(data(), lin(), GAUSSIAN, batch_size=0)


def test_raw_data_is_collected() -> None:
    class Rows(Dataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return torch.full((3,), float(i)), i

    x, y, example = collect_raw(Rows())
    assert torch.equal(example, x)
    streamed = collect_raw(DataLoader(Rows(), batch_size=2), limit=30)
    assert streamed.x is None
    assert torch.equal(streamed.y, y)
    assert torch.equal(streamed.example, x[:2])
    assert torch.equal(y, torch.arange(5))
    assert x.shape == (5, 3)
    with pytest.raises(TypeError, match="train_data: expected"):
        collect_raw("x")
