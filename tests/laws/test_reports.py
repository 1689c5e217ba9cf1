"""Reports of the laws in words, and adapters that offer nothing."""

from __future__ import annotations

import pytest
import torch

from ntkgp.laws.protocol import Fitted, NotApplicableError, Structure
from ntkgp.laws.report import FAILS, HOLDS, Report, Row


def test_a_fit_that_offers_nothing_says_what_is_missing():
    x, fitted, generator = torch.zeros(1, 1), Fitted(), torch.Generator()
    arguments = {
        "mean": (x,), "posterior_mean": (x,), "covariance": (x,), "joint_covariance": (x,), "prior_covariance": (x,),
        "log_evidence": (), "log_evidence_map": (), "optimum": (), "effective_dimension": (),
        "samples": (x, 2, generator), "probabilities": (x,), "random_prediction": (x, generator),
        "hyperparameters": (), "update": (x, x), "refit": (),
    }  # fmt: skip
    assert set(arguments) == {name for name in vars(Fitted) if not name.startswith("_")}
    said = set()
    for name, given in arguments.items():
        with pytest.raises(NotApplicableError) as refusal:
            getattr(fitted, name)(*given)
        said.add(str(refusal.value))
    assert len(said) == len(arguments)
    with pytest.raises(ValueError, match="kind: expected one of"):
        Structure("banded")


def test_a_report_says_what_does_not_hold():
    rows = (
        Row("B1", "primal is dual", "full", "regression", HOLDS),
        Row("B2", "a | b", "full", "regression", FAILS, 2e-3, 1e-9),
        Row("B2", "a | b", "full", "softmax", FAILS, reason="too small"),
    )
    report = Report("library", rows)
    assert len(report) == 3
    assert report[0] is rows[0]
    assert str(rows[1]).split() == "B2 full on regression: fails 2.0e-03 (tolerance 1.0e-09)".split()
    assert str(report).startswith("library: 1 holds, 1 fails")
    assert str(report).endswith("too small")
    assert report.outcome("B2") == FAILS
    with pytest.raises(KeyError, match="no law 'B3' of structure 'full'"):
        report.outcome("B3", "full")
    assert r"a \| b" in report.to_markdown()
