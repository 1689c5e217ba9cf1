"""Pictures show the numbers that they are given, without pyplot and without touching global state."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")

from ntkgp.evaluation import metrics, plots  # noqa: E402


def _line(ax, index):
    return ax.lines[index].get_xydata()


def _legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_bands_are_two_standard_deviations(tmp_path):
    x = torch.linspace(0, 1, 5)
    mean, variance = torch.arange(5.0), torch.full((5,), 4.0)
    ax = plots.predictive_bands(x, mean, variance, 5.0, data=(x, mean), truth=mean)
    outer, inner = (collection.get_paths()[0].vertices for collection in ax.collections)
    assert inner[:, 1].max() == pytest.approx(4 + 2 * 2)
    assert outer[:, 1].max() == pytest.approx(4 + 2 * 3)
    np.testing.assert_allclose(_line(ax, 0)[:, 1], mean)
    assert _legend(ax) == ["with noise", "network ± 2 sd", "truth", "data"]
    ax.figure.savefig(tmp_path / "bands.png")
    assert (tmp_path / "bands.png").stat().st_size > 5000


def test_bands_without_noise_are_one_band():
    ax = plots.predictive_bands(torch.linspace(0, 1, 5).unsqueeze(-1), torch.zeros(5), torch.zeros(5))
    assert len(ax.collections) == 1
    with pytest.raises(ValueError, match="latent_variance"):
        plots.predictive_bands(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, -1.0]))


def test_reliability_shows_the_bins_and_the_error():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    y = torch.tensor([0, 1, 0])
    ax = plots.reliability_diagram({"net": p}, y, colors={"net": "#112233"})
    np.testing.assert_allclose(_line(ax, 1), [[0.6, 1.0], [0.9, 0.5]], atol=1e-6)
    assert _legend(ax) == [f"net  (ECE {float(metrics.expected_calibration_error(p, y)):.3f})"]
    assert ax.lines[1].get_color() == "#112233"
    with pytest.raises(ValueError, match="at least one model"):
        plots.reliability_diagram({}, y)


def test_coverage_curve_is_the_metric():
    mean, variance, target = torch.zeros(50), torch.ones(50), torch.linspace(-3, 3, 50)
    ax = plots.coverage_curve({"a": (mean, variance), "b": (mean, 4 * variance)}, target)
    levels = torch.as_tensor(_line(ax, 2)[:, 0])
    expected = metrics.coverage_curve(mean, 4 * variance, target, levels)
    np.testing.assert_allclose(_line(ax, 2)[:, 1], expected)
    with pytest.raises(ValueError, match="at least one model"):
        plots.coverage_curve({}, target)


def test_evidence_trace_keeps_the_end_in_view():
    ax = plots.evidence_trace({"groups": [-1e6, -50.0, -40.0, -39.0], "single": torch.tensor([-60.0])})
    np.testing.assert_allclose(_line(ax, 0)[:, 1], [-1e6, -50.0, -40.0, -39.0])
    low, high = ax.get_ylim()
    assert -70 < low < -60
    assert -39 < high < -30
    assert _legend(ax) == ["groups  (-39.0)", "single  (-60.0)"]
    with pytest.raises(ValueError, match="'empty' is empty"):
        plots.evidence_trace({"empty": []})
    with pytest.raises(ValueError, match="at least one run"):
        plots.evidence_trace({})


def test_axes_given_are_drawn_into():
    figure, axes = plots.new_figure(1, 2)
    assert plots.evidence_trace({"a": [1.0, 2.0]}, ax=axes[1]) is axes[1]
    assert figure.axes == axes
    assert not axes[0].lines


def test_plots_never_import_pyplot(fresh):
    code = (
        "import sys, torch; from ntkgp.evaluation import plots;"
        "plots.evidence_trace({'a': [1.0, 2.0]}).figure.savefig(sys.argv[1], format='png');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    fresh.run(code, "/dev/null", timeout=120)


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'ntkgp\[plots\]'"):
        plots.new_figure()
