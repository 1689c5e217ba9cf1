"""The tangent model of any network against row-by-row autograd on a copy, and what it must leave alone."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntkgp
from ntkgp.linearization.packing import tree_flatten
from tests import reference as ref
from tests.architectures import CASES, linearized

DOUBLE = torch.float64
# A language model with 120 outputs is large; the float32 sections of the other make every product differ in 1e-6.
SLOW = {"hf_gpt2_language_model"}
FLOAT32_INSIDE = {"hf_llama"}
FLOAT32 = (
    "mlp_layer_norm", "mlp_batch_norm", "mlp_rms_norm", "resnet_batch_norm", "unet_group_norm", "weight_norm",
    "transformer_encoder_pre_norm", "dict_inputs", "tied_head", "lstm", "gru", "cosine_classifier",
)  # fmt: skip


def noise(seed: int, *shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / expected.abs().max())


@functools.cache
def deep(outputs: int = 3, dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    with ref.seeded(0):
        return nn.Sequential(
            nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6), nn.BatchNorm1d(6), nn.GELU(),
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs),
        ).to(dtype).eval()  # fmt: skip


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name not in SLOW])
def test_every_product_equals_row_by_row_autograd(name: str) -> None:
    shared = linearized(name)
    case, lin, x, j = shared.case, shared.lin, shared.x, shared.jacobian
    n, c, p = j.shape
    tolerance = 1e-4 if name in FLOAT32_INSIDE else 1e-10
    assert (lin.num_parameters, lin.num_outputs) == (p, c)
    assert torch.equal(lin.theta, ref.theta(case.net))
    assert lin.restore(lin(x)).shape == case.run().shape
    assert error(lin.restore(lin(x)), case.run().detach().to(DOUBLE)) < tolerance
    assert error(lin.jacobian(x), j) < tolerance
    v, u = noise(1, 2, p), noise(2, 2, n, c)
    for inputs in (x, case.example):
        assert error(lin.jvp(inputs, v), torch.einsum("ncp,kp->knc", j, v)) < tolerance
        assert error(lin.vjp(inputs, u), torch.einsum("ncp,knc->kp", j, u)) < tolerance
    assert error(lin.jvp(x, v[0]), j @ v[0]) < tolerance
    assert error(lin.vjp(x, u[0]), torch.einsum("ncp,nc->p", j, u[0])) < tolerance


@pytest.mark.parametrize("name", FLOAT32)
def test_float32_networks(name: str) -> None:
    case = CASES[name]()
    net = copy.deepcopy(case.net).float()
    example = case.example
    if isinstance(example, Tensor) and example.is_floating_point():
        example = example.float()
    j = ref.jacobian(net, example)
    lin = ntkgp.LinearizedNetwork(net, example)
    assert lin.dtype == lin(example).dtype == torch.float32
    v, u = noise(1, lin.num_parameters), noise(2, *j.shape[:2])
    assert error(lin.jacobian(example).double(), j) < 1e-4
    assert error(lin.jvp(example, v).double(), j @ v) < 1e-4
    assert error(lin.vjp(example, u).double(), torch.einsum("ncp,nc->p", j, u)) < 1e-4
    # A float64 matrix, as the models keep it, runs in the network's dtype too.
    assert torch.equal(lin(lin.pack(example).double()), lin(example))


def test_a_half_precision_network_runs() -> None:
    net = copy.deepcopy(deep()).bfloat16()
    lin = ntkgp.LinearizedNetwork(net, noise(0, 5, 4, dtype=torch.bfloat16))
    x = noise(1, 5, 4)
    assert error(lin.jvp(x, lin.theta.double()).double(), ref.jacobian(net, x) @ lin.theta.double()) < 0.1


class Upcast(nn.Module):
    """Weights of several dtypes and an output in another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.second = nn.Linear(6, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).double())


def test_mixed_dtypes() -> None:
    net, x = Upcast(), noise(0, 4, 3).float()
    lin = ntkgp.LinearizedNetwork(net, x)
    j = ref.jacobian(net.double(), x)
    for inputs in (x, x.double()):
        assert error(lin.jacobian(inputs).double(), j) < 1e-5
        assert error(lin.vjp(inputs, noise(1, 4, 2)).double(), torch.einsum("ncp,nc->p", j, noise(1, 4, 2))) < 1e-5
        assert error(lin.jvp(inputs, noise(1, lin.num_parameters)).double(), j @ noise(1, lin.num_parameters)) < 1e-5
        assert error(lin.grams(inputs).sum(0), j.flatten(0, 1) @ j.flatten(0, 1).T) < 1e-5


