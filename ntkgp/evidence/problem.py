"""Evidence problems: the tensors that determine a model evidence, with no model attached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ntkgp.evidence.stack import GramStack, gram_stack
from ntkgp.likelihoods import validate_labels
from ntkgp.linearization.symmetric import SymmetricGrams


def _check_finite(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Check shape and finiteness of one field and return it in contiguous float64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    value = value.detach().to(torch.float64).contiguous()
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} contains NaN or infinite values")
    return value


def _check_grams(grams: Tensor | SymmetricGrams) -> tuple[Tensor | SymmetricGrams, GramStack]:
    """Check the Grams; return them, a tensor in contiguous float64, and their view."""
    if not isinstance(grams, Tensor | SymmetricGrams):
        raise TypeError(f"grams must be a torch.Tensor or SymmetricGrams, got {type(grams).__name__}")
    if isinstance(grams, Tensor):
        if grams.ndim != 3 or grams.shape[-1] != grams.shape[-2] or 0 in grams.shape:
            raise ValueError(f"grams must have shape (G, n, n) with G, n >= 1, got {tuple(grams.shape)}")
        grams = grams.detach().to(torch.float64).contiguous()
    stack = gram_stack(grams)
    if bool((stack.diagonal() < 0).any()):
        raise ValueError("grams must be positive semi-definite, got a negative diagonal entry")
    if not stack.is_finite():
        raise ValueError("grams contains NaN or infinite values")
    return grams, stack


@dataclass(frozen=True)
class NoiseModel:
    r"""Diagonal Gaussian noise :math:`D = \mathrm{diag}(d)`, :math:`d_i = d^0_i + \sigma^2_{c(i)}`.

    The known part :math:`d^0` is never changed; the S learned variances :math:`\sigma^2_c` each act on the rows of one
    component. Use the constructors :meth:`homoscedastic`, :meth:`per_output` and :meth:`known`.

    :param fixed: known variances of the rows, shape (n,).
    :param component: index in 0..S-1 of the learned variance that acts on each row, shape (n,); ignored for S = 0.
    :param values: current learned variances, shape (S,); S = 0 when nothing is learned.
    :param minimum: smallest learned variance allowed (a likelihood's constraint), in the units of the targets squared.
    :raises ValueError: for wrong shapes, negative variances, or a row whose total variance could be zero.

    >>> import torch
    >>> NoiseModel.per_output(rows=6, values=torch.tensor([0.1, 0.2])).diagonal()
    tensor([0.1000, 0.2000, 0.1000, 0.2000, 0.1000, 0.2000], dtype=torch.float64)
    """

    fixed: Tensor
    component: Tensor
    values: Tensor
    minimum: float = 0.0

    def __post_init__(self) -> None:
        """Validate and normalise the fields."""
        rows = self.fixed.numel()
        object.__setattr__(self, "fixed", _check_finite("fixed", self.fixed, (rows,)))
        object.__setattr__(self, "values", _check_finite("values", self.values, (self.values.numel(),)))
        if tuple(self.component.shape) != (rows,):
            raise ValueError(f"component must have shape ({rows},), got {tuple(self.component.shape)}")
        if bool((self.fixed < 0).any()) or bool((self.values < 0).any()) or self.minimum < 0:
            raise ValueError("noise variances must not be negative")
        if self.num_learned == 0:
            if bool((self.fixed <= 0).any()):
                raise ValueError("fixed must be positive in every row when no noise is learned")
        elif set(self.component.unique().tolist()) != set(range(self.num_learned)):
            raise ValueError(f"component must use every index 0..{self.num_learned - 1}")

    @property
    def num_learned(self) -> int:
        """Number S of learned variances."""
        return self.values.numel()

    @property
    def is_uniform(self) -> bool:
        """Whether the noise is one learned variance on all rows and nothing else."""
        return self.num_learned == 1 and not bool(self.fixed.any())

    def to(self, device: torch.device) -> NoiseModel:
        """Return the same model on a device."""
        return NoiseModel(self.fixed.to(device), self.component.to(device), self.values.to(device), self.minimum)

    def diagonal(self, values: Tensor | None = None) -> Tensor:
        """Return the row variances d, shape (n,), at the given learned variances (default: the current ones)."""
        values = self.values if values is None else values
        return self.fixed + values[self.component] if self.num_learned else self.fixed

    def sum_per_component(self, rows: Tensor) -> Tensor:
        """Sum a vector over the rows of each component: (n,) -> (S,)."""
        out = rows.new_zeros(self.num_learned)
        return out.index_add(0, self.component, rows) if self.num_learned else out

    @classmethod
    def homoscedastic(cls, rows: int, value: float | Tensor = 1.0, minimum: float = 0.0) -> NoiseModel:
        """Build one learned variance for all rows."""
        value = torch.as_tensor(value, dtype=torch.float64).reshape(1)
        return cls(torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.long), value, minimum)

    @classmethod
    def per_output(cls, rows: int, values: Tensor, minimum: float = 0.0) -> NoiseModel:
        """Build one learned variance per output of input-major rows; `values` has shape (C,)."""
        outputs = values.numel()
        if outputs == 0 or rows % outputs:
            raise ValueError(f"rows must be a multiple of the number of outputs, got {rows} rows and {outputs} outputs")
        component = torch.arange(rows) % outputs
        return cls(torch.zeros(rows, dtype=torch.float64), component, values.reshape(-1), minimum)

    @classmethod
    def known(cls, diagonal: Tensor, learned: Tensor | None = None, minimum: float = 0.0) -> NoiseModel:
        """Build known row variances (n,), plus one learned variance on top when `learned` (its value) is given."""
        values = torch.zeros(0) if learned is None else torch.as_tensor(learned).reshape(1)
        return cls(diagonal, torch.zeros(diagonal.shape, dtype=torch.long), values, minimum)


class _OfGrams:
    """What problems read off their Grams."""

    grams: Tensor | SymmetricGrams

    @property
    def num_groups(self) -> int:
        """Number G of parameter groups."""
        return self.grams.shape[0]

    @property
    def rows(self) -> int:
        """Number n = N*C of scalar observations, or of logits."""
        return self.grams.shape[1]


@dataclass(frozen=True)
class GaussianEvidence(_OfGrams):
    r"""Regression: :math:`t = J\theta + \varepsilon`; :math:`\theta_g \sim N(0, I/\lambda_g)`, noise of variance D.

    Rows are input-major, n = N*C. The targets are :math:`t = y - f + J\tilde\theta`.

    :param grams: per-group Grams :math:`K_g = J_g J_g^\top`, shape (G, n, n), or the same as
        :class:`~ntkgp.linearization.symmetric.SymmetricGrams`, in half the memory or on disk. Never copied where a
        tensor is float64 and contiguous.
    :param targets: t, shape (n,).
    :param noise: the noise model with n rows.
    :param outputs: C, so that n = N*C.
    :param tangent_theta: rows :math:`J_g \tilde\theta_g`, shape (G, n); needed by the evidence at the trained weights
        and by the distance between the trained weights and theta_star.
    :param theta_norms: squared norms :math:`\|\tilde\theta_g\|^2`, shape (G,); as above.
    :param observations: y, shape (n,), only to warn of constant targets.
    :param group_names: names of the groups, length G (default: "group 0", ...).
    :param group_sizes: number of parameters of each group, length G (default: unknown).
    :raises ValueError: for wrong shapes or non-finite entries.

    >>> import torch
    >>> jacobian = torch.eye(3, dtype=torch.float64)
    >>> problem = GaussianEvidence((jacobian @ jacobian.T)[None], torch.ones(3), NoiseModel.homoscedastic(3, 0.1))
    >>> problem.num_groups, problem.rows
    (1, 3)
    """

    grams: Tensor | SymmetricGrams
    targets: Tensor
    noise: NoiseModel
    outputs: int = 1
    tangent_theta: Tensor | None = None
    theta_norms: Tensor | None = None
    observations: Tensor | None = None
    group_names: tuple[str, ...] = ()
    group_sizes: tuple[int, ...] = ()
    stack: GramStack = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate and normalise the fields."""
        num_groups, rows = _set_grams(self)
        if self.outputs < 1 or rows % self.outputs:
            raise ValueError(f"outputs must divide the number of rows {rows}, got {self.outputs}")
        if self.noise.fixed.numel() != rows:
            raise ValueError(f"noise must have {rows} rows, got {self.noise.fixed.numel()}")
        object.__setattr__(self, "noise", self.noise.to(self.grams.device))
        object.__setattr__(self, "targets", _check_finite("targets", self.targets, (rows,)))
        if self.observations is not None:
            object.__setattr__(self, "observations", _check_finite("observations", self.observations, (rows,)))
        _check_common(self, num_groups, rows)

    @property
    def max_dimension(self) -> int:
        """Largest effective dimension that the data can determine."""
        return self.rows

    @property
    def residual(self) -> Tensor:
        """Residual y - f of the network itself, shape (n,)."""
        if self.tangent_theta is None:
            raise ValueError("tangent_theta is needed for the residual of the network, got None")
        return self.targets - self.tangent_theta.sum(0)


@dataclass(frozen=True)
class SoftmaxEvidence(_OfGrams):
    r"""Classification: labels with logits :math:`h = m_0 + J\theta`, :math:`\theta_g \sim N(0, I/\lambda_g)`.

    C >= 2: softmax over C classes. C = 1: Bernoulli with one logistic output and labels in {0, 1}.

    :param grams: per-group Grams, shape (G, N*C, N*C), input-major rows, see :class:`GaussianEvidence`.
    :param logits: network outputs f, shape (N, C).
    :param offset: :math:`m_0 = f - J\tilde\theta`, shape (N, C).
    :param labels: integer labels, shape (N,).
    :param variant: which theta_star and which curvature H: "simple" (true convex loss, H at the trained
        weights), "quadratic" (second-order expansion of the loss there), "full" (true loss, H at theta_star).
    :param tangent_theta: rows :math:`J_g \tilde\theta_g`, shape (G, N*C), see :class:`GaussianEvidence`.
    :param theta_norms: :math:`\|\tilde\theta_g\|^2`, shape (G,).
    :param group_names: names of the groups, length G.
    :param group_sizes: number of parameters of each group, length G.
    :raises ValueError: for wrong shapes, labels out of range or non-finite entries.

    >>> import torch
    >>> zeros = torch.zeros(2, 2)
    >>> SoftmaxEvidence(torch.eye(4)[None], zeros, zeros, torch.tensor([0, 1])).max_dimension
    2
    """

    grams: Tensor | SymmetricGrams
    logits: Tensor
    offset: Tensor
    labels: Tensor
    variant: str = "simple"
    tangent_theta: Tensor | None = None
    theta_norms: Tensor | None = None
    group_names: tuple[str, ...] = ()
    group_sizes: tuple[int, ...] = ()
    stack: GramStack = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate and normalise the fields."""
        num_groups, rows = _set_grams(self)
        if self.variant not in ("simple", "quadratic", "full"):
            raise ValueError(f"variant must be 'simple', 'quadratic' or 'full', got {self.variant!r}")
        if self.logits.ndim != 2 or self.logits.numel() != rows:
            raise ValueError(f"logits must have shape (N, C) with N*C = {rows}, got {tuple(self.logits.shape)}")
        shape = tuple(self.logits.shape)
        object.__setattr__(self, "logits", _check_finite("logits", self.logits, shape))
        object.__setattr__(self, "offset", _check_finite("offset", self.offset, shape))
        labels = validate_labels(self.labels, max(shape[1], 2), torch.Size(shape[:1]))
        object.__setattr__(self, "labels", labels)
        _check_common(self, num_groups, rows)

    @property
    def outputs(self) -> int:
        """Number C of logits per input."""
        return self.logits.shape[1]

    @property
    def max_dimension(self) -> int:
        """Largest effective dimension that the data can determine: the rank N*(C-1) of the curvature (N for C = 1)."""
        return self.logits.shape[0] * max(self.outputs - 1, 1)


Problem = GaussianEvidence | SoftmaxEvidence


class OwnProblem(Protocol):
    """A problem that brings its own objective, such as one of streamed statistics."""

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups, length G."""

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of parameters of each group, length G, or empty."""

    @property
    def max_dimension(self) -> int:
        """Largest effective dimension that the data can determine."""

    def objective(self, at: str, bounds: tuple[float, float]) -> Any:
        """The :class:`~ntkgp.evidence.EvidenceObjective`; `at` and `bounds` as in :func:`fit_evidence`."""


AnyProblem = GaussianEvidence | SoftmaxEvidence | OwnProblem


def _set_grams(problem: Problem) -> tuple[int, int]:
    """Set the Grams and their view; return (G, n)."""
    grams, stack = _check_grams(problem.grams)
    object.__setattr__(problem, "grams", grams)
    object.__setattr__(problem, "stack", stack)
    return stack.shape[0], stack.shape[1]


def _check_common(problem: Problem, num_groups: int, rows: int) -> None:
    """Validate the fields that both problems share."""
    if (problem.tangent_theta is None) != (problem.theta_norms is None):
        raise ValueError("tangent_theta and theta_norms must be given together")
    if problem.tangent_theta is not None and problem.theta_norms is not None:
        tangent = _check_finite("tangent_theta", problem.tangent_theta, (num_groups, rows))
        norms = _check_finite("theta_norms", problem.theta_norms, (num_groups,))
        if bool((norms < 0).any()):
            raise ValueError("theta_norms must not be negative")
        object.__setattr__(problem, "tangent_theta", tangent)
        object.__setattr__(problem, "theta_norms", norms)
    names = tuple(problem.group_names) or tuple(f"group {g}" for g in range(num_groups))
    if len(names) != num_groups:
        raise ValueError(f"group_names must have length {num_groups}, got {len(names)}")
    if problem.group_sizes and len(problem.group_sizes) != num_groups:
        raise ValueError(f"group_sizes must have length {num_groups}, got {len(problem.group_sizes)}")
    object.__setattr__(problem, "group_names", names)
    object.__setattr__(problem, "group_sizes", tuple(int(size) for size in problem.group_sizes))
