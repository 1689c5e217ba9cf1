"""Laws E3: a run that is killed and resumed is the uninterrupted one, bit by bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests import killed_cases
from tests.killing import killed_again_and_again, what_was_found

KILLED = killed_again_and_again("adam", kills=3, seed=1, distance=(4, 7))


@pytest.mark.timeout(900)
def test_E3_killed_and_resumed_is_bitwise_the_uninterrupted_run():
    """120 Adam steps on log λ, log σ² with 4 probes and 15 warm-started CG iterations a step, a state every 5 steps."""
    found = what_was_found(KILLED)
    assert found["kills"] == 3
    assert found["different"] == []
    assert found["names"] == ["warm", "x"]
    # Kills landed in the middle: later attempts started from states of earlier ones.
    assert found["states"][0] >= 4
    assert found["finished"] == 1
    assert all(b >= a + 4 for a, b in itertools.pairwise(found["states"][:3]))


@pytest.mark.parametrize("omit", ["warm", "generator", "optimizer"])
def test_E3n_a_resume_that_forgets_differs(omit, tmp_path):
    """Without the CG warm start, the generator's state or Adam's moments: another log λ."""
    whole = killed_cases.adam(None, 40)["x"]
    assert torch.isfinite(whole).all()
    for name in (None, omit):
        folder = tmp_path / str(name)
        killed_cases.adam(folder, 20)
        resumed = killed_cases.adam(folder, 40, name)["x"]
        assert torch.equal(resumed, whole) == (name is None)
        if name is not None:
            assert float((resumed - whole).abs().max()) > 1e-6