def test_an_output_per_row_without_event() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = deep(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).squeeze(-1)

    net, x = Flat(), noise(0, 4, 4)
    lin = ntkgp.LinearizedNetwork(net, x)
    assert lin.output_shape == torch.Size([])
    assert lin(x).shape == (4, 1)
    assert torch.equal(lin.restore(lin(x)), net(x).detach())
    assert error(lin.jacobian(x), ref.jacobian(net, x).reshape(4, 1, -1)) < 1e-12


class Aliased(nn.Module):
    """Weights reached through a python list, where torch.func cannot replace them."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, outputs)
        self.norm = nn.LayerNorm(5)
        self.alias = [self.second.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.first(x))) @ self.alias[0].T + self.second.bias


def test_an_alias_of_a_parameter_is_differentiated(caplog: pytest.LogCaptureFixture) -> None:
    net, x = Aliased().double(), noise(0, 4, 4)
    with caplog.at_level(logging.WARNING, "ntkgp"):
        lin = ntkgp.LinearizedNetwork(net, x)
    assert sum("torch.func" in record.message for record in caplog.records) == 1
    j = ref.jacobian(net, x)
    assert error(lin.jacobian(x), j) < 1e-12
    assert error(lin.jvp(x, lin.theta), j @ lin.theta) < 1e-12
    assert error(lin.vjp(x, noise(1, 3, 4, 2)), torch.einsum("ncp,knc->kp", j, noise(1, 3, 4, 2))) < 1e-12
    with torch.no_grad():
        net.second.weight.zero_()
    assert error(lin.jacobian(x), j) < 1e-12


def old_style(wrap) -> nn.Module:
    with ref.seeded(1), pytest.warns(FutureWarning) if wrap is nn.utils.weight_norm else nullcontext():
        first, second = wrap(nn.Linear(4, 6)), wrap(nn.Linear(6, 6))
        return nn.Sequential(first, nn.LayerNorm(6), nn.Tanh(), second, nn.Tanh(), nn.Linear(6, 2)).double()


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_computed_by_hooks(wrap) -> None:
    net, x = old_style(wrap), noise(0, 4, 4)
    net.train()
    net(x)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    lin = ntkgp.LinearizedNetwork(net, x)
    net.eval()
    assert error(lin(x), net(x).detach()) < 1e-12
    expected = _jacobian_by_differences(net, x)
    assert error(lin.jacobian(x), expected) < 1e-6
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def _jacobian_by_differences(net: nn.Module, x: Tensor) -> Tensor:
    """Central differences on the parameters themselves: knows nothing of how the module uses them."""
    columns = []
    with torch.no_grad():
        for p in net.parameters():
            for i in range(p.numel()):
                old = p.view(-1)[i].item()
                values = []
                for step in (1e-6, -1e-6):
                    p.view(-1)[i] = old + step
                    values.append(net(x).detach().clone())
                p.view(-1)[i] = old
                columns.append((values[0] - values[1]) / 2e-6)
    return torch.stack(columns, -1)


class Keeps(nn.Module):
    """Keeps what it computed, counts its calls and assigns a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = copy.deepcopy(deep())
        self.kept: list[Tensor] = []
        self.calls = 0
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.body[:3](x)
        self.kept = [self.hidden]
        self.calls += 1
        self.last = self.hidden
        return self.body(x) + (self.calls > 1)


def test_a_network_that_keeps_state_is_a_function_nonetheless() -> None:
    net, x = Keeps(), noise(0, 4, 4)
    net.calls = -1
    net(x)
    lin = ntkgp.LinearizedNetwork(net, x)
    for _ in range(3):
        assert error(lin.jacobian(x), ref.jacobian(deep(), x)) < 1e-12
        assert torch.equal(lin(x), deep()(x).detach())
    assert error(lin.jvp(x, lin.theta), ref.jacobian(deep(), x) @ lin.theta) < 1e-12
    assert torch.equal(pickle.loads(pickle.dumps(lin)).jacobian(x), lin.jacobian(x))
    assert net.calls == 0
    assert net.hidden.requires_grad


