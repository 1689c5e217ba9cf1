"""What comparisons refuse, and how they print."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import ntkgp
from ntkgp.evaluation.comparison import Method
from ntkgp.evaluation.comparison.methods import default_methods
from ntkgp.evaluation.divergence import gaussian_kl


class Fixed:
    """A method that predicts zero, for a made-up number of inputs."""

    def __init__(self, rows=None):
        self.rows = rows

    def predict(self, x):
        return Normal(torch.zeros(self.rows or len(x)), 1.0)


def compared(methods, **options):
    x, y = torch.randn(9, 2), torch.randn(9)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    return ntkgp.compare(net, (x, y), (x, y), methods, isolate=False, **options)


def test_methods_print_with_their_options_and_are_refused_by_name():
    assert repr(Method("laplace-kfac", "KFAC", evidence="theta")) == "Method('KFAC', evidence='theta')"
    with pytest.raises(TypeError, match="methods: expected a name, a Method, a model or a function, got int"):
        Method(3)
    with pytest.raises(TypeError, match=r"net: expected a torch.nn.Module, got str"):
        ntkgp.compare("net", None, None)


def test_the_default_methods_are_those_that_need_nothing_more():
    plain, dropping = nn.Linear(2, 1), nn.Sequential(nn.Dropout(), nn.Linear(2, 1))
    found = default_methods(plain, {})
    assert not {"ensemble", "hfl", "gp-exact", "dropout", "network-validated"} & set(found)
    assert set(default_methods(dropping, {"validation": (0, 0)})) - set(found) == {"dropout", "network-validated"}


def test_a_comparison_prints_itself_and_draws_many_methods():
    pytest.importorskip("matplotlib")
    found = compared({f"method {i:02d}": lambda net, data: Fixed() for i in range(12)})
    assert repr(found) == "Comparison(12 methods, 12 rows, 0 failures)"
    assert found._repr_markdown_() == found.to_markdown()
    table = found.table
    assert repr(table) == str(table) == table.to_text()
    assert table._repr_markdown_() == table.to_markdown()
    assert [row["method"] for row in table] == found.methods
    lines = found.plot_calibration().get_lines()
    assert len({line.get_color() for line in lines if line.get_label().startswith("method")}) == 12
    with pytest.raises(ValueError, match="data: no predictions of 'another' are kept"):
        found.plot_calibration("another")


def test_a_prediction_of_other_rows_is_a_failure_with_words():
    failures = compared({"short": lambda net, data: Fixed(4)}).failures
    (said,) = failures.values()
    assert "predict: expected a mean of 9 numbers, got shape (4,)" in said


def test_divergences_are_refused_by_name():
    square, oblong = torch.eye(2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="covariance_0: expected a square matrix"):
        gaussian_kl(oblong, oblong)
    with pytest.raises(ValueError, match=r"mean_0: expected shape \(2,\), got \(3,\)"):
        gaussian_kl(square, square, torch.zeros(3), torch.zeros(3))
