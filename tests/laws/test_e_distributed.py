"""Law E1: ordered reductions have the same bits for 1, 2 and 4 processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed_cases import WORLDS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results by (number of processes, rank)."""
    folder = tmp_path_factory.mktemp("distributed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.distributed_cases", str(folder)], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {(w, r): torch.load(folder / f"{w}-{r}.pt", weights_only=True) for w in WORLDS for r in range(w)}


@pytest.mark.parametrize("name", ["accumulator", "gram", "dual", "primal"])
def test_E1_ordered_reductions_are_bitwise_equal_for_any_number_of_processes(name, found):
    """The R × R accumulator, the tiled Gram, and 60 steps of CG with three right-hand sides."""
    one = found[1, 0][name]
    assert one.abs().max() > 0
    assert all(torch.equal(one, other[name]) for other in found.values())


def test_E1n_all_reduce_differs(found):
    """Rounding of a sum in another order, amplified by CG that has not converged."""
    one = found[1, 0]["fast"]
    assert torch.equal(one, found[1, 0]["primal"])
    for world in WORLDS[1:]:
        assert float((found[world, 0]["fast"] - one).abs().max() / one.abs().max()) > 1e-4


def test_E1_the_parts_are_right(found):
    from tests.distributed_cases import problem

    lin, x, _ = problem()
    jacobian, landmarks = (lin.jacobian(rows).flatten(0, 1) for rows in (x, x[::32]))
    features = jacobian @ landmarks.mT
    one = found[1, 0]
    torch.testing.assert_close(one["accumulator"], features.mT @ features, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one["gram"], jacobian @ jacobian.mT, rtol=1e-11, atol=1e-11)