def test_sparse_gradients_of_an_embedding() -> None:
    with ref.seeded(0):
        net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2))
    dense = copy.deepcopy(net).double()
    dense[0].sparse = False
    ids = torch.randint(0, 7, (4, 3))
    lin = ntkgp.LinearizedNetwork(net.double(), ids)
    assert error(lin.jacobian(ids), ref.jacobian(dense, ids)) < 1e-12


# --- inputs and outputs ----------------------------------------------------------------------------------------------


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = deep()

    def forward(self, *, x: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.body(x if shift is None else x + shift), "hidden": x}


class WholeDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = deep()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.body(batch["x"] + batch["shift"])


class Variadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = deep()

    def forward(self, *parts: Tensor) -> Tensor:
        return self.body(torch.cat(parts, -1))


def test_how_inputs_are_passed() -> None:
    x, shift = noise(0, 4, 4), noise(1, 4, 4)
    expected = deep()(x + shift).detach()
    tree = {"x": x, "shift": shift}
    assert error(ntkgp.LinearizedNetwork(KeywordOnly(), tree)(tree), expected) < 1e-14
    assert error(ntkgp.LinearizedNetwork(WholeDict(), tree)(tree), expected) < 1e-14
    parts = (x[:, :1], x[:, 1:])
    assert error(ntkgp.LinearizedNetwork(Variadic(), parts)(parts), deep()(x).detach()) < 1e-14


def test_boolean_and_integer_inputs_reach_the_network_as_they_are() -> None:
    seen = []

    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(9, 4), deep()

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            seen.append((ids.dtype, mask.dtype))
            return self.body((self.embed(ids) * mask.unsqueeze(-1)).sum(1))

    net = Typed().double()
    example = (torch.randint(0, 9, (4, 5), dtype=torch.int32), torch.rand(4, 5) > 0.3)
    lin = ntkgp.LinearizedNetwork(net, example)
    assert error(lin.jacobian(example), ref.jacobian(net, example)) < 1e-12
    assert set(seen) == {(torch.int32, torch.bool)}


def test_a_tuple_output_is_refused_unless_picked() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = deep()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(x), x

    x = noise(0, 4, 4)
    with pytest.raises(TypeError, match=r"net returned a tuple; expected one tensor.*output="):
        ntkgp.LinearizedNetwork(Two(), x)
    lin = ntkgp.LinearizedNetwork(Two(), x, output=lambda out: out[0])
    assert error(lin.jacobian(x), ref.jacobian(deep(), x)) < 1e-12


def test_images_come_back_in_their_shape() -> None:
    case = CASES["unet_group_norm"]()
    lin = ntkgp.LinearizedNetwork(case.net, case.example)
    assert lin.output_shape == case.run().shape[1:]
    assert error(lin.restore(lin(case.example)), case.run().detach()) < 1e-14
    assert torch.equal(lin.unpack(lin.pack(case.example)), case.example)


def test_a_transformers_classifier_with_its_tokenizer_output() -> None:
    transformers = pytest.importorskip("transformers")
    case = CASES["hf_bert"]()
    batch = transformers.BatchEncoding(case.example)
    lin = ntkgp.LinearizedNetwork(case.net, batch)
    j = ref.jacobian(case.net, case.example)
    assert error(lin.jvp(batch, lin.theta), j @ lin.theta) < 1e-10
    assert set(lin.unpack(lin.pack(batch))) == set(case.example)


# --- what is left alone ------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """BatchNorm, dropout, a frozen part, a buffer, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.frozen, self.last = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)
        self.attention = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.1)
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.norm(self.first(x)))) + self.shift
        return self.last(self.attention(self.frozen(h).unsqueeze(1)).squeeze(1))


def _state(net: nn.Module) -> dict[str, object]:
    return {
        "modes": [module.training for module in net.modules()],
        "hooks": [
            {key: dict(value) for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)}
            for module in net.modules()
        ],
        "parameters": [(name, id(p), p.requires_grad, p._version, p.data_ptr()) for name, p in net.named_parameters()],
        "buffers": [(name, id(b), b._version, b.data_ptr()) for name, b in net.named_buffers()],
        "attributes": [{key: id(value) for key, value in vars(module).items()} for module in net.modules()],
    }


