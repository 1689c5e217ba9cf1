"""Second moments of the gradients that an optimiser holds, by parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_ACCEPTED = "expected Adam, AdamW, NAdam, RAdam or RMSprop"


class SecondMoments(NamedTuple):
    """What an optimiser says of each trainable entry of the weights, (P,) each.

    :ivar raw: v, the running mean of squared gradients as it is held.
    :ivar corrected: v / (1 − β₂ᵗ): the running mean freed of its start at zero.
    :ivar weight_decay: coefficient of the parameter's group.
    :ivar decoupled: 1 where the decay is AdamW's, which leaves the gradient alone, or may be.
    """

    raw: Tensor
    corrected: Tensor
    weight_decay: Tensor
    decoupled: Tensor


def second_moments(optimizer: Any, net: nn.Module) -> SecondMoments:
    """Of an optimiser of the network's parameters, or of its ``state_dict``, in the order of ``theta``.

    A trainable parameter without state had no gradient in training: its moment is zero.

    :raises TypeError: neither an optimiser nor a state dict, or one that holds no running mean of squared gradients.
    :raises ValueError: AMSGrad, no step taken, a trainable parameter that it does not have, or other shapes.
    """
    state, groups, live = _contents(optimizer)
    names = _names(groups, net, live)
    slots: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for group in groups:
        if group.get("amsgrad", False):
            raise ValueError(
                "optimizer: uses AMSGrad, whose preconditioner is the largest second moment so far and no average; "
                "expected amsgrad=False"
            )
        for key in group["params"]:
            slots[names[id(key) if live else key]] = (state.get(key, {}), group)
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    missing = [name for name in trainable if name not in slots]
    if missing:
        raise ValueError(f"optimizer: does not have the trainable parameter(s) {', '.join(missing)}")
    if not any(slots[name][0] for name in trainable):
        raise ValueError("optimizer: has taken no step, so that it holds no second moments")
    parts = [_of_parameter(name, p, *slots[name]) for name, p in trainable.items()]
    return SecondMoments(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _contents(optimizer: Any) -> tuple[Mapping[Any, Any], list[Mapping[str, Any]], bool]:
    """State by parameter or number, parameter groups, and whether the keys are the parameters themselves."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer.state, list(optimizer.param_groups), True
    if isinstance(optimizer, Mapping) and {"state", "param_groups"} <= set(optimizer):
        return optimizer["state"], list(optimizer["param_groups"]), False
    raise TypeError(f"optimizer: {_ACCEPTED}, or the state_dict of one, got {type(optimizer).__name__}")


def _names(groups: list[Mapping[str, Any]], net: nn.Module, live: bool) -> dict[int, str]:
    """Names of parameters by identity, or by their number in a state dict."""
    if live:
        names = {id(p): name for name, p in net.named_parameters()}
        foreign = sum(id(p) not in names for group in groups for p in group["params"])
        if foreign:
            raise ValueError(
                f"optimizer: {foreign} of its parameters are not this network's; for a copied or reloaded network pass "
                "optimizer.state_dict()"
            )
        return names
    keys = [key for group in groups for key in group["params"]]
    named = [name for group in groups for name in group.get("param_names", ())]
    if len(named) == len(keys):
        return dict(zip(keys, named, strict=True))
    everything = [name for name, _ in net.named_parameters()]
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    for order in (everything, trainable):
        if len(order) == len(keys):
            return dict(zip(keys, order, strict=True))
    raise ValueError(
        f"optimizer: its state_dict has {len(keys)} parameters, the network {len(everything)} "
        f"({len(trainable)} trainable); expected one made from net.parameters()"
    )


def _of_parameter(
    name: str, parameter: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zeros = torch.zeros(parameter.numel(), dtype=torch.float64)
    decay = torch.full_like(zeros, float(group.get("weight_decay", 0.0)))
    decoupled = torch.full_like(zeros, float(_is_decoupled(group)))
    if not state:
        return zeros, zeros, decay, decoupled
    if "exp_avg_sq" in state and "betas" in group:
        moment, memory = state["exp_avg_sq"], float(group["betas"][1])
    elif "square_avg" in state and "acc_delta" not in state and "alpha" in group:
        moment, memory = state["square_avg"], float(group["alpha"])
    else:
        raise TypeError(f"optimizer: holds {sorted(state)} and no second moments for {name!r}; {_ACCEPTED}")
    if moment.shape != parameter.shape:
        raise ValueError(
            f"optimizer: second moments of {name!r} have shape {tuple(moment.shape)}, the parameter "
            f"{tuple(parameter.shape)}"
        )
    raw = moment.detach().to("cpu", torch.float64).reshape(-1)
    if not bool((torch.isfinite(raw) & (raw >= 0)).all()):
        raise ValueError(f"optimizer: second moments of {name!r} are negative, NaN or infinite")
    return raw, raw / (1 - memory ** float(state["step"])), decay, decoupled


def _is_decoupled(group: Mapping[str, Any]) -> bool:
    """Whether the decay is AdamW's; a group of Adam's kind that does not say (torch < 2.7) may be AdamW's."""
    return bool(group.get("decoupled_weight_decay", "betas" in group))
