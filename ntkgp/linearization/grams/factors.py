"""Factors of the Jacobian rows of given inputs, kept so that products need no further pass over these inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkgp.linearization.frozen import pass_environment
from ntkgp.linearization.grams.capture import misplaced, pull_back, record, terms_of
from ntkgp.linearization.rules.terms import Lookup, Outer, Rows, Term
from ntkgp.linearization.second_order import second_order

if TYPE_CHECKING:
    from ntkgp.linearization.grams.plan import Plan
    from ntkgp.linearization.network import LinearizedNetwork

# Chains whose cotangents of all layers are held at a time.
_MOST_CHAINS = 32
# Passes gain nothing from more than about this much in flight.
_PASS_BYTES = 2**26
# Below this many bytes per layer output and chain, calls cost more than arithmetic.
_SMALL = 2**21


@dataclass(frozen=True)
class Slot:
    """Parameters of one group that are handled together.

    :param names: their names; for factors one parameter, or a weight and its bias.
    :param group: index of their group.
    :param factored: kept as factors, otherwise as rows (of all the names, side by side).
    """

    names: tuple[str, ...]
    group: int
    factored: bool


@dataclass(frozen=True)
class Factors:
    """What is kept of N inputs with K outputs each (all C of them, or a chosen one).

    :param x: the packed inputs, shape (N, D).
    :param outputs: index of the chosen output of each input, shape (N,); None for all.
    :param num_outputs: K.
    :param terms: one per slot; N rows each.
    """

    x: Tensor
    outputs: Tensor | None
    num_outputs: int
    slots: tuple[Slot, ...]
    terms: tuple[Term, ...]

    def __len__(self) -> int:
        return len(self.x)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(t.numel() * t.element_size() for term in self.terms for t in term.tensors())

    def block(self, rows: slice) -> Factors:
        """The factors of some of the inputs; nothing is copied."""
        terms = tuple(term.with_tensors([t[rows] for t in term.tensors()]) for term in self.terms)
        outputs = None if self.outputs is None else self.outputs[rows]
        return Factors(self.x[rows], outputs, self.num_outputs, self.slots, terms)


def pairs(lin: LinearizedNetwork, a: Factors, b: Factors) -> list[tuple[Slot, Term, Term]]:
    """Terms of the same parameters on both sides; those that the two keep in different forms become rows."""
    if a.slots == b.slots:
        return list(zip(a.slots, a.terms, b.terms, strict=True))
    left, right = dict(zip(a.slots, a.terms, strict=True)), dict(zip(b.slots, b.terms, strict=True))
    found = [(slot, term, right[slot]) for slot, term in left.items() if slot in right]
    rows1, rows2 = (_rows_by_name(lin, side, other) for side, other in ((left, right), (right, left)))
    for group in {group for group, _ in rows1}:
        names = tuple(name for g, name in rows1 if g == group)
        one, two = (Rows(torch.cat([rows[group, name] for name in names], dim=-1)) for rows in (rows1, rows2))
        found.append((Slot(names, group, False), one, two))
    return found


def _rows_by_name(lin: LinearizedNetwork, terms: dict[Slot, Term], other: dict[Slot, Term]) -> dict[Any, Tensor]:
    """Jacobian rows of each parameter, by group and name, of the slots that the other side does not have."""
    found = {}
    for slot, term in terms.items():
        if slot not in other:
            rows = term.dense()
            if slot.factored and len(slot.names) == 2:
                table = rows.unflatten(-1, (lin.frozen.theta[slot.names[1]].numel(), -1))
                parts = [table[..., :-1].flatten(2), table[..., -1]]
            else:
                parts = list(rows.split([lin.frozen.theta[name].numel() for name in slot.names], dim=-1))
            found.update({(slot.group, name): part for name, part in zip(slot.names, parts, strict=True)})
    return found


class Deviation(Exception):
    """Parameters that do not go by rules for these inputs, though they did for the example."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = names


def arrange(lin: LinearizedNetwork, plan: Plan, dense: set[str]) -> tuple[Slot, ...]:
    """Slots of all parameters; those in ``dense`` and those without a rule are kept as rows, once per group."""
    with_bias = {weight: bias for weight, bias in plan.merges if weight not in dense and bias not in dense}
    group_of = dict(zip(lin.frozen.theta, lin.groups.of_tensor, strict=True))
    with_bias = {weight: bias for weight, bias in with_bias.items() if group_of[weight] == group_of[bias]}
    rows: dict[int, list[str]] = {}
    slots = []
    for name, group in group_of.items():
        if name in with_bias.values():
            continue
        shape = plan.shapes.get(name)
        if shape is not None and shape.kind != "rows" and name not in dense:
            names = (name, with_bias[name]) if name in with_bias else (name,)
            slots.append(Slot(names, group, True))
        else:
            rows.setdefault(group, []).append(name)
    slots += [Slot(tuple(names), group, False) for group, names in rows.items()]
    return tuple(sorted(slots, key=lambda slot: slot.group))


