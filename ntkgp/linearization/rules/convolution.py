"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ntkgp.linearization.rules.registry import register_rule
from ntkgp.linearization.rules.terms import Outer, Summed, Term


def padded(x: Tensor, padding: Sequence[int], mode: str = "constant") -> Tensor:
    """``x`` with these margins, last dimension first; negative ones are cut off."""
    return F.pad(x, tuple(padding), mode=mode) if any(padding) else x


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
    mode: str = "constant", groups: int = 1,
) -> Tensor:  # fmt: skip
    """Every position's window: (N, channels, *space) -> (N, groups, channels/groups · prod(kernel), positions)."""
    windows = padded(x, padding, mode)
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        windows = windows.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
    # One strided copy. It is several times faster than F.unfold where patches fit the cache, and knows any dimension.
    last = 2 + len(kernel)
    windows = windows.permute(0, 1, *range(last, last + len(kernel)), *range(2, last))
    return windows.reshape(len(x), groups, x.shape[1] // groups * prod(kernel), prod(windows.shape[last:]))


def margins(layer: Any) -> tuple[tuple[int, ...], str]:
    """What the layer pads its input by, last dimension first, and how."""
    if layer.padding_mode != "zeros":
        return tuple(layer._reversed_padding_repeated_twice), layer.padding_mode
    sides: list[int] = []
    for dim in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0, 0] if layer.padding == "valid" else [layer.padding[dim]] * 2
    return tuple(sides), "constant"


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvolutionRule:
    """J_W = Σ_t g_t ⊗ (patch of x at t) in each group of channels, J_b = Σ_t g_t.

    Patches are prod(kernel) / prod(stride) times as large as the input: they are cut when they are used.
    """

    def inputs(self, layer: Any, input: Tensor) -> Tensor:
        """The inputs of the layer."""
        return input

    def terms(self, layer: Any, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
        """Positions are the pixels of the output."""
        n, k, r = *cotangents.shape[:2], layer.groups
        g = cotangents.reshape(n, k, r, layer.out_channels // r, -1)
        padding, mode = margins(layer)
        if prod(layer.kernel_size) == 1:
            every = (slice(None), slice(None), *(slice(None, None, step) for step in layer.stride))
            a = padded(inputs, padding, mode)[every]
            weight = Outer(a.reshape(n, r, layer.in_channels // r, -1), g)
        else:
            cut = partial(
                patches, kernel=layer.kernel_size, stride=layer.stride, dilation=layer.dilation, padding=padding,
                mode=mode, groups=r,
            )  # fmt: skip
            weight = Outer(inputs, g, unfold=cut)
        return {"weight": weight, "bias": Summed(g)}
