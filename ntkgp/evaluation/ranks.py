"""Comparison of methods over data sets by ranks: Friedman's test, Nemenyi's critical difference and its diagram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import scipy
import torch
from torch import Tensor

from ntkgp.evaluation.checks import as_float64

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RankTest", "critical_difference", "critical_difference_diagram", "rank_test", "ranks"]


@dataclass(frozen=True)
class RankTest:
    """
    What :func:`rank_test` finds.

    :param names: the methods, in the order of the columns.
    :param average: mean rank of each method over the data sets, 1 is best, ``(K,)``.
    :param num_sets: D, number of data sets.
    :param statistic: Friedman's χ² with the correction for ties, K − 1 degrees of freedom.
    :param p_value: of χ²; small speaks against all methods being equal.
    :param f_statistic: the less conservative form of Iman and Davenport.
    :param f_p_value: of that form, with K − 1 and (K − 1)(D − 1) degrees of freedom.
    :param level: α of the critical difference.
    :param difference: Nemenyi's critical difference of mean ranks.
    """

    names: tuple[str, ...]
    average: Tensor
    num_sets: int
    statistic: float
    p_value: float
    f_statistic: float
    f_p_value: float
    level: float
    difference: float

    @property
    def order(self) -> tuple[int, ...]:
        """Columns from the best mean rank to the worst."""
        return tuple(self.average.argsort(stable=True).tolist())

    @property
    def cliques(self) -> tuple[tuple[str, ...], ...]:
        """
        Largest sets of methods, best first, whose mean ranks all lie within the critical difference.

        Two methods that share no set differ at the level α. A method that differs from all others is in no set.
        """
        order = self.order
        values = [float(self.average[column]) for column in order]
        found, reached = [], 0
        for first in range(len(order)):
            # Mean ranks are sums of halves divided by D: a distance equal to the difference is no accident of rounding.
            last = max(i for i, value in enumerate(values) if value - values[first] <= self.difference + 1e-12)
            if last > first and last > reached:
                found.append(tuple(self.names[column] for column in order[first : last + 1]))
            reached = max(reached, last)
        return tuple(found)


def ranks(scores: Tensor, *, larger_is_better: bool = False) -> Tensor:
    """
    Rank of each method on each data set: 1 for the best, equal scores share the mean of their ranks.

    :param scores: one row per data set and one column per method, ``(D, K)``. An infinite score is allowed: give a run
        that failed the worst one.
    :param larger_is_better: whether rank 1 goes to the largest score of a row.
    :return: ``(D, K)``, float64; rows sum to K(K + 1)/2.
    :raises ValueError: another shape, ``nan`` scores.

    Cost: O(D·K·log K).

    Example:
        >>> ranks(torch.tensor([[0.3, 0.1, 0.3]]))
        tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    table = as_float64("scores", scores, finite=False)
    if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise ValueError(f"scores: expected shape (D, K) with at least two methods, got {tuple(table.shape)}")
    missing = table.isnan().nonzero().tolist()
    if missing:
        raise ValueError(
            f"scores: expected a score of every method on every data set, got nan at (row, column) {missing[:5]}; "
            "leave the row out, or rank a failed run last by an infinite score"
        )
    return torch.from_numpy(scipy.stats.rankdata((-table if larger_is_better else table).numpy(), axis=1))


