"""Sums and products of the neural tangent kernel with ordinary kernels, against dense matrices."""

from __future__ import annotations

import copy
import unittest
from collections.abc import Callable

import pytest
import torch
from gpytorch.kernels import AdditiveKernel, Kernel, LinearKernel, ProductKernel, RBFKernel, RBFKernelGrad, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.test import base_kernel_test_case as suites
from linear_operator.operators import KroneckerProductLinearOperator
from torch import Tensor

from ntkgp.kernels import NeuralTangentKernel, SharedKernel
from ntkgp.means import LinearizedMean
from tests.kernels.test_neural_tangent import ExactModel, likelihood_of
from tests.operators.networks import AnyWidth, deep_net, dense_kernel, linearized, rel, seeded


class TestSharedKernel(suites.BaseKernelTestCase, unittest.TestCase):
    identical = False

    def create_kernel_no_ard(self, **kwargs: object) -> Kernel:
        return SharedKernel(RBFKernel(**kwargs), 3, identical=self.identical)

    def test_kernel_dtype_device(self) -> None:
        """The stock test asserts an error that only kernels with own parameters raise."""
        assert self.create_kernel_no_ard().double().dtype == torch.float64


class TestIdenticalSharedKernel(TestSharedKernel):
    identical = True


class TestMixedKernel(suites.BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs: object) -> Kernel:
        return NeuralTangentKernel(AnyWidth(3), **kwargs) + RBFKernel(**kwargs)

    def create_data_no_batch(self) -> Tensor:
        return torch.randn(10, 10)

    def create_data_double_batch(self) -> Tensor:
        return torch.randn(3, 2, 5, 2)


def ntk(outputs: int) -> NeuralTangentKernel:
    return NeuralTangentKernel(linearized(outputs), precision=[3.0, 0.5, 20.0])


def dense_ntk(outputs: int, x1: Tensor, x2: Tensor) -> Tensor:
    kernel = ntk(outputs)
    return dense_kernel(deep_net(outputs), kernel.lin, x1, x2, kernel.precision.reciprocal())


def dense_rbf(x1: Tensor, x2: Tensor, lengthscale: float) -> Tensor:
    return torch.exp(-0.5 * (x1.unsqueeze(-2) - x2.unsqueeze(-3)).square().sum(-1) / lengthscale**2)


def rbf(lengthscale: float) -> RBFKernel:
    kernel = RBFKernel().double()
    kernel.lengthscale = torch.tensor(lengthscale, dtype=torch.float64)
    return kernel


def scaled(kernel: Kernel, scale: float) -> ScaleKernel:
    kernel = ScaleKernel(kernel).double()
    kernel.outputscale = torch.tensor(scale, dtype=torch.float64)
    return kernel


def independent(base: Tensor, outputs: int) -> Tensor:
    return torch.kron(base, torch.eye(outputs, dtype=torch.float64))


def identical(base: Tensor, outputs: int) -> Tensor:
    return torch.kron(base, torch.ones(outputs, outputs, dtype=torch.float64))


Dense = Callable[[Tensor, Tensor, int], Tensor]
CASES: dict[str, tuple[Callable[[int], Kernel], Dense]] = {
    "NTK + RBF": (
        lambda c: ntk(c) + rbf(0.7),
        lambda x, z, c: dense_ntk(c, x, z) + independent(dense_rbf(x, z, 0.7), c),
    ),
    "NTK + RBF + scaled RBF": (
        lambda c: ntk(c) + rbf(0.7) + scaled(rbf(2.0), 3.0),
        lambda x, z, c: dense_ntk(c, x, z) + independent(dense_rbf(x, z, 0.7) + 3 * dense_rbf(x, z, 2.0), c),
    ),
    "NTK + (RBF + RBF)": (
        lambda c: ntk(c) + (rbf(0.7) + rbf(2.0)),
        lambda x, z, c: dense_ntk(c, x, z) + independent(dense_rbf(x, z, 0.7) + dense_rbf(x, z, 2.0), c),
    ),
    "NTK + NTK": (lambda c: ntk(c) + ntk(c), lambda x, z, c: 2 * dense_ntk(c, x, z)),
    "scaled NTK": (lambda c: scaled(ntk(c), 1.7), lambda x, z, c: 1.7 * dense_ntk(c, x, z)),
    "NTK * RBF": (
        lambda c: ntk(c) * rbf(0.7),
        lambda x, z, c: dense_ntk(c, x, z) * identical(dense_rbf(x, z, 0.7), c),
    ),
    "NTK * RBF + RBF": (
        lambda c: ntk(c) * rbf(0.7) + rbf(2.0),
        lambda x, z, c: dense_ntk(c, x, z) * identical(dense_rbf(x, z, 0.7), c) + independent(dense_rbf(x, z, 2.0), c),
    ),
    "(NTK + RBF) * RBF": (
        lambda c: (ntk(c) + rbf(0.7)) * rbf(2.0),
        lambda x, z, c: (
            (dense_ntk(c, x, z) + independent(dense_rbf(x, z, 0.7), c)) * identical(dense_rbf(x, z, 2.0), c)
        ),
    ),
    "NTK * NTK": (lambda c: ntk(c) * ntk(c), lambda x, z, c: dense_ntk(c, x, z).square()),
    "shared RBF + NTK": (
        lambda c: SharedKernel(rbf(0.7), c) + ntk(c),
        lambda x, z, c: dense_ntk(c, x, z) + independent(dense_rbf(x, z, 0.7), c),
    ),
    "shared RBF + scaled NTK": (
        lambda c: SharedKernel(rbf(0.7), c) + scaled(ntk(c), 1.7),
        lambda x, z, c: 1.7 * dense_ntk(c, x, z) + independent(dense_rbf(x, z, 0.7), c),
    ),
    "identical RBF * NTK": (
        lambda c: SharedKernel(rbf(0.7), c, identical=True) * ntk(c),
        lambda x, z, c: dense_ntk(c, x, z) * identical(dense_rbf(x, z, 0.7), c),
    ),
}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_composed_kernels_are_their_dense_compositions(name: str, outputs: int) -> None:
    make, dense = CASES[name]
    kernel = make(outputs)
    x, z = seeded(4, 3, seed=1), seeded(3, 3, seed=2)
    expected = dense(x, x, outputs)
    assert kernel(x).shape == expected.shape
    assert rel(kernel(x).to_dense(), expected) < 1e-12
    assert rel(kernel(x, z).to_dense(), dense(x, z, outputs)) < 1e-12
    assert rel(kernel(x, diag=True), expected.diagonal()) < 1e-12
    batch = torch.stack([x, x + 1])
    assert rel(kernel(batch).to_dense()[1], dense(x + 1, x + 1, outputs)) < 1e-12
    noisy = kernel(x).add_jitter(0.1)
    rhs = seeded(4 * outputs, 1, seed=3)
    solution = torch.linalg.solve(expected + 0.1 * torch.eye(len(expected), dtype=torch.float64), rhs)
    assert rel(noisy.solve(rhs), solution) < 1e-8


