"""Singular values where torch's routine gives up."""

from __future__ import annotations

import pytest
import torch

from ntkgp.solvers.decompositions import thin_svd


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
@pytest.mark.parametrize("fails", [False, True])
def test_thin_svd(shape: tuple[int, int], fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    expected = torch.linalg.svdvals(matrix)

    def refuse(*_, **__):
        raise torch.linalg.LinAlgError("failed to converge")

    if fails:  # gesdd does on some orthonormal columns, depending on their place in memory
        monkeypatch.setattr(torch.linalg, "svd", refuse)
    left, values = thin_svd(matrix)
    assert left.shape == (shape[0], min(shape))
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((left * values.square()) @ left.T, matrix @ matrix.T, rtol=1e-12, atol=1e-12)
    if fails:
        for bad in (matrix.clone().requires_grad_(), matrix.fill_(torch.nan)):
            with pytest.raises(torch.linalg.LinAlgError):
                thin_svd(bad)
