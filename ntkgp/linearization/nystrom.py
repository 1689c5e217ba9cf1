"""Orthonormal directions of the weights spanned by the gradients at landmarks, one set per parameter group."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import scipy
import torch
from torch import Tensor

from ntkgp.linearization.grams.factors import Factors
from ntkgp.linearization.grams.features import room_of_features
from ntkgp.linearization.memory import format_memory, parse_memory

if TYPE_CHECKING:
    from ntkgp.linearization.network import LinearizedNetwork

_T = TypeVar("_T")
EIGENVALUE_CUT = 1e-10
_NO_GRADIENTS = "landmarks: the network's gradients are zero at all of them"
# Below so many rows a whole eigendecomposition is no slower than an iterative one.
_DENSE_ROWS = 1000
# Mixtures of rows that are pulled back together: of more, the copies on the way would be what takes memory.
_PULLED = 4


def _kept(function: Callable[[Any], _T]) -> cached_property[_T]:
    """A property computed once, whose tensors may enter a graph even where it was first asked for in inference mode."""

    @wraps(function)
    def compute(self: Any) -> _T:
        with torch.inference_mode(False), torch.no_grad():
            return function(self)

    return cached_property(compute)


class LandmarkFeatures:
    r"""Features :math:`\psi_g(x) = J_g(x) D_g^\top`, with orthonormal rows of :math:`D_g` that span the landmarks.

    Landmarks Z give the rows :math:`J_u = W^\top J_Z` of weight space: all rows of Z (W = I), or K mixtures of them. In
    every group :math:`J_{u,g} J_{u,g}^\top = U_g p_g U_g^\top`, and with :math:`D_g = p_g^{-1/2} U_g^\top J_{u,g}` and
    :math:`T_g = p_g^{1/2} U_g^\top`

    .. math:: J_{u,g} = T_g^\top D_g, \qquad J_g(x) J_{u,g}^\top = \psi_g(x) T_g .

    Sums of :math:`\psi\psi^\top` are therefore as well conditioned as the kernel itself, where those of
    :math:`J(x)J_u^\top` would square its condition number; and for any precisions the Nyström kernel is
    :math:`\hat K = \psi A^{1/2} Q Q^\top A^{1/2} \psi^\top` with Q orthonormal, :math:`A = \Lambda^{-1}` and
    :math:`A^{1/2} T = Q R`: nothing is inverted.

    :param lin: the linearised network.
    :param landmarks: Z, packed, shape (M, D).
    :param outputs: index of the one output that a landmark stands for, shape (M,); None for all C.
    :param mixing: W, shape (m, K), m = M·C or M rows; None for all rows.
    :param bases: :math:`U_g p_g^{-1/2}` of each group, shapes (K, r_g).
    :param coordinates: :math:`T_g` of each group, shapes (r_g, K).
    :param theta: :math:`D_g\tilde\theta_g`, shape (R,), R = Σ r_g.
    :param max_memory: budget for what is kept of the landmarks and for one block of features.
    """

    def __init__(
        self,
        lin: LinearizedNetwork,
        landmarks: Tensor,
        outputs: Tensor | None,
        mixing: Tensor | None,
        bases: tuple[Tensor, ...],
        coordinates: tuple[Tensor, ...],
        theta: Tensor,
        max_memory: str | int | float = "2GiB",
    ) -> None:
        self.lin, self.landmarks, self.outputs, self.mixing = lin, landmarks, outputs, mixing
        self.bases, self.coordinates, self.theta = bases, coordinates, theta
        self.max_memory = parse_memory(max_memory)

    @classmethod
    def build(
        cls,
        lin: LinearizedNetwork,
        landmarks: Any,
        outputs: Tensor | None = None,
        *,
        precision: Tensor | None = None,
        num_features: int | None = None,
        tolerance: float = EIGENVALUE_CUT,
        max_memory: str | int | float = "2GiB",
    ) -> LandmarkFeatures:
        r"""Choose the directions.

        :param landmarks: inputs, raw or packed.
        :param precision: :math:`\lambda_g` of the kernel whose eigenvectors mix the rows; unused without
            `num_features`.
        :param num_features: K: the leading eigenvectors of :math:`K_\Lambda(Z, Z)`, :math:`W = q p^{-1/2}` (fewer where
            eigenvalues fall below the tolerance); None for all rows of Z.
        :param tolerance: eigenvalues below this fraction of the largest are cut.
        :raises ValueError: arguments out of range, all gradients zero, or a budget that cannot hold the result.

        Cost: all rows: the Gram of Z and G eigendecompositions of size m. K of them: one eigendecomposition of size m,
        or Lanczos iterations on the Gram (matrix-free beyond the budget), and K backward passes over Z.
        """
        budget = parse_memory(max_memory)
        with torch.inference_mode(False):
            # Copies: what is made in inference mode cannot enter a graph.
            z = lin.pack(landmarks).detach().clone()
            outputs = None if outputs is None else outputs.to(z.device, torch.long).clone()
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance: expected a number from 0 to below 1, got {tolerance}")
        rows = len(z) * (lin.num_outputs if outputs is None else 1)
        if num_features is not None and (isinstance(num_features, bool) or num_features < 1):
            raise ValueError(f"num_features: expected a positive number or None, got {num_features!r}")
        with torch.inference_mode(False), torch.no_grad():
            if num_features is None or (num_features >= rows and _fits(lin, rows, budget)):
                mixing = None
                grams, products = _all_rows(lin, z, outputs, rows, budget)
            else:
                mixing = _mixing(lin, z, outputs, precision, min(num_features, rows), tolerance, budget)
                grams, products = _of_directions(lin, _pull(lin, z, outputs, mixing.mT))
            bases, coordinates, theta = _split(grams, products, tolerance)
        if not any(basis.shape[1] for basis in bases):
            raise ValueError(_NO_GRADIENTS)
        return cls(lin, z, outputs, mixing, bases, coordinates, theta, budget)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_g of each group."""
        return tuple(basis.shape[1] for basis in self.bases)

    @property
    def size(self) -> int:
        """R, the number of features."""
        return sum(self.ranks)

    @_kept
    def group(self) -> Tensor:
        """Group of each feature, shape (R,)."""
        ranks = torch.tensor(self.ranks, device=self.landmarks.device)
        return torch.repeat_interleave(torch.arange(len(ranks), device=self.landmarks.device), ranks)

    @_kept
    def stacked(self) -> Tensor:
        """T, shape (R, K)."""
        return torch.cat(self.coordinates)

    @_kept
    def weights(self) -> tuple[Tensor, ...]:
        """From products with the rows of Z to the features: shapes (m, r_g)."""
        return self.bases if self.mixing is None else tuple(self.mixing @ basis for basis in self.bases)

    @_kept
    def _factors(self) -> Factors | None:
        """What the layers saw at Z, where it fits in a quarter of the budget."""
        if self.lin.factors_memory(len(self.landmarks)) > self.max_memory // 4:
            return None
        return self.lin.factors(self.landmarks, self.max_memory // 4, self.outputs)

    @_kept
    def directions(self) -> Tensor | None:
        """Row k holds direction k of every group, shape (max r_g, P), where products with these are the cheaper way."""
        width, lin = max(self.ranks), self.lin
        # Blocks of features take half of what is given; see `block_rows`.
        needed = 8 * 2 * width * lin.num_parameters + 2 * room_of_features(lin, width)
        if self.mixing is None or needed > self.max_memory:
            return None
        block = 256
        dual = lin.explain(block, len(self.landmarks)).flops / block
        dual += 2.0 * lin.num_outputs * sum(w.shape[0] * w.shape[1] for w in self.weights)
        primal = 2.0 * width * sum(_applications(lin).values())
        return self._weight_space(width) if primal < dual else None

    def _weight_space(self, width: int) -> Tensor:
        """Directions of all groups side by side, shape (width, P)."""
        assert self.mixing is not None
        pulled = _pull(self.lin, self.landmarks, self.outputs, self.mixing.mT)
        out = pulled.new_zeros(width, pulled.shape[1])
        index = self.lin.groups.index.to(pulled.device)
        for g, basis in enumerate(self.bases):
            members = index == g
            out[: basis.shape[1], members] = basis.mT @ pulled[:, members]
        return out

    def pull(self, weights: Tensor) -> Tensor:
        r"""Sum of the directions with given weights, :math:`\oplus_g D_g^\top w_g`: shape (S, R) -> (S, P), float64."""
        lin, parts = self.lin, weights.split(self.ranks, dim=-1)
        index = lin.groups.index.to(weights.device)
        out = weights.new_zeros(len(weights), lin.num_parameters)
        for g, (part, weight) in enumerate(zip(parts, self.weights, strict=True)):
            if part.shape[-1]:
                pulled = _pull(lin, self.landmarks, self.outputs, part @ weight.mT)
                out = torch.where(index == g, pulled, out)
        return out

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Features of packed inputs, (N, D) -> (N, C, R), float64; differentiable with respect to inputs.

        :param dtype: of the products with the landmarks: float32 is faster and loses what lies below 1e-7 of the
            largest eigenvalue.
        """
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.visit(x.detach(), dtype, diagonals=False)[0]
        source: Tensor | Factors = self.landmarks if self._factors is None else self._factors
        if self._factors is None and self.outputs is not None:
            source = self.lin.factors(self.landmarks, self.max_memory, self.outputs)
        return self._combine(self.lin.grams(x, source, max_memory=self.max_memory, dtype=dtype), len(x))

    def _combine(self, products: Tensor, rows: int) -> Tensor:
        """From (G, N·C, m) products to (N, C, R) features."""
        parts = [p.to(w.dtype) @ w for p, w in zip(products, self.weights, strict=True) if w.shape[1]]
        return torch.cat(parts, dim=-1).view(rows, self.lin.num_outputs, -1)

    def block_rows(self) -> int:
        """Inputs whose features are formed at a time."""
        lin = self.lin
        numbers = lin.num_outputs * (len(self.bases) * (self.weights[0].shape[0] + lin.num_outputs) + 2 * self.size)
        return int(max(1, min(8192, 2**26 // (8 * numbers), self.max_memory // (16 * numbers))))

    def visit(
        self, x: Tensor, dtype: torch.dtype = torch.float64, diagonals: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Features (N, C, R) and, if asked, :math:`J_g(x_n)J_g(x_n)^T`, (G, N, C, C), from one pass per block."""
        parts = [self._visit(rows, dtype, diagonals) for rows in x.split(self.block_rows())]
        features = torch.cat([part[0] for part in parts])
        blocks = [part[1] for part in parts if part[1] is not None]
        return features, torch.cat(blocks, dim=1) if diagonals else None

    def _visit(self, x: Tensor, dtype: torch.dtype, diagonals: bool) -> tuple[Tensor, Tensor | None]:
        lin, budget = self.lin, self.max_memory
        if self.directions is not None:
            rest = budget - self.directions.nbytes
            found = lin.features(x, self.directions, rest, per_group=True).to(torch.float64)
            parts = [f[..., :rank] for f, rank in zip(found, self.ranks, strict=True)]
            return torch.cat(parts, dim=-1), lin.gram_diagonals(x, max_memory=budget) if diagonals else None
        side: Tensor | Factors = x
        kept = self._factors
        if kept is not None and lin.factors_memory(len(x)) <= budget // 4:
            side = lin.engine.factors_like(x, kept, budget // 4)
        other: Tensor | Factors | None = kept
        if other is None:
            other = self.landmarks if self.outputs is None else lin.factors(self.landmarks, budget, self.outputs)
        features = self._combine(lin.grams(side, other, max_memory=budget, dtype=dtype), len(x))
        return features, lin.gram_diagonals(side, max_memory=budget) if diagonals else None

    def same(self, other: LandmarkFeatures) -> bool:
        """Whether sums over these features may be added."""
        return (
            self.lin.groups.names == other.lin.groups.names
            and torch.equal(self.landmarks, other.landmarks)
            and self.ranks == other.ranks
            and all(torch.equal(a, b) for a, b in zip(self.coordinates, other.coordinates, strict=True))
        )

    def state(self) -> dict[str, Any]:
        """Tensors that determine the features."""
        return {
            "landmarks": self.landmarks,
            "outputs": self.outputs,
            "mixing": self.mixing,
            "bases": list(self.bases),
            "coordinates": list(self.coordinates),
            "theta": self.theta,
        }

    @classmethod
    def from_state(cls, lin: LinearizedNetwork, state: dict[str, Any], max_memory: int) -> LandmarkFeatures:
        """Inverse of :meth:`state`."""
        sequences = {name: tuple(state[name]) for name in ("bases", "coordinates")}
        return cls(lin, **{**state, **sequences}, max_memory=max_memory)

    def __getstate__(self) -> dict[str, Any]:
        transient = ("_factors", "directions", "group", "stacked", "weights")
        return {name: value for name, value in self.__dict__.items() if name not in transient}


def _applications(lin: LinearizedNetwork) -> dict[str, float]:
    """Multiplications that a direction takes per input, of each tensor: its size times how often it is applied."""
    found = {}
    for name, p in lin.frozen.theta.items():
        shape = lin.engine.plan.shapes.get(name)
        found[name] = float(p.numel()) * (shape.positions if shape is not None and shape.kind != "rows" else 1)
    return found


def _fits(lin: LinearizedNetwork, rows: int, budget: int) -> bool:
    """Whether per-group Grams of so many rows, and their eigendecomposition, fit in the budget."""
    return 8 * (2 * len(lin.groups) + 4) * rows**2 <= budget


def _all_rows(
    lin: LinearizedNetwork, z: Tensor, outputs: Tensor | None, rows: int, budget: int
) -> tuple[Tensor, Tensor]:
    """Grams (G, m, m) of all rows of Z, and their products with the groups of θ̃, (G, m)."""
    if not _fits(lin, rows, budget):
        raise ValueError(
            f"max_memory: {format_memory(budget)} is too small for {len(lin.groups)} Grams of {rows} landmark rows "
            f"({format_memory(8 * (2 * len(lin.groups) + 4) * rows**2)}); use fewer landmarks, or num_features"
        )
    source = z if outputs is None else lin.factors(z, budget, outputs)
    grams = lin.grams(source, max_memory=budget)
    index, theta = lin.groups.index.to(z.device), lin.theta.to(z.device)
    # One group at a time: G vectors of weights may be more than all Grams.
    products = torch.stack([lin.jvp(z, theta * (index == g)) for g in range(len(lin.groups))]).to(torch.float64)
    if outputs is not None:
        products = products.gather(-1, outputs.expand(len(products), -1).unsqueeze(-1))
    return grams, products.flatten(1)


def _pull(lin: LinearizedNetwork, z: Tensor, outputs: Tensor | None, weights: Tensor) -> Tensor:
    """Mixtures of the rows of Z, (K, m) -> (K, P), in float64."""
    if outputs is None:
        cotangents = weights.view(len(weights), len(z), lin.num_outputs)
    else:
        cotangents = weights.new_zeros(len(weights), len(z), lin.num_outputs)
        cotangents.scatter_(-1, outputs.expand(len(weights), -1).unsqueeze(-1), weights.unsqueeze(-1))
    out = weights.new_empty(len(weights), lin.num_parameters)
    for rows, some in zip(out.split(_PULLED), cotangents.to(lin.dtype).split(_PULLED), strict=True):
        rows.copy_(lin.vjp(z, some))
    return out


def _of_directions(lin: LinearizedNetwork, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Grams (G, K, K) of rows of weight space, and their products with the groups of θ̃, (G, K)."""
    index, theta = lin.groups.index.to(directions.device), lin.theta.to(directions)
    grams, products = [], []
    for g in range(len(lin.groups)):
        part = directions[:, index == g]
        grams.append(part @ part.mT)
        products.append(part @ theta[index == g])
    return torch.stack(grams), torch.stack(products)


def _split(grams: Tensor, products: Tensor, tolerance: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Bases, coordinates and the trained weights in them, of each group."""
    bases, coordinates, theta = [], [], []
    for gram, product in zip(grams, products, strict=True):
        values, vectors = torch.linalg.eigh(gram)
        # Below some 1e-14 of the largest an eigenvalue is rounding, whatever the tolerance.
        keep = values > max(tolerance, 1e-14) * values[-1].clamp_min(1e-300)
        roots, kept = values[keep].flip(0).sqrt(), vectors[:, keep].flip(1)
        bases.append(kept / roots)
        coordinates.append((kept * roots).mT.contiguous())
        theta.append(bases[-1].mT @ product)
    return tuple(bases), tuple(coordinates), torch.cat(theta)


def _mixing(
    lin: LinearizedNetwork, z: Tensor, outputs: Tensor | None, precision: Tensor | None, count: int, tolerance: float,
    budget: int,
) -> Tensor:  # fmt: skip
    """W = q p^{-1/2} of the leading eigenvectors of K_Λ(Z, Z), shape (m, K)."""
    rows = len(z) * (lin.num_outputs if outputs is None else 1)
    ones = torch.ones(len(lin.groups), dtype=torch.float64, device=z.device)
    variance = ones if precision is None else precision.detach().to(ones).reciprocal()
    if 8 * 4 * rows**2 <= budget:
        source = z if outputs is None else lin.factors(z, budget, outputs)
        gram = lin.weighted_gram(source, None, variance, budget)
        whole = rows <= _DENSE_ROWS or 4 * count > rows
        values, vectors = torch.linalg.eigh(gram) if whole else _lanczos(lambda v: gram @ v, rows, count, gram, 1e-12)
    else:
        scale = lin.groups.expand(variance)

        def multiply(v: Tensor) -> Tensor:
            pulled = _pull(lin, z, outputs, v.mT) * scale
            pushed = lin.jvp(z, pulled.to(lin.dtype)).to(torch.float64)
            if outputs is not None:
                pushed = pushed.gather(-1, outputs.expand(len(pushed), -1).unsqueeze(-1))
            return pushed.flatten(1).mT

        values, vectors = _lanczos(multiply, rows, count, ones, 1e-10 if lin.dtype == torch.float64 else 1e-4)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    keep = values > max(tolerance, 1e-14) * values[0].clamp_min(1e-300)
    if not bool(keep.any()):
        raise ValueError(_NO_GRADIENTS)
    return vectors[:, keep] / values[keep].sqrt()


def _lanczos(multiply: Any, rows: int, count: int, like: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of a symmetric matrix, ascending, from the same start every time."""

    def matvec(v: np.ndarray) -> np.ndarray:
        return multiply(torch.from_numpy(v.reshape(rows, 1)).to(like)).cpu().numpy()[:, 0]

    operator = scipy.sparse.linalg.LinearOperator((rows, rows), matvec=matvec, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(rows)
    if not matvec(start).any():
        raise ValueError(_NO_GRADIENTS)
    values, vectors = scipy.sparse.linalg.eigsh(operator, k=min(count, rows - 1), v0=start, which="LA", tol=tolerance)
    return torch.from_numpy(values.copy()).to(like), torch.from_numpy(vectors.copy()).to(like)
