"""Multi-head attention written out, so that its projections are layers of their own."""

from __future__ import annotations

from functools import partial
from math import inf, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkgp.linearization.rules.registry import register_explicit, register_rule
from ntkgp.linearization.rules.terms import Outer, Rows, Term


class SlicedLinear(nn.Module):
    """y = x W[rows]ᵀ + b[bias_rows], on the parameters themselves.

    :param weight: shared, not copied.
    :param bias: shared, not copied; None for no bias.
    :param rows: which rows of the weight.
    :param bias_rows: which entries of the bias.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, rows: slice, bias_rows: slice) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.rows = rows
        self.bias_rows = bias_rows

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(x, self.weight[self.rows], None if self.bias is None else self.bias[self.bias_rows])


def _embed(g: Tensor, start: int, total: int, dim: int) -> Tensor:
    """Entries ``start``, ... of ``total`` along a dimension; the others are zero."""
    out = g.movedim(dim, -1)
    return F.pad(out, (start, total - start - out.shape[-1])).movedim(-1, dim)


@register_rule(SlicedLinear)
class SlicedLinearRule:
    """J_W = Σ_t g_t ⊗ x_t, J_b = Σ_t g_t in the rows that are used, 0 in the others."""

    def inputs(self, layer: SlicedLinear, x: Tensor) -> Tensor:
        """The inputs of the layer."""
        return x

    def terms(self, layer: SlicedLinear, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
        """Positions are the dimensions between the rows and the features."""
        n, k = cotangents.shape[:2]
        total, width = layer.weight.shape
        a = inputs.reshape(n, 1, -1, width).mT
        g = cotangents.reshape(n, k, 1, -1, cotangents.shape[-1]).mT
        if g.shape[-2] == total:
            found: dict[str, Term] = {"weight": Outer(a, g)}
        else:
            widen = partial(_embed, start=layer.rows.start, total=total, dim=2)
            found = {"weight": Outer(a, g, unfold_cotangents=widen)}
        if layer.bias is not None:
            sums = g.sum(-1).flatten(2)
            found["bias"] = Rows(_embed(sums, start=layer.bias_rows.start, total=len(layer.bias), dim=2))
        return found


class Projection(nn.Linear):
    """y = x Wᵀ + b on the parameters themselves.

    :param weight: shared, not copied.
    :param bias: shared, not copied; None for no bias.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would draw random numbers for parameters of its own
        self.out_features, self.in_features = weight.shape
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)


class ExplicitAttention(nn.Module):
    """``torch.nn.MultiheadAttention`` in evaluation mode: same call, same results, same parameters.

    Its projections are submodules, called with the batch first. The packed projection is one layer where query, key
    and value are one tensor; otherwise parts of the packed weight are used, each by a layer of its own.

    :param attention: the module whose parameters are shared.
    """

    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.batch_first = attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        self.packed = attention.in_proj_weight is not None
        e, bias = attention.embed_dim, attention.in_proj_bias
        query, key, value, key_value = (slice(0, e), slice(e, 2 * e), slice(2 * e, 3 * e), slice(e, 3 * e))
        if self.packed:
            weight = attention.in_proj_weight
            self.in_proj = Projection(weight, bias)
            self.kv_proj = SlicedLinear(weight, bias, key_value, key_value)
            parts = [(weight, query), (weight, key), (weight, value)]
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            parts = [(weight, slice(0, e)) for weight in weights]
        self.q_proj, self.k_proj, self.v_proj = (
            SlicedLinear(weight, bias, rows, bias_rows)
            for (weight, rows), bias_rows in zip(parts, (query, key, value), strict=True)
        )
        # Not the module's own layer: its calls would be seen twice.
        self.out_proj = Projection(attention.out_proj.weight, attention.out_proj.bias)  # type: ignore[arg-type]
        self.register_parameter("bias_k", attention.bias_k)  # type: ignore[arg-type]
        self.register_parameter("bias_v", attention.bias_v)  # type: ignore[arg-type]
        self.eval()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``torch.nn.MultiheadAttention.forward``."""
        batched = query.dim() == 3
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value, batched)  # shape: (N, L or S, E)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (N, heads, L, E/heads)
        # Without weights torch takes the caller's word that the mask is causal, and lets no position attend to nothing.
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = _causal(q, k) if hinted else self._mask(attn_mask, key_padding_mask, q, k)
        scores = (q / sqrt(q.shape[-1])) @ k.mT
        if mask is None:
            weights = scores.softmax(-1)
        elif need_weights:
            weights = (scores + mask).softmax(-1)
        else:
            idle = (mask == -inf).all(-1, keepdim=True)
            weights = (scores + mask.masked_fill(idle, 0.0)).softmax(-1).masked_fill(idle, 0.0)
        out = self.out_proj((weights @ v).transpose(1, 2).flatten(2))  # shape: (N, L, E)
        if not batched:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights[0]

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Projected query, key and value, batch first."""

        def first(x: Tensor) -> Tensor:
            return x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)

        if self.packed and query is key and key is value:
            q, k, v = self.in_proj(first(query)).chunk(3, dim=-1)
        elif self.packed and key is value:
            q = self.q_proj(first(query))
            k, v = self.kv_proj(first(key)).chunk(2, dim=-1)
        else:
            q, k, v = self.q_proj(first(query)), self.k_proj(first(key)), self.v_proj(first(value))
        return q, k, v

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores, broadcast to (N, heads, L, S); positions that are attached are not masked."""
        found = []
        if attention is not None:
            found.append(attention.unflatten(0, (-1, self.num_heads)) if attention.dim() == 3 else attention)
        if padding is not None:
            found.append(padding[:, None, None])
        total = None
        for mask in found:
            added = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -inf) if mask.dtype == torch.bool else mask
            added = F.pad(added, (0, k.shape[-2] - added.shape[-1]))
            total = added if total is None else total + added
        return total


def _causal(q: Tensor, k: Tensor) -> Tensor:
    """What is added to the scores so that no position attends to a later one."""
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return torch.zeros_like(future, dtype=q.dtype).masked_fill(future, -inf)


@register_explicit(nn.MultiheadAttention)
def explicit_attention(attention: nn.MultiheadAttention) -> ExplicitAttention | None:
    """The attention written out; None where what it reads are no parameters (``torch.nn.utils.parametrize``)."""
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")
    read = [getattr(attention, name) for name in names] + [attention.out_proj.weight, attention.out_proj.bias]
    plain = all(tensor is None or isinstance(tensor, nn.Parameter) for tensor in read)
    return ExplicitAttention(attention) if plain else None
