"""Transposed convolutions against per-row Jacobians over all of their arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.linearization.rules.helper import DOUBLE, Within, check_gradient, check_layer

LAYERS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def transposed(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor, list[int]]:
    """A layer, inputs that it takes and the size of its output."""
    dims = draw(st.integers(1, 3))

    def per_dim(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    kernel, dilation, stride, size = per_dim(1, 3), per_dim(1, 3), per_dim(1, 3), per_dim(1, 3)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    full = [
        (n - 1) * s + d * (k - 1) + e + 1
        for n, s, d, k, e in zip(size, stride, dilation, kernel, extra, strict=True)
    ]  # fmt: skip
    padding = tuple(draw(st.integers(0, min(3, (length - 1) // 2))) for length in full)
    groups, fan_in, fan_out = draw(st.sampled_from([(1, 2, 3), (2, 1, 2), (2, 2, 1), (3, 1, 1), (3, 1, 2)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = LAYERS[dims](
        groups * fan_in, groups * fan_out, kernel, stride=stride, padding=padding, output_padding=extra,
        dilation=dilation, groups=groups, bias=draw(st.booleans()),
    )  # fmt: skip
    found = [length - 2 * p for length, p in zip(full, padding, strict=True)]
    return layer, torch.randn(2, groups * fan_in, *size, dtype=DOUBLE), found


@settings(max_examples=120, deadline=None, derandomize=True)
@given(transposed())
def test_any_arguments(case):
    layer, x, size = case
    assert list(layer.double()(x).shape[2:]) == size
    check_layer(layer, x, may_vanish=True)  # padding may cut all of the output off that the input reaches


@pytest.mark.parametrize("size", [5, 6])
def test_output_size(size):
    layer = nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, groups=2)
    found = check_layer(layer, torch.randn(3, 2, 3, 3, dtype=DOUBLE), {"output_size": [size, 6]})
    assert found["bias"].cotangents.shape[-1] == size * 6


def test_more_output_than_the_input_reaches():
    layer = nn.ConvTranspose1d(2, 3, 2, stride=1, dilation=4, output_padding=3)
    found = check_layer(layer, torch.randn(3, 2, 4, dtype=DOUBLE))
    assert found["weight"].right().shape[-1] == 4


def test_cotangents_are_unfolded_when_they_are_used():
    found = check_layer(nn.ConvTranspose2d(2, 3, 3, stride=2), torch.randn(3, 2, 4, 4, dtype=DOUBLE))
    assert found["weight"].cotangents.shape == (3, 3, 3, 9, 9)
    assert found["weight"].right().shape == (3, 3, 1, 27, 16)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_differentiable_in_the_inputs(dims):
    x = torch.randn(2, 2, *(3, 2, 2)[:dims], dtype=DOUBLE)
    layer = LAYERS[dims](2, 2, 2, stride=2, padding=1, output_padding=1, groups=2)
    check_gradient(Within(layer, x), x)
