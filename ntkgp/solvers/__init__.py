"""Iterative solvers for float64 systems too large to factor, their preconditioners and the systems of the model."""

from __future__ import annotations

from ntkgp.solvers.conjugate_gradients import Solution, solve
from ntkgp.solvers.nystrom import NystromPreconditioner
from ntkgp.solvers.tangent import TangentGram
from ntkgp.solvers.whitened import WhitenedSystem

__all__ = ["NystromPreconditioner", "Solution", "TangentGram", "WhitenedSystem", "solve"]
