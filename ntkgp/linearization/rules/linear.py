"""y = x Wᵀ + b at any number of leading positions."""

from __future__ import annotations

from torch import Tensor, nn

from ntkgp.linearization.rules.registry import register_rule
from ntkgp.linearization.rules.terms import Outer, Summed, Term


@register_rule(nn.Linear)
class LinearRule:
    """J_W = Σ_t g_t ⊗ x_t, J_b = Σ_t g_t."""

    def inputs(self, layer: nn.Linear, input: Tensor) -> Tensor:
        """The inputs of the layer."""
        return input

    def terms(self, layer: nn.Linear, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
        """Positions are the dimensions between the rows and the features."""
        n, k = cotangents.shape[:2]
        a = inputs.reshape(n, 1, -1, layer.in_features).mT
        g = cotangents.reshape(n, k, 1, -1, layer.out_features).mT
        return {"weight": Outer(a, g), "bias": Summed(g)}
