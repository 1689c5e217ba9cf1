"""What is refused before a network is linearised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ntkgp.linearization.frozen import FrozenNetwork, OutputTypeError
from ntkgp.linearization.packing import InputPacking


def check_count(value: Any, name: str, least: int = 1) -> None:
    """Refuse what is no whole number of at least so many."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def real_numbers(value: Any, name: str) -> Tensor:
    """One number or several as a float64 tensor of their own."""
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
    try:
        return torch.as_tensor(value, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number or a tensor of numbers, got {type(value).__name__}") from None


def check_weights(net: nn.Module) -> None:
    """Refuse weights that cannot be linearised: uninitialised, none to train, not real, or not finite."""
    trainable = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in net.parameters()):
        raise ValueError("net has uninitialised (lazy) parameters; run it once before linearising")
    if not trainable:
        raise ValueError("net has no trainable parameter: no parameter has requires_grad=True")
    for name, p in trainable:
        if not p.is_floating_point():
            raise TypeError(f"net: parameter {name!r} is {p.dtype}; expected a real floating-point dtype")
    for name, p in net.named_parameters():
        if p.is_floating_point() and not torch.isfinite(p.detach()).all():
            raise ValueError(f"net: parameter {name!r} holds NaN or infinite values")


def check_rows(frozen: FrozenNetwork, packing: InputPacking, x: Tensor) -> tuple[Tensor, torch.Size]:
    """Rows (two at least) on which the network was seen to treat every row on its own, packed, and its output shape.

    :raises ValueError: a network that does not run, whose outputs are not finite, or depend on the other rows.
    """
    leaves = packing.leaves(x)
    if len(x) == 1:
        leaves = [torch.cat([leaf, _another_row(leaf)]) for leaf in leaves]
    module = frozen.module(leaves[0].device)
    with torch.no_grad():
        try:
            batch = frozen.run(module, leaves)
        except OutputTypeError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as reason:
            raise ValueError(f"example: the network does not run on it ({reason})") from reason
        if batch.ndim == 0 or batch.shape[0] != leaves[0].shape[0]:
            raise ValueError(
                f"net: expected an output with N = {leaves[0].shape[0]} rows, got shape {tuple(batch.shape)}"
            )
        try:
            rows = [frozen.run(module, [leaf[n : n + 1] for leaf in leaves]) for n in range(len(batch))]
        except (RuntimeError, ValueError, IndexError) as reason:
            raise ValueError(
                f"net: runs on {len(batch)} rows but not on one ({reason}); a Gaussian process needs f(x) per row. "
                "BatchNorm must keep running statistics"
            ) from reason
    if not torch.isfinite(batch).all():
        raise ValueError("net: its outputs on the example are NaN or infinite")
    single = torch.cat(rows)
    if batch[0].numel() == 0:
        raise ValueError(f"net: expected at least one output per row, got shape {tuple(batch.shape)}")
    tolerance = 1e-6 if batch.dtype == torch.float64 else (1e-2 if batch.element_size() < 4 else 1e-3)
    error = (batch - single).abs().max() / batch.abs().max().clamp_min(1e-30)
    if error > tolerance:
        raise ValueError(
            "net: its output for a row depends on the other rows of the batch, or is random "
            f"(relative change {float(error):.1e} when the row is alone); a Gaussian process needs f(x) per row. "
            "BatchNorm must keep running statistics, dropout must follow train/eval mode"
        )
    packed = torch.cat([leaf.reshape(len(leaf), -1).to(_pack_dtype(leaves)) for leaf in leaves], dim=-1)
    return packed, batch.shape[1:]


def _pack_dtype(leaves: list[Tensor]) -> torch.dtype:
    return leaves[0].dtype if len(leaves) == 1 and leaves[0].is_floating_point() else torch.float64


def _another_row(leaf: Tensor) -> Tensor:
    """A second, different row made of the first one's values, so that it is valid input for any network."""
    flipped = leaf.flip(-1) if leaf.ndim > 1 else leaf.clone()
    if torch.equal(flipped, leaf) and leaf.is_floating_point():
        return leaf * 0.5 + 0.25
    return flipped
