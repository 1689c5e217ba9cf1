"""Which parameters go by rules: found out, and checked against ordinary autograd, on two rows of the example."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkgp.linearization.frozen import pass_environment
from ntkgp.linearization.grams.capture import (
    LAYOUTS,
    Call,
    Record,
    Sites,
    fits,
    pull_back,
    record,
    terms_of,
    tolerance,
)
from ntkgp.linearization.rules.terms import Lookup, Outer, Summed, Term

if TYPE_CHECKING:
    from ntkgp.linearization.network import LinearizedNetwork

logger = logging.getLogger("ntkgp")

# Graphs that are remembered as checked: every number of inputs has its own, of some kilobytes.
_MOST_CHECKED = 64


@dataclass(frozen=True)
class Shape:
    """Sizes of the factors of one parameter's Jacobian rows, per sample and output.

    :param kind: "outer", "lookup" or "rows".
    :param blocks: r, the number of channel groups of a grouped convolution.
    :param fan_in: I, entries of an input at one position (for a lookup the rows of the table).
    :param fan_out: O, entries of a cotangent at one position.
    :param positions: T.
    :param kept: numbers kept of the forward pass (once) and of the backward pass (per output).
    :param lazy: inputs are unfolded when they are used.
    """

    kind: str
    blocks: int
    fan_in: int
    fan_out: int
    positions: int
    kept: tuple[int, int]
    lazy: bool = False

    @property
    def columns(self) -> int:
        """Number of the parameter's entries."""
        return self.blocks * self.fan_in * self.fan_out

    @property
    def pass_flops(self) -> int:
        """Flops of the layer's forward pass for one sample."""
        return 2 * self.positions * self.columns if self.kind == "outer" else 0

    @classmethod
    def of(cls, term: Term) -> Shape:
        """Sizes of a term."""
        if isinstance(term, Outer):
            r, i, t = term.left().shape[1:]
            o = term.right().shape[-2]
            kept = term.inputs[0].numel(), term.cotangents[0, 0].numel()
            return cls("outer", r, i, o, t, kept, term.unfold is not None or term.unfold_cotangents is not None)
        if isinstance(term, Lookup):
            t, o = term.cotangents.shape[2:]
            return cls("lookup", 1, term.size, o, t, (2 * t, t * o))
        if isinstance(term, Summed):
            r, o, t = term.cotangents.shape[2:]
            return cls("rows", 1, 1, r * o, t, (0, r * o))
        return cls("rows", 1, 1, term.rows.shape[-1], 1, (0, term.rows.shape[-1]))


