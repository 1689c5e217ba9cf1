"""The private copy, the environment of a pass, and how outputs are picked."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.linearization.frozen import FrozenNetwork, pass_environment, pick_output, private_copy
from tests import reference as ref


def frozen(net: nn.Module, leaves: list[Tensor]) -> FrozenNetwork:
    return FrozenNetwork(net, lambda parts: parts[0], None, [leaf.dtype for leaf in leaves])


def test_the_copy_is_in_evaluation_mode_and_shares_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Embedding(5, 2, sparse=True))
    copied = private_copy(net)
    assert not any(module.training for module in copied.modules())
    assert all(module.training for module in net.modules())
    assert not copied[3].sparse
    assert net[3].sparse
    mine = {p.data_ptr() for p in [*net.parameters(), *net.buffers()] if p.numel()}
    assert not mine & {p.data_ptr() for p in [*copied.parameters(), *copied.buffers()] if p.numel()}


def test_tensors_kept_with_their_graph_are_copied_detached() -> None:
    net = nn.Linear(3, 4)
    net.kept = net.weight * 2
    net.lists = {"a": [net.weight.sum()]}
    copied = private_copy(net)
    assert torch.equal(copied.kept, net.kept)
    assert copied.kept.grad_fn is None
    assert copied.lists["a"][0].grad_fn is None
    assert net.kept.grad_fn is not None


def test_tied_weights_stay_tied() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    copied = private_copy(net)
    assert copied[0].weight is copied[1].weight
    assert frozen(net, [torch.ones(1, 3)]).trainable == ("0.weight", "0.bias", "1.bias")


@pytest.mark.parametrize("grad", [True, False])
def test_the_environment_is_put_back(grad: bool) -> None:
    state = torch.get_rng_state()
    fast, filters = torch.backends.mha.get_fastpath_enabled(), list(warnings.filters)

    def passes() -> None:
        with torch.set_grad_enabled(grad), pass_environment():
            assert torch.is_grad_enabled()
            assert not torch.backends.mha.get_fastpath_enabled()
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        passes()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert warnings.filters == filters


def test_picked_outputs() -> None:
    y = torch.ones(2, 3)
    assert pick_output(y, None) is y
    assert pick_output({"logits": y, "loss": None}, None) is y
    assert pick_output({"a": {"b": y}}, lambda out: out["a"]["b"]) is y
    for bad, name in (((y, y), "tuple"), ({"hidden": y}, "dict"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"net returned a {name}; expected one tensor"):
            pick_output(bad, None)
    with pytest.raises(TypeError, match=r"net returned a torch.bool tensor"):
        pick_output(y > 0, None)


def test_activations_are_counted_per_row() -> None:
    net = nn.Sequential(nn.Linear(3, 100), nn.Tanh(), nn.Linear(100, 2))
    counts = [frozen(net, [torch.ones(n, 3)]).activation_bytes([torch.ones(n, 3)]) for n in (1, 64)]
    assert counts[1] >= 4 * (100 + 100 + 2)
    assert counts[0] >= counts[1]


class Bag(nn.Module):
    """Sums of embeddings: torch has neither their forward mode nor their second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.hidden, self.norm = nn.EmbeddingBag(10, 6, mode="sum"), nn.Linear(6, 5), nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(self.bag(x))).tanh())


def test_once_differentiable(caplog):
    with ref.seeded(0):
        net, x = Bag().double(), torch.randint(0, 10, (4, 3))
        v, u = torch.randn(123, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with caplog.at_level("WARNING", logger="ntkgp"):
        lin = ntkgp.LinearizedNetwork(net, x)
    assert [r.getMessage() for r in caplog.records] == [
        "this network can be differentiated once only: jvp runs by rows of the Jacobian"
    ]
    j = ref.jacobian(net, x)
    assert torch.allclose(lin.jvp(x, v), j @ v, rtol=1e-12, atol=1e-12)
    assert torch.allclose(lin.vjp(x, u), torch.einsum("ncp,nc->p", j, u), rtol=1e-12, atol=1e-12)
    gram = j.flatten(0, 1) @ j.flatten(0, 1).T
    assert torch.allclose(lin.grams(x).sum(0), gram, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_batches_of_one_size_are_not_mixed_up(rows: int, outputs: int) -> None:
    """PReLU of a frozen slope: nested vmap takes rows for outputs where there are as many of both, or one."""
    with ref.seeded(0):
        net = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, outputs)).double()
        x = torch.randn(rows, 3, dtype=torch.float64)
    net[1].requires_grad_(False)
    net[3].requires_grad_(False)
    lin = ntkgp.LinearizedNetwork(net, x)
    torch.testing.assert_close(lin.jacobian(x), ref.jacobian(net, x), rtol=1e-12, atol=1e-12)


def test_logits_of_any_object() -> None:
    class Answering(nn.Linear):
        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(x), loss=None)

    net, x = Answering(3, 2), torch.ones(4, 3)
    assert torch.equal(ntkgp.LinearizedNetwork(net, x)(x), net(x).logits.detach())
