"""Normalization by the root mean square against per-row Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkgp.linearization.rules.registry import rule_of
from tests.linearization.rules.helper import DOUBLE, Within, check_gradient, check_layer, perturb


@pytest.mark.parametrize("eps", [None, 1e-5, 0.3])
@pytest.mark.parametrize("positions", [(), (2,), (2, 3)])
@pytest.mark.parametrize("shape", [4, (4,), (3, 4), (2, 3, 2)])
def test_any_arguments(shape, positions, eps):
    event = (shape,) if isinstance(shape, int) else shape
    check_layer(nn.RMSNorm(shape, eps=eps), torch.randn(3, *positions, *event, dtype=DOUBLE))


def test_without_parameters():
    layer = nn.RMSNorm(4, elementwise_affine=False)
    assert rule_of(layer).terms(layer, torch.randn(3, 2, 4), torch.randn(3, 2, 2, 4)) == {}


@pytest.mark.parametrize("positions", [(), (3,)])
def test_differentiable_in_the_inputs(positions):
    x = torch.randn(2, *positions, 2, 3, dtype=DOUBLE)
    check_gradient(Within(perturb(nn.RMSNorm((2, 3))), x), x)
