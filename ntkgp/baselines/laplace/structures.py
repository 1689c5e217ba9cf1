"""Structures of the curvature: full in weight or data space, and its diagonal, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ntkgp.baselines.laplace.rows import Block, Pieces, add_products, cut, pass_room, row_pieces, smallest_room
from ntkgp.baselines.laplace.tangent import DenseView, Tangent, View, curvature_root
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import require
from ntkgp.linearization.statistics import jacobian_rows, rows_at_a_time

# Vectors of one number per weight that are held at once, indices among them; and more while θ⋆ is searched.
_VECTORS, _SEARCHED = 18, 8
# Copies of the rows of one input where they are formed at once: they, a layer's, whitened, a root of Σ times them.
_ROWS = 5


def factor_with_identity(matrices: Tensor) -> Tensor:
    """Cholesky factors of I + A, for positive semidefinite A (..., n, n) up to rounding.

    Where A is larger than 1/ε its rounding outweighs the identity and may leave negative eigenvalues: these count as
    zero, and the factor comes from the QR decomposition of a root of A above the identity, which adds nothing up.
    """
    shifted = matrices.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if not bool((info != 0).any()):
        return factor
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    root = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
    upper = torch.linalg.qr(torch.cat([root, eye.expand_as(root)], -2)).R
    return (upper * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).mT


class Structure(ABC):
    r"""An approximation of the curvature :math:`H = \sum_k w_k H_k` with the posterior precision :math:`H + \Lambda`.

    Regression has one :math:`H_k` per output, with :math:`w_k = 1/\sigma_k^2`; classification has one, with w = 1.

    :param max_memory: bytes for everything: what is held, the vectors of a fit, and the passes.
    :ivar columns: its weights as places in ``lin.theta``, (p,), in its own order.
    :ivar index: the group of each, (p,).
    :ivar seeks_mode: whether θ⋆ is sought also where rows are not kept.
    """

    seeks_mode = True

    def __init__(self, lin: LinearizedNetwork, columns: Tensor | None, classification: bool, max_memory: int) -> None:
        self.lin, self.classification, self.max_memory = lin, classification, max_memory
        self.columns = torch.arange(lin.num_parameters) if columns is None else columns
        self._all = columns is None
        self.index = lin.groups.index[self.columns]
        self.num_channels = 1 if classification else lin.num_outputs
        self.precision = torch.ones(len(self.columns), dtype=torch.float64)
        self.weights = torch.ones(self.num_channels, dtype=torch.float64)

    @property
    def held(self) -> int:
        """Bytes that are held beside the passes: moments, their factors, and the vectors of a fit."""
        # Where rows are kept nevertheless, a quarter of the budget beside them is not used.
        vectors = _VECTORS + _SEARCHED * self.seeks_mode
        return 8 * self.numbers() + 8 * vectors * len(self.columns) + 16 * self.lin.num_parameters

    @abstractmethod
    def numbers(self) -> int:
        """Numbers of the moments and of what is made of them, at their peak."""

    def smallest_room(self) -> int:
        """Bytes of the passes of a single input."""
        return pass_room(self.lin) + _ROWS * 8 * self.lin.num_outputs * self.lin.num_parameters

    @property
    def room(self) -> int:
        """Bytes for passes."""
        return max(self.smallest_room(), self.max_memory - self.held)

    def smallest_budget(self) -> int:
        """Bytes of the structure and the passes of one input."""
        return self.held + self.smallest_room()

    def check_memory(self) -> None:
        """Refuse a budget that does not hold the structure and one input."""
        require(self.smallest_budget(), self.max_memory, self.describe())

    @abstractmethod
    def describe(self) -> str:
        """What takes the memory, for people."""

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
        parts = []
        for chunk in x.split(rows_at_a_time(self.lin, self.room)):
            root = self.roots(self._rows(chunk))
            parts.append(root @ root.mT)
        return torch.cat(parts)

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
        rows = jacobian_rows(self.lin, x, self.room // 4)
        return rows if self._all else rows[..., self.columns]

    def _channels(self, f: Tensor, rows: Tensor) -> list[Tensor]:
        """Rows (·, p) of each channel, whitened for classification."""
        if self.classification:
            return [torch.einsum("bcp,bcr->brp", rows, curvature_root(f)).reshape(-1, rows.shape[-1])]
        return list(rows.unbind(1))


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def white_pieces(structure: Structure, x: Tensor, f: Tensor, extra: int = 0) -> Iterator[tuple[int, Pieces]]:
    """Pieces of the rows of H's root at inputs with outputs f, and how many rows of each may be formed at a time."""
    white = (lambda rows: curvature_root(f[rows])) if structure.classification else None
    for _, step, pieces in row_pieces(structure.lin, x, structure.room, white, extra):
        yield step, pieces


