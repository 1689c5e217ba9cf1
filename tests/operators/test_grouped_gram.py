"""GroupedGramOperator: linear_operator's shared suites, and dense float64 references."""

from __future__ import annotations

import unittest

import pytest
import torch
from linear_operator.operators import LinearOperator, MulLinearOperator
from linear_operator.test import linear_operator_test_case as suites
from torch import Tensor

from ntkgp.operators import GroupedGramOperator
from tests.operators.networks import deep_net, dense_kernel, linearized, rel, seeded


def dense(grams: Tensor, variance: Tensor) -> Tensor:
    return sum(v[..., None, None] * k for v, k in zip(variance.unbind(-1), grams.unbind(-3), strict=True))


class SquareSuite(suites.LinearOperatorTestCase):
    seed = 0
    should_test_sample = True
    batch: tuple[int, ...] = ()
    shared_grams = False

    def create_linear_op(self) -> LinearOperator:
        root = seeded(*(() if self.shared_grams else self.batch), 3, 6, 8, seed=4, dtype=torch.float32)
        variance = seeded(*self.batch, 3, seed=5, dtype=torch.float32).exp()
        return GroupedGramOperator(root @ root.mT + 0.5 * torch.eye(6), variance)

    def evaluate_linear_op(self, op: LinearOperator) -> Tensor:
        return dense(*op.representation())


class TestSquare(SquareSuite, unittest.TestCase):
    pass


class TestBatch(SquareSuite, unittest.TestCase):
    batch = (3,)


class TestBatchOfVariances(SquareSuite, unittest.TestCase):
    batch = (3,)
    shared_grams = True


class TestTwoBatchDimensions(SquareSuite, unittest.TestCase):
    batch = (2, 3)
    skip_slq_tests = True


class RectangularSuite(suites.RectangularLinearOperatorTestCase):
    batch: tuple[int, ...] = ()

    def create_linear_op(self) -> LinearOperator:
        grams = seeded(*self.batch, 3, 6, 4, seed=4, dtype=torch.float32)
        return GroupedGramOperator(grams, seeded(*self.batch, 3, seed=5, dtype=torch.float32).exp())

    def evaluate_linear_op(self, op: LinearOperator) -> Tensor:
        return dense(*op.representation())


class TestRectangular(RectangularSuite, unittest.TestCase):
    pass


class TestRectangularBatch(RectangularSuite, unittest.TestCase):
    batch = (2, 3)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sum_of_real_grams_is_the_dense_kernel(outputs: int, dtype: torch.dtype) -> None:
    net, lin = deep_net(outputs), linearized(outputs)
    x1, x2, variance = seeded(5, 3, seed=2), seeded(4, 3, seed=3), torch.tensor([1e-4, 2.0, 1e4], dtype=torch.float64)
    operator = GroupedGramOperator(lin.grams(x1, x2), variance.to(dtype))
    expected = dense_kernel(net, lin, x1, x2, variance)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert operator.dtype == dtype
    assert rel(operator.to_dense().double(), expected) < tolerance
    rhs = seeded(4 * outputs, 2, seed=6)
    assert rel((operator @ rhs.to(dtype)).double(), expected @ rhs) < tolerance


@pytest.mark.parametrize("batch", [(), (2,)])
def test_derivatives_in_variances_and_grams_are_those_of_the_dense_sum(batch: tuple[int, ...]) -> None:
    grams = seeded(*batch, 3, 6, 4, seed=1).requires_grad_()
    variance = seeded(*batch, 3, seed=2).exp().requires_grad_()
    left, right = seeded(*batch, 6, 5, seed=3), seeded(*batch, 4, 5, seed=4)
    got = GroupedGramOperator(grams, variance)._bilinear_derivative(left, right)
    expected = torch.autograd.grad((left * (dense(grams, variance) @ right)).sum(), (grams, variance))
    assert all(rel(a, b) < 1e-13 for a, b in zip(got, expected, strict=True))


def test_the_sum_is_formed_once_and_again_only_for_gradients() -> None:
    operator = GroupedGramOperator(seeded(2, 4, 4, seed=1), seeded(2, seed=2).exp().requires_grad_())
    with torch.no_grad():
        first = operator.to_dense()
        assert operator.to_dense() is first
        operator._matmul(seeded(4, 1, seed=3))
        assert operator.to_dense() is first
    assert operator.to_dense().requires_grad
    assert operator.to_dense() is operator.to_dense()


def test_expanded_grams_are_not_copied() -> None:
    grams = seeded(2, 4, 4, seed=1)
    operator = GroupedGramOperator(grams, seeded(5, 2, seed=2).exp())
    assert operator.shape == (5, 4, 4)
    assert operator.grams.data_ptr() == grams.data_ptr()
    assert rel(operator.to_dense(), dense(operator.grams, operator.variance)) < 1e-14


def test_elementwise_product_is_exact_for_singular_grams() -> None:
    root = seeded(2, 8, 3, seed=1)
    a = GroupedGramOperator(root @ root.mT, seeded(2, seed=2).exp())
    product = a * a
    assert not isinstance(product, MulLinearOperator)
    assert rel(product.to_dense(), a.to_dense().square()) < 1e-15


@pytest.mark.parametrize(
    ("grams", "variance", "message"),
    [
        (torch.ones(4, 4), torch.ones(4), r"grams: expected a tensor of shape \(\*batch, G, n, m\), got \(4, 4\)"),
        (torch.ones(2, 4, 4), torch.ones(3), r"variance: expected a tensor of shape \(\*batch, 2\), got \(3,\)"),
        (torch.ones(2, 4, 4), 1.0, r"variance: expected a tensor of shape \(\*batch, 2\), got float"),
    ],
)
def test_bad_shapes_are_named(grams: Tensor, variance: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedGramOperator(grams, variance)
