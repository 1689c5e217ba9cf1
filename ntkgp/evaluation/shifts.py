"""Shifts of graded strength: rotations, and the corruptions of Hendrycks and Dietterich with their five severities.

:func:`~ntkgp.evaluation.datasets.corrupt` is another thing: four shifts of one strength each, large enough to be seen
on 8 × 8 digits. Here every shift has a scale, along which accuracy and calibration are plotted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy
import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, pad

__all__ = ["COMMON_CORRUPTIONS", "SEVERITIES", "common_corruption", "rotate"]

SEVERITIES = (1, 2, 3, 4, 5)
_REACH = 8  # of the defocus kernel, pixels to each side


def rotate(images: Tensor, degrees: float) -> Tensor:
    """
    Images turned counter-clockwise about their centre: bilinear interpolation, zeros from outside.

    :param images: ``(N, channels, height, width)``, floating point.
    :param degrees: angle; multiples of 90 move square images pixel by pixel, up to rounding.
    :return: images of the same shape and dtype.
    :raises ValueError: images of another shape or dtype, an angle that is not finite.

    Cost: some passes over the images.

    Example:
        >>> image = torch.arange(9.0).reshape(1, 1, 3, 3)
        >>> torch.allclose(rotate(image, 90), image.rot90(1, (2, 3)), atol=1e-5)
        True
    """
    _check(images, least=2)
    if not math.isfinite(degrees):
        raise ValueError(f"degrees: expected a finite number, got {degrees}")
    height, width = images.shape[-2:]
    angle = math.radians(degrees)
    # Where each pixel comes from, counted from the centre; rows count downwards.
    down, right = torch.meshgrid(_centred(height), _centred(width), indexing="ij")
    source_right = math.cos(angle) * right - math.sin(angle) * down
    source_down = math.sin(angle) * right + math.cos(angle) * down
    grid = torch.stack([2 * source_right / (width - 1), 2 * source_down / (height - 1)], -1).to(images)
    grid = grid.expand(len(images), height, width, 2)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _centred(size: int) -> Tensor:
    """Places of pixels, counted from the middle one."""
    return torch.arange(size, dtype=torch.float64) - (size - 1) / 2


def _check(images: Tensor, least: int) -> None:
    if images.dim() != 4 or not images.is_floating_point() or min(images.shape[-2:]) < least:
        raise ValueError(
            f"images: expected floating-point (N, channels, height, width) of at least {least} x {least} pixels, "
            f"got {tuple(images.shape)} {images.dtype}"
        )


def _random_normal(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator, dtype=images.dtype)


def _gaussian_noise(images: Tensor, c: float, generator: torch.Generator) -> Tensor:
    return images + c * _random_normal(images, generator)


def _shot_noise(images: Tensor, c: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(c * images, generator=generator) / c


def _impulse_noise(images: Tensor, c: float, generator: torch.Generator) -> Tensor:
    hit = torch.rand(images.shape, generator=generator) < c
    salt = torch.rand(images.shape, generator=generator) < 0.5
    return torch.where(hit, salt.to(images.dtype), images)


def _speckle_noise(images: Tensor, c: float, generator: torch.Generator) -> Tensor:
    return images + c * images * _random_normal(images, generator)


def _convolved(images: Tensor, kernel: Tensor, mode: str) -> Tensor:
    """Every channel with one kernel (h, w)."""
    h, w = kernel.shape
    padded = pad(images.reshape(-1, 1, *images.shape[-2:]), (w // 2, w // 2, h // 2, h // 2), mode=mode)
    return conv2d(padded, kernel.reshape(1, 1, h, w)).reshape(images.shape)


def _bell(sigma: float, radius: int) -> Tensor:
    """A Gaussian at 2·radius + 1 pixels, of sum one."""
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma).square())
    return weights / weights.sum()


def _gaussian_blur(images: Tensor, c: float, generator: torch.Generator) -> Tensor:
    bell = _bell(c, int(4 * c + 0.5))
    return _convolved(images, torch.outer(bell, bell), "replicate")


def _defocus_blur(images: Tensor, c: tuple[float, float], generator: torch.Generator) -> Tensor:
    radius, blur = c
    offsets = torch.arange(-_REACH, _REACH + 1, dtype=torch.float64).square()
    disc = (offsets.unsqueeze(0) + offsets.unsqueeze(1) <= radius**2).double()
    bell = _bell(blur, 1)
    kernel = conv2d((disc / disc.sum())[None, None], torch.outer(bell, bell)[None, None], padding=1)[0, 0]
    return _convolved(images, kernel, "reflect")


def _zoom_blur(images: Tensor, c: float, generator: torch.Generator) -> Tensor:
    factors = np.arange(1, 1 + c, 0.01)
    total = images.clone()
    for factor in factors:
        inner = images
        for axis in (2, 3):
            size = images.shape[axis]
            kept = math.ceil(size / factor)
            inner = inner.narrow(axis, (size - kept) // 2, kept)
        larger = torch.from_numpy(scipy.ndimage.zoom(inner.numpy(), (1, 1, factor, factor), order=1))
        for axis in (2, 3):
            size = images.shape[axis]
            larger = larger.narrow(axis, (larger.shape[axis] - size) // 2, size)
        total += larger
    return total / (len(factors) + 1)


def _contrast(images: Tensor, c: float, generator: torch.Generator) -> Tensor:
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * c + mean


def _brightness(images: Tensor, c: float, generator: torch.Generator) -> Tensor:
    # V of the HSV colour model is the largest channel; at fixed hue and saturation all channels are proportional to it.
    value = images.amax(1, keepdim=True)
    return torch.where(value > 0, images * ((value + c).clamp_max(1) / value.clamp_min(1e-12)), c)


def _pixelate(images: Tensor, c: float, generator: torch.Generator) -> Tensor:
    height, width = images.shape[-2:]
    down = (_box_weights(height, int(height * c)), _box_weights(width, int(width * c)))
    up = (_box_weights(int(height * c), height), _box_weights(int(width * c), width))
    small = down[0] @ images @ down[1].mT
    return up[0] @ small @ up[1].mT


def _box_weights(old: int, new: int) -> Tensor:
    """Resampling with a box filter, (new, old): the mean of the pixels whose centres lie in the new pixel."""
    scale = old / new
    width = max(scale, 1.0)
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(old, dtype=torch.float64) + 0.5 - centres.unsqueeze(-1)) / width
    inside = ((distance > -0.5) & (distance <= 0.5)).double()
    return inside / inside.sum(-1, keepdim=True)


_Corruption = (
    Callable[[Tensor, float, torch.Generator], Tensor]
    | Callable[[Tensor, tuple[float, float], torch.Generator], Tensor]
)
_CORRUPTIONS: dict[str, tuple[_Corruption, tuple]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500.0, 250.0, 100.0, 75.0, 50.0)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (_speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "zoom_blur": (_zoom_blur, (0.06, 0.11, 0.16, 0.21, 0.26)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
COMMON_CORRUPTIONS = tuple(_CORRUPTIONS)
"""Names that :func:`common_corruption` knows."""


def common_corruption(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    r"""
    Images corrupted as in CIFAR-10-C.

    With c the severity's constant, x the image in [0, 1] and m its mean over pixels, per channel:

    ===============  ===================================================================================================
    gaussian_noise   :math:`x + c\,\varepsilon`, ε standard normal per value
    shot_noise       Poisson(c x)/c
    impulse_noise    values replaced by 0 or 1, at equal odds, with probability c
    speckle_noise    :math:`x + c\,x\,\varepsilon`
    gaussian_blur    Gaussian of c pixels, cut at 4c; the border is repeated
    defocus_blur     a disc blurred by a 3 × 3 Gaussian; the image is mirrored at the border
    zoom_blur        mean of the image and of its enlargements by ``numpy.arange(1, 1 + c, 0.01)``
    contrast         :math:`(x - m)c + m`
    brightness       the value of HSV plus c
    pixelate         down to the fraction c of its size and back, box filter
    ===============  ===================================================================================================

    The result is cut to [0, 1] and down to 256 levels. Constants are those for 32 × 32 pixels. The others of the
    benchmark need pictures of their own or an image library; saturation and JPEG do little to grey images.

    :param images: ``(N, channels, height, width)`` in [0, 1], at least 9 pixels wide and high.
    :param kind: one of :data:`COMMON_CORRUPTIONS`.
    :param severity: 1 to 5.
    :param seed: of the random ones; the global random state is left alone.
    :return: corrupted images, same shape and dtype.
    :raises ValueError: an unknown kind or severity, images of another shape or range.

    Cost: some passes over the images; zoom_blur up to 26 interpolations.

    Source: Hendrycks & Dietterich, *Benchmarking neural network robustness to common corruptions and perturbations*,
    ICLR 2019; constants of its code for CIFAR.

    Example:
        >>> common_corruption(torch.ones(1, 1, 9, 9), "impulse_noise", 5).unique()
        tensor([0., 1.])
    """
    if kind not in _CORRUPTIONS:
        raise ValueError(f"kind: expected one of {', '.join(COMMON_CORRUPTIONS)}, got {kind!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: expected 1 to 5, got {severity!r}")
    _check(images, least=_REACH + 1)
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("images: expected values in [0, 1]")
    function, constants = _CORRUPTIONS[kind]
    generator = torch.Generator().manual_seed(seed)
    found = function(images.detach().cpu().double(), constants[SEVERITIES.index(severity)], generator)
    # Levels are cut, not rounded; a level that single precision put just below an integer is that integer.
    levels = (255 * found.clamp(0, 1) + 1e-4).floor()
    return (levels / 255).to(images)
