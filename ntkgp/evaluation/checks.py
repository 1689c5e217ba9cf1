"""Checks that the scores share."""

from __future__ import annotations

import torch
from torch import Tensor


def as_float64(name: str, value: Tensor, finite: bool = True) -> Tensor:
    """Detached float64 copy on the CPU, refused unless it is a tensor of finite numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    value = value.detach().to("cpu", torch.float64)
    if finite and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: expected finite numbers, got {int((~torch.isfinite(value)).sum())} that are not")
    return value


def same_shape(**values: Tensor) -> list[Tensor]:
    """All arguments in float64, refused unless they have one non-empty shape."""
    converted = {name: as_float64(name, value) for name, value in values.items()}
    (first, reference), *others = converted.items()
    if reference.numel() == 0:
        raise ValueError(f"{first}: expected at least one number, got shape {tuple(reference.shape)}")
    for name, value in others:
        if value.shape != reference.shape:
            raise ValueError(
                f"{name}: expected the shape of {first} {tuple(reference.shape)}, got {tuple(value.shape)}"
            )
    return list(converted.values())
