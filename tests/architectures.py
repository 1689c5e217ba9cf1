"""A zoo of small deep networks with their normalised parameter groups written down by hand.

Every builder returns a fresh ``Case``. Networks are float64, hold no zero bias and no unit norm weight, and are built
from their own seed without touching the global random state. ``CASES`` maps names to builders; the builders that need
``transformers`` are listed only where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = 6
DTYPE = torch.float64


@dataclass
class Case:
    """One network, ``N`` example rows, and the groups that the definition of a normalised set gives.

    ``tolerance`` is the relative error to which the invariance can hold in floating point: above 1e-9 only where the
    network itself carries an eps that is no argument of a normaliser, or a forced float32 section.
    """

    net: nn.Module
    example: Any
    groups: list[set[str]] = field(default_factory=list)
    tolerance: float = 1e-9

    def run(self, net: nn.Module | None = None) -> Tensor:
        """Output tensor of ``net`` (default: the case's own) on the example rows."""
        net = self.net if net is None else net
        if isinstance(self.example, dict):
            output = net(**self.example)
        elif isinstance(self.example, tuple):
            output = net(*self.example)
        else:
            output = net(self.example)
        return output if isinstance(output, Tensor) else output.logits


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def case(
    seed: int,
    build: Callable[[], nn.Module],
    example: Callable[[], Any],
    groups: list[set[str]],
    tolerance: float = 1e-9,
    scale_weights: float | None = None,
) -> Case:
    """Build under ``seed`` in float64 and randomise what initialisation leaves trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build().to(DTYPE)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if parameter.ndim <= 1 and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                elif parameter.ndim <= 1 or not parameter.any():
                    parameter.normal_(0.0, 0.5)
                elif scale_weights is not None:
                    parameter.normal_(0.0, scale_weights)
            for name, buffer in net.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0.0, 0.5)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
        return Case(net.eval(), example(), groups, tolerance)


def pair(*layers: str) -> list[set[str]]:
    """One group of weight and bias per layer."""
    return [{f"{layer}.weight", f"{layer}.bias"} for layer in layers]


def rows(*shape: int) -> Callable[[], Tensor]:
    """Standard-normal example rows."""
    return lambda: torch.randn(N, *shape, dtype=DTYPE)


def tokens(length: int = 5, vocabulary: int = 11) -> Callable[[], Tensor]:
    """Integer example rows."""
    return lambda: torch.randint(1, vocabulary, (N, length))


# ------------------------------------------------------------------------------------------------ fully connected


def mlp_tanh() -> Case:
    """tanh is not homogeneous: none."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)
    )
    return case(1, layers, rows(3), [])


def mlp_relu() -> Case:
    """ReLU is homogeneous but nothing divides the scale out again: none."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 2)
    )
    return case(2, layers, rows(3), [])


def mlp_relu_no_bias() -> Case:
    """Scaling one layer up and the next down is no scaling of one set: none."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)
    )
    return case(3, layers, rows(3), [])


def mlp_layer_norm() -> Case:
    """Each linear layer that feeds a LayerNorm, weight and bias together; the head is rest."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 9), nn.LayerNorm(9), nn.Tanh(),
        nn.Linear(9, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip
    return case(4, layers, rows(3), pair("0", "3", "6"))


def mlp_layer_norm_plain() -> Case:
    """LayerNorm without affine parameters, no biases before it."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8, bias=False), nn.LayerNorm(8, elementwise_affine=False), nn.Tanh(),
        nn.Linear(8, 8, bias=False), nn.LayerNorm(8, elementwise_affine=False), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip
    return case(5, layers, rows(3), [{"0.weight"}, {"3.weight"}])


