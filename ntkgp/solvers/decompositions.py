"""Matrix decompositions that do not give up."""

from __future__ import annotations

import scipy
import torch
from torch import Tensor


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (N, K) and singular values (K,) of an (N, M) matrix, K = min(N, M), largest first.

    Divide and conquer, as LAPACK's ``gesdd`` behind torch has it, was seen to fail on finite matrices with many equal
    singular values (nearly orthonormal columns); these go by QR iterations (``gesvd``), about four times as slow.

    :raises torch.linalg.LinAlgError: a matrix of which derivatives are asked, or with numbers that are not finite.

    Cost: O(N·M·K).
    """
    try:
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        if (matrix.requires_grad and torch.is_grad_enabled()) or not bool(matrix.isfinite().all()):
            raise
        plain = matrix.detach().cpu().numpy()
        found = scipy.linalg.svd(plain, full_matrices=False, lapack_driver="gesvd", check_finite=False)
        left, values = (torch.as_tensor(part.copy()).to(matrix) for part in found[:2])
    return left, values
