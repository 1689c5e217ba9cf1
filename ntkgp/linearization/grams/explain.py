"""What a Gram costs, layer by layer, before it is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ntkgp.linearization.grams.cost import Block, Cost, ways
from ntkgp.linearization.grams.factors import Slot, kept_bytes
from ntkgp.linearization.memory import format_memory

if TYPE_CHECKING:
    from ntkgp.linearization.network import LinearizedNetwork


@dataclass(frozen=True)
class Line:
    """One slot of the table.

    :param name: parameters that are handled together.
    :param group: name of their group.
    :param sizes: positions T, fan-in I and fan-out O; None where rows are formed.
    :param way: the order of summation that is taken.
    :param costs: cost of every order that is open.
    :param least: fewest flops of any order, with exactly half of a symmetric block.
    :param kept: bytes kept per input.
    """

    name: str
    group: str
    sizes: tuple[int, int, int] | None
    way: str
    costs: dict[str, Cost]
    least: float
    kept: int


@dataclass(frozen=True)
class Explanation:
    """How a Gram block is computed, and what it costs; prints as a table.

    :param lines: one per slot.
    :param passes: flops of the forward passes and the backward chains.
    :param block: the sizes it was made for.
    """

    lines: tuple[Line, ...]
    passes: float
    block: Block

    @property
    def flops(self) -> float:
        """Flops of the passes and of the chosen ways."""
        return self.passes + sum(line.costs[line.way].flops for line in self.lines)

    @property
    def flop_limit(self) -> float:
        """Flops of the passes and of the ways with the fewest flops, with exactly half of a symmetric block."""
        return self.passes + sum(line.least for line in self.lines)

    def __str__(self) -> str:
        header = ("parameters", "group", "T", "I", "O", "way", "Gflop", "of all ways", "kept per input")
        table: list[tuple[str, ...]] = [header]
        for line in self.lines:
            sizes = ("", "", "") if line.sizes is None else tuple(str(size) for size in line.sizes)
            others = ", ".join(f"{way} {cost.flops / 1e9:.3g}" for way, cost in line.costs.items())
            flops = f"{line.costs[line.way].flops / 1e9:.3g}"
            table.append((line.name, line.group, *sizes, line.way, flops, others, format_memory(line.kept)))
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        b = self.block
        shape = f"{b.n1}·{b.k1} x {b.n2}·{b.k2}" + (", symmetric" if b.symmetric else "")
        total = f"Gram block {shape}: passes {self.passes / 1e9:.3g} Gflop, all {self.flops / 1e9:.3g} Gflop"
        return "\n".join([*rows, total])


def explain(lin: LinearizedNetwork, n1: int, n2: int | None) -> Explanation:
    """See :meth:`ntkgp.LinearizedNetwork.explain`."""
    engine, c = lin.engine, lin.num_outputs
    block = Block.of(n1, n1 if n2 is None else n2, c, c, n2 is None)
    halved = replace(block, share=0.5 if n2 is None else 1.0)
    lines = []
    for slot in engine.slots(block):
        bias = len(slot.names) > 1
        shape = engine.shape_of(slot)
        sizes = (shape.positions, shape.fan_in, shape.fan_out) if slot.factored else None
        costs = ways(shape, block, bias)
        least = min(cost.flops for cost in ways(shape, halved, bias).values())
        kept = kept_bytes(lin, engine.plan, [slot], c)
        group, way = lin.groups.names[slot.group], engine.way(slot, block)
        lines.append(Line(_label(slot), group, sizes, way, costs, least, kept))
    rows = n1 if n2 is None else n1 + n2
    return Explanation(tuple(lines), rows * (engine.plan.pass_flops + c * engine.plan.chain_flops), block)


def _label(slot: Slot) -> str:
    if len(slot.names) <= 2:
        return ", ".join(slot.names)
    return f"{slot.names[0]}, … ({len(slot.names)} tensors)"