def _globals() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"),
    )  # fmt: skip


def _use(lin: ntkgp.LinearizedNetwork, x: Tensor) -> None:
    for inputs in (x, x.clone().requires_grad_()):
        lin(inputs), lin.jvp(inputs, lin.theta), lin.vjp(inputs, lin(x)), lin.jacobian(inputs)
        lin.grams(inputs), lin.gram_diagonals(inputs), lin.groups.verify(x), lin.factors(x)
    repr(lin), repr(lin.groups), lin.groups.is_normalized


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_nothing_of_the_user_changes(mode: bool, grad: bool) -> None:
    with ref.seeded(0):
        net = Everything()
    net.train(mode)
    net.drop.train(not mode)
    calls = []
    net.norm.register_forward_hook(lambda *args: calls.append(1))
    net.first.register_forward_pre_hook(lambda *args: None)
    net.last.register_full_backward_hook(lambda *args: None)
    net.first.weight.grad = torch.ones_like(net.first.weight)
    grads = {name: p.grad for name, p in net.named_parameters()}
    values = {name: value.clone() for name, value in net.state_dict().items()}
    x = noise(0, 5, 4).float()
    kept = x.clone()
    with torch.set_grad_enabled(grad):
        before, outside, random = _state(net), _globals(), torch.get_rng_state()
        _use(ntkgp.LinearizedNetwork(net, x), x)
        assert torch.equal(random, torch.get_rng_state())
        assert _globals() == outside
        assert _state(net) == before
    assert all(torch.equal(values[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is grads[name] for name, p in net.named_parameters())
    assert torch.equal(net.first.weight.grad, torch.ones_like(net.first.weight))
    assert torch.equal(x, kept)
    assert x.grad is None


def test_global_state_is_put_back_after_an_error() -> None:
    outside, random = _globals(), torch.get_rng_state()

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = deep()

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(1)
            if x.shape[0] == 3:
                raise RuntimeError("three")
            return self.body(x)

    lin = ntkgp.LinearizedNetwork(Fails(), noise(0, 4, 4))
    with pytest.raises(RuntimeError, match="three"):
        lin(noise(0, 3, 4))
    assert _globals() == outside
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("make", [lambda: copy.deepcopy(deep()), lambda: Aliased().double()])
def test_later_changes_of_the_network_do_not_reach_it(make) -> None:
    net, x = make(), noise(0, 4, 4)
    lin = ntkgp.LinearizedNetwork(net, x)
    theta, f, j = lin.theta.clone(), lin(x), lin.jacobian(x)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
        for b in net.buffers():
            b.add_(1)
    net.train()
    assert torch.equal(lin.theta, theta)
    assert torch.equal(lin(x), f)
    assert torch.equal(lin.jacobian(x), j)


def test_results_are_the_callers_own() -> None:
    lin = ntkgp.LinearizedNetwork(deep(), noise(0, 4, 4))
    theta = lin.theta.clone()
    lin.theta.zero_()
    assert torch.equal(lin.theta, theta)


def test_a_network_in_train_mode_is_linearised_in_evaluation_mode() -> None:
    with ref.seeded(0):
        net = Everything().double().train()
    x = noise(0, 5, 4)
    assert error(ntkgp.LinearizedNetwork(net, x).jacobian(x), ref.jacobian(net, x)) < 1e-10


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("make", [lambda: copy.deepcopy(deep()), lambda: Aliased(3).double()])
def test_copies(how: str, make) -> None:
    x = noise(0, 4, 4)
    lin = ntkgp.LinearizedNetwork(make(), x)
    other = pickle.loads(pickle.dumps(lin)) if how == "pickle" else copy.deepcopy(lin)
    assert torch.equal(other(x), lin(x))
    assert torch.equal(other.grams(x), lin.grams(x))
    assert other.groups.names == lin.groups.names
    assert other.groups.is_normalized == lin.groups.is_normalized
    assert torch.equal(other.groups.verify(x), lin.groups.verify(x))


def test_autocast_and_inference_mode_outside() -> None:
    x = noise(0, 4, 4).float()
    lin = ntkgp.LinearizedNetwork(deep(3, torch.float32), x)
    expected = lin.jacobian(x)
    with torch.no_grad():
        assert torch.equal(lin.jacobian(x), expected)
        assert torch.equal(lin.jvp(x, lin.theta), (lambda: lin.jvp(x, lin.theta))())


# --- derivatives with respect to the inputs ----------------------------------------------------------------------


def _functions(lin: ntkgp.LinearizedNetwork, z: Tensor) -> dict[str, object]:
    c, p, g, n = lin.num_outputs, lin.num_parameters, len(lin.groups), len(z)
    rows = lin.factors(z)
    variance = noise(20, g).exp()
    return {
        "f": lambda x: (lin(x) * noise(10, n, c)).sum(),
        "jvp": lambda x: (lin.jvp(x, noise(11, 2, p)) * noise(12, 2, n, c)).sum(),
        "vjp": lambda x: (lin.vjp(x, noise(13, 2, n, c)) * noise(14, 2, p)).sum(),
        "jacobian": lambda x: (lin.jacobian(x) * noise(15, n, c, p)).sum(),
        "grams": lambda x: (lin.grams(x) * noise(16, g, n * c, n * c)).sum(),
        "cross grams": lambda x: (lin.grams(z, x) * noise(17, g, n * c, n * c)).sum(),
        "diagonals": lambda x: (lin.gram_diagonals(x) * noise(18, g, n, c, c)).sum(),
        "weighted": lambda x: (lin.weighted_gram(x, z, variance) * noise(19, n * c, n * c)).sum(),
        "weighted, kept rows": lambda x: (lin.weighted_gram(x, rows, variance) * noise(21, n * c, n * c)).sum(),
    }


GRADIENT_CASES = {
    **{
        name: CASES[name]
        for name in (
            "mlp_layer_norm", "mlp_rms_norm", "mlp_batch_norm", "cnn_instance_norm", "cnn_group_norm", "weight_norm",
            "cosine_classifier", "tuple_inputs", "transformer_encoder_pre_norm", "preactivation_resnet",
        )
        if all(leaf.is_floating_point() for leaf in tree_flatten(CASES[name]().example)[0])
    },
    "alias": lambda: type("Case", (), {"net": Aliased().double(), "example": noise(0, 4, 4)}),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_derivatives_in_the_inputs(name: str) -> None:
    case = GRADIENT_CASES[name]()
    lin = ntkgp.LinearizedNetwork(case.net, case.example)
    x = lin.pack(case.example)[:2].detach().to(DOUBLE)
    x = x + 0.1 * noise(1, *x.shape)
    direction, h = noise(2, *x.shape), 1e-4
    for label, function in _functions(lin, 0.7 * x.flip(0)).items():
        leaf = x.clone().requires_grad_()
        slope = float((torch.autograd.grad(function(leaf), leaf)[0] * direction).sum())
        d1, d2 = (float(function(x + s * direction) - function(x - s * direction)) / (2 * s) for s in (h, 2 * h))
        assert slope == pytest.approx((4 * d1 - d2) / 3, rel=1e-6), label


def test_a_recurrent_network_is_differentiable_in_its_inputs() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0][:, -1])

    with ref.seeded(0):
        net = Recurrent().double()
    test_case = noise(0, 3, 4, 2)
    lin = ntkgp.LinearizedNetwork(net, test_case)
    leaf = lin.pack(test_case).clone().requires_grad_()
    slope = torch.autograd.grad(lin.gram_diagonals(leaf).square().sum(), leaf)[0]
    direction, h = noise(2, *leaf.shape), 1e-5
    value = lambda s: lin.gram_diagonals(leaf.detach() + s * direction).square().sum()  # noqa: E731
    assert float((slope * direction).sum()) == pytest.approx(float(value(h) - value(-h)) / (2 * h), rel=1e-6)


def test_results_carry_a_graph_only_where_asked() -> None:
    lin, x = ntkgp.LinearizedNetwork(deep(), noise(0, 4, 4)), noise(0, 4, 4)
    leaf = x.clone().requires_grad_()
    for function in _functions(lin, x).values():
        assert not function(x).requires_grad
        assert function(leaf).requires_grad
        with torch.no_grad():
            assert not function(leaf).requires_grad
    u = lin(x).requires_grad_()
    pulled = lin.vjp(x, u)
    assert torch.allclose(torch.autograd.grad(pulled @ lin.theta, u)[0], lin.jvp(x, lin.theta))


# --- chunks, logs, errors ----------------------------------------------------------------------------------------


def test_chunked_passes_give_the_same() -> None:
    net, x = deep(), noise(0, 13, 4)
    whole = ntkgp.LinearizedNetwork(net, x)
    v, u = noise(1, 3, whole.num_parameters), noise(2, 3, 13, 3)
    for rows in (1, 2, 5, 12):
        part = ntkgp.LinearizedNetwork(net, x, max_memory=3 * rows * whole.activation_bytes)
        assert error(part(x), whole(x)) < 1e-12
        assert error(part.jvp(x, v), whole.jvp(x, v)) < 1e-12
        assert error(part.vjp(x, u), whole.vjp(x, u)) < 1e-12
        leaf = x.clone().requires_grad_()
        slope = torch.autograd.grad(part.jvp(leaf, v).square().sum(), leaf)[0]
        leaf = x.clone().requires_grad_()
        assert error(slope, torch.autograd.grad(whole.jvp(leaf, v).square().sum(), leaf)[0]) < 1e-12


def test_a_budget_too_small_names_the_smallest_that_works() -> None:
    net, x = deep(), noise(0, 5, 4)
    lin = ntkgp.LinearizedNetwork(net, x, max_memory=10)
    for call in (lambda lin: lin(x), lambda lin: lin.jvp(x, lin.theta), lambda lin: lin.vjp(x, noise(0, 5, 3))):
        with pytest.raises(ValueError, match=r"max_memory: 10 B is too small.*smallest possible is (.*)") as caught:
            call(lin)
        smallest = str(caught.value).rpartition("is ")[2]
        call(ntkgp.LinearizedNetwork(net, x, max_memory=smallest))
    with pytest.raises(ValueError, match="max_memory"):
        ntkgp.LinearizedNetwork(net, x, max_memory="much")


def test_the_fallback_of_jvp_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["lstm"]()
    net = copy.deepcopy(case.net).float()
    with caplog.at_level(logging.WARNING, "ntkgp"):
        lin = ntkgp.LinearizedNetwork(net, case.example)
        for _ in range(3):
            lin.jvp(case.example, lin.theta)
    said = [record.message for record in caplog.records if "double vjp" in record.message]
    assert len(said) == (0 if lin.frozen.forward_mode else 1)
    assert error(lin.jvp(case.example, lin.theta).double(), ref.jacobian(net, case.example) @ lin.theta.double()) < 1e-4


def test_the_double_vjp_is_right_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ntkgp.linearization import frozen

    def missing(*args: object) -> None:
        raise NotImplementedError("no forward mode")

    monkeypatch.setattr(frozen, "jvp", missing)
    x = noise(0, 4, 4)
    with caplog.at_level(logging.WARNING, "ntkgp"):
        lin = ntkgp.LinearizedNetwork(deep(), x)
        found = lin.jvp(x, noise(1, 2, lin.num_parameters))
    assert sum("double vjp" in record.message for record in caplog.records) == 1
    assert error(found, torch.einsum("ncp,kp->knc", ref.jacobian(deep(), x), noise(1, 2, lin.num_parameters))) < 1e-12


@pytest.mark.parametrize("rows", [0, 1])
def test_no_vectors(rows: int) -> None:
    lin, x = ntkgp.LinearizedNetwork(deep(), noise(0, 4, 4)), noise(0, 4, 4)
    assert lin.jvp(x, noise(0, rows, lin.num_parameters)).shape == (rows, 4, 3)
    assert lin.vjp(x, noise(0, rows, 4, 3)).shape == (rows, lin.num_parameters)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda lin, x: lin.jvp(x, torch.ones(3)), r"v: expected shape \(\d+,\) or \(K, \d+\), got \(3,\)"),
        (lambda lin, x: lin.jvp(x, torch.ones(1, 1, lin.num_parameters)), "v: expected shape"),
        (lambda lin, x: lin.vjp(x, torch.ones(4, 2)), r"u: expected shape \(4, 3\) or \(K, 4, 3\), got \(4, 2\)"),
        (lambda lin, x: lin.vjp(x, torch.ones(5, 3)), "u: expected shape"),
        (lambda lin, x: lin.jvp(x, [1.0]), "v: expected shape .* got list"),
        (lambda lin, x: lin(torch.ones(4, 5)), "inputs: expected"),
        (lambda lin, x: lin.jvp(torch.full((4, 4), float("inf")), lin.theta), "inputs: NaN or infinite"),
    ],
)
def test_bad_arguments(call, words: str) -> None:
    x = noise(0, 4, 4)
    with pytest.raises(ValueError, match=words):
        call(ntkgp.LinearizedNetwork(deep(), x), x)


