"""One of several processes is killed in the middle of a pass; two runs want one folder."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ntkgp.checkpoint import Checkpoint, CheckpointMismatch
from ntkgp.locking import FolderInUse
from tests.elsewhere import FOLDER, Elsewhere
from tests.killing import forked
from tests.lost_processes import ROWS, TIMEOUT

ROOT = Path(__file__).parent.parent


LOST = Elsewhere("tests.lost_processes", FOLDER, "0", "2")


def test_a_process_that_is_killed_is_missed_by_the_others() -> None:
    """They end with an error that says so, within the group's time limit; two that go on find the same bits."""
    _, printed = LOST.finished()
    for killed, found in json.loads(printed.splitlines()[-1]).items():
        others = {0, 1, 2} - {int(killed)}
        assert {int(number) for number in found["said"]} == others
        for number, said in found["said"].items():
            assert f"distributed: rank {number} gets no answer from another process" in said
            assert "goes on from its last state" in said
        assert found["statuses"][int(killed)] == signal.SIGKILL
        assert all(found["statuses"][number] == 0 for number in others)
        assert found["seconds"] < TIMEOUT
        assert 0 < found["seen"] < ROWS
        assert found["same"]


def hold(folder: Path, until: Path) -> None:
    with Checkpoint(folder, every=0).run(data=torch.ones(3)) as run:
        run.save({"step": 1})
        until.touch()
        time.sleep(60)


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    """Another process is refused by name; what a killed one had is free, and its state is there."""
    child = forked(lambda: hold(tmp_path / "kept", tmp_path / "held"))
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.005)
        with (
            pytest.raises(FolderInUse, match=rf"checkpoint: .*kept is in use by process {child} on "),
            Checkpoint(tmp_path / "kept").run(data=torch.ones(3)),
        ):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / "kept" / ".lock").exists()
    with Checkpoint(tmp_path / "kept").run(data=torch.ones(3)) as run:
        assert run.state == {"step": 1}
        with (
            pytest.raises(FolderInUse, match="another run of this process"),
            Checkpoint(tmp_path / "kept").run(data=torch.ones(3)),
        ):
            pass
    assert not (tmp_path / "kept" / ".lock").exists()


def test_a_run_that_is_refused_lets_go(tmp_path: Path) -> None:
    with Checkpoint(tmp_path).run(data=torch.ones(3)) as run:
        run.save({"step": 1})
    with pytest.raises(CheckpointMismatch), Checkpoint(tmp_path).run(data=torch.zeros(3)):
        pass
    with pytest.raises(ZeroDivisionError), Checkpoint(tmp_path).run(data=torch.ones(3)):
        _ = 1 / 0
    with Checkpoint(tmp_path).run(data=torch.ones(3)) as run:
        assert run.state == {"step": 1}


def test_a_fork_does_not_hold_the_folder_of_its_parent(tmp_path: Path) -> None:
    with Checkpoint(tmp_path).run(data=torch.ones(3)):
        child = forked(lambda: time.sleep(60))
    try:
        with Checkpoint(tmp_path).run(data=torch.ones(3)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
