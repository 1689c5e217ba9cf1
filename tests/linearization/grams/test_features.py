"""Products J V from the layers' activations, against dense Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ntkgp
from ntkgp.linearization.grams import factors, features
from ntkgp.linearization.memory import parse_memory
from tests import reference as ref
from tests.architectures import CASES, linearized
from tests.linearization.grams.helper import DOUBLE, NETS, TOLERANCE, apart, error, linear, noise


def by_group(lin: ntkgp.LinearizedNetwork, j: Tensor, v: Tensor) -> Tensor:
    """J_g V_g, (G, N, C, K)."""
    return torch.stack([a @ b.T for a, b in zip(apart(lin, j), apart(lin, v), strict=True)])


def smallest(lin: ntkgp.LinearizedNetwork, x: Tensor, v: Tensor, per_group: bool = False) -> int:
    with pytest.raises(
        ValueError, match=r"max_memory: .* too small for \d+ features .* smallest possible is"
    ) as caught:
        lin.features(x, v, 7, per_group)
    return parse_memory(str(caught.value).rpartition("is ")[2])


@pytest.mark.parametrize("name", CASES)
def test_every_architecture(name: str) -> None:
    shared = linearized(name)
    lin, raw, x, j = shared.lin, shared.raw, shared.x, shared.jacobian
    tolerance = 1e-5 if name == "hf_llama" else TOLERANCE  # the net itself computes a part in float32
    # One direction, and more of them than any layer has positions: either order of summation.
    for directions in (1, 40):
        v = noise(1, directions, lin.num_parameters)
        assert error(lin.features(raw, v), j @ v.T) < tolerance
        assert error(lin.features(x, v, per_group=True), by_group(lin, j, v)) < tolerance
    least = smallest(lin, x, v, per_group=True)
    assert error(lin.features(x, v, least, per_group=True), by_group(lin, j, v)) < tolerance


@pytest.mark.parametrize("groups", ["normalization", "layer", "tensor", "single"])
@pytest.mark.parametrize("name", NETS)
def test_any_budget_and_partition(name: str, groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs = NETS[name]
    net, x = make(), inputs(1, 7)
    lin = ntkgp.LinearizedNetwork(net, inputs(0, 2), groups=groups)
    j, v = ref.jacobian(net, x), noise(2, 5, lin.num_parameters)
    least, rows, build = smallest(lin, lin.pack(x), v, True), [], features.build
    monkeypatch.setattr(features, "build", lambda lin, plan, x, *a: (rows.append(len(x)), build(lin, plan, x, *a))[1])
    monkeypatch.setattr(factors, "_PASS_BYTES", 1)
    for factor in (1, 1.3, 2, 5, 1000):
        assert error(lin.features(x, v, factor * least, True), by_group(lin, j, v)) < TOLERANCE
    assert len(set(rows)) >= 2
    monkeypatch.setattr(features, "_PIECE", 1)
    assert error(lin.features(x, v), j @ v.T) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_single_precision(name: str) -> None:
    """Directions may be in another dtype than the network."""
    build, inputs = NETS[name]
    net, x = build().float(), inputs(1, 5)
    x = x.float() if x.is_floating_point() else x
    lin = ntkgp.LinearizedNetwork(net, x[:2])
    v = noise(2, 3, lin.num_parameters)
    for given in (v, v.float()):
        found = lin.features(x, given)
        assert found.dtype == torch.float32
        assert error(found.double(), ref.jacobian(net, x) @ v.T) < 1e-5


def test_as_jvp() -> None:
    with ref.seeded(0):
        net = nn.Sequential(nn.ConvTranspose1d(2, 4, 3, groups=2, dtype=DOUBLE), nn.Tanh(), nn.Flatten(), linear(24, 3))
    lin, x = ntkgp.LinearizedNetwork(net, noise(0, 2, 2, 4)), noise(1, 6, 2, 4)
    v = noise(2, 4, lin.num_parameters)
    assert error(lin.features(x, v), lin.jvp(x, v).permute(1, 2, 0)) < TOLERANCE
    assert error(lin.features(x, v[:1])[..., 0], lin.jvp(x, v[0])) < TOLERANCE


def test_no_directions_and_no_graph() -> None:
    lin = ntkgp.LinearizedNetwork(NETS["mlp"][0](), noise(0, 2, 4))
    x, v = noise(1, 6, 4).requires_grad_(), noise(2, 3, lin.num_parameters).requires_grad_()
    assert lin.features(x, v[:0]).shape == (6, 3, 0)
    assert lin.features(x, v[:0], per_group=True).shape == (len(lin.groups), 6, 3, 0)
    assert not lin.features(x, v).requires_grad


def test_wrong_arguments_are_named() -> None:
    lin = ntkgp.LinearizedNetwork(NETS["mlp"][0](), noise(0, 2, 4))
    x, p = noise(1, 6, 4), lin.num_parameters
    for v in (torch.ones(p), torch.ones(2, p + 1), torch.ones(1, 2, p), [1.0] * p):
        with pytest.raises(ValueError, match=r"v: expected shape"):
            lin.features(x, v)
    with pytest.raises(ValueError, match="max_memory: expected a positive number"):
        lin.features(x, torch.ones(2, p), max_memory="much")
    for inputs, words in ((x[:0], "N = 0 rows"), (noise(1, 6, 5), r"expected float64 of shape \(N, 4\)")):
        with pytest.raises(ValueError, match=words):
            lin.features(inputs, torch.ones(2, p))
    with pytest.raises(ValueError, match=r"inputs: expected .* got Factors"):
        lin.features(lin.factors(x), torch.ones(2, p))
