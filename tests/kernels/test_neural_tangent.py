"""NeuralTangentKernel: gpytorch's shared suite, and dense float64 references on a deep LayerNorm network."""

from __future__ import annotations

import copy
import pickle
import unittest

import gpytorch
import pytest
import torch
from botorch.optim.utils import sample_all_priors
from gpytorch.constraints import Interval
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import GammaPrior
from gpytorch.test import base_kernel_test_case as suites
from torch import Tensor, nn

from ntkgp import LinearizedNetwork
from ntkgp.kernels import FlatLogPrior, NeuralTangentKernel
from ntkgp.means import LinearizedMean
from ntkgp.operators import GroupedGramOperator, NeuralTangentOperator
from tests.operators.networks import AnyWidth, deep_net, dense_kernel, linearized, rel, seeded
from tests.operators.test_neural_tangent import counted

PRECISION = torch.tensor([1e4, 0.5, 1e-4], dtype=torch.float64)
MATRIX_FREE = 1  # a budget of one byte


class TestSuite(suites.BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs: object) -> Kernel:
        return NeuralTangentKernel(AnyWidth(), precision=[0.7, 2.0, 1.3, 0.9], **kwargs)

    def create_data_no_batch(self) -> Tensor:
        return torch.randn(20, 10)

    def create_data_double_batch(self) -> Tensor:
        return torch.randn(3, 2, 10, 2)


class TestSuiteThreeOutputs(TestSuite):
    def create_kernel_no_ard(self, **kwargs: object) -> Kernel:
        return NeuralTangentKernel(AnyWidth(3), precision=[0.7, 2.0, 1.3, 0.9], **kwargs)


class TestSuiteMatrixFree(TestSuite):
    def create_kernel_no_ard(self, **kwargs: object) -> Kernel:
        return NeuralTangentKernel(AnyWidth(3), precision=[0.7, 2.0, 1.3, 0.9], max_memory=MATRIX_FREE, **kwargs)

    def create_data_no_batch(self) -> Tensor:
        return torch.randn(5, 10)

    def create_data_double_batch(self) -> Tensor:
        return torch.randn(3, 2, 3, 2)


def kernel_of(outputs: int, **kwargs: object) -> NeuralTangentKernel:
    return NeuralTangentKernel(linearized(outputs), precision=PRECISION, **kwargs)


def dense(kernel: NeuralTangentKernel, x1: Tensor, x2: Tensor) -> Tensor:
    return dense_kernel(deep_net(kernel.num_outputs), kernel.lin, x1, x2, kernel.precision.reciprocal())


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("budget", ["2GiB", MATRIX_FREE])
@pytest.mark.parametrize(("batch1", "batch2"), [((), ()), ((2,), (2,)), ((2,), ()), ((), (2,)), ((2, 1), (3,))])
def test_covariance_is_the_dense_kernel(
    outputs: int, budget: str | int, batch1: tuple[int, ...], batch2: tuple[int, ...]
) -> None:
    kernel = kernel_of(outputs, max_memory=budget)
    x1, x2 = seeded(*batch1, 4, 3, seed=1), seeded(*batch2, 3, 3, seed=2)
    lazy = kernel(x1, x2)
    expected = dense(kernel, x1, x2)
    kind = NeuralTangentOperator if budget == MATRIX_FREE else GroupedGramOperator
    assert isinstance(lazy.evaluate_kernel(), kind)
    assert rel(lazy.to_dense(), expected) < 1e-12
    symmetric = dense(kernel, x1, x1)
    assert rel(kernel(x1).to_dense(), symmetric) < 1e-12
    assert rel(kernel(x1, diag=True), symmetric.diagonal(dim1=-2, dim2=-1)) < 1e-12
    assert rel(kernel(x1, x1 + 0.1, diag=True), dense(kernel, x1, x1 + 0.1).diagonal(dim1=-2, dim2=-1)) < 1e-12
    blocks = symmetric.unflatten(-1, (4, outputs)).unflatten(-3, (4, outputs)).diagonal(dim1=-4, dim2=-2)
    assert rel(kernel.point_blocks(x1), blocks.movedim(-1, -3)) < 1e-12


