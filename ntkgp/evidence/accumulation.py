"""Sums over one pass, by one process or many: the same bits, and a state from which any number of them can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from ntkgp.checkpoint import Run, moved_to
from ntkgp.distributed import (
    OrderedFold,
    Turns,
    alone,
    checksum,
    gather_numbers,
    smallest,
    world_size,
)
from ntkgp.evidence.streaming import StreamStatistics
from ntkgp.linearization import LinearizedNetwork
from ntkgp.linearization.memory import require
from ntkgp.linearization.nystrom import LandmarkFeatures

_OTHER_NETWORK = (
    "lin: the processes have different networks or landmarks; give all of them the same weights and arguments"
)


def components_of(kind: str, num_outputs: int) -> int:
    """Noise components of a kind of statistics."""
    return num_outputs if kind == "per_output" else 1


def _sums_memory(size: int, components: int) -> int:
    """Bytes of the statistics of so many features: the sums, a part of them, and what is made of them."""
    return 8 * (3 * components + 2) * size**2


def _visit_memory(lin: LinearizedNetwork, num_landmarks: int, one_output: bool) -> int:
    """Bytes that are enough for blocks of features: their results take half of it, see ``block_rows``."""
    least = max(lin.gram_memory(1, num_landmarks), lin.diagonals_memory(1))
    return max(2 * least, lin.engine.factors_memory(num_landmarks, 1) if one_output else 0)


def choice_memory(
    lin: LinearizedNetwork, num_landmarks: int, num_features: int | None, kind: str, budget: int, *,
    one_output: bool = False, candidates: int = 0,
) -> tuple[int, int]:  # fmt: skip
    """Bytes that the choice of features takes, and bytes that are enough for a pass with them too.

    How many features a group has is known once they are chosen: enough is for the most that it can have.

    :param one_output: a landmark stands for one output, not for all.
    :param candidates: inputs that the greedy choice looks at.
    """
    c, groups = lin.num_outputs, len(lin.groups)
    rows = num_landmarks * (1 if one_output else c)
    visit = _visit_memory(lin, num_landmarks, one_output)
    if num_features is None or (num_features >= rows and 8 * (2 * groups + 4) * rows**2 <= budget):
        most, chosen = rows, 8 * (2 * groups + 4) * rows**2 + visit
    else:
        most = min(num_features, rows)
        # Directions, those of the largest group once more, and some in the network's dtype.
        chosen = max((16 * most + 64) * lin.num_parameters, visit)
    if candidates:
        # The blocks of all candidates, the factor, and a column of it.
        own = max(lin.diagonals_memory(candidates), lin.gram_memory(candidates, 1))
        chosen = max(chosen, own + 8 * candidates * c * num_landmarks * c)
    size = sum(min(most, p) for p in lin.groups.sizes)
    return chosen, max(chosen, visit + _sums_memory(size, components_of(kind, c)))


def check_choice(
    lin: LinearizedNetwork, num_landmarks: int, num_features: int | None, kind: str, budget: int, **more: Any
) -> None:
    """Refuse a budget in which features cannot be chosen; options are those of :func:`choice_memory`."""
    chosen, enough = choice_memory(lin, num_landmarks, num_features, kind, budget, **more)
    if chosen > budget:
        require(enough, budget, f"{num_landmarks} landmarks and a pass with their features")


def check_memory(features: LandmarkFeatures, components: int) -> int:
    """Bytes of the statistics; refuses a budget that cannot hold them beside one block of features."""
    held = _sums_memory(features.size, components)
    visit = _visit_memory(features.lin, len(features.landmarks), features.outputs is not None)
    require(held + visit, features.max_memory, f"the statistics of {features.size} features and a pass with them")
    return held


@contextmanager
def _reserved(features: LandmarkFeatures, held: int) -> Iterator[None]:
    """Features whose blocks are made in what the statistics leave of the budget."""
    given = features.max_memory
    features.max_memory = given - held
    try:
        yield
    finally:
        features.max_memory = given


def accumulate(
    features: LandmarkFeatures,
    kind: str,
    batches: Any,
    *,
    dtype: torch.dtype = torch.float64,
    progress: bool = False,
    after: Callable[[StreamStatistics], bool] | None = None,
    run: Run | None = None,
    extra: Callable[[], Mapping[str, Any]] = dict,
) -> StreamStatistics:
    """One pass, shared by all ranks of the process group if there is one.

    Runs of batches are the shards of :class:`~ntkgp.distributed.Turns`; the sums of each are made from zero, and added
    in order.

    :param after: called with the sums after each batch; ends the pass by returning True. Every rank then makes the
        whole pass: the sums on the way are no other's.
    :param run: where the sums and a bitmap of the batches in them are offered, and come from.
    :param extra: what is kept beside them.
    :raises ValueError: ranks that have other data, another order of them, or other features.
    """
    held = check_memory(features, components_of(kind, features.lin.num_outputs))
    with nullcontext() if after is None else alone(), _reserved(features, held):
        return _Pass(features, kind, batches, dtype, run or Run(), extra)(after, progress)


class _Pass:
    """Where a pass stands: sums of whole shards, the shard that is open, and which batches are in them."""

    def __init__(
        self, features: LandmarkFeatures, kind: str, batches: Any, dtype: torch.dtype, run: Run,
        extra: Callable[[], Mapping[str, Any]],
    ) -> None:  # fmt: skip
        self.features, self.kind, self.batches, self.dtype = features, kind, batches, dtype
        self.run, self.extra = run, extra
        self.total, self.part = self._zeros(), self._zeros()
        self.seen: list[bool] = []
        if run.state is not None:
            self._resume(run.state)
        # The order of the batches, which a state needs, is drawn when the pass begins.
        self.shuffles = {} if run.checkpoint is None else batches.random_state()
        self.worlds, self.checked = world_size(), 0
        if self.worlds > 1:
            own = checksum(0, features.lin.theta, features.landmarks, features.theta, *features.coordinates)
            if len(set(gather_numbers(own))) > 1:
                raise ValueError(_OTHER_NETWORK)
        self.fold = OrderedFold(self.total.vector()) if self.worlds > 1 else None

    def _zeros(self) -> StreamStatistics:
        return StreamStatistics.zeros(self.kind, self.features)

    def _resume(self, state: Mapping[str, Any]) -> None:
        self.batches.set_random_state(state["batches"])
        device = self.features.landmarks.device
        self.total = StreamStatistics(**moved_to(state["statistics"], device))
        if state["part"] is not None:
            self.part = StreamStatistics(**moved_to(state["part"], device))
        self.seen = state["seen"].tolist()

    def __call__(self, after: Callable[[StreamStatistics], bool] | None, progress: bool) -> StreamStatistics:
        turns = Turns(self.batches)
        if after is not None:  # one shard, whose sums are those of all batches before
            turns.length = 2**62
        # A shard that a single process had begun goes on at rank 0.
        turns.first = turns.shard(len(self.seen))
        if not turns.mine(len(self.seen)):
            self.part = self._zeros()
        index, closed = -1, len(self.seen) % turns.length == 0
        device = self.features.landmarks.device
        try:
            known: int | None = self.batches.num_data
        except ValueError:
            known = None
        with tqdm(total=known, desc="pass", unit=" rows", disable=not progress) as bar:
            for index, (x, y) in enumerate(self.batches):
                bar.update(len(x))
                if self.worlds > 1:
                    self.checked = checksum(self.checked, x, y)
                if index < len(self.seen):
                    continue
                if turns.mine(index):
                    with alone():
                        self.part.add(self.features, x.to(device), y.to(device), self.dtype)
                self.seen.append(True)
                closed = turns.closes(index)
                if after is not None and after(self.part):
                    break
                if closed:
                    self._close(turns.count(index))
                if self.worlds == 1:
                    self.run.offer(self.state)
        if not closed:
            self._close(turns.count(index))
        if self.fold is not None:
            self._agree()
            self._gather()
        self.run.save(self.state())
        return self.total

    def _close(self, count: int) -> None:
        """Add the shards of a round, of the first `count` ranks."""
        if self.fold is None:
            self.total.absorb(self.part)
            self.part = self._zeros()
            return
        due = self._agree()
        self.fold.add([self.part.vector()], count)
        self.total.widen(self.part)
        self.part = self._zeros()
        if due:
            self._gather()
            state = self.state()
            if not self.run.offer(lambda: state):  # another rank was asked to end
                self.run.save(state)

    def _agree(self) -> bool:
        """Refuse ranks that have seen other batches; whether any of them has a state to write."""
        found = gather_numbers(len(self.seen), self.checked, int(self.run.due))
        if any(other[:2] != found[0][:2] for other in found):
            # The rooms above this one must not be imported at the top.
            from ntkgp.models.batches import OTHER_DATA

            raise ValueError(f"train_data: {OTHER_DATA}")
        return any(due for _, _, due in found)

    def _gather(self) -> None:
        """The sums of all ranks so far."""
        assert self.fold is not None
        low, high = smallest(self.total.low), -smallest(-self.total.high)
        self.total = replace(self.total.with_vector(self.fold.total()), low=low, high=high)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; the same for any number of processes."""
        sums, part = dict(vars(self.total)), dict(vars(self.part)) if self.part.num_data else None
        seen = torch.tensor(self.seen, dtype=torch.bool)
        return {**self.extra(), "batches": self.shuffles, "statistics": sums, "part": part, "seen": seen}
