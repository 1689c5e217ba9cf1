"""Embeddings against per-row Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkgp.linearization.rules.registry import rule_of
from ntkgp.linearization.rules.terms import Lookup
from tests.linearization.rules.helper import (
    DOUBLE,
    by_autograd,
    check,
    check_layer,
    error,
    gram,
    uses_by_rule,
)


@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 3, 2)])
def test_any_indices(shape, padding_idx):
    found = check_layer(nn.Embedding(7, 3, padding_idx=padding_idx), torch.randint(0, 7, shape))["weight"]
    assert isinstance(found, Lookup)
    assert found.indices.shape == (4, max(1, torch.Size(shape[1:]).numel()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kinds_of_integers(dtype):
    check_layer(nn.Embedding(5, 2), torch.randint(0, 5, (3, 4)).to(dtype))


def test_padding_is_not_trained():
    ids = torch.tensor([[2, 2, 1], [2, 0, 2]])
    rows = check_layer(nn.Embedding(3, 4, padding_idx=2), ids)["weight"].dense().unflatten(-1, (3, 4))
    assert (rows[:, :, 2] == 0).all()
    assert (rows[1, :, 0] != 0).any()


def test_sparse_gradients_are_the_same_rows():
    dense, sparse = nn.Embedding(5, 2, dtype=DOUBLE), nn.Embedding(5, 2, sparse=True, dtype=DOUBLE)
    sparse.weight = dense.weight
    ids, g = torch.randint(0, 5, (3, 4)), torch.randn(3, 2, 4, 2, dtype=DOUBLE)
    found = [rule_of(layer).terms(layer, ids, g)["weight"].dense() for layer in (dense, sparse)]
    assert torch.equal(*found)


@pytest.mark.parametrize("argument", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_tables_that_a_rule_does_not_describe(argument):
    layer = nn.Embedding(5, 2, dtype=DOUBLE, **argument)
    ids = torch.randint(0, 5, (3, 4))
    before = layer.weight.detach().clone()
    assert rule_of(layer).terms(layer, ids, torch.randn(3, 2, 4, 2, dtype=DOUBLE)) == {}
    assert torch.equal(layer.weight, before)


class Tied(nn.Module):
    """A language model whose output matrix is its table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, padding_idx=1, dtype=DOUBLE)
        self.inner = nn.Linear(4, 4, dtype=DOUBLE)
        self.norm = nn.LayerNorm(4, dtype=DOUBLE)
        self.head = nn.Linear(4, 5, dtype=DOUBLE)
        self.head.weight = self.table.weight
        self.register_buffer("readout", torch.randn(5, 3, dtype=DOUBLE))

    def forward(self, ids: Tensor) -> Tensor:
        """(N, T) -> (N, 3)."""
        hidden = self.norm(self.inner(self.table(ids)).tanh())
        return (self.head(hidden).tanh().sum(1) @ self.readout).sin()


def test_tied_to_the_output_layer():
    net, ids = Tied(), torch.randint(0, 5, (4, 6))
    check(net, ids)
    uses = uses_by_rule(net, ids)["table.weight"]
    assert [type(use).__name__ for use in uses] == ["Lookup", "Outer"]
    apart = sum(gram(use.dense()) for use in uses)
    assert error(apart, gram(by_autograd(net, ids)["table.weight"])) > 1e-2


class Twice(nn.Module):
    """A table that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, dtype=DOUBLE)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, T) -> (N, 3)."""
        return (self.table(ids).tanh().sum(1) * F.softplus(self.table((ids + 1) % 5)).sum(1)).sin()


def test_read_twice():
    net, ids = Twice(), torch.randint(0, 5, (4, 6))
    found = check(net, ids)["table.weight"]
    assert isinstance(found, Lookup)
    assert found.indices.shape == (4, 12)
    apart = sum(gram(use.dense()) for use in uses_by_rule(net, ids)["table.weight"])
    assert error(apart, gram(found.dense())) > 1e-2


def test_differentiable_in_the_cotangents():
    """Indices have no derivative; the rows depend on a network's other inputs through what comes back."""
    ids, layer = torch.randint(0, 5, (2, 3)), nn.Embedding(5, 2, padding_idx=0, dtype=DOUBLE)

    def rows(cotangents: Tensor) -> Tensor:
        return rule_of(layer).terms(layer, ids, cotangents)["weight"].dense()

    assert torch.autograd.gradcheck(rows, (torch.randn(2, 3, 3, 2, dtype=DOUBLE, requires_grad=True),))


def test_any_device():
    layer = nn.Embedding(5, 2, padding_idx=0, device="meta")
    terms = rule_of(layer).terms(
        layer, torch.zeros(3, 4, dtype=int, device="meta"), torch.zeros(3, 2, 4, 2, device="meta")
    )
    assert terms["weight"].dense().device.type == "meta"
