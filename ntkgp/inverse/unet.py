"""The U-Net of the deep image prior, for images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUTS = ("linear", "sigmoid")
_DARK = 0.01
_SATURATED = 15.0  # beyond which a sigmoid in float32 is constant


class UNet(nn.Module):
    r"""A U-Net that maps images to images of the same size, odd sizes included.

    Level 0 has the resolution of the image, each further one half of it (a convolution of stride 2), and on the way
    back each is interpolated to the size of the one above and joined with what a 1×1 convolution lets through of it
    (the skip). All weights sit in convolutions and group normalisations, each of which has a Gram rule in
    :class:`~ntkgp.LinearizedNetwork`. Blocks are the children ``inc``, ``down{i}``, ``skip{i}``, ``up{i}`` and ``out``.

    :param in_channels: of the input, shape (N, in_channels, H, W).
    :param out_channels: of the output, shape (N, out_channels, H, W).
    :param channels: of each level, finest first; its length is the number of levels.
    :param skip_channels: of the skip at each level but the last, finest first; 0 is none.
    :param norm: ``None``, or ``"group"`` for a group normalisation after each 3×3 convolution.
    :param num_groups: of the normalisation; divides all channels.
    :param output: ``"linear"``, or ``"sigmoid"`` for images in [0, 1], whose Jacobian vanishes where it saturates.
    :param dropout: probability of dropped channels after each 3×3 convolution; for Monte-Carlo dropout.
    :param slope: of the leaky rectifier on negative numbers.
    :raises ValueError: an option out of its range.

    The default has the architecture and the 76,905 weights of bayes_dip's network for 28 × 28 images (its walnut: six
    levels of 128 channels, ``skip_channels=(4, 4, 0, 0, 0)``, ``norm="group"``). Parameters are initialised by torch's
    global random state.

    Cost: about 2·Σ_l (channels_l)²·27·HW/4ˡ flops per image and pass.

    Source: Ulyanov, Vedaldi & Lempitsky, *Deep image prior*, CVPR 2018; `Antorán et al. 2022
    <https://arxiv.org/abs/2203.00479>`_.

    >>> net = UNet()
    >>> sum(p.numel() for p in net.parameters()), net(torch.zeros(1, 1, 13, 10)).shape
    (76905, torch.Size([1, 1, 13, 10]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 32, 32),
        skip_channels: Sequence[int] = (4, 4),
        *,
        norm: str | None = None,
        num_groups: int = 4,
        output: str = "linear",
        dropout: float = 0.0,
        slope: float = 0.2,
    ) -> None:
        super().__init__()
        channels, skips = tuple(channels), tuple(skip_channels)
        _check(in_channels, out_channels, channels, skips, norm, num_groups, output, dropout)
        self.output, self.num_levels = output, len(channels)

        def layers(width_in: int, width_out: int, stride: int = 1) -> list[nn.Module]:
            found: list[nn.Module] = [nn.Conv2d(width_in, width_out, 3, stride, padding=1)]
            if norm == "group":
                found.append(nn.GroupNorm(num_groups, width_out))
            if dropout:
                found.append(nn.Dropout2d(dropout))
            return [*found, nn.LeakyReLU(slope)]

        self.inc = nn.Sequential(*layers(in_channels, channels[0]))
        for level, (above, width) in enumerate(pairwise(channels)):
            down = nn.Sequential(*layers(above, width, stride=2), *layers(width, width))
            self.add_module(f"down{level}", down)
        for level in range(self.num_levels - 1):
            if skips[level]:
                act: list[nn.Module] = [nn.GroupNorm(1, skips[level])] if norm == "group" else []
                skip = nn.Sequential(nn.Conv2d(channels[level], skips[level], 1), *act, nn.LeakyReLU(slope))
                self.add_module(f"skip{level}", skip)
        for level in reversed(range(self.num_levels - 1)):
            joined = channels[level + 1] + skips[level]
            up = nn.Sequential(*layers(joined, channels[level]), *layers(channels[level], channels[level]))
            self.add_module(f"up{level}", up)
        self.out = nn.Conv2d(channels[0], out_channels, 1)

    def start_at(self, level: float) -> UNet:
        """Set the last bias so that sigmoid outputs begin near a level in (0, 1); return itself.

        At 0.5, where outputs begin otherwise, the first steps on a dark image all push down, and may end where every
        pixel is zero and no gradient is left.

        >>> net = UNet(channels=(8, 8), skip_channels=(2,), output="sigmoid").start_at(0.1)
        >>> 0.05 < net(torch.zeros(1, 1, 8, 8)).mean().item() < 0.2
        True
        """
        if self.output == "sigmoid":
            with torch.no_grad():
                self.out.bias.fill_(torch.tensor(level).clamp(_DARK, 1 - _DARK).logit())  # type: ignore[union-attr]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) -> (N, out_channels, H, W)."""
        levels = [self.inc(x)]
        for level in range(self.num_levels - 1):
            levels.append(self.get_submodule(f"down{level}")(levels[-1]))
        found = levels.pop()
        for level in reversed(range(self.num_levels - 1)):
            above = levels.pop()
            found = _interpolated(found, above.shape[-2:])
            name = f"skip{level}"
            if name in self._modules:
                found = torch.cat([found, self.get_submodule(name)(above)], dim=1)
            found = self.get_submodule(f"up{level}")(found)
        found = self.out(found)
        return found if self.output == "linear" else found.clamp(-_SATURATED, _SATURATED).sigmoid()


def _interpolated(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear interpolation with the corners aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def _check(
    in_channels: int, out_channels: int, channels: tuple[int, ...], skips: tuple[int, ...], norm: str | None,
    num_groups: int, output: str, dropout: float,
) -> None:  # fmt: skip
    """Refuse options out of their ranges."""
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("num_groups", num_groups)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if not channels or any(not isinstance(width, int) or width < 1 for width in channels):
        raise ValueError(f"channels: expected a positive integer per level, got {channels!r}")
    if len(skips) != len(channels) - 1 or any(not isinstance(width, int) or width < 0 for width in skips):
        raise ValueError(
            f"skip_channels: expected {len(channels) - 1} integers, one for each level but the last, got {skips!r}"
        )
    if norm not in (None, "group"):
        raise ValueError(f"norm: expected None or 'group', got {norm!r}")
    if norm == "group" and any(width % num_groups for width in channels):
        raise ValueError(f"num_groups: expected a divisor of all channels {channels}, got {num_groups}")
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {OUTPUTS}, got {output!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
