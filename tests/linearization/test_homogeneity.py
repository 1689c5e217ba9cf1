from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntkgp.linearization.degrees import UntraceableError, propagate
from ntkgp.linearization.homogeneity import exact_statistics, find_normalized
from ntkgp.linearization.tracing import trace
from tests.architectures import CASES, NORMALIZED, Case, Residual, SwiGLU


def discover(run: Callable[[], Tensor], net: nn.Module) -> list[tuple[str, ...]]:
    parameters = dict(net.named_parameters())
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    return [group.names for group in find_normalized(run, parameters, trainable)]


def sets(groups: Collection[Collection[str]]) -> set[frozenset[str]]:
    return {frozenset(group) for group in groups}


def scaled_output(case: Case, factors: dict[str, float]) -> Tensor:
    """Output on batch statistics of a copy with some parameters multiplied."""
    net = copy.deepcopy(case.net)
    with torch.no_grad(), exact_statistics():
        for name, parameter in net.named_parameters():
            parameter *= factors.get(name, 1.0)
        return case.run(net)


def relative_change(case: Case, names: Collection[str], factor: float) -> float:
    reference = scaled_output(case, {})
    changed = scaled_output(case, dict.fromkeys(names, factor))
    return float((changed - reference).abs().max() / reference.abs().max())


# --------------------------------------------------------------------------------------------------------- the zoo


@pytest.mark.parametrize("name", CASES)
def test_finds_the_groups_written_by_hand(name: str) -> None:
    case = CASES[name]()
    found = discover(case.run, case.net)
    assert sets(found) == sets(case.groups)
    order = [name for name, _ in case.net.named_parameters()]
    assert all(list(group) == sorted(group, key=order.index) for group in found)
    assert found == sorted(found, key=lambda group: order.index(group[0]))


@pytest.mark.parametrize("name", ["mlp_bare_parameters", "cnn_instance_norm", "transformer_qk_norm", "unet_group_norm"])
def test_finds_the_same_in_inference_mode_and_float32(name: str) -> None:
    case = CASES[name]()
    case.net.float()
    case.example = case.example.float() if case.example.is_floating_point() else case.example
    with torch.inference_mode():
        assert sets(discover(case.run, case.net)) == sets(case.groups)


def test_the_zoo_is_wide() -> None:
    cases = [build() for build in CASES.values()]
    assert len(cases) >= 27
    assert sum(not case.groups for case in cases) >= 6
    assert max(sum(p.numel() for p in case.net.parameters()) for case in cases) < 30_000


@pytest.mark.parametrize("name", NORMALIZED)
def test_a6_scaling_a_group_leaves_the_output(name: str) -> None:
    case = CASES[name]()
    for group in case.groups:
        for factor in (0.5, 3.0):
            assert relative_change(case, group, factor) <= case.tolerance, (group, factor)


@pytest.mark.parametrize("name", NORMALIZED)
def test_a6_euler_identity(name: str) -> None:
    case = CASES[name]()
    parameters = dict(case.net.named_parameters())
    with exact_statistics():
        output = case.run().flatten()
    for group in case.groups:
        members = [parameters[n] for n in group]
        theta = torch.cat([p.detach().flatten() for p in members])
        rows = []
        for entry in output[:: max(1, len(output) // 12)]:
            pulled = torch.autograd.grad(entry, members, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                                   for p, g in zip(members, pulled, strict=True)]))  # fmt: skip
        jacobian = torch.stack(rows)
        assert jacobian.norm() > 0
        assert (jacobian @ theta).norm() <= case.tolerance * jacobian.norm() * theta.norm(), group


@pytest.mark.parametrize("name", CASES)
def test_a6n_nothing_left_in_the_rest_is_scale_free(name: str) -> None:
    """No trainable matrix outside the groups can be scaled, alone or with the bias beside it."""
    case = CASES[name]()
    parameters = dict(case.net.named_parameters())
    grouped = set().union(*case.groups)
    for key, parameter in parameters.items():
        if key in grouped or not parameter.requires_grad or parameter.ndim < 2:
            continue
        bias = f"{key.removesuffix('weight')}bias"
        has_bias = bias in parameters and parameters[bias].requires_grad
        for names in [(key,), (key, bias)] if has_bias else [(key,)]:
            assert relative_change(case, names, 3.0) > max(1e-6, 10 * case.tolerance), names


