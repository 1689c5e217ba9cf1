"""Transformers and recurrent networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.base import Case, Residual, case, pair, rows, tokens
from tests.architectures.dense import HandRMSNorm


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
            self.norm, self.mid = nn.LayerNorm(6), nn.Linear(6, 8)
            self.norm2, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

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
        blocks = [Residual(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), Scale(8)) for _ in range(2)]
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
    """A tied embedding is scale-free in front of the norm but scales the logits as the head; the middle one is free."""

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


BUILDERS = (
    transformer_pre_norm, transformer_encoder_pre_norm, transformer_post_norm, transformer_post_norm_embedding,
    transformer_rms_swiglu, transformer_qk_norm, transformer_values_group, positions_layer_norm, layer_scale_stream,
    gru, lstm, lstm_layer_norm, lstm_normalised_embedding, tied_head,
)  # fmt: skip
