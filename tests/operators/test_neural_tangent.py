"""NeuralTangentOperator: linear_operator's shared suites, and dense float64 references on a deep LayerNorm network."""

from __future__ import annotations

import copy
import pickle
import unittest
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from linear_operator.operators import LinearOperator
from linear_operator.test import linear_operator_test_case as suites
from torch import Tensor

from ntkgp import LinearizedNetwork
from ntkgp.operators import NetworkHandle, NeuralTangentOperator
from tests.operators.networks import deep_net, dense_kernel, linearized, rel, seeded

VARIANCE = torch.tensor([0.7, 2.0, 1.3])


class SquareSuite(suites.LinearOperatorTestCase):
    seed = 0
    should_test_sample = True
    outputs, inputs, inputs_seed = 1, 5, 8
    batch: tuple[int, ...] = ()
    batch_of_inputs = True

    def setUp(self) -> None:
        super().setUp()
        self.net, self.lin = deep_net(self.outputs), linearized(self.outputs)

    def create_linear_op(self) -> LinearOperator:
        x = 2 * seeded(
            *(self.batch if self.batch_of_inputs else ()), self.inputs, 3, seed=self.inputs_seed, dtype=torch.float32
        )
        variance = VARIANCE * seeded(*self.batch, 3, seed=5, dtype=torch.float32).div(4).exp()
        return NeuralTangentOperator(x, x, variance, NetworkHandle(self.lin))

    def evaluate_linear_op(self, op: LinearOperator) -> Tensor:
        x1, x2, variance = op.representation()
        return dense_kernel(self.net, self.lin, x1, x2, variance).float()


class TestSingleOutput(SquareSuite, unittest.TestCase):
    skip_slq_tests = True  # stochastic quadrature runs for three outputs


class TestThreeOutputs(SquareSuite, unittest.TestCase):
    outputs, inputs, inputs_seed = 3, 3, 5


class TestBatch(SquareSuite, unittest.TestCase):
    batch, inputs, skip_slq_tests = (2,), 4, True


class TestBatchOfVariances(SquareSuite, unittest.TestCase):
    outputs, inputs, batch, batch_of_inputs = 3, 2, (2,), False
    skip_slq_tests = True


class RectangularSuite(suites.RectangularLinearOperatorTestCase):
    outputs = 1
    batch: tuple[int, ...] = ()

    def setUp(self) -> None:
        super().setUp()
        self.net, self.lin = deep_net(self.outputs), linearized(self.outputs)

    def create_linear_op(self) -> LinearOperator:
        x1 = seeded(*self.batch, 4, 3, seed=8, dtype=torch.float32)
        x2 = seeded(*self.batch, 3, 3, seed=9, dtype=torch.float32)
        return NeuralTangentOperator(x1, x2, VARIANCE, NetworkHandle(self.lin))

    def evaluate_linear_op(self, op: LinearOperator) -> Tensor:
        x1, x2, variance = op.representation()
        return dense_kernel(self.net, self.lin, x1, x2, variance).float()


class TestRectangular(RectangularSuite, unittest.TestCase):
    pass


class TestRectangularThreeOutputs(RectangularSuite, unittest.TestCase):
    outputs = 3


class TestRectangularBatch(RectangularSuite, unittest.TestCase):
    outputs, batch = 3, (2,)


