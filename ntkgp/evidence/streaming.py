"""One pass over the data, then the evidence for every set of precisions and every noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ntkgp.evidence.collapsed import Collapsed, Sums
from ntkgp.evidence.objective import Evaluation, EvidenceObjective
from ntkgp.likelihoods import whitened_targets
from ntkgp.linearization.nystrom import LandmarkFeatures

KINDS = ("shared", "per_output", "classification")
BOUNDS = ("vfe", "dtc")
_BLOCK = 256
_SUMS = ("second", "cross", "squares", "counts", "traces")
_EXHAUSTED = 0.8
# Pearson's χ² per row is one where labels follow the network's probabilities.
_MISFIT = 10.0


def add_square(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to the blocks on and below the diagonal of a square matrix, in place; (n, R)."""
    for start in range(0, rows.shape[1], _BLOCK):
        stop = min(start + _BLOCK, rows.shape[1])
        total[start:stop, :stop].addmm_(rows[:, start:stop].mT, rows[:, :stop])


@dataclass
class StreamStatistics:
    r"""Sums over the data that determine bound and posterior for every :math:`\Lambda` and :math:`\sigma^2` (law C19).

    Rows are the outputs of all inputs, for a classification the C − 1 rows :math:`S_n^\top J_n` of its second-order
    expansion at the network's logits, with targets :math:`\hat z` and unit noise. Two columns of targets are kept: t =
    y − f + Jθ̃, and the network's own residual. Statistics of parts of the data are added with ``+``; a sum depends on
    its order only by rounding.

    :param kind: "shared" (one noise), "per_output" (one for each), "classification".
    :param second: :math:`\sum\psi\psi^\top` by noise component, lower blocks, shape (S, R, R).
    :param cross: :math:`\sum\psi t^\top`, shape (S, R, 2).
    :param squares: :math:`\sum t t^\top`, shape (S, 2, 2).
    :param counts: rows, shape (S,).
    :param traces: :math:`\sum\|J_g\|^2`, shape (S, G).
    :param constant: what the log-density is raised by (a classification's expansion).
    :param num_data: inputs seen.
    :param low: smallest target of each output, shape (C,) or (1,) for labels.
    :param high: largest.
    """

    kind: str
    second: Tensor
    cross: Tensor
    squares: Tensor
    counts: Tensor
    traces: Tensor
    constant: float
    num_data: int
    low: Tensor
    high: Tensor

    @classmethod
    def zeros(cls, kind: str, features: LandmarkFeatures) -> StreamStatistics:
        """Nothing seen yet."""
        lin, size = features.lin, features.size
        components = lin.num_outputs if kind == "per_output" else 1
        columns = 1 if kind == "classification" else lin.num_outputs
        zero = torch.zeros(components, dtype=torch.float64, device=features.landmarks.device)
        return cls(
            kind=kind,
            second=zero.new_zeros(components, size, size),
            cross=zero.new_zeros(components, size, 2),
            squares=zero.new_zeros(components, 2, 2),
            counts=zero,
            traces=zero.new_zeros(components, len(lin.groups)),
            constant=0.0,
            num_data=0,
            low=zero.new_full((columns,), math.inf),
            high=zero.new_full((columns,), -math.inf),
        )

    def add(self, features: LandmarkFeatures, x: Tensor, y: Tensor, dtype: torch.dtype = torch.float64) -> None:
        """Add a batch in place.

        :param x: packed inputs (B, D).
        :param y: targets (B,) or (B, C), or labels (B,).
        :param dtype: of the products with the landmarks.

        Cost: one forward pass, C backward chains and a jvp per input; products with the landmarks; R² per row.
        """
        start = 0
        for rows in x.split(features.block_rows()):
            self._add(features, rows, y[start : start + len(rows)], dtype)
            start += len(rows)

    def _add(self, features: LandmarkFeatures, x: Tensor, y: Tensor, dtype: torch.dtype) -> None:
        lin, c = features.lin, features.lin.num_outputs
        with torch.no_grad():
            psi, blocks = features.visit(x, dtype)
            assert blocks is not None
            outputs = lin(x).to(torch.float64)
            tangent = lin.jvp(x, lin.theta.to(x.device)).to(torch.float64)
            if self.kind == "classification":
                white = whitened_targets(outputs, y, outputs - tangent)
                self.constant += float(white.constant)
                pull = white.targets - torch.einsum("ncr,nc->nr", white.factor, tangent)
                rows = torch.einsum("nck,ncr->nrk", psi, white.factor).flatten(0, 1)
                columns = torch.stack([white.targets, pull], dim=-1).flatten(0, 1)
                self.traces[0] += torch.einsum("ncr,gncd,ndr->g", white.factor, blocks, white.factor)
                self._rows(0, rows, columns)
                observed = y.to(torch.float64).unsqueeze(-1)
            else:
                observed = y.view(len(x), c)
                columns = torch.stack([observed - outputs + tangent, observed - outputs], dim=-1)  # (B, C, 2)
                squared = blocks.diagonal(dim1=-2, dim2=-1).sum(1)  # shape: (G, C)
                if self.kind == "per_output":
                    self.traces += squared.mT
                    for output in range(c):
                        self._rows(output, psi[:, output].contiguous(), columns[:, output])
                else:
                    self.traces[0] += squared.sum(-1)
                    self._rows(0, psi.flatten(0, 1), columns.flatten(0, 1))
            self.low = torch.minimum(self.low, observed.amin(0))
            self.high = torch.maximum(self.high, observed.amax(0))
            self.num_data += len(x)

    def _rows(self, component: int, rows: Tensor, columns: Tensor) -> None:
        """Add rows (n, R) with targets (n, 2) to a component."""
        add_square(self.second[component], rows)
        self.cross[component] += rows.mT @ columns
        self.squares[component] += columns.mT @ columns
        self.counts[component] += len(rows)

    def __add__(self, other: StreamStatistics) -> StreamStatistics:
        """Statistics of both parts of the data."""
        if self.kind != other.kind or self.second.shape != other.second.shape:
            raise ValueError("statistics of different features or likelihoods cannot be added")
        return replace(
            self,
            **{name: getattr(self, name) + getattr(other, name) for name in (*_SUMS, "constant", "num_data")},
            low=torch.minimum(self.low, other.low),
            high=torch.maximum(self.high, other.high),
        )

    def absorb(self, other: StreamStatistics) -> None:
        """Add another part of the data in place."""
        for name in _SUMS:
            getattr(self, name).add_(getattr(other, name))
        self.constant += other.constant
        self.num_data += other.num_data
        self.widen(other)

    def widen(self, other: StreamStatistics) -> None:
        """Take over the smallest and largest targets of another part."""
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)

    def vector(self) -> Tensor:
        """All sums, the number of inputs among them, in one row of numbers; smallest and largest targets left out."""
        numbers = self.counts.new_tensor([self.constant, self.num_data])
        return torch.cat([*(getattr(self, name).flatten() for name in _SUMS), numbers])

    def with_vector(self, vector: Tensor) -> StreamStatistics:
        """Inverse of :meth:`vector`, with the smallest and largest targets of these."""
        own = [getattr(self, name) for name in _SUMS]
        *parts, numbers = vector.split([*(part.numel() for part in own), 2])
        sums = {name: part.view_as(like).clone() for name, part, like in zip(_SUMS, parts, own, strict=True)}
        return replace(self, **sums, constant=float(numbers[0]), num_data=round(float(numbers[1])))

    def clone(self) -> StreamStatistics:
        """A copy that later batches do not reach."""
        copies: dict[str, Any] = {n: v.clone() for n, v in self.__dict__.items() if isinstance(v, Tensor)}
        return replace(self, **copies)

    def sums(self, column: int = 0) -> Sums:
        """What the algebra needs, with t (column 0) or the network's residual (1) as targets."""
        lower = self.second.tril()
        whole = lower + lower.tril(-1).mT
        return Sums(whole, self.cross[..., column], self.squares[:, column, column], self.counts, self.traces)

    @property
    def rows(self) -> int:
        """Rows of all components."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class StreamNoise:
    """Learned noise variances of streamed data; none for a classification.

    :param values: current variances, shape (S,).
    :param minimum: smallest variance allowed.
    """

    values: Tensor
    minimum: float = 0.0

    @property
    def num_learned(self) -> int:
        """S."""
        return self.values.numel()


@dataclass(frozen=True)
class StreamedEvidence:
    r"""Evidence of Nyström features from streamed sums, for every :math:`\Lambda` and :math:`\sigma^2`.

    :param features: the features.
    :param statistics: sums over the data.
    :param noise: current noise variances, of no entries for a classification.
    :param bound: "vfe", the collapsed lower bound :math:`\log N(t; 0, Q + D) - \tfrac12\mathrm{tr}\,D^{-1}(K - Q)`
        (Titsias 2009), or "dtc", its first term alone: the evidence of the Nyström kernel itself, no bound of K's.
    :param targets: "data", or "residual" for y − f.
    """

    features: LandmarkFeatures
    statistics: StreamStatistics
    noise: StreamNoise
    bound: str = "vfe"
    targets: str = "data"

    def __post_init__(self) -> None:
        """Refuse unknown choices."""
        if self.bound not in BOUNDS:
            raise ValueError(f"bound: expected one of {BOUNDS}, got {self.bound!r}")

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return self.features.lin.groups.names

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Numbers of parameters of the groups."""
        return self.features.lin.groups.sizes

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.group_names)

    @property
    def rows(self) -> int:
        """Rows of data."""
        return self.statistics.rows

    @property
    def max_dimension(self) -> int:
        """Largest effective dimension that the data can determine."""
        return self.rows

    def objective(self, at: str = "theta_star", bounds: tuple[float, float] = (1e-10, 1e10)) -> StreamedObjective:
        """The objective; only at θ⋆: the classical evidence at the trained weights has no such bound."""
        if at != "theta_star":
            raise ValueError(f"at={at!r}: evidence from Nyström features exists at 'theta_star' only")
        return StreamedObjective(self, bounds)


