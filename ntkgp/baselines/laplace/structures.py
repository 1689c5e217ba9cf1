"""Structures of the curvature: full in weight or data space, and its diagonal, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ntkgp.baselines.laplace.tangent import DenseView, Tangent, View, curvature_root
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import format_memory
from ntkgp.linearization.statistics import jacobian_rows, rows_at_a_time


def factor_with_identity(matrices: Tensor) -> Tensor:
    """Cholesky factors of I + A, for positive semidefinite A (..., n, n) up to rounding.

    Where A is larger than 1/ε its rounding outweighs the identity and may leave negative eigenvalues: these count as
    zero, and the factor comes from the QR decomposition of a root of A above the identity, which adds nothing up.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    factor, info = torch.linalg.cholesky_ex(matrices + eye)
    if not bool((info != 0).any()):
        return factor
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    root = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
    upper = torch.linalg.qr(torch.cat([root, eye.expand_as(root)], -2)).R
    return (upper * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).mT


class Structure(ABC):
    r"""An approximation of the curvature :math:`H = \sum_k w_k H_k` with the posterior precision :math:`H + \Lambda`.

    Regression has one :math:`H_k` per output, with :math:`w_k = 1/\sigma_k^2`; classification has one, with w = 1.

    :ivar columns: its weights as places in ``lin.theta``, (p,), in its own order.
    :ivar index: the group of each, (p,).
    """

    def __init__(self, lin: LinearizedNetwork, columns: Tensor | None, classification: bool, max_memory: int) -> None:
        self.lin, self.classification, self.max_memory = lin, classification, max_memory
        self.columns = torch.arange(lin.num_parameters) if columns is None else columns
        self._all = columns is None
        self.index = lin.groups.index[self.columns]
        self.num_channels = 1 if classification else lin.num_outputs
        self.precision = torch.ones(len(self.columns), dtype=torch.float64)
        self.weights = torch.ones(self.num_channels, dtype=torch.float64)

    def per_group(self, values: Tensor) -> Tensor:
        """Sums (G,) of values (p,)."""
        return torch.zeros(len(self.lin.groups), dtype=torch.float64).index_add(0, self.index, values)

    def update(self, precision: Tensor, weights: Tensor) -> None:
        """Take the prior precisions (G,) and the weights (K,) of the channels."""
        self.group_precision, self.weights = precision, weights
        self.precision = precision[self.index]
        self._factorise()

    def collect(self, tangent: Tangent) -> None:
        """Gather H_k from the data, in one pass over few rows at a time."""
        self.begin()
        for view in tangent:
            for f, rows in tangent.blocks(view):
                self.add(f, rows)

    def begin(self) -> None:
        """Start to gather."""
        raise NotImplementedError

    def add(self, f: Tensor, rows: Tensor) -> None:
        """Add outputs (B, C) with their rows (B, C, p)."""
        raise NotImplementedError

    @abstractmethod
    def _factorise(self) -> None:
        """Prepare what depends on precisions and noise."""

    @abstractmethod
    def logdet(self) -> float:
        """The log-determinant of I + Λ⁻¹H."""

    @abstractmethod
    def gammas(self) -> tuple[Tensor, Tensor]:
        """Effective dimensions tr(HΣ), by group (G,) and by channel (K,)."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """Σ v."""

    @abstractmethod
    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of N(0, Σ), (S, p)."""

    def covariance(self, x: Tensor) -> Tensor:
        """J Σ Jᵀ at single inputs, (N, C, C)."""
        chunks = x.split(rows_at_a_time(self.lin, self.max_memory))
        roots = (self.roots(self._rows(chunk)) for chunk in chunks)
        return torch.cat([root @ root.mT for root in roots])

    def roots(self, rows: Tensor) -> Tensor:
        """Rows (N, C, p) times a root of Σ."""
        raise NotImplementedError

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What the data left behind."""

    @abstractmethod
    def load(self, state: dict[str, Tensor]) -> None:
        """Take back :meth:`state`."""

    def _rows(self, x: Tensor) -> Tensor:
        rows = jacobian_rows(self.lin, x, self.max_memory)
        return rows if self._all else rows[..., self.columns]

    def _need(self, numbers: int, what: str) -> None:
        if 8 * numbers > self.max_memory:
            raise ValueError(
                f"max_memory: {what} needs {format_memory(8 * numbers)}, more than {format_memory(self.max_memory)}; "
                "choose fewer weights or another structure"
            )

    def _channels(self, f: Tensor, rows: Tensor) -> list[Tensor]:
        """Rows (·, p) of each channel, whitened for classification."""
        if self.classification:
            return [torch.einsum("bcp,bcr->brp", rows, curvature_root(f)).reshape(-1, rows.shape[-1])]
        return list(rows.unbind(1))


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Primal(Structure):
    """The whole H over its weights, K matrices of p × p. Cost: N·C·p² to gather, p³ for each set of precisions."""

    def begin(self) -> None:
        """Make room for H_k (K, p, p)."""
        p = len(self.columns)
        self._need((self.num_channels + 3) * p * p, f"curvature of {p} weights")
        self.moments = torch.zeros(self.num_channels, p, p, dtype=torch.float64)

    def add(self, f: Tensor, rows: Tensor) -> None:
        """Add the moments of rows."""
        for k, part in enumerate(self._channels(f, rows)):
            self.moments[k].addmm_(part.T, part)

    def _factorise(self) -> None:
        self._scale = self.precision.rsqrt()
        curvature = torch.einsum("k,kij->ij", self.weights, self.moments)
        scaled = curvature * self._scale * self._scale.unsqueeze(-1)
        self._scaled = scaled
        self._factor = factor_with_identity(scaled)

    def logdet(self) -> float:
        """The log-determinant of I + Λ⁻¹H."""
        return 2 * float(self._factor.diagonal().log().sum())

    def gammas(self) -> tuple[Tensor, Tensor]:
        """tr(HΣ) by group and channel; no difference of large numbers."""
        inverse = torch.cholesky_inverse(self._factor)
        by_group = self.per_group((inverse * self._scaled).sum(-1))
        covariance = inverse * self._scale * self._scale.unsqueeze(-1)
        return by_group, torch.einsum("kij,ij->k", self.moments, covariance) * self.weights

    def solve(self, v: Tensor) -> Tensor:
        """Σ v."""
        return torch.cholesky_solve((self._scale * v).unsqueeze(-1), self._factor).squeeze(-1) * self._scale

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of N(0, Σ): Λ^-½ L⁻ᵀ ε."""
        noise = draw((len(self.columns), num_samples), generator)
        return torch.linalg.solve_triangular(self._factor.T, noise, upper=True).T * self._scale

    def roots(self, rows: Tensor) -> Tensor:
        """Rows times Λ^-½ L⁻ᵀ."""
        flat = (rows * self._scale).reshape(-1, rows.shape[-1])
        return torch.linalg.solve_triangular(self._factor, flat.T, upper=False).T.reshape(rows.shape)

    def state(self) -> dict[str, Tensor]:
        """H_k."""
        return {"moments": self.moments}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back H_k."""
        self.moments = state["moments"]


class Dual(Structure):
    """The whole H in data space, by per-group Grams G × NC × NC; weights are touched by passes only."""

    views: list[View] | None = None

    def collect(self, tangent: Tangent) -> None:
        """Gather Grams and the factor S of the curvature."""
        views = list(tangent)
        # Rows that the fit holds anyway save its passes.
        self.views = views if all(isinstance(view, DenseView) for view in views) else None
        self.x = torch.cat([view.x for view in views])
        f = torch.cat([view.f for view in views])
        n, c = f.shape
        self._need((len(self.lin.groups) + 3) * (n * c) ** 2, f"the Grams of {n} × {c} rows")
        self.root = curvature_root(f) if self.classification else None
        self.grams = self.lin.grams(self.x, max_memory=self.max_memory)

    def _whiten(self, rows: Tensor) -> Tensor:
        """Sᵀ times (NC, ·)."""
        c = self.lin.num_outputs
        parts = rows.reshape(-1, c, rows.shape[-1])
        if self.root is None:
            return (parts * self.weights.sqrt().unsqueeze(-1)).reshape(rows.shape)
        return (self.root.mT @ parts).reshape(rows.shape)

    def _colour(self, rows: Tensor) -> Tensor:
        """S times (NC, ·)."""
        if self.root is None:
            return self._whiten(rows)
        return (self.root @ rows.reshape(-1, self.lin.num_outputs, rows.shape[-1])).reshape(rows.shape)

    def _factorise(self) -> None:
        self._variance = self.group_precision.reciprocal()
        kernel = torch.einsum("g,gij->ij", self._variance, self.grams)
        inner = self._whiten(self._whiten(kernel).T)
        inner = (inner + inner.T) / 2
        self._factor = factor_with_identity(inner)

    def logdet(self) -> float:
        """The log-determinant of I + SᵀKS."""
        return 2 * float(self._factor.diagonal().log().sum())

    def gammas(self) -> tuple[Tensor, Tensor]:
        """tr(QK_g)/λ_g by group; by channel the parts of tr(I − (I + SᵀKS)⁻¹)."""
        inverse = torch.cholesky_inverse(self._factor)
        q = self._colour(self._colour(inverse).T)
        by_group = torch.einsum("gij,ij->g", self.grams, q) * self._variance
        rest = 1 - inverse.diagonal()
        return by_group, rest.sum().reshape(1) if self.classification else rest.reshape(-1, self.num_channels).sum(0)

    def _pushed(self, v: Tensor) -> Tensor:
        if self.views is not None and v.ndim == 1:
            return torch.cat([view.jvp(v) for view in self.views]).reshape(-1, 1)
        out = self.lin.jvp(self.x, v.to(self.lin.dtype)).double()
        return out.reshape(-1, 1) if v.ndim == 1 else out.reshape(len(v), -1).T

    def _pulled(self, u: Tensor) -> Tensor:
        """Jᵀu for (NC, S) -> (S, P)."""
        parts = u.T.reshape(u.shape[1], len(self.x), -1)
        if self.views is not None and len(parts) == 1:
            pieces = parts[0].split([len(view.x) for view in self.views])
            return torch.stack([view.vjp(u) for view, u in zip(self.views, pieces, strict=True)]).sum(0, keepdim=True)
        return self.lin.vjp(self.x, parts.to(self.lin.dtype)).double()

    def solve(self, v: Tensor) -> Tensor:
        """Σ v = Λ⁻¹v − Λ⁻¹Jᵀ Q JΛ⁻¹v."""
        prior = v / self.precision
        inner = torch.cholesky_solve(self._whiten(self._pushed(prior)), self._factor)
        return prior - self._pulled(self._colour(inner))[0] / self.precision

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of N(0, Σ) by Matheron's rule: a draw of the prior less what noisy data say of it."""
        prior = draw((num_samples, len(self.columns)), generator) * self.precision.rsqrt()
        # Dense rows serve all draws; else every draw takes two passes.
        fits = 32 * len(self._factor) * len(self.columns) <= self.max_memory
        rows = self._rows(self.x).reshape(-1, len(self.columns)) if fits else None
        seen = self._whiten(self._pushed(prior) if rows is None else rows @ prior.T)
        noisy = seen + draw((num_samples, len(seen)), generator).T
        inner = self._colour(torch.cholesky_solve(noisy, self._factor))
        return prior - (self._pulled(inner) if rows is None else inner.T @ rows) / self.precision

    def covariance(self, x: Tensor) -> Tensor:
        """K⋆⋆ − K⋆X Q KX⋆ at single inputs, (N, C, C)."""
        c = self.lin.num_outputs
        step = max(1, self.max_memory // (64 * c * len(self._factor)))
        parts = []
        for chunk in x.split(step):
            own = torch.einsum(
                "g,gncd->ncd", self._variance, self.lin.gram_diagonals(chunk, max_memory=self.max_memory)
            )
            cross = self.lin.weighted_gram(self.x, chunk, self._variance, self.max_memory)
            roots = torch.linalg.solve_triangular(self._factor, self._whiten(cross), upper=False)
            roots = roots.T.reshape(len(chunk), c, -1)
            parts.append(own - roots @ roots.mT)
        return torch.cat(parts)

    def state(self) -> dict[str, Tensor]:
        """Inputs, factor and Grams."""
        return {"x": self.x, "grams": self.grams} | ({} if self.root is None else {"root": self.root})

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back inputs, factor and Grams."""
        self.x, self.grams, self.root = state["x"], state["grams"], state.get("root")


class Diagonal(Structure):
    """The diagonal of H, streamed: K × p numbers."""

    def begin(self) -> None:
        """Make room for the diagonals of H_k."""
        self.moments = torch.zeros(self.num_channels, len(self.columns), dtype=torch.float64)

    def add(self, f: Tensor, rows: Tensor) -> None:
        """Add the squares of rows."""
        for k, part in enumerate(self._channels(f, rows)):
            self.moments[k] += part.square().sum(0)

    def _factorise(self) -> None:
        self._curvature = self.weights @ self.moments
        self.variance = 1 / (self._curvature + self.precision)

    def logdet(self) -> float:
        """Σ log(1 + H_ii/λ_i)."""
        return float(torch.log1p(self._curvature / self.precision).sum())

    def gammas(self) -> tuple[Tensor, Tensor]:
        """Σ H_ii Σ_ii by group and channel."""
        return self.per_group(self._curvature * self.variance), self.weights * (self.moments @ self.variance)

    def solve(self, v: Tensor) -> Tensor:
        """Σ v."""
        return v * self.variance

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Independent draws."""
        return draw((num_samples, len(self.columns)), generator) * self.variance.sqrt()

    def roots(self, rows: Tensor) -> Tensor:
        """Rows times the standard deviations."""
        return rows * self.variance.sqrt()

    def state(self) -> dict[str, Tensor]:
        """The diagonals."""
        return {"moments": self.moments}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back the diagonals."""
        self.moments = state["moments"]
