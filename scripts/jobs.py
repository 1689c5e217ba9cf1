"""Jobs of a script: dealt to the processes of ``torchrun``, or to workers of its own."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ntkgp.locking import FolderInUse, FolderLock

T = TypeVar("T")
J = TypeVar("J")
_LONGEST = timedelta(days=30)
_PAUSE = 0.05


class Team:
    """The processes that work at one list of jobs.

    Under ``torchrun --nproc-per-node W`` all of them run the script, and whoever is free takes the next job. There is
    no process group: within a job the library shares nothing.

    :param workers: processes of this one's own, where there is no store.
    :param store: of the processes of ``torchrun``.
    :param rank: of this process, of `world`.
    """

    def __init__(self, workers: int = 1, store: dist.Store | None = None, rank: int = 0, world: int = 1) -> None:
        self._workers, self._store, self._rank, self._world = workers, store, rank, world

    @classmethod
    def of_this_run(cls, workers: int) -> Team:
        """Those that ``torchrun`` has started, or this process with workers."""
        if not dist.is_torchelastic_launched():
            return cls(workers)
        store, rank, world = next(rendezvous("env://"))
        return cls(workers, store, rank, world)

    def agreed(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all of them: what there is to do may change while they start."""
        if self._store is None:
            return make()
        if self._rank == 0:
            self._store.set("agreed", pickle.dumps(make()))
        self._store.wait(["agreed"], _LONGEST)
        return pickle.loads(self._store.get("agreed"))

    def results(self, work: Callable[[J], T], jobs: Sequence[J]) -> Iterator[tuple[int, T]]:
        """How many jobs are done, and what has come of one; of the jobs of this process, as they are done."""
        if self._store is None:
            # Unlike the pools of multiprocessing it notices when a worker is killed, for want of memory say.
            with ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn")) as pool:
                found = [pool.submit(work, job) for job in jobs]
                try:
                    yield from ((count, one.result()) for count, one in enumerate(as_completed(found), 1))
                finally:
                    pool.shutdown(cancel_futures=True)
            return
        while (index := self._store.add("taken", 1) - 1) < len(jobs):
            found = work(jobs[index])
            yield self._store.add("done", 1), found

    def is_last(self) -> bool:
        """Whether this process has what is left to do when all jobs are done: the first, which waits for the others."""
        if self._store is None:
            return True
        self._store.set(f"left {self._rank}", "")
        if self._rank:
            return False
        self._store.wait([f"left {rank}" for rank in range(self._world)], _LONGEST)
        return True


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """A folder for this process alone, which waits for the others."""
    lock: Any = None
    while lock is None:
        try:
            lock = FolderLock(folder)
        except FolderInUse:
            time.sleep(_PAUSE)
    try:
        yield
    finally:
        lock.release()
