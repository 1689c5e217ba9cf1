"""The U-Net: any size, its blocks, and what the library's Gram rules make of it."""

from __future__ import annotations

import pytest
import torch

import ntkgp
from ntkgp.inverse.unet import UNet
from tests import reference

SMALL = {"channels": (8, 8, 8), "skip_channels": (4, 0)}


@pytest.mark.parametrize("norm", [None, "group"])
@pytest.mark.parametrize("output", ["linear", "sigmoid"])
def test_sizes_are_kept_odd_ones_too(norm, output):
    net = UNet(2, 3, **SMALL, norm=norm, output=output)
    for size in ((16, 16), (13, 10), (7, 25), (5, 5)):
        image = net(torch.randn(2, 2, *size))
        assert image.shape == (2, 3, *size)
        if output == "sigmoid":
            assert 0 < image.min()
            assert image.max() < 1


def test_the_default_is_the_network_of_the_28_pixel_study():
    net = UNet()
    assert sum(p.numel() for p in net.parameters()) == 76_905
    assert [name for name, _ in net.named_children()] == [
        "inc", "down0", "down1", "skip0", "skip1", "up1", "up0", "out"
    ]  # fmt: skip
    walnut = UNet(channels=(128,) * 6, skip_channels=(4, 4, 0, 0, 0), norm="group")
    assert "skip2" not in walnut._modules


def test_a_single_level_is_a_plain_network():
    assert UNet(channels=(4,), skip_channels=())(torch.randn(1, 1, 3, 3)).shape == (1, 1, 3, 3)


def test_sigmoid_saturates_at_a_number():
    net = UNet(**SMALL, output="sigmoid")
    torch.nn.init.constant_(net.out.bias, 1e4)
    image = net(torch.randn(1, 1, 8, 8))
    assert bool((image < 1).all())


@pytest.mark.parametrize("norm", [None, "group"])
def test_every_parameter_goes_by_a_gram_rule(norm, caplog):
    net = UNet(**SMALL, norm=norm)
    x = torch.randn(1, 1, 9, 8)
    lin = ntkgp.LinearizedNetwork(net, x, groups="tensor")
    assert lin.num_outputs == 72
    lines = lin.explain(1).lines
    assert lin.engine.plan.known.keys() == set(dict(net.named_parameters()))
    assert {line.name for line in lines if line.sizes is not None} >= {"down0.0.weight"}
    assert "fallback" not in caplog.text


@pytest.mark.parametrize("norm", [None, "group"])
def test_grams_against_the_dense_oracle(norm):
    torch.manual_seed(1)
    net = UNet(**SMALL, norm=norm).double()
    x = torch.randn(1, 1, 7, 6, dtype=torch.float64)
    lin = ntkgp.LinearizedNetwork(net, x)
    j = reference.jacobian(net, x)[0]
    for g, gram in enumerate(lin.grams(x)):
        part = j[:, lin.groups.index == g]
        torch.testing.assert_close(gram, part @ part.T, rtol=1e-10, atol=1e-12 * float(gram.max()))
    v = torch.randn(lin.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(lin.jvp(x, v)[0], j @ v)


def test_normalised_groups_are_found():
    x = torch.randn(1, 1, 12, 9)
    lin = ntkgp.LinearizedNetwork(UNet(**SMALL, norm="group"), x)
    normalised = [name for name, flag in zip(lin.groups.names, lin.groups.is_normalized, strict=True) if flag]
    assert set(normalised) == {
        "inc.0", "down0.0", "down0.3", "down1.0", "down1.3", "skip0.0", "up1.0", "up1.3", "up0.0", "up0.3"
    }  # fmt: skip
    error = lin.groups.verify(x)
    assert float(error[[lin.groups.names.index(name) for name in normalised]].max()) < 1e-9


def test_dropout_is_random_in_training_only():
    net = UNet(**SMALL, dropout=0.3)
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": -1}, "out_channels"),
        ({"channels": ()}, "channels: expected a positive integer per level"),
        ({"channels": (4, 0, 4)}, "channels"),
        ({"skip_channels": (4,)}, "skip_channels: expected 2 integers"),
        ({"skip_channels": (4, -1)}, "skip_channels"),
        ({"norm": "batch"}, "norm: expected None or 'group', got 'batch'"),
        ({"norm": "group", "num_groups": 5}, "num_groups: expected a divisor"),
        ({"output": "tanh"}, "output: expected one of"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**options)
