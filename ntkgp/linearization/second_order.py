"""Derivatives of Jacobian products with respect to the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def needs_graph(*tensors: Tensor) -> bool:
    """Whether a result must be differentiable with respect to one of these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def second_order(*inputs: Tensor) -> AbstractContextManager[Any]:
    """
    Makes Jacobian products inside right to differentiate with respect to these inputs.

    torch's forward-mode and vmapped backward formulas of the fused layer and instance norm treat the saved mean and
    standard deviation as constants. Values are right, but derivatives of these values with respect to the inputs are
    wrong by 20 to 200 %, without a warning (torch 2.13). Norms written out in elementary operations are right. Forward
    mode of glu has no derivative at all.
    """
    return _ByParts() if needs_graph(*inputs) else nullcontext()


def _standardize(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    x = _standardize(input, tuple(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = _standardize(input, tuple(range(2, input.dim())), eps)
    per_channel = (1, -1, *(1 for _ in range(2, input.dim())))
    x = x if weight is None else x * weight.reshape(per_channel)
    return x if bias is None else x + bias.reshape(per_channel)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    left, right = input.chunk(2, dim)
    return left * torch.sigmoid(right)


_RULES: dict[Any, Callable[..., Tensor]] = {
    F.glu: _glu,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
}


class _ByParts(TorchFunctionMode):
    """Layer and instance norms, and glu, in elementary operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _RULES.get(func, func)(*args, **(kwargs or {}))
