"""NetworkMean and LinearizedMean: gpytorch's shared suite, and dense float64 references."""

from __future__ import annotations

import copy
import pickle
import unittest

import pytest
import torch
from gpytorch.means import Mean
from gpytorch.test import base_mean_test_case as suites

from ntkgp.means import LinearizedMean, NetworkMean
from tests.operators.networks import AnyWidth, deep_net, dense_jacobian, linearized, rel, seeded
from tests.operators.test_neural_tangent import counted


class TestNetworkMeanSuite(suites.BaseMeanTestCase, unittest.TestCase):
    def create_mean(self) -> Mean:
        return NetworkMean(AnyWidth())


class TestLinearizedMeanSuite(suites.BaseMeanTestCase, unittest.TestCase):
    def create_mean(self) -> Mean:
        return LinearizedMean(AnyWidth())


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_values_are_those_of_the_dense_jacobian(outputs: int, batch: tuple[int, ...]) -> None:
    net, lin, x = deep_net(outputs), linearized(outputs), seeded(*batch, 4, 3, seed=1)
    flat = x.reshape(-1, 3)
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    network = net(flat).detach()
    linear = network - dense_jacobian(net, flat).detach() @ theta
    shape = (*batch, 4) if outputs == 1 else (*batch, 4, outputs)
    for mean, expected in ((NetworkMean(lin), network), (LinearizedMean(lin), linear)):
        assert mean(x).shape == shape
        assert rel(mean(x), expected.reshape(shape)) < 1e-12
        assert not mean(x).requires_grad


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_in_inputs(outputs: int, batch: tuple[int, ...]) -> None:
    net, lin = deep_net(outputs), linearized(outputs)
    x = seeded(*batch, 4, 3, seed=1).requires_grad_()
    flat = x.reshape(-1, 3)
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    weights = seeded(len(flat), outputs, seed=2)
    network = net(flat)
    linear = network - dense_jacobian(net, flat) @ theta
    for mean, expected in ((NetworkMean(lin), network), (LinearizedMean(lin), linear)):
        got = torch.autograd.grad((mean(x).reshape(-1, outputs) * weights).sum(), x)[0]
        wanted = torch.autograd.grad((expected * weights).sum(), x, retain_graph=True)[0]
        assert rel(got, wanted) < 1e-12


@pytest.mark.parametrize("cls", [NetworkMean, LinearizedMean])
@pytest.mark.parametrize("network", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_inputs(cls: type[Mean], network: torch.dtype, dtype: torch.dtype) -> None:
    x = seeded(4, 3, seed=1, dtype=dtype)
    mean = cls(linearized(2, network))(x)
    assert mean.dtype == dtype
    assert rel(mean.double(), cls(linearized(2))(x.double())) < 1e-5


@pytest.mark.parametrize("cls", [NetworkMean, LinearizedMean])
def test_training_inputs_are_passed_once_and_known_by_value(cls: type[Mean]) -> None:
    mean, x = cls(linearized(2)), seeded(4, 3, seed=1)
    with counted(mean.lin, "jvp") as calls:
        first = mean(x)
        mean(seeded(5, 3, seed=2))
        again = mean(x.clone())
        again += 1.0
        assert torch.equal(mean(x), first)
        assert calls["jvp"] == (2 if cls is LinearizedMean else 0)
        x += 1.0
        moved = mean(x)
    assert len(mean._values) == 2
    assert torch.equal(moved, cls(linearized(2))(x))


@pytest.mark.parametrize("cls", [NetworkMean, LinearizedMean])
def test_copies_share_the_network_and_leave_the_cache_behind(cls: type[Mean]) -> None:
    mean, x = cls(linearized(2)), seeded(4, 3, seed=1)
    expected = mean(x)
    twin = copy.deepcopy(mean)
    assert twin.lin is mean.lin
    assert len(twin._values) == 0
    assert torch.equal(twin(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(mean))(x), expected)
    assert not list(mean.parameters())
    assert not mean.state_dict()


def test_bad_arguments_are_named() -> None:
    for cls in (NetworkMean, LinearizedMean):
        with pytest.raises(TypeError, match=r"lin: expected a ntkgp.LinearizedNetwork, got Sequential"):
            cls(deep_net(1))
        with pytest.raises(ValueError, match=r"packed \(N, 3\)"):
            cls(linearized(1))(torch.ones(2, 5))
