"""Layer normalization against per-row Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkgp.linearization.rules.registry import rule_of
from tests.linearization.rules.helper import DOUBLE, Within, check_gradient, check_layer, perturb


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("positions", [(), (2,), (2, 3)])
@pytest.mark.parametrize("shape", [4, (4,), (3, 4), (2, 3, 2)])
def test_any_arguments(shape, positions, eps, bias):
    event = (shape,) if isinstance(shape, int) else shape
    layer = nn.LayerNorm(shape, eps=eps, bias=bias)
    found = check_layer(layer, torch.randn(3, *positions, *event, dtype=DOUBLE))
    assert set(found) == ({"weight", "bias"} if bias else {"weight"})


def test_without_parameters():
    layer = nn.LayerNorm(4, elementwise_affine=False)
    assert rule_of(layer).terms(layer, torch.randn(3, 2, 4), torch.randn(3, 2, 2, 4)) == {}


@pytest.mark.parametrize("positions", [(), (3,)])
def test_differentiable_in_the_inputs(positions):
    x = torch.randn(2, *positions, 2, 3, dtype=DOUBLE)
    check_gradient(Within(perturb(nn.LayerNorm((2, 3))), x), x)
