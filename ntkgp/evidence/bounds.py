"""Certified intervals for variances, log-determinants and evidences that are too large to factor.

Everything is a statement on A = K + D with K positive semi-definite and D > 0 diagonal. Two facts carry it: a quadratic
form is bounded by any iterate of a solver together with its true residual, and a Nyström approximation stands below K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ntkgp.evidence.newton_cg import CURVATURE_TOLERANCE, iterative_mode
from ntkgp.evidence.problem import GaussianEvidence, SoftmaxEvidence
from ntkgp.likelihoods import curvature_factor, whitened_targets
from ntkgp.solvers import NystromPreconditioner, WhitenedSystem, solve
from ntkgp.solvers.decompositions import thin_svd

Operator: TypeAlias = "LinearOperator | Tensor | Callable[[Tensor], Tensor]"

# Random-walk growth of rounding in a product, with a factor of safety.
_ROUNDING = 16.0


def _apply(operator: Operator, rows: Tensor) -> Tensor:
    """A V in float64."""
    if isinstance(operator, Tensor | LinearOperator):
        return operator.matmul(rows.to(operator.dtype)).to(torch.float64)
    return operator(rows).to(torch.float64)


def quadratic_bounds(
    operator: Operator,
    rhs: Tensor,
    iterate: Tensor,
    preconditioner: NystromPreconditioner | None = None,
    *,
    noise: float | Tensor = 1.0,
    diagonal: Tensor | None = None,
    unit: float = 2.0**-52,
) -> tuple[Tensor, Tensor]:
    r"""Lower and upper bounds of :math:`q = b^\top A^{-1}b`, A = K + D, from *any* iterate w (laws B21, B22, C16).

    With the residual :math:`r = b - Aw` recomputed here,

    .. math:: w^\top(b + r) \;\le\; q \;=\; w^\top(b + r) + r^\top A^{-1}r
        \;\le\; w^\top(b + r) + r^\top(\hat K + D)^{-1}r .

    :param operator: A: a tensor (*batch, n, n), a LinearOperator, or a function (*batch, n, k) -> (*batch, n, k).
    :param rhs: b, shape (*batch, n, k), or (n,).
    :param iterate: w in the same shape; the closer to :math:`A^{-1}b`, the tighter.
    :param preconditioner: :math:`(\hat K + D)^{-1}`; None is :math:`\hat K = 0`, with the smallest `noise`.
    :param noise: variances D, used without a preconditioner only.
    :param diagonal: diagonal of A, (*batch, n), for the allowance for rounding (default: of a tensor or LinearOperator;
        unknown for a function, whose allowance then counts the inner products only).
    :param unit: relative rounding of a product with A: larger where passes of a float32 network make it.
    :returns: lower and upper bound, shape (*batch, k) or (). Both are moved outward by an estimate of the rounding
        error of their evaluation.

    Cost: one product with A.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 0.0], dtype=torch.float64)
    >>> low, high = quadratic_bounds(A, b, torch.tensor([0.5, -0.1], dtype=torch.float64))
    >>> bool(low <= b @ torch.linalg.solve(A, b) <= high)
    True
    """
    if rhs.shape != iterate.shape:
        raise ValueError(f"iterate: expected the shape of rhs, {tuple(rhs.shape)}, got {tuple(iterate.shape)}")
    if rhs.ndim == 1:
        low, high = quadratic_bounds(
            operator, rhs.unsqueeze(-1), iterate.unsqueeze(-1), preconditioner,
            noise=noise, diagonal=diagonal, unit=unit,
        )  # fmt: skip
        return low.squeeze(-1), high.squeeze(-1)
    if diagonal is None and isinstance(operator, Tensor | LinearOperator):
        diagonal = operator.diagonal(dim1=-2, dim2=-1).to(torch.float64)
    b, w = rhs.to(torch.float64), iterate.to(torch.float64)
    r = b - _apply(operator, w)
    if preconditioner is None:
        smallest = torch.as_tensor(noise, dtype=torch.float64).min()
        if not float(smallest) > 0:
            raise ValueError(f"noise: expected positive variances, got {float(smallest)}")
        width = r.square().sum(-2) / smallest
    else:
        width = preconditioner.quadratic(r)
    low = (w * (b + r)).sum(-2)
    # An entry of Aw errs by unit·√Σ_j A_ij² w_j², and A_ij² ≤ A_ii A_jj.
    scale = (w * b).abs().sum(-2) + (w * r).abs().sum(-2) + width
    if diagonal is not None:
        scale = scale + (w.square() * diagonal.unsqueeze(-1)).sum(-2)
    allowance = _ROUNDING * unit * scale
    return low - allowance, low + width + allowance


def variance_bounds(
    operator: Operator,
    cross: Tensor,
    prior: Tensor,
    iterate: Tensor,
    preconditioner: NystromPreconditioner | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    r"""Lower and upper bounds of the posterior variance :math:`k_{\star\star} - k^\top A^{-1}k` from any iterate w.

    :math:`U = k_{\star\star} - w^\top(k + r)` with the recomputed residual r = k − Aw is an upper bound (law B21; the
    shortcut :math:`k_{\star\star} - w^\top k` is none), :math:`U - r^\top(\hat K + D)^{-1}r` a lower one (B22, C16).

    :param cross: k, shape (*batch, n, k), one column per variance.
    :param prior: k⋆⋆, shape (*batch, k).
    :param options: those of :func:`quadratic_bounds`, which has the other parameters.
    :returns: lower (at least 0) and upper bound, shape (*batch, k).

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> k = torch.tensor([[0.5], [0.2]], dtype=torch.float64)
    >>> low, high = variance_bounds(A, k, torch.ones(1, dtype=torch.float64), torch.zeros_like(k))
    >>> bool(low <= 1 - k[:, 0] @ torch.linalg.solve(A, k[:, 0]) <= high)
    True
    """
    low, high = quadratic_bounds(operator, cross, iterate, preconditioner, **options)
    allowance = torch.finfo(torch.float64).eps * prior.abs()
    return (prior - high - allowance).clamp_min(0.0), prior - low + allowance


def action_variance(operator: Operator, cross: Tensor, prior: Tensor, actions: Tensor) -> Tensor:
    r"""Upper bound of posterior variances from the data seen through actions S only (law C17; Wenger et al. 2022).

    :math:`k_{\star\star} - k^\top S(S^\top A S)^{-1}S^\top k`, decreasing in the span of S; the actions of a solver are
    its search directions, those of data dropping are unit vectors.

    :param cross: k, shape (n, k).
    :param prior: k⋆⋆, shape (k,).
    :param actions: S, shape (n, m); columns may depend on each other.
    :returns: shape (k,).

    Cost: one product with A for each action.
    """
    basis, sizes = thin_svd(actions.to(torch.float64))
    basis = basis[:, sizes > 1e-12 * sizes[0]]
    inner = basis.mT @ _apply(operator, basis)
    seen = torch.linalg.solve_triangular(
        torch.linalg.cholesky((inner + inner.mT) / 2), basis.mT @ cross.to(torch.float64), upper=False
    )
    return prior - seen.square().sum(0)


def fischer_logdet(matrix: Tensor, blocks: int | Sequence[Tensor]) -> Tensor:
    r"""Fischer's bound :math:`\sum_b \log\det A_{bb} \ge \log\det A` of a positive definite matrix (laws C13, C14).

    Blocks of rows of I + K: the evidence of independent sub-sets of the data bounds that of all of them from below.
    Blocks of parameters of I + Λ⁻¹ᐟ²HΛ⁻¹ᐟ²: a block-diagonal GGN. The bound falls when blocks merge, and may be loose
    until they are large. Immer et al. 2023, *Stochastic marginal likelihood gradients using neural tangent kernels*.

    :param matrix: A, shape (n, n), positive definite.
    :param blocks: the size of consecutive blocks, or a partition as index tensors.
    :raises ValueError: no partition of the rows, or a matrix that is not positive definite.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> bool(fischer_logdet(A, 1) >= torch.logdet(A)), bool(fischer_logdet(A, 2) == torch.logdet(A))
    (True, True)
    """
    n = len(matrix)
    if isinstance(blocks, int):
        if blocks < 1:
            raise ValueError(f"blocks: expected a positive size, got {blocks}")
        parts: Sequence[Tensor] = torch.arange(n, device=matrix.device).split(blocks)
    else:
        parts = blocks
        if not parts or not torch.equal(torch.cat(list(parts)).sort().values.cpu(), torch.arange(n)):
            raise ValueError(f"blocks: expected a partition of the {n} rows")
    total = matrix.new_zeros((), dtype=torch.float64)
    for part in parts:
        factor, info = torch.linalg.cholesky_ex(matrix[part][:, part].to(torch.float64))
        if int(info):
            raise ValueError("matrix: expected a positive definite one")
        total = total + 2.0 * factor.diagonal().log().sum()
    return total


def group_logdet(grams: Tensor, variance: Tensor, noise: float | Tensor = 1.0) -> Tensor:
    r"""Law C14 in data space: :math:`\log\det(I + D^{-1}\sum_g v_gK_g) \le \sum_g \log\det(I + v_g D^{-1}K_g)`.

    The right-hand side is the log-determinant of the GGN cut to its blocks of one parameter group each.

    :param grams: K_g, shape (G, n, n).
    :param variance: v_g = 1/λ_g, shape (G,).
    :param noise: D, a number or shape (n,).
    """
    scale = torch.as_tensor(noise, dtype=torch.float64, device=grams.device).expand(grams.shape[-1]).rsqrt()
    inner = grams.to(torch.float64) * variance.to(torch.float64)[:, None, None] * scale.unsqueeze(-1) * scale
    inner.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return torch.linalg.cholesky(inner).diagonal(dim1=-2, dim2=-1).log().sum() * 2.0


def logdet_bounds(nystrom: NystromPreconditioner, whitened_trace: Tensor) -> tuple[Tensor, Tensor]:
    r"""Law C18: bounds of :math:`\log\det(K + D)` from a Nyström approximation and one trace.

    .. math:: \log\det(\hat K + D) \le \log\det(K + D) \le \log\det(\hat K + D) + n\log\bigl(1 + \tfrac1n
        \mathrm{tr}\,D^{-1}(K - \hat K)\bigr),

    by the inequality of the means; C18 as printed has the larger :math:`\mathrm{tr}\,D^{-1}(K - \hat K)` itself
    (Artemev et al. 2021).

    :param whitened_trace: :math:`\mathrm{tr}(D^{-1}K)`.
    :returns: lower and upper bound, moved outward by rounding.
    """
    low, n = nystrom.logdet(), nystrom.shape[-1]
    excess = n * torch.log1p(_missing_trace(nystrom, whitened_trace) / n)
    allowance = _ROUNDING * torch.finfo(torch.float64).eps * (n + low.abs())
    return low - allowance, low + excess + allowance


def _missing_trace(nystrom: NystromPreconditioner, whitened_trace: Tensor) -> Tensor:
    """Tr D⁻¹(K − K̂) ≥ 0."""
    return (torch.as_tensor(whitened_trace, dtype=torch.float64) - nystrom.whitened_trace()).clamp_min(0.0)


def _nystrom_log_density(nystrom: NystromPreconditioner, quadratic: Tensor) -> Tensor:
    """−½q − ½ logdet(K̂ + D) − (n/2) log 2π."""
    return -0.5 * (quadratic + nystrom.logdet() + nystrom.shape[-1] * math.log(2.0 * math.pi))


def collapsed_elbo(nystrom: NystromPreconditioner, targets: Tensor, whitened_trace: Tensor) -> Tensor:
    r"""Law C11: :math:`\log N(t; 0, \hat K + D) - \tfrac12\mathrm{tr}\,D^{-1}(K - \hat K) \le \log N(t; 0, K + D)`.

    Titsias 2009, *Variational learning of inducing variables in sparse Gaussian processes*.

    :param targets: t, shape (n,).
    :param whitened_trace: :math:`\mathrm{tr}(D^{-1}K)`.
    """
    fit = _nystrom_log_density(nystrom, nystrom.quadratic(targets.to(torch.float64)))
    return fit - 0.5 * _missing_trace(nystrom, whitened_trace)


def titsias_upper_bound(nystrom: NystromPreconditioner, targets: Tensor, whitened_trace: Tensor) -> Tensor:
    r"""Law C12: :math:`-\tfrac12 t^\top(\hat K + (1 + c)D)^{-1}t - \tfrac12\log\det(\hat K + D) - \tfrac n2\log 2\pi`.

    :math:`c = \mathrm{tr}\,D^{-1}(K - \hat K)`; never below :math:`\log N(t; 0, K + D)`. Titsias 2014, *Variational
    inference for Gaussian and determinantal point processes*.

    :param targets: t, shape (n,).
    :param whitened_trace: :math:`\mathrm{tr}(D^{-1}K)`.
    """
    shift = 1.0 + _missing_trace(nystrom, whitened_trace)
    rows = (targets.to(torch.float64) / nystrom.noise.sqrt()).unsqueeze(-1)
    inside, outside = nystrom.coordinates(rows)
    fit = (inside.square().squeeze(-1) / (shift + nystrom.eigenvalues)).sum(-1) + outside.square().sum() / shift
    return _nystrom_log_density(nystrom, fit)


@dataclass(frozen=True)
class EvidenceSystem:
    r"""What an evidence is made of at fixed hyper-parameters: the system A = I + WᵀKW and the data, nothing factored.

    :param system: A.
    :param constant: of the log evidence, apart from :math:`-\tfrac12 t^\top A^{-1}t - \tfrac12\log\det A`.
    :param targets: whitened targets t, shape (N·R,); None for a classification's true loss.
    :param offset: m0, shape (N, C), of a classification's true loss.
    :param labels: shape (N,), likewise.
    :param unit: relative rounding of products with K.
    :param curvature_slack: r with :math:`e^{-r}B \preceq B_\star \preceq e^rB` for a curvature taken near the mode.
    """

    system: WhitenedSystem
    constant: float = 0.0
    targets: Tensor | None = None
    offset: Tensor | None = None
    labels: Tensor | None = None
    unit: float = 2.0**-52
    curvature_slack: float = 0.0

    @classmethod
    def gaussian(cls, system: WhitenedSystem, targets: Tensor, unit: float = 2.0**-52) -> EvidenceSystem:
        """Regression; `targets` (n,) not whitened. logdet D is read from the blocks of W."""
        factor = system.factor
        constant = float(torch.linalg.slogdet(factor)[1].sum()) - 0.5 * system.size * math.log(2.0 * math.pi)
        return cls(system, constant, system.reduce(targets.reshape(-1, 1)).squeeze(-1), unit=unit)

    @classmethod
    def softmax(
        cls,
        system: WhitenedSystem,
        logits: Tensor,
        offset: Tensor,
        labels: Tensor,
        variant: str,
        unit: float = 2.0**-52,
    ) -> EvidenceSystem:
        """Classification with the curvature that `system.factor` holds, but for "full", which is set here."""
        if variant == "quadratic":
            whitened = whitened_targets(logits, labels, offset)
            constant = float(whitened.constant) - 0.5 * system.size * math.log(2.0 * math.pi)
            return cls(system, constant, whitened.targets.reshape(-1), unit=unit)
        slack = 0.0
        if variant == "full":
            mode = iterative_mode(system, offset, labels, tolerance=CURVATURE_TOLERANCE)
            slack = mode.curvature_slack(system.blocks)
            system = replace(system, factor=curvature_factor(mode.logits))
        return cls(system, offset=offset, labels=labels, unit=unit, curvature_slack=slack)

    @classmethod
    def of_problem(
        cls, problem: GaussianEvidence | SoftmaxEvidence, precision: Tensor, noise: Tensor | None = None
    ) -> EvidenceSystem:
        """A bare problem at precisions (G,) and learned variances (S,), the noise model's own by default."""
        gram = problem.stack.weighted_sum(precision.to(torch.float64).reciprocal())
        c, points = problem.outputs, problem.rows // problem.outputs
        blocks = gram.reshape(points, c, points, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

        def columns(chosen: Tensor) -> Tensor:
            return gram.reshape(-1, points, c)[:, chosen].flatten(1)

        if isinstance(problem, SoftmaxEvidence):
            factor = curvature_factor(problem.logits)
        else:
            variance = problem.noise.diagonal(None if noise is None else noise.to(gram))
            factor = torch.diag_embed(variance.rsqrt().reshape(points, c))
        system = WhitenedSystem(lambda v: gram @ v, columns, blocks, factor)
        if isinstance(problem, SoftmaxEvidence):
            return cls.softmax(system, problem.logits, problem.offset, problem.labels, problem.variant)
        return cls.gaussian(system, problem.targets)

    def bounds(self, num_landmarks: int | None = None, max_iterations: int = 50, seed: int = 0) -> tuple[float, float]:
        """See :func:`evidence_bounds`."""
        nystrom = self.system.random_nystrom(num_landmarks, seed)
        low, high = logdet_bounds(nystrom, self.system.diagonal().sum())
        pointwise = self.system.pointwise_logdet()
        high = torch.minimum(high, pointwise + _ROUNDING * 2.0**-52 * (pointwise.abs() + self.system.size))
        # log(1 + eʳx) − log(1 + x) ≤ (eʳ − 1) x / (1 + x) ≤ (eʳ − 1) log(1 + x) for every eigenvalue x.
        slack = math.expm1(self.curvature_slack) * high
        low, high = low - slack, high + slack
        if self.targets is None:
            assert self.offset is not None
            assert self.labels is not None
            mode = iterative_mode(self.system, self.offset, self.labels, nystrom_points=num_landmarks, seed=seed)
            fit_low, fit_high = mode.lower, mode.upper
        else:
            found = solve(
                self.system, self.targets, preconditioner=nystrom, tolerance=1e-10, max_iterations=max_iterations
            )
            least, most = quadratic_bounds(
                self.system, self.targets, found.solution, nystrom,
                diagonal=1.0 + self.system.diagonal(), unit=self.unit,
            )  # fmt: skip
            fit_low, fit_high = -0.5 * float(most), -0.5 * float(least)
        return self.constant + fit_low - 0.5 * float(high), self.constant + fit_high - 0.5 * float(low)


def evidence_bounds(
    source: Any,
    precision: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    num_landmarks: int | None = None,
    max_iterations: int = 50,
    seed: int = 0,
) -> tuple[float, float]:
    r"""Lower and upper bound of the exact log evidence at theta_star, without a factorisation (laws C11–C13, C16, C18).

    The log-determinant is bounded by a Nyström approximation (C18) and by blocks of single inputs (C13); the data fit
    :math:`t^\top A^{-1}t` by an iterate of conjugate gradients with its true residual (C16), which is never looser than
    Titsias' bounds (C11, C12) once it has converged. For a classification with its true loss the data fit is a convex
    problem: bounded from below by the value at an iterate of Newton–CG and from above by Fenchel's dual there.

    :param source: a model with ``posterior_bounds``, at its hyper-parameters; or a
        :class:`~ntkgp.evidence.GaussianEvidence` or :class:`~ntkgp.evidence.SoftmaxEvidence` with
    :param precision: its precisions, shape (G,), and
    :param noise: its learned variances, shape (S,) (default: those of its noise model).
    :param num_landmarks: random inputs of the Nyström approximation (default: about 8·√n rows). More are tighter.
    :param max_iterations: of conjugate gradients.
    :param seed: of the choice of landmarks.
    :returns: (lower, upper) in nats, moved outward by an estimate of rounding.
    :raises ValueError: precisions missing for a problem, or given for a model.

    Cost: `max_iterations` products with K, and O(n·m²) for m landmark rows.

    >>> from ntkgp.evidence import NoiseModel
    >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    >>> problem = GaussianEvidence(torch.outer(x, x)[None], 2 * x, NoiseModel.homoscedastic(20, 0.1))
    >>> low, high = evidence_bounds(problem, torch.ones(1))
    >>> high - low < 1e-6
    True
    """
    if isinstance(source, GaussianEvidence | SoftmaxEvidence):
        if precision is None:
            raise ValueError("precision: a problem holds none; expected shape (G,)")
        found = EvidenceSystem.of_problem(source, precision, noise)
    elif hasattr(source, "evidence_system"):
        if precision is not None or noise is not None:
            raise ValueError("precision, noise: a model has its own; expected None")
        found = source.evidence_system()
    else:
        raise TypeError(f"source: expected a model or an evidence problem, got {type(source).__name__}")
    with torch.no_grad():
        return found.bounds(num_landmarks, max_iterations, seed)
