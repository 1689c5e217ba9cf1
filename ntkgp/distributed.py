r"""Sums over many processes with the same bits for any number of them: virtual shards and ordered reductions.

Data are cut into shards whose number does not depend on the number W of processes; rank r owns the shards s with
s mod W = r. What is computed of a shard is then the same whoever computes it, and sums are taken in the order of the
shards, on every rank alike: :math:`((0 + p_0) + p_1) + \dots`. With the sum of ``torch.distributed.all_reduce``, whose
order depends on W, conjugate gradients that have not converged differ in the third digit (law E1n).

Everything works without a process group too, as one process that owns all shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_GATHERED = 2**24  # bytes of all parts together up to which one collective call is made of them


def world_size() -> int:
    """W, the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


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
        dist.all_reduce(total)
        return total
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
    for index, (s, t) in enumerate(pairs):
        source = index % world_size()
        tile = broadcast(compute(s, t) if source == rank() else None, source)
        if out is None:
            out = tile.new_zeros(width * shards.num_rows, width * shards.num_rows)
        (a, b), (c, d) = ranges[s], ranges[t]
        out[a:b, c:d], out[c:d, a:b] = tile, tile.mT
    assert out is not None
    return out


def broadcast(value: Tensor | None, source: int) -> Tensor:
    """A tensor of one rank on all of them.

    :param value: the tensor on the rank `source`; elsewhere None.
    """
    if world_size() == 1:
        assert value is not None
        return value
    about: list[Any] = [None if value is None else (tuple(value.shape), value.dtype, value.device.type)]
    dist.broadcast_object_list(about, src=source)
    shape, dtype, kind = about[0]
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    found = torch.empty(shape, dtype=dtype, device=device) if value is None else value.contiguous()
    dist.broadcast(found, src=source)
    return found


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
            found = parts[s].contiguous() if shards.owner(s) == rank() else torch.empty_like(first)
            dist.broadcast(found, src=shards.owner(s))
            yield found
        return
    rounds = -(-shards.count // world_size())
    own = torch.stack([*(parts[s] for s in shards.own()), *[first] * (rounds - len(shards.own()))])
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    for s in range(shards.count):
        yield gathered[shards.owner(s)][s // world_size()]