@pytest.mark.parametrize("name", ["mlp_batch_norm", "cnn_batch_norm", "resnet_batch_norm"])
def test_a6n_frozen_statistics_break_the_identity(name: str) -> None:
    case = CASES[name]()
    with torch.no_grad():
        reference = case.run()
        for parameter, value in case.net.named_parameters():
            if parameter in case.groups[0]:
                value *= 3.0
        assert (case.run() - reference).abs().max() > 1e-2 * reference.abs().max()


@pytest.mark.parametrize("name", ["mlp_batch_norm", "transformer_encoder_pre_norm", "spectral_norm", "mlp_dropout"])
def test_leaves_the_network_and_torch_alone(name: str) -> None:
    case = CASES[name]()
    case.net.train(name == "mlp_dropout")
    before = copy.deepcopy(case.net.state_dict())
    identities = [id(p) for p in case.net.parameters()]
    rng, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    discover(case.run, case.net)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert [id(p) for p in case.net.parameters()] == identities
    after = case.net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert case.net.training is (name == "mlp_dropout")
    assert all(p.grad is None for p in case.net.parameters())


# ------------------------------------------------------------------------------------------- single computations


class Wrapped(nn.Module):
    """f(x) = head(LayerNorm(g(x Wᵀ))): W is scale-free exactly when g is homogeneous."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.head = nn.Linear(3, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(self.function(self.first(x)), (6,)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _inplace_slices(h: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    a.tanh_()
    return torch.cat([b, b], 1)


def _inplace_through_alias(h: Tensor) -> Tensor:
    h = h.clone()
    h.view(-1)[:3].tanh_()
    return h


def _inplace_transposed(h: Tensor) -> Tensor:
    h = h.clone()
    h.t().tanh_()
    return h


def _filled_buffer(h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    out[:, :2] = h[:, 1:3]
    out[:, 2:].zero_()
    out.select(1, 4).copy_(h[:, 0])
    out[:, 5:].fill_(0.0)
    return out


def _constant_in_buffer(h: Tensor) -> Tensor:
    out = h.clone()
    out[:, 0] = 1.0
    return out


HOMOGENEOUS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "neg": (torch.neg, 1), "abs": (torch.abs, 1), "relu": (F.relu, 1), "leaky_relu": (F.leaky_relu, 1),
    "prelu": (lambda h: F.prelu(h, torch.tensor([0.3], dtype=h.dtype)), 1), "clamp": (lambda h: h.clamp(min=0), 1),
    "clamp_max": (lambda h: h.clamp_max(0.0), 1), "scalar": (lambda h: 3 * h / 2, 1),
    "tensor": (lambda h: h * torch.arange(1.0, 7.0), 1), "square": (torch.square, 2), "cube": (lambda h: h**3, 3),
    "product": (lambda h: h * h.abs().sqrt(), 1.5), "ratio": (lambda h: h**2 / h.abs().sum(1, keepdim=True), 1),
    "inverse": (lambda h: h / h.abs().square(), -1), "rsqrt": (lambda h: h.abs().rsqrt(), -0.5),
    "reciprocal": (lambda h: h.reciprocal(), -1), "cbrt": (lambda h: h.abs() ** (1 / 3), 1 / 3),
    "std": (lambda h: h.std(0, keepdim=True) + h, 1), "var": (lambda h: h.var(0, keepdim=True) * h, 3),
    "var_mean": (lambda h: sum(v * m for v, m in [torch.var_mean(h, 0, keepdim=True)]) + 0 * h, 3),
    "std_mean": (lambda h: sum(torch.std_mean(h, 0, keepdim=True)) + h, 1),
    "norm": (lambda h: h.norm(dim=1, keepdim=True) - h, 1), "norm1": (lambda h: h + torch.linalg.vector_norm(h, 1), 1),
    "norm_inf": (lambda h: h + torch.linalg.vector_norm(h, math.inf), 1), "sum": (lambda h: h + h.sum(), 1),
    "amax": (lambda h: h - h.amax(1, keepdim=True), 1), "max": (lambda h: h + h.max(1, keepdim=True).values, 1),
    "median": (lambda h: h + h.median(1, keepdim=True).values, 1), "cumsum": (lambda h: h.cumsum(1), 1),
    "cummax": (lambda h: h.cummax(1).values, 1), "sort": (lambda h: h.sort(1).values, 1),
    "topk": (lambda h: h.topk(6, 1).values, 1), "kthvalue": (lambda h: h + h.kthvalue(2, 1, True).values, 1),
    "flip": (lambda h: h.flip(1), 1), "roll": (lambda h: h.roll(1, 1), 1), "tril": (torch.tril, 1),
    "permute": (lambda h: h.t().contiguous().t(), 1), "repeat": (lambda h: h.repeat(1, 2)[:, ::2], 1),
    "stack": (lambda h: torch.stack([h, -h]).sum(0) + torch.stack([h, h])[0], 1),
    "pad": (lambda h: F.pad(h, (1, 1))[:, :6], 1), "pad_inf": (lambda h: F.pad(h, (1, 0), value=-math.inf)[:, 1:], 1),
    "reflect": (lambda h: F.pad(h[None], (1, 1), "reflect")[0, :, 2:], 1),
    "replicate": (lambda h: F.pad(h[None], (1, 1), "replicate")[0, :, 2:], 1),
    "max_pool1d": (lambda h: F.max_pool1d(h[None], 3, 1, 1)[0], 1),
    "avg_pool1d": (lambda h: F.avg_pool1d(h[None], 3, 1, 1)[0], 1),
    "adaptive": (lambda h: F.adaptive_avg_pool1d(h[None], 6)[0] + F.adaptive_max_pool1d(h[None], 6)[0], 1),
    "max_pool2d": (lambda h: F.max_pool2d(h[None, None], 3, 1, 1)[0, 0], 1),
    "max_pool3d": (lambda h: F.max_pool3d(h[None, None, None], 3, 1, 1)[0, 0, 0], 1),
    "avg_pool3d": (lambda h: F.avg_pool3d(h[None, None, None], (1, 3, 3), 1, (0, 1, 1))[0, 0, 0], 1),
    "nearest": (lambda h: F.interpolate(h[None], 12)[0, :, ::2], 1),
    "linear": (lambda h: F.interpolate(h[None], 12, mode="linear")[0, :, ::2], 1),
    "bicubic": (lambda h: F.interpolate(h[None, None], (12, 12), mode="bicubic")[0, 0, ::2, ::2], 1),
    "grid_sample": (lambda h: F.grid_sample(h[None, None], torch.linspace(-1, 1, 72, dtype=h.dtype).view(1, 6, 6, 2),
                                            align_corners=True)[0, 0], 1),
    "pixel_shuffle": (lambda h: F.pixel_shuffle(h.view(4, 3, 3), 2).view(6, 6), 1),
    "unfold": (lambda h: F.unfold(h[None, None], 2)[0, :, :6].T[:, [0, 1, 2, 3, 0, 1]], 1),
    "fold": (lambda h: F.fold(F.unfold(h[None, None], 2), (6, 6), 2)[0, 0], 1),
    "index": (lambda h: h[:, torch.tensor([5, 4, 3, 2, 1, 0])], 1), "gather": (lambda h: h.gather(1, h.argsort(1)), 1),
    "index_select": (lambda h: h.index_select(1, torch.arange(6)), 1),
    "take": (lambda h: h.take_along_dim(h.argmax(1, True), 1) + h, 1),
    "scatter": (lambda h: h.scatter(1, torch.zeros(6, 1, dtype=torch.long), h[:, 1:2]), 1),
    "scatter_zero": (lambda h: h.scatter(1, torch.zeros(6, 1, dtype=torch.long), 0.0), 1),
    "scatter_add": (lambda h: torch.zeros_like(h).scatter_add(1, torch.arange(6).expand(6, 6), h), 1),
    "index_add": (lambda h: h.index_add(1, torch.tensor([1]), h[:, :1]), 1),
    "index_put": (lambda h: h.index_put((torch.tensor([0]), torch.tensor([1])), h[1, 1]), 1),
    "masked_fill": (lambda h: h.masked_fill(h < 0, 0.0), 1), "where": (lambda h: torch.where(h > 0, h, 0.0), 1),
    "where_two": (lambda h: torch.where(h > h.flip(1), h, -h), 1),
    "maximum": (lambda h: torch.maximum(h, h.flip(1)), 1),
    "minimum": (lambda h: torch.min(h, h.flip(1)), 1), "lerp": (lambda h: torch.lerp(h, h.flip(1), 0.3), 1),
    "sign": (lambda h: h.sign() * h, 1), "mask": (lambda h: (h > 0) * h, 1), "cast": (lambda h: h.float().double(), 1),
    "addcmul": (lambda h: torch.addcmul(h * h, h, h), 2),
    "addcdiv": (lambda h: torch.addcdiv(h / h.abs(), h, h.abs()), 0),
    "einsum": (lambda h: torch.einsum("ni,nj,n->nj", h, h, h[:, 0]), 3),
    "bmm": (lambda h: torch.bmm(h[None], h[None])[0], 2),
    "mv": (lambda h: torch.mv(h, h[0]) + (0 * h * h), 2), "outer": (lambda h: torch.outer(h[0], h[1]), 2),
    "dot": (lambda h: torch.dot(h[0], h[1]) * h, 3),
    "baddbmm": (lambda h: torch.baddbmm(h[None] * h, h[None], h[None])[0], 2),
    "cross": (lambda h: torch.linalg.cross(h.view(12, 3), h.view(12, 3).flip(0)).view(6, 6), 2),
    "cosine": (lambda h: F.cosine_similarity(h[:, None], h[None], dim=-1), 0), "normalise": (F.normalize, 0),
    "l1_normalise": (lambda h: F.normalize(h, p=1.0), 0),
    "complex": (lambda h: torch.fft.rfft(h)[:, :3].abs().repeat(1, 2), 1),
    "weights_only": (lambda h: h * 2 + h.detach(), 1), "data": (lambda h: h.data * 2, 1),
    "zeros": (lambda h: h + torch.zeros(6, 6) + h.new_zeros(6), 1), "inplace_slices": (_inplace_slices, 1),
    "filled_buffer": (_filled_buffer, 1), "inplace": (lambda h: h.clone().mul_(2).add_(h).relu_().div_(3), 1),
    "control": (lambda h: h * 2 if bool(h[0, 0] > 0) else h, 1), "dropout": (lambda h: F.dropout(h, 0.5, False), 1),
    "split": (lambda h: torch.cat(h.split([2, 4], 1)[::-1], 1), 1),
    "unbind": (lambda h: torch.stack(h.unbind(1), 1), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_degree_of_an_operation(name: str, x: Tensor) -> None:
    """The table's degree is numerically right, and the trace says the same."""
    function, degree = HOMOGENEOUS[name]
    weight = nn.Parameter(torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    with torch.no_grad():
        reference = function(x @ weight)
        assert reference.shape == (6, 6)
        torch.testing.assert_close(function(x @ (2.0 * weight)), 2.0**degree * reference, rtol=1e-10, atol=1e-10)
    # A factor of degree four more tells "degree 1" from "refused": the only relation is that of the output.
    rows = propagate(trace(lambda: function(x @ weight) * weight.sum() ** 4, {"w": weight})).rows
    assert [{key: float(value) for key, value in row.items()} for row in rows] == [
        {0: pytest.approx(degree + 4, abs=1e-6)}
    ]


def _item_scaled(h: Tensor) -> Tensor:
    return h * 2 if h[0, 0].item() > 0.1 else h


NOT_HOMOGENEOUS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu, "elu": F.elu, "relu6": F.relu6, "softplus": F.softplus,
    "softmax": lambda h: h.softmax(1), "exp": torch.exp, "glu": lambda h: F.glu(h.repeat(1, 2)),
    "softsign": F.softsign, "shift": lambda h: h + 0.1, "eps_without_root": lambda h: h.abs() + 1e-6,
    "eps_on_signed": lambda h: h / (h + 1e-6), "root_of_large": lambda h: h / (h.square() + 0.1).sqrt(),
    "clamp": lambda h: h.clamp(-0.5, 0.5), "clamp_min": lambda h: h.clamp_min(0.1),
    "threshold": lambda h: h.clamp_min(-1e-6),
    "compare": lambda h: h * (h > 0.1), "round": torch.round,
    "floor": lambda h: torch.div(h, 0.3, rounding_mode="floor"),
    "to_integer": lambda h: h * h.long(), "item": _item_scaled, "tolist": lambda h: h * float(h[0, 0]),
    "maximum": lambda h: torch.max(h, torch.full_like(h, 0.1)), "where": lambda h: torch.where(h > 0, h, 0.1),
    "masked_fill": lambda h: h.masked_fill(h > 0, 0.1), "pad": lambda h: F.pad(h, (1, 0), value=0.1)[:, :6],
    "constant_in_buffer": _constant_in_buffer, "inplace_through_alias": _inplace_through_alias,
    "inplace_transposed": _inplace_transposed, "sum_of_degrees": lambda h: h + h.square(),
    "cat_of_degrees": lambda h: torch.cat([h[:, :3], h[:, 3:].square()], 1),
    "norm0": lambda h: h + torch.linalg.vector_norm(h, 0),
    "scatter_multiply": lambda h: h.scatter(1, torch.zeros(6, 1, dtype=torch.long), h[:, :1], reduce="multiply"),
    "scatter_reduce": lambda h: h.scatter_reduce(1, torch.zeros(6, 1, dtype=torch.long), h[:, :1], "prod"),
    "logsumexp": lambda h: h - h.logsumexp(1, keepdim=True), "prod": lambda h: h + h.prod(1, keepdim=True),
    "cumprod": lambda h: h.cumprod(1), "cdist": lambda h: torch.cdist(h, h, p=0.0) + h, "power": lambda h: 2.0**h,
    "power_tensor": lambda h: h.abs() ** h, "sin": torch.sin, "grid": lambda h: F.grid_sample(
        h[None, None], h.tanh().repeat(2, 1).view(1, 6, 6, 2), align_corners=True)[0, 0],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter")
@pytest.mark.parametrize("name", NOT_HOMOGENEOUS)
def test_refuses_what_is_not_homogeneous(name: str, x: Tensor) -> None:
    net = Wrapped(NOT_HOMOGENEOUS[name]).double()
    assert discover(lambda: net(x), net) == []


@pytest.mark.parametrize("name", [name for name, (_, degree) in HOMOGENEOUS.items() if degree])
def test_accepts_what_is_homogeneous(name: str, x: Tensor) -> None:
    net = Wrapped(HOMOGENEOUS[name][0]).double()
    assert discover(lambda: net(x), net) == [("first.weight",)]


def test_memory_that_is_never_seen_written_is_refused(x: Tensor) -> None:
    net = Wrapped(lambda h: torch.empty_like(h) * h).double()
    parameters = dict(net.named_parameters())
    with pytest.raises(UntraceableError):
        propagate(trace(lambda: net(x), parameters))
    assert discover(lambda: net(x), net) == []


def test_affine_parameters_of_hand_written_norms_stay_out(x: Tensor) -> None:
    """γ alone would be scale-free between two norms: it acts on a normaliser's output, so it is rest."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.ParameterList(torch.randn(width) for width in (3, 6))
            self.layers = nn.ModuleList([nn.Linear(3, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)])

        def forward(self, h: Tensor) -> Tensor:
            for gamma, layer in zip(self.gamma, self.layers, strict=False):
                h = layer(gamma * (h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-12)))
            return self.layers[2](F.layer_norm(h, (6,)))

    net = Net().double()
    assert discover(lambda: net(x), net) == [("layers.0.weight",), ("layers.1.weight",)]


@pytest.mark.parametrize("channels_first", [True, False])
def test_a_bias_is_subtracted_only_along_its_own_channels(channels_first: bool, x: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.norm = nn.BatchNorm1d(6).eval()

        def forward(self, h: Tensor) -> Tensor:
            positions = torch.arange(1.0, 7.0, dtype=h.dtype)[:, None]
            h = self.second(self.first(h[:, None] * positions).relu())
            return self.head(self.norm(h.transpose(1, 2) if channels_first else h).relu().mean(1))

    net = Net().double()
    expected = [("first.weight", "first.bias")] if channels_first else []
    assert discover(lambda: net(x), net) == [*expected, ("second.weight", "second.bias")]
    change = relative_change(Case(net, x), ("first.weight", "first.bias"), 3.0)
    assert change < 1e-12 if channels_first else change > 1e-3


def test_length_of_a_weight_normalised_layer_scales_with_its_bias(x: Tensor) -> None:
    wrap = nn.utils.parametrizations.weight_norm
    net = nn.Sequential(wrap(nn.Linear(3, 6)), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    g, v = (f"0.parametrizations.weight.original{i}" for i in (0, 1))
    assert sets(discover(lambda: net(x), net)) == {frozenset({v}), frozenset({g, "0.bias"})}


def test_ties_go_to_the_parameters_nearest_to_the_normaliser(x: Tensor) -> None:
    net = nn.Sequential(
        nn.Linear(3, 6), Residual(nn.RMSNorm(6), SwiGLU(6, 8)), Residual(nn.RMSNorm(6), SwiGLU(6, 8)), nn.RMSNorm(6),
        nn.Linear(6, 2),
    ).double()  # fmt: skip
    stream = ("0.weight", "0.bias", "1.body.1.down.weight", "2.body.1.down.weight")
    assert discover(lambda: net(x), net) == [stream]
    net[2].body[1].down.requires_grad_(False)
    assert discover(lambda: net(x), net) == [(*stream[:3], "2.body.1.up.weight")]
    net[0].bias.requires_grad_(False)
    assert discover(lambda: net(x), net) == []


def test_a_stream_without_final_norm_is_no_group(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(3, 6), Residual(nn.LayerNorm(6), nn.Linear(6, 6)), nn.Linear(6, 2)).double()
    assert discover(lambda: net(x), net) == []


def test_labels(x: Tensor) -> None:
    net = nn.Sequential(
        nn.Linear(3, 6), Residual(nn.LayerNorm(6), nn.Linear(6, 6)), nn.LayerNorm(6),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6),
        nn.Linear(6, 2),
    ).double().eval()  # fmt: skip
    names = dict(net.named_parameters())
    labels = [group.label for group in find_normalized(lambda: net(x), names, set(names))]
    assert labels == ["residual stream: 0.weight (+3)", "3", "5"]


def test_depth_costs_little(x: Tensor) -> None:
    """Sixty blocks: the search repairs one relation at a time and never enumerates sets."""
    blocks = [Residual(nn.RMSNorm(6), SwiGLU(6, 4)) for _ in range(60)]
    net = nn.Sequential(nn.Linear(3, 6), *blocks, nn.RMSNorm(6), nn.Linear(6, 2)).double()
    assert [len(group) for group in discover(lambda: net(x), net)] == [62]


ACTIVATIONS = {"leaky": nn.LeakyReLU, "abs": lambda: _Abs(), "tanh": nn.Tanh, "none": nn.Identity}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda n: nn.Identity(), "layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "rms": nn.RMSNorm,
    "group": lambda n: nn.GroupNorm(2, n),
}  # fmt: skip


class _Abs(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.abs()


layer_plan = st.tuples(
    st.booleans(), st.sampled_from(sorted(NORMS)), st.sampled_from(sorted(ACTIVATIONS)), st.booleans()
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plan=st.lists(layer_plan, min_size=3, max_size=5), seed=st.integers(0, 1000))
def test_random_stacks_sound_and_complete(plan: list[tuple[bool, str, str, bool]], seed: int) -> None:
    """Every set found is invariant; every layer that is invariant alone or with its bias is in a set."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for bias, norm, activation, norm_first in plan:
            width = 8 if layers else 3
            pair = [NORMS[norm](8), ACTIVATIONS[activation]()]
            layers += [nn.Linear(width, 8, bias=bias), *(pair if norm_first else pair[::-1])]
        net = nn.Sequential(*layers, nn.Linear(8, 2)).double().eval()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_()
        case = Case(net, torch.randn(6, 3, dtype=torch.float64))
    found = discover(case.run, net)
    for group in found:
        assert relative_change(case, group, 3.0) < 1e-9, group
    grouped = {name for group in found for name in group}
    parameters = dict(net.named_parameters())
    for i, layer in enumerate(net):
        if isinstance(layer, nn.Linear) and f"{i}.weight" not in grouped:
            bias = {f"{i}.bias"} & parameters.keys()
            assert relative_change(case, {f"{i}.weight"}, 3.0) > 1e-9
            assert relative_change(case, {f"{i}.weight"} | bias, 3.0) > 1e-9


# ------------------------------------------------------------------------------------------------ exact statistics


def reference_norm(x: Tensor, dims: tuple[int, ...], centred: bool = True) -> Tensor:
    if centred:
        x = x - x.mean(dims, keepdim=True)
    return x / x.square().mean(dims, keepdim=True).sqrt()


NORMALISERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "batch": (lambda: nn.BatchNorm2d(4), lambda x: reference_norm(x, (0, 2, 3))),
    "instance": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
                 lambda x: reference_norm(x, (2, 3))),
    "group": (lambda: nn.GroupNorm(2, 4), lambda x: reference_norm(x.view(5, 2, 2, 3, 3), (2, 3, 4)).view(5, 4, 3, 3)),
    "layer": (lambda: nn.LayerNorm((4, 3, 3)), lambda x: reference_norm(x, (1, 2, 3))),
    "rms": (lambda: nn.RMSNorm((4, 3, 3), eps=1e-5), lambda x: reference_norm(x, (1, 2, 3), centred=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMALISERS)
def test_exact_statistics(name: str) -> None:
    build, reference = NORMALISERS[name]
    net = build().double().eval()
    for key, buffer in net.named_buffers():
        if key != "num_batches_tracked":
            buffer += 0.5
    kept = copy.deepcopy(net.state_dict())
    x = 1e-3 * torch.randn(5, 4, 3, 3, dtype=torch.float64) + 1e-3
    plain = net(x)
    with exact_statistics():
        exact = net(x)
    torch.testing.assert_close(exact, reference(x), rtol=1e-12, atol=1e-12)
    assert (plain - exact).abs().max() > 1e-3
    assert torch.equal(net(x), plain)
    assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())