@pytest.mark.parametrize("budget", ["2GiB", MATRIX_FREE])
def test_batch_of_precisions(budget: str | int) -> None:
    kernel = NeuralTangentKernel(linearized(3), batch_shape=torch.Size([2]), max_memory=budget)
    kernel.precision = torch.stack([PRECISION, PRECISION.flip(0)])
    x = seeded(4, 3, seed=1)
    expected = dense(kernel, x, x)
    assert expected.shape == (2, 12, 12)
    assert rel(kernel(x).to_dense(), expected) < 1e-12
    assert rel(kernel(x, diag=True), expected.diagonal(dim1=-2, dim2=-1)) < 1e-12
    assert kernel.point_blocks(x).shape == (2, 4, 3, 3)
    assert rel(kernel[1](x).to_dense(), expected[1]) < 1e-12


def test_lazy_slices_never_mix_up_outputs() -> None:
    kernel, x = kernel_of(3), seeded(5, 3, seed=1)
    expected = dense(kernel, x, x)
    for index in [(slice(3, 9), slice(0, 6)), (slice(1, 7), slice(None)), (slice(None), torch.tensor([0, 7]))]:
        assert rel(kernel(x)[index].to_dense(), expected[index]) < 1e-12


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("budget", ["2GiB", MATRIX_FREE])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("which", ["same", "equal", "different"])
def test_gradients_in_inputs_and_precisions(
    outputs: int, budget: str | int, batch: tuple[int, ...], which: str
) -> None:
    kernel = kernel_of(outputs, max_memory=budget)
    x1 = seeded(*batch, 3, 3, seed=1).requires_grad_()
    x2 = {"same": x1, "equal": x1.detach().clone(), "different": seeded(*batch, 3, 3, seed=2)}[which]
    x2 = x2 if x2 is x1 else x2.requires_grad_()
    weights = seeded(3 * outputs, 3 * outputs, seed=4)
    inputs = [x1] if x2 is x1 else [x1, x2]
    args = [*inputs, kernel.raw_precision]

    def gradients(matrix: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((matrix * weights).sum(), args, retain_graph=True)

    got, expected = kernel(x1, x2).to_dense(), dense(kernel, x1, x2)
    assert rel(got, expected) < 1e-12
    assert [rel(a, b) < 1e-11 for a, b in zip(gradients(got), gradients(expected), strict=True)] == [True] * len(args)
    diagonal = torch.diag_embed(kernel(x1, x2, diag=True))
    wanted = torch.diag_embed(expected.diagonal(dim1=-2, dim2=-1))
    assert [rel(a, b) < 1e-11 for a, b in zip(gradients(diagonal), gradients(wanted), strict=True)] == [True] * len(
        args
    )


def test_input_gradient_against_finite_differences() -> None:
    kernel, x = kernel_of(2), seeded(2, 3, seed=1).requires_grad_()
    weights = seeded(4, 4, seed=2)
    gradient = torch.autograd.grad((kernel(x).to_dense() * weights).sum(), x)[0]
    step, numeric = 1e-6, torch.zeros(2, 3, dtype=torch.float64)
    for n, d in [(n, d) for n in range(2) for d in range(3)]:
        shift = torch.zeros(2, 3, dtype=torch.float64)
        shift[n, d] = step
        up, down = (kernel(x.detach() + s * shift).to_dense() for s in (1, -1))
        numeric[n, d] = ((up - down) * weights).sum() / (2 * step)
    assert rel(gradient, numeric) < 1e-7


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.InstanceNorm1d(2, affine=True), nn.GroupNorm(2, 2), nn.BatchNorm1d(2), nn.RMSNorm(8)]
)
def test_input_gradients_for_every_normaliser(norm: nn.Module) -> None:
    """torch's own vmapped and forward-mode formulas are wrong here for LayerNorm and InstanceNorm."""
    net = nn.Sequential(
        nn.Linear(3, 16), nn.Unflatten(1, (2, 8)), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 4), nn.Tanh(),
        nn.Linear(4, 2),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, 0.3, 0.7, generator=generator)
    net = net.double().eval()
    lin = LinearizedNetwork(net, seeded(2, 3, seed=1), groups="tensor")
    x = seeded(2, 3, seed=2).requires_grad_()
    expected = dense_kernel(net, lin, x, x, torch.ones(len(lin.groups.names), dtype=torch.float64))
    weights = seeded(4, 4, seed=3)
    wanted = torch.autograd.grad((expected * weights).sum(), x)[0]
    for budget in ("2GiB", MATRIX_FREE):
        got = torch.autograd.grad((NeuralTangentKernel(lin, max_memory=budget)(x).to_dense() * weights).sum(), x)[0]
        assert rel(got, wanted) < 1e-11
    mean = torch.autograd.grad(LinearizedMean(lin)(x).sum(), x)[0]
    step = 1e-6 * seeded(2, 3, seed=4)
    with torch.no_grad():
        difference = (LinearizedMean(lin)(x + step) - LinearizedMean(lin)(x - step)).sum() / 2
    assert abs((mean * step).sum() / difference - 1) < 1e-6


