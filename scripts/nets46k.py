"""Five image classifiers of about 46,000 weights: with and without normalisation, convolutional and a transformer.

For images (B, 1, S, S) with S = 28 or 8; the first layer halves the larger ones. All pool their last features over
positions, so that the number of weights does not depend on S but for the transformer's patches. The sixth
network of the comparison is :class:`ntkgp.inverse.UNet` with `UNET`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkgp.evaluation.training import seeded

CLASSES = 10
UNET: dict[str, Any] = {"channels": (24, 24, 28), "skip_channels": (4, 4), "norm": "group", "output": "sigmoid"}


def conv3(inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """3 × 3, padded."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def first_stride(size: int) -> int:
    """Of the first convolution."""
    return 2 if size > 16 else 1


class Head(nn.Sequential):
    """Mean over positions, then a dense layer."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def cnn(size: int) -> nn.Module:
    """Four convolutions with biases and no normalisation."""
    return nn.Sequential(
        conv3(1, 16, first_stride(size), bias=True), nn.ReLU(),
        conv3(16, 32, 2, bias=True), nn.ReLU(),
        conv3(32, 48, 2, bias=True), nn.ReLU(),
        conv3(48, 62, bias=True), nn.ReLU(),
        Head(62),
    )  # fmt: skip


class Block(nn.Module):
    """Residual block of He et al. (2016a): a normalisation after each convolution, ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity() if inputs == outputs and stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H/stride, W/stride)."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class PreBlock(nn.Module):
    """Residual block of He et al. (2016b): normalisation and ReLU before each convolution, nothing after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        self.shortcut = None if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """As :class:`Block`."""
        active = F.relu(self.norm1(x))
        out = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class FixupBlock(nn.Module):
    """Residual block of Zhang et al. (2019): no normalisation, scalar biases and one multiplier.

    :param depth: number of blocks of the network, on which the initialisation depends.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, depth: int) -> None:
        super().__init__()
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (nn.Parameter(torch.zeros(1)) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(1))
        self.conv1, self.conv2 = conv3(inputs, outputs, stride), conv3(outputs, outputs)
        self.shortcut = None if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        with torch.no_grad():
            self.conv1.weight.normal_(0, (2 / (9 * outputs)) ** 0.5 * depth**-0.5)
            self.conv2.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """As :class:`Block`."""
        shifted = x + self.bias1a
        out = self.conv2(F.relu(self.conv1(shifted) + self.bias1b) + self.bias2a) * self.scale + self.bias2b
        return F.relu(out + (x if self.shortcut is None else self.shortcut(shifted)))


def resnet(size: int) -> nn.Module:
    """Three residual blocks with BatchNorm."""
    return nn.Sequential(
        conv3(1, 16, first_stride(size)), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 32, 2), Block(32, 38, 2), Head(38),
    )  # fmt: skip


def pre_resnet(size: int) -> nn.Module:
    """Three pre-activation residual blocks with BatchNorm."""
    return nn.Sequential(
        conv3(1, 16, first_stride(size)), PreBlock(16, 16, 1), PreBlock(16, 32, 2), PreBlock(32, 38, 2),
        nn.BatchNorm2d(38), nn.ReLU(), Head(38),
    )  # fmt: skip


def fixup_resnet(size: int) -> nn.Module:
    """Three residual blocks without normalisation; the head starts at zero, as their last convolutions do."""
    head = Head(38)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(
        conv3(1, 16, first_stride(size), bias=True), nn.ReLU(),
        FixupBlock(16, 16, 1, 3), FixupBlock(16, 32, 2, 3), FixupBlock(32, 38, 2, 3), head,
    )  # fmt: skip


class EncoderLayer(nn.Module):
    """Self-attention and a dense network, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> the same shape."""
        batch, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Three encoder layers on 4 × 4 patches, mean over tokens at the end."""

    def __init__(self, size: int, width: int = 40, heads: int = 4, hidden: int = 96) -> None:
        super().__init__()
        patch = size // 4
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, hidden) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1, S, S) -> logits (B, 10)."""
        tokens = self.patches(x).flatten(2).mT + self.position
        return self.head(self.norm(self.layers(tokens)).mean(1))


NETS: dict[str, Callable[[int], nn.Module]] = {
    "CNN": cnn, "ResNet": resnet, "pre-ResNet": pre_resnet, "FixUp": fixup_resnet, "transformer": Transformer,
}  # fmt: skip
NORMALISED = ("ResNet", "pre-ResNet", "transformer", "U-Net")


def network(name: str, size: int, seed: int) -> nn.Module:
    """An untrained classifier."""
    with seeded(seed):
        return NETS[name](size)
