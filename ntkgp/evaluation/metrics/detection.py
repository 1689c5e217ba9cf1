"""Detection of points out of distribution, and of errors, by a score of uncertainty."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ntkgp.evaluation.checks import as_float64, same_shape
from ntkgp.evaluation.metrics.inputs import scores

Positive = Literal["outside", "inside"]


class OODDetection(NamedTuple):
    """Area under the ROC curve, under both precision–recall curves, and false alarms at 95 % recall."""

    auroc: Tensor
    aupr_out: Tensor
    aupr_in: Tensor
    fpr95: Tensor


class RiskCoverage(NamedTuple):
    """Share of points kept, most certain first, and their mean loss."""

    coverage: Tensor
    risk: Tensor


def ood_auc(inside: Tensor, outside: Tensor) -> Tensor:
    """
    Area under the ROC curve of a score that should be larger out of distribution (entropy or latent variance).

    The probability that a random point outside scores higher than a random point inside, ties counted as one half.

    :param inside: scores of in-distribution points, ``(N,)``.
    :param outside: scores of out-of-distribution points, ``(M,)``.
    :return: a float64 scalar in [0, 1]; 0.5 is chance.
    :raises ValueError: an empty vector, ``nan`` scores.

    Cost: O((N + M) log N).

    Example:
        >>> ood_auc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor(0.8750, dtype=torch.float64)
    """
    ordered, outer = scores("inside", inside).sort().values, scores("outside", outside)
    below = torch.searchsorted(ordered, outer, right=False)
    not_above = torch.searchsorted(ordered, outer, right=True)
    return (below + not_above).double().mean() / (2 * len(ordered))


def ood_aupr(inside: Tensor, outside: Tensor, *, positive: Positive = "outside") -> Tensor:
    """
    Area under the precision–recall curve of a score that should be larger out of distribution.

    The average precision ``Σ_t (R_t − R_{t−1})·P_t`` over the thresholds t, without interpolation, which would flatter
    (Davis and Goadrich, 2006); equal scores are one threshold. Chance is the share of positives, so state both sizes.

    :param inside: scores of in-distribution points, ``(N,)``.
    :param outside: scores of out-of-distribution points, ``(M,)``.
    :param positive: what is to be found: ``"outside"`` by large scores (AUPR-out) or ``"inside"`` by small ones
        (AUPR-in).
    :return: a float64 scalar in (0, 1].
    :raises ValueError: an empty vector, ``nan`` scores, another word for ``positive``.

    Cost: O((N + M) log (N + M)).

    Example:
        >>> ood_aupr(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor(0.8333, dtype=torch.float64)
    """
    found, others = _found(inside, outside, positive)
    hits, alarms = _at_least(found, found), _at_least(others, found)
    return (hits / (hits + alarms)).mean()


def ood_fpr(inside: Tensor, outside: Tensor, recall: float = 0.95, *, positive: Positive = "outside") -> Tensor:
    """
    Share of false alarms at the highest threshold that finds at least the share ``recall`` of the positives (FPR95).

    :param inside: scores of in-distribution points, ``(N,)``.
    :param outside: scores of out-of-distribution points, ``(M,)``; they should be larger.
    :param recall: share of the positives to be found, in (0, 1].
    :param positive: what is to be found: ``"outside"`` (as in OpenOOD) or ``"inside"`` (as in Liang et al., ICLR 2018:
        the share of outside points taken for inside when 95 % of the inside points are let through).
    :return: a float64 scalar in [0, 1]; small is good, ``recall`` is chance.
    :raises ValueError: an empty vector, ``nan`` scores, a recall out of range, another word for ``positive``.

    Cost: O((N + M) log (N + M)).

    Example:
        >>> ood_fpr(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0]))
        tensor(0.2500, dtype=torch.float64)
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall: expected a number in (0, 1], got {recall}")
    found, others = _found(inside, outside, positive)
    # The shares k/n themselves are compared: recall·n may round above the whole number that it is.
    shares = torch.arange(1, len(found) + 1, dtype=torch.float64) / len(found)
    needed = int(torch.searchsorted(shares, torch.tensor(recall, dtype=torch.float64)))
    threshold = found.sort(descending=True).values[needed : needed + 1]
    return _at_least(others, threshold).squeeze(0) / len(others)


def ood_detection(inside: Tensor, outside: Tensor) -> OODDetection:
    """
    All four figures for one score: give it :func:`predictive_entropy`, then :func:`total_variance`.

    :param inside: scores of in-distribution points, ``(N,)``.
    :param outside: scores of out-of-distribution points, ``(M,)``; they should be larger.
    :return: :class:`OODDetection`, float64 scalars; ``fpr95`` has the outside points as positives.
    :raises ValueError: an empty vector, ``nan`` scores.

    Cost: O((N + M) log (N + M)).

    Example:
        >>> float(ood_detection(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])).fpr95)
        0.0
    """
    return OODDetection(
        ood_auc(inside, outside),
        ood_aupr(inside, outside),
        ood_aupr(inside, outside, positive="inside"),
        ood_fpr(inside, outside),
    )


