"""The solvers that linear_operator's shared suites expect."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from linear_operator import settings


@pytest.fixture(autouse=True)
def solvers_of_linear_operator() -> Iterator[None]:
    """Importing botorch, as other tests do, turns conjugate gradients and Lanczos off for the whole process."""
    with settings.fast_computations(True, True, True), settings.max_cholesky_size(800):
        yield
