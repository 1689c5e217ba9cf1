r"""Sums over many processes with the same bits for any number of them: virtual shards and ordered reductions.

Data are cut into shards whose number does not depend on the number W of processes; rank r owns the shards s with
s mod W = r. What is computed of a shard is then the same whoever computes it, and sums are taken in the order of the
shards, on every rank alike: :math:`((0 + p_0) + p_1) + \dots`. With the sum of ``torch.distributed.all_reduce``, whose
order depends on W, conjugate gradients that have not converged differ in the third digit (law E1n).

Everything works without a process group too, as one process that owns all shards. With one, the passes of the library
share their work among all ranks, so all of them must make the same calls; :func:`alone` is for what one rank does by
itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_GATHERED = 2**24  # bytes of all parts together up to which one collective call is made of them
# Shards of a pass over the data, and batches in a shard where the length of the pass is not known.
_SHARDS = 64
_STREAMED = 8
_ALONE: ContextVar[bool] = ContextVar("ntkgp_alone", default=False)


def world_size() -> int:
    """W, the number of processes; 1 without a process group, and within :func:`alone`."""
    return dist.get_world_size() if grouped() else 1


def rank() -> int:
    """Number of this process; 0 without a process group, and within :func:`alone`."""
    return dist.get_rank() if grouped() else 0


class LostProcess(RuntimeError):
    """Another process of the group has ended, or has not answered within the group's time limit."""


