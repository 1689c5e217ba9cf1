"""The Nyström preconditioner against dense formulas, and the order that makes it a certificate."""

import pytest
import torch

from ntkgp.solvers import NystromPreconditioner

DOUBLE = torch.float64


def kernel(n: int, rank: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return rows @ torch.logspace(0, -4, rank, dtype=DOUBLE).diag() @ rows.T


@pytest.mark.parametrize("noise", [0.3, torch.linspace(0.1, 2, 20, dtype=DOUBLE)])
def test_equals_the_dense_formulas(noise):
    k, chosen = kernel(20, 30), torch.tensor([0, 4, 9, 13])
    inverse = NystromPreconditioner(k[:, chosen], k[chosen][:, chosen], noise, jitter=0.0)
    approximation = k[:, chosen] @ torch.linalg.solve(k[chosen][:, chosen], k[chosen])
    diagonal = torch.as_tensor(noise, dtype=DOUBLE).expand(20)
    dense = approximation + diagonal.diag()
    v = torch.randn(20, 3, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    assert torch.allclose(inverse(v), torch.linalg.solve(dense, v), rtol=1e-8)
    assert torch.allclose(inverse.quadratic(v), (v * torch.linalg.solve(dense, v)).sum(0), rtol=1e-8)
    assert torch.allclose(inverse.quadratic(v[:, 0]), inverse.quadratic(v)[0])
    assert torch.allclose(inverse.logdet(), torch.logdet(dense), rtol=1e-9)
    assert torch.allclose(inverse.whitened_trace(), (approximation.diagonal() / diagonal).sum(), rtol=1e-9)
    assert inverse.shape == (20, 20)


@pytest.mark.parametrize("rank", [3, 10, 40])
@pytest.mark.parametrize("chosen", [[0], [0, 0, 0, 5], list(range(12)) * 2, list(range(40))])
def test_never_above_the_kernel_also_for_repeated_landmarks(rank, chosen):
    k, noise = 1e4 * kernel(40, rank), 1e-3
    inverse = NystromPreconditioner(k[:, chosen], k[chosen][:, chosen], noise)
    below = noise * inverse.basis @ inverse.eigenvalues.diag() @ inverse.basis.T
    values = torch.linalg.eigvalsh(k - (below + below.T) / 2)
    assert values[0] >= -1e-14 * torch.linalg.eigvalsh(k)[-1]  # rounding of the comparison itself
    if len(set(chosen)) >= rank:  # all of K, but for the jitter
        assert values[-1] <= 1e-8 * torch.linalg.eigvalsh(k)[-1]


def test_batches():
    ks = torch.stack([kernel(12, 15, seed) for seed in range(3)])
    v = torch.randn(3, 12, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    together = NystromPreconditioner(ks[:, :, :4], ks[:, :4, :4], 0.5)
    for entry in range(3):
        alone = NystromPreconditioner(ks[entry, :, :4], ks[entry, :4, :4], 0.5)
        assert torch.allclose(together(v)[entry], alone(v[entry]))
        assert torch.allclose(together.quadratic(v)[entry], alone.quadratic(v[entry]))
        assert torch.allclose(together.logdet()[entry], alone.logdet())


def test_landmarks_without_any_kernel():
    inverse = NystromPreconditioner(torch.zeros(5, 2), torch.zeros(2, 2), 0.5)
    assert torch.allclose(inverse(torch.ones(5, 1, dtype=DOUBLE)), torch.full((5, 1), 2.0, dtype=DOUBLE), rtol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(5), torch.ones(1, 1)), "cross: expected a matrix"),
        ((torch.ones(5, 2), torch.ones(3, 3)), "gram: expected shape"),
        ((torch.full((5, 2), torch.nan), torch.ones(2, 2)), "cross: holds NaN"),
        ((torch.ones(5, 2), torch.ones(2, 2), 0.0), "noise: expected positive"),
        ((torch.ones(5, 2), torch.ones(2, 2), torch.ones(4)), "noise: expected a number or shape"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        NystromPreconditioner(*arguments)


def test_bad_jitter():
    with pytest.raises(ValueError, match="jitter: expected a number >= 0"):
        NystromPreconditioner(torch.ones(5, 2), torch.ones(2, 2), jitter=-1.0)