def test_exact_statistics_of_torch_level_calls() -> None:
    x = 1e-3 * torch.randn(5, 4, 3, dtype=torch.float64)
    mean, var = torch.ones(4, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    calls: list[tuple[Callable[[], Any], Tensor]] = [
        (lambda: torch.batch_norm(x, None, None, mean, var, False, 0.1, 1e-5, True), reference_norm(x, (0, 2))),
        (lambda: torch.instance_norm(x, None, None, mean, var, False, 0.1, 1e-5, True), reference_norm(x, (2,))),
        (lambda: torch.group_norm(x, 1), reference_norm(x, (1, 2))),
        (lambda: torch.layer_norm(x, (4, 3), None, None, 1e-5), reference_norm(x, (1, 2))),
        (lambda: torch.rms_norm(x, (4, 3)), reference_norm(x, (1, 2), centred=False)),
        (lambda: F.batch_norm(x, mean, var, eps=1e-2), reference_norm(x, (0, 2))),
    ]
    for call, expected in calls:
        with exact_statistics():
            torch.testing.assert_close(call(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(mean, torch.ones_like(mean))


def test_exact_statistics_under_transforms() -> None:
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
    ).double().eval()  # fmt: skip
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    x = torch.randn(6, 3, dtype=torch.float64)

    def run(theta: dict[str, Tensor]) -> Tensor:
        with exact_statistics():
            return torch.func.functional_call(net, theta, (x,))

    for group in (("0.weight", "0.bias"), ("3.weight", "3.bias")):
        tangent = {n: p if n in group else torch.zeros_like(p) for n, p in parameters.items()}
        _, forward = torch.func.jvp(run, (parameters,), (tangent,))
        assert forward.abs().max() < 1e-12
        output, pull = torch.func.vjp(run, parameters)
        (gradient,) = pull(torch.ones_like(output))
        assert max(gradient[n].abs().max() for n in group) > 1e-3
        assert abs(sum((gradient[n] * parameters[n]).sum() for n in group)) < 1e-12
    frozen = torch.func.jvp(lambda t: torch.func.functional_call(net, t, (x,)), (parameters,), ({
        n: p if n == "0.weight" else torch.zeros_like(p) for n, p in parameters.items()},))[1]  # fmt: skip
    assert frozen.abs().max() > 1e-2


def test_exact_statistics_needs_a_batch() -> None:
    net = nn.BatchNorm1d(3).double().eval()
    with exact_statistics(), pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.ones(1, 3, dtype=torch.float64))
