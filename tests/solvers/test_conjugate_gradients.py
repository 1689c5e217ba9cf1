"""Preconditioned conjugate gradients against dense solves, and what is refused."""

import pytest
import torch
from linear_operator.operators import DenseLinearOperator

from ntkgp.solvers import NystromPreconditioner, solve

DOUBLE = torch.float64


def spd(n: int, log_condition: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE))[0]
    a = q @ torch.logspace(0, log_condition, n, dtype=DOUBLE).diag() @ q.T
    return (a + a.T) / 2


def rhs(n: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("kind", ["tensor", "operator", "function"])
def test_equals_the_dense_solve_for_several_right_hand_sides(kind):
    a, b = spd(60, 3), rhs(60, 5)
    given = {"tensor": a, "operator": DenseLinearOperator(a), "function": lambda v: a @ v}[kind]
    found = solve(given, b, tolerance=1e-12)
    expected = torch.linalg.solve(a, b)
    assert found.converged
    assert (found.solution - expected).norm() <= 1e-9 * expected.norm()
    assert torch.equal(found.residual, b - a @ found.solution)


def test_unpacks_and_keeps_the_shape_of_a_vector():
    a, b = spd(20, 1), rhs(20, 1)[:, 0]
    solution, residual = solve(a, b)
    assert solution.shape == residual.shape == (20,)
    assert residual.norm() <= 1e-8 * b.norm()
    assert solve(a, b).relative_residual.shape == ()


def test_ill_conditioned_reaches_the_tolerance_by_its_true_residual():
    a, b = spd(80, 8), rhs(80, 2)
    found = solve(a, b, tolerance=1e-8, max_iterations=20_000)
    assert found.converged
    assert ((b - a @ found.solution).norm(dim=0) <= 1e-8 * b.norm(dim=0)).all()


def test_accuracy_beyond_rounding_is_reported_as_not_converged():
    a, b = spd(60, 9), rhs(60, 2)
    found = solve(a, b, tolerance=1e-15, max_iterations=20_000)
    assert not found.converged
    assert found.iterations < 20_000  # it stops where restarts gain nothing


def test_not_converged_is_reported_with_the_true_residual():
    a, b = spd(100, 6), rhs(100, 3)
    found = solve(a, b, max_iterations=5)
    assert not found.converged
    assert found.iterations == 5
    assert torch.equal(found.residual, b - a @ found.solution)
    assert torch.allclose(found.relative_residual, found.residual.norm(dim=0) / b.norm(dim=0))


def test_columns_are_independent_runs():
    a, b = spd(50, 4), rhs(50, 4)
    b[:, 1] *= 1e8  # scales must not mix
    b[:, 3] = a[:, 0]  # solved exactly, long before the others
    found = solve(a, b, tolerance=1e-10)
    assert found.converged
    for k in range(4):
        alone = solve(a, b[:, k], tolerance=1e-10)
        assert (found.solution[:, k] - alone.solution).norm() <= 1e-7 * alone.solution.norm()


def test_zero_right_hand_side():
    b = rhs(30, 3)
    b[:, 1] = 0
    found = solve(spd(30, 3), b, x0=torch.ones(30, 3))
    assert found.converged
    assert not found.solution[:, 1].any()
    nothing = solve(spd(30, 3), torch.zeros(30))
    assert nothing.converged
    assert nothing.iterations == 0


def test_right_hand_sides_whose_norm_is_no_number_are_solved():
    a, b = spd(20, 2), rhs(20, 3)
    scale = torch.tensor([1e-250, 1.0, 1e250], dtype=torch.float64)
    found, plain = solve(a, b * scale), solve(a, b)
    assert found.converged
    assert float(((found.solution / scale - plain.solution) / plain.solution.abs().max()).abs().max()) < 1e-7
    assert float(((b * scale - a @ found.solution - found.residual) / (a.abs().max() * scale)).abs().max()) < 1e-12
    assert bool((found.relative_residual > 0).all())


def test_start_at_the_solution_takes_no_iteration():
    a, b = spd(40, 3), rhs(40, 2)
    exact = torch.linalg.solve(a, b)
    found = solve(a, b, x0=exact)
    assert found.iterations == 0
    assert torch.equal(found.solution, exact)
    near = solve(a, b, x0=exact + 1e-6 * rhs(40, 2, 5))
    assert near.iterations < solve(a, b).iterations
    assert solve(a, b, x0=exact, max_iterations=0).converged


def test_preconditioner_saves_iterations():
    n = 300
    rows = torch.linspace(-3, 3, n, dtype=DOUBLE)
    k = 100 * torch.exp(-(rows[:, None] - rows).square())
    a = k + 0.01 * torch.eye(n, dtype=DOUBLE)
    chosen = torch.arange(0, n, 15)
    inverse = NystromPreconditioner(k[:, chosen], k[chosen][:, chosen], 0.01)
    b = rhs(n, 3)
    plain, fast = solve(a, b), solve(a, b, preconditioner=inverse)
    assert fast.converged
    assert fast.iterations <= 5
    assert plain.iterations > 2 * fast.iterations


def test_same_bits_every_time():
    a, b = spd(64, 5), rhs(64, 7)
    first, second = (solve(a, b, max_iterations=40) for _ in range(2))
    assert torch.equal(first.solution, second.solution)
    assert first.iterations == second.iterations


def test_single_precision_operators_are_multiplied_in_their_dtype():
    a, b = spd(30, 1), rhs(30, 2)
    found = solve(DenseLinearOperator(a.float()), b, tolerance=1e-5)
    assert found.solution.dtype == DOUBLE
    assert found.converged
    assert (found.solution - torch.linalg.solve(a, b)).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"operator": torch.ones(3, 4)}, ValueError, "operator: expected a square"),
        ({"operator": torch.eye(5)}, ValueError, "operator: expected 4 rows"),
        ({"operator": torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "rhs": torch.ones(2)}, ValueError, "symmetric"),
        ({"operator": -torch.eye(4)}, ValueError, "operator: expected a positive definite"),
        ({"operator": torch.full((4, 4), torch.nan)}, ValueError, "operator: holds NaN"),
        ({"operator": lambda v: v * torch.nan}, ValueError, "operator: holds NaN"),
        ({"operator": lambda v: v[:2]}, ValueError, "operator: expected products of shape"),
        ({"operator": "matrix"}, TypeError, "operator: expected a LinearOperator"),
        ({"rhs": torch.tensor([1.0, torch.inf, 0.0, 0.0])}, ValueError, "rhs: holds NaN"),
        ({"rhs": torch.ones(2, 4, 1)}, ValueError, "rhs: expected shape"),
        ({"rhs": torch.ones(4, 0)}, ValueError, "rhs: expected shape"),
        ({"rhs": [1.0, 2.0]}, TypeError, "rhs: expected a torch.Tensor"),
        ({"rhs": torch.ones(4, dtype=torch.complex64)}, TypeError, "rhs: expected real"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a number in"),
        ({"tolerance": 1.0}, ValueError, "tolerance: expected a number in"),
        ({"tolerance": float("nan")}, ValueError, "tolerance: expected a number in"),
        ({"max_iterations": -1}, ValueError, "max_iterations: expected an integer"),
        ({"max_iterations": 2.5}, ValueError, "max_iterations: expected an integer"),
        ({"x0": torch.ones(3)}, ValueError, "x0: expected the shape of rhs"),
        ({"preconditioner": lambda v: -v}, ValueError, "preconditioner: expected a positive definite"),
        ({"preconditioner": lambda v: v[:1]}, ValueError, "preconditioner: expected products of shape"),
    ],
)
def test_bad_input(change, error, words):
    given = {"operator": torch.eye(4), "rhs": torch.ones(4), **change}
    with pytest.raises(error, match=words):
        solve(given.pop("operator"), given.pop("rhs"), **given)
