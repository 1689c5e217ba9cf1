"""Preconditioned conjugate gradients for several right-hand sides, with residuals that can be believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

Product = Callable[[Tensor], Tensor]

_SYMMETRIC = 1e-8
_INDEFINITE = 1e-10
_WORTHWHILE = 0.5


@dataclass(frozen=True)
class Solution:
    r"""What :func:`solve` returns; unpacks as ``solution, residual = solve(...)``.

    :param solution: x, in the shape of the right-hand side, float64.
    :param residual: :math:`b - Ax` *recomputed* from the solution, in the same shape: no recurrence, hence fit for
        certificates (laws B21, B22, C16).
    :param iterations: products with A on the way, each with all right-hand sides that had not converged.
    :param converged: whether every column of the residual is within the tolerance.
    :param relative_residual: :math:`\|b - Ax\| / \|b\|` per right-hand side (0 for b = 0), shape (k,), () for a vector.
    """

    solution: Tensor
    residual: Tensor
    iterations: int
    converged: bool
    relative_residual: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        """The solution and its residual."""
        return iter((self.solution, self.residual))


def solve(
    operator: LinearOperator | Tensor | Product,
    rhs: Tensor,
    *,
    preconditioner: Product | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
    x0: Tensor | None = None,
) -> Solution:
    r"""Solve :math:`AX = B` for a symmetric positive definite A by preconditioned conjugate gradients, in float64.

    Every column of B has its own step sizes: the columns are independent runs that share the products with A. A column
    within the tolerance is left as it is and costs nothing more. The residuals are recomputed from the solution at the
    end; where rounding let the recurrence run ahead of them, the iteration starts again from the true residual, until
    that gains nothing. For a given input the result is the same bit by bit.

    :param operator: A: a symmetric tensor (n, n), a :class:`~linear_operator.operators.LinearOperator`, or a function
        (n, k) -> (n, k). Products with operators of another dtype are made in it.
    :param rhs: B, shape (n,) or (n, k).
    :param preconditioner: a function (n, k) -> (n, k) that multiplies by an approximation of :math:`A^{-1}`, symmetric
        and positive definite; for instance a :class:`NystromPreconditioner`.
    :param tolerance: accepted :math:`\|b - Ax\| / \|b\|` per column, in (0, 1).
    :param max_iterations: largest number of products with A, that of the final residual apart; 0 gives back x0.
    :param x0: where to start, in the shape of B (default: zero).
    :returns: see :class:`Solution`. Not reaching the tolerance is no error: look at ``converged``.
    :raises ValueError: other shapes, an A that is not square, symmetric or positive definite, NaN or infinite entries,
        a tolerance out of range.
    :raises TypeError: no tensors of real numbers, another kind of operator.

    Cost: per iteration one product with A and 10·n·k flops; memory 5·n·k numbers. Iterations: about
    :math:`\tfrac12\sqrt{\kappa}\,\log(2/\text{tolerance})` for the condition number κ of the preconditioned A.
    Hestenes & Stiefel 1952, *Methods of conjugate gradients for solving linear systems*.

    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> solution, residual = solve(A, torch.tensor([1.0, 2.0]))
    >>> solution
    tensor([0.0909, 0.6364], dtype=torch.float64)
    >>> solve(A, torch.eye(2)).converged
    True
    """
    b = _check_rhs(rhs)
    product = as_product(operator, len(b))
    precondition = _checked(preconditioner, "preconditioner") if preconditioner is not None else _same
    if not isinstance(tolerance, int | float) or not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance: expected a number in (0, 1), got {tolerance!r}")
    if not isinstance(max_iterations, int) or isinstance(max_iterations, bool) or max_iterations < 0:
        raise ValueError(f"max_iterations: expected an integer >= 0, got {max_iterations!r}")
    with torch.no_grad():
        # By powers of two, exactly: norms of very small or large numbers would be zero or infinite.
        scale = _power_of_two(b)
        b = b / scale
        norms = b.norm(dim=0)
        x = torch.zeros_like(b) if x0 is None else _check_start(x0, rhs).reshape(b.shape) / scale
        x[:, norms == 0] = 0.0
        residual = b - product(x) if x0 is not None else b.clone()
        used, last = 0, torch.full_like(norms, torch.inf)
        while True:
            size = residual.norm(dim=0)
            # A column that a restart no longer improves has reached the accuracy that rounding allows.
            active = ((size > tolerance * norms) & (size <= _WORTHWHILE * last)).nonzero()[:, 0]
            if not len(active) or used >= max_iterations:
                break
            last[active] = size[active]
            limits = tolerance * norms
            used += _iterate(product, precondition, x, residual, active, limits, max_iterations - used)
            residual = b - product(x)
    relative = size / torch.where(norms > 0, norms, 1.0)
    converged = bool((size <= tolerance * norms).all())
    x, residual = ((scale * found).reshape(rhs.shape) for found in (x, residual))
    return Solution(x, residual, used, converged, relative.reshape(rhs.shape[1:]))


def _power_of_two(b: Tensor) -> Tensor:
    """A power of two near the largest entry of every column, shape (k,); 1 for a column of zeros."""
    largest = b.abs().amax(0)
    exponent = torch.frexp(largest).exponent.clamp(-1021, 1024) - 1
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


def _iterate(
    product: Product,
    precondition: Product,
    x: Tensor,  # shape: (n, k)
    residual: Tensor,  # shape: (n, k)
    active: Tensor,
    limits: Tensor,  # shape: (k,)
    budget: int,
) -> int:
    """Iterate on the active columns of x, in place, until the recurrence meets their limits; return the products."""
    r = residual[:, active]
    z = precondition(r)
    p, rz = z, _dot(r, z)
    _check_definite("preconditioner", rz, r, z)
    for used in range(1, budget + 1):
        q = product(p)
        curvature = _dot(p, q)
        _check_definite("operator", curvature, p, q)
        step = torch.where((curvature > 0) & (rz > 0), rz / curvature, 0.0)
        x[:, active] += step * p
        r = r - step * q
        # Without curvature or descent nothing but rounding is left; the caller decides from the true residual.
        keep = (r.norm(dim=0) > limits[active]) & (step > 0)
        if not bool(keep.any()):
            return used
        if not bool(keep.all()):
            active, r, p, rz = active[keep], r[:, keep], p[:, keep], rz[keep]
        z = precondition(r)
        new = _dot(r, z)
        _check_definite("preconditioner", new, r, z)
        p, rz = z + (new / rz) * p, new
    return budget


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the columns."""
    return (a * b).sum(0)


