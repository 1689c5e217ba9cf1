"""Rank tests against scipy, published tables, pairs compared one by one and data without any difference."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ntkgp.evaluation import ranks as rk

# Demšar, JMLR 2006, table 5(a): critical values of the two-tailed Nemenyi test, for 2 to 10 classifiers.
Q05 = (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164)
Q10 = (1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920)


def _scores(sets=12, methods=5, ties=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(sets, methods, generator=g, dtype=torch.float64) + 0.4 * torch.arange(methods)
    return scores.round() if ties else scores


def _names(count):
    return [f"method {i}" for i in range(count)]


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_by_counting(ties):
    scores = _scores(ties=ties)
    for row, got in zip(scores, rk.ranks(scores), strict=True):
        expected = [1 + sum(o < s for o in row) + 0.5 * (sum(o == s for o in row) - 1) for s in row]
        assert got.tolist() == [float(e) for e in expected]
    assert torch.equal(rk.ranks(scores, larger_is_better=True), 6 - rk.ranks(scores))


def test_a_failed_run_is_last():
    scores = torch.tensor([[0.1, math.inf, 0.2], [math.inf, 0.1, math.inf]])
    assert rk.ranks(scores).tolist() == [[1.0, 3.0, 2.0], [2.5, 1.0, 2.5]]
    assert rk.ranks(-scores, larger_is_better=True).tolist() == [[1.0, 3.0, 2.0], [2.5, 1.0, 2.5]]


@pytest.mark.parametrize("ties", [False, True])
def test_friedman_against_scipy(ties):
    scores = _scores(ties=ties)
    result, theirs = rk.rank_test(scores, _names(5)), stats.friedmanchisquare(*scores.T.numpy())
    assert result.statistic == pytest.approx(theirs.statistic, rel=1e-12)
    assert result.p_value == pytest.approx(theirs.pvalue, rel=1e-10)
    assert len(set(scores[0].tolist())) < 5 or not ties


def test_iman_davenport_is_the_two_way_analysis_of_variance_of_the_ranks():
    table = rk.ranks(_scores(ties=True)).numpy()
    sets, methods = table.shape
    total = ((table - table.mean()) ** 2).sum()
    between = sets * ((table.mean(0) - table.mean()) ** 2).sum()
    f = (between / (methods - 1)) / ((total - between) / ((methods - 1) * (sets - 1)))
    result = rk.rank_test(_scores(ties=True), _names(5))
    assert result.f_statistic == pytest.approx(f, rel=1e-12)
    assert result.f_p_value == pytest.approx(stats.f.sf(f, methods - 1, (methods - 1) * (sets - 1)), rel=1e-12)


@pytest.mark.parametrize(("level", "table"), [(0.05, Q05), (0.1, Q10)])
def test_critical_difference_against_the_published_table(level, table):
    for methods, q in enumerate(table, start=2):
        expected = q * math.sqrt(methods * (methods + 1) / (6 * 14))
        assert rk.critical_difference(methods, 14, level) == pytest.approx(expected, abs=1.1e-3)


def test_two_methods_are_compared_by_the_normal_quantile():
    expected = stats.norm.ppf(0.975) * math.sqrt(2 * 3 / (6 * 20))
    assert rk.critical_difference(2, 20) == pytest.approx(expected, rel=1e-6)


def test_equal_methods_differ_at_the_level():
    """2000 tables of noise: χ² and any pair beyond the critical difference come up in 5 % of them."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((2000, 30, 4))
    limit = rk.critical_difference(4, 30)
    average = stats.rankdata(noise, axis=-1).mean(1)
    beyond = float(((average.max(-1) - average.min(-1)) > limit).mean())
    assert 0.035 < beyond < 0.06
    rejected = np.mean([rk.rank_test(torch.from_numpy(t), _names(4)).p_value < 0.05 for t in noise[:400]])
    assert 0.025 < rejected < 0.08


@pytest.mark.parametrize("seed", range(8))
def test_cliques_are_the_largest_sets_of_methods_within_the_difference(seed):
    result = rk.rank_test(_scores(sets=25, methods=7, seed=seed), _names(7))
    average = dict(zip(result.names, result.average.tolist(), strict=True))
    together = {
        frozenset(subset)
        for size in range(2, 8)
        for subset in itertools.combinations(result.names, size)
        if all(abs(average[a] - average[b]) <= result.difference for a, b in itertools.combinations(subset, 2))
    }
    largest = {subset for subset in together if not any(subset < other for other in together)}
    assert {frozenset(clique) for clique in result.cliques} == largest
    starts = [average[clique[0]] for clique in result.cliques]
    assert starts == sorted(starts)
    assert len(result.cliques) == len(largest) > 1


