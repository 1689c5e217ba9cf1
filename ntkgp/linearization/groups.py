"""Partition of the parameters into groups, one prior precision each."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ntkgp.linearization.network import LinearizedNetwork

Pattern = str | Tensor


class ParameterGroups:
    r"""A partition of the trainable parameters into G groups; the prior is :math:`\Lambda = \oplus_g \lambda_g I`.

    Written by hand it maps group names to parameters, each given by its name, by a shell-style pattern of names, or as
    the tensor itself; :class:`~ntkgp.LinearizedNetwork` binds it to a network. Every trainable parameter must belong to
    exactly one group. ``LinearizedNetwork(..., groups="normalization" | "layer" | "tensor" | "single")`` builds one.

    :param partition: ``{group name: names, patterns or tensors}``.
    :raises ValueError: no group, or an empty one; on binding: a parameter in no group or in two, a pattern that matches
        nothing, a tensor that is not a trainable parameter of the network.

    >>> import ntkgp
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> groups = ParameterGroups({"body": ["0.*"], "head": ["2.weight", net[2].bias]})
    >>> ntkgp.LinearizedNetwork(net, torch.randn(2, 3), groups=groups).groups.sizes
    (16, 5)
    """

    def __init__(self, partition: Mapping[str, Pattern | Iterable[Pattern]]) -> None:
        if not isinstance(partition, Mapping) or not partition:
            raise ValueError("partition: expected a non-empty mapping {group name: parameter names, patterns, tensors}")
        self._partition: dict[str, tuple[Pattern, ...]] = {
            str(name): (members,) if isinstance(members, str | Tensor) else tuple(members)
            for name, members in partition.items()
        }
        for name, members in self._partition.items():
            if not members:
                raise ValueError(f"partition: group {name!r} is empty")
            for member in members:
                if not isinstance(member, str | Tensor):
                    came = type(member).__name__
                    raise TypeError(f"partition: group {name!r} holds a {came}; expected str or Tensor")
        self._network: LinearizedNetwork | None = None

    def bind(
        self, network: LinearizedNetwork, parameters: Mapping[str, Tensor], identities: Mapping[int, str]
    ) -> ParameterGroups:
        """The same partition resolved against a network's trainable parameters.

        :param parameters: θ̃ by name, in the order of ``theta``.
        :param identities: ``id`` of the user's own parameter tensors -> name.
        """
        owner: dict[str, str] = {}
        for group, members in self._partition.items():
            for member in members:
                for name in self._resolve(group, member, parameters, identities):
                    if owner.setdefault(name, group) != group:
                        raise ValueError(
                            f"groups: parameter {name!r} is in two groups, {owner[name]!r} and {group!r}; "
                            "expected exactly one"
                        )
        missing = [name for name in parameters if name not in owner]
        if missing:
            raise ValueError(f"groups: no group holds the trainable parameter(s) {', '.join(missing)}")
        bound = ParameterGroups(self._partition)
        bound.names = tuple(self._partition)
        ids = {group: g for g, group in enumerate(bound.names)}
        bound.members = tuple(tuple(n for n in parameters if owner[n] == group) for group in bound.names)
        bound.sizes = tuple(sum(parameters[n].numel() for n in members) for members in bound.members)
        bound.of_tensor = tuple(ids[owner[n]] for n in parameters)
        bound.index = torch.cat([torch.full((p.numel(),), ids[owner[n]]) for n, p in parameters.items()])
        bound._network = network
        return bound

    @staticmethod
    def _resolve(
        group: str, member: Pattern, parameters: Mapping[str, Tensor], identities: Mapping[int, str]
    ) -> list[str]:
        if isinstance(member, Tensor):
            name = identities.get(id(member))
            if name is None or name not in parameters:
                raise ValueError(
                    f"groups: group {group!r} holds a tensor of shape {tuple(member.shape)} that is not a trainable "
                    "parameter of the network"
                )
            return [name]
        if member in parameters:
            return [member]
        found = fnmatch.filter(list(parameters), member)
        if not found:
            raise ValueError(
                f"groups: {member!r} of group {group!r} matches no trainable parameter; there are {list(parameters)}"
            )
        return found

    # Set by `bind`. names, members: group names and their parameters; sizes: numbers of entries;
    # of_tensor: group id of each parameter tensor; index: group id of each entry of theta, shape (P,).
    names: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    of_tensor: tuple[int, ...]
    index: Tensor

    def __getattr__(self, name: str) -> object:
        if name in ("names", "members", "sizes", "of_tensor", "index"):
            raise AttributeError(f"ParameterGroups.{name} exists once the groups are given to a LinearizedNetwork")
        raise AttributeError(name)

    def __len__(self) -> int:
        return len(self._partition)

    @property
    def is_normalized(self) -> tuple[bool, ...]:
        """Whether scaling the group by any k > 0 leaves the output unchanged (normalisers on batch statistics).

        True when the group is a union of normalised sets found in the computation.
        """
        sets = [frozenset(members) for _, members in self._bound_network().normalized]
        flags = []
        for members in self.members:
            inside = [s for s in sets if s <= set(members)]
            flags.append(bool(inside) and sum(map(len, inside)) == len(members))
        return tuple(flags)

    def sum_per_group(self, values: Tensor) -> Tensor:
        """Sum entries of parameter space over each group: (..., P) -> (..., G).

        >>> import ntkgp
        >>> lin = ntkgp.LinearizedNetwork(torch.nn.Linear(3, 1), torch.randn(2, 3), groups="tensor")
        >>> lin.groups.sum_per_group(torch.ones(4))
        tensor([3., 1.])
        """
        out = values.new_zeros(*values.shape[:-1], len(self))
        return out.index_add(-1, self.index.to(values.device), values)

    def expand(self, values: Tensor) -> Tensor:
        """One number per group -> one per parameter: (..., G) -> (..., P)."""
        return values.index_select(-1, self.index.to(values.device))

    def verify(self, x: Tensor) -> Tensor:
        r"""Relative error of the scale invariance per group, :math:`\|J_g\theta_g\| / (\|J_g\|_F\,\|\theta_g\|)`.

        Euler's identity: an output that does not change under :math:`\theta_g \to k\theta_g` has
        :math:`J_g\theta_g = 0` (Antorán et al. 2022, §4). Normalisers run on the statistics of the batch ``x``, their
        eps is removed, in float64: about 1e-13 for a normalised group, of order 0.01–1 for any other.

        :param x: packed or raw inputs, N ≥ 2 rows (BatchNorm needs a batch).
        :return: shape (G,), float64.

        Cost: 2G + 2 forward and 4 backward passes over x; no Jacobian is formed.

        >>> import ntkgp
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
        >>> lin = ntkgp.LinearizedNetwork(net, torch.randn(5, 3))
        >>> error = lin.groups.verify(torch.randn(20, 3))
        >>> dict(zip(lin.groups.names, (error < 1e-9).tolist()))
        {'0': True, 'rest': False}
        """
        return self._bound_network().euler_error(self, x)

    def _bound_network(self) -> LinearizedNetwork:
        if self._network is None:
            raise RuntimeError("these groups are not bound to a network: give them to a LinearizedNetwork")
        return self._network

    def __repr__(self) -> str:
        if self._network is None:
            return f"ParameterGroups({{{', '.join(map(repr, self._partition))}}}, not bound to a network)"
        width = max(5, *(len(name) for name in self.names))
        lines = [f"{'group':<{width}}  parameters  normalised  tensors"]
        for name, size, flag, members in zip(self.names, self.sizes, self.is_normalized, self.members, strict=True):
            shown = ", ".join(members[:3]) + (f", … ({len(members)})" if len(members) > 3 else "")
            lines.append(f"{name:<{width}}  {size:>10,}  {'yes' if flag else 'no':<10}  {shown}")
        return "\n".join(lines)


def layer_partition(names: Iterable[str]) -> dict[str, list[str]]:
    """One group per module that owns parameters."""
    partition: dict[str, list[str]] = {}
    for name in names:
        partition.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return partition


def normalization_partition(
    names: Sequence[str], normalized: Sequence[tuple[str, Sequence[str]]]
) -> dict[str, list[str]]:
    """One group per normalised set ``(label, names)``, and one for the rest."""
    partition: dict[str, list[str]] = {}
    taken: set[str] = set()
    for label, members in normalized:
        while label in partition or label == "rest":
            label += "'"
        partition[label] = list(members)
        taken.update(members)
    rest = [name for name in names if name not in taken]
    if rest:
        partition["rest"] = rest
    return partition