def mlp_layer_norm_no_affine_bias() -> Case:
    """LayerNorm with a weight and no bias, GELU between: the layers before the norms."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), nn.LayerNorm(8, bias=False), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8, bias=False),
        nn.GELU(), nn.Linear(8, 2),
    )  # fmt: skip
    return case(6, layers, rows(3), pair("0", "3"))


def mlp_batch_norm() -> Case:
    """BatchNorm1d in evaluation mode counts as on the statistics of the batch."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(),
        nn.Linear(8, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    return case(7, layers, rows(3), [*pair("0", "6"), {"3.weight"}])


def mlp_rms_norm() -> Case:
    """torch's own RMSNorm."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), nn.RMSNorm(8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.RMSNorm(8, elementwise_affine=False),
        nn.Tanh(), nn.Linear(8, 8), nn.RMSNorm(8, eps=1e-6), nn.SiLU(), nn.Linear(8, 2),
    )  # fmt: skip
    return case(8, layers, rows(3), [*pair("0", "6"), {"3.weight"}])


class HandRMSNorm(nn.Module):
    """RMSNorm written out."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class HandLayerNorm(nn.Module):
    """LayerNorm written out, with the deviation plus eps as its denominator."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * (centred / (x.std(-1, keepdim=True) + self.eps)) + self.bias


def mlp_hand_rms_norm() -> Case:
    """Hand-written RMSNorm; its eps of 1e-6 stays, so the invariance holds to about that."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), HandRMSNorm(8, 1e-6), nn.Tanh(), nn.Linear(8, 8), HandRMSNorm(8, 1e-6), nn.Tanh(),
        nn.Linear(8, 3),
    )  # fmt: skip
    return case(9, layers, rows(3), pair("0", "3"), tolerance=1e-4)


def mlp_hand_layer_norm() -> Case:
    """Hand-written LayerNorm, eps small enough to be exact."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), HandLayerNorm(8, 1e-14), nn.Tanh(), nn.Linear(8, 8), HandLayerNorm(8, 1e-14), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip
    return case(10, layers, rows(3), pair("0", "3"))


def mlp_relu_chain_layer_norm() -> Case:
    """Homogeneous layers in a chain before one norm: each one alone can be scaled as long as no later bias is met."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.LeakyReLU(), nn.Linear(8, 8, bias=False),
        nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2),
    )  # fmt: skip
    return case(11, layers, rows(3), [*pair("0"), {"2.weight"}, {"4.weight"}])


def mlp_dropout() -> Case:
    """Dropout is the identity in evaluation mode."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.LayerNorm(8),
        nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3),
    )  # fmt: skip
    return case(12, layers, rows(3), pair("0", "5"))


def mlp_bare_parameters() -> Case:
    """No submodule but parameters held by the network itself."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.b1 = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8))
            self.w2, self.b2 = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
            self.w3, self.b3 = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            x = F.layer_norm(x @ self.w1 + self.b1, (8,)).tanh()
            x = F.layer_norm(torch.einsum("ni,ij->nj", x, self.w2).add_(self.b2), (8,)).tanh()
            return x @ self.w3 + self.b3

    return case(13, Net, rows(3), [{"w1", "b1"}, {"w2", "b2"}])


def shared_layer() -> Case:
    """One layer used twice, each time before a norm, is one group; the input layer feeds it un-normalised."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.shared, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(self.shared(self.input(x).tanh())).tanh()
            return self.head(self.norm2(self.shared(x)).tanh())

    return case(14, Net, rows(3), pair("shared"))


def tuple_inputs() -> Case:
    """Two inputs summed before a norm: both layers scale together."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.mid, self.head = (
                nn.Linear(3, 8), nn.Linear(4, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 2),
            )  # fmt: skip
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            x = self.norm1(self.left(a) + self.right(b)).tanh()
            return self.head(self.norm2(self.mid(x)).tanh())

    return case(
        15, Net, lambda: (rows(3)(), rows(4)()), [{"left.weight", "left.bias", "right.weight"}, *pair("mid")]
    )


def dict_inputs() -> Case:
    """Features and a token id, concatenated before a norm."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.dense = nn.Embedding(7, 4), nn.Linear(3, 5)
            self.norm, self.mid, self.norm2, self.head = nn.LayerNorm(9), nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, features: Tensor, kind: Tensor) -> Tensor:
            x = self.norm(torch.cat([self.dense(features), self.embed(kind)], -1)).tanh()
            return self.head(self.norm2(self.mid(x)).relu())

    example = lambda: {"features": rows(3)(), "kind": torch.randint(0, 7, (N,))}  # noqa: E731
    return case(16, Net, example, [{"dense.weight", "dense.bias", "embed.weight"}, *pair("mid")])


def cosine_classifier() -> Case:
    """F.normalize on features and on class weights."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
            self.weight = nn.Parameter(torch.randn(4, 6))
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * F.normalize(self.body(x), dim=-1) @ F.normalize(self.weight, dim=-1).T

    return case(17, Net, rows(3), [*pair("body.4"), {"weight"}])


