"""Some hundred cases of scripts/fuzz.py, on fixed numbers."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from tests.elsewhere import FOLDER, Elsewhere
from tests.fuzzing import NAMES, run
from tests.fuzzing.networks import draw
from tests.fuzzing.watch import resources

# Calls that fit something take a hundred times longer than a pass; the script meets them on more networks.
SLOW = {"laplace_evidence", "variational_fit", "samples", "saving", "hessian_free", "evidence_classification"}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="ntkgp")


@pytest.mark.parametrize("name", NAMES)
def test_every_call_is_the_oracle_or_a_clear_error(name: str) -> None:
    for number in range(0, 8 if name in SLOW else 32, 8):
        outcome = run(number, name)
        assert outcome.kind != "find", outcome


def test_a_case_is_its_number() -> None:
    one, two = draw(5), draw(5)
    assert one.description == two.description
    assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True))
    assert draw(6).description != one.description


def test_networks_are_of_all_kinds() -> None:
    cases = [draw(number) for number in range(150)]
    layers = {type(m).__name__ for case in cases for m in case.net.modules() if not list(m.children())}
    assert len(layers) > 30
    assert {case.net.kind for case in cases} == {"vector", "image", "sequence", "tokens", "dict", "tuple"}
    assert {case.dtype for case in cases} == {torch.float32, torch.float64}
    assert any("frozen" in case.description for case in cases)
    assert any("tied" in case.description for case in cases)


def test_nothing_grows() -> None:
    calls = ("grams", "exact_regression", "bad_inputs")
    for repetition in range(8):
        for name in calls:
            run(24, name)
        if repetition == 3:
            before = resources()
    after = resources()
    assert {name: after[name] - before[name] for name in after if after[name] > before[name]} == {}


CALLS = ("predictions", "passes", "save", "errors", "compare")
REPEATED = Elsewhere("tests.left_behind", FOLDER, *CALLS)


def test_nothing_is_left_behind() -> None:
    """Files, threads, children, tensors and hooks, over repetitions of public calls."""
    assert json.loads(REPEATED.finished()[1].splitlines()[-1]) == dict.fromkeys(CALLS, "")
