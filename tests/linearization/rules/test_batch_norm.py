"""Batch normalization in evaluation mode against per-row Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkgp.linearization.rules.registry import rule_of
from tests.linearization.rules.helper import DOUBLE, Within, check, check_gradient, check_layer, perturb

CASES = [
    (nn.BatchNorm1d, (4,)),
    (nn.BatchNorm1d, (4, 5)),
    (nn.BatchNorm2d, (4, 3, 5)),
    (nn.BatchNorm3d, (4, 3, 2, 2)),
]


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("kind", "event"), CASES)
def test_any_arguments(kind, event, momentum, eps):
    found = check_layer(kind(4, eps=eps, momentum=momentum), torch.randn(3, *event, dtype=DOUBLE))
    assert set(found) == {"weight", "bias"}


@pytest.mark.parametrize(("kind", "event"), CASES)
def test_without_parameters(kind, event):
    layer = kind(4, affine=False, dtype=DOUBLE).eval()
    g = torch.randn(3, 2, *event, dtype=DOUBLE)
    assert rule_of(layer).terms(layer, torch.randn(3, *event, dtype=DOUBLE), g) == {}


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_one_parameter_alone(name):
    layer = perturb(nn.BatchNorm2d(4, dtype=DOUBLE))
    setattr(layer, name, None)
    x = torch.randn(3, 4, 3, 3, dtype=DOUBLE)
    check(Within(layer, x), x, names=[f"layer.{'bias' if name == 'weight' else 'weight'}"])


def test_statistics_of_the_batch_are_left_to_others():
    x, g = torch.randn(3, 4, 5, dtype=DOUBLE), torch.randn(3, 2, 4, 5, dtype=DOUBLE)
    for layer in (nn.BatchNorm1d(4, track_running_stats=False).double().eval(), nn.BatchNorm1d(4).double().train()):
        assert rule_of(layer).terms(layer, x, g) == {}


def test_buffers_stay_as_they_are():
    layer = perturb(nn.BatchNorm2d(4, dtype=DOUBLE)).eval()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = torch.randn(3, 4, 3, 3, dtype=DOUBLE)
    rule_of(layer).terms(layer, x, torch.randn(3, 2, 4, 3, 3, dtype=DOUBLE))
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


@pytest.mark.parametrize(("kind", "event"), CASES)
def test_differentiable_in_the_inputs(kind, event):
    x = torch.randn(2, *event, dtype=DOUBLE)
    check_gradient(Within(perturb(kind(4)), x), x)