class Plan:
    """
    How the Jacobian rows of each parameter are to be had.

    A parameter goes by rules if every read of it in the graph belongs to a call of a module that has a rule, and if
    the rows that the rules give for two samples agree with ordinary autograd. Where a layer's output holds the rows
    (first, second, or folded into the first dimension) is found by the same comparison.

    :param layouts: where the rows are, by key of the site.
    :param shapes: sizes of the factors, by parameter name, of parameters that go by rules.
    :param known: the same, with those that have turned out not to.
    """

    def __init__(self, lin: LinearizedNetwork) -> None:
        self.frozen = lin.frozen
        self.layouts: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        self.known: dict[str, Shape] = {}
        self.merges: set[tuple[str, str]] = set()
        self.batched = False
        self.output_bytes = lin.activation_bytes
        self._checked: set[frozenset[Any]] = set()
        self._chained: set[str] = set()
        self._sites: dict[torch.device, Sites] = {}
        with pass_environment(lin._probe_rows.device):
            try:
                self._probe(lin.packing.leaves(lin._probe_rows[:2]))
            except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as reason:
                logger.warning("no layer of this network goes by a rule (%s): per-sample gradients are formed", reason)
                self.layouts, self.shapes, self.known = {}, {}, {}
        rest = [name for name in self.frozen.theta if name not in self.shapes]
        if rest:
            logger.info("per-sample gradients are formed for %s", ", ".join(rest))

    @property
    def pass_flops(self) -> int:
        """Flops of one forward pass for one sample, of the layers that go by rules."""
        return sum(shape.pass_flops for shape in self.shapes.values())

    @property
    def chain_flops(self) -> int:
        """Flops of one backward chain for one sample: it ends at the outputs of the layers that see data alone."""
        return sum(shape.pass_flops for name, shape in self.shapes.items() if name in self._chained)

    def sites(self, device: torch.device) -> Sites:
        """The modules that go by rules, of the copy on a device."""
        if device not in self._sites:
            self._sites[device] = Sites(self.frozen, device)
        return self._sites[device]

    def relevant(self, result: Record) -> list[Call]:
        """Calls that a parameter which goes by rules takes part in."""
        return [c for c in result.calls if any(name in self.shapes for name in c.site.names.values())]

    def trusted(self, result: Record) -> set[str]:
        """Parameters whose reads are all calls of their sites."""
        return result.described() & self.shapes.keys()

    def doubts(self, result: Record) -> bool:
        """Whether rows may be in other places than they were when the rules were checked."""
        return result.moves_rows or result.structure not in self._checked

    def checked(self, result: Record) -> None:
        """Rows were seen to be in their places: nothing but the data can move them in a graph of this structure."""
        if len(self._checked) >= _MOST_CHECKED:
            self._checked.clear()
        self._checked.add(result.structure)

    def distrust(self, names: set[str]) -> None:
        """Leave parameters to the fallback from now on: the network treats them otherwise for other inputs."""
        for name in names:
            logger.warning("%s is used differently from row to row: its per-sample gradients are formed", name)
            self.shapes.pop(name, None)
        self.merges = {pair for pair in self.merges if not names.intersection(pair)}

    def _probe(self, leaves: list[Tensor]) -> None:
        sites, n = self.sites(leaves[0].device), leaves[0].shape[0]
        if not sites.all:
            return
        result = record(self.frozen, sites, leaves, keep_graph=False)
        self.checked(result)
        described = result.described()
        generator = torch.Generator().manual_seed(0)
        cotangents = torch.randn(2, *result.output.shape, generator=generator, dtype=torch.float64)
        cotangents = cotangents.to(result.output)
        calls = _calls_per_parameter(result.calls)
        self._chained = {name for call in result.calls if call.chained for name in call.site.names.values()}
        names_of = {call.site.key: set(call.site.names.values()) for call in result.calls}
        undecided = set(names_of)
        parameters = dict(sites.module.named_parameters())
        expected: dict[str, Tensor] = {}
        for layout in LAYOUTS:
            tried = {
                key: layout
                for key in undecided
                if all(fits(call.shape, layout, n) for call in result.calls if call.site.key == key)
            }
            if not tried:
                continue
            chosen = [c for c in result.calls if c.site.key in tried]
            gradients = pull_back(result, chosen, cotangents[:1], keep_graph=False, batched=False)
            terms = terms_of(chosen, gradients, tried, n)
            for name in terms.keys() - expected.keys():
                expected[name] = self._rows(result.output, parameters[name], cotangents[0])
            share = _calls_per_parameter(chosen)
            right = {
                name
                for name, term in terms.items()
                if name in described and calls[name] == share[name] and self._agrees(term, expected[name])
            }
            for key in tried:
                names = {n for c in chosen if c.site.key == key for n in c.site.names.values() if n in terms}
                # A row of zeros agrees with any layout.
                if names <= right and any(bool(expected[name].any(1).all()) for name in names):
                    self.layouts[key] = layout
                    undecided.discard(key)
                    for name in names:
                        self.shapes[name] = self.known[name] = Shape.of(terms[name])
            self._pair_biases(chosen, terms, calls)
        self.output_bytes = sum(math.prod(c.shape) * c.inputs.element_size() for c in self.relevant(result)) // n
        self.batched = self._batches(result, cotangents)
        idle = {key for key in undecided if not any(bool(expected[n].any()) for n in names_of[key] & expected.keys())}
        for key in undecided - idle:
            logger.warning("%s is used in a way that its rule does not describe: per-sample gradients are formed", key)

    @staticmethod
    def _rows(output: Tensor, parameter: Tensor, cotangent: Tensor) -> Tensor:
        rows = []
        for n in range(len(output)):
            (g,) = torch.autograd.grad(output[n], parameter, cotangent[n], retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(parameter).reshape(-1) if g is None else g.reshape(-1))
        return torch.stack(rows)

    @staticmethod
    def _agrees(term: Term, expected: Tensor) -> bool:
        found = term.dense()[:, 0]
        if found.shape != expected.shape:
            return False
        # Sums that cancel (a bias of attention's keys) are right to the rounding of what is summed.
        sizes = term.with_tensors([t.abs() if t.is_floating_point() else t for t in term.tensors()]).dense()[:, 0]
        scale = torch.maximum(sizes, expected.abs()).amax(1, keepdim=True)
        return bool(((found - expected).abs() <= tolerance(expected.dtype) * scale).all())

    def _pair_biases(self, chosen: list[Call], terms: dict[str, Term], calls: Counter[str]) -> None:
        """Weights and biases of one layer that is applied once per sample: one factor serves both."""
        for call in chosen:
            weight, bias = call.site.names.get("weight"), call.site.names.get("bias")
            if weight in self.shapes and bias in self.shapes and calls[weight] == calls[bias] == 1:
                left, right = terms.get(weight), terms.get(bias)
                if isinstance(left, Outer) and isinstance(right, Summed) and left.cotangents is right.cotangents:
                    shape = self.shapes[weight]
                    if shape.positions == shape.blocks == 1 and not shape.lazy and not left.swapped:
                        self.merges.add((weight, bias))

    def _batches(self, result: Record, cotangents: Tensor) -> bool:
        """Whether vmap runs several chains at once, and rightly."""
        calls = self.relevant(result)
        if not calls:
            return False
        try:
            together = pull_back(result, calls, cotangents, keep_graph=False, batched=True)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return False
        apart = pull_back(result, calls, cotangents, keep_graph=False, batched=False)
        for a, b in zip(together, apart, strict=True):
            for x, y in zip(a, b, strict=True):
                if not bool(((x - y).abs().max() if x.numel() else 0.0) <= tolerance(y.dtype) * y.abs().max()):
                    return False
        return True


def _calls_per_parameter(calls: list[Call]) -> Counter[str]:
    return Counter(name for call in calls for name in call.site.names.values())
