"""The six networks of the benchmarks, with fixed random weights and inputs.

Untrained, with non-trivial norm statistics and affine parameters; the construction order fixes the random draws, so a
change here changes the networks. C = 10 outputs unless said.

==== ============================================ ======= ============
name network                                      P       input
==== ============================================ ======= ============
a    MLP 1-50-50-1, tanh (C = 1)                  2 701   (1,)
b    MLP 784-512-512-10, ReLU                     669 706 (784,)
c    LeNet                                        61 706  (1, 28, 28)
d    ResNet-18 of width 16, BatchNorm             701 466 (3, 32, 32)
e    transformer of two blocks on 16 patches      45 010  (1, 28, 28)
f    GroupNorm U-Net, image to image (C = 784)    117 393 (1, 28, 28)
==== ============================================ ======= ============
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntkgp.evaluation.training import seeded


def mlp(sizes: list[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k in range(len(sizes) - 1):
        layers.append(nn.Linear(sizes[k], sizes[k + 1]))
        if k < len(sizes) - 2:
            layers.append(activation())
    return nn.Sequential(*layers)


def lenet() -> nn.Sequential:
    features = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()]
    head = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*features, nn.MaxPool2d(2), nn.Flatten(), *head)


class Residual(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; a strided block halves the image."""
        return torch.relu(self.main(x) + self.skip(x))


def resnet18(width: int = 16, num_classes: int = 10) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Residual(channels, out, stride), Residual(out, out, 1)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class Position(nn.Module):
    """A learned vector added to each token."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens with their positions."""
        return x + self.weight


class Encoder(nn.Module):
    """A pre-norm transformer block whose attention is written out."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.n1 = heads, nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.n2, self.f1, self.f2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # shape: (N, T, width)
        """Tokens after attention and the feed-forward part."""
        tokens, width = x.shape[1:]

        def split(z: Tensor) -> Tensor:
            return z.reshape(len(x), tokens, self.heads, -1).transpose(1, 2)

        z = self.n1(x)
        q, k, v = split(self.q(z)), split(self.k(z)), split(self.v(z))
        attention = torch.softmax(q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5, -1)
        x = x + self.o((attention @ v).transpose(1, 2).reshape(len(x), tokens, width))
        return x + self.f2(nn.functional.gelu(self.f1(self.n2(x))))


class TinyTransformer(nn.Module):
    """A classifier of 28×28 images cut into 16 patches of 7×7."""

    def __init__(self, width: int = 50, num_classes: int = 10) -> None:
        super().__init__()
        self.emb, self.pos = nn.Linear(49, width), Position(16, width)
        self.enc = nn.Sequential(Encoder(width, 5, 2 * width), Encoder(width, 5, 2 * width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, num_classes)."""
        x = x.reshape(-1, 4, 7, 4, 7).permute(0, 1, 3, 2, 4).reshape(-1, 16, 49)
        return self.head(self.norm(self.enc(self.pos(self.emb(x)))).mean(1))


def _double_convolution(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """Two 3×3 convolutions with GroupNorm and SiLU; the first one strides."""
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1),
        nn.GroupNorm(4, out),
        nn.SiLU(),
        nn.Conv2d(out, out, 3, 1, 1),
        nn.GroupNorm(4, out),
        nn.SiLU(),
    )


class UNet(nn.Module):
    """A U-Net on 28×28 images (28, 14, 7) with skip connections and transposed convolutions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w1, w2, w3 = width, 2 * width, 4 * width
        self.down1, self.down2 = _double_convolution(1, w1), _double_convolution(w1, w2, 2)
        self.bottom = _double_convolution(w2, w3, 2)
        self.up2, self.merge2 = nn.ConvTranspose2d(w3, w2, 2, 2), _double_convolution(w3, w2)
        self.up1, self.merge1 = nn.ConvTranspose2d(w2, w1, 2, 2), _double_convolution(w2, w1)
        self.out = nn.Conv2d(w1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # shape: (N, 1, 28, 28)
        """The image that belongs to each image."""
        fine = self.down1(x)
        middle = self.down2(fine)
        x = self.merge2(torch.cat([self.up2(self.bottom(middle)), middle], 1))
        return self.out(self.merge1(torch.cat([self.up1(x), fine], 1)))


@dataclass(frozen=True)
class Network:
    """A benchmarked network: what it is, how it is built, its input shape and the N that are measured."""

    title: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    samples: tuple[int, ...] = (64, 256, 1000)


NETS = {
    "a": Network("MLP 1-50-50-1", lambda: mlp([1, 50, 50, 1], nn.Tanh), (1,)),
    "b": Network("MLP 784-512-512-10", lambda: mlp([784, 512, 512, 10], nn.ReLU), (784,)),
    "c": Network("LeNet", lenet, (1, 28, 28)),
    "d": Network("ResNet-18, width 16", resnet18, (3, 32, 32)),
    "e": Network("transformer", TinyTransformer, (1, 28, 28)),
    "f": Network("U-Net, C = 784", UNet, (1, 28, 28), (1, 4, 8)),
}


def make(
    name: str, num_samples: int, dtype: torch.dtype = torch.float32, build: Callable[[], nn.Module] | None = None
) -> tuple[nn.Module, Tensor]:
    """A network of :data:`NETS` in evaluation mode, and its inputs.

    :param build: another constructor with the same inputs, in place of the one of `name`.
    :return: the network and ``(num_samples, *input_shape)`` inputs; the global random state is left as it was.
    """
    norms = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
    with seeded(0), torch.no_grad():
        net = (build or NETS[name].build)()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.7, 1.3)
            if isinstance(module, norms):
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, *NETS[name].input_shape, generator=generator, dtype=torch.float64)
    return net.to(dtype).eval(), x.to(dtype)