def _asked(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A call to all processes; an error that says what to do where one of them is gone."""
    try:
        return call(*args, **options)
    except RuntimeError as reason:
        raise LostProcess(
            f"distributed: rank {dist.get_rank()} gets no answer from another process, which has ended or taken longer "
            f"than the group's timeout ({reason}); start all processes again: what has a checkpoint goes on from its "
            "last state"
        ) from reason


def grouped() -> bool:
    """Whether there are processes to share work with, be it a group of one."""
    return dist.is_available() and dist.is_initialized() and not _ALONE.get()


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process works by itself, as without a process group: for what not all ranks do, or not alike.

    >>> with alone():
    ...     print(world_size())
    1
    """
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


@dataclass(frozen=True)
class Shards:
    """A cut of N rows into S parts of nearly the same size, the same for any number of processes.

    :param num_rows: N >= 1.
    :param count: S; no more than N.
    :raises ValueError: no rows, or no shards.

    >>> shards = Shards(10, 4)
    >>> [shards.bounds(s) for s in range(shards.count)], shards.own()
    ([(0, 3), (3, 6), (6, 8), (8, 10)], [0, 1, 2, 3])
    """

    num_rows: int
    count: int = 64

    def __post_init__(self) -> None:
        for name in ("num_rows", "count"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        object.__setattr__(self, "count", min(self.count, self.num_rows))

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the one after its last."""
        if not 0 <= shard < self.count:
            raise ValueError(f"shard: expected a number in 0 ... {self.count - 1}, got {shard!r}")
        size, larger = divmod(self.num_rows, self.count)
        start = shard * size + min(shard, larger)
        return start, start + size + (shard < larger)

    def rows(self, x: Tensor, shard: int) -> Tensor:
        """The rows of a shard, of N rows."""
        if len(x) != self.num_rows:
            raise ValueError(f"x: expected N = {self.num_rows} rows, got {len(x)}")
        return x[slice(*self.bounds(shard))]

    def owner(self, shard: int) -> int:
        """The rank that computes what is asked of a shard."""
        return shard % world_size()

    def own(self) -> list[int]:
        """The shards of this process."""
        return list(range(rank(), self.count, world_size()))


def ordered_sum(partials: Mapping[int, Tensor], shards: Shards, fast: bool = False) -> Tensor:
    """Sum of one tensor per shard, in the order of the shards: the same bits on every rank, and for every W.

    :param partials: the tensors of this process's shards, by shard, all of one shape, dtype and device.
    :param shards: the cut.
    :param fast: add the sums of the processes by ``all_reduce`` instead; they depend on W by rounding.
    :return: the sum, on every rank.
    :raises ValueError: other shards than those of this process.

    Cost: traffic S·|x|; memory S·|x| up to 16 MiB, above that |x|, one shard at a time. ``fast``: |x| each.

    >>> ordered_sum({s: torch.tensor(float(s)) for s in range(4)}, Shards(8, 4))
    tensor(6.)
    """
    _check_own(partials, shards)
    if fast and world_size() > 1:
        if shards.count < world_size():
            raise ValueError(
                f"shards: {shards.count} are fewer than the {world_size()} processes, which fast=True needs"
            )
        total = _fold([partials[s] for s in shards.own()])
        wire = on_wire(total)
        _asked(dist.all_reduce, wire)
        return wire.to(total.device)
    return _fold(_each(partials, shards))


def gather_rows(parts: Mapping[int, Tensor], shards: Shards) -> Tensor:
    """The rows that the shards have, joined in their order, on every rank.

    :param parts: the rows of this process's shards, by shard, as many as :meth:`Shards.bounds` says.
    :return: N rows.
    :raises ValueError: other shards, or other numbers of rows.

    >>> x = torch.arange(6.0)
    >>> gather_rows({s: 2 * Shards(6, 4).rows(x, s) for s in range(4)}, Shards(6, 4))
    tensor([ 0.,  2.,  4.,  6.,  8., 10.])
    """
    _check_own(parts, shards)
    sizes = [stop - start for start, stop in map(shards.bounds, range(shards.count))]
    for s, part in parts.items():
        if len(part) != sizes[s]:
            raise ValueError(f"parts: shard {s} has {sizes[s]} rows, got {len(part)}")
    # All parts of one shape, for the collective call: shards differ by one row at most.
    padded = {s: part if len(part) == sizes[0] else torch.cat([part, part[:1]]) for s, part in parts.items()}
    return torch.cat([part[:size] for part, size in zip(_each(padded, shards), sizes, strict=True)])


def symmetric_tiles(compute: Callable[[int, int], Tensor], shards: Shards, width: int = 1) -> Tensor:
    """A symmetric matrix made of its tiles on and above the diagonal, each computed by one process.

    :param compute: the tile of two shards s <= t, (n_s·width, n_t·width); symmetric for s = t.
    :param shards: the cut of the rows.
    :param width: rows of the matrix per row of the data, C.
    :return: the matrix on every rank, (N·width, N·width). Not for more than about 20,000 rows.

    Cost: S(S + 1)/2 tiles; traffic that of half of the matrix.

    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> cut = Shards(3, 2)
    >>> symmetric_tiles(lambda s, t: cut.rows(x, s) @ cut.rows(x, t).mT, cut)
    tensor([[1., 2., 3.],
            [2., 4., 6.],
            [3., 6., 9.]])
    """
    ranges = [tuple(width * b for b in shards.bounds(s)) for s in range(shards.count)]
    out: Tensor | None = None
    pairs = [(s, t) for s in range(shards.count) for t in range(s, shards.count)]
    for index, tile in computed_in_turn(len(pairs), lambda index: compute(*pairs[index])):
        if out is None:
            out = tile.new_zeros(width * shards.num_rows, width * shards.num_rows)
        (a, b), (c, d) = (ranges[shard] for shard in pairs[index])
        out[a:b, c:d], out[c:d, a:b] = tile, tile.mT
    assert out is not None
    return out


def computed_in_turn(count: int, compute: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Tensors 0 … count − 1 with their numbers, on every rank, each computed by one, W of them at a time.

    :param compute: within it the process is :func:`alone`.

    >>> list(computed_in_turn(2, torch.tensor))
    [(0, tensor(0)), (1, tensor(1))]
    """
    for start in range(0, count, world_size()):
        own, value = start + rank(), None
        if own < count:
            with alone():
                value = compute(own)
        for index in range(start, min(start + world_size(), count)):
            yield index, broadcast(value if index == own else None, index - start)


def broadcast(value: Tensor | None, source: int) -> Tensor:
    """A tensor of one rank on all of them.

    :param value: the tensor on the rank `source`; elsewhere None.
    """
    if world_size() == 1:
        assert value is not None
        return value
    about: list[Any] = [None if value is None else (tuple(value.shape), value.dtype, value.device.type)]
    _asked(dist.broadcast_object_list, about, src=source)
    shape, dtype, kind = about[0]
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    found = torch.empty(shape, dtype=dtype, device=device) if value is None else value.contiguous()
    wire = on_wire(found)
    _asked(dist.broadcast, wire, src=source)
    return wire.to(device)


def broadcast_object(value: T, source: int = 0) -> T:
    """What one rank has, on all of them: anything that has a pickle."""
    if world_size() == 1:
        return value
    held: list[Any] = [value if rank() == source else None]
    _asked(dist.broadcast_object_list, held, src=source)
    return held[0]


def gather_objects(value: T) -> list[T]:
    """What each rank has, in their order, on all of them: anything that has a pickle."""
    if world_size() == 1:
        return [value]
    held: list[Any] = [None] * world_size()
    _asked(dist.all_gather_object, held, value)
    return held


def gather_numbers(*values: int) -> list[tuple[int, ...]]:
    """A few integers of each rank, in their order, on all of them."""
    if world_size() == 1:
        return [values]
    own = on_wire(torch.tensor(values))
    found = [torch.empty_like(own) for _ in range(world_size())]
    _asked(dist.all_gather, found, own)
    return [tuple(row.tolist()) for row in found]


def combined(value: Tensor) -> Tensor:
    """Entry by entry, what the one rank has that has it: on all others the entry is zero."""
    if world_size() == 1:
        return value
    # Zeros can be added in any order.
    wire = on_wire(value).clone()
    _asked(dist.all_reduce, wire)
    return wire.to(value.device)


def smallest(value: Tensor) -> Tensor:
    """Entry by entry, the smallest of all ranks."""
    if world_size() == 1:
        return value
    wire = on_wire(value).clone()
    _asked(dist.all_reduce, wire, op=dist.ReduceOp.MIN)
    return wire.to(value.device)


def checksum(before: int, *tensors: Tensor) -> int:
    """CRC-32 of the bytes of tensors, continued."""
    for tensor in tensors:
        before = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, before)
    return before


def on_wire(value: Tensor) -> Tensor:
    """A tensor on a device between which the process group sends: itself where it is on one."""
    backends = dict(part.split(":") for part in dist.get_backend_config().split(","))
    kind = value.device.type
    # Of CUDA tensors gloo knows some of the calls only.
    if kind in backends and not (kind != "cpu" and backends[kind] == "gloo"):
        return value
    return value.cpu() if "cpu" in backends else value.cuda()


class OrderedFold:
    r"""A sum over shards that come in rounds of one per process: :math:`((t + p_0) + p_1) + \dots`, for any W.

    In a round each process sends every other one its share of the numbers, and adds those of its own share in the order
    of the ranks.

    :param start: t, a vector of n numbers; may be changed.

    Cost of a round: traffic n per process, memory 2n; of :meth:`total`: n each.

    >>> fold = OrderedFold(torch.zeros(2))
    >>> fold.add([torch.ones(2), torch.ones(2)])
    >>> fold.total()
    tensor([2., 2.])
    """

    def __init__(self, start: Tensor) -> None:
        self._size, self._worlds = start.numel(), world_size()
        self._own = start if self._worlds == 1 else self._padded(start).view(self._worlds, -1)[rank()].clone()

    def _padded(self, vector: Tensor) -> Tensor:
        """With as many numbers for every process."""
        missing = -self._size % self._worlds
        return torch.cat([vector, vector.new_zeros(missing)]) if missing else vector.contiguous()

    def add(self, parts: Sequence[Tensor], last: int | None = None) -> None:
        """Some rounds at once.

        :param parts: of this process, one for each round.
        :param last: ranks that take part in the last round; what the others give is left out. All by default.
        """
        if self._worlds == 1:
            for part in parts:
                self._own += part
            return
        sent = on_wire(torch.stack([self._padded(part).view(self._worlds, -1) for part in parts], 1))
        received = torch.empty_like(sent)
        _asked(dist.all_to_all_single, received, sent)
        received = received.to(self._own.device)
        for number in range(len(parts)):
            for row in received[: last if number == len(parts) - 1 else None, number]:
                self._own += row

    def total(self) -> Tensor:
        """The sum so far, on every rank."""
        if self._worlds == 1:
            return self._own
        own = on_wire(self._own)
        parts = [torch.empty_like(own) for _ in range(self._worlds)]
        _asked(dist.all_gather, parts, own)
        return torch.cat(parts)[: self._size].to(self._own.device)


class Turns:
    """Whose turn it is in a pass over batches: runs of batches are the shards, dealt in rounds of one per process.

    The length of a run depends on the number of batches alone, where that is known: there are about 64 shards.

    :param batches: what is passed over; all ranks have the same.
    :param first: number of the first shard, where a pass goes on that was cut short; rank 0 has it.

    >>> turns = Turns([10, 20, 30])
    >>> [(turns.shard(i), turns.mine(i), turns.closes(i)) for i in range(3)]
    [(0, True, True), (1, True, True), (2, True, True)]
    """

    def __init__(self, batches: Iterable[Any], first: int = 0) -> None:
        try:
            known = len(batches) if isinstance(batches, Sized) else None
        except TypeError:  # a stream of data
            known = None
        self.length = _STREAMED if known is None else max(1, -(-known // _SHARDS))
        self.first, self._worlds, self._rank = first, world_size(), rank()

    def shard(self, index: int) -> int:
        """Of a batch."""
        return index // self.length

    def mine(self, index: int) -> bool:
        """Whether this process has the batch."""
        return (self.shard(index) - self.first) % self._worlds == self._rank

    def closes(self, index: int) -> bool:
        """Whether a round of shards ends with this batch."""
        return (index + 1) % self.length == 0 and self.count(index) == self._worlds

    def count(self, index: int) -> int:
        """Shards begun in the round of this batch, the batch's own included."""
        return (self.shard(index) - self.first) % self._worlds + 1


def sum_over_batches(
    batches: Iterable[T], visit: Callable[[T], Tensor], like: Tensor, turns: Turns | None = None
) -> Tensor:
    """Sum of what `visit` returns, over all batches, each of which one process visits; the same bits for every W.

    :param batches: the same on all ranks; those of others are not looked at.
    :param visit: a tensor of the shape of `like`. Within it the process is :func:`alone`.
    :param like: its shape, dtype and device.
    :param turns: where `batches` has no length, those of what it goes through.

    Cost: that of the visits, and S·n numbers over the wire for n in the sum and S <= 64 shards.

    >>> sum_over_batches([1.0, 2.0, 3.0], torch.tensor, torch.tensor(0.0))
    tensor(6.)
    """
    turns, fold = turns or Turns(batches), OrderedFold(torch.zeros_like(like).flatten())
    # What is small waits for others: a call to all processes takes its time however little it carries.
    held = 1 if world_size() == 1 else max(1, _GATHERED // (like.numel() * like.element_size()))
    parts: list[Tensor] = []
    index, begun = -1, True
    for index, batch in enumerate(batches):
        if begun:
            parts.append(torch.zeros_like(like).flatten())
        if turns.mine(index):
            with alone():
                parts[-1] += visit(batch).flatten()
        begun = turns.closes(index)
        if begun and len(parts) >= held:
            fold.add(parts)
            parts = []
    if parts:
        fold.add(parts, turns.count(index))
    return fold.total().view_as(like)


def _check_own(parts: Mapping[int, Tensor], shards: Shards) -> None:
    if set(parts) != set(shards.own()):
        raise ValueError(f"shards: rank {rank()} of {world_size()} owns {shards.own()}, got {sorted(parts)}")


def _fold(parts: Any) -> Tensor:
    """((0 + p_0) + p_1) + …"""
    total: Tensor | None = None
    for part in parts:
        total = torch.zeros_like(part) if total is None else total
        total += part
    assert total is not None
    return total


def _each(parts: Mapping[int, Tensor], shards: Shards) -> Any:
    """The parts of all shards in their order, on every rank."""
    if world_size() == 1:
        yield from (parts[s] for s in range(shards.count))
        return
    if shards.count >= world_size():
        first = parts[rank()]
    else:  # a rank without a shard does not know what the others have
        first = broadcast(parts.get(0), shards.owner(0))
    if shards.count * first.numel() * first.element_size() > _GATHERED:
        for s in range(shards.count):
            found = on_wire(parts[s].contiguous() if shards.owner(s) == rank() else torch.empty_like(first))
            _asked(dist.broadcast, found, src=shards.owner(s))
            yield found.to(first.device)
        return
    rounds = -(-shards.count // world_size())
    own = on_wire(torch.stack([*(parts[s] for s in shards.own()), *[first] * (rounds - len(shards.own()))]))
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    _asked(dist.all_gather, gathered, own)
    for s in range(shards.count):
        yield gathered[shards.owner(s)][s // world_size()].to(first.device)
