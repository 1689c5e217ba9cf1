"""Batch normalization by running statistics."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ntkgp.linearization.rules.affine import affine_terms
from ntkgp.linearization.rules.registry import register_rule
from ntkgp.linearization.rules.terms import Term


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormRule:
    """J_γ = Σ_t g_t ∘ x̂_t, J_β = Σ_t g_t with x̂ the input normalized by the running statistics."""

    def inputs(self, layer: Any, input: Tensor) -> Tensor:
        """The inputs of the layer."""
        return input

    def terms(self, layer: Any, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
        """Positions are the dimensions after the channels."""
        if layer.training or layer.running_mean is None or layer.running_var is None:
            return {}  # statistics of the batch tie its rows together
        n, k, c = cotangents.shape[:3]
        normalized = F.batch_norm(inputs, layer.running_mean, layer.running_var, eps=layer.eps)
        return affine_terms(layer, normalized.reshape(n, c, -1), cotangents.reshape(n, k, c, -1), over=3)