@pytest.mark.parametrize("name", ["NTK + RBF", "NTK * RBF", "(NTK + RBF) * RBF", "shared RBF + scaled NTK"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_mixed_kernels_train_and_predict(name: str, outputs: int) -> None:
    make, dense = CASES[name]
    kernel, lin = make(outputs), linearized(outputs)
    likelihood = likelihood_of(outputs)
    x, y = seeded(6, 3, seed=1), seeded(6, outputs, seed=2)
    mean = LinearizedMean(lin)
    target, shift = (y, mean(x)) if outputs > 1 else (y[:, 0], mean(x))
    model = ExactModel(x, target, likelihood, mean, kernel).train()
    mll = ExactMarginalLogLikelihood(likelihood, model)
    loss = -mll(model(x), target)
    covariance = dense(x, x, outputs) + 0.04 * torch.eye(y.numel(), dtype=torch.float64)
    residual = (target - shift).reshape(-1)
    expected = torch.distributions.MultivariateNormal(torch.zeros_like(residual), covariance).log_prob(residual)
    assert rel(-loss * y.numel(), expected) < 1e-8
    loss.backward()
    grads = [p.grad for p in kernel.parameters()]
    assert all(grad is not None and bool(grad.abs().max() > 0) for grad in grads)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        now = -mll(model(x), target)
        now.backward()
        optimizer.step()
    assert bool(now.detach() < loss.detach())
    with torch.no_grad():
        assert torch.isfinite(model.eval()(seeded(3, 3, seed=5)).variance).all()


def test_a_sum_is_flat_and_stock_for_one_output() -> None:
    for outputs in (1, 3):
        kernel = ntk(outputs) + rbf(1.0) + rbf(2.0)
        assert isinstance(kernel, AdditiveKernel)
        assert len(kernel.kernels) == 3
        assert type(kernel) is AdditiveKernel or outputs > 1
        assert isinstance(ntk(outputs) * rbf(1.0), ProductKernel)


def test_shared_kernels_stay_lazy() -> None:
    kernel = SharedKernel(rbf(0.7), 4)
    assert isinstance(kernel(seeded(5, 3, seed=1)).evaluate_kernel(), KroneckerProductLinearOperator)
    assert kernel.is_stationary
    assert not SharedKernel(LinearKernel(), 2).is_stationary


def test_active_dims_of_the_base_kernel_are_respected() -> None:
    x = seeded(4, 3, seed=1)
    base = RBFKernel(active_dims=[1]).double()
    base.lengthscale = torch.tensor(0.7, dtype=torch.float64)
    kernel = ntk(2) + base
    expected = dense_ntk(2, x, x) + independent(dense_rbf(x[:, 1:2], x[:, 1:2], 0.7), 2)
    assert rel(kernel(x).to_dense(), expected) < 1e-12


def test_copies_of_sums_share_the_network() -> None:
    kernel = ntk(2) + rbf(0.7)
    twin = copy.deepcopy(kernel)
    assert twin.kernels[0].lin is kernel.kernels[0].lin
    assert rel(twin(seeded(3, 3, seed=1)).to_dense(), kernel(seeded(3, 3, seed=1)).to_dense()) < 1e-15


def test_stock_addition_from_the_left_cannot_be_mended() -> None:
    """What the docstring warns of: GPyTorch's own sum has the shape of its first kernel."""
    with pytest.raises(RuntimeError):
        (rbf(0.7) + ntk(3))(seeded(4, 3, seed=1)).to_dense()


def test_bad_operands_are_named() -> None:
    with pytest.raises(ValueError, match=r"other: expected a kernel with 1 or 3 outputs per input, got .* with 2"):
        ntk(3) + ntk(2)
    with pytest.raises(TypeError):
        ntk(3) + 1.0
    with pytest.raises(ValueError, match="base_kernel: expected a gpytorch Kernel, got int"):
        SharedKernel(3, 3)
    with pytest.raises(ValueError, match="base_kernel: expected one output per input, got RBFKernelGrad with 2"):
        SharedKernel(RBFKernelGrad(), 3)
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_outputs: expected a positive int"):
            SharedKernel(RBFKernel(), bad)
    with pytest.raises(NotImplementedError, match="last_dim_is_batch"):
        SharedKernel(RBFKernel(), 2).forward(torch.ones(2, 1), torch.ones(2, 1), last_dim_is_batch=True)