def chain_count(num_outputs: int) -> int:
    """How many backward chains are held at a time."""
    return num_outputs if num_outputs <= _MOST_CHAINS else _MOST_CHAINS


def pass_bytes(lin: LinearizedNetwork, plan: Plan, num_outputs: int) -> int:
    """Bytes per row that a forward pass and its chains take at most."""
    return 2 * lin.activation_bytes + (2 * chain_count(num_outputs) + 2) * plan.output_bytes


def kept_bytes(lin: LinearizedNetwork, plan: Plan, slots: Sequence[Slot], num_outputs: int) -> int:
    """Bytes per row that are kept."""
    item = torch.finfo(lin.dtype).bits // 8
    total = 0
    for slot in slots:
        if slot.factored:
            forward, backward = plan.known[slot.names[0]].kept
            total += forward + len(slot.names) - 1 + num_outputs * backward
        else:
            total += num_outputs * sum(lin.frozen.theta[name].numel() for name in slot.names)
    return item * total


def build(
    lin: LinearizedNetwork, plan: Plan, x: Tensor, slots: tuple[Slot, ...], budget: int,
    outputs: Tensor | None = None, keep_graph: bool = False,
) -> Factors:  # fmt: skip
    """Run the passes over x, in chunks of rows whose passes fit in the budget, and keep the factors.

    :raises Deviation: parameters that do not go by rules here; the plan is to leave them out.
    """
    k = lin.num_outputs if outputs is None else 1
    rows = max(1, min(budget, max(_PASS_BYTES, pass_bytes(lin, plan, k))) // pass_bytes(lin, plan, k))
    store = _Store(lin, slots, len(x), k)
    # Inference mode records no graph, and its tensors cannot enter one.
    with pass_environment(x.device), second_order(*([x] if keep_graph else [])):
        x = x.clone() if x.is_inference() else x
        for start in range(0, len(x), rows):
            chosen = None if outputs is None else outputs[start : start + rows]
            _visit(lin, plan, x[start : start + rows], chosen, slots, store, start, keep_graph)
    return Factors(x, outputs, k, slots, store.terms())


class _Store:
    """Terms of all rows and outputs, written part by part; a single part is taken as it is."""

    def __init__(self, lin: LinearizedNetwork, slots: Sequence[Slot], num_rows: int, num_outputs: int) -> None:
        self._size = num_rows, num_outputs
        self._widths = [sum(lin.frozen.theta[name].numel() for name in slot.names) for slot in slots]
        self._terms: list[Term | None] = [None] * len(slots)

    def fits(self, slot: int, term: Term) -> bool:
        """Whether a part has the sizes (positions, above all) of those before it."""
        found = self._terms[slot]
        if found is None:
            return True
        leading = [2 if _per_output(i, len(found.tensors())) else 1 for i in range(len(found.tensors()))]
        return type(term) is type(found) and all(
            a.shape[n:] == b.shape[n:] for a, b, n in zip(term.tensors(), found.tensors(), leading, strict=True)
        )

    def put(self, slot: int, term: Term, rows: slice, outputs: slice) -> None:
        """Write the factors of some rows and outputs."""
        if (rows.stop - rows.start, outputs.stop - outputs.start) == self._size:
            self._terms[slot] = term
            return
        parts = term.tensors()
        found = self._terms[slot]
        if found is None:
            places = [self._room(part, i, len(parts)) for i, part in enumerate(parts)]
            found = self._terms[slot] = term.with_tensors(places)
        for i, (whole, part) in enumerate(zip(found.tensors(), parts, strict=True)):
            if _per_output(i, len(parts)):
                whole[rows, outputs] = part
            else:
                whole[rows] = part

    def _room(self, part: Tensor, i: int, parts: int) -> Tensor:
        leading = self._size if _per_output(i, parts) else self._size[:1]
        return part.new_empty(*leading, *part.shape[len(leading) :])

    def terms(self) -> tuple[Term, ...]:
        """All of them."""
        return tuple(term for term in self._terms if term is not None)


def _per_output(i: int, parts: int) -> bool:
    """The last tensor of a term is that of the backward passes."""
    return i == parts - 1


def _visit(
    lin: LinearizedNetwork, plan: Plan, x: Tensor, outputs: Tensor | None, slots: tuple[Slot, ...], store: _Store,
    start: int, keep_graph: bool,
) -> None:  # fmt: skip
    """One forward pass over a chunk of rows, its chains, and the factors written to the store."""
    leaves, n = lin.packing.leaves(x), len(x)
    rows, k = slice(start, start + n), lin.num_outputs if outputs is None else 1
    by_rule = bool(plan.shapes)
    if by_rule:
        result = record(lin.frozen, plan.sites(x.device), leaves, keep_graph)
        calls = plan.relevant(result)
        trusted = plan.trusted(result)
        per_chain = max(1, plan.output_bytes * n // max(1, len(calls)))
        # vmap of a backward pass that is itself to be differentiated is wrong or missing for some layers.
        batched = plan.batched and not keep_graph and (k > _MOST_CHAINS or per_chain * k <= _SMALL)
    step = chain_count(k)
    for first in range(0, k, step):
        part = slice(first, min(first + step, k))
        terms: dict[str, Term] = {}
        if by_rule:
            cotangents = _cotangents(result.output, outputs, part)
            gradients = pull_back(result, calls, cotangents, keep_graph=keep_graph, batched=batched)
            if first == 0 and plan.doubts(result):
                moved = misplaced(result, calls, cotangents, gradients, plan.layouts)
                trusted -= moved
                if not moved:
                    plan.checked(result)
            found = terms_of(calls, gradients, plan.layouts, n)
            terms = {name: term for name, term in found.items() if name in trusted}
        # Slots of factors that were kept before may hold parameters that have been given up since.
        lost = {n for slot in slots if slot.factored for n in slot.names if n not in terms and n in plan.shapes}
        if lost:
            raise Deviation(lost)
        missing = tuple(name for slot in slots for name in slot.names if name not in terms)
        terms.update(_fallback(lin, leaves, outputs, part, missing))
        for i, slot in enumerate(slots):
            term = _assemble(slot, terms)
            if not store.fits(i, term):
                raise Deviation(set(slot.names))
            store.put(i, term, rows, part)


def _cotangents(output: Tensor, outputs: Tensor | None, part: slice) -> Tensor:
    """One-hot rows that pick outputs, shape (K, N, C)."""
    n, c = output.shape
    if outputs is not None:
        return torch.nn.functional.one_hot(outputs.to(output.device), c).to(output).unsqueeze(0)
    return torch.eye(c, dtype=output.dtype, device=output.device)[part].unsqueeze(1).expand(-1, n, c)


def _fallback(
    lin: LinearizedNetwork, leaves: list[Tensor], outputs: Tensor | None, part: slice, names: tuple[str, ...]
) -> dict[str, Term]:
    """Per-sample gradients of parameters without a rule."""
    if not names:
        return {}
    c = lin.num_outputs
    if outputs is not None:
        cotangents = torch.nn.functional.one_hot(outputs, c).unsqueeze(1).to(lin.dtype)
    else:
        cotangents = torch.eye(c, dtype=lin.dtype, device=leaves[0].device)[part]
    rows = lin.frozen.jacobian(leaves, cotangents, names)
    return {name: Rows(tensor.reshape(*tensor.shape[:2], -1)) for name, tensor in rows.items()}


def interleaved(weight: Tensor, bias: Tensor) -> Tensor:
    """The bias as one more input of the weight: (..., O·I) and (..., O) -> (..., O·(I + 1))."""
    return torch.cat([weight.unflatten(-1, (bias.shape[-1], -1)), bias.unsqueeze(-1)], dim=-1).flatten(-2)


def _assemble(slot: Slot, terms: dict[str, Term]) -> Term:
    """The term of a slot from those of its parameters."""
    first = terms[slot.names[0]]
    if slot.factored and isinstance(first, Outer | Lookup):
        if len(slot.names) == 1:
            return first
        if isinstance(first, Outer) and not isinstance(terms[slot.names[1]], Rows):
            # A bias is the weight of an input that is always one.
            a = first.left()
            return Outer(torch.cat([a, torch.ones_like(a[:, :, :1])], dim=2), first.right())
    dense = [terms[name].dense() for name in slot.names]
    if slot.factored and len(dense) == 2:
        return Rows(interleaved(*dense))
    return Rows(dense[0] if len(dense) == 1 else torch.cat(dense, dim=-1))
