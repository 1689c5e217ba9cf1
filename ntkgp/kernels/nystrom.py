"""The Nyström approximation of the tangent kernel as a GPyTorch kernel."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import LinearOperator, MatmulLinearOperator, RootLinearOperator
from torch import Tensor

from ntkgp.kernels.neural_tangent import NeuralTangentKernel
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.nystrom import EIGENVALUE_CUT, LandmarkFeatures
from ntkgp.solvers.decompositions import thin_svd

__all__ = ["NystromKernel"]

# Singular values below this fraction of the largest are rounding.
_RANK = 1e-7


class NystromKernel(NeuralTangentKernel):
    r"""
    The tangent kernel projected on the gradients at M landmarks,

    .. math:: \hat k(x, x') = k(x, Z)\, k(Z, Z)^{+}\, k(Z, x'), \qquad 0 \preceq \hat K \preceq K,

    for landmarks that do not depend on the training data of a model. Evaluated as :math:`\varphi(x)\varphi(x')^\top` in
    an orthonormal basis: no inverse, no jitter. Differentiable once with respect to the precisions and, for inputs that
    require gradients, to the inputs.

    :param lin: the linearised network.
    :param landmarks: Z, raw or packed inputs.
    :param num_features: K leading eigenvectors of k(Z, Z) at the initial precisions; None for all rows.
    :param tolerance: eigenvalues below this fraction of the largest are cut.
    :param precision: see :class:`NeuralTangentKernel`, like the other arguments.
    :raises ValueError: no usable landmarks, or a ``batch_shape``.

    Cost: per input one forward pass, C backward chains and products with the landmarks; r ≤ M·C numbers per row.

    Example:
        >>> import torch, ntkgp
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> lin = ntkgp.LinearizedNetwork(net, torch.randn(2, 3))
        >>> NystromKernel(lin, torch.randn(4, 3))(torch.randn(5, 3)).shape
        torch.Size([10, 10])
    """

    def __init__(
        self,
        lin: LinearizedNetwork,
        landmarks: Any,
        num_features: int | None = None,
        tolerance: float = EIGENVALUE_CUT,
        precision: float | Tensor | list[float] | None = None,
        max_memory: str | int | float = "2GiB",
        **kwargs: Any,
    ) -> None:
        super().__init__(lin, precision, max_memory=max_memory, **kwargs)
        if self.batch_shape:
            raise ValueError(
                f"batch_shape: the Nyström kernel has one set of precisions, got {tuple(self.batch_shape)}"
            )
        # Tensors of the features move with the inputs, not with the module: they are no parameters.
        self._features = LandmarkFeatures.build(
            lin, landmarks, precision=self.precision.detach(), num_features=num_features, tolerance=tolerance,
            max_memory=max_memory,
        )  # fmt: skip

    @property
    def landmarks(self) -> Tensor:
        """Z, packed."""
        return self._features.landmarks

    def _sides(self, x: Tensor) -> Tensor:
        """ψ A^1/2 at the present precisions as constants, (*batch, N, D) -> (*batch, N·C, R)."""
        psi = self._features(x.reshape(-1, x.shape[-1]))
        psi = psi.reshape(*x.shape[:-2], x.shape[-2] * self.num_outputs, -1)
        return psi * self.precision.detach().to(psi).rsqrt()[self._features.group]

    def _basis(self) -> Tensor:
        """Q, shape (R, r)."""
        features = self._features
        root = self.precision.detach().to(torch.float64).rsqrt()[features.group]
        left, values = thin_svd(root[:, None] * features.stacked)
        return left[:, values > _RANK * values[0]]

    def _halves(self, side: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (a, b) whose products a1·b2ᵀ give the value and the first derivative in the precisions.

        With P = Q Qᵀ and the precisions' change as a diagonal S, which is the identity now, the kernel moves as
        S P + P S − P S P: the derivative of the projector itself is in it.
        """
        phi = side @ basis
        variance = self.precision.reciprocal().to(side)
        ratio = (variance / variance.detach())[self._features.group]
        moved = (side * ratio) @ basis
        return torch.cat([moved, phi, -phi @ (basis.mT @ (ratio[:, None] * basis))], -1), torch.cat(
            [phi, moved, phi], -1
        )

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor | LinearOperator:
        """Prior covariance between two sets of packed inputs, or the variance of each output with ``diag=True``."""
        if last_dim_is_batch:
            raise NotImplementedError("NystromKernel does not support last_dim_is_batch")
        basis, equal = self._basis(), x1.shape == x2.shape and torch.equal(x1, x2)
        one = self._sides(x1)
        two = one if equal else self._sides(x2)
        if torch.is_grad_enabled() and self.precision.requires_grad:
            left = self._halves(one, basis)[0].to(x1.dtype)
            right = self._halves(two, basis)[1].to(x1.dtype)
        else:
            left, right = (one @ basis).to(x1.dtype), (two @ basis).to(x1.dtype)
            if equal and not diag:
                return RootLinearOperator(left)
        return (left * right).sum(-1) if diag else MatmulLinearOperator(left, right.mT)

    def point_blocks(self, x: Tensor) -> Tensor:
        """Prior covariance of the outputs at single inputs, (*batch, N, D) -> (*batch, N, C, C)."""
        left, right = self._halves(self._sides(x), self._basis())
        c = self.num_outputs
        return (left.unflatten(-2, (-1, c)) @ right.unflatten(-2, (-1, c)).mT).to(x.dtype)
