"""The neural tangent kernel of a trained network, one precision per parameter group."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.priors import Prior
from linear_operator.operators import LinearOperator
from torch import Tensor

from ntkgp.kernels.composition import MultioutputArithmetic
from ntkgp.kernels.priors import FlatLogPrior
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.checks import real_numbers
from ntkgp.linearization.second_order import needs_graph
from ntkgp.operators import GroupedGramOperator, NetworkHandle, NeuralTangentOperator
from ntkgp.operators.handle import ValueCache, point_grams, same

__all__ = ["NeuralTangentKernel"]

# A prediction touches the pairs (train, train), (test, train) and (test, test).
_CACHED_PAIRS = 3


def _precision_of(kernel: NeuralTangentKernel) -> Tensor:
    return kernel.precision


def _set_precision_of(kernel: NeuralTangentKernel, value: Tensor) -> None:
    kernel.precision = value


class NeuralTangentKernel(MultioutputArithmetic):
    r"""
    The prior covariance of the linearised network, with a precision for each parameter group,

    .. math:: k(x, x') = J(x) \Lambda^{-1} J(x')^\top = \sum_{g=1}^G \frac{J_g(x) J_g(x')^\top}{\lambda_g}.

    Rows are input-major (GPyTorch's interleaved order): C adjacent ones per input. The per-group Grams
    :math:`K_g = J_g J_g^\top` do not depend on the precisions. They are computed once for a pair of inputs, in float64,
    and remembered by the values of the inputs, so that optimising the precisions costs no network pass. The result has
    the dtype of ``x1``. What is returned:

    - Grams within ``max_memory``: :class:`~ntkgp.operators.GroupedGramOperator`;
    - beyond: :class:`~ntkgp.operators.NeuralTangentOperator`, matrix-free;
    - inputs that require gradients (Bayesian optimisation, inducing points): the same two, differentiable with respect
      to the inputs, nothing remembered;
    - the diagonal: C × C blocks at single inputs, no N × N matrix.

    ``kernel + other`` and ``kernel * other`` lift a single-output kernel to C outputs (:class:`SharedKernel`), where
    GPyTorch fails by shape. ``other + kernel`` runs GPyTorch's own addition of ``other``, which cannot be reached from
    here: for C > 1 write ``kernel + other``, or ``SharedKernel(other, C) + kernel``.

    Jacot et al. 2018, *Neural tangent kernel*, for the kernel; Antorán et al. 2022, *Adapting the linearised Laplace
    model evidence*, for the linear model with a precision per group.

    :param lin: the linearised network; shared, not copied, by copies of the kernel, and no part of its parameters.
    :param precision: :math:`\lambda_g`, a number, ``(G,)`` or ``(*batch_shape, G)``; 1 by default.
    :param precision_prior: a prior on :math:`\lambda`. By default a :class:`FlatLogPrior`, which adds nothing to
        GPyTorch's marginal likelihood (it then is the evidence) and gives BoTorch starting points for restarts.
    :param precision_constraint: positive by exp/log by default: precisions range over many decades.
    :param max_memory: budget for the Grams of one pair of inputs, and for those remembered.
    :param kwargs: ``batch_shape`` and ``active_dims`` as in every GPyTorch kernel.
    :raises ValueError: precisions of another shape or not positive, or a malformed budget.
    :raises TypeError: ``lin``, the prior or the constraint is of another type.

    Cost: first call O(N1·N2·C²·P) flops and G·N1·N2·C² float64 numbers; every later one O(G·N1·N2·C²).

    Example:
        >>> import torch, ntkgp
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> lin = ntkgp.LinearizedNetwork(net, torch.randn(2, 3), groups="layer")
        >>> kernel = NeuralTangentKernel(lin, precision=[0.5, 2.0])
        >>> kernel(torch.randn(5, 3)).shape
        torch.Size([10, 10])
    """

    def __init__(
        self,
        lin: LinearizedNetwork,
        precision: float | Tensor | list[float] | None = None,
        precision_prior: Prior | None = None,
        precision_constraint: Interval | None = None,
        max_memory: str | int | float = "2GiB",
        **kwargs: Any,
    ) -> None:
        if not isinstance(lin, LinearizedNetwork):
            raise TypeError(f"lin: expected a ntkgp.LinearizedNetwork, got {type(lin).__name__}")
        if precision_prior is not None and not isinstance(precision_prior, Prior):
            raise TypeError(f"precision_prior: expected a gpytorch Prior, got {type(precision_prior).__name__}")
        if precision_constraint is not None and not isinstance(precision_constraint, Interval):
            raise TypeError(
                f"precision_constraint: expected a gpytorch constraint, got {type(precision_constraint).__name__}"
            )
        if kwargs.get("ard_num_dims") is not None:
            raise TypeError("ard_num_dims: the neural tangent kernel has no lengthscales")
        super().__init__(**kwargs)
        self._handle = NetworkHandle(lin, max_memory)
        self._grams = ValueCache(_CACHED_PAIRS, self._handle.max_memory)
        # A half-precision network still gets precisions that resolve their range.
        dtype = lin.dtype if lin.dtype in (torch.float32, torch.float64) else torch.get_default_dtype()
        groups = len(lin.groups.names)
        self.register_parameter(
            "raw_precision", torch.nn.Parameter(torch.zeros(*self.batch_shape, groups, dtype=dtype))
        )
        constraint = Positive(torch.exp, torch.log) if precision_constraint is None else precision_constraint
        self.register_constraint("raw_precision", constraint)
        self.register_prior(
            "precision_prior",
            FlatLogPrior() if precision_prior is None else precision_prior,
            _precision_of,
            _set_precision_of,
        )
        if precision is not None or constraint.initial_value is None:
            self.precision = 1.0 if precision is None else precision

    @property
    def lin(self) -> LinearizedNetwork:
        """The linearised network."""
        return self._handle.lin

    @property
    def num_outputs(self) -> int:  # type: ignore[override]
        """C, the number of outputs per input."""
        return self.lin.num_outputs

    @property
    def precision(self) -> Tensor:
        r"""Prior precisions :math:`\lambda_g`, (*batch_shape, G); settable from a number or any shape that expands."""
        return self.raw_precision_constraint.transform(self.raw_precision)

    @precision.setter
    def precision(self, value: float | Tensor | list[float]) -> None:
        raw = self.raw_precision
        new = real_numbers(value, "precision").to(raw)
        try:
            new = new.expand(raw.shape)
        except RuntimeError:
            raise ValueError(
                f"precision: expected a number or a shape that expands to {tuple(raw.shape)}, got {tuple(new.shape)}"
            ) from None
        if not bool((torch.isfinite(new) & (new > 0)).all()):
            raise ValueError(f"precision: expected positive finite numbers, got {new.tolist()}")
        self.initialize(raw_precision=self.raw_precision_constraint.inverse_transform(new))

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """C."""
        return self.num_outputs

    def point_blocks(self, x: Tensor) -> Tensor:
        r"""
        Prior covariance of the outputs at single inputs, :math:`J(x_n) \Lambda^{-1} J(x_n)^\top`.

        :param x: packed inputs ``(*batch, N, D)``.
        :return: ``(*batch, N, C, C)`` in the dtype of ``x``; differentiable with respect to the precisions and to x.

        Cost: O(N·C²·P) flops.
        """
        x = x if self.active_dims is None else x.index_select(-1, self.active_dims)
        return self._weighted_blocks(x, x).to(x.dtype)

    def forward(
        self,
        x1: Tensor,  # shape: (*batch, N1, D)
        x2: Tensor,  # shape: (*batch, N2, D)
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Tensor | LinearOperator:  # shape: (*batch, N1·C, N2·C) or (*batch, N1·C)
        """Prior covariance between two sets of packed inputs, or the variance of each output with ``diag=True``."""
        if last_dim_is_batch:
            raise NotImplementedError("NeuralTangentKernel does not support last_dim_is_batch")
        if diag:
            return self._weighted_blocks(x1, x2).diagonal(dim1=-2, dim2=-1).flatten(-2).to(x1.dtype)
        variance = self.precision.reciprocal().to(x1.dtype)
        batch1, batch2 = _without_repeats(x1), _without_repeats(x2)
        if not self._fits(batch1, batch2):
            return NeuralTangentOperator(x1, x2, variance, self._handle)
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
        if needs_graph(x1, x2):
            grams = self._batch_grams(x1, x2, batch)
        else:
            num_bytes = self._gram_bytes(batch1, batch2)
            grams = self._grams.fetch((batch1, batch2), num_bytes, lambda: self._batch_grams(batch1, batch2, batch))
        return GroupedGramOperator(grams.expand(*batch, *grams.shape[-3:]), variance)

    def _batch_grams(self, x1: Tensor, x2: Tensor, batch: torch.Size) -> Tensor:
        """Per-group Grams: (*batch, G, N1·C, N2·C), without the batch where neither input has one."""
        lin, budget = self.lin, self._handle.max_memory
        symmetric = x1 is x2 or (not needs_graph(x1, x2) and same(x1, x2))
        c, (n1, n2) = self.num_outputs, (x1.shape[-2], x2.shape[-2])
        if x1.dim() == x2.dim() == 2:
            return lin.grams(x1, None if symmetric else x2, max_memory=budget)
        # Inputs that all entries of the other batch share are visited once, in one rectangular Gram.
        if x2.dim() == 2:
            rows = lin.grams(x1.reshape(-1, x1.shape[-1]), x2, max_memory=budget)
            return rows.unflatten(1, (*x1.shape[:-2], n1 * c)).movedim(0, -3)
        if x1.dim() == 2:
            columns = lin.grams(x1, x2.reshape(-1, x2.shape[-1]), max_memory=budget)
            return columns.unflatten(2, (*x2.shape[:-2], n2 * c)).movedim((0, 1), (-3, -2))
        x1, x2 = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (x1, x2))
        entries = [lin.grams(a, None if symmetric else b, max_memory=budget) for a, b in zip(x1, x2, strict=True)]
        return torch.stack(entries).unflatten(0, tuple(batch))

    def _gram_bytes(self, x1: Tensor, x2: Tensor) -> int:
        """Bytes of the Grams of a pair of inputs."""
        entries = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2]).numel()
        return 8 * len(self.lin.groups.names) * entries * x1.shape[-2] * x2.shape[-2] * self.num_outputs**2

    def _fits(self, x1: Tensor, x2: Tensor) -> bool:
        """Whether the Grams, and what is held while they are built, fit in the budget."""
        lin, budget = self.lin, self._handle.max_memory
        n1, n2 = x1.shape[-2], x2.shape[-2]
        if needs_graph(x1, x2):
            inputs1, inputs2 = x1.shape[:-1].numel(), x2.shape[:-1].numel()
            return lin.gram_memory(inputs1, inputs2, graph=True) <= budget
        if x1.dim() > 2 and x2.dim() > 2:
            budget -= self._gram_bytes(x1, x2) - self._gram_bytes(x1[(0,) * (x1.dim() - 2)], x2[(0,) * (x2.dim() - 2)])
        else:
            n1, n2 = x1.shape[:-1].numel(), x2.shape[:-1].numel()
        return lin.gram_memory(n1, n2) <= budget

    def _weighted_blocks(self, x1: Tensor, x2: Tensor) -> Tensor:  # shape: (*batch, N, C, C)
        """Σ_g J_g(x1_n) J_g(x2_n)ᵀ / λ_g in float64."""
        if x1.shape[-2] != x2.shape[-2]:
            raise ValueError(
                f"diag=True: expected as many inputs in x1 as in x2, got {x1.shape[-2]} and {x2.shape[-2]}"
            )
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
        flat1 = x1.expand(*batch, *x1.shape[-2:]).reshape(-1, x1.shape[-1])
        flat2 = flat1 if x1 is x2 else x2.expand(*batch, *x2.shape[-2:]).reshape(-1, x2.shape[-1])
        blocks = point_grams(self._handle, flat1, flat2).unflatten(1, (*batch, x1.shape[-2])).movedim(0, -4)
        variance = self.precision.reciprocal().to(blocks.dtype)  # shape: (*batch_shape, G)
        return (variance[..., None, None, None] * blocks).sum(-4)


def _without_repeats(x: Tensor) -> Tensor:
    """One entry of a batch of inputs without gradients whose entries are all equal, else the batch."""
    if x.dim() == 2 or needs_graph(x) or x.shape[:-2].numel() == 0:
        return x
    first = x[(0,) * (x.dim() - 2)]
    return first if torch.equal(x, first.expand_as(x)) else x
