"""Which parameters go by rules, and which by the fallback."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ntkgp
from tests import reference as ref
from tests.architectures import CASES
from tests.linearization.grams.helper import (
    DOUBLE,
    NETS,
    TOLERANCE,
    Net,
    dense,
    error,
    linear,
    noise,
)


def _same(names: list[str], parameters: set[str]) -> dict[str, set[str]]:
    return {name: set(parameters) for name in names}


RNN = {f"rnn.{kind}_l{layer}" for layer in (0, 1) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
# Everything that is not named goes by a rule.
FALLBACK: dict[str, set[str]] = {
    **_same(
        ["mlp_tanh", "mlp_layer_norm", "mlp_batch_norm", "mlp_rms_norm", "shared_layer", "tuple_inputs", "dict_inputs",
         "frozen_bias_layer_norm", "lora_before_layer_norm", "cnn_batch_norm", "cnn_group_norm", "cnn_instance_norm",
         "resnet_batch_norm", "preactivation_resnet", "unet_group_norm", "conv_transpose_batch_norm",
         "depthwise_separable", "tied_head"], set()),
    **_same(
        ["transformer_pre_norm", "transformer_encoder_pre_norm", "transformer_post_norm", "transformer_qk_norm"],
        {"position"}),
    "mlp_bare_parameters": {"w1", "b1", "w2", "b2", "w3", "b3"},
    "weight_norm": {f"{i}.parametrizations.weight.original{k}" for i in (0, 2, 4) for k in (0, 1)},
    "spectral_norm": {f"{i}.parametrizations.weight.original" for i in (0, 2)},
    "layer_scale_stream": {"1.body.4.gamma", "2.body.4.gamma"},
    "gru": RNN,
    "lstm": RNN,
}  # fmt: skip


def fallback(lin: ntkgp.LinearizedNetwork) -> set[str]:
    """Parameters whose per-sample gradients are formed."""
    return set(lin.frozen.theta) - set(lin.engine.plan.shapes)


@pytest.mark.parametrize("name", FALLBACK)
def test_known_nets(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]()
    lin = ntkgp.LinearizedNetwork(case.net, case.example)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ntkgp"):
        assert fallback(lin) == FALLBACK[name]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    told = [r.getMessage() for r in caplog.records]
    rest = ", ".join(n for n in lin.frozen.theta if n in FALLBACK[name])
    assert told == ([f"per-sample gradients are formed for {rest}"]
                    if FALLBACK[name] else [])  # fmt: skip
    lin.grams(case.example)
    assert fallback(lin) == FALLBACK[name], "nothing is given up on the way"


@pytest.mark.parametrize("name", NETS)
def test_only_the_fallback_forms_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, inputs = NETS[name]
    lin = ntkgp.LinearizedNetwork(build(), inputs(0, 2))
    x = inputs(1, 3)
    expected = {"position"} if name == "words" else set()
    assert fallback(lin) == expected
    asked: set[str] = set()
    jacobian = lin.frozen.jacobian
    monkeypatch.setattr(lin.frozen, "jacobian", lambda leaves, u=None, names=None:
                        (asked.update(names), jacobian(leaves, u, names))[1])  # fmt: skip
    lin.grams(x)
    assert asked == expected


def test_several_backward_chains_run_at_once() -> None:
    for build, inputs in NETS.values():
        assert ntkgp.LinearizedNetwork(build(), inputs(0, 2)).engine.plan.batched


@pytest.mark.parametrize(
    ("layout", "arrange", "restore"),
    [
        ("first", lambda x: x, lambda h, n: h),
        ("first", lambda x: x.flatten(0, 1), lambda h, n: h.unflatten(0, (n, -1))),
        ("second", lambda x: x.transpose(0, 1), lambda h, n: h.transpose(0, 1)),
        ("minor", lambda x: x.transpose(0, 1).flatten(0, 1), lambda h, n: h.unflatten(0, (-1, n)).transpose(0, 1)),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_where_the_rows_are(layout: str, arrange, restore, length: int) -> None:
    """Positions beside, before and folded into the rows, both ways, with as many positions as rows too."""

    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.norm(net.b(net.a(arrange(x)).tanh()))
        weights = torch.linspace(1, 2, length, dtype=DOUBLE)[:, None]
        return net.head((restore(h, len(x)).sin() * weights).sum(1))

    with ref.seeded(3):
        net = Net(forward, a=linear(3, 4), b=linear(4, 5), norm=nn.LayerNorm(5, dtype=DOUBLE), head=linear(5, 2))
    for example in (noise(0, 2, length, 3), torch.zeros(2, length, 3), torch.ones(3, length, 3)):
        lin = ntkgp.LinearizedNetwork(net, example.double())
        for n in (1, 2, 3, 4, 6):
            x = noise(n, n, length, 3)
            assert error(lin.grams(x), dense(lin, ref.jacobian(net, x))) < TOLERANCE
    lin = ntkgp.LinearizedNetwork(net, noise(0, 2, length, 3))
    assert fallback(lin) == set()
    if length > 1:
        assert lin.engine.plan.layouts == {"a": layout, "b": layout, "norm": layout, "head": "first"}


def test_a_bias_without_derivative() -> None:
    """Attention does not see a shift of all keys: its bias has a gradient of mere rounding errors."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(F.scaled_dot_product_attention(net.q(x), net.k(x), net.v(x)).mean(1).tanh())

    with ref.seeded(4):
        net = Net(forward, q=linear(3, 4), k=linear(3, 4), v=linear(3, 4), head=linear(4, 2))
    for dtype, tolerance in ((DOUBLE, TOLERANCE), (torch.float32, 1e-5)):
        net = net.to(dtype)
        lin = ntkgp.LinearizedNetwork(net, noise(0, 2, 5, 3).to(dtype))
        assert fallback(lin) == set()
        x = noise(1, 4, 5, 3)
        assert error(lin.grams(x), dense(lin, ref.jacobian(net, x))) < tolerance


def test_weights_and_biases_go_together() -> None:
    build, inputs = NETS["mlp"]
    lin = ntkgp.LinearizedNetwork(build(), inputs(0, 2), groups="single")
    names = {line.name for line in lin.explain(10).lines if line.sizes is not None}
    assert {"0.weight, 0.bias", "3.weight, 3.bias", "8.weight, 8.bias"} <= names
    apart = ntkgp.LinearizedNetwork(build(), inputs(0, 2), groups="tensor")
    assert {line.name for line in apart.explain(10).lines} == set(apart.frozen.theta)


def test_frozen_tensors() -> None:
    for frozen in ("weight", "bias"):
        for name, (build, inputs) in NETS.items():
            net = build()
            for key, p in net.named_parameters():
                p.requires_grad_(not key.endswith(frozen))
            lin = ntkgp.LinearizedNetwork(net, inputs(0, 2))
            assert fallback(lin) == ({"position"} if name == "words" else set())
            x = inputs(1, 4)
            assert error(lin.grams(x), dense(lin, ref.jacobian(net, x))) < TOLERANCE
