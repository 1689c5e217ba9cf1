"""The networks, shared predictions and words of scripts/evidence_ordering.py, and its quick mode."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ntkgp
from ntkgp.evaluation.training import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module("evidence_ordering")


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize(
    ("name", "groups"), [("CNN", 1), ("ResNet", 10), ("pre-ResNet", 7), ("FixUp", 1), ("transformer", 2)]
)
def test_networks_have_46k_weights_and_the_expected_groups(
    script: ModuleType, name: str, groups: int, size: int
) -> None:
    net = script.network(name, size, 0).eval()
    x = torch.rand(3, 1, size, size)
    lin = ntkgp.LinearizedNetwork(net, x)
    assert net(x).shape == (3, 10)
    assert 44_000 <= lin.num_parameters <= 48_000
    assert len(lin.groups) == groups
    # One group is "rest"; an invariant set of several is what makes a network normalised.
    assert any(lin.groups.is_normalized) == (name in script.NORMALISED)


def test_shared_predictions_are_those_of_the_models(script: ModuleType) -> None:
    training, (x, _) = script.images("digits", Path(), 0, script.QUICK)
    net = script.network("pre-ResNet", 8, 0)
    train(net, *training, steps=20, learning_rate=3e-3, batch_size=6)
    shared = script.Posteriors(net, "normalization", training, x)
    model = ntkgp.ExactNTKGP(*training, ntkgp.CategoricalLikelihood(10), shared.lin)
    for problem in (shared.single(), shared.problem):
        found = script.fit_problem(problem, tolerance=1e-5)
        precision = found.precision.expand(len(shared.lin.groups))
        model.set_hyperparameters(precision)
        model.eval()
        for mean, mine in zip(("network", "posterior"), shared.predict(precision), strict=True):
            model.mean = mean
            # The offset is a difference of float32 passes.
            torch.testing.assert_close(mine, model.likelihood(model(x)).probs, rtol=1e-5, atol=1e-6)
    single = ntkgp.from_network(net, training, "classification", "exact", groups="single", tolerance=1e-5)
    assert single.report is not None
    of_sums = script.fit_problem(shared.single(), tolerance=1e-5)
    assert single.report.log_evidence == pytest.approx(of_sums.log_evidence, abs=1e-6)


def test_orderings_are_paired_and_named(script: ModuleType) -> None:
    levels = {"single θ̃": 2.0, "single θ⋆": 1.0, "many θ̃": 2.0, "many θ⋆": 1.5, script.ALONE: 1.5}
    rows = [
        {"data": "digits", "net": "CNN", "seed": seed, "method": method, "precision": "4 1 1e12", "pruned": 1,
         # What is common to all methods of a seed is far larger than the differences.
         "nll": level + 10 * seed + (0.01 * (-1) ** seed if method == "many θ⋆" else 0.0)}
        for seed in range(4) for method, level in levels.items()
    ]  # fmt: skip
    found = script.Results(rows)
    line = script.orderings(found, "nll")[-1]
    assert [part.split(":")[-1].strip() for part in line.split("|")[3:-1]] == [
        "holds", "holds", "reversed", "not told apart", "not told apart"
    ]  # fmt: skip
    mean, error = found.difference(("digits", "CNN"), "many θ⋆", "single θ⋆", "nll")
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(0.01 / 3**0.5)
    assert found.precisions(("digits", "CNN"), "many θ⋆") == "1 … 4; 1.0 of 3 pruned"


def test_quick_mode_goes_on_where_it_stopped(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--quick", "--nets", "CNN", "pre-ResNet", "U-Net", "--data", str(tmp_path), "--out", str(tmp_path)]
    script.main([*common, "--seeds", "1"])
    assert "skipped glyphs" in capsys.readouterr().out
    page = tmp_path / "evidence_ordering_quick.md"
    said = "## Reading\n\nThese words stay.\n\n## Orderings"
    page.write_text(page.read_text(encoding="utf-8").replace("## Orderings", said), encoding="utf-8")
    script.main([*common, "--seeds", "2"])
    assert capsys.readouterr().out.count("[2/2]") == 1
    with (tmp_path / "evidence_ordering_quick.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        if row["method"] != script.ALONE:
            assert float(row["log_evidence"]) < 0
            assert row["converged"] == "1"
    text = page.read_text(encoding="utf-8")
    assert text.count(said) == 1
    assert "## pre-ResNet, digits" in text
    assert "nan" not in text
    assert (tmp_path / "evidence_ordering_quick.png").stat().st_size < 150_000
