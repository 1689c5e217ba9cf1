"""Random networks, drawn from a number: layers, inputs, dtype, frozen and shared parameters, groups."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import ntkgp
from tests import reference as ref

MAX_DEPTH = 8
SMOOTH = (nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid)
KINKED = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Hardtanh)
INPUTS = ("vector", "image", "sequence", "tokens", "dict", "tuple")


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Affine(nn.Module):
    """Bare parameters: x · scale + shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Twice(nn.Module):
    """One module called two times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class TiedTranspose(nn.Module):
    """An autoencoder that reads its weight again, transposed, outside of any module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight.T)


class Squared(nn.Module):
    """Bilinear(x, x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pair = nn.Bilinear(width, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(torch.tanh(x), torch.sigmoid(x))


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Over(nn.Module):
    """A module that wants channels first, on a sequence (B, T, W)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.mT).mT


class First(nn.Module):
    """The sequence that a recurrent layer returns beside its state."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


class Pool(nn.Module):
    """Mean, last or all positions of a sequence."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) if self.how == "mean" else x[:, -1] if self.how == "last" else x.flatten(1)


class Drawn(nn.Module):
    """Stem, body and head; inputs of every kind, outputs of several."""

    def __init__(self, kind: str, stem: nn.Module, body: list[nn.Module], head: nn.Module, form: str) -> None:
        super().__init__()
        self.kind, self.form, self.stem, self.body, self.head = kind, form, stem, nn.ModuleList(body), head

    def forward(self, x: Any = None, side: Any = None, ids: Any = None) -> Any:
        if self.kind == "dict":
            h = self.stem(ids).mean(1) + side
        elif self.kind == "tuple":
            h = self.stem(x) + side
        else:
            h = self.stem(x)
        for layer in self.body:
            h = layer(h)
        out = self.head(h)
        if self.form == "scalar":
            return out.squeeze(-1)
        if self.form == "event":
            return out.unflatten(-1, (2, -1))
        return SimpleNamespace(logits=out) if self.form == "logits" else out


@dataclass
class Case:
    """A network with everything that a call on it needs."""

    number: int
    net: nn.Module
    sample: Callable[[int, int], Any]
    groups: Any
    description: str
    dtype: torch.dtype

    @property
    def has_kinks(self) -> bool:
        """Whether rounding may switch a derivative."""
        return any(isinstance(m, (*KINKED, nn.MaxPool2d, nn.PReLU)) for m in self.net.modules())


def _vector_layer(rng: random.Random, width: int) -> nn.Module:
    return rng.choice(
        [
            lambda: nn.Linear(width, width),
            lambda: nn.Linear(width, width, bias=False),
            lambda: nn.LayerNorm(width),
            lambda: nn.LayerNorm(width, elementwise_affine=False),
            lambda: nn.RMSNorm(width),
            lambda: nn.BatchNorm1d(width),
            lambda: nn.BatchNorm1d(width, affine=False),
            lambda: rng.choice(SMOOTH)(),
            lambda: rng.choice(SMOOTH)(),
            lambda: rng.choice(KINKED)(),
            lambda: nn.PReLU(width),
            lambda: nn.Dropout(0.3),
            lambda: Affine(width),
            lambda: Twice(width),
            lambda: TiedTranspose(width),
            lambda: Squared(width),
            lambda: parametrizations.weight_norm(nn.Linear(width, width)),
            lambda: Residual(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh())),
            lambda: nn.Sequential(nn.Linear(width, 2 * width), nn.GLU()),
        ]
    )()


def _image_layer(rng: random.Random, c: int, size: int) -> nn.Module:
    return rng.choice(
        [
            lambda: nn.Conv2d(c, c, 3, padding=1),
            lambda: nn.Conv2d(c, c, 1, bias=False),
            lambda: nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=2),
            lambda: nn.Conv2d(c, c, 3, padding=1, padding_mode="circular"),
            lambda: nn.ConvTranspose2d(c, c, 3, padding=1),
            lambda: nn.BatchNorm2d(c),
            lambda: nn.GroupNorm(2, c),
            lambda: nn.InstanceNorm2d(c, affine=rng.random() < 0.5),
            lambda: nn.LayerNorm([c, size, size]),
            lambda: nn.MaxPool2d(3, 1, 1),
            lambda: nn.AvgPool2d(3, 1, 1),
            lambda: nn.Dropout2d(0.3),
            lambda: rng.choice(SMOOTH)(),
            lambda: rng.choice(KINKED)(),
            lambda: Residual(nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.SiLU())),
        ]
    )()


