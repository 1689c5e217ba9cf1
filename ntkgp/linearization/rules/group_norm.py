"""Group normalization and instance normalization."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ntkgp.linearization.rules.affine import affine_terms
from ntkgp.linearization.rules.registry import register_rule
from ntkgp.linearization.rules.terms import Term


class _ChannelRule:
    """J_γ = Σ_t g_t ∘ x̂_t, J_β = Σ_t g_t over the positions of each channel."""

    def inputs(self, layer: Any, input: Tensor) -> Tensor:
        """The inputs of the layer."""
        return input

    def terms(self, layer: Any, inputs: Tensor, cotangents: Tensor) -> dict[str, Term]:
        """Positions are the dimensions after the channels."""
        n, k, c = cotangents.shape[:3]
        normalized = self.normalized(layer, inputs).reshape(n, c, -1)
        return affine_terms(layer, normalized, cotangents.reshape(n, k, c, -1), over=3)

    def normalized(self, layer: Any, inputs: Tensor) -> Tensor:
        """The inputs x̂ that are scaled and shifted."""
        raise NotImplementedError


@register_rule(nn.GroupNorm)
class GroupNormRule(_ChannelRule):
    """J_γ = Σ_t g_t ∘ x̂_t, J_β = Σ_t g_t with x̂ normalized in each group of channels."""

    def normalized(self, layer: nn.GroupNorm, inputs: Tensor) -> Tensor:
        """The inputs x̂ that are scaled and shifted."""
        return F.group_norm(inputs, layer.num_groups, eps=layer.eps)


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(_ChannelRule):
    """J_γ = Σ_t g_t ∘ x̂_t, J_β = Σ_t g_t with x̂ normalized in each channel, or by running statistics."""

    def normalized(self, layer: Any, inputs: Tensor) -> Tensor:
        """The inputs x̂ that are scaled and shifted."""
        if layer.training or not layer.track_running_stats:
            return F.instance_norm(inputs, eps=layer.eps)
        return F.instance_norm(inputs, layer.running_mean, layer.running_var, use_input_stats=False, eps=layer.eps)