def total_variance(variance: Tensor, *, contrasts: bool = False) -> Tensor:
    """
    One variance per point, the sum over its outputs: a score for :func:`ood_auc` and its kin.

    :param variance: latent variances ``(N,)`` or ``(N, C)``, or covariances between the outputs ``(N, C, C)``.
    :param contrasts: for covariances: ``tr Σ − 1ᵀΣ1/C``, the variance of the differences between outputs only. Softmax
        does not see a common shift of its logits, so neither should the score.
    :return: ``(N,)``, float64.
    :raises ValueError: another shape, values that are not finite or negative, ``contrasts`` without covariances.

    Cost: O(N·C), O(N·C²) with ``contrasts``.

    Example:
        >>> covariance = torch.eye(2).expand(3, 2, 2) + 5.0
        >>> total_variance(covariance), total_variance(covariance, contrasts=True)
        (tensor([12., 12., 12.], dtype=torch.float64), tensor([1., 1., 1.], dtype=torch.float64))
    """
    converted = as_float64("variance", variance)
    square = converted.dim() == 3 and converted.shape[-1] == converted.shape[-2]
    if converted.numel() == 0 or not (square or converted.dim() in (1, 2)):
        raise ValueError(f"variance: expected shape (N,), (N, C) or (N, C, C), got {tuple(converted.shape)}")
    marginal = converted.diagonal(dim1=-2, dim2=-1) if square else converted
    if bool((marginal < 0).any()):
        raise ValueError(f"variance: expected non-negative numbers, got a minimum of {float(marginal.min()):.3g}")
    if contrasts and not square:
        raise ValueError(f"contrasts: expected covariances of shape (N, C, C), got shape {tuple(converted.shape)}")
    total = marginal.reshape(len(marginal), -1).sum(-1)
    return total - converted.sum((-2, -1)) / converted.shape[-1] if contrasts else total


def risk_coverage(uncertainty: Tensor, loss: Tensor) -> RiskCoverage:
    """
    Mean loss of the k most certain points against the share k/N that they are, k = 1 … N.

    Points of equal uncertainty count with their mean loss, the expectation over their order.

    :param uncertainty: larger is less certain (entropy, one minus the largest probability, variance), ``(N,)``.
    :param loss: of each point (0 for right and 1 for wrong, squared error, negative log-likelihood), ``(N,)``.
    :return: :class:`RiskCoverage`, each field ``(N,)`` in float64.
    :raises ValueError: shapes that differ, ``nan`` scores, a loss that is not finite.

    Cost: O(N·log N). Source: El-Yaniv and Wiener, 2010; Geifman and El-Yaniv, NeurIPS 2017.

    Example:
        >>> risk_coverage(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.0, 1.0, 0.0])).risk
        tensor([0.0000, 0.0000, 0.3333], dtype=torch.float64)
    """
    order = scores("uncertainty", uncertainty)
    (cost,) = same_shape(loss=loss)
    if cost.shape != order.shape:
        raise ValueError(f"loss: expected the shape of uncertainty {tuple(order.shape)}, got {tuple(cost.shape)}")
    _, group, size = order.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(size), dtype=torch.float64).index_add(0, group, cost) / size
    count = torch.arange(1, len(cost) + 1, dtype=torch.float64)
    return RiskCoverage(count / len(cost), mean.repeat_interleave(size).cumsum(0) / count)


def aurc(uncertainty: Tensor, loss: Tensor, *, excess: bool = False) -> Tensor:
    """
    Area under the risk–coverage curve: the mean over k = 1 … N of the mean loss of the k most certain points.

    :param uncertainty: larger is less certain, ``(N,)``.
    :param loss: of each point, ``(N,)``.
    :param excess: less the area of the best order, by the loss itself (E-AURC): what a better score could still gain.
    :return: a float64 scalar in the units of the loss.
    :raises ValueError: shapes that differ, ``nan`` scores, a loss that is not finite.

    Cost: O(N·log N). Source: Geifman, Uziel and El-Yaniv, ICLR 2019.

    Example:
        >>> aurc(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.0, 1.0, 0.0]))
        tensor(0.1111, dtype=torch.float64)
    """
    area = risk_coverage(uncertainty, loss).risk.mean()
    return area - risk_coverage(loss, loss).risk.mean() if excess else area


def _found(inside: Tensor, outside: Tensor, positive: str) -> tuple[Tensor, Tensor]:
    """Scores of the positives and of the others, large for positives."""
    if positive not in ("outside", "inside"):
        raise ValueError(f'positive: expected "outside" or "inside", got {positive!r}')
    inner, outer = scores("inside", inside), scores("outside", outside)
    return (outer, inner) if positive == "outside" else (-inner, -outer)


def _at_least(values: Tensor, thresholds: Tensor) -> Tensor:
    """How many of the values reach each threshold."""
    return (len(values) - torch.searchsorted(values.sort().values, thresholds, right=False)).double()