class StreamedObjective(EvidenceObjective):
    r"""Value and exact gradient of a :class:`StreamedEvidence` at any :math:`(\log\lambda, \log\sigma^2)`.

    MacKay's quantities are those of the Nyström model, :math:`\gamma_g` and :math:`\lambda_g\|\theta_{\star g}\|^2`;
    what the dependence of the features on :math:`\Lambda` and the trace of the bound add to the gradient is put on the
    side where it is positive, so that stationary points and fixed points are the same. Where the landmarks are all the
    data these terms vanish and the fixed point is that of the exact model.

    Cost: O(R K² + S R² K) per evaluation.
    """

    def __init__(self, problem: StreamedEvidence, bounds: tuple[float, float] = (1e-10, 1e10)) -> None:
        low, high = bounds
        if not 0 < low < high < math.inf:
            raise ValueError(f"bounds must be (low, high) with 0 < low < high < inf, got {bounds}")
        self.problem = self.streamed = problem  # type: ignore[assignment]
        self.bounds = bounds
        self.noise = problem.noise  # type: ignore[assignment]
        self.statistics, self.column = problem.statistics, int(problem.targets == "residual")
        self.sums = self.statistics.sums(self.column)
        if not bool(torch.isfinite(self.sums.squares).all()):
            raise ValueError(
                "the second-order expansion of the log-likelihood overflows: the network gives the labels of some "
                "training points no probability at all; check the labels, or fit the precisions by ntkgp.ExactNTKGP"
            )
        count = self.sums.counts.sum()
        self.scale = 1.0 if self.is_classification else float(self.sums.squares.sum() / count) or 1.0
        means = self.sums.traces.sum(0) / count
        positive = means[means > 0]
        fallback = positive.mean() if positive.numel() else torch.ones_like(means[0])
        self.reference = torch.where(means > 0, means, fallback)
        own = self.sums.squares / self.sums.counts
        self.noise_scale = torch.where(own > 0, own, torch.full_like(own, self.scale))[: self.num_noise]
        self._last: tuple[Tensor, Collapsed] | None = None

    @property
    def is_classification(self) -> bool:
        """Whether the rows are whitened."""
        return self.statistics.kind == "classification"

    @property
    def eigenvalues_cut(self) -> int:
        """Eigenvalues of the landmarks' Grams that were cut, over all groups."""
        features = self.streamed.features
        sizes = features.lin.groups.sizes
        return sum(min(features.stacked.shape[1], size) - r for r, size in zip(features.ranks, sizes, strict=True))

    @property
    def knows_shift(self) -> bool:
        """Whether the targets are those of the trained weights."""
        return self.column == 0

    def _start_noise(self) -> Tensor:
        """Training error of the network per noise component."""
        return (self.statistics.squares[:, 1, 1] / self.sums.counts)[: self.num_noise]

    def residual_noise(self) -> Tensor | None:
        """Mean squared error of the network per component; None for a classification."""
        return None if self.is_classification else self.statistics.squares[:, 1, 1] / self.sums.counts

    def data_warnings(self) -> list[str]:
        """Constant targets, exhausted features, the expansion of a classification."""
        out = []
        if self._last is not None:
            model = self._last[1]
            used, available = float(model.dimensions().sum()), model.basis.shape[1]
            if used > _EXHAUSTED * available < self.problem.max_dimension:
                out.append(
                    f"the data determine {used:.1f} of the {available} dimensions that the landmarks span: more of "
                    "them would raise the evidence"
                )
        if self.statistics.num_data > 1 and bool((self.statistics.low == self.statistics.high).all()):
            out.append("constant targets: all training targets are equal")
        if self.is_classification:
            out.append(
                "the evidence is that of the second-order expansion of the log-likelihood at the network's logits "
                "(curvature 'quadratic')"
            )
            misfit = float(self.statistics.squares[0, 1, 1] / self.sums.counts[0])
            if misfit > _MISFIT:
                out.append(
                    "points that the network gets wrong with confidence dominate that expansion, which is not bounded: "
                    f"Pearson's chi-square is {misfit:.3g} per row, 1 for labels that follow the network's "
                    "probabilities; do not trust these precisions"
                )
        return out

    def collapsed(self, x: Tensor) -> Collapsed:
        """The model at x."""
        if self._last is None or not torch.equal(self._last[0], x):
            precision, noise = self.split(x)
            noise = noise if noise.numel() else torch.ones_like(self.sums.counts)
            features = self.streamed.features
            self._last = x.clone(), Collapsed(self.sums, features.group, features.stacked, precision, noise)
        return self._last[1]

    def warm_start(self) -> dict[str, Any] | None:
        """Where the model was evaluated last: what the report says depends on it."""
        return None if self._last is None else {"x": self._last[0]}

    def set_warm_start(self, state: dict[str, Any] | None) -> None:
        """Inverse of :meth:`warm_start`."""
        self._last = None
        if state is not None:
            self.collapsed(state["x"].to(self.reference))

    def __call__(self, x: Tensor) -> Evaluation:
        """Evaluate the evidence at x."""
        model, precision = self.collapsed(x), self.split(x)[0]
        dimensions = model.dimensions()
        slope, trace_slope = model.slopes(dimensions)
        left, value = model.left_over, model.log_density + self.statistics.constant
        norms = model.per_group(model.coordinates.square())
        sse, pull_noise = model.sse, model.sse / model.noise
        if self.streamed.bound == "vfe":
            value -= 0.5 * float((left / model.noise).sum())
            slope, pull_noise = slope + trace_slope, pull_noise + left / model.noise
        rest = slope - dimensions + norms
        return Evaluation(
            value=value,
            pull=torch.cat([dimensions + rest.clamp_min(0.0), pull_noise[: self.num_noise]]),
            push=torch.cat([norms + (-rest).clamp_min(0.0), model.inverse_trace[: self.num_noise]]),
            effective_dimension=dimensions,
            squared_norms=norms / precision,
            sse=math.nan if self.is_classification else float(sse.sum()),
            jitter=0.0,
            rounding=model.rounding(),
        )

    def squared_shift(self, x: Tensor) -> tuple[float, Tensor]:
        """Squared distance of θ⋆ to the trained weights; see the base class."""
        model, (precision, _) = self.collapsed(x), self.split(x)
        statistics, e = self.statistics, model.coordinates
        # J θ̃ is the difference of the two columns of targets.
        cross = (statistics.cross[..., 0] - statistics.cross[..., 1]) @ (model.root * e)
        squares = torch.einsum("cij,i,j->c", statistics.squares, *[statistics.squares.new_tensor([1.0, -1.0])] * 2)
        own = torch.einsum("k,ckl,l->c", model.mean, model.moments, model.mean)
        misfit = ((own - 2.0 * cross + squares) / model.noise).sum().clamp_min(0.0)
        lin, theta = self.streamed.features.lin, self.streamed.features.theta
        norms = lin.groups.sum_per_group(lin.theta.to(torch.float64).square()).to(precision)
        mixed = model.per_group(e * theta) * precision.sqrt()
        return float(misfit), (model.per_group(e.square()) - 2.0 * mixed + precision * norms).clamp_min(0.0)

    def evidence_bounds(self, x: Tensor) -> tuple[float, float]:
        """Bounds of the exact evidence of the same targets at x."""
        low, high = self.collapsed(x).bounds()
        return low + self.statistics.constant, high + self.statistics.constant
