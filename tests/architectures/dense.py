"""Fully connected networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.base import Case, N, case, pair, rows


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

    return case(15, Net, lambda: (rows(3)(), rows(4)()), [{"left.weight", "left.bias", "right.weight"}, *pair("mid")])


def dict_inputs() -> Case:
    """Features and a token id, concatenated before a norm."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.dense = nn.Embedding(7, 4), nn.Linear(3, 5)
            self.norm, self.mid = nn.LayerNorm(9), nn.Linear(9, 8)
            self.norm2, self.head = nn.BatchNorm1d(8), nn.Linear(8, 2)

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
        wrap(nn.Linear(3, 8)), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh(),
        nn.Linear(8, 3),
    )  # fmt: skip
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
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(),
            nn.Linear(8, 3),
        )  # fmt: skip
        net[0].bias.requires_grad_(False)
        return net

    return case(22, build, rows(3), [{"0.weight"}, *pair("3")])


BUILDERS = (
    mlp_tanh, mlp_relu, mlp_relu_no_bias, mlp_layer_norm, mlp_layer_norm_plain, mlp_layer_norm_no_affine_bias,
    mlp_batch_norm, mlp_rms_norm, mlp_hand_rms_norm, mlp_hand_layer_norm, mlp_relu_chain_layer_norm, mlp_dropout,
    mlp_bare_parameters, shared_layer, tuple_inputs, dict_inputs, cosine_classifier, weight_norm, spectral_norm,
    lora_before_layer_norm, frozen_bias_layer_norm, frozen_bias_batch_norm,
)  # fmt: skip
