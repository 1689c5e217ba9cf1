"""Jacobian rows of few inputs, some outputs of some weights at a time: never all rows of an input at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ntkgp.baselines.laplace.capture import places
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.grams.factors import (
    Deviation,
    Factors,
    Slot,
    arrange,
    build,
    interleaved,
    kept_bytes,
    pass_bytes,
)
from ntkgp.linearization.rules.terms import Rows, Term

# Copies of a piece of rows while two of them are multiplied: both, what the second is made of, and its rotation.
_COPIES = 5
# Pieces gain nothing from being larger than this.
_MOST_BYTES = 2**24
# Weights without a rule that are formed together at the least.
_LEAST = 2**13


@dataclass(frozen=True)
class Block:
    """Weights whose rows are formed together.

    :ivar columns: their places in ``lin.theta``, in the order of the rows.
    :ivar form: outputs -> rows in float64, (B, c, ·).
    """

    columns: Tensor
    form: Callable[[slice], Tensor]


class Pieces:
    """What the layers saw and what came back to them at some inputs, from which rows are formed.

    :param white: (B, C, R): Sᵀ J is formed for J, R rows for C.
    """

    def __init__(self, lin: LinearizedNetwork, factors: Factors, white: Tensor | None = None) -> None:
        self._lin, self._factors, self._white = lin, factors, white
        self.num_rows = lin.num_outputs if white is None else white.shape[-1]

    def blocks(self, names: frozenset[str] | None = None) -> Iterator[Block]:
        """Blocks of all weights, or of tensors of these names."""
        where = places(self._lin)
        for slot, term in zip(self._factors.slots, self._factors.terms, strict=True):
            wanted = [name for name in slot.names if names is None or name in names]
            if isinstance(term, Rows):
                for name, part in zip(slot.names, self._split(slot, term.rows), strict=True):
                    if name in wanted:
                        yield from self._rows_in_parts(where[name], part)
            elif len(wanted) < len(slot.names):
                # A weight may be of another block than the bias it shares its factors with.
                for name in wanted:
                    yield Block(where[name], partial(self._named, name))
            else:
                columns = where[slot.names[0]]
                if len(slot.names) == 2:
                    columns = interleaved(columns, where[slot.names[1]])
                yield Block(columns, partial(self._dense, term))

    def _split(self, slot: Slot, rows: Tensor) -> Sequence[Tensor]:
        """Rows of each parameter of a slot; those of a weight and its bias are interleaved, as their factors are."""
        sizes = [self._lin.frozen.theta[name].numel() for name in slot.names]
        if slot.factored and len(sizes) == 2:
            table = rows.unflatten(-1, (sizes[1], -1))
            return table[..., :-1].flatten(2), table[..., -1]
        return rows.split(sizes, dim=-1)

    def _rows_in_parts(self, columns: Tensor, rows: Tensor) -> Iterator[Block]:
        width = largest_block(self._lin)
        for place, part in zip(columns.split(width), rows.split(width, dim=-1), strict=True):
            # A copy, also of float64: the blocks of others are made anew each time, and are changed in place.
            yield Block(place, partial(self._copied, Rows(part)))

    def _copied(self, term: Term, outputs: slice) -> Tensor:
        return self._dense(term, outputs).clone()

    def _dense(self, term: Term, outputs: slice) -> Tensor:
        *given, back = term.tensors()
        if self._white is None:
            back = back[:, outputs].double()
        else:
            mixed = self._white[:, :, outputs].mT @ back.double().flatten(2)
            back = mixed.unflatten(2, back.shape[2:])
        given = [t.double() if t.is_floating_point() else t for t in given]
        return term.with_tensors([*given, back]).dense()

    def of_layer(self, names: Sequence[str], outputs: slice) -> Tensor:
        """Rows (B, c, O·I) of a layer's weight, or (B, c, O·(I + 1)) with its bias as last input."""
        for slot, term in zip(self._factors.slots, self._factors.terms, strict=True):
            if slot.names == tuple(names) and not isinstance(term, Rows):
                return self._dense(term, outputs)
        parts = [self._named(name, outputs) for name in names]
        return interleaved(*parts) if len(parts) == 2 else parts[0]

    def _named(self, name: str, outputs: slice) -> Tensor:
        for slot, term in zip(self._factors.slots, self._factors.terms, strict=True):
            if name not in slot.names:
                continue
            place = slot.names.index(name)
            if isinstance(term, Rows):
                return self._dense(Rows(self._split(slot, term.rows)[place]), outputs)
            return self._split(slot, self._dense(term, outputs))[place]
        raise KeyError(name)