def test_perfect_agreement_and_no_difference_at_all():
    scores = torch.arange(3.0).repeat(30, 1)
    result = rk.rank_test(scores, ["a", "b", "c"], larger_is_better=True)
    assert result.statistic == pytest.approx(30 * 2)
    assert result.f_statistic == math.inf
    assert result.f_p_value == 0.0
    assert result.average.tolist() == [3.0, 2.0, 1.0]
    assert result.order == (2, 1, 0)
    assert result.cliques == ()
    equal = rk.rank_test(torch.zeros(5, 3), ["a", "b", "c"])
    assert (equal.statistic, equal.p_value, equal.f_statistic, equal.f_p_value) == (0.0, 1.0, 0.0, 1.0)
    assert equal.cliques == (("a", "b", "c"),)


def test_only_the_order_within_a_row_counts():
    scores = _scores()
    result = rk.rank_test(scores, _names(5))
    assert rk.rank_test((scores * torch.rand(12, 1) + 7).exp(), _names(5)).statistic == result.statistic


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"got nan at \(row, column\) \[\[1, 0\]\]"):
        rk.ranks(torch.tensor([[1.0, 2.0], [math.nan, 2.0]]))
    with pytest.raises(ValueError, match=r"scores: expected shape \(D, K\) with at least two methods, got \(3, 1\)"):
        rk.ranks(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="at least two data sets"):
        rk.rank_test(torch.zeros(1, 2), ["a", "b"])
    for names in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="names: expected 2 different names"):
            rk.rank_test(torch.zeros(3, 2), names)
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="level"):
            rk.critical_difference(3, 5, level)
    with pytest.raises(ValueError, match="num_methods"):
        rk.critical_difference(1, 5)
    with pytest.raises(ValueError, match="num_sets"):
        rk.critical_difference(2, 0)


# --- the diagram -----------------------------------------------------------------------------------------------------


def _lines(ax):
    return {line.get_label(): line.get_xydata() for line in ax.lines}


@pytest.mark.parametrize("methods", [2, 5, 8])
def test_diagram_shows_ranks_sets_and_difference(methods, tmp_path):
    pytest.importorskip("matplotlib")
    result = rk.rank_test(_scores(sets=20, methods=methods, seed=1), _names(methods))
    ax = rk.critical_difference_diagram(result)
    lines = _lines(ax)
    for name, value in zip(result.names, result.average.tolist(), strict=True):
        assert lines[name][0].tolist() == [value, 0.0]
    bar = lines["critical difference"]
    assert bar[1, 0] - bar[0, 0] == pytest.approx(result.difference)
    average = dict(zip(result.names, result.average.tolist(), strict=True))
    for index, clique in enumerate(result.cliques, start=1):
        ends = lines[f"set {index}"][:, 0]
        assert ends[0] < average[clique[0]]
        assert ends[1] > average[clique[-1]]
        assert {name for name, value in average.items() if ends[0] < value < ends[1]} == set(clique)
    assert f"set {len(result.cliques) + 1}" not in lines
    texts = [text.get_text() for text in ax.texts]
    assert all(any(name in text for text in texts) for name in result.names)
    ax.figure.savefig(tmp_path / "ranks.png")
    boxes = [t.get_window_extent() for t in ax.texts if "method" in t.get_text()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_long_names_stay_inside_the_figure():
    pytest.importorskip("matplotlib")
    names = ["a method of a rather long name " + "x" * 20, "another one, long as well", "short"]
    ax = rk.critical_difference_diagram(rk.rank_test(_scores(sets=2, methods=3), names))
    ax.figure.draw_without_rendering()
    box = ax.figure.bbox
    for text in ax.texts:
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0 < extent.x1 <= box.x1
        assert box.y0 <= extent.y0 < extent.y1 <= box.y1


def test_diagram_draws_into_given_axes():
    pytest.importorskip("matplotlib")
    from ntkgp.evaluation import plots

    ax = plots.new_figure(1, 2)[1][1]
    assert rk.critical_difference_diagram(rk.rank_test(_scores(), _names(5)), ax=ax) is ax
