"""What a deep image prior starts from: a first image, and the network in units of the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ntkgp.inverse.operators import ForwardOperator

_DAMPING = 1e-2  # of the least squares


class ImageNetwork(nn.Module):
    """A network whose outputs are images in their own units, ``scale * net(x)`` in the shape of the image.

    :param net: its outputs have as many numbers as the image, for each row of the input.
    :param image_shape: of the image.
    :param scale: units.

    >>> ImageNetwork(nn.Linear(3, 4), (2, 2), scale=10.0)(torch.zeros(1, 3)).shape
    torch.Size([1, 2, 2])
    """

    scale: Tensor

    def __init__(self, net: nn.Module, image_shape: Sequence[int], scale: float = 1.0) -> None:
        super().__init__()
        self.net, self.image_shape = net, tuple(image_shape)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (N, ...) -> images (N, *image_shape)."""
        return (self.scale * self.net(x)).reshape(len(x), *self.image_shape)


def check_network(module: ImageNetwork, x: Tensor) -> None:
    """Refuse a network that does not make one image of the input.

    :raises ValueError: it does not run, or has another number of outputs, or none to train.
    """
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("net: it has no trainable parameter")
    try:
        with torch.no_grad():
            output = module.net(x)
    except (RuntimeError, ValueError, TypeError) as reason:
        raise ValueError(f"net: it does not run on an input of shape {tuple(x.shape)} ({reason})") from reason
    if not isinstance(output, Tensor) or output.numel() != math.prod(module.image_shape):
        came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"net: expected an output with the numbers of an image {module.image_shape}, got {came}")


def filled(y: Tensor, kept: Tensor) -> Tensor:
    """Measurements with those not kept replaced by linear interpolation along the last dimension.

    Where a row has none that is kept, the mean of all that are.

    >>> filled(torch.tensor([[1.0, 9.0, 3.0]]), torch.tensor([[True, False, True]]))
    tensor([[1., 2., 3.]])
    """
    if bool(kept.all()):
        return y
    rows, known = y.reshape(-1, y.shape[-1]), kept.reshape(-1, y.shape[-1])
    n = rows.shape[-1]
    position = torch.arange(n, device=y.device).expand_as(known)
    left = torch.where(known, position, -1).cummax(-1).values
    right = n - 1 - torch.where(known.flip(-1), position, -1).cummax(-1).values.flip(-1)
    right = torch.where(right >= n, left, right)
    left = torch.where(left < 0, right, left)
    share = (position - left).to(y) / (right - left).clamp_min(1).to(y)
    low, high = left.clamp(0, n - 1), right.clamp(0, n - 1)
    value = rows.gather(-1, low) * (1 - share) + rows.gather(-1, high) * share
    empty = ~known.any(-1, keepdim=True)
    value = torch.where(empty, rows[known].mean(), value)
    return torch.where(known, rows, value).reshape(y.shape)


def pilot_image(A: ForwardOperator, y: Tensor, kind: str = "auto") -> Tensor:
    """A first image: the operator's FBP, its adjoint with the best step, or least squares ("auto" without an FBP).

    :raises ValueError: ``kind="fbp"`` of an operator that has none.
    """
    with torch.no_grad():
        if kind == "adjoint":
            image = A.adjoint(y)
            moved = A(image).square().sum()
            return image * (image.square().sum() / moved) if moved > 0 else image
        backproject: Callable[[Tensor], Tensor] | None = getattr(A, "fbp", None)
        if backproject is not None:
            try:
                return backproject(y)
            except (NotImplementedError, ValueError, TypeError) as reason:
                if kind == "fbp":
                    raise ValueError(f"input: the operator has no filtered backprojection ({reason})") from reason
        if kind == "fbp":
            raise ValueError(f"input: {type(A).__name__} has no method fbp; expected 'adjoint', 'random' or a tensor")
        return A.pinv(y, damping=_DAMPING)


def magnitude(image: Tensor) -> float:
    """The 99th percentile of the absolute values of an image, or one where it is zero."""
    values = image.abs().flatten().sort().values
    return float(values[round(0.99 * (len(values) - 1))]) or float(values[-1]) or 1.0
