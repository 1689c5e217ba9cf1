"""Convolutions against per-row Jacobians over all of their arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ntkgp.linearization.rules.convolution import patches
from ntkgp.linearization.rules.terms import Outer
from tests.linearization.rules.helper import DOUBLE, Within, check_gradient, check_layer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A layer and inputs that it takes."""
    dims = draw(st.integers(1, 3))

    def per_dim(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    kernel, dilation = per_dim(1, 3), per_dim(1, 2)
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.just(None)))
    stride = (1,) * dims if padding == "same" else per_dim(1, 3)
    padding = padding or per_dim(0, 2)
    # Reflection needs more pixels than it pads by; a window must fit.
    size = tuple(max(3, d * (k - 1) + 1) + e for d, k, e in zip(dilation, kernel, per_dim(0, 2), strict=True))
    groups, fan_in, fan_out = draw(st.sampled_from([(1, 2, 3), (2, 1, 2), (2, 2, 1), (3, 1, 1), (3, 1, 2)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = LAYERS[dims](
        groups * fan_in, groups * fan_out, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        bias=draw(st.booleans()), padding_mode=draw(st.sampled_from(MODES)),
    )  # fmt: skip
    return layer, torch.randn(2, groups * fan_in, *size, dtype=DOUBLE)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(convolutions())
def test_any_arguments(case):
    check_layer(*case)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 1)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_padding(mode, padding, groups):
    layer = nn.Conv2d(4, 8, (2, 3), padding=padding, padding_mode=mode, groups=groups, dilation=(1, 2))
    check_layer(layer, torch.randn(3, 4, 5, 6, dtype=DOUBLE))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pointwise_kernels_need_no_patches(dims, padding, stride):
    layer = LAYERS[dims](4, 6, 1, stride=stride, padding=padding, groups=2)
    found = check_layer(layer, torch.randn(3, 4, *(5, 4, 3)[:dims], dtype=DOUBLE))
    assert found["weight"].unfold is None


def test_patches_are_cut_when_they_are_used():
    found = check_layer(nn.Conv2d(2, 3, 3, padding=1), torch.randn(3, 2, 6, 6, dtype=DOUBLE))
    assert isinstance(found["weight"], Outer)
    assert found["weight"].inputs.shape == (3, 2, 6, 6)
    assert found["weight"].left().shape == (3, 1, 18, 36)
    assert found["weight"].cotangents is found["bias"].cotangents


def test_patches_are_those_of_torch():
    x = torch.randn(3, 4, 9, 8)
    found = patches(x, (3, 2), (2, 1), (2, 3), (1, 1, 2, 2))
    expected = F.unfold(x, (3, 2), stride=(2, 1), dilation=(2, 3), padding=(2, 1))
    assert torch.equal(found[:, 0], expected)


def test_other_memory_formats():
    x = torch.randn(3, 4, 6, 5, dtype=DOUBLE).to(memory_format=torch.channels_last)
    check_layer(nn.Conv2d(4, 4, 3, padding=1, groups=2).to(memory_format=torch.channels_last), x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 4, 2, stride=2, padding=1, padding_mode="circular", groups=2),
        nn.Conv2d(2, 2, (2, 3), padding=(1, 0), padding_mode="reflect", dilation=(2, 1)),
        nn.Conv3d(2, 1, 2, padding="same"),
        nn.Conv2d(2, 3, 1, stride=2),
    ],
)
def test_differentiable_in_the_inputs(layer):
    x = torch.randn(2, 2, *(4, 3, 3)[: len(layer.kernel_size)], dtype=DOUBLE)
    check_gradient(Within(layer, x), x)
