"""Some hundred cases of scripts/fuzz.py, on fixed numbers."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest
import torch

from scripts import leaks
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


@pytest.mark.parametrize("name", ["predictions", "passes", "save", "errors", "compare"])
def test_nothing_is_left_behind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty repetitions of what scripts/leaks.py has; it measures memory too, over a thousand of them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert leaks.measure(name, 14, 2)["grown"] == ""
