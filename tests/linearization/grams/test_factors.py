"""Kept factors: no pass over what is kept, copies, and what is left as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import ntkgp
from ntkgp.linearization.memory import format_memory
from tests import reference as ref
from tests.linearization.grams.helper import NETS, TOLERANCE, dense, error, mlp, noise


def forward_rows(lin: ntkgp.LinearizedNetwork, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward pass from here on."""
    seen: list[int] = []
    arguments = lin.frozen._arguments
    monkeypatch.setattr(
        lin.frozen, "_arguments", lambda leaves, *a: (seen.append(len(leaves[0])), arguments(leaves, *a))[1]
    )
    return seen


@pytest.mark.parametrize("name", NETS)
def test_no_pass_over_what_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, inputs = NETS[name]
    lin = ntkgp.LinearizedNetwork(build(), inputs(0, 2))
    kept, x, variance = lin.factors(inputs(1, 6)), inputs(2, 3), torch.ones(len(lin.groups))
    seen = forward_rows(lin, monkeypatch)
    lin.grams(kept)
    lin.grams(kept, kept)
    lin.weighted_gram(kept, None, variance)
    assert seen == []
    lin.grams(x, kept)
    # One pass by rules; bare parameters take a pass of their own, which vmap hands one row at a time.
    assert seen in ([3], [3, 1])
    seen.clear()
    lin.weighted_gram(kept, x, variance)
    assert seen in ([3], [3, 1])


@pytest.mark.parametrize("name", NETS)
def test_copies(name: str) -> None:
    build, inputs = NETS[name]
    net, x, z = build(), inputs(1, 6), inputs(2, 3)
    lin = ntkgp.LinearizedNetwork(net, inputs(0, 2))
    j, k = ref.jacobian(net, x), ref.jacobian(net, z)
    kept = lin.factors(x)
    expected = dense(lin, k, j)
    for factors in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert error(lin.grams(z, factors), expected) < TOLERANCE
    again = pickle.loads(pickle.dumps(lin))
    assert error(again.grams(z, x), expected) < TOLERANCE
    assert error(again.grams(z, pickle.loads(pickle.dumps(kept))), expected) < TOLERANCE
    assert copy.deepcopy(lin).engine is lin.engine
    assert kept.nbytes == sum(t.numel() * t.element_size() for term in kept.terms for t in term.tensors())


def test_later_changes_do_not_reach_what_is_kept() -> None:
    net, x, z = mlp(), noise(1, 6, 4), noise(2, 3, 4)
    lin = ntkgp.LinearizedNetwork(net, noise(0, 2, 4))
    expected = dense(lin, ref.jacobian(net, z), ref.jacobian(net, x))
    kept = lin.factors(x)
    x.zero_()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert error(lin.grams(z, kept), expected) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_memory_is_what_factors_need(name: str) -> None:
    build, inputs = NETS[name]
    lin, x = ntkgp.LinearizedNetwork(build(), inputs(0, 2)), inputs(1, 6)
    least = lin.factors_memory(6)
    kept = lin.factors(x, least)
    assert kept.nbytes <= least
    assert error(lin.grams(kept), lin.grams(x)) < TOLERANCE
    with pytest.raises(ValueError, match=f"smallest possible is {format_memory(least)}"):
        lin.factors(x, least - 1)
    with pytest.raises(ValueError, match="max_memory"):
        lin.grams(x, max_memory=lin.gram_memory(6, 6) // 4)
    lin.grams(x, max_memory=lin.gram_memory(6, 6))


def test_what_is_kept_is_small() -> None:
    """A dense layer of 100 × 80 with two outputs: 8100 · 2 numbers per row of Jacobian, 101 + 160 as factors."""
    with ref.seeded(0):
        net = nn.Sequential(nn.Linear(100, 80), nn.Tanh(), nn.Linear(80, 2)).double()
    lin = ntkgp.LinearizedNetwork(net, noise(0, 2, 100))
    assert lin.factors(noise(1, 50, 100)).nbytes <= 8 * 50 * (101 + 160 + 81 + 4)


def state(net: nn.Module) -> list:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training, sorted(vars(m))) for m in net.modules()]
    return [{k: v.clone() for k, v in net.state_dict().items()}, [p.requires_grad for p in net.parameters()], hooks,
            [p.grad is None for p in net.parameters()]]  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_nothing_else_changes(name: str) -> None:
    build, inputs = NETS[name]
    net = build().train()
    x = inputs(1, 6)
    before, copied = state(net), x.clone()
    torch.manual_seed(5)
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    lin = ntkgp.LinearizedNetwork(net, inputs(0, 2))
    private = lin.frozen.module(torch.device("cpu"))
    inside = state(private)
    lin.grams(x)
    kept = lin.factors(x)
    lin.weighted_gram(x, kept, torch.ones(len(lin.groups)))
    lin.gram_diagonals(x)
    lin.symmetric_grams(x)
    lin.features(x, noise(3, 2, lin.num_parameters))
    lin.explain(5)
    for then, now in ((before, state(net)), (inside, state(private))):
        assert then[1:] == now[1:]
        assert all(torch.equal(then[0][k], v) for k, v in now[0].items())
    assert torch.equal(x, copied)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_num_threads() == threads


def test_no_grad_outside_does_not_matter() -> None:
    lin, x = ntkgp.LinearizedNetwork(mlp(), noise(0, 2, 4)), noise(1, 5, 4)
    expected = lin.grams(x)
    with torch.no_grad():
        fresh = ntkgp.LinearizedNetwork(mlp(), noise(0, 2, 4))
        assert torch.equal(fresh.grams(x), expected)
        assert torch.equal(fresh.grams(fresh.factors(x)), expected)