class Mean(nn.Module):
    """An output that depends on the other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = deep()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y - y.mean(0)


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = deep()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.body(x), 0.5, training=True)


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.body, self.make = deep(), make

    def forward(self, x: Tensor) -> object:
        return self.make(self.body(x))


def _spoiled(value: float) -> nn.Module:
    net = copy.deepcopy(deep())
    with torch.no_grad():
        net[3].weight[0, 0] = value
    return net


BAD_NETWORKS = {
    "rows": (Mean, ValueError, "net: its output for a row depends on the other rows"),
    "random": (Random, ValueError, "or is random"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double(), ValueError,
        "not on one .* BatchNorm must keep running statistics",
    ),
    "no trainable": (
        lambda: copy.deepcopy(deep()).requires_grad_(False), ValueError, "net has no trainable parameter",
    ),
    "no parameter": (nn.Tanh, ValueError, "net has no trainable parameter"),
    "nan": (lambda: _spoiled(float("nan")), ValueError, "net: parameter '3.weight' holds NaN"),
    "inf": (lambda: _spoiled(float("inf")), ValueError, "net: parameter '3.weight' holds NaN or infinite"),
    "nan output": (lambda: Returns(lambda y: y / 0 * 0), ValueError, "net: its outputs on the example are NaN"),
    "integer output": (lambda: Returns(lambda y: y.argmax(-1)), TypeError, "net returned a torch.int64 tensor"),
    "complex output": (lambda: Returns(lambda y: y + 1j), TypeError, "net returned a torch.complex128"),
    "list output": (lambda: Returns(lambda y: [y]), TypeError, "net returned a list"),
    "none": (lambda: Returns(lambda y: None), TypeError, "net returned a NoneType"),
    "scalar output": (lambda: Returns(lambda y: y.sum()), ValueError, r"net: expected an output with N = \d rows"),
    "other rows": (lambda: Returns(lambda y: y.repeat(2, 1)), ValueError, r"net: expected an output with N = \d rows"),
    "empty output": (lambda: Returns(lambda y: y[:, :0]), ValueError, "net: expected at least one output per row"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, "net has uninitialised"),
    "complex": (
        lambda: nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64)), TypeError, "net: parameter '0.weight' is",
    ),
    "no module": (lambda: torch.tanh, TypeError, "net: expected a torch.nn.Module, got"),
}  # fmt: skip


# One row is tried as two; two copies of one row are then just what two rows look like.
@pytest.mark.parametrize(
    ("name", "rows"), [(name, rows) for name in BAD_NETWORKS for rows in (1, 4) if (name, rows) != ("other rows", 1)]
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_bad_networks(name: str, rows: int) -> None:
    make, kind, words = BAD_NETWORKS[name]
    with pytest.raises(kind, match=words):
        ntkgp.LinearizedNetwork(make(), noise(0, rows, 4))


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (torch.full((2, 4), float("nan")), "example: NaN or infinite"),
        (torch.ones(0, 4), "example has N = 0 rows"),
        ([], "example holds no tensor"),
    ],
)
def test_bad_examples(example, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ntkgp.LinearizedNetwork(deep(), example)


def test_unknown_groups() -> None:
    with pytest.raises(ValueError, match=r"groups: expected one of .* got 'blocks'"):
        ntkgp.LinearizedNetwork(deep(), noise(0, 2, 4), groups="blocks")