class ExactModel(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood: GaussianLikelihood, mean: gpytorch.means.Mean, kernel: Kernel):
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = mean, kernel
        self.outputs = 1 if y.dim() == 1 else y.shape[-1]

    def forward(self, x: Tensor) -> MultivariateNormal:
        mean = self.mean_module(x)
        if self.outputs == 1:
            return MultivariateNormal(mean, self.covar_module(x))
        return MultitaskMultivariateNormal(mean, self.covar_module(x))


def likelihood_of(outputs: int) -> GaussianLikelihood:
    if outputs == 1:
        likelihood = GaussianLikelihood().double()
    else:
        likelihood = MultitaskGaussianLikelihood(outputs, has_task_noise=False).double()
    likelihood.noise = torch.tensor(0.04, dtype=torch.float64)
    return likelihood


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("budget", ["2GiB", MATRIX_FREE])
def test_marginal_likelihood_is_the_evidence_with_its_gradient(outputs: int, budget: str | int) -> None:
    kernel, likelihood = kernel_of(outputs, max_memory=budget), likelihood_of(outputs)
    kernel.precision = torch.tensor([3.0, 0.5, 0.2], dtype=torch.float64)
    x, y = seeded(6, 3, seed=1), seeded(6, outputs, seed=2)
    y = y[:, 0] if outputs == 1 else y
    model = ExactModel(x, y, likelihood, LinearizedMean(kernel.lin), kernel).train()
    evidence = ExactMarginalLogLikelihood(likelihood, model)(model(x), y) * y.numel()

    covariance = dense(kernel, x, x) + likelihood.noise.squeeze() * torch.eye(y.numel(), dtype=torch.float64)
    residual = (y - model.mean_module(x)).reshape(-1)
    expected = torch.distributions.MultivariateNormal(torch.zeros_like(residual), covariance).log_prob(residual)
    assert rel(evidence, expected) < 1e-12
    args = (kernel.raw_precision, *likelihood.parameters())
    got, wanted = torch.autograd.grad(evidence, args), torch.autograd.grad(expected, args)
    assert [rel(a, b) < 1e-9 for a, b in zip(got, wanted, strict=True)] == [True] * len(args)


