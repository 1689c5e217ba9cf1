"""Jobs of scripts over processes, here threads with one store; and the rows of scripts/uci.py in their file."""

from __future__ import annotations

import importlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import permutations
from pathlib import Path

import pytest
import torch.distributed as dist

from ntkgp import locking
from ntkgp.evaluation.comparison import Comparison, Row
from ntkgp.locking import FolderInUse, FolderLock

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("jobs")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_job_is_done_once_by_whoever_is_free(world, jobs):
    """The first one goes on when all are done; what it made is what all work at."""
    store, meeting, done, last = dist.HashStore(), threading.Barrier(world), [], []

    def process(rank: int) -> None:
        def work(job: int) -> int:
            if job < world:  # as many as there are processes are under way at a time
                meeting.wait(30)
            return 10 * job

        team = jobs.Team(store=store, rank=rank, world=world)
        for count, found in team.results(work, team.agreed(lambda: list(range(9)) if rank == 0 else ["others"])):
            done.append((count, found, rank))
        if team.is_last():
            last.append((rank, len(done)))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert last == [(0, 9)]
    assert sorted(count for count, _, _ in done) == list(range(1, 10))
    assert sorted(found for _, found, _ in done) == [10 * job for job in range(9)]
    assert {rank for _, _, rank in done} == set(range(world))


def test_a_turn_waits_for_the_one_who_has_the_folder(jobs, tmp_path):
    lock, order = FolderLock(tmp_path), []

    def second() -> None:
        with jobs.turn(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(0.15)
    order.append("first")
    lock.release()
    thread.join(10)
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_without_torchrun_there_are_workers(jobs, monkeypatch):
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    team = jobs.Team.of_this_run(2)
    assert team.agreed(lambda: 5) == 5
    assert sorted(found for _, found in team.results(str, [3, 4])) == ["3", "4"]
    assert team.is_last()


def test_a_worker_that_is_killed_is_noticed(jobs):
    with pytest.raises(BrokenProcessPool):
        list(jobs.Team(1).results(os._exit, [1, 2]))


def test_a_folder_is_not_free_before_its_lock_is_given_up_altogether(tmp_path, monkeypatch):
    """To close any file of a lock gives up all locks of the process on it, those of another thread too."""
    lock, close, closed = FolderLock(tmp_path), os.close, []

    def from_another_thread(file: int) -> None:
        closed.append(file)
        with pytest.raises(FolderInUse, match="another run of this process"):
            FolderLock(tmp_path)
        close(file)

    with monkeypatch.context() as patch:
        patch.setattr(locking.os, "close", from_another_thread)
        lock.release()
    assert len(closed) == 1
    FolderLock(tmp_path).release()


def test_a_lock_that_was_removed_while_it_was_taken_is_taken_anew(tmp_path, monkeypatch):
    stat, removed = os.fstat, []

    def remove_first(file: int) -> os.stat_result:
        if not removed:
            removed.append(file)
            (tmp_path / ".lock").unlink()
        return stat(file)

    monkeypatch.setattr(locking.os, "fstat", remove_first)
    lock = FolderLock(tmp_path)
    assert removed
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.release()
    again = FolderLock(tmp_path)
    lock.release()  # of the first, not of the second
    with pytest.raises(FolderInUse, match="another run of this process"):
        FolderLock(tmp_path)
    again.release()


def test_uci_rows_are_in_one_order_whichever_split_was_done_first(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    uci = importlib.import_module("uci")
    splits = ("boston standard/2", "boston standard/10", "boston gap/0", "wine standard/0")
    texts = set()
    for number, order in enumerate(permutations(splits)):
        path = tmp_path / str(number)
        for data in order:
            rows = [Row(method, data, {"nll": float(i)}, {}) for i, method in enumerate(("GP", "ELLA"))]
            uci.joined(uci.kept(path), Comparison(rows, "regression")).to_csv(path)
        again = Comparison([Row("ELLA", splits[1], {"nll": 7.0}, {})], "regression")
        texts.add(uci.joined(uci.kept(path), again).to_csv())
    assert len(texts) == 1
    found = [line.split(",")[:3] for line in texts.pop().splitlines()[1:]]
    assert [data for method, data, _ in found if method == "GP"] == list(splits)
    assert ["ELLA", splits[1], "7.0"] in found
    assert len(found) == 8
    # A method that failed on a split has no NLL of the set, and here no other has one.
    alone = [Row(uci.OURS, data, {"nll": 1.0}, {}) for data in splits[:2]] + [Row("ELLA", splits[0], {"nll": 1.0}, {})]
    assert "| boston standard | 2 | 1.000 ± 0.000 |  |  |" in uci.summary(Comparison(alone, "regression"))
