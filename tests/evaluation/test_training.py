"""The trainer: learns, keeps global state, follows its seed, refuses nonsense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkgp.evaluation.datasets import toy_gap
from ntkgp.evaluation.training import seeded, train


def _net(seed=0, outputs=1):
    with seeded(seed):
        return nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, outputs))


def test_training_learns_and_is_reproducible():
    x, _ = toy_gap(40)
    y = x.squeeze(-1).tanh()
    state = torch.get_rng_state()
    losses, weights = [], []
    for _ in range(2):
        net = _net()
        losses.append(train(net, x, y, steps=400, batch_size=16, seed=3))
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert losses[0] == losses[1]
    assert float((net(x).detach().squeeze(-1) - y).square().mean()) < 0.05 * float(y.var())
    assert not net.training
    assert torch.equal(state, torch.get_rng_state())


def test_integer_targets_are_classified():
    x, _ = toy_gap(60)
    labels = (x.squeeze(-1) > 2).long() + (x.squeeze(-1) > 0).long()
    net = _net(outputs=3)
    train(net, x, labels, steps=300)
    assert float((net(x).argmax(-1) == labels).double().mean()) > 0.9


def test_bad_input():
    x, y = toy_gap(10)
    with pytest.raises(ValueError, match="got 10 and 9"):
        train(_net(), x, y[:9], steps=1)
    with pytest.raises(ValueError, match="got 1 and 11"):
        train(_net(), x, y, steps=1, batch_size=11)
    with pytest.raises(FloatingPointError, match="loss became nan"):
        train(_net(), x, y * float("nan"), steps=2)
