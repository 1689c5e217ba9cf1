"""Gram blocks from factors: which blocks, in which order, within which memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ntkgp.linearization.grams.contraction import (
    Target,
    add_positions,
    add_product,
    add_rows,
    matrix,
    pointwise,
)
from ntkgp.linearization.grams.cost import Block, choose, ways
from ntkgp.linearization.grams.factors import (
    Deviation,
    Factors,
    Slot,
    arrange,
    build,
    kept_bytes,
    pairs,
    pass_bytes,
)
from ntkgp.linearization.grams.features import features
from ntkgp.linearization.grams.plan import Plan, Shape
from ntkgp.linearization.memory import format_memory
from ntkgp.linearization.rules.terms import Lookup, Outer, Term

if TYPE_CHECKING:
    from ntkgp.linearization.network import LinearizedNetwork

_LEAST_WORKSPACE = 2**16
_MOST_WORKSPACE = 2**25
# Blocks at single inputs are summed while their factors are still in a cache.
_POINTWISE_BYTES = 2**26
# Sizes of blocks whose slots are kept: a model that is served sees ever other numbers of inputs.
_MOST_CHOSEN = 64
S = TypeVar("S")


@dataclass(frozen=True)
class Side:
    """One side of a Gram: inputs to be visited, or factors that are kept."""

    x: Tensor
    outputs: Tensor | None = None
    factors: Factors | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def needs_graph(self) -> bool:
        """Whether results must be differentiable with respect to these inputs."""
        return self.factors is None and torch.is_grad_enabled() and self.x.requires_grad

    def num_outputs(self, lin: LinearizedNetwork) -> int:
        """K, the outputs that every input has."""
        return lin.num_outputs if self.outputs is None else 1


class Engine:
    """Computes Gram blocks of one network.

    :param lin: the network.
    """

    def __init__(self, lin: LinearizedNetwork) -> None:
        self._lin = lin
        self.plan = Plan(lin)
        # Choosing takes longer than a small Gram. What has been chosen holds for one state of the plan.
        self._chosen: dict[tuple[Block, str | None, int, int], tuple[Slot, ...]] = {}

    def _again(self, compute: Callable[[], S]) -> S:
        """Run, and run again without the rules of parameters that turn out not to go by them."""
        while True:
            try:
                with torch.autocast(self._lin.frozen.device.type, enabled=False):
                    return compute()
            except Deviation as deviation:
                self.plan.distrust(deviation.names)

    def way(self, slot: Slot, block: Block, force: str | None = None) -> str:
        """How a slot is contracted."""
        if not slot.factored:
            return "rows"
        shape = self.plan.known[slot.names[0]]
        bias = len(slot.names) > 1
        return force if force in ways(shape, block, bias) else choose(shape, block, bias)

    def slots(self, block: Block, force: str | None = None) -> tuple[Slot, ...]:
        """Slots of all parameters; layers that are contracted by rows are kept as rows where these are the smaller.

        Rows are then formed a slice at a time, which is cheap, and memory that is never touched is cheaper still.
        """
        key = block, force, len(self.plan.shapes), id(self._lin.groups)
        if key not in self._chosen:
            dense: set[str] = set()
            for slot in arrange(self._lin, self.plan, set()):
                if slot.factored and self.way(slot, block, force) == "rows":
                    shape = self.plan.shapes[slot.names[0]]
                    k = min(block.k1, block.k2)
                    if shape.kind == "outer" and k * shape.columns <= shape.kept[0] + k * shape.kept[1]:
                        dense.update(slot.names)
            if len(self._chosen) >= _MOST_CHOSEN:
                self._chosen.pop(next(iter(self._chosen)))
            self._chosen[key] = arrange(self._lin, self.plan, dense)
        return self._chosen[key]

    def kept_slots(self, factors: Factors) -> tuple[Slot, ...]:
        """The slots of factors that were kept before.

        :raises ValueError: they are those of another network, or of other groups.
        """
        ours = set(zip(self._lin.frozen.theta, self._lin.groups.of_tensor, strict=True))
        theirs = {(name, slot.group) for slot in factors.slots for name in slot.names}
        if ours != theirs or any(slot.factored and slot.names[0] not in self.plan.known for slot in factors.slots):
            raise ValueError("factors: made by another network, or with other groups")
        return factors.slots

    def shape_of(self, slot: Slot) -> Shape:
        """Sizes of what a slot contributes."""
        if slot.factored:
            return self.plan.known[slot.names[0]]
        columns = sum(self._lin.frozen.theta[name].numel() for name in slot.names)
        return Shape("rows", 1, 1, columns, 1, (0, columns))

    def features(self, x: Tensor, v: Tensor, budget: int, per_group: bool) -> Tensor:
        """Products J V."""
        return self._again(lambda: features(self._lin, x, v, budget, per_group))

    def factors(self, x: Tensor, outputs: Tensor | None, budget: int) -> Factors:
        """Factors of all rows of x, in the smaller form of each layer."""
        return self._again(lambda: self._factors(x, outputs, budget))

    def _factors(self, x: Tensor, outputs: Tensor | None, budget: int) -> Factors:
        lin, k = self._lin, self._lin.num_outputs if outputs is None else 1
        c = lin.num_outputs
        if outputs is not None and (outputs.dtype == torch.bool or bool(((outputs < 0) | (outputs >= c)).any())):
            raise ValueError(f"outputs: expected indices from 0 to {c - 1}, got {outputs.tolist()}")
        slots = self.slots(Block.of(len(x), len(x), k, k, True))
        kept = len(x) * kept_bytes(lin, self.plan, slots, k)
        smallest = kept + pass_bytes(lin, self.plan, k)
        if smallest > budget:
            raise ValueError(
                f"max_memory: {format_memory(budget)} is too small for the factors of {len(x)} inputs; "
                f"the smallest possible is {format_memory(smallest)}"
            )
        return build(lin, self.plan, x, slots, budget - kept, outputs)

    def factors_like(self, x: Tensor, kept: Factors, budget: int) -> Factors:
        """Factors of all rows of x in the forms of others, so that products of the two need no change of form."""
        return self._again(lambda: build(self._lin, self.plan, x, self.kept_slots(kept), budget))

    def factors_memory(self, num_rows: int, num_outputs: int | None = None) -> int:
        """Smallest budget of `factors`, of all outputs or of so many."""
        lin, k = self._lin, num_outputs or self._lin.num_outputs
        slots = self.slots(Block.of(num_rows, num_rows, k, k, True))
        return num_rows * kept_bytes(lin, self.plan, slots, k) + pass_bytes(lin, self.plan, k)

    def fill(
        self, left: Side, right: Side | None, budget: int, dtype: torch.dtype,
        write: Callable[[int, slice, slice], Tensor], start: Callable[[], None],
        weights: Sequence[float] | None = None, progress: bool = False, force: str | None = None,
    ) -> None:  # fmt: skip
        """Add all blocks of a Gram to where ``write(g, rows, columns)`` points.

        Of a symmetric Gram (``right`` is None) blocks on and below the diagonal are written, and of those on the
        diagonal the entries up to it.

        :param budget: bytes for everything but the result.
        :param start: called before the first block, perhaps more than once.
        :param weights: one factor per group; all groups then go to ``write(0, ...)``.
        """

        def run() -> None:
            start()
            blocks = _Blocks(self, left, right, budget, force)
            with tqdm(total=blocks.count, desc="Gram", disable=not progress) as bar:
                for rows, a, columns, b in blocks:
                    self._add(write, rows, a, columns, b, right is None, dtype, weights, blocks, force)
                    bar.update()

        self._again(run)

    def _add(
        self, write: Callable[[int, slice, slice], Tensor], rows: slice, a: Factors, columns: slice, b: Factors,
        symmetric: bool, dtype: torch.dtype, weights: Sequence[float] | None, blocks: _Blocks, force: str | None,
    ) -> None:  # fmt: skip
        diagonal = symmetric and a is b
        for slot, left, right in pairs(self._lin, a, b):
            out = write(0 if weights is not None else slot.group, rows, columns)
            target = Target(out, 1.0 if weights is None else weights[slot.group], diagonal, blocks.workspace)
            # One way for all blocks: the ways round differently, and a mixture is no Gram of anything.
            way = self.way(slot, blocks.typical, force)
            if way == "product" and _single(left) and _single(right):
                add_product(target, left, right)
            elif way == "positions" and isinstance(left, Outer | Lookup) and isinstance(right, Outer | Lookup):
                add_positions(target, left, right)
            else:
                add_rows(target, left, right)

    def gram_memory(self, n1: int, n2: int, graph: bool) -> int:
        """Smallest budget of all groups' Grams between so many inputs, these included."""
        lin, k = self._lin, self._lin.num_outputs
        result = 8 * len(lin.groups) * n1 * n2 * k * k
        slots = self.slots(Block.of(n1, n2, k, k, False))
        per_row, passes = kept_bytes(lin, self.plan, slots, k), pass_bytes(lin, self.plan, k)
        if graph:
            # Factors, their copies in float64, and what the chains keep for their own derivatives.
            return 3 * result + (n1 + n2) * (4 * per_row + passes)
        return result + _LEAST_WORKSPACE + passes + 2 * (per_row + self.transient_bytes(slots, k)) + 24 * n2 * k * k

    def transient_bytes(self, slots: Sequence[Slot], num_outputs: int) -> int:
        """Bytes per row of what is unfolded and cast while one slot is contracted."""
        sizes = [0]
        for slot in slots:
            if slot.factored:
                shape = self.plan.known[slot.names[0]]
                seen = shape.blocks * shape.fan_in * shape.positions if shape.kind == "outer" else 0
                sizes.append(2 * 8 * (seen + num_outputs * shape.blocks * shape.fan_out * shape.positions))
        return max(sizes)

    def smallest_budget(self, left: Side, right: Side | None, force: str | None = None) -> int:
        """Bytes besides the result without which not even one row at a time can be handled."""
        return _Blocks(self, left, right, 2**62, force).smallest

    def graph(self, left: Side, right: Side | None, dtype: torch.dtype) -> list[Tensor | None]:
        """Gram of each group as a tensor with a graph to the inputs."""
        return self._again(lambda: self._graph(left, right, lambda a, b: matrix(a, b, dtype)))

    def pointwise_graph(self, left: Side, right: Side | None, dtype: torch.dtype) -> list[Tensor | None]:
        """Blocks J_n J'_nᵀ of each group with a graph to the inputs, (N, C, C)."""
        return self._again(
            lambda: self._graph(left, right, lambda a, b: pointwise(a, b, dtype, False, _MOST_WORKSPACE))
        )

    def _graph(self, left: Side, right: Side | None, product: Callable[[Term, Term], Tensor]) -> list[Tensor | None]:
        lin, k = self._lin, self._lin.num_outputs
        block = Block.of(len(left), len(left if right is None else right), k, k, right is None)
        given = [side.factors for side in (left, right) if side is not None and side.factors is not None]
        slots = self.kept_slots(given[0]) if given else self.slots(block)

        def visit(side: Side) -> Factors:
            if side.factors is not None:
                return side.factors
            return build(lin, self.plan, side.x, slots, 2**62, side.outputs, keep_graph=True)

        a = visit(left)
        b = a if right is None else visit(right)
        totals: list[Tensor | None] = [None] * len(lin.groups)
        for slot, one, two in pairs(lin, a, b):
            term, previous = product(one, two), totals[slot.group]
            totals[slot.group] = term if previous is None else previous + term
        return totals

    def pointwise(self, left: Side, right: Side | None, budget: int, out: Tensor) -> None:
        """Write the blocks J_n J'_nᵀ of each group to out (G, N, C, C)."""
        if right is not None and len(left) != len(right):
            raise ValueError(f"x2: expected one input for each of the {len(left)} of x, got {len(right)}")
        a = left.factors
        b = a if right is None else right.factors
        if a is not None and b is not None:
            self._add_pointwise(a, b, budget, out.zero_())
            return
        self._again(lambda: self._pointwise(left.x, None if right is None else right.x, budget, out))

    def _pointwise_row(self, sides: int) -> int:
        """Bytes of one input on the way to its blocks."""
        lin, k = self._lin, self._lin.num_outputs
        slots = arrange(lin, self.plan, set())
        per_row = kept_bytes(lin, self.plan, slots, k) + self.transient_bytes(slots, k)
        return sides * per_row + pass_bytes(lin, self.plan, k)

    def diagonals_memory(self, num_rows: int, sides: int, dtype: torch.dtype = torch.float64) -> int:
        """Smallest budget of `pointwise`, its result included."""
        result = len(self._lin.groups) * num_rows * self._lin.num_outputs**2 * dtype.itemsize
        return result + self._pointwise_row(sides) + _LEAST_WORKSPACE

    def _add_pointwise(self, a: Factors, b: Factors, budget: int, out: Tensor) -> None:
        """Add the blocks of all slots to out (G, N, C, C)."""
        for slot, left, right in pairs(self._lin, a, b):
            shape = self.plan.shapes.get(slot.names[0])
            short = slot.factored and shape is not None and _positions_pay(shape, out.shape[-1])
            out[slot.group] += pointwise(left, right, out.dtype, short, _workspace(budget))

    def _pointwise(self, x1: Tensor, x2: Tensor | None, budget: int, out: Tensor) -> None:
        lin, slots = self._lin, arrange(self._lin, self.plan, set())
        per_row = self._pointwise_row(1 if x2 is None else 2)
        budget -= out.numel() * out.element_size()
        workspace = max(_LEAST_WORKSPACE, min(_workspace(budget), budget - per_row))
        step = max(1, min(budget - workspace, _POINTWISE_BYTES) // per_row)
        out.zero_()
        for start in range(0, len(x1), step):
            rows = slice(start, min(start + step, len(x1)))
            a = build(lin, self.plan, x1[rows], slots, budget - workspace)
            b = a if x2 is None else build(lin, self.plan, x2[rows], slots, budget - workspace)
            self._add_pointwise(a, b, budget, out[:, rows])


def _single(term: Term) -> TypeGuard[Outer]:
    """Whether a layer was applied once to every sample: where this depends on the data, the plan cannot tell."""
    return isinstance(term, Outer) and term.right().shape[-1] == 1


def _positions_pay(shape: Shape, k: int) -> bool:
    """Whether a block of one sample is cheaper from T × T Grams than from rows."""
    t, i, o = shape.positions, shape.fan_in, shape.fan_out
    return shape.kind == "outer" and 4 * t * (t * i + k * o * (t + k)) < k * t * o * i + k * k * o * i


def _workspace(budget: int) -> int:
    return max(_LEAST_WORKSPACE, min(_MOST_WORKSPACE, budget // 4))


class _Blocks:
    """Pairs of row blocks in an order in which one of the two need not be visited again."""

    def __init__(self, engine: Engine, left: Side, right: Side | None, budget: int, force: str | None) -> None:
        self._engine, self._left, self._right = engine, left, right
        lin, plan = engine._lin, engine.plan
        other = left if right is None else right
        k1, k2 = left.num_outputs(lin), other.num_outputs(lin)
        sizes = Block.of(len(left), len(other), k1, k2, right is None)
        self.workspace = _workspace(budget)
        given = [side.factors for side in (left, right) if side is not None and side.factors is not None]
        passes = 0 if len(given) == (1 if right is None else 2) else pass_bytes(lin, plan, max(k1, k2))
        rest = budget - self.workspace
        rows = len(left) * (left.factors is None) + len(other) * (right is not None and other.factors is None)
        self._slots = engine.kept_slots(given[0]) if given else engine.slots(sizes, force)
        kept = kept_bytes(lin, plan, self._slots, max(k1, k2))
        # What is kept is not counted, but it is unfolded and cast as well: it is cut where that would not fit.
        unfolded = max(engine.transient_bytes(factors.slots, max(k1, k2)) for factors in given) if given else 0
        per_row = kept + engine.transient_bytes(self._slots, max(k1, k2))
        spread = unfolded * sum(len(factors) for factors in given)
        whole = rows * per_row + spread + passes <= rest
        self.smallest = _LEAST_WORKSPACE + passes + 2 * per_row + 24 * len(other) * k1 * k2
        step = max(1, (rest - passes) // (2 * per_row))
        steps = [
            len(side) if whole else step if side.factors is None else max(1, (rest - passes) // max(1, 2 * unfolded))
            for side in (left, other)
        ]
        held = rows if whole else 2 * min(step, max(len(left), len(other)))
        self._passes = max(passes, rest - held * per_row)
        self._rows, self._columns = _cut(len(left), steps[0]), _cut(len(other), steps[1])
        n1, n2 = (min(step, len(side)) for step, side in zip(steps, (left, other), strict=True))
        self.typical = Block.of(n1, n2, k1, k2, right is None and len(self._rows) == 1)
        self.count = sum(1 for i in range(len(self._rows)) for _ in self._partners(i))

    def _partners(self, i: int) -> list[slice]:
        partners = self._columns[: i + 1] if self._right is None else self._columns
        # Even rows of blocks run backwards, odd ones forwards: the block at a turn need not be computed again.
        return partners[:: -1 if i % 2 == 0 else 1]

    def _block(self, side: Side, rows: slice) -> Factors:
        if side.factors is not None:
            return side.factors.block(rows)
        outputs = None if side.outputs is None else side.outputs[rows]
        engine = self._engine
        return build(engine._lin, engine.plan, side.x[rows], self._slots, self._passes, outputs)

    def __iter__(self) -> Iterator[tuple[slice, Factors, slice, Factors]]:
        if self._right is not None and self._left.factors is not None and self._right.factors is None:
            for columns in self._columns:
                b = self._block(self._right, columns)
                for rows in self._rows:
                    yield rows, self._left.factors.block(rows), columns, b
            return
        other = self._left if self._right is None else self._right
        held: tuple[slice, Factors] | None = None
        for i, rows in enumerate(self._rows):
            a = held[1] if self._right is None and held is not None and held[0] == rows else None
            a = self._block(self._left, rows) if a is None else a
            for columns in self._partners(i):
                if self._right is None and columns == rows:
                    b = a
                elif held is not None and held[0] == columns:
                    b = held[1]
                else:
                    held = None
                    b = self._block(other, columns)
                held = columns, b
                yield rows, a, columns, b


def _cut(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
