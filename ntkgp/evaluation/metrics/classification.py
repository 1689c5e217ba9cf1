"""Scores of predicted class probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkgp.evaluation.metrics.inputs import categorical, distributions


def accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """
    Fraction of points whose most probable class is the label.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :return: a float64 scalar.
    :raises ValueError: rows that are no probabilities, labels out of range.
    :raises TypeError: labels that are not integers.

    Cost: O(N·C).

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        tensor(0.5000, dtype=torch.float64)
    """
    probabilities, labels = categorical(probabilities, labels)
    return (probabilities.argmax(-1) == labels).double().mean()


def categorical_nll(probabilities: Tensor, labels: Tensor) -> Tensor:
    """
    Mean of ``−log p_y``; infinite when a label has probability zero.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :return: a float64 scalar, in nats per point.
    :raises ValueError: rows that are no probabilities, labels out of range.
    :raises TypeError: labels that are not integers.

    Cost: O(N).

    Example:
        >>> categorical_nll(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
        tensor(0.6931, dtype=torch.float64)
    """
    probabilities, labels = categorical(probabilities, labels)
    return -probabilities.gather(-1, labels.unsqueeze(-1)).log().mean()


def brier_score(probabilities: Tensor, labels: Tensor) -> Tensor:
    """
    Mean over points of ``Σ_c (p_c − 1{y = c})²``, summed (not averaged) over the classes.

    :param probabilities: ``(N, C)``, rows sum to one.
    :param labels: classes 0 … C−1, ``(N,)``, integer.
    :return: a float64 scalar in [0, 2].
    :raises ValueError: rows that are no probabilities, labels out of range.
    :raises TypeError: labels that are not integers.

    Cost: O(N·C).

    Example:
        >>> brier_score(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        tensor(0.1250, dtype=torch.float64)
    """
    probabilities, labels = categorical(probabilities, labels)
    hot = torch.nn.functional.one_hot(labels, probabilities.shape[-1])
    return (probabilities - hot).square().sum(-1).mean()


def predictive_entropy(probabilities: Tensor) -> Tensor:
    """
    Entropy ``−Σ_c p_c log p_c`` of each predictive distribution.

    :param probabilities: ``(N, C)``, rows sum to one.
    :return: ``(N,)``, float64, in nats.
    :raises ValueError: rows that are no probabilities.

    Cost: O(N·C).

    Example:
        >>> predictive_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    return torch.special.entr(distributions(probabilities)).sum(-1)