def weight_norm() -> Case:
    """Weight normalisation makes the direction v of each layer scale-free; its length g and bias are not."""
    wrap = nn.utils.parametrizations.weight_norm
    layers = lambda: nn.Sequential(  # noqa: E731
        wrap(nn.Linear(3, 8)), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)
    )
    return case(18, layers, rows(3), [{f"{i}.parametrizations.weight.original1"} for i in (0, 2, 4)])


def spectral_norm() -> Case:
    """Division by the spectral norm (its vectors are frozen in evaluation mode) frees the weight, not the bias."""
    wrap = nn.utils.parametrizations.spectral_norm
    layers = lambda: nn.Sequential(  # noqa: E731
        wrap(nn.Linear(3, 8)), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
    )
    return case(19, layers, rows(3), [{f"{i}.parametrizations.weight.original"} for i in (0, 2)])


def lora_before_layer_norm() -> Case:
    """An adapter on a frozen layer cannot scale the sum that enters the norm; the next layer is free."""

    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 8).requires_grad_(False)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.5 * self.up(self.down(x))

    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(3, 8), nn.Tanh(), Lora(), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(),
        nn.Linear(8, 3),
    )  # fmt: skip
    return case(20, layers, rows(3), pair("5"))


def frozen_bias_layer_norm() -> Case:
    """A frozen bias before a LayerNorm holds its weight back."""

    def build() -> nn.Module:
        net = nn.Sequential(
            nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)
        )
        net[0].bias.requires_grad_(False)
        return net

    return case(21, build, rows(3), pair("3"))


def frozen_bias_batch_norm() -> Case:
    """BatchNorm subtracts a bias again, so a frozen one does not hold its weight back."""

    def build() -> nn.Module:
        net = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
        )
        net[0].bias.requires_grad_(False)
        return net

    return case(22, build, rows(3), [{"0.weight"}, *pair("3")])


# ------------------------------------------------------------------------------------------------- convolutional


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
        nn.GroupNorm(3, 6, affine=False), nn.Conv2d(6, 4, 1), nn.GroupNorm(1, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 2),
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
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), Block(4), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
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
        nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU6(), nn.Conv1d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.BatchNorm1d(6), nn.Hardswish(), nn.Conv1d(6, 4, 1), nn.BatchNorm1d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(32, 3),
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
            self.norm, self.mid, self.norm2, self.head = nn.GroupNorm(2, 6), nn.Linear(96, 6), nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x.new_zeros(len(x), 6, 4, 4)
            y[:, :2] = self.a(x)
            y[:, 2:4].add_(F.max_pool2d(self.b(x), 3, 1, 1))
            y[:, 4:].copy_(self.c(x)).mul_(0.5)
            y = self.norm(y).relu_().flatten(1)
            return self.head(self.norm2(self.mid(y)).tanh())

    joint = {f"{branch}.{kind}" for branch in "abc" for kind in ("weight", "bias")}
    return case(44, Net, rows(1, 4, 4), [joint, *pair("mid")])


# -------------------------------------------------------------------------------------- transformers and recurrent