@pytest.mark.parametrize("outputs", [1, 3])
def test_fitting_the_precisions_makes_one_pass_over_the_data(outputs: int) -> None:
    kernel, likelihood = kernel_of(outputs), likelihood_of(outputs)
    x, y = seeded(6, 3, seed=1), seeded(6, outputs, seed=2)
    y = y[:, 0] if outputs == 1 else y
    model = ExactModel(x, y, likelihood, LinearizedMean(kernel.lin), kernel).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    mll = ExactMarginalLogLikelihood(likelihood, model)
    losses = []
    with counted(kernel.lin, "grams", "jvp", "vjp", "jacobian", "__call__") as calls:
        for _ in range(20):
            optimizer.zero_grad()
            loss = -mll(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert calls["grams"] == 1
    assert calls["jvp"] <= 1
    assert calls["vjp"] == calls["jacobian"] == 0
    assert [name for name, _ in model.named_parameters() if "precision" in name] == ["covar_module.raw_precision"]


def test_training_grams_survive_predictions() -> None:
    kernel, likelihood = kernel_of(1), likelihood_of(1)
    x, y = seeded(6, 3, seed=1), seeded(6, seed=2)
    model = ExactModel(x, y, likelihood, LinearizedMean(kernel.lin), kernel)
    with gpytorch.settings.fast_computations(False, False, False):
        model.train()(x).log_prob(y)
        with counted(kernel.lin, "grams") as calls, torch.no_grad():
            assert model.eval()(seeded(3, 3, seed=3)).covariance_matrix.shape == (3, 3)
            model.train()(x).log_prob(y)
        assert calls["grams"] == 2  # (test, train) and (test, test)
        covariance = model.eval()(seeded(3, 3, seed=3)).covariance_matrix
    star = seeded(3, 3, seed=3)
    cross = dense(kernel, star, x)
    prior = dense(kernel, x, x) + 0.04 * torch.eye(6, dtype=torch.float64)
    assert rel(covariance, dense(kernel, star, star) - cross @ torch.linalg.solve(prior, cross.mT)) < 1e-7


def test_the_cache_knows_inputs_by_value() -> None:
    kernel, x = kernel_of(1), seeded(4, 3, seed=1)
    with counted(kernel.lin, "grams") as calls:
        first = kernel(x).to_dense()
        kernel(x.clone()).to_dense()
        kernel.precision = 7.0
        kernel.train().eval()
        second = kernel(x.detach()).to_dense()
        assert calls["grams"] == 1
        x += 1.0
        moved = kernel(x).to_dense()
        assert calls["grams"] == 2
    assert not torch.allclose(first, second)
    assert rel(second, dense(kernel, x - 1, x - 1)) < 1e-12
    assert rel(moved, dense(kernel, x, x)) < 1e-12


def test_the_cache_is_bounded() -> None:
    one = 8 * 3 * 4 * 4
    kernel = kernel_of(1, max_memory="200KiB")
    kernel._grams._limits = (3, 2 * one)
    for seed in range(5):
        kernel(seeded(4, 3, seed=seed)).to_dense()
        assert len(kernel._grams) == min(seed + 1, 2)


def test_a_batch_that_repeats_the_training_inputs_visits_them_once() -> None:
    kernel = kernel_of(2)
    test, train = seeded(5, 2, 3, seed=1), seeded(4, 3, seed=2).repeat(5, 1, 1)
    with counted(kernel.lin, "grams") as calls:
        got = kernel(test, train).to_dense()
    assert calls["grams"] == 1
    assert rel(got, dense(kernel, test, train)) < 1e-12


def test_copies_share_the_network_and_leave_the_cache_behind() -> None:
    kernel, x = kernel_of(2), seeded(4, 3, seed=1)
    expected = kernel(x).to_dense()
    twin = copy.deepcopy(kernel)
    assert twin.lin is kernel.lin
    assert twin.raw_precision is not kernel.raw_precision
    assert len(kernel._grams) == 1
    assert len(twin._grams) == 0
    assert torch.equal(twin(x).to_dense(), expected)
    stored = pickle.dumps(kernel)
    restored = pickle.loads(stored)
    assert len(restored._grams) == 0
    assert torch.equal(restored(x).to_dense(), expected)
    assert len(stored) == len(pickle.dumps(kernel_of(2)))


def test_the_network_is_no_part_of_the_kernel() -> None:
    kernel, x = kernel_of(2), seeded(4, 3, seed=1)
    assert [name for name, _ in kernel.named_parameters()] == ["raw_precision"]
    assert not any("lin" in name for name in kernel.state_dict())
    theta = kernel.lin.theta.clone()
    kernel(x).requires_grad_(True)
    kernel.float()
    assert kernel.lin.dtype == torch.float64
    assert torch.equal(kernel.lin.theta, theta)


def test_state_dict_round_trip() -> None:
    kernel, other = kernel_of(1), NeuralTangentKernel(linearized(1))
    other.load_state_dict(kernel.state_dict())
    assert torch.equal(other.precision, kernel.precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", ["2GiB", MATRIX_FREE])
def test_result_has_the_dtype_of_the_inputs(dtype: torch.dtype, network: torch.dtype, budget: str | int) -> None:
    kernel = NeuralTangentKernel(linearized(2, network), max_memory=budget)
    assert kernel.raw_precision.dtype == network
    x = seeded(3, 3, seed=1, dtype=dtype)
    with gpytorch.settings.lazily_evaluate_kernels(False):
        results = (kernel(x).to_dense(), kernel(x, diag=True).diag_embed(), kernel.point_blocks(x).flatten(0, 1))
    expected = dense_kernel(deep_net(2, network), kernel.lin, x, x, torch.ones(3))
    for result in results:
        assert result.dtype == dtype
        assert rel(result[0, 0].double(), expected[0, 0]) < 1e-5


def test_precisions_over_twenty_four_decades() -> None:
    kernel = NeuralTangentKernel(linearized(1))
    for value in ([1e-12, 1.0, 1e12], torch.tensor([5e-12, 2.0, 3e11]), 4.0):
        kernel.precision = value
        assert rel(kernel.precision, torch.as_tensor(value, dtype=torch.float64).expand(3)) < 1e-14


def test_default_prior_adds_nothing_and_can_be_sampled() -> None:
    kernel, likelihood = kernel_of(1), likelihood_of(1)
    x, y = seeded(4, 3, seed=1), seeded(4, seed=2)
    model = ExactModel(x, y, likelihood, ZeroMean(), kernel).train()
    assert isinstance(kernel.precision_prior, FlatLogPrior)
    mll, output = ExactMarginalLogLikelihood(likelihood, model), model(x)
    assert rel(mll(output, y) * 4, likelihood(output).log_prob(y)) < 1e-14
    sample_all_priors(model)
    first = kernel.precision.clone()
    sample_all_priors(model)
    assert first.unique().numel() == 3
    assert not torch.equal(first, kernel.precision)
    twin = copy.deepcopy(model)
    sample_all_priors(twin)
    assert not torch.equal(twin.covar_module.precision, kernel.precision)


def test_a_prior_of_the_users_own_counts() -> None:
    prior = GammaPrior(2.0, 3.0)
    kernel = NeuralTangentKernel(linearized(1), precision=PRECISION, precision_prior=prior)
    (name, module, registered, closure, _) = next(kernel.named_priors())
    assert name == "precision_prior"
    assert registered is prior
    assert torch.equal(closure(module), kernel.precision)


def test_a_constraint_of_the_users_own_is_respected() -> None:
    kernel = NeuralTangentKernel(linearized(1), precision_constraint=Interval(1e-3, 1e3))
    assert rel(kernel.precision, torch.ones(3, dtype=torch.float64)) < 1e-9
    kernel = NeuralTangentKernel(linearized(1), precision_constraint=Interval(1e-3, 1e3, initial_value=2.0))
    assert rel(kernel.precision, 2 * torch.ones(3, dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], r"precision: expected a number or a shape that expands to \(3,\), got \(2,\)"),
        ([1.0, 0.0, 1.0], r"precision: expected positive finite numbers, got \[1.0, 0.0, 1.0\]"),
        (-1.0, r"precision: expected positive finite numbers"),
        (float("nan"), r"precision: expected positive finite numbers"),
    ],
)
def test_bad_precisions_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralTangentKernel(linearized(1), precision=value)
    kernel = kernel_of(1)
    with pytest.raises(ValueError, match=message):
        kernel.precision = value
    assert rel(kernel.precision, PRECISION) < 1e-14


