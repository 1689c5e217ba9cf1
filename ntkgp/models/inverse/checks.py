"""What an inverse problem refuses: operators that are none, several inputs, measurements of another shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.checks import _another_row


def image_input(lin: LinearizedNetwork, x: Any = None) -> Tensor:
    """The one input of a network whose outputs are an image, packed.

    :param x: raw or packed, one row; None for the example that the network was linearised with.
    :raises ValueError: several inputs: a stack of images is not one inverse problem.
    """
    if x is not None:
        packed = lin.pack(x).detach()
        if len(packed) != 1:
            raise ValueError(f"x: expected one input, got N = {len(packed)}; make one model for each image")
        return packed.clone()
    rows = lin._probe_rows
    second = [_another_row(leaf).reshape(1, -1).to(rows) for leaf in lin.packing.leaves(rows[:1])]
    if len(rows) != 2 or not torch.equal(torch.cat(second, -1), rows[1:2]):
        raise ValueError(
            f"lin: was linearised with an example of {len(rows)} rows or more; expected the one input of the image, "
            "N = 1. Linearise with that input, or pass it as x="
        )
    return rows[:1].clone()


def check_operator(operator: Any, lin: LinearizedNetwork, name: str = "A") -> None:
    """Refuse an operator that is none, or of other images.

    :raises TypeError: it lacks the attributes of a forward operator.
    :raises ValueError: images of another shape than the network's, or an adjoint that is not the transpose.
    """
    wanted = ("image_shape", "data_shape", "num_measurements", "adjoint")
    missing = [attribute for attribute in wanted if not hasattr(operator, attribute)]
    if missing or not callable(operator):
        raise TypeError(
            f"{name}: expected a forward operator with image_shape, data_shape, num_measurements, a call and its "
            f"adjoint, got {type(operator).__name__}" + (f" without {', '.join(missing)}" if missing else "")
        )
    image, found = tuple(operator.image_shape), tuple(lin.output_shape)
    same = _without_ones(image) == _without_ones(found) or found == (math.prod(image),)
    if not same:
        raise ValueError(f"{name}: takes images of shape {image}, but the network's output has shape {found}")
    _check_adjoint(operator, name, lin.theta.device)


def _check_adjoint(operator: Callable[[Tensor], Tensor], name: str, device: torch.device) -> None:
    """The dot test in float64."""
    generator = torch.Generator().manual_seed(0)
    source: Any = operator
    image = torch.randn(1, *source.image_shape, generator=generator, dtype=torch.float64).to(device)
    data = torch.randn(1, *source.data_shape, generator=generator, dtype=torch.float64).to(device)
    with torch.no_grad():
        forward, back = operator(image), source.adjoint(data)
    if tuple(forward.shape) != tuple(data.shape) or tuple(back.shape) != tuple(image.shape):
        raise ValueError(
            f"{name}: expected data {tuple(data.shape)} of an image {tuple(image.shape)} and back, got "
            f"{tuple(forward.shape)} and {tuple(back.shape)}"
        )
    if not bool(torch.isfinite(forward).all()) or not bool(torch.isfinite(back).all()):
        raise ValueError(f"{name}: gives NaN or infinite values")
    left, right = float((forward * data).sum()), float((image * back).sum())
    scale = float(forward.norm() * data.norm()) + float(image.norm() * back.norm())
    if abs(left - right) > 1e-5 * scale:
        raise ValueError(
            f"{name}: its adjoint is not its transpose: <Ax, y> = {left:.6g} but <x, A'y> = {right:.6g} for random x, y"
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def measurements(y: Any, A: Any, name: str) -> Tensor:
    """Data in the shape of an operator's, as flat float64, a copy.

    :raises TypeError: no tensor of real numbers.
    :raises ValueError: another shape, NaN or infinite values.
    """
    if not isinstance(y, Tensor) or y.is_complex() or y.dtype == torch.bool:
        came = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{name}: expected a tensor of real numbers, got {came}")
    shape, found = tuple(A.data_shape), tuple(y.shape)
    if found not in (shape, (math.prod(shape),), (1, *shape), (1, 1, *shape)):
        hint = ""
        if found == shape[::-1]:
            hint = "; it looks transposed"
        elif len(found) > len(shape) and found[-len(shape) :] == shape:
            hint = "; make one model for each image of a stack"
        raise ValueError(f"{name}: expected shape {shape}, the operator's data_shape, got {found}{hint}")
    if not bool(torch.isfinite(y).all()):
        bad = int((~torch.isfinite(y)).sum())
        raise ValueError(
            f"{name}: {bad} of {y.numel()} entries are NaN or infinite; leave these rays out of the operator"
        )
    return y.detach().to(torch.float64).reshape(-1).clone()


def root_weights(weights: Tensor) -> Tensor:
    """√w with w scaled to a geometric mean of one: the evidence then is that of the data as they came."""
    if not bool((weights > 0).all()):
        raise ValueError(f"weights: expected positive numbers, the smallest is {float(weights.min()):.3g}")
    return (0.5 * (weights.log() - weights.log().mean())).exp()
