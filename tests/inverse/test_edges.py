"""What operators and models of inverse problems refuse, and products that few callers make."""

from __future__ import annotations

import copy

import pytest
import torch

from ntkgp.inverse import DenseOperator, HalfCauchyPrior, ParallelBeam, ScalePrior, Sinogram, estimate_noise
from ntkgp.inverse.products import ForwardLinearOperator

DOUBLE = torch.float64


def operator(rows=5, size=(2, 3)):
    return DenseOperator(torch.randn(rows, 6, dtype=DOUBLE), size)


def test_a_sinogram_and_a_noise_level_are_refused_by_name():
    geometry = ParallelBeam((4, 4), torch.linspace(0, 2, 3))
    data = torch.zeros(geometry.data_shape)
    data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="data: 1 entries are NaN or infinite"):
        Sinogram(data, geometry)
    A = operator()
    with pytest.raises(ValueError, match=r"length_scales.*: expected at least one"):
        estimate_noise(torch.ones(5), A, length_scales=())
    with pytest.raises(TypeError, match=r"A: expected a ntkgp.inverse.ForwardOperator, got Tensor"):
        estimate_noise(torch.ones(5), torch.eye(5))


def test_products_with_one_vector_and_their_derivatives_are_dense_ones():
    matrix = torch.randn(5, 6, dtype=DOUBLE)
    lazy = DenseOperator(matrix, (2, 3)).operator
    assert isinstance(lazy, ForwardLinearOperator)
    x, y = torch.randn(6, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    torch.testing.assert_close(lazy @ x, matrix @ x)
    torch.testing.assert_close(lazy.mT @ y, matrix.mT @ y)
    assert copy.deepcopy(lazy.pair) is lazy.pair
    (nothing,) = lazy._bilinear_derivative(y, x)
    assert nothing is None
    scaled = ForwardLinearOperator(torch.tensor(2.0, dtype=DOUBLE, requires_grad=True), pair=lazy.pair)
    (slope,) = scaled._bilinear_derivative(y, x)
    torch.testing.assert_close(slope, y @ matrix @ x)


def test_priors_print_what_they_are_of():
    assert repr(HalfCauchyPrior(torch.tensor([1.0, 2.0]))) == "HalfCauchyPrior(scale=[1.0, 2.0])"
    assert repr(ScalePrior(2.0)).startswith("ScalePrior(spread=2")