def critical_difference(num_methods: int, num_sets: int, level: float = 0.05) -> float:
    r"""
    Nemenyi's critical difference of mean ranks,

    .. math:: \mathrm{CD} = \frac{q_{\alpha,K,\infty}}{\sqrt 2} \sqrt{\frac{K (K + 1)}{6 D}},

    with q the upper α point of the studentised range of K normals (Demšar, JMLR 2006, section 3.2.2).

    :param num_methods: K, at least two.
    :param num_sets: D.
    :param level: α, probability of any false difference among all pairs, in (0, 1).
    :return: the difference.
    :raises ValueError: a number out of range.

    Cost: one numerical integral.

    Example:
        >>> round(critical_difference(4, 14), 3)
        1.254
    """
    if num_methods < 2:
        raise ValueError(f"num_methods: expected at least two, got {num_methods}")
    if num_sets < 1:
        raise ValueError(f"num_sets: expected at least one, got {num_sets}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    quantile = float(scipy.stats.studentized_range.ppf(1 - level, num_methods, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(num_methods * (num_methods + 1) / (6 * num_sets))


def rank_test(scores: Tensor, names: Sequence[str], *, larger_is_better: bool = False, level: float = 0.05) -> RankTest:
    r"""
    Friedman's test of whether the methods differ, and by how much mean ranks must differ to tell two of them apart.

    .. math:: \chi^2 = \frac{(K - 1) \sum_k (\sum_d r_{dk} - D(K+1)/2)^2}{\sum_{dk} r_{dk}^2 - DK(K+1)^2/4}, \qquad
        F = \frac{(D - 1)\chi^2}{D(K - 1) - \chi^2}.

    Without ties this is the usual :math:`\frac{12 D}{K(K+1)}[\sum_k \bar r_k^2 - K(K+1)^2/4]`. Data sets must be
    independent of each other: average the splits of one set before. χ² is rough for D ≤ 10 or K ≤ 5; use F there.

    :param scores: one row per data set and one column per method, ``(D, K)``; infinite for a run that failed.
    :param names: of the methods, K different ones.
    :param larger_is_better: whether rank 1 goes to the largest score of a row.
    :param level: α of the critical difference.
    :return: :class:`RankTest`.
    :raises ValueError: another shape, ``nan`` scores, fewer than two data sets, names that do not fit.

    Cost: O(D·K·log K). Source: Demšar, JMLR 2006, section 3.2.2 (F: Iman and Davenport, 1980); ties: Conover, 1999.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
        >>> result = rank_test(scores, ["ours", "second", "third"])
        >>> result.average, round(result.statistic, 2), result.cliques
        (tensor([1.0000, 2.2500, 2.7500], dtype=torch.float64), 6.5, (('ours', 'second'), ('second', 'third')))
    """
    table = ranks(scores, larger_is_better=larger_is_better)
    num_sets, num_methods = table.shape
    if num_sets < 2:
        raise ValueError("scores: expected at least two data sets, got 1")
    if len(names) != num_methods or len(set(names)) != num_methods:
        raise ValueError(f"names: expected {num_methods} different names, got {list(names)}")
    difference = critical_difference(num_methods, num_sets, level)
    spread = float((table - (num_methods + 1) / 2).square().sum())
    totals = table.sum(0) - num_sets * (num_methods + 1) / 2
    # Rows of ties only have no spread: the methods are equal.
    statistic = (num_methods - 1) * float(totals.square().sum()) / spread if spread > 0 else 0.0
    remainder = num_sets * (num_methods - 1) - statistic
    f_statistic = (num_sets - 1) * statistic / remainder if remainder > 1e-12 * num_sets else math.inf
    degrees = num_methods - 1
    return RankTest(
        names=tuple(names),
        average=table.mean(0),
        num_sets=num_sets,
        statistic=statistic,
        p_value=float(scipy.stats.chi2.sf(statistic, degrees)),
        f_statistic=f_statistic,
        f_p_value=float(scipy.stats.f.sf(f_statistic, degrees, degrees * (num_sets - 1))),
        level=level,
        difference=difference,
    )


def critical_difference_diagram(result: RankTest, *, ax: Axes | None = None) -> Axes:
    """
    Mean ranks on a line, best at the left, with a bar over each set of methods that the test does not tell apart.

    :param result: of :func:`rank_test`.
    :param ax: where to draw; default: a new figure with room for the names.
    :return: the axes.
    :raises ImportError: matplotlib is not installed.

    Source: Demšar, JMLR 2006, figure 1.

    Example:
        >>> result = rank_test(torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]]), ["ours", "other"])
        >>> ax = critical_difference_diagram(result)
        >>> [text.get_text() for text in ax.texts][-2:]
        ['ours  1.33', '1.67  other']
    """
    from ntkgp.evaluation import plots

    cliques, half = result.cliques, math.ceil(len(result.names) / 2)
    first_name = -0.55 - 0.35 * len(cliques)
    height = 1.1 - first_name + 0.45 * half
    # The layout gives the names their room out of the width of the axes.
    width = 4.6 + 0.14 * max(map(len, result.names))
    ax = ax if ax is not None else plots.new_figure(size=(width, 0.5 + 0.55 * height))[1][0]
    ink, worst = "#333333", len(result.names)
    ax.set_axis_off()
    ax.set_xlim(1 - 0.06 * (worst - 1), max(worst + 0.06 * (worst - 1), 1.05 + result.difference))
    ax.set_ylim(first_name - 0.45 * half, 1.1)
    ax.plot([1, worst], [0, 0], color=ink, lw=1.0)
    for tick in range(1, worst + 1):
        ax.plot([tick, tick], [0, 0.12], color=ink, lw=1.0)
        ax.text(tick, 0.18, str(tick), ha="center", va="bottom", fontsize=8, color=ink)
    ax.plot([1, 1 + result.difference], [0.75, 0.75], color=ink, lw=1.6, marker="|", ms=7, label="critical difference")
    ax.text(1 + result.difference / 2, 0.82, f"CD = {result.difference:.2f}", ha="center", fontsize=8, color=ink)
    for place, column in enumerate(result.order):
        left = place < half
        value, row = float(result.average[column]), place if left else worst - 1 - place
        level, edge = first_name - 0.45 * row, 1 - 0.04 * (worst - 1) if left else worst + 0.04 * (worst - 1)
        color = plots.COLORS[place % len(plots.COLORS)]
        ax.plot([value, value, edge], [0, level, level], color=color, lw=1.2, label=result.names[column])
        ax.plot([value], [0], marker="o", ms=4.5, color=color, mew=0)
        text = f"{result.names[column]}  {value:.2f}" if left else f"{value:.2f}  {result.names[column]}"
        shift = -0.02 * (worst - 1) if left else 0.02 * (worst - 1)
        ax.text(edge + shift, level, text, ha="right" if left else "left", va="center", fontsize=8, color=ink)
    average = dict(zip(result.names, result.average.tolist(), strict=True))
    for index, clique in enumerate(cliques):
        ends = [average[clique[0]] - 0.03, average[clique[-1]] + 0.03]
        ax.plot(ends, [-0.35 - 0.35 * index] * 2, color=ink, lw=3.5, solid_capstyle="round", label=f"set {index + 1}")
    return ax