def test_bad_arguments_are_named() -> None:
    lin = linearized(1)
    with pytest.raises(TypeError, match=r"lin: expected a ntkgp.LinearizedNetwork, got Sequential"):
        NeuralTangentKernel(deep_net(1))
    with pytest.raises(TypeError, match=r"precision_prior: expected a gpytorch Prior, got float"):
        NeuralTangentKernel(lin, precision_prior=1.0)
    with pytest.raises(TypeError, match=r"precision_constraint: expected a gpytorch constraint, got str"):
        NeuralTangentKernel(lin, precision_constraint="positive")
    with pytest.raises(TypeError, match="ard_num_dims"):
        NeuralTangentKernel(lin, ard_num_dims=3)
    with pytest.raises(ValueError, match="max_memory"):
        NeuralTangentKernel(lin, max_memory="lots")
    with pytest.raises(NotImplementedError, match="last_dim_is_batch"):
        NeuralTangentKernel(lin).forward(torch.ones(2, 3), torch.ones(2, 3), last_dim_is_batch=True)
    with pytest.raises(ValueError, match=r"diag=True: expected as many inputs in x1 as in x2, got 2 and 3"):
        NeuralTangentKernel(lin)(torch.ones(2, 3), torch.ones(3, 3), diag=True)
    with pytest.raises(ValueError, match=r"packed \(N, 3\)"):
        NeuralTangentKernel(lin)(torch.ones(2, 5)).to_dense()