def _sequence_layer(rng: random.Random, width: int) -> nn.Module:
    return rng.choice(
        [
            lambda: nn.Linear(width, width),
            lambda: nn.LayerNorm(width),
            lambda: nn.RMSNorm(width),
            lambda: SelfAttention(width),
            lambda: Residual(SelfAttention(width)),
            lambda: nn.TransformerEncoderLayer(width, 2, 6, 0.1, "gelu", batch_first=True, norm_first=True),
            lambda: First(nn.GRU(width, width, batch_first=True)),
            lambda: First(nn.LSTM(width, width, batch_first=True)),
            lambda: Over(nn.Conv1d(width, width, 3, padding=1)),
            lambda: Over(nn.BatchNorm1d(width)),
            lambda: rng.choice(SMOOTH)(),
            lambda: rng.choice(KINKED)(),
            lambda: Affine(width),
            lambda: Twice(width),
        ]
    )()


def _parts(rng: random.Random, kind: str, depth: int, outputs: int) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    width = rng.choice([2, 4])
    if kind == "image":
        size = rng.choice([3, 4])
        body = [_image_layer(rng, width, size) for _ in range(depth)]
        if rng.random() < 0.5:
            head: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(width * size * size, outputs))
        else:
            head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))
        return nn.Conv2d(2, width, 3, padding=1 if size == 4 else 0), body, head
    if kind in ("sequence", "tokens"):
        stem = nn.Linear(3, width) if kind == "sequence" else nn.Embedding(7, width, padding_idx=rng.choice([None, 0]))
        body = [_sequence_layer(rng, width) for _ in range(depth)]
        how = rng.choice(["mean", "last", "flat"])
        return stem, body, nn.Sequential(Pool(how), nn.Linear(width * (4 if how == "flat" else 1), outputs))
    stem = nn.Embedding(5, width) if kind == "dict" else nn.Linear(3, width)
    return stem, [_vector_layer(rng, width) for _ in range(depth)], nn.Linear(width, outputs)


def _sampler(kind: str, width: int, dtype: torch.dtype, image: int) -> Callable[[int, int], Any]:
    def sample(n: int, seed: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        noise = lambda *shape: torch.randn(n, *shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
        if kind == "vector":
            return noise(3)
        if kind == "image":
            return noise(2, image, image)
        if kind == "sequence":
            return noise(4, 3)
        if kind == "tokens":
            return torch.randint(0, 7, (n, 4), generator=g)
        if kind == "dict":
            return {"ids": torch.randint(0, 5, (n, 2), generator=g), "side": noise(width)}
        return noise(3), noise(width)

    return sample


def _randomise(net: nn.Module) -> None:
    """No zero bias, no unit norm weight, running statistics of some training."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim <= 1:
                p.add_(0.3 * torch.randn_like(p))
            elif not name.endswith(("weight_ih_l0", "weight_hh_l0")):
                p.mul_(1.5)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.5)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


def _freeze(rng: random.Random, net: nn.Module) -> str:
    parameters = list(net.parameters())
    if rng.random() < 0.6 or len(parameters) < 2:
        return ""
    frozen = rng.sample(range(len(parameters)), rng.randrange(1, len(parameters)))
    for i in frozen:
        parameters[i].requires_grad_(False)
    return f" frozen={sorted(frozen)}"


def _tie(rng: random.Random, net: Drawn) -> str:
    """Two Linear layers of one shape share a weight."""
    linear = [m for m in net.body if type(m) is nn.Linear]
    if rng.random() < 0.5 or len(linear) < 2:
        return ""
    linear[1].weight = linear[0].weight
    return " tied"


def _groups(rng: random.Random, net: nn.Module) -> Any:
    kind = rng.choice(["normalization", "layer", "tensor", "single", "custom"])
    if kind != "custom":
        return kind
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    count = rng.randrange(1, min(3, len(names)) + 1)
    rng.shuffle(names)
    return ntkgp.ParameterGroups({f"g{i}": names[i::count] for i in range(count)})


def draw(number: int, *, classification: bool | None = None) -> Case:
    """Network `number`; the global random state is left as it was."""
    rng = random.Random(f"network {number}")
    kind, depth = rng.choice(INPUTS), rng.randrange(1, MAX_DEPTH + 1)
    outputs = rng.choice([1, 1, 2, 3, 4])
    shaped = "scalar" if outputs == 1 else "event" if outputs % 2 == 0 else "plain"
    form = rng.choice(["plain", "plain", "logits", shaped])
    dtype = rng.choice([torch.float64, torch.float64, torch.float32])
    with ref.seeded(number):
        stem, body, head = _parts(rng, kind, depth, outputs)
        net = Drawn(kind, stem, body, head, form)
        _randomise(net)
        tied = _tie(rng, net)
    frozen = _freeze(rng, net)
    net = net.to(dtype)
    width = stem.weight.shape[-1 if isinstance(stem, nn.Embedding) else 0]
    image = 0
    if kind == "image":
        image = 4 if stem.padding == (1, 1) else 5
    net.train(rng.random() < 0.3)
    text = f"{kind} {[type(m).__name__ for m in body]} -> {outputs} {form} {dtype}{tied}{frozen}"
    return Case(number, net, _sampler(kind, width, dtype, image), _groups(rng, net), text, dtype)


def clone(case: Case) -> nn.Module:
    """The network itself, for what must not touch the case's own."""
    return copy.deepcopy(case.net)