@contextmanager
def counted(lin: LinearizedNetwork, *names: str) -> Iterator[dict[str, int]]:
    """Calls of some methods of a linearised network."""
    calls = dict.fromkeys(names, 0)

    def spy(name: str):
        method = getattr(type(lin), name)

        def wrapped(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return method(lin, *args, **kwargs)

        return wrapped

    for name in names:
        setattr(lin, name, spy(name))
    try:
        yield calls
    finally:
        for name in names:
            delattr(lin, name)


def operator(outputs: int, budget: str | int = "2GiB", batch: tuple[int, ...] = ()) -> NeuralTangentOperator:
    x1, x2 = seeded(*batch, 5, 3, seed=2), seeded(*batch, 4, 3, seed=3)
    variance = torch.tensor([1e-4, 2.0, 1e4], dtype=torch.float64)
    return NeuralTangentOperator(x1, x2, variance, NetworkHandle(linearized(outputs), budget))


def dense(op: NeuralTangentOperator, outputs: int) -> Tensor:
    return dense_kernel(deep_net(outputs), op.lin, op.x1, op.x2, op.variance)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("budget", ["2GiB", 1])
def test_products_and_entries_are_those_of_the_dense_kernel(
    outputs: int, batch: tuple[int, ...], budget: str | int
) -> None:
    op = operator(outputs, budget, batch)
    expected = dense(op, outputs)
    assert rel(op.to_dense(), expected) < 1e-13
    for columns in (4 * outputs - 1, 40):
        rhs = seeded(*batch, 4 * outputs, columns, seed=6)
        assert rel(op @ rhs, expected @ rhs) < 1e-13
    lhs = seeded(*batch, 5 * outputs, 2, seed=7)
    assert rel(op.mT @ lhs, expected.mT @ lhs) < 1e-13
    square = NeuralTangentOperator(op.x1, op.x1, op.variance, op.handle)
    assert rel(square.diagonal(dim1=-2, dim2=-1), dense(square, outputs).diagonal(dim1=-2, dim2=-1)) < 1e-13
    other = NeuralTangentOperator(op.x1[..., :4, :], op.x2, op.variance, op.handle)
    assert rel(other.diagonal(dim1=-2, dim2=-1), dense(other, outputs).diagonal(dim1=-2, dim2=-1)) < 1e-13


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("budget", ["2GiB", 1])
def test_derivatives_in_inputs_and_variances_are_those_of_the_dense_kernel(
    outputs: int, batch: tuple[int, ...], budget: str | int
) -> None:
    op = operator(outputs, budget, batch)
    args = tuple(arg.clone().requires_grad_() for arg in (op.x1, op.x2, op.variance[..., :]))
    left, right = seeded(*batch, 5 * outputs, 3, seed=6), seeded(*batch, 4 * outputs, 3, seed=7)
    got = NeuralTangentOperator(*args, op.handle)._bilinear_derivative(left, right)
    kernel = dense_kernel(deep_net(outputs), op.lin, *args)
    expected = torch.autograd.grad((left * (kernel @ right)).sum(), args)
    assert [rel(a, b) < 1e-12 for a, b in zip(got, expected, strict=True)] == [True] * 3

    only_variance = (op.x1, op.x2, args[2])
    got = NeuralTangentOperator(*only_variance, op.handle)._bilinear_derivative(left, right)
    assert got[:2] == (None, None)
    assert rel(got[2], expected[2]) < 1e-12


@pytest.mark.parametrize("outputs", [1, 3])
def test_diagonal_is_differentiable_in_inputs_and_variances(outputs: int) -> None:
    op = operator(outputs)
    for shared in (True, False):
        x = op.x1.clone().requires_grad_()
        other = x if shared else (op.x1 + 0.1).requires_grad_()
        variance = op.variance.clone().requires_grad_()
        weights = seeded(5 * outputs, seed=9)
        diagonal = NeuralTangentOperator(x, other, variance, op.handle)._diagonal()
        expected = dense_kernel(deep_net(outputs), op.lin, x, other, variance).diagonal()
        args = (x, variance) if shared else (x, other, variance)
        got = torch.autograd.grad((diagonal * weights).sum(), args)
        wanted = torch.autograd.grad((expected * weights).sum(), args)
        assert [rel(a, b) < 1e-12 for a, b in zip(got, wanted, strict=True)] == [True] * len(args)


def test_derivative_through_linear_operators_own_functions() -> None:
    op = operator(3)
    x, variance = op.x1.clone().requires_grad_(), op.variance.clone().requires_grad_()
    rhs = seeded(15, 2, seed=6)
    square = NeuralTangentOperator(x, x, variance, op.handle).add_jitter(0.3)
    expected = dense_kernel(deep_net(3), op.lin, x, x, variance) + 0.3 * torch.eye(15, dtype=torch.float64)
    got = torch.autograd.grad(square.solve(rhs).square().sum() + square.logdet(), (x, variance))
    wanted = torch.autograd.grad(
        torch.linalg.solve(expected, rhs).square().sum() + torch.logdet(expected), (x, variance)
    )
    assert [rel(a, b) < 1e-9 for a, b in zip(got, wanted, strict=True)] == [True, True]


def test_aligned_slices_stay_matrix_free_and_others_are_right() -> None:
    op = operator(3)
    expected = dense(op, 3)
    part = op[3:12, :6]
    assert isinstance(part, NeuralTangentOperator)
    assert part.x1.shape == (3, 3)
    assert part.x2.shape == (2, 3)
    assert rel(part.to_dense(), expected[3:12, :6]) < 1e-13
    for index in [(slice(1, 12), slice(0, 6)), (slice(0, 15, 2), slice(None)), (slice(-4, None), slice(-3, None))]:
        assert rel(op[index].to_dense(), expected[index]) < 1e-13
    rows, cols = torch.tensor([0, 14, 3, 3]), torch.tensor([11, 2, 2, 0])
    assert rel(op[rows, cols], expected[rows, cols]) < 1e-13
    assert rel(op[rows, :].to_dense(), expected[rows]) < 1e-13


def test_a_row_of_entries_costs_one_pass_forth_and_back() -> None:
    op = operator(3)
    with counted(op.lin, "vjp", "jvp") as calls:
        row = op._get_indices(torch.full((12,), 7), torch.arange(12))
    assert calls == {"vjp": 1, "jvp": 1}
    assert rel(row, dense(op, 3)[7]) < 1e-13


def test_expanded_inputs_are_passed_through_the_network_once() -> None:
    op = operator(3)
    variance = op.variance * torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    batch = NeuralTangentOperator(op.x1, op.x2, variance, op.handle)
    rhs = seeded(3, 12, 1, seed=4)
    with counted(op.lin, "vjp", "jvp") as calls:
        got = batch @ rhs
    assert calls == {"vjp": 1, "jvp": 1}
    assert rel(got, dense(batch, 3) @ rhs) < 1e-13


def test_products_with_as_many_vectors_as_columns_form_the_matrix_and_never_pass_them_through() -> None:
    op = operator(3)
    for columns, passes in ((11, 1), (12, 0), (40, 0)):
        rhs = seeded(12, columns, seed=4)
        with counted(op.lin, "vjp", "jvp") as calls:
            got = op @ rhs
        assert calls == {"vjp": passes, "jvp": passes}
        assert rel(got, dense(op, 3) @ rhs) < 1e-13


def test_a_batch_of_many_vectors_forms_the_matrix_once() -> None:
    op = operator(1)
    rhs = seeded(3, 4, 6, seed=4)
    with counted(op.lin, "weighted_gram") as calls:
        got = op @ rhs
    assert calls == {"weighted_gram": 1}
    assert rel(got, dense(op, 1) @ rhs) < 1e-13


def test_derivatives_with_more_vectors_than_columns_cost_one_pass_per_column() -> None:
    op = operator(1, batch=(2,))
    args = tuple(arg.clone().requires_grad_() for arg in (op.x1, op.x2, op.variance))
    left, right = seeded(2, 5, 30, seed=6), seeded(2, 4, 30, seed=7)
    op = NeuralTangentOperator(*args, op.handle)
    pulled: list[int] = []
    vjp = op.lin.vjp
    op.lin.vjp = lambda x, u: (pulled.append(len(u)), vjp(x, u))[1]  # type: ignore[method-assign]
    try:
        got = op._bilinear_derivative(left, right)
    finally:
        del op.lin.vjp
    assert max(pulled) <= 4
    expected = torch.autograd.grad((left * (dense_kernel(deep_net(1), op.lin, *args) @ right)).sum(), args)
    assert [rel(a, b) < 1e-12 for a, b in zip(got, expected, strict=True)] == [True] * 3


def test_products_with_no_vectors_are_empty() -> None:
    op = operator(3)
    none = torch.zeros(12, 0, dtype=op.dtype, requires_grad=True)
    got = NeuralTangentOperator(op.x1, op.x2, op.variance.clone().requires_grad_(), op.handle) @ none
    assert got.shape == (op.shape[-2], 0)
    assert torch.autograd.grad(got.sum(), none)[0].shape == none.shape


def test_derivatives_with_many_half_precision_vectors_do_not_overflow() -> None:
    x = (1e-3 * seeded(4, 3, seed=8)).half()
    lin = LinearizedNetwork(torch.nn.Linear(3, 1, bias=False), x.float(), groups="single")
    op = NeuralTangentOperator(x, x, torch.ones(1).half().requires_grad_(), NetworkHandle(lin))
    vectors = torch.full((4, 8), 200.0).half()  # LRᵀ has entries of 320,000
    got = op._bilinear_derivative(vectors, vectors)[2]
    expected = 320_000 * x.double().sum(0).square().sum()
    assert rel(got.double(), expected) < 1e-2


def test_half_and_moves_never_touch_the_network() -> None:
    op = operator(2)
    theta = op.lin.theta.clone()
    for moved in (op.half(), op.float(), op.to(dtype=torch.float32), op.clone(), op.detach(), op.cpu()):
        assert moved.lin is op.lin
    assert op.half().dtype == torch.float16
    assert torch.equal(op.lin.theta, theta)
    assert op.lin.dtype == torch.float64
    assert copy.deepcopy(op).lin is op.lin
    restored = pickle.loads(pickle.dumps(op.handle))
    assert torch.equal(restored.lin.theta, theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_inputs_not_of_the_network(dtype: torch.dtype) -> None:
    lin = linearized(2, torch.float32)
    x, variance = seeded(4, 3, seed=1, dtype=dtype), torch.ones(3, dtype=dtype)
    op = NeuralTangentOperator(x, x, variance, NetworkHandle(lin))
    expected = dense_kernel(deep_net(2, torch.float32), lin, x, x, variance)
    for result in (op.to_dense(), op @ torch.eye(8, dtype=dtype), torch.diag(op.diagonal())):
        assert result.dtype == dtype
        assert rel(result[0, 0].double(), expected[0, 0]) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x1": torch.ones(3)}, r"x1: expected packed inputs of shape \(\*batch, N, D\), got \(3,\)"),
        ({"x2": None}, r"x2: expected packed inputs of shape \(\*batch, N, D\), got NoneType"),
        ({"variance": torch.ones(2)}, r"variance: expected a tensor of shape \(\*batch, 3\), got \(2,\)"),
        ({"handle": "net"}, r"handle: expected a ntkgp.operators.NetworkHandle, got str"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    op = operator(1)
    arguments = {"x1": op.x1, "x2": op.x2, "variance": op.variance, "handle": op.handle, **change}
    with pytest.raises(ValueError, match=message):
        NeuralTangentOperator(**arguments)