def largest_block(lin: LinearizedNetwork) -> int:
    """Weights of the largest block: those of the largest tensor that goes by a rule, at least some thousands."""
    plan = lin.engine.plan
    sizes = [
        lin.frozen.theta[name].numel() for slot in arrange(lin, plan, set()) if slot.factored for name in slot.names
    ]
    return max([_LEAST, *sizes])


def _transient(lin: LinearizedNetwork) -> int:
    """Bytes per input of what is unfolded, cast and whitened of one tensor's factors."""
    slots = arrange(lin, lin.engine.plan, set())
    back = 8 * lin.num_outputs * min(largest_block(lin), lin.num_parameters)
    return lin.engine.transient_bytes(slots, lin.num_outputs) + (0 if any(s.factored for s in slots) else back)


def pass_room(lin: LinearizedNetwork) -> int:
    """Bytes of a pass of one input, its factors and what is made of them."""
    plan = lin.engine.plan
    passes = max(4 * lin.activation_bytes, pass_bytes(lin, plan, lin.num_outputs))
    return passes + kept_bytes(lin, plan, arrange(lin, plan, set()), lin.num_outputs) + _transient(lin)


def smallest_room(lin: LinearizedNetwork) -> int:
    """Bytes without which not even one input can be handled in pieces."""
    return pass_room(lin) + _COPIES * 8 * min(largest_block(lin), lin.num_parameters)


def row_pieces(
    lin: LinearizedNetwork, x: Tensor, room: int, white: Callable[[slice], Tensor] | None = None, extra: int = 0
) -> Iterator[tuple[slice, int, Pieces]]:
    """Chunks of inputs, how many outputs may be formed at a time, and the pieces.

    :param room: bytes: a quarter for passes, the rest for factors and rows.
    :param white: S of some inputs, see :class:`Pieces`.
    :param extra: bytes that the caller makes of one input.
    """
    c, width = lin.num_outputs, min(largest_block(lin), lin.num_parameters)
    per_input = kept_bytes(lin, lin.engine.plan, arrange(lin, lin.engine.plan, set()), c) + _transient(lin) + extra
    piece = _COPIES * 8 * width
    # All outputs of one input before more inputs: pairs of outputs in different pieces are formed again.
    outputs = max(1, min(c, room // 4 // piece))
    formed = min(room // 4, max(_MOST_BYTES, outputs * piece))
    step = max(1, min(room // 4 // per_input, formed // (outputs * piece)))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        yield rows, outputs, Pieces(lin, _factors(lin, x[rows], room // 4), None if white is None else white(rows))


def _factors(lin: LinearizedNetwork, x: Tensor, budget: int) -> Factors:
    while True:
        try:
            return build(lin, lin.engine.plan, x, arrange(lin, lin.engine.plan, set()), budget)
        except Deviation as deviation:
            lin.engine.plan.distrust(deviation.names)


def cut(size: int, step: int) -> list[slice]:
    """Slices of at most `step`."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def add_products(out: Tensor, size: int, step: int, root: Callable[[slice], Tensor]) -> None:
    """Add R Rᵀ to out (B, C, C), R (B, C, ·) formed `step` outputs at a time."""
    for i, rows in enumerate(parts := cut(size, step)):
        left = root(rows)
        out[:, rows, rows] += left @ left.mT
        for columns in parts[:i]:
            product = left @ root(columns).mT
            out[:, rows, columns] += product
            out[:, columns, rows] += product.mT
