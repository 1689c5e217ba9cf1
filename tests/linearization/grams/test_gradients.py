"""Gradients of Grams in the inputs, against autograd through dense Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ntkgp
from tests import reference as ref
from tests.architectures import CASES
from tests.linearization.grams.helper import DOUBLE, TOLERANCE, apart, cnn, error, linear, mlp, noise

NETS = {"mlp": (mlp, (4,)), "cnn": (cnn, (2, 6, 6))}


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """J(x), (N, C, P), with a graph to x."""
    parameters = list(net.parameters())
    rows = []
    for n in range(len(x)):
        for f in net(x[n : n + 1]).flatten():
            grads = torch.autograd.grad(f, parameters, create_graph=True, allow_unused=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                                   for g, p in zip(grads, parameters, strict=True)]))  # fmt: skip
    return torch.stack(rows).view(len(x), -1, len(rows[0]))


def slow(net: nn.Module, lin: ntkgp.LinearizedNetwork, x: Tensor, z: Tensor | None = None) -> Tensor:
    j1 = apart(lin, jacobian(net, x))
    j2 = j1 if z is None else apart(lin, jacobian(net, z))
    return torch.stack([a.flatten(0, 1) @ b.flatten(0, 1).T for a, b in zip(j1, j2, strict=True)])


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = noise(11, *value.shape)
    return [g.detach() for g in torch.autograd.grad((value * weights).sum(), inputs)]


def problem(name: str) -> tuple[nn.Module, ntkgp.LinearizedNetwork, Tensor, Tensor]:
    build, event = NETS[name]
    net = build()
    lin = ntkgp.LinearizedNetwork(net, noise(0, 2, *event))
    return net, lin, noise(1, 4, *event).requires_grad_(), noise(2, 3, *event).requires_grad_()


@pytest.mark.parametrize("name", NETS)
def test_grams(name: str) -> None:
    net, lin, x, z = problem(name)
    (found,), (expected,) = (gradients(k, x) for k in (lin.grams(x), slow(net, lin, x)))
    assert error(found, expected) < TOLERANCE
    cross, wanted = lin.grams(x, z), slow(net, lin, x, z)
    for a, b in zip(gradients(cross, x, z), gradients(wanted, x, z), strict=True):
        assert error(a, b) < TOLERANCE
    for left, right, of in ((x, z.detach(), x), (x.detach(), z, z)):
        (found,), (expected,) = (gradients(k, of) for k in (lin.grams(left, right), slow(net, lin, left, right)))
        assert error(found, expected) < TOLERANCE
    kept = lin.factors(z)
    (found,) = gradients(lin.grams(x, kept), x)
    assert error(found, gradients(slow(net, lin, x, z), x)[0]) < TOLERANCE
    (found,) = gradients(lin.grams(kept, x), x)
    assert error(found, gradients(slow(net, lin, z, x), x)[0]) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_weighted_sums_and_diagonals(name: str) -> None:
    net, lin, x, z = problem(name)
    variance = noise(5, len(lin.groups)).exp()
    (wanted,) = gradients((variance[:, None, None] * slow(net, lin, x, z)).sum(0), x)
    for right in (z, lin.factors(z)):
        (found,) = gradients(lin.weighted_gram(x, right, variance), x)
        assert error(found, wanted) < TOLERANCE
    blocks = torch.stack([a @ a.mT for a in apart(lin, jacobian(net, x))])
    assert error(gradients(lin.gram_diagonals(x), x)[0], gradients(blocks, x)[0]) < TOLERANCE
    j, k = apart(lin, jacobian(net, x[:3])), apart(lin, jacobian(net, z))
    pairs = torch.stack([a @ b.mT for a, b in zip(j, k, strict=True)])
    for a, b in zip(gradients(lin.gram_diagonals(x[:3], z), x, z), gradients(pairs, x, z), strict=True):
        assert error(a, b) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "mlp_rms_norm", "cnn_instance_norm", "resnet_batch_norm", "conv_transpose_batch_norm", "layer_scale_stream",
        "mlp_bare_parameters", "weight_norm", "parallel_branches_group_norm",
    ],
)  # fmt: skip
def test_architectures(name: str) -> None:
    case = CASES[name]()
    lin = ntkgp.LinearizedNetwork(case.net, case.example)
    x = case.example[:3].clone().requires_grad_()
    (found,), (expected,) = (gradients(k, x) for k in (lin.grams(x), slow(case.net, lin, x)))
    assert error(found, expected) < 1e-11


def test_by_differences() -> None:
    with ref.seeded(0):
        net = nn.Sequential(
            linear(2, 4), nn.LayerNorm(4, dtype=DOUBLE), nn.Tanh(), linear(4, 3), nn.GELU(), linear(3, 2)
        )
    lin = ntkgp.LinearizedNetwork(net, noise(0, 2, 2))
    x, z = noise(1, 3, 2).requires_grad_(), noise(2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lin.grams, (x,))
    assert torch.autograd.gradcheck(lin.grams, (x, z))
    assert torch.autograd.gradcheck(lin.gram_diagonals, (x,))


def test_no_graph_where_none_is_asked_for() -> None:
    _, lin, x, z = problem("mlp")
    with torch.no_grad():
        assert not lin.grams(x).requires_grad
    assert not lin.grams(x.detach(), z.detach()).requires_grad
    assert not lin.factors(x).terms[0].tensors()[-1].requires_grad
    assert not lin.features(x, noise(1, 2, lin.num_parameters)).requires_grad
    assert lin.grams(x).requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in lin.frozen.module(torch.device("cpu")).parameters())
