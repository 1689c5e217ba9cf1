"""Layer normalization."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from ntkgp.linearization.rules.affine import affine_terms
from ntkgp.linearization.rules.registry import register_rule
from ntkgp.linearization.rules.terms import Term


@register_rule(nn.LayerNorm)
class LayerNormRule:
    """J_γ = Σ_t g_t ∘ x̂_t, J_β = Σ_t g_t with x̂ the input normalized at each position."""

    def inputs(self, layer: nn.LayerNorm, input: Tensor) -> Tensor:
        """The inputs of the layer."""
        return input

    def terms(self, layer: nn.LayerNorm, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
        """Positions are the dimensions between the rows and the normalized ones."""
        n, k, width = *cotangents.shape[:2], prod(layer.normalized_shape)
        normalized = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
        return affine_terms(layer, normalized.reshape(n, -1, width), cotangents.reshape(n, k, -1, width), over=2)
