"""Discovery of normalised groups of parameters from the computation itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ntkgp.linearization.degrees import Exponents, Relations, UntraceableError, propagate
from ntkgp.linearization.tracing import trace

_EPS = 1e-30
_SEARCH_LIMIT = 5_000


@dataclass(frozen=True)
class Normalized:
    """A set of parameters whose joint scale the network's output does not depend on."""

    names: tuple[str, ...]
    label: str


def find_normalized(
    call: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter], trainable: Collection[str]
) -> list[Normalized]:
    r"""Disjoint sets S of parameters with :math:`f(\theta' + k\theta_S) = f(\theta)` for all k > 0.

    One forward pass is recorded as ATen operations. Each value gets a symbolic degree in the scales of all parameters,
    each operation its linear relations between degrees (equal ones for a sum, none for tanh, any for the input of a
    normaliser), and the sets are the 0/1 solutions of these relations. Normalisers count as running on the statistics
    of the current batch, with eps → 0; hand-written ones are found when their eps is at most 1e-3. A layer's weight and
    bias stay together, except that BatchNorm subtracts a bias that cannot join its weight. Affine parameters of
    normalisers belong to no set. Where sets exclude each other, the parameters used latest win.

    :param call: runs the network, in evaluation mode, on a few example rows and returns its output tensor.
    :param parameters: all parameters by name: the very objects that the pass uses.
    :param trainable: names of the parameters that may be scaled.
    :return: the sets in the order of their first parameter; empty where nothing is normalised, or where the pass writes
        memory that cannot be followed.

    Cost: one forward pass on the example rows (all activations are held), then time linear in the number of operations
    times the number of parameter tensors; independent of P.

    Source: definition of normalised networks in Antorán et al. (2022), §4.

    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> names = dict(net.named_parameters())
    >>> find_normalized(lambda: net(torch.ones(2, 3)), names, set(names))
    [Normalized(names=('0.weight', '0.bias'), label='0')]
    """
    try:
        relations = propagate(trace(call, parameters))
    except UntraceableError:
        return []
    names = list(parameters)
    usable = {i for i in relations.last_use if names[i] in trainable} - relations.affine
    found = [sorted(members) for members in _disjoint_sets(relations, usable)]
    return [_describe([names[i] for i in members]) for members in sorted(found)]


def _disjoint_sets(relations: Relations, usable: set[int]) -> list[frozenset[int]]:
    """Sets from the parameter used latest to the earliest; first with biases tied to their weights, then without."""

    def order(parameter: int) -> tuple[bool, int]:
        return parameter in relations.factors, -relations.last_use.get(parameter, -1)

    tied: list[Exponents] = [{bias: Fraction(1), weight: Fraction(-1)} for bias, weight in relations.ties]
    found: list[frozenset[int]] = []
    for rows in (relations.rows + tied, relations.rows):
        allowed = _without_forced_zeros(rows, usable)
        for seed in sorted(usable - relations.biases, key=order):
            members = _solve(rows, seed, allowed, order) if seed in allowed else None
            if members is not None:
                found.append(members)
                usable = usable - members
                allowed = _without_forced_zeros(rows, usable)
    return found


def _without_forced_zeros(rows: Sequence[Exponents], allowed: set[int]) -> set[int]:
    """Drop parameters that no 0/1 solution can hold: those of a relation in which all coefficients have one sign."""
    allowed = set(allowed)
    changed = True
    while changed:
        changed = False
        for row in rows:
            inside = [i for i in row if i in allowed]
            if inside and len({row[i] > 0 for i in inside}) == 1:
                allowed.difference_update(inside)
                changed = True
    return allowed


def _solve(
    rows: Sequence[Exponents], seed: int, allowed: set[int], order: Callable[[int], Any]
) -> frozenset[int] | None:
    """A 0/1 solution with ``seed`` in it, by repairing one violated relation at a time; depth first."""
    relevant = [row for row in rows if any(i in allowed for i in row)]
    stack = [frozenset({seed})]
    seen = set(stack)
    for _ in range(_SEARCH_LIMIT):
        if not stack:
            return None
        members = stack.pop()
        sums = ((row, sum(c for i, c in row.items() if i in members)) for row in relevant)
        row, excess = next((pair for pair in sums if pair[1]), (None, 0))
        if row is None:
            return members
        repairs = [i for i in row if i in allowed and i not in members and row[i] * excess < 0]
        for i in sorted(repairs, key=order, reverse=True):
            if (larger := members | {i}) not in seen:
                seen.add(larger)
                stack.append(larger)
    return None


def _describe(members: Sequence[str]) -> Normalized:
    """Label a set by its layer, or by its first parameter."""
    # A parametrised weight is held two modules below its layer.
    mark = ".parametrizations."
    layers = {name.partition(mark)[0] if mark in name else name.rpartition(".")[0] or name for name in members}
    if len(layers) == 1:
        return Normalized(tuple(members), layers.pop())
    return Normalized(tuple(members), f"residual stream: {members[0]} (+{len(members) - 1})")


# Positional parameters of the normalisers' functional forms.
_SIGNATURES: dict[Callable[..., Any], tuple[str, ...]] = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    torch.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    torch.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    torch.group_norm: ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: (
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled",
    ),
    F.instance_norm: (
        "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps",
    ),
    torch.instance_norm: (
        "input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps", "cudnn_enabled",
    ),
}  # fmt: skip


class _ExactStatistics(TorchFunctionMode):
    """Rewrites the calls of normalisers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        signature = _SIGNATURES.get(func)
        if signature is None:
            return func(*args, **(kwargs or {}))
        arguments = {**dict(zip(signature, args, strict=False)), **(kwargs or {}), "eps": _EPS}
        for statistic in ("running_mean", "running_var"):
            if statistic in signature:
                arguments[statistic] = None
        for flag in ("training", "use_input_stats"):
            if flag in signature:
                arguments[flag] = True
        return func(**arguments)


@contextlib.contextmanager
def exact_statistics() -> Iterator[None]:
    """Run normalisers as the definition of a normalised group has them: on batch statistics and without eps.

    Batch and instance normalisation use the statistics of their input and leave running ones alone; the eps of batch,
    instance, group, layer and RMS normalisation is 1e-30. An eps written out in a network's own arithmetic stays, and
    so do normalisers inside a ``torch.jit.ScriptModule``. Works under ``torch.func`` transforms.

    :raises ValueError: (by torch) batch normalisation of a single value per channel, which has no statistics.

    >>> net = torch.nn.BatchNorm1d(1).eval()
    >>> with exact_statistics():
    ...     net(torch.tensor([[1.0], [3.0]])).flatten().tolist()
    [-1.0, 1.0]
    """
    with _ExactStatistics():
        yield
