"""The sums behind all normalizations' rows, in blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkgp.linearization.rules.affine import affine_terms
from tests.linearization.rules.helper import DOUBLE, error


# Together, several rows a block, several outputs a block, one output a block.
@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (40, 10, 16, 200), (3, 20, 32, 2100), (2, 3, 8, 140_000)])
@pytest.mark.parametrize("over", [2, 3])
def test_blocks(shape, over):
    n, _, a, b = shape
    g, x = torch.randn(shape, dtype=DOUBLE), torch.randn(n, a, b, dtype=DOUBLE)
    found = affine_terms(nn.LayerNorm(1), x, g, over)
    pattern = "nkab,nab->nkb" if over == 2 else "nkab,nab->nka"
    assert error(found["weight"].rows, torch.einsum(pattern, g, x)) < 1e-13
    assert error(found["bias"].rows, torch.einsum(pattern, g, torch.ones_like(x))) < 1e-13


def test_blocks_are_differentiable():
    g = torch.randn(2, 3, 8, 140_000, requires_grad=True)
    x = torch.randn(2, 8, 140_000, requires_grad=True)
    rows = affine_terms(nn.RMSNorm(1), x, g, 3)["weight"].rows
    seed = torch.randn_like(rows)
    found = torch.autograd.grad(rows, (g, x), seed)
    assert torch.allclose(found[0], seed.unsqueeze(-1) * x.unsqueeze(1).detach())
    assert torch.allclose(found[1], torch.einsum("nka,nkat->nat", seed, g.detach()), atol=1e-5)
