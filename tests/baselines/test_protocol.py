"""What all comparators owe to their protocol."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkgp.baselines import Laplace, Point
from tests import reference as ref


@pytest.mark.parametrize("method", [Point, lambda net: Laplace(net, evidence=None)])
def test_a_second_fit_sees_what_the_network_has_become(method) -> None:
    with ref.seeded(0):
        net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        net, x = net.double(), torch.randn(12, 3, dtype=torch.float64)
        y = torch.randn(12, 2, dtype=torch.float64)
    fitted = method(net).fit((x, y))
    assert torch.allclose(fitted.predict(x).mean, net(x).detach())
    with torch.no_grad():
        net[0].weight.mul_(1.7)
        net[5].weight.mul_(0.3)
    assert not torch.allclose(fitted.predict(x).mean, net(x).detach())
    again = fitted.fit((x, y)).predict(x)
    expected = method(net).fit((x, y)).predict(x)
    assert torch.allclose(again.mean, net(x).detach())
    assert torch.allclose(again.variance, expected.variance)