class Primal(Structure):
    """The whole H over its weights, K matrices of p × p. Cost: N·C·p² to gather, p³ for each set of precisions."""

    def numbers(self) -> int:
        """H_k, their sum scaled, its factor, and one on the way."""
        return (self.num_channels + 3) * len(self.columns) ** 2

    def describe(self) -> str:
        """How many weights."""
        return f"the curvature of {len(self.columns):,} weights"

    def begin(self) -> None:
        """Make room for H_k (K, p, p)."""
        p = len(self.columns)
        self.moments = torch.zeros(self.num_channels, p, p, dtype=torch.float64)

    def add(self, f: Tensor, rows: Tensor) -> None:
        """Add the moments of rows."""
        for k, part in enumerate(self._channels(f, rows)):
            self.moments[k].addmm_(part.T, part)

    def _factorise(self) -> None:
        self._scale = self.precision.rsqrt()
        curvature = torch.einsum("k,kij->ij", self.weights, self.moments)
        self._scaled = curvature.mul_(self._scale).mul_(self._scale.unsqueeze(-1))
        self._factor = factor_with_identity(self._scaled)

    def logdet(self) -> float:
        """The log-determinant of I + Λ⁻¹H."""
        return 2 * float(self._factor.diagonal().log().sum())

    def gammas(self) -> tuple[Tensor, Tensor]:
        """tr(HΣ) by group and channel; no difference of large numbers."""
        inverse = torch.cholesky_inverse(self._factor)
        by_group = self.per_group(torch.einsum("ij,ij->i", inverse, self._scaled))
        covariance = inverse.mul_(self._scale).mul_(self._scale.unsqueeze(-1))
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

    def __init__(self, lin: LinearizedNetwork, num_data: int, classification: bool, max_memory: int) -> None:
        super().__init__(lin, None, classification, max_memory)
        self._num_data = num_data

    def numbers(self) -> int:
        """The Grams, the factor of their sum, and three on the way."""
        return (len(self.lin.groups) + 4) * (self._num_data * self.lin.num_outputs) ** 2

    def describe(self) -> str:
        """How many rows."""
        return f"the Grams of {self._num_data:,} × {self.lin.num_outputs} rows"

    def smallest_room(self) -> int:
        """Of the Grams, beside which the matrices to come are not yet held, and of those with one input."""
        n, c = self._num_data, self.lin.num_outputs
        grams = self.lin.gram_memory(n, n) - 8 * len(self.lin.groups) * (n * c) ** 2
        return max(pass_room(self.lin), grams, self.lin.gram_memory(n, 1), self.lin.diagonals_memory(1))

    def collect(self, tangent: Tangent) -> None:
        """Gather Grams and the factor S of the curvature."""
        views = list(tangent)
        # Rows that the fit holds anyway save its passes.
        self.views = views if all(isinstance(view, DenseView) for view in views) else None
        self.x = torch.cat([view.x for view in views])
        f = torch.cat([view.f for view in views])
        self.root = curvature_root(f) if self.classification else None
        size = 8 * len(self.lin.groups) * f.numel() ** 2
        self.grams = self.lin.grams(self.x, max_memory=size + self.room)

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
        inner = self._whiten(torch.einsum("g,gij->ij", self._variance, self.grams))
        inner = self._whiten(inner.T)
        inner = (inner + inner.T).div_(2)
        self._factor = factor_with_identity(inner)

    def logdet(self) -> float:
        """The log-determinant of I + SᵀKS."""
        return 2 * float(self._factor.diagonal().log().sum())

    def gammas(self) -> tuple[Tensor, Tensor]:
        """tr(QK_g)/λ_g by group; by channel the parts of tr(I − (I + SᵀKS)⁻¹)."""
        inverse = torch.cholesky_inverse(self._factor)
        rest = 1 - inverse.diagonal()
        q = self._colour(inverse)
        del inverse
        q = self._colour(q.T)
        by_group = torch.einsum("gij,ij->g", self.grams, q) * self._variance
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
        fits = 32 * len(self._factor) * len(self.columns) <= self.room
        rows = self._rows(self.x).reshape(-1, len(self.columns)) if fits else None
        seen = self._whiten(self._pushed(prior) if rows is None else rows @ prior.T)
        noisy = seen + draw((num_samples, len(seen)), generator).T
        inner = self._colour(torch.cholesky_solve(noisy, self._factor))
        return prior - (self._pulled(inner) if rows is None else inner.T @ rows) / self.precision

    def covariance(self, x: Tensor) -> Tensor:
        """K⋆⋆ − K⋆X Q KX⋆ at single inputs, (N, C, C)."""
        c = self.lin.num_outputs
        least, both = self.lin.gram_memory(len(self.x), 1), self.lin.gram_memory(len(self.x), 2)
        # A second input may be cheaper than the first: layers take other ways for it.
        step = 1 + max(0, self.room // 2 - least) // (4 * max(both - least, 8 * c * len(self._factor)))
        parts = []
        for chunk in x.split(step):
            budget = max(self.room, self.lin.diagonals_memory(len(chunk)))
            own = torch.einsum("g,gncd->ncd", self._variance, self.lin.gram_diagonals(chunk, max_memory=budget))
            cross = self.lin.weighted_gram(self.x, chunk, self._variance, self.room)
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
        self._num_data = len(self.x)


class Diagonal(Structure):
    """The diagonal of H, streamed: K × p numbers. Rows are formed some outputs of some weights at a time.

    :param names: parameter tensors, in the order of `columns`; None for all.
    """

    def __init__(
        self, lin: LinearizedNetwork, columns: Tensor | None, classification: bool, max_memory: int,
        names: frozenset[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(lin, columns, classification, max_memory)
        self._names = names
        self._place = torch.zeros(lin.num_parameters, dtype=torch.long)
        self._place[self.columns] = torch.arange(len(self.columns))

    def numbers(self) -> int:
        """The diagonals."""
        return self.num_channels * len(self.columns)

    def describe(self) -> str:
        """How many weights."""
        return f"the diagonal of the curvature of {len(self.columns):,} weights"

    def smallest_room(self) -> int:
        """Of one input."""
        return smallest_room(self.lin)

    def begin(self) -> None:
        """Make room for the diagonals of H_k."""
        self.moments = torch.zeros(self.num_channels, len(self.columns), dtype=torch.float64)

    def collect(self, tangent: Tangent) -> None:
        """Add the squares of all rows."""
        self.begin()
        for view in tangent:
            if isinstance(view, DenseView):
                self.add(view.f, view.rows)
                continue
            for step, pieces in white_pieces(self, view.x, view.f):
                self.add_pieces(step, pieces)

    def add(self, f: Tensor, rows: Tensor) -> None:
        """Add the squares of rows that are held."""
        for k, part in enumerate(self._channels(f, rows)):
            self.moments[k] += part.square().sum(0)

    def add_pieces(self, step: int, pieces: Pieces) -> None:
        """Add the squares of whitened rows, `step` of each input at a time."""
        for block in pieces.blocks(self._names):
            at = self._place[block.columns]
            for outputs in cut(pieces.num_rows, step):
                squares = block.form(outputs).square_()
                if self.classification:
                    self.moments[0].index_add_(0, at, squares.sum((0, 1)))
                else:
                    self.moments[outputs].index_add_(1, at, squares.sum(0))

    def covariance(self, x: Tensor) -> Tensor:
        """J Σ Jᵀ at single inputs, (N, C, C)."""
        c = self.lin.num_outputs
        out = torch.zeros(len(x), c, c, dtype=torch.float64)
        for rows, step, pieces in row_pieces(self.lin, x, self.room):
            self.add_covariance(out[rows], step, pieces)
        return out

    def add_covariance(self, out: Tensor, step: int, pieces: Pieces) -> None:
        """Add J Σ Jᵀ of its weights, (B, C, C)."""
        for block in pieces.blocks(self._names):
            deviation = self.variance[self._place[block.columns]].sqrt()

            def root(outputs: slice, block: Block = block, deviation: Tensor = deviation) -> Tensor:
                return block.form(outputs).mul_(deviation)

            add_products(out, pieces.num_rows, step, root)

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

    def state(self) -> dict[str, Tensor]:
        """The diagonals."""
        return {"moments": self.moments}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back the diagonals."""
        self.moments = state["moments"]
