"""Sums and products of multi-output kernels with ordinary ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel
from linear_operator import to_dense, to_linear_operator
from linear_operator.operators import KroneckerProductLinearOperator, LinearOperator
from torch import Tensor

__all__ = ["MultioutputArithmetic", "SharedKernel"]


def outputs_of(kernel: Kernel, width: int = 1) -> int:
    """Number of outputs per input of a kernel on inputs of some width.

    :raises ValueError: a sum or product of kernels with different numbers of outputs.
    """
    if isinstance(kernel, AdditiveKernel | ProductKernel):
        found = [outputs_of(part, width) for part in kernel.kernels]
        if len(set(found)) > 1:
            raise ValueError(
                f"kernel: {type(kernel).__name__} of kernels with {found} outputs per input; write the kernel with "
                "several outputs first (NTK + RBFKernel()), which lifts the others"
            )
        return found[0]
    x = torch.zeros(1, width)
    outputs = kernel.num_outputs_per_input(x, x)
    return outputs if isinstance(outputs, int) else outputs[0]


class MultioutputArithmetic(Kernel):
    """
    Kernel whose ``+`` and ``*`` lift single-output kernels to its own number of outputs.

    GPyTorch adds an N × N and an N·C × N·C matrix and fails by shape. Here a single-output kernel is lifted by
    :class:`SharedKernel`: an independent copy per output in a sum, the same factor for all outputs in a product.
    """

    num_outputs: int

    def __add__(self, other: Kernel) -> Kernel:
        return self._combine(other, MultioutputSum, AdditiveKernel)

    def __mul__(self, other: Kernel) -> Kernel:
        return self._combine(other, MultioutputProduct, ProductKernel)

    def _combine(self, other: Kernel, cls: type[Kernel], stock: type[Kernel]) -> Kernel:
        if not isinstance(other, Kernel):
            return NotImplemented
        if self.num_outputs == 1 and outputs_of(other) == 1:
            cls = stock
        lifted = self._lift(other, identical=stock is ProductKernel)
        parts: list[Kernel] = []
        for operand in (self, lifted):
            parts.extend(operand.kernels if isinstance(operand, stock) else [operand])
        return cls(*parts)

    def _lift(self, other: Kernel, identical: bool) -> Kernel:
        outputs = outputs_of(other)
        if outputs == self.num_outputs:
            return other
        if outputs != 1:
            raise ValueError(
                f"other: expected a kernel with 1 or {self.num_outputs} outputs per input, "
                f"got {type(other).__name__} with {outputs}"
            )
        return SharedKernel(other, self.num_outputs, identical=identical)


class _Composed(MultioutputArithmetic):
    """
    A kernel without parameters of its own, whose batch shape is that of its parts.

    GPyTorch's ``expand_batch`` writes expanded parts under dotted names where nobody looks for them, and its
    ``__getitem__`` keeps the batch shape of before.
    """

    def _with_parts(self, change: Callable[[Kernel], Kernel]) -> Kernel:
        new = copy.deepcopy(self)
        if isinstance(self, SharedKernel):
            new.base_kernel = change(self.base_kernel)
        else:
            new.kernels = torch.nn.ModuleList(change(kernel) for kernel in self.kernels)
        new.batch_shape = torch.Size([])
        return new

    def __getitem__(self, index: Any) -> Kernel:
        return self._with_parts(lambda kernel: kernel[index])

    def expand_batch(self, *sizes: Any) -> Kernel:
        """The same kernel with the parameters of all parts expanded to a batch shape."""
        return self._with_parts(lambda kernel: kernel.expand_batch(*sizes))


class MultioutputSum(_Composed, AdditiveKernel):
    """A sum of kernels with C outputs each."""

    @property
    def num_outputs(self) -> int:  # type: ignore[override]
        """C."""
        return outputs_of(self.kernels[0])


class MultioutputProduct(_Composed, ProductKernel):
    """An elementwise product of kernels with C outputs each, as a dense matrix."""

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Product of the covariances, or of the variances with ``diag=True``."""
        # linear_operator multiplies low-rank roots, which a singular factor such as 1 1ᵀ does not have exactly.
        terms = [to_dense(kernel(x1, x2, diag=diag, **params)) for kernel in self.kernels]
        return functools.reduce(torch.mul, terms)

    @property
    def num_outputs(self) -> int:  # type: ignore[override]
        """C."""
        return outputs_of(self.kernels[0])


class SharedKernel(_Composed):
    r"""
    An ordinary kernel for all C outputs of a multi-output model, in GPyTorch's interleaved order,

    .. math:: K = K_\text{base} \otimes I_C \quad\text{(default)}, \qquad K = K_\text{base} \otimes 1 1^\top
        \quad\text{(identical=True)}.

    The first has independent functions of one law in every output and is what ``NTK + RBFKernel()`` means; the second
    has the same function in all outputs and is what ``NTK * RBFKernel()`` means: every C × C block is scaled by
    :math:`k_\text{base}(x, x')`.

    :param base_kernel: a kernel with one output per input.
    :param num_outputs: C.
    :param identical: whether all outputs share one function instead of one law.
    :raises ValueError: a base kernel with several outputs, or C < 1.

    Cost: that of the base kernel; the Kronecker product stays lazy.

    Example:
        >>> import gpytorch, torch
        >>> kernel = SharedKernel(gpytorch.kernels.RBFKernel(), num_outputs=3)
        >>> kernel(torch.randn(5, 2)).shape
        torch.Size([15, 15])
    """

    def __init__(self, base_kernel: Kernel, num_outputs: int, *, identical: bool = False) -> None:
        if not isinstance(base_kernel, Kernel):
            raise ValueError(f"base_kernel: expected a gpytorch Kernel, got {type(base_kernel).__name__}")
        if isinstance(num_outputs, bool) or not isinstance(num_outputs, int) or num_outputs < 1:
            raise ValueError(f"num_outputs: expected a positive int, got {num_outputs!r}")
        if outputs_of(base_kernel) != 1:
            raise ValueError(
                f"base_kernel: expected one output per input, got {type(base_kernel).__name__} "
                f"with {outputs_of(base_kernel)}"
            )
        super().__init__()
        self.base_kernel = base_kernel
        self.num_outputs = num_outputs
        self.identical = identical

    @property
    def is_stationary(self) -> bool:
        """Whether the base kernel is stationary."""
        return self.base_kernel.is_stationary

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """C."""
        return self.num_outputs

    def forward(
        self,
        x1: Tensor,  # shape: (*batch, N1, D)
        x2: Tensor,  # shape: (*batch, N2, D)
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Tensor | LinearOperator:  # shape: (*batch, N1·C, N2·C) or (*batch, N1·C)
        """Covariance of all outputs between two sets of inputs."""
        if last_dim_is_batch:
            raise NotImplementedError("SharedKernel does not support last_dim_is_batch")
        base = self.base_kernel(x1, x2, diag=diag, **params)
        if diag:
            base = base.to_dense() if isinstance(base, LinearOperator) else base
            return base.repeat_interleave(self.num_outputs, dim=-1)
        base = to_linear_operator(base).evaluate_kernel()
        c = self.num_outputs
        outputs = torch.ones(c, c, dtype=base.dtype, device=base.device)
        outputs = outputs if self.identical else outputs.tril().triu()
        return KroneckerProductLinearOperator(base, to_linear_operator(outputs.expand(*base.batch_shape, c, c)))
