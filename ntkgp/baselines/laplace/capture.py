"""What layers see and what comes back to them, gathered by hooks on a private copy of the network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.frozen import pass_environment


def own_module(lin: LinearizedNetwork) -> nn.Module:
    """A copy of the linearised network's private module, free to be hooked or given other weights."""
    return copy.deepcopy(lin.frozen.module(lin.frozen.device))


def owners(lin: LinearizedNetwork) -> dict[str, list[str]]:
    """Modules with trainable parameters of their own, by name, in the order of the parameters."""
    found: dict[str, list[str]] = {}
    for name in lin.frozen.theta:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def places(lin: LinearizedNetwork) -> dict[str, Tensor]:
    """Where each parameter tensor lies in ``lin.theta``."""
    sizes = [p.numel() for p in lin.frozen.theta.values()]
    return dict(zip(lin.frozen.theta, torch.arange(sum(sizes)).split(sizes), strict=True))


class Capture:
    """Forward passes that keep inputs and outputs of chosen layers.

    :ivar inputs: of each layer, one tensor per call.
    :ivar outputs: likewise, with a graph to the network's output.
    """

    def __init__(self, lin: LinearizedNetwork, layers: Sequence[str]) -> None:
        self.lin, self._layers = lin, layers
        self.module = own_module(lin)
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        def keep(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                if not args:
                    return output
                self.inputs.setdefault(name, []).append(args[0].detach())
                self.outputs.setdefault(name, []).append(output)
                # Later layers may work in place; the tensor kept here must stay in the graph as it is.
                return output.clone()

            return hook

        self.inputs, self.outputs = {}, {}
        handles = [self.module.get_submodule(name).register_forward_hook(keep(name)) for name in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, x: Tensor) -> Tensor:
        """f(x), (N, C), with a graph; what the layers saw is kept until the next pass."""
        with pass_environment(x.device), self._hooked():
            return self.lin.frozen.run(self.module, self.lin.packing.leaves(x)).reshape(len(x), -1)

    def pull(self, output: Tensor, cotangent: Tensor, retain: bool) -> dict[str, list[Tensor]]:
        """Gradients of ⟨cotangent, f⟩ in the outputs of all calls of all layers."""
        calls = [(name, out) for name in self._layers for out in self.outputs.get(name, [])]
        gradients: dict[str, list[Tensor]] = {name: [] for name in self._layers}
        if not calls:  # autograd refuses to differentiate in nothing
            return gradients
        with pass_environment(output.device):
            found = torch.autograd.grad(
                output, [out for _, out in calls], cotangent.to(output.dtype), retain_graph=retain, allow_unused=True
            )
        for (name, out), g in zip(calls, found, strict=True):
            gradients[name].append(torch.zeros_like(out) if g is None else g)
        return gradients
