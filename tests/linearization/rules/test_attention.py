"""Attention written out: same results as torch's, and projections whose rows are those of autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ntkgp.linearization.rules.attention import ExplicitAttention, SlicedLinear
from ntkgp.linearization.rules.registry import explicit_form
from tests.linearization.rules.helper import (
    DOUBLE,
    by_autograd,
    check,
    check_gradient,
    check_layer,
    error,
    gram,
    perturb,
    uses_by_rule,
    written_out,
)

N, HEADS, E, TARGET, SOURCE = 3, 2, 4, 4, 5


@st.composite
def modules(draw: st.DrawFn) -> nn.MultiheadAttention:
    """A module with any arguments."""
    torch.manual_seed(draw(st.integers(0, 99)))
    kdim, vdim = draw(st.sampled_from([(None, None), (3, None), (None, 6), (3, 6), (6, 6)]))
    return perturb(
        nn.MultiheadAttention(
            E, HEADS, bias=draw(st.booleans()), add_bias_kv=draw(st.booleans()), add_zero_attn=draw(st.booleans()),
            kdim=kdim, vdim=vdim, batch_first=draw(st.booleans()), dropout=draw(st.sampled_from([0.0, 0.5])),
            dtype=DOUBLE,
        )
    ).eval()  # fmt: skip


@st.composite
def masks(draw: st.DrawFn, target: int, source: int, batched: bool, dead: bool) -> dict[str, object]:
    """Keywords of a call."""
    float_masks = draw(st.booleans())

    def mask(*shape: int) -> Tensor:
        barred = torch.rand(*shape) < 0.4
        if not dead:
            barred[..., 0] = False
        noise = torch.randn(*shape, dtype=DOUBLE)
        return noise.masked_fill(barred, float("-inf")) if float_masks else barred

    found: dict[str, object] = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    rows = N if batched else 1
    kind = draw(st.sampled_from(["none", "shared", "each", "causal"]))
    if kind == "shared":
        found["attn_mask"] = mask(target, source)
    elif kind == "each":
        found["attn_mask"] = mask(rows * HEADS, target, source)
    elif kind == "causal":
        causal = torch.ones(target, source, dtype=torch.bool).triu(1)
        found["attn_mask"] = torch.zeros(target, source, dtype=DOUBLE).masked_fill(causal, float("-inf"))
        if not float_masks:
            found["attn_mask"] = causal
        found["is_causal"] = draw(st.booleans())
    if draw(st.booleans()):
        found["key_padding_mask"] = mask(N, source) if batched else mask(source)
    return found


@st.composite
def calls(draw: st.DrawFn) -> tuple[nn.MultiheadAttention, tuple[Tensor, ...], dict[str, object]]:
    """A module, query, key and value, and keywords."""
    module = draw(modules())
    batched, packed = draw(st.booleans()), module.in_proj_weight is not None
    same = draw(st.sampled_from(["none", "all", "key and value", "query and key"])) if packed else "none"
    target, source = (SOURCE, SOURCE) if same in ("all", "query and key") else (TARGET, SOURCE)

    def tensor(length: int, width: int) -> Tensor:
        x = torch.randn(N, length, width, dtype=DOUBLE, requires_grad=True)
        return (x if module.batch_first else x.transpose(0, 1)) if batched else x[0]

    query = tensor(target, E)
    key = query if same in ("all", "query and key") else tensor(source, module.kdim)
    value = key if same in ("all", "key and value") else tensor(source, module.vdim)
    return module, (query, key, value), draw(masks(target, source, batched, dead=draw(st.booleans())))


def assert_same(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    """Outputs and attention weights agree; what is not a number is so in both."""
    assert (found[1] is None) == (expected[1] is None)
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(calls())
def test_same_results(case):
    module, tensors, keywords = case
    assert_same(explicit_form(module)(*tensors, **keywords), module(*tensors, **keywords))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_same_results_as_the_fast_path(need_weights, batch_first):
    module = perturb(nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=DOUBLE)).eval()
    x = torch.randn(3, 5, 8, dtype=DOUBLE)
    with torch.no_grad():
        assert_same(explicit_form(module)(x, x, x, None, need_weights), module(x, x, x, None, need_weights))


def test_nothing_attended_to():
    module = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=DOUBLE).eval()
    x = torch.randn(N, SOURCE, E, dtype=DOUBLE, requires_grad=True)
    barred = torch.zeros(SOURCE, SOURCE, dtype=torch.bool)
    barred[2] = True
    out = explicit_form(module)(x, x, x, attn_mask=barred, need_weights=False)[0]
    assert torch.equal(out[:, 2], module.out_proj.bias.expand(N, E))
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


class Attending(nn.Module):
    """Attention between two dense layers, of which query, key and value are taken in some way."""

    def __init__(self, module: nn.MultiheadAttention, same: str, masked: str, weights: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, module.embed_dim)
        self.key = nn.Linear(3, module.kdim)
        self.value = nn.Linear(3, module.vdim)
        self.attention = module
        self.norm = nn.LayerNorm(module.embed_dim)
        self.same, self.masked, self.weights = same, masked, weights
        self.register_buffer("readout", torch.randn(3, module.embed_dim * SOURCE) / 3)
        self.to(DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        """(N, SOURCE, 3) -> (N, 3)."""
        q = self.first(x).tanh()
        if self.same == "all":
            k = v = q
        elif self.same == "key and value":
            k = v = self.key(x).sin()
        else:
            k, v = self.key(x).sin(), self.value(x).tanh()
        if not self.attention.batch_first:
            first = {id(t): t.transpose(0, 1) for t in (q, k, v)}
            q, k, v = (first[id(t)] for t in (q, k, v))
        keywords: dict[str, object] = {"need_weights": self.weights, "average_attn_weights": False}
        if self.masked == "padding":
            keywords["key_padding_mask"] = (x[..., 0] > 0.5) & (torch.arange(x.shape[1]) > 0)
        elif self.masked == "causal":
            keywords["attn_mask"] = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        elif self.masked == "each":
            heads = torch.linspace(-1, 1, HEADS * x.shape[1] ** 2, dtype=DOUBLE).sin()
            keywords["attn_mask"] = heads.reshape(HEADS, x.shape[1], x.shape[1]).repeat(len(x), 1, 1)
        y, attended = self.attention(q, k, v, **keywords)
        y = y if self.attention.batch_first else y.transpose(0, 1)
        y = self.norm(y.tanh())
        if attended is not None:
            y = y * (1 + attended.square().sum((1, 2, 3)))[:, None, None]
        return (y.flatten(1) @ self.readout.mT).sin()


MAKE = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "separate": {"kdim": 3, "vdim": 6},
    "separate, no bias, bias_kv": {"kdim": 3, "bias": False, "add_bias_kv": True},
}
# Where key and value have widths of their own, they are not the query.
CALLED = [
    (kind, same)
    for kind, arguments in MAKE.items()
    for same in (("none",) if "kdim" in arguments else ("all", "key and value", "none"))
]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["none", "padding", "causal", "each"])
@pytest.mark.parametrize(("kind", "same"), CALLED)
def test_rows_of_the_projections(kind, same, masked, batch_first):
    module = perturb(nn.MultiheadAttention(E, HEADS, batch_first=batch_first, **MAKE[kind]))
    net = Attending(module, same, masked, weights=masked == "causal")
    if same != "none":
        net.value = None
    if same == "all":
        net.key = None
    bare = {"attention.bias_k", "attention.bias_v"}
    names = {name for name, _ in net.named_parameters()} - bare
    x = torch.randn(N, SOURCE, 3, dtype=DOUBLE)
    check(net, x, names)


def test_parts_of_the_packed_weight_are_widened_late():
    module = perturb(nn.MultiheadAttention(E, HEADS, batch_first=True))
    net, x = Attending(module, "none", "none").eval(), torch.randn(N, SOURCE, 3, dtype=DOUBLE)
    uses = uses_by_rule(net, x)["attention.in_proj_weight"]
    assert len(uses) == 3
    assert all(use.right().shape[-2] == 3 * E and use.cotangents.shape[-2] == E for use in uses)
    # Parts that do not overlap have no cross terms.
    expected = gram(by_autograd(net, x)["attention.in_proj_weight"])
    assert error(sum(gram(use.dense()) for use in uses), expected) < 1e-12


class Shared(nn.Module):
    """One attention module in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, E)
        self.attention = perturb(nn.MultiheadAttention(E, HEADS, batch_first=True))
        self.register_buffer("readout", torch.randn(3, E))
        self.to(DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        """(N, SOURCE, 3) -> (N, 3)."""
        h = self.first(x).tanh()
        h = h + self.attention(h, h, h, need_weights=False)[0]
        g = h.tanh()
        h = h + self.attention(g, h, h)[0]
        return (h.tanh().mean(1) @ self.readout.mT).sin()


def test_one_module_used_twice():
    net, x = Shared().eval(), torch.randn(N, SOURCE, 3, dtype=DOUBLE)
    check(net, x)
    uses = uses_by_rule(net, x)["attention.in_proj_weight"]
    assert len(uses) == 3  # packed once, in two parts once
    expected = gram(by_autograd(net, x)["attention.in_proj_weight"])
    assert error(sum(gram(use.dense()) for use in uses), expected) > 1e-2


class Stack(nn.Module):
    """Two transformer layers of one kind, and a readout."""

    def __init__(self, kind: str, norm_first: bool, batch_first: bool = True) -> None:
        super().__init__()
        settings = {"nhead": HEADS, "dim_feedforward": 6, "norm_first": norm_first, "batch_first": batch_first}
        make = nn.TransformerEncoderLayer if kind == "encoder" else nn.TransformerDecoderLayer
        self.first = nn.Linear(3, E)
        self.layers = nn.ModuleList(make(E, **settings) for _ in range(2))
        self.kind, self.batch_first = kind, batch_first
        self.register_buffer("readout", torch.randn(3, E))
        perturb(self).to(DOUBLE)

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        """(N, SOURCE, 3) -> (N, 3)."""
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h = self.first(x).tanh()
        h = h if self.batch_first else h.transpose(0, 1)
        memory = 0.5 * h.cos()
        for layer in self.layers:
            h = layer(h, mask, is_causal=causal) if self.kind == "encoder" else layer(h, memory, mask)
        h = h if self.batch_first else h.transpose(0, 1)
        return (h.tanh().mean(1) @ self.readout.mT).sin()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_transformer_layers(kind, norm_first):
    net = Stack(kind, norm_first).eval()
    check(net, torch.randn(2, SOURCE, 3, dtype=DOUBLE))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_transformer_layers_written_out(kind, norm_first, batch_first):
    net = Stack(kind, norm_first, batch_first).eval()
    x = torch.randn(2, SOURCE, 3, dtype=DOUBLE)
    torch.testing.assert_close(written_out(net)[0](x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_with_padding(norm_first):
    layer = nn.TransformerEncoderLayer(E, HEADS, 6, batch_first=True, norm_first=norm_first, dtype=DOUBLE)
    net = nn.TransformerEncoder(perturb(layer), 2, enable_nested_tensor=False).eval()
    x = torch.randn(N, SOURCE, E, dtype=DOUBLE)
    padding = torch.arange(SOURCE) > torch.tensor([[4], [2], [0]])
    expected = net(x, src_key_padding_mask=padding)
    torch.testing.assert_close(written_out(net)[0](x, src_key_padding_mask=padding), expected, rtol=1e-12, atol=1e-12)


def test_differentiable_in_the_inputs():
    module = perturb(nn.MultiheadAttention(E, HEADS, batch_first=False, add_bias_kv=True))
    net = Attending(module, "key and value", "padding")
    net.norm = nn.Identity()  # torch's third derivative of a layer normalization is wrong
    check_gradient(net, torch.randn(2, SOURCE, 3, dtype=DOUBLE))


@pytest.mark.parametrize("keywords", [{}, {"need_weights": False, "is_causal": True}, {"key_padding_mask": True}])
@pytest.mark.parametrize("arguments", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": E, "vdim": 6}])
def test_any_device(arguments, keywords):
    module = nn.MultiheadAttention(E, HEADS, **arguments, device="meta")
    query, value = torch.empty(SOURCE, N, E, device="meta"), torch.empty(SOURCE, N, module.vdim, device="meta")
    keywords = dict(keywords, attn_mask=torch.empty(SOURCE, SOURCE, device="meta"))
    if "key_padding_mask" in keywords:
        keywords["key_padding_mask"] = torch.empty(N, SOURCE, device="meta")
    assert explicit_form(module)(query, query, value, **keywords)[0].device.type == "meta"


@pytest.mark.parametrize("rows", [slice(0, 3), slice(2, 5), slice(0, 6)])
@pytest.mark.parametrize("positions", [(), (4,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_sliced_linear(bias, positions, rows):
    weight = nn.Parameter(torch.randn(6, 4, dtype=DOUBLE))
    layer = SlicedLinear(weight, nn.Parameter(torch.randn(6, dtype=DOUBLE)) if bias else None, rows, rows)
    found = check_layer(layer, torch.randn(3, *positions, 4, dtype=DOUBLE))
    assert found["weight"].cotangents.shape[-2] == rows.stop - rows.start


@pytest.mark.parametrize("arguments", MAKE.values())
def test_parameters_are_shared(arguments):
    module = nn.MultiheadAttention(E, HEADS, **arguments)
    module.out_proj.weight.requires_grad_(False)
    own = {id(p): p.requires_grad for p in module.parameters()}
    state = torch.get_rng_state()
    explicit = explicit_form(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert {id(p): p.requires_grad for p in explicit.parameters()} == own
    assert module.out_proj not in set(explicit.modules())
    assert module.training


def test_what_is_left_to_the_fallback():
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
            return super().forward(*args, **kwargs)

    class Renamed(nn.MultiheadAttention):
        pass

    assert explicit_form(Own(E, HEADS)) is None
    assert isinstance(explicit_form(Renamed(E, HEADS)), ExplicitAttention)

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    for at in ("in_proj_weight", "out_proj"):
        module = copy.deepcopy(nn.MultiheadAttention(E, HEADS))
        target, name = (module, at) if at == "in_proj_weight" else (module.out_proj, "weight")
        parametrize.register_parametrization(target, name, Double())
        assert explicit_form(module) is None
