"""Group and instance normalization against per-row Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkgp.linearization.rules.registry import rule_of
from tests.linearization.rules.helper import DOUBLE, Within, check_gradient, check_layer, perturb

INSTANCE = [(nn.InstanceNorm1d, (4, 5)), (nn.InstanceNorm2d, (4, 3, 5)), (nn.InstanceNorm3d, (4, 3, 2, 2))]
# A number alone in its group would be normalized to zero.
GROUPED = [(groups, event) for groups in (1, 2, 4) for event in ((), (5,), (3, 5), (2, 3, 2)) if event or groups < 4]


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize(("groups", "event"), GROUPED)
def test_any_group_norm(groups, event, eps):
    check_layer(nn.GroupNorm(groups, 4, eps=eps), torch.randn(3, 4, *event, dtype=DOUBLE))


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize(("kind", "event"), INSTANCE)
def test_any_instance_norm(kind, event, tracked, momentum, eps):
    layer = kind(4, eps=eps, momentum=momentum, affine=True, track_running_stats=tracked)
    check_layer(layer, torch.randn(3, *event, dtype=DOUBLE))


@pytest.mark.parametrize(
    "layer", [nn.GroupNorm(2, 4, affine=False), nn.InstanceNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)]
)
def test_without_parameters(layer):
    assert rule_of(layer).terms(layer.eval(), torch.randn(3, 4, 5), torch.randn(3, 2, 4, 5)) == {}


def test_buffers_stay_as_they_are():
    layer = perturb(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)).eval()
    layer.track_running_stats = False  # statistics of each sample, though there are buffers
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    rule_of(layer).terms(layer, torch.randn(3, 4, 5), torch.randn(3, 2, 4, 5))
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.InstanceNorm1d(4, affine=True),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
)
def test_differentiable_in_the_inputs(layer):
    x = torch.randn(2, 4, 3, dtype=DOUBLE)
    check_gradient(Within(perturb(layer), x), x)