def _same(v: Tensor) -> Tensor:
    """No preconditioner."""
    return v


def _check_definite(name: str, value: Tensor, a: Tensor, b: Tensor) -> None:
    """Refuse a quadratic form that is negative beyond rounding."""
    bad = value < -_INDEFINITE * a.norm(dim=0) * b.norm(dim=0)
    if bool(bad.any()):
        raise ValueError(f"{name}: expected a positive definite one, got vᵀAv = {float(value[bad][0]):.2e} for some v")


def _check_real(name: str, value: Tensor) -> Tensor:
    """Refuse what is no finite real tensor; return it in float64 without a graph."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
    value = value.detach().to(torch.float64)
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: holds NaN or infinite values")
    return value


def _check_rhs(rhs: Tensor) -> Tensor:
    """Right-hand sides as a float64 matrix (n, k)."""
    b = _check_real("rhs", rhs)
    if b.ndim not in (1, 2) or 0 in b.shape:
        raise ValueError(f"rhs: expected shape (n,) or (n, k) with n, k >= 1, got {tuple(b.shape)}")
    return b.unsqueeze(-1) if b.ndim == 1 else b


def _check_start(x0: Tensor, rhs: Tensor) -> Tensor:
    """A start in the shape of the right-hand side."""
    x0 = _check_real("x0", x0)
    if x0.shape != rhs.shape:
        raise ValueError(f"x0: expected the shape of rhs, {tuple(rhs.shape)}, got {tuple(x0.shape)}")
    return x0


def as_product(operator: LinearOperator | Tensor | Product, size: int) -> Product:
    """The product with an operator as a checked function (n, k) -> (n, k) in float64; errors as in :func:`solve`."""
    if isinstance(operator, Tensor | LinearOperator):
        if operator.ndim != 2 or operator.shape[-1] != operator.shape[-2]:
            raise ValueError(f"operator: expected a square one, shape (n, n), got {tuple(operator.shape)}")
        if operator.shape[-1] != size:
            raise ValueError(f"operator: expected {size} rows as the rhs has, got {operator.shape[-1]}")
    if isinstance(operator, Tensor):
        matrix = _check_real("operator", operator)
        if float((matrix - matrix.mT).abs().max()) > _SYMMETRIC * float(matrix.abs().max()):
            raise ValueError("operator: expected a symmetric matrix")
        return lambda v: matrix @ v
    if isinstance(operator, LinearOperator):
        linear = operator
        return _checked(lambda v: linear.matmul(v.to(linear.dtype)), "operator")
    if callable(operator):
        return _checked(operator, "operator")
    raise TypeError(f"operator: expected a LinearOperator, a tensor or a function, got {type(operator).__name__}")


def _checked(function: Product, name: str) -> Product:
    """The function with its results checked, in float64."""

    def call(v: Tensor) -> Tensor:
        out = _check_real(name, function(v))
        if out.shape != v.shape:
            raise ValueError(f"{name}: expected products of shape {tuple(v.shape)}, got {tuple(out.shape)}")
        return out

    return call
