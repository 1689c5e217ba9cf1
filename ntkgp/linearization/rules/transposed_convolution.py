"""Transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ntkgp.linearization.rules.convolution import patches
from ntkgp.linearization.rules.registry import register_rule
from ntkgp.linearization.rules.terms import Outer, Summed, Term


@register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvolutionRule:
    """J_W = Σ_t x_t ⊗ (patch of g at t) in each group of channels, J_b = Σ_t g_t.

    The positions t are those of the input: what an ordinary convolution does to its input happens to the cotangents.
    """

    def inputs(self, layer: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The inputs of the layer; the size of its output is read off the cotangents."""
        return input

    def terms(self, layer: Any, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
        """Positions are the pixels of the input."""
        n, k, r = *cotangents.shape[:2], layer.groups
        padding: list[int] = []
        for dim in reversed(range(len(layer.kernel_size))):
            span = (inputs.shape[2 + dim] - 1) * layer.stride[dim] + layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            before = layer.padding[dim]
            # Pixels of the output that no position of the input reaches are cut off.
            padding += [before, span + 1 - cotangents.shape[3 + dim] - before]
        cut = partial(
            patches, kernel=layer.kernel_size, stride=layer.stride, dilation=layer.dilation, padding=tuple(padding),
            groups=r,
        )  # fmt: skip
        a = inputs.reshape(n, r, layer.in_channels // r, -1)
        weight = Outer(a, cotangents, unfold_cotangents=cut, swapped=True)
        return {"weight": weight, "bias": Summed(cotangents.reshape(n, k, 1, layer.out_channels, -1))}
