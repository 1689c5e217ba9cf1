"""Checks of what the scores are given."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkgp.evaluation.checks import as_float64, same_shape


def gaussian(mean: Tensor, variance: Tensor, *target: Tensor) -> list[Tensor]:
    """Mean, variance and target in float64, refused unless the variance is positive."""
    named = {"mean": mean, "variance": variance}
    if target:
        named["target"] = target[0]
    converted = same_shape(**named)
    if not bool((converted[1] > 0).all()):
        raise ValueError(f"variance: expected positive numbers, got a minimum of {float(converted[1].min()):.3g}")
    return converted


def distributions(probabilities: Tensor) -> Tensor:
    """Probabilities in float64, refused unless each row is a distribution up to single precision."""
    converted = as_float64("probabilities", probabilities)
    if converted.dim() != 2 or converted.numel() == 0:
        raise ValueError(f"probabilities: expected shape (N, C), got {tuple(converted.shape)}")
    if bool((converted < 0).any()) or not torch.allclose(converted.sum(-1), torch.ones(1).double(), atol=1e-4, rtol=0):
        raise ValueError("probabilities: expected rows of non-negative numbers that sum to one")
    return converted


def classes(labels: Tensor, num_data: int, num_classes: int) -> Tensor:
    """Labels as int64 on the CPU, refused unless they are classes, one per point."""
    if not isinstance(labels, Tensor) or not _is_integer(labels):
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of integers, got {kind}")
    labels = labels.detach().to("cpu", torch.long)
    if labels.shape != (num_data,):
        raise ValueError(f"labels: expected shape ({num_data},), got {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"labels: expected classes 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    return labels


def categorical(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and labels, refused unless the labels are classes of the rows."""
    converted = distributions(probabilities)
    return converted, classes(labels, *converted.shape)


def draws(samples: Tensor, target: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Samples ``(S, *shape)`` and target ``shape`` in float64, refused unless there are enough samples."""
    (observed,) = same_shape(target=target)
    converted = as_float64("samples", samples)
    if converted.shape[1:] != observed.shape or converted.dim() != observed.dim() + 1:
        expected = ", ".join(["S", *map(str, observed.shape)])
        raise ValueError(f"samples: expected shape ({expected}), got {tuple(converted.shape)}")
    if len(converted) < least:
        raise ValueError(f"samples: expected at least {least} per target, got {len(converted)}")
    return converted, observed


def mixture(
    means: Tensor, variances: Tensor, target: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Components ``(K, *shape)``, target ``shape`` and weights ``(K, 1, ...)`` in float64."""
    (observed,) = same_shape(target=target)
    first, second = as_float64("means", means), as_float64("variances", variances)
    if first.dim() != observed.dim() + 1 or first.shape[1:] != observed.shape or len(first) == 0:
        expected = ", ".join(["K", *map(str, observed.shape)])
        raise ValueError(f"means: expected shape ({expected}), got {tuple(first.shape)}")
    if second.shape != first.shape:
        raise ValueError(f"variances: expected the shape of means {tuple(first.shape)}, got {tuple(second.shape)}")
    if not bool((second > 0).all()):
        raise ValueError(f"variances: expected positive numbers, got a minimum of {float(second.min()):.3g}")
    share = torch.full((len(first),), 1 / len(first), dtype=torch.float64)
    if weights is not None:
        share = as_float64("weights", weights)
        if share.shape != (len(first),):
            raise ValueError(f"weights: expected shape ({len(first)},), got {tuple(share.shape)}")
        if bool((share < 0).any()) or abs(float(share.sum()) - 1) > 1e-6:
            raise ValueError(f"weights: expected non-negative numbers that sum to one, got {share.tolist()}")
    return first, second, observed, share.reshape(-1, *[1] * observed.dim())


def scores(name: str, values: Tensor) -> Tensor:
    """A non-empty vector in float64; infinite entries can be ranked and are kept, ``nan`` is refused."""
    converted = as_float64(name, values, finite=False).contiguous()
    if converted.dim() != 1 or len(converted) == 0:
        raise ValueError(f"{name}: expected a vector of at least one score, got shape {tuple(converted.shape)}")
    if bool(converted.isnan().any()):
        raise ValueError(f"{name}: expected no nan among the scores")
    return converted


def positive_int(name: str, value: int) -> int:
    """An integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return value


def _is_integer(values: Tensor) -> bool:
    """Whether the tensor holds integers; ``bool`` counts as none."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
