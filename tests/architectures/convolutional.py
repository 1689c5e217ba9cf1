"""Convolutional networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.base import Case, case, pair, rows


def cnn_batch_norm() -> Case:
    """Convolution, BatchNorm, ReLU, pooling; three times."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 5, 3, padding=1), nn.AvgPool2d(2), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    return case(30, layers, rows(2, 8, 8), [*pair("0", "7"), {"4.weight"}])


def cnn_group_norm() -> Case:
    """Convolutions before GroupNorm, one of them after a max-pool and a ReLU that keep the degree."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.ReLU(),
        nn.GroupNorm(3, 6, affine=False), nn.Conv2d(6, 4, 1), nn.GroupNorm(1, 4), nn.GELU(), nn.Flatten(),
        nn.Linear(16, 2),
    )  # fmt: skip
    return case(31, layers, rows(1, 8, 8), pair("0", "3", "7"))


def cnn_instance_norm() -> Case:
    """InstanceNorm with affine parameters, without, and with running statistics."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1),
        nn.InstanceNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, bias=False),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return case(32, layers, rows(1, 6, 6), [*pair("0", "3"), {"6.weight"}])


class BasicBlock(nn.Module):
    """ResNet basic block."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


def resnet_batch_norm() -> Case:
    """Post-activation ResNet: every convolution is followed by its BatchNorm."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        BasicBlock(4, 4, 1), BasicBlock(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    names = ["0", "3.conv1", "3.conv2", "4.conv1", "4.conv2", "4.downsample.0"]
    return case(33, layers, rows(2, 6, 6), [{f"{name}.weight"} for name in names])


class PreActBlock(nn.Module):
    """Pre-activation block; the shortcut convolution reads the activated input."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width, out, 1, stride, bias=False) if stride > 1 or width != out else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(a))))
        return y + (x if self.shortcut is None else self.shortcut(a))


def preactivation_resnet() -> Case:
    """Convolutions that add into a residual stream scale jointly, per stream; those inside a block scale alone."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(2, 4, 3, padding=1), PreActBlock(4, 4, 1), PreActBlock(4, 4, 1), PreActBlock(4, 5, 2),
        PreActBlock(5, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    streams = [
        {"0.weight", "0.bias", "1.conv2.weight", "2.conv2.weight"},
        {"3.shortcut.weight", "3.conv2.weight", "4.conv2.weight"},
    ]
    return case(34, layers, rows(2, 6, 6), [*streams, *({f"{i}.conv1.weight"} for i in (1, 2, 3, 4))])


def fixup_resnet() -> Case:
    """Fixup: scalar biases and scales instead of normalisers, so none."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
            for name in ("bias1a", "bias1b", "bias2a", "bias2b", "scale"):
                setattr(self, name, nn.Parameter(torch.ones(1)))

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv1(x + self.bias1a) + self.bias1b)
            return F.relu(x + self.conv2(y + self.bias2a) * self.scale + self.bias2b)

    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), Block(4), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    return case(35, layers, rows(1, 5, 5), [])


def unet_group_norm() -> Case:
    """U-Net with image output; skips are normalised before they are concatenated, the up-convolution is not."""

    def block(width: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(2, out), nn.SiLU())

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2, self.middle = block(1, 4), block(4, 4), block(4, 6)
            self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
            self.up2, self.up1, self.out = block(8, 4), block(8, 4), nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.down1(x)
            b = self.down2(F.avg_pool2d(a, 2))
            c = self.middle(F.max_pool2d(b, 2))
            b = self.up2(torch.cat([self.up(c), b], 1))
            return self.out(self.up1(torch.cat([F.interpolate(b, scale_factor=2, mode="bilinear"), a], 1)))

    return case(36, UNet, rows(1, 8, 8), pair("down1.0", "down2.0", "middle.0", "up2.0", "up1.0"))


def conv_relu_conv_batch_norm() -> Case:
    """Both convolutions are scale-free: the second one's bias, which the first would have to scale, is subtracted."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
    return case(37, layers, rows(1, 4, 4), pair("0", "2"))


def conv_relu_conv_batch_norm_no_bias() -> Case:
    """The same without biases."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
    return case(38, layers, rows(1, 4, 4), [{"0.weight"}, {"2.weight"}])


def conv_relu_conv_group_norm() -> Case:
    """GroupNorm does not subtract a channel's bias: the first convolution stays behind."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
    return case(39, layers, rows(1, 4, 4), pair("2"))


def conv_transpose_batch_norm() -> Case:
    """Decoder with transposed convolutions and image output."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2)),
        nn.ConvTranspose2d(4, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 3, padding=1),
    )  # fmt: skip
    return case(40, layers, rows(3), [*pair("0", "4"), {"7.weight"}])


def depthwise_separable() -> Case:
    """MobileNet-like: depthwise and pointwise convolutions, each with its BatchNorm."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU6(),
        nn.Conv1d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.BatchNorm1d(6), nn.Hardswish(), nn.Conv1d(6, 4, 1), nn.BatchNorm1d(4), nn.ReLU6(), nn.Flatten(),
        nn.Linear(32, 3),
    )  # fmt: skip
    return case(41, layers, rows(2, 8), [*pair("0", "6"), {"3.weight"}])


def frozen_conv_batch_norm() -> Case:
    """A frozen convolution is no group; the ones behind it are."""

    def build() -> nn.Module:
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Flatten(), nn.Linear(16, 2),
        )  # fmt: skip
        net[0].requires_grad_(False)
        return net

    return case(42, build, rows(1, 6, 6), pair("3"))


def weight_standardisation() -> Case:
    """Standardised convolution weights are scale-free although the bias and the activation are not."""

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-14)
            return F.conv2d(x, w, self.bias, padding=1)

    layers = lambda: nn.Sequential(  # noqa: E731
        Conv(1, 4, 3), nn.Tanh(), Conv(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)
    )
    return case(43, layers, rows(1, 4, 4), [{"0.weight"}, {"2.weight"}])


def parallel_branches_group_norm() -> Case:
    """Branches that are concatenated (one through a pool, one written into a buffer) before one norm are one group."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 5, padding=2)
            self.norm, self.mid = nn.GroupNorm(2, 6), nn.Linear(96, 6)
            self.norm2, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x.new_zeros(len(x), 6, 4, 4)
            y[:, :2] = self.a(x)
            y[:, 2:4].add_(F.max_pool2d(self.b(x), 3, 1, 1))
            y[:, 4:].copy_(self.c(x)).mul_(0.5)
            y = self.norm(y).relu_().flatten(1)
            return self.head(self.norm2(self.mid(y)).tanh())

    joint = {f"{branch}.{kind}" for branch in "abc" for kind in ("weight", "bias")}
    return case(44, Net, rows(1, 4, 4), [joint, *pair("mid")])


BUILDERS = (
    cnn_batch_norm, cnn_group_norm, cnn_instance_norm, resnet_batch_norm, preactivation_resnet, fixup_resnet,
    unet_group_norm, conv_relu_conv_batch_norm, conv_relu_conv_batch_norm_no_bias, conv_relu_conv_group_norm,
    conv_transpose_batch_norm, depthwise_separable, frozen_conv_batch_norm, weight_standardisation,
    parallel_branches_group_norm,
)  # fmt: skip
