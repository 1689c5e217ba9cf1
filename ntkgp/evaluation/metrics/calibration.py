"""Calibration of class probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ntkgp.evaluation.metrics.inputs import categorical, positive_int


class ReliabilityBins(NamedTuple):
    """Points, mean confidence and accuracy per confidence bin; empty bins hold ``nan``."""

    points: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability_bins(probabilities: Tensor, labels: Tensor, bins: int = 15) -> ReliabilityBins:
    """
    Points, mean confidence and accuracy in equal bins ``(lo, hi]`` of the largest probability.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :param bins: number of bins on [0, 1].
    :return: :class:`ReliabilityBins`, each field ``(bins,)`` in float64; confidence and accuracy of an empty bin are
        ``nan``.
    :raises ValueError: rows that are no probabilities, labels out of range, ``bins < 1``.
    :raises TypeError: labels that are not integers.

    Cost: O(N·(C + log bins)).

    Example:
        >>> reliability_bins(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]), bins=2)
        ReliabilityBins(points=tensor([1., 1.], dtype=torch.float64),
            confidence=tensor([0.5000, 0.7500], dtype=torch.float64),
            accuracy=tensor([0., 1.], dtype=torch.float64))
    """
    probabilities, labels = categorical(probabilities, labels)
    confidence, predicted = probabilities.max(-1)
    return _binned(_equal_width(confidence, bins), confidence, predicted == labels, bins)


def adaptive_reliability_bins(probabilities: Tensor, labels: Tensor, bins: int = 15) -> ReliabilityBins:
    """
    Points, mean confidence and accuracy in bins of equally many points, by the largest probability.

    The point of rank r (from 0) among the N confidences is in bin ``⌊r·bins/N⌋``, so sizes differ by at most one. Equal
    confidences share the rank of the first of them and thus a bin: the order of the points plays no part, and a bin
    may be empty.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :param bins: number of bins.
    :return: :class:`ReliabilityBins`, each field ``(bins,)`` in float64, by rising confidence.
    :raises ValueError: rows that are no probabilities, labels out of range, ``bins < 1``.
    :raises TypeError: labels that are not integers.

    Cost: O(N·(C + log N)).

    Example:
        >>> p = torch.tensor([[0.75, 0.25], [0.875, 0.125], [1.0, 0.0], [1.0, 0.0]])
        >>> adaptive_reliability_bins(p, torch.tensor([1, 0, 0, 0]), bins=2).confidence
        tensor([0.8125, 1.0000], dtype=torch.float64)
    """
    probabilities, labels = categorical(probabilities, labels)
    confidence, predicted = probabilities.max(-1)
    rank = torch.searchsorted(confidence.sort().values, confidence, right=False)
    index = rank * positive_int("bins", bins) // len(confidence)
    return _binned(index, confidence, predicted == labels, bins)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """
    Expected calibration error ``Σ_b (n_b/N)·|accuracy_b − confidence_b|`` over equal bins of the largest probability.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :param bins: number of bins ``(lo, hi]`` on [0, 1].
    :return: a float64 scalar in [0, 1].
    :raises ValueError: rows that are no probabilities, labels out of range, ``bins < 1``.
    :raises TypeError: labels that are not integers.

    Cost: O(N·(C + log bins)). Source: Guo et al., ICML 2017, eq. 3.

    Example:
        >>> expected_calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        tensor(0.2500, dtype=torch.float64)
    """
    return _weighted_gap(reliability_bins(probabilities, labels, bins))


def adaptive_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """
    Expected calibration error ``Σ_b (n_b/N)·|accuracy_b − confidence_b|`` over bins of equally many points.

    Confidences of a good classifier crowd near one, where bins of equal width see almost all of them at once; bins of
    equal size look there as closely as anywhere. The bins are those of :func:`adaptive_reliability_bins`.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :param bins: number of bins.
    :return: a float64 scalar in [0, 1].
    :raises ValueError: rows that are no probabilities, labels out of range, ``bins < 1``.
    :raises TypeError: labels that are not integers.

    Cost: O(N·(C + log N)). Source: Nguyen and O'Connor, EMNLP 2015; Nixon et al., CVPR workshops 2019, with
    the largest probability only.

    Example:
        >>> p = torch.tensor([[0.75, 0.25], [0.875, 0.125], [1.0, 0.0], [1.0, 0.0]])
        >>> adaptive_calibration_error(p, torch.tensor([1, 0, 0, 0]), bins=2)
        tensor(0.1562, dtype=torch.float64)
    """
    return _weighted_gap(adaptive_reliability_bins(probabilities, labels, bins))


def classwise_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """
    Mean over the classes c of ``Σ_b (n_bc/N)·|frequency_bc − mean p_bc|`` over equal bins ``(lo, hi]`` of p_c.

    Looks at every class of every point, where :func:`expected_calibration_error` looks at the most probable one only.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :param bins: number of bins on [0, 1].
    :return: a float64 scalar in [0, 1].
    :raises ValueError: rows that are no probabilities, labels out of range, ``bins < 1``.
    :raises TypeError: labels that are not integers.

    Cost: O(N·C·log bins). Source: Kull et al., NeurIPS 2019 (classwise-ECE).

    Example:
        >>> classwise_calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        tensor(0.2500, dtype=torch.float64)
    """
    probabilities, labels = categorical(probabilities, labels)
    gaps = [_weighted_gap(_binned(_equal_width(p, bins), p, labels == c, bins)) for c, p in enumerate(probabilities.mT)]
    return torch.stack(gaps).mean()


def _equal_width(confidence: Tensor, bins: int) -> Tensor:
    """Index of the bin ``(lo, hi]`` of [0, 1] that holds each number; zero is in the first."""
    edges = torch.arange(positive_int("bins", bins) + 1, dtype=torch.float64) / bins
    return (torch.bucketize(confidence.contiguous(), edges, right=False) - 1).clamp(0, bins - 1)


def _binned(index: Tensor, confidence: Tensor, correct: Tensor, bins: int) -> ReliabilityBins:
    """Count, mean confidence and mean of ``correct`` per bin."""
    zeros = torch.zeros(bins, dtype=torch.float64)
    count = zeros.index_add(0, index, torch.ones_like(confidence))
    mean_confidence = zeros.index_add(0, index, confidence) / count
    return ReliabilityBins(count, mean_confidence, zeros.index_add(0, index, correct.double()) / count)


def _weighted_gap(binned: ReliabilityBins) -> Tensor:
    """Mean over the points of the distance between accuracy and confidence of their bin."""
    count, confidence, correct = binned
    return (count / count.sum() * (correct - confidence).abs()).nan_to_num(nan=0.0).sum()
