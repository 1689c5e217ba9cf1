"""NystromKernel against dense formulas and inside GPyTorch models."""

from __future__ import annotations

import copy
import pickle

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal

from ntkgp.kernels import NystromKernel
from tests import nystrom_oracle as oracle
from tests.models.test_nystrom import DOUBLE, N_TEST, Case, close


def kernel_of(case: Case, size: int = 7, **options) -> NystromKernel:
    return NystromKernel(case.lin, case.x[:size], precision=case.precision, **options).double()


def dense(case: Case, size: int = 7) -> oracle.Nystrom:
    return oracle.Nystrom(case.j.view(len(case.x), case.c, -1)[:size].flatten(0, 1), case.entries)


@pytest.mark.parametrize("kind", ["single", "shared"])
@pytest.mark.parametrize("learn", [True, False])
def test_values(kind: str, learn: bool) -> None:
    case = Case(kind)
    kernel = kernel_of(case, tolerance=0.0).requires_grad_(learn)
    close(kernel(case.x_test).to_dense().detach(), dense(case).gram(case.j_test))
    close(kernel(case.x_test, case.x).to_dense().detach(), dense(case).gram(case.j_test, case.j))
    close(kernel(case.x_test, diag=True).detach(), dense(case).gram(case.j_test).diagonal())
    blocks = dense(case).gram(case.j_test).view(N_TEST, case.c, N_TEST, case.c).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    close(kernel.point_blocks(case.x_test).detach(), blocks)
    batch = torch.stack([case.x_test, case.x_test.flip(0)])
    close(kernel(batch).to_dense()[0].detach(), dense(case).gram(case.j_test))


def test_gradients_in_precisions_and_inputs() -> None:
    case = Case("shared")
    kernel = kernel_of(case, size=3, tolerance=0.0)
    weights = torch.randn(18, 18, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

    def value(x: torch.Tensor) -> torch.Tensor:
        return (kernel(x, case.x_test).to_dense() * weights).sum()

    x = case.x[10:16].clone().requires_grad_()
    value(x).backward()
    step = torch.zeros_like(x)
    step[1, 2] = 1e-5
    with torch.no_grad():
        slope = (value(x + step) - value(x - step)) / 2e-5
        assert abs(float(x.grad[1, 2] - slope)) < 1e-5 * (1 + abs(float(slope)))
        raw, gradient = kernel.raw_precision, kernel.raw_precision.grad.clone()
        for g in range(len(raw)):
            original = raw[g].clone()
            raw[g] = original + 1e-5
            high = value(x)
            raw[g] = original - 1e-5
            slope = (high - value(x)) / 2e-5
            raw[g] = original
            assert abs(float(gradient[g] - slope)) < 1e-5 * (1 + float(gradient.abs().max()))


def test_in_an_exact_gp() -> None:
    """Conditioning GPyTorch's ExactGP with K̂ is ELLA."""
    case = Case("single")

    class Model(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(case.x, case.y, case.likelihood())
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel_of(case)

        def forward(self, x: torch.Tensor) -> MultivariateNormal:
            return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    model = Model().eval()
    rows = case.j.view(len(case.x), case.c, -1)[:7].flatten(0, 1)
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
        close(model(case.x_test).covariance_matrix, case.posterior(rows)[0], 1e-6)


def test_a_copy_called_in_inference_mode_first_keeps_its_gradients() -> None:
    case = Case("shared")
    for kernel in (kernel_of(case), pickle.loads(pickle.dumps(kernel_of(case)))):
        with torch.inference_mode():
            expected = kernel(case.x_test).to_dense()
        x = case.x_test.clone().requires_grad_()
        found = kernel(x).to_dense()
        found.sum().backward()
        close(found.detach(), expected.clone())
        assert float(x.grad.abs().max()) > 0
        assert float(kernel.raw_precision.grad.abs().max()) > 0


def test_copies_and_refusals() -> None:
    case = Case("shared")
    kernel = kernel_of(case)
    with torch.no_grad():
        expected = kernel(case.x_test).to_dense()
        assert torch.equal(copy.deepcopy(kernel)(case.x_test).to_dense(), expected)
        assert torch.equal(pickle.loads(pickle.dumps(kernel))(case.x_test).to_dense(), expected)
        added = (kernel + gpytorch.kernels.RBFKernel().double())(case.x_test).to_dense()
    assert added.shape == expected.shape
    with pytest.raises(ValueError, match="batch_shape"):
        NystromKernel(case.lin, case.x[:3], batch_shape=torch.Size([2]))
    with pytest.raises(ValueError, match="NaN"):
        NystromKernel(case.lin, torch.full((2, 3), torch.nan))