class Attention(nn.Module):
    """Multi-head self-attention with separate projections, optionally with normalised queries and keys."""

    def __init__(self, width: int, heads: int = 2, qk_norm: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))
        size = width // heads
        self.q_norm, self.k_norm = (nn.LayerNorm(size), nn.RMSNorm(size)) if qk_norm else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.o(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TokenNet(nn.Module):
    """Embedding, optional positions, body, mean over the sequence, head."""

    def __init__(self, width: int, body: nn.Module, positions: bool = True, length: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.position = nn.Parameter(torch.randn(length, width)) if positions else None
        self.body, self.head = body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h if self.position is None else h + self.position
        return self.head(self.body(h).mean(1))


def transformer_pre_norm() -> Case:
    """Embedding, positions and every projection that adds into the residual stream, biases included, are one group."""

    def build() -> nn.Module:
        blocks = [
            block
            for _ in range(2)
            for block in (
                Residual(nn.LayerNorm(8), Attention(8)),
                Residual(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
            )
        ]
        return TokenNet(8, nn.Sequential(*blocks, nn.LayerNorm(8)))

    stream = {"embed.weight", "position"}
    stream |= {f"body.{i}.body.1.o.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    stream |= {f"body.{i}.body.3.{kind}" for i in (1, 3) for kind in ("weight", "bias")}
    return case(50, build, tokens(), [stream])


def transformer_encoder_pre_norm() -> Case:
    """torch's own encoder layers, norm first, fused input projection."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "relu", batch_first=True, norm_first=True)
        return TokenNet(8, nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False))

    stream = {"embed.weight", "position"}
    for i in range(2):
        for part in ("self_attn.out_proj", "linear2"):
            stream |= {f"body.layers.{i}.{part}.{kind}" for kind in ("weight", "bias")}
    return case(51, build, tokens(), [stream])


def transformer_post_norm() -> Case:
    """Behind a post-norm the stream carries the norm's own affine parameters: none."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True)
        return TokenNet(8, nn.TransformerEncoder(layer, 2))

    return case(52, build, tokens(), [])


def transformer_post_norm_embedding() -> Case:
    """The same with a LayerNorm on the embeddings: these are a group."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True)
        return TokenNet(8, nn.Sequential(nn.LayerNorm(8), nn.TransformerEncoder(layer, 2)))

    return case(53, build, tokens(), [{"embed.weight", "position"}])


def transformer_rms_swiglu() -> Case:
    """LLaMA-like: RMSNorm, SwiGLU, no biases. Values and up-projections lose the tie to the outputs of their blocks."""

    def build() -> nn.Module:
        blocks = [
            block
            for _ in range(2)
            for block in (
                Residual(nn.RMSNorm(8), Attention(8, bias=False)),
                Residual(HandRMSNorm(8, 1e-14), SwiGLU(8, 12)),
            )
        ]
        return TokenNet(8, nn.Sequential(*blocks, nn.RMSNorm(8)), positions=False)

    stream = {"embed.weight"} | {f"body.{i}.body.1.o.weight" for i in (0, 2)}
    stream |= {f"body.{i}.body.1.down.weight" for i in (1, 3)}
    return case(54, build, tokens(), [stream])


def transformer_qk_norm() -> Case:
    """Normalised queries and keys are groups of their own beside the stream."""

    def build() -> nn.Module:
        blocks = [Residual(nn.LayerNorm(8), Attention(8, qk_norm=True)) for _ in range(2)]
        return TokenNet(8, nn.Sequential(*blocks, nn.LayerNorm(8)))

    stream = {"embed.weight", "position"}
    stream |= {f"body.{i}.body.1.o.{kind}" for i in range(2) for kind in ("weight", "bias")}
    inner = pair(*(f"body.{i}.body.1.{part}" for i in range(2) for part in "qk"))
    return case(55, build, tokens(), [stream, *inner])


def transformer_values_group() -> Case:
    """Attention whose summed values enter a norm directly: the value projection takes the o-projection's place."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
            self.attention, self.norm2 = Attention(8), nn.LayerNorm(8)
            self.attention.o = nn.Identity()
            self.mid, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm2(self.attention(self.norm(self.embed(x))))
            return self.head(self.mid(x).tanh().amax(1))

    return case(56, Net, tokens(), [{"embed.weight"}, *pair("attention.v")])


def positions_layer_norm() -> Case:
    """Patch projection plus a bare positional parameter and a class token before a LayerNorm."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.position = nn.Conv2d(1, 6, 2, stride=2), nn.Parameter(torch.randn(1, 5, 6))
            self.token = nn.Parameter(torch.zeros(1, 1, 6))
            self.norm, self.mid, self.norm2, self.head = nn.LayerNorm(6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.patch(x).flatten(2).transpose(1, 2)
            h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.position
            return self.head(self.norm2(self.mid(self.norm(h))).tanh()[:, 0])

    return case(57, Net, rows(1, 4, 4), [{"patch.weight", "patch.bias", "position", "token"}, *pair("mid")])


def layer_scale_stream() -> Case:
    """Layer scale: the branch's weight and bias join the stream, its scale stays in the rest."""

    class Scale(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return self.gamma * x

    def build() -> nn.Module:
        blocks = [
            Residual(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), Scale(8)) for _ in range(2)
        ]
        return nn.Sequential(nn.Linear(3, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 2))

    stream = {f"{name}.{kind}" for name in ("0", "1.body.3", "2.body.3") for kind in ("weight", "bias")}
    return case(58, build, rows(3), [stream])


class Recurrent(nn.Module):
    """Embedding, optional norm, recurrent net, optional norm, head."""

    def __init__(self, kind: type[nn.RNNBase], before: bool, after: bool) -> None:
        super().__init__()
        self.embed, self.before = nn.Embedding(11, 6), nn.LayerNorm(6) if before else nn.Identity()
        self.rnn = kind(6, 7, num_layers=2, batch_first=True)
        self.after, self.head = nn.LayerNorm(7) if after else nn.Identity(), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.rnn(self.before(self.embed(x)))[0][:, -1]))


def gru() -> Case:
    """Gates are not homogeneous: none."""
    return case(60, lambda: Recurrent(nn.GRU, False, False), tokens(), [])


def lstm() -> Case:
    """Gates are not homogeneous: none."""
    return case(61, lambda: Recurrent(nn.LSTM, False, False), tokens(), [])


def lstm_layer_norm() -> Case:
    """The norm reads a bounded state, not a linear layer: none."""
    return case(62, lambda: Recurrent(nn.LSTM, False, True), tokens(), [])


def lstm_normalised_embedding() -> Case:
    """Only the embedding enters a norm."""
    return case(63, lambda: Recurrent(nn.LSTM, True, False), tokens(), [{"embed.weight"}])


def tied_head() -> Case:
    """A tied embedding is scale-free in front of the norm but scales the logits as the head; the layer between is free."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
            self.mid, self.norm2, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.embed(x)).tanh().mean(1)
            return self.head(self.norm2(self.mid(h)).tanh())

    return case(64, Net, tokens(), pair("mid"))


# ----------------------------------------------------------------------------- random-initialised `transformers`


def padded_tokens(length: int = 6, vocabulary: int = 20) -> Callable[[], dict[str, Tensor]]:
    """Token ids (pad id 0) and their attention mask, with rows of several lengths."""

    def build() -> dict[str, Tensor]:
        ids = torch.randint(1, vocabulary, (N, length))
        mask = (torch.arange(length) < torch.tensor([6, 4, 5, 6, 3, 6])[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask}

    return build


def hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A random-initialised model of ``transformers``."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(num_labels=3, **options))

    return build


SMALL = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "pad_token_id": 0,
}  # fmt: skip


def hf_bert() -> Case:
    """Post-norm: the three embeddings in front of the first LayerNorm."""
    build = hf("BertForSequenceClassification", "BertConfig", max_position_embeddings=8, **SMALL)
    group = {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    return case(70, build, padded_tokens(), [group], scale_weights=0.3)


def hf_gpt2() -> Case:
    """Pre-norm: one residual stream."""
    build = hf(
        "GPT2ForSequenceClassification", "GPT2Config", vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    stream = {"transformer.wte.weight", "transformer.wpe.weight"}
    for i in range(2):
        stream |= {f"transformer.h.{i}.{part}.c_proj.{kind}" for part in ("attn", "mlp") for kind in ("weight", "bias")}
    return case(71, build, padded_tokens(), [stream], scale_weights=0.3)


def hf_gpt2_language_model() -> Case:
    """The token embedding is the head as well, so the whole stream is held back: none."""
    build = hf(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return case(72, build, padded_tokens(), [], scale_weights=0.3)


def hf_llama() -> Case:
    """RMSNorm pre-norm stream; its norm runs in float32, which limits the numerical check."""
    build = hf(
        "LlamaForSequenceClassification", "LlamaConfig", num_key_value_heads=1, max_position_embeddings=8,
        rms_norm_eps=1e-9, **SMALL,
    )  # fmt: skip
    stream = {"model.embed_tokens.weight"}
    for i in range(2):
        stream |= {f"model.layers.{i}.{part}.weight" for part in ("self_attn.o_proj", "mlp.down_proj")}
    return case(73, build, padded_tokens(), [stream], tolerance=1e-5, scale_weights=0.3)


def hf_distilbert() -> Case:
    """Post-norm: the two embeddings."""
    build = hf(
        "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=20, dim=16, n_layers=2, n_heads=2,
        hidden_dim=24, max_position_embeddings=8, pad_token_id=0,
    )  # fmt: skip
    group = {f"distilbert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")}
    return case(74, build, padded_tokens(), [group], scale_weights=0.3)


def hf_vit() -> Case:
    """Patches, class token, positions and the outputs of every block."""
    build = hf(
        "ViTForImageClassification", "ViTConfig", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, image_size=8, patch_size=4, num_channels=1,
    )  # fmt: skip
    # transformers 5 and 4 name the layers differently.
    blocks = [f"vit.layers.{i}.{part}" for i in range(2) for part in ("attention.o_proj", "mlp.fc2")]
    blocks += [f"vit.encoder.layer.{i}.{part}.dense" for i in range(2) for part in ("attention.output", "output")]
    stream = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    stream = stream.union(*pair("vit.embeddings.patch_embeddings.projection", *blocks))
    example = lambda: {"pixel_values": rows(1, 8, 8)()}  # noqa: E731
    vit = case(75, build, example, [stream], scale_weights=0.3)
    vit.groups[0] &= {name for name, _ in vit.net.named_parameters()}
    return vit


def hf_convnext() -> Case:
    """Patches and each depthwise convolution; their biases bar the residual streams that run through them."""
    build = hf(
        "ConvNextForImageClassification", "ConvNextConfig", num_channels=1, patch_size=2, num_stages=2,
        hidden_sizes=[6, 8], depths=[1, 2], image_size=8, layer_scale_init_value=0.5,
    )  # fmt: skip
    names = [f"convnext.encoder.stages.{s}.layers.{i}.dwconv" for s, i in ((0, 0), (1, 0), (1, 1))]
    example = lambda: {"pixel_values": rows(1, 8, 8)()}  # noqa: E731
    return case(76, build, example, pair("convnext.embeddings.patch_embeddings", *names), scale_weights=0.3)


def hf_resnet() -> Case:
    """Every convolution has its BatchNorm."""
    build = hf(
        "ResNetForImageClassification", "ResNetConfig", num_channels=1, embedding_size=4, hidden_sizes=[4, 6],
        depths=[1, 2], layer_type="basic",
    )  # fmt: skip
    stages = "resnet.encoder.stages"
    names = ["resnet.embedder.embedder", f"{stages}.1.layers.0.shortcut"]
    names += [f"{stages}.{s}.layers.{i}.layer.{j}" for s, i in ((0, 0), (1, 0), (1, 1)) for j in (0, 1)]
    example = lambda: {"pixel_values": rows(1, 16, 16)()}  # noqa: E731
    return case(77, build, example, [{f"{name}.convolution.weight"} for name in names], scale_weights=0.3)


def hf_roformer() -> Case:
    """Post-norm with rotary positions: the embeddings in front of the first LayerNorm."""
    build = hf("RoFormerForSequenceClassification", "RoFormerConfig", max_position_embeddings=8, **SMALL)
    group = {f"roformer.embeddings.{kind}_embeddings.weight" for kind in ("word", "token_type")}
    return case(78, build, padded_tokens(), [group], scale_weights=0.3)


_TORCH_ONLY: list[Callable[[], Case]] = [
    mlp_tanh, mlp_relu, mlp_relu_no_bias, mlp_layer_norm, mlp_layer_norm_plain, mlp_layer_norm_no_affine_bias,
    mlp_batch_norm, mlp_rms_norm, mlp_hand_rms_norm, mlp_hand_layer_norm, mlp_relu_chain_layer_norm, mlp_dropout,
    mlp_bare_parameters, shared_layer, tuple_inputs, dict_inputs, cosine_classifier, weight_norm, spectral_norm,
    lora_before_layer_norm, frozen_bias_layer_norm, frozen_bias_batch_norm,
    cnn_batch_norm, cnn_group_norm, cnn_instance_norm, resnet_batch_norm, preactivation_resnet, fixup_resnet,
    unet_group_norm, conv_relu_conv_batch_norm, conv_relu_conv_batch_norm_no_bias, conv_relu_conv_group_norm,
    conv_transpose_batch_norm, depthwise_separable, frozen_conv_batch_norm, weight_standardisation,
    parallel_branches_group_norm,
    transformer_pre_norm, transformer_encoder_pre_norm, transformer_post_norm, transformer_post_norm_embedding,
    transformer_rms_swiglu, transformer_qk_norm, transformer_values_group, positions_layer_norm, layer_scale_stream,
    gru, lstm, lstm_layer_norm, lstm_normalised_embedding, tied_head,
]  # fmt: skip
_TRANSFORMERS: list[Callable[[], Case]] = [
    hf_bert, hf_gpt2, hf_gpt2_language_model, hf_llama, hf_distilbert, hf_vit, hf_convnext, hf_resnet, hf_roformer,
]  # fmt: skip

CASES: dict[str, Callable[[], Case]] = {builder.__name__: builder for builder in _TORCH_ONLY}
if importlib.util.find_spec("transformers") is not None:
    CASES |= {builder.__name__: builder for builder in _TRANSFORMERS}
