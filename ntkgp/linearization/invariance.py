"""Scale invariance of groups of weights: which sets have it, and by how much a given group misses it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ntkgp.linearization.frozen import FrozenNetwork, pass_environment

if TYPE_CHECKING:
    from ntkgp.linearization.groups import ParameterGroups

logger = logging.getLogger("ntkgp")

# A power of two scales without rounding; at this size an eps that no rewriting reaches (hand-written norms) is nothing
# beside the statistics it is added to.
_SCALE = 2.0**10
_STEP = 2.0**-10
_SMALLER_STEP = 2.0**-20  # in float64
_TOLERANCE = 1e-4
_STOPPED = 0.05
_PROBES = 4


class _Scaled:
    """A float64 copy of the network, its normalisers on batch statistics, whose parameters can be scaled by name."""

    def __init__(self, frozen: FrozenNetwork, leaves: Sequence[Tensor]) -> None:
        module = frozen.module(leaves[0].device)
        self.module: nn.Module = copy.deepcopy(module).to(torch.float64)
        self.parameters = dict(self.module.named_parameters())
        self._frozen = frozen
        self._leaves = [leaf.to(torch.float64) if leaf.is_floating_point() else leaf for leaf in leaves]

    def output(self) -> Tensor:
        """F at the present scaling, flattened."""
        from ntkgp.linearization.homogeneity import exact_statistics

        with pass_environment(self._leaves[0].device), exact_statistics():
            output = self._frozen.run(self.module, self._leaves, cast=torch.float64)
        return output.to(torch.float64).flatten()

    @contextmanager
    def scaled(self, names: Sequence[str], factor: float) -> Iterator[None]:
        """Multiply parameters in place, and put them back bit for bit."""
        kept = {name: self.parameters[name].detach().clone() for name in names}
        try:
            with torch.no_grad():
                for name in names:
                    self.parameters[name].mul_(factor)
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.parameters[name].copy_(value)

    def at(self, names: Sequence[str], factor: float) -> Tensor:
        with self.scaled(names, factor):
            return self.output().detach()

    def euler(self, members: Sequence[str]) -> Tensor:
        """J_g θ_g, by a central difference in log scale: no derivative transform is asked of the module."""
        return (self.at(members, 1 + _STEP) - self.at(members, 1 - _STEP)) / (2 * _STEP)

    def gradients(self) -> list[dict[str, Tensor]]:
        """Jᵀu by parameter name for a few random sign vectors u."""
        generator = torch.Generator().manual_seed(0)
        found = []
        with torch.enable_grad():
            output = self.output()
            for _ in range(_PROBES):
                signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
                pulled = torch.autograd.grad(
                    output, list(self.parameters.values()), signs, retain_graph=True, allow_unused=True
                )
                found.append(
                    {
                        name: torch.zeros_like(p) if g is None else g
                        for (name, p), g in zip(self.parameters.items(), pulled, strict=True)
                    }
                )
        return found


def euler_error(frozen: FrozenNetwork, groups: ParameterGroups, leaves: Sequence[Tensor]) -> Tensor:
    """‖J_g θ_g‖ / (‖J_g‖_F ‖θ_g‖) per group; ‖J_g‖_F² = E‖J_gᵀu‖² over random signs u."""
    network = _Scaled(frozen, leaves)
    for p in network.parameters.values():
        p.requires_grad_(True)
    flagged = zip(groups.members, groups.is_normalized, strict=True)
    normalized = [name for members, flag in flagged if flag for name in members]
    errors = []
    with network.scaled(normalized, _SCALE):
        pulled = network.gradients()
        rounding = 100 * torch.finfo(torch.float64).eps / _STEP * float(network.output().detach().norm())
        for members in groups.members:
            square = sum(sum(float(tree[n].square().sum()) for n in members) for tree in pulled) / _PROBES
            size = sum(float(network.parameters[n].detach().square().sum()) for n in members)
            # At the common scale 2^10 the gradient of a normalised group is that much smaller: the product is not.
            bound = (square * size) ** 0.5
            change = float(network.euler(members).norm())
            if max(bound, change) <= rounding:
                # A group that does not move the output, such as what BatchNorm takes off a single feature.
                errors.append(0.0)
            else:
                errors.append(change / bound if bound > 0 else float("inf"))
    return torch.tensor(errors, dtype=torch.float64)


def warn_of_stopped_gradients(frozen: FrozenNetwork, leaves: Sequence[Tensor]) -> None:
    """Say in the log when J v is not the change of the output: ``detach`` or ``no_grad`` inside ``forward``."""
    module = copy.deepcopy(frozen.module(leaves[0].device)).to(torch.float64)
    parameters = dict(module.named_parameters())
    generator = torch.Generator().manual_seed(0)
    tangent = {}
    for name, p in frozen.weights(leaves[0].device).items():
        size = p.to(torch.float64).square().mean().sqrt()
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        tangent[name] = direction * torch.where(size > 0, size, torch.ones_like(size))
    names = {id(p): name for name, p in parameters.items()}
    for layer in module.modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.padding_idx is not None:
            padded = names.get(id(layer.weight))
            if padded in tangent:
                tangent[padded][layer.padding_idx] = 0.0  # torch gives this row no gradient, whatever the outputs do

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for name, direction in tangent.items():
                parameters[name].add_(direction, alpha=step)
            output = frozen.run(module, leaves, cast=torch.float64).to(torch.float64)
            for name, direction in tangent.items():
                parameters[name].sub_(direction, alpha=step)
        return output.flatten()

    try:
        differences = [(moved(step) - moved(-step)) / (2 * step) for step in (_STEP, _SMALLER_STEP)]
    except (RuntimeError, TypeError, NotImplementedError) as reason:
        logger.info(
            "the network does not run in float64: its derivative was not compared with differences (%s)", reason
        )
        return
    product = frozen.jvp(leaves, {name: v.to(frozen.theta[name].dtype) for name, v in tangent.items()})
    product = product.detach().to(torch.float64).flatten()
    # A kink between the two points is far less likely in the smaller step; what is stopped is so in both.
    error = min(float((product - d).norm() / d.norm().clamp_min(1e-30)) for d in differences)
    if error > _STOPPED:
        logger.warning(
            "the network's derivative in its weights differs from finite differences by %.0f %%: a detach(), no_grad "
            "or a discontinuity inside forward hides part of it from the Jacobian",
            100 * error,
        )


def normalized_sets(frozen: FrozenNetwork, leaves: Sequence[Tensor]) -> list[tuple[str, tuple[str, ...]]]:
    """The normalised sets (label, parameter names) found in the computation, each confirmed by scaling it."""
    from ntkgp.linearization.homogeneity import find_normalized

    module = copy.deepcopy(frozen.module(leaves[0].device))
    with pass_environment(leaves[0].device):
        found = find_normalized(
            lambda: frozen.run(module, leaves), dict(module.named_parameters()), set(frozen.trainable)
        )
    if not found:
        return []
    network = _Scaled(frozen, leaves)
    everything = [name for group in found for name in group.names]
    confirmed = []
    with network.scaled(everything, _SCALE):
        reference = network.at((), 1.0)
        scale = reference.abs().max().clamp_min(1e-30)
        for group in found:
            error = float((network.at(group.names, 4.0) - reference).abs().max() / scale)
            if error <= _TOLERANCE:
                confirmed.append((group.label, group.names))
            else:
                logger.warning(
                    "the weights %s enter a normaliser, but scaling them changes the output by %.1e: put in 'rest'",
                    ", ".join(group.names), error,
                )  # fmt: skip
    return confirmed
