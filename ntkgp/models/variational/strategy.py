"""A variational family with a fixed mean, whose covariance never needs an inverse of K(Z, Z)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import LinearOperator, MatmulLinearOperator
from torch import Tensor

from ntkgp.models.posterior import PosteriorCovariance
from ntkgp.models.variational.products import point_blocks

if TYPE_CHECKING:
    from ntkgp.models.variational import VariationalNTKGP


class Reduction(NamedTuple):
    r"""What the inducing variables take from the prior covariance.

    :ivar root: R with A = R Rᵀ, (M', r).
    :ivar kl: :math:`\tfrac12\log\det H - \tfrac12\operatorname{tr}(K_Z A)`, H = I + LᵀK_ZL.
    :ivar gram: K_Z, (M', M').
    """

    root: Tensor
    kl: Tensor
    gram: Tensor


class FixedMeanCovariance(PosteriorCovariance):
    """K − K_xZ A K_Zx over a prior of any kernel; blocks of single inputs form no N × N matrix."""

    def point_blocks(self, num_outputs: int) -> Tensor:
        """The C × C covariances of single inputs, (*batch, N, C, C)."""
        lazy = self.prior
        if not isinstance(lazy, gpytorch.lazy.LazyEvaluatedKernelTensor):
            return super().point_blocks(num_outputs)
        left = self.reduction.left_linear_op.to_dense()
        rows = left.reshape(*left.shape[:-2], -1, num_outputs, left.shape[-1])
        # The lazy tensor holds the active columns only, which the kernel would select once more.
        kernel, active = lazy.kernel, lazy.kernel.active_dims
        try:
            kernel.active_dims = None
            return point_blocks(kernel, lazy.x1) - rows @ rows.mT
        finally:
            kernel.active_dims = active


class FixedMeanStrategy(gpytorch.Module):
    r"""The variational distribution of a Gaussian process with a given mean (VaLLA; Ortega et al. 2024).

    With M' inducing rows (inducing inputs times outputs), a free matrix L and :math:`H = I + L^\top K_Z L`,

    .. math::
        A = L H^{-1} L^\top = (K_Z + (LL^\top)^{-1})^{-1}, \qquad
        \operatorname{cov}(x, x') = K(x, x') - K_{xZ} A K_{Zx'}, \qquad
        \mathrm{KL} = \tfrac12 \log\det H - \tfrac12 \operatorname{tr}(K_Z A):

    a covariance that is positive semi-definite for every L, and no inverse of K_Z, which may be singular.

    :param model: what it belongs to; has ``kernel``, ``lin``, ``predictive_mean`` and ``products``.
    :param inducing_points: packed, (M, D), float64.
    :param rows: M'.
    :param learned: whether the inducing inputs are a parameter.

    Cost: O(M'³ + N·C·M'²) for N inputs, besides K_xZ and the blocks of the prior.
    """

    def __init__(self, model: VariationalNTKGP, inducing_points: Tensor, rows: int, learned: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)
        if learned:
            self.register_parameter("inducing_points", torch.nn.Parameter(inducing_points))
        else:
            self.register_buffer("inducing_points", inducing_points)
        root = torch.zeros(rows, rows, dtype=torch.float64, device=inducing_points.device)
        self.register_parameter("variational_root", torch.nn.Parameter(root))
        self._kept: tuple[list[Tensor], Reduction] | None = None

    @property
    def model(self) -> VariationalNTKGP:
        """What it belongs to."""
        return self._model

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}

    def _reduce(self) -> Reduction:
        gram = self.model.products.inducing(self.inducing_points)
        root = self.variational_root
        inner = root.mT @ gram @ root
        identity = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        factor = torch.linalg.cholesky(identity + 0.5 * (inner + inner.mT))
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        # tr(K_Z A) = tr(I − H⁻¹); each eigenvalue h of H adds ½(log h − 1 + 1/h) ≥ 0.
        logdet = 2 * factor.diagonal().log().sum()
        kl = 0.5 * (logdet - len(inner) + inverse.square().sum())
        return Reduction(root @ inverse.mT, kl, gram)

    def reduction(self) -> Reduction:
        """The present one: with its graph in train mode, kept until something changes in eval mode."""
        if self.training and torch.is_grad_enabled():
            return self._reduce()
        tensors = [self.inducing_points, self.variational_root, *self.model.kernel.parameters()]
        if self._kept is not None and all(map(_unchanged, self._kept[0], tensors)):
            return self._kept[1]
        with torch.inference_mode(False), torch.no_grad():
            found = self._reduce()
            self._kept = [t.detach().clone() for t in tensors], found
        return found

    def kl_divergence(self) -> Tensor:
        r"""KL(q ‖ p) of the inducing variables without the part of their mean, which is fixed.

        It does not hold hyper-parameters of the kernel back: a mean that is given costs nothing, however unlikely it is
        under the prior. Learn them by ``model.fit(..., learn_hyperparameters=True)`` or by the evidence.
        """
        self.model._warn_of_free_hyperparameters()
        return self.reduction().kl

    def covariance(self, x: Tensor, cross: Tensor, found: Reduction) -> LinearOperator:
        """Covariance of the process at packed inputs (*batch, T, D) given K(x, Z), (all T·C, M')."""
        root = (cross @ found.root).reshape(*x.shape[:-2], -1, found.root.shape[-1])
        return FixedMeanCovariance(self.model.kernel(x), MatmulLinearOperator(-root, root.mT))

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The process at packed inputs, (*batch, T, D)."""
        model = self.model
        flat = x.reshape(-1, x.shape[-1])
        cross, found = self.cross(flat), self.reduction()
        return model._distribution(model.predictive_mean(flat, cross), self.covariance(x, cross, found))

    def cross(self, flat: Tensor) -> Tensor:
        """K(x, Z) at packed inputs (N, D); with a graph to Z in train mode only."""
        z = self.inducing_points if self.training else self.inducing_points.detach()
        return self.model.products.cross(flat, z)

    def __call__(self, x: Tensor, prior: bool = False) -> MultivariateNormal:
        """The process, or with ``prior=True`` the prior around the same mean."""
        return self.model.forward(x) if prior else self.forward(x)


def _unchanged(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and old.device == new.device and torch.equal(old, new)
