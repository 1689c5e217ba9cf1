"""Rows of one sample put together, and several uses of one layer: every rule, cross terms and all."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from ntkgp.linearization.rules.registry import rule_of
from ntkgp.linearization.rules.terms import combine
from tests.linearization.rules.helper import (
    DOUBLE,
    Folded,
    Within,
    by_autograd,
    by_rule,
    check,
    error,
    gram,
    perturb,
    uses_by_rule,
)

# Layers whose output has the shape of their input, and that shape.
LAYERS = {
    "linear": (lambda: nn.Linear(4, 4), (3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1, groups=2), (4, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (4, 4, 3)),
    "pointwise": (lambda: nn.Conv2d(4, 4, 1), (4, 4, 3)),
    "depthwise": (lambda: nn.Conv3d(4, 4, 3, padding="same", groups=4), (4, 2, 3, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2), (4, 4, 3)),
    "batch_norm": (lambda: nn.BatchNorm2d(4), (4, 4, 3)),
    "layer_norm": (lambda: nn.LayerNorm((2, 4)), (3, 2, 4)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 4, 3)),
    "instance_norm": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "rms_norm": (lambda: nn.RMSNorm(4), (3, 4)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer of that name, not at its initial values, and the shape that it takes."""
    make, event = LAYERS[name]
    return perturb(make().to(DOUBLE)), event


class Twice(nn.Module):
    """One layer, used on its own output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer, a nonlinearity, the layer."""
        return self.layer(2 * self.layer(x).tanh() + 0.5)


@every_layer
def test_rows_folded_into_the_batch(name):
    layer, event = build(name)
    x = torch.randn(3, 2, *event, dtype=DOUBLE)
    net = Within(Folded(layer), x)
    found = check(net, x)
    assert all(len(term.dense()) == 3 for term in found.values())


@every_layer
def test_used_twice(name):
    layer, event = build(name)
    x = torch.randn(3, *event, dtype=DOUBLE)
    net = Within(Twice(layer), x)
    expected = by_autograd(net, x)
    check(net, x)
    uses = uses_by_rule(net, x)
    assert {len(terms) for terms in uses.values()} == {2}
    # Negative control: Grams of the uses, added up, lack the terms between them.
    weight = "layer.layer.weight"
    apart = sum(gram(term.dense()) for term in uses[weight])
    assert error(apart, gram(expected[weight])) > 1e-2


@every_layer
def test_used_twice_on_folded_rows(name):
    layer, event = build(name)
    x = torch.randn(2, 3, *event, dtype=DOUBLE)
    check(Within(Folded(Twice(layer)), x), x)


@every_layer
def test_terms_survive_pickling(name):
    layer, event = build(name)
    x = torch.randn(2, *event, dtype=DOUBLE)
    for term in by_rule(Within(layer, x), x).values():
        detached = term.with_tensors([t.detach() for t in term.tensors()])
        assert torch.equal(pickle.loads(pickle.dumps(detached)).dense(), term.dense())


@every_layer
def test_terms_of_some_samples(name):
    layer, event = build(name)
    x = torch.randn(4, *event, dtype=DOUBLE)
    for term in by_rule(Within(layer, x), x).values():
        some = term.with_tensors([t[1:3] for t in term.tensors()])
        assert error(some.dense(), term.dense()[1:3]) < 1e-14


@every_layer
def test_single_precision(name):
    layer, event = build(name)
    x = torch.randn(3, *event, dtype=DOUBLE)
    net = Within(layer, x)
    expected = by_autograd(net, x)
    for key, term in by_rule(net.float(), x.float()).items():
        assert term.dense().dtype == torch.float32
        assert error(term.dense().double(), expected[key]) < 1e-5


@every_layer
def test_not_contiguous_inputs(name):
    layer, event = build(name)
    x = torch.randn(*event, 3, dtype=DOUBLE).movedim(-1, 0)
    check(Within(layer, x), x)


@every_layer
def test_any_device(name):
    """Nothing is made on another device than the inputs': the device without data refuses to mix."""
    layer, event = build(name)
    layer = layer.to("meta").eval()
    x = torch.randn(3, *event, dtype=DOUBLE, device="meta")
    rule = rule_of(layer)
    terms = rule.terms(layer, rule.inputs(layer, x), torch.randn(3, 2, *event, dtype=DOUBLE, device="meta"))
    for local, p in layer.named_parameters():
        assert terms[local].dense().shape == (3, 2, p.numel())
        assert terms[local].dense().device.type == "meta"


def test_two_layers_of_one_weight():
    """Their strides differ: patches are cut before positions are put side by side."""
    torch.manual_seed(1)
    a, b = nn.Conv1d(2, 3, 2, dtype=DOUBLE), nn.Conv1d(2, 3, 2, stride=2, padding=1, dtype=DOUBLE)
    b.weight, b.bias = a.weight, a.bias

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x)], dim=-1)

    x = torch.randn(3, 2, 5, dtype=DOUBLE)
    check(Within(Both(), x), x)
    uses = uses_by_rule(Within(Both(), x), x)["layer.a.weight"]
    assert combine(uses).left().shape[-1] == sum(use.left().shape[-1] for use in uses)
