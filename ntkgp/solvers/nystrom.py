"""The inverse of a Nyström approximation: a preconditioner, and a bound of the inverse that it approximates."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkgp.solvers.decompositions import thin_svd

_JITTER = 1e-10


class NystromPreconditioner:
    r"""Products with :math:`(\hat K + D)^{-1}`, :math:`\hat K = K_{XZ}(K_{ZZ} + \epsilon I)^{-1}K_{ZX} \preceq K`.

    The order :math:`\hat K \preceq K` makes it a certificate: :math:`(K + D)^{-1} \preceq (\hat K + D)^{-1}` (law C16).
    It is kept in floating point by the jitter :math:`\epsilon`: what ε takes off :math:`\hat K` exceeds what rounding
    adds to it, also for landmarks that repeat and for a singular :math:`K_{ZZ}`.

    :param cross: :math:`K_{XZ}`, shape (*batch, n, m).
    :param gram: :math:`K_{ZZ}`, shape (*batch, m, m), in the order of the columns of `cross`.
    :param noise: variances D > 0: a number, or shape (n,).
    :param jitter: ε relative to the largest eigenvalue of :math:`K_{ZZ}`.
    :raises ValueError: other shapes, NaN or infinite entries, a noise that is not positive.

    Cost: O(n·m² + m³) once, n·m numbers; then 4·n·m flops per vector. Woodbury's identity with an orthonormal basis, so
    that quadratic forms are sums of squares without cancellation. Nyström: Williams & Seeger 2001; as certificate:
    Artemev et al. 2021, *Tighter bounds on the log marginal likelihood of Gaussian process regression*.

    >>> rows = torch.linspace(0, 1, 6, dtype=torch.float64)
    >>> K = torch.exp(-(rows[:, None] - rows).square())
    >>> inverse = NystromPreconditioner(K[:, ::2], K[::2, ::2], noise=0.1)
    >>> v = torch.ones(6, dtype=torch.float64)
    >>> bool(inverse.quadratic(v) >= v @ torch.linalg.solve(K + 0.1 * torch.eye(6), v))
    True
    """

    def __init__(self, cross: Tensor, gram: Tensor, noise: float | Tensor = 1.0, *, jitter: float = _JITTER) -> None:
        for name, value in (("cross", cross), ("gram", gram)):
            if not isinstance(value, Tensor) or value.ndim < 2:
                came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: expected a matrix, got {came}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}: holds NaN or infinite values")
        n, m = cross.shape[-2:]
        if tuple(gram.shape) != (*cross.shape[:-2], m, m):
            raise ValueError(f"gram: expected shape {(*cross.shape[:-2], m, m)} as of cross, got {tuple(gram.shape)}")
        if not jitter >= 0:
            raise ValueError(f"jitter: expected a number >= 0, got {jitter}")
        self.noise = torch.as_tensor(noise, dtype=torch.float64, device=cross.device)
        if self.noise.ndim > 1 or (self.noise.ndim == 1 and len(self.noise) != n):
            raise ValueError(f"noise: expected a number or shape ({n},), got {tuple(self.noise.shape)}")
        if not bool((self.noise > 0).all()) or not bool(torch.isfinite(self.noise).all()):
            raise ValueError("noise: expected positive finite variances")
        self._scale = self.noise.sqrt().reshape(-1, 1)  # shape: (n, 1) or (1, 1)
        whitened = _nystrom_factor(cross.detach().to(torch.float64), gram.detach().to(torch.float64), jitter)
        basis, triangle = torch.linalg.qr(whitened / self._scale)
        left, values = thin_svd(triangle)
        self.basis = basis @ left  # shape: (*batch, n, min(n, m))
        self.eigenvalues = values.square()  # shape: (*batch, min(n, m))

    @property
    def shape(self) -> torch.Size:
        """(*batch, n, n)."""
        return torch.Size((*self.basis.shape[:-1], self.basis.shape[-2]))

    def __call__(self, rows: Tensor) -> Tensor:
        r""":math:`(\hat K + D)^{-1} V`, shape (*batch, n, k) -> (*batch, n, k)."""
        inside, outside = self.coordinates(rows / self._scale)
        return (outside + self.basis @ (inside / (1.0 + self.eigenvalues).unsqueeze(-1))) / self._scale

    def quadratic(self, rows: Tensor) -> Tensor:
        r""":math:`v^\top(\hat K + D)^{-1}v` of each column: (n,) -> (), (*batch, n, k) -> (*batch, k)."""
        if rows.ndim == 1:
            return self.quadratic(rows.unsqueeze(-1)).squeeze(-1)
        inside, outside = self.coordinates(rows / self._scale)
        return (inside.square() / (1.0 + self.eigenvalues).unsqueeze(-1)).sum(-2) + outside.square().sum(-2)

    def logdet(self) -> Tensor:
        r""":math:`\log\det(\hat K + D)`, shape (*batch)."""
        noise = self.noise.log().sum() if self.noise.ndim else self.basis.shape[-2] * self.noise.log()
        return self.eigenvalues.log1p().sum(-1) + noise

    def whitened_trace(self) -> Tensor:
        r""":math:`\mathrm{tr}(D^{-1}\hat K)`, shape (*batch)."""
        return self.eigenvalues.sum(-1)

    def coordinates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of whitened rows D^-½V in the basis of K̂, and what is outside of it, projected out twice."""
        inside = self.basis.mT @ rows
        rest = rows - self.basis @ inside
        more = self.basis.mT @ rest
        return inside + more, rest - self.basis @ more


def _nystrom_factor(cross: Tensor, gram: Tensor, jitter: float) -> Tensor:
    """F with F Fᵀ = K̂, shape (*batch, n, m)."""
    vectors, scale = inverse_root(gram, jitter)
    return (cross @ vectors) * scale


def inverse_root(gram: Tensor, jitter: float = _JITTER) -> tuple[Tensor, Tensor]:
    """V (*batch, m, m) and c (*batch, 1, m) with V diag(c²) Vᵀ = (K_ZZ + εI)⁻¹; c = 0 where there is no kernel."""
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    values = values.clamp_min(0.0)
    largest = values[..., -1:]
    # Without any kernel at the landmarks there is no approximation: K̂ = 0.
    shifted = torch.where(largest > 0, values + jitter * largest, torch.inf)
    return vectors, shifted.clamp_min(torch.finfo(torch.float64).tiny).rsqrt().unsqueeze(-2)
