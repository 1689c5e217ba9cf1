"""Passes by three processes, one of which is killed: ``python -m tests.lost_processes FOLDER RANK...``.

Prints as JSON, by the rank that is killed, what the others said, seconds until their end, whether two processes that go
on from the states find the sums of an undisturbed pass bit by bit, and how many rows they did not have to visit.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import gpytorch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ntkgp.checkpoint import Checkpoint
from ntkgp.distributed import LostProcess, rank
from ntkgp.evidence import one_pass
from tests.distributed_cases import deep
from tests.killing import forked, in_child

ROWS = 128
TIMEOUT = 20.0  # seconds, of the group


class Slow(Dataset[tuple[Tensor, Tensor]]):
    """Rows that take their time, so that a kill finds the pass half-way."""

    def __init__(self, x: Tensor, y: Tensor, pause: float) -> None:
        self.x, self.y, self.pause = x, y, pause

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.pause)
        return self.x[index], self.y[index]

    def __len__(self) -> int:
        return len(self.x)


def sums(folder: Path | None, pause: float = 0.0) -> dict[str, Any]:
    lin, x, y = deep(1, ROWS, torch.float64)
    kept = None if folder is None else Checkpoint(folder, every=0)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    return vars(
        one_pass(
            lin, DataLoader(Slow(x, y, pause), batch_size=2), likelihood, num_landmarks=5, checkpoint=kept
        ).statistics
    )


def member(number: int, world: int, store: Path, work: Callable[[], None]) -> int:
    """A forked process of a group; its process id."""

    def run() -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=number, world_size=world, timeout=timedelta(seconds=TIMEOUT)
        )
        work()

    return forked(run)


def main(folder: str, *killed: str) -> None:
    """See the module."""
    torch.set_num_threads(1)
    whole = in_child(lambda: sums(None), Path(folder) / "whole.pt")
    print(json.dumps({rank: lose(Path(folder) / rank, int(rank), whole) for rank in killed}))


def lose(place: Path, lost: int, whole: dict[str, Any]) -> dict[str, Any]:
    """What becomes of a pass whose process `lost` is killed."""
    place.mkdir()

    def pass_until_the_end() -> None:
        try:
            sums(place / "kept", pause=0.005)
        except LostProcess as error:
            (place / f"said-{dist.get_rank()}").write_text(str(error))

    children = [member(number, 3, place / "first", pass_until_the_end) for number in range(3)]
    while len(Checkpoint(place / "kept").files()) < 2:
        assert os.waitpid(children[lost], os.WNOHANG) == (0, 0), "a process has ended before it was killed"
        time.sleep(0.005)
    os.kill(children[lost], signal.SIGKILL)
    started = time.monotonic()
    statuses = [os.waitpid(child, 0)[1] for child in children]
    seconds = time.monotonic() - started
    state = torch.load(Checkpoint(place / "kept").files()[-1], weights_only=True)["state"]

    def go_on() -> None:
        torch.save(sums(place / "kept"), place / f"resumed-{rank()}.pt")

    again = [member(number, 2, place / "second", go_on) for number in range(2)]
    assert all(os.waitpid(child, 0)[1] == 0 for child in again), "the pass did not go on"
    resumed = [torch.load(place / f"resumed-{number}.pt", weights_only=False) for number in range(2)]
    same = all(
        torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        for found in resumed for name, value in whole.items()
    )  # fmt: skip
    said = {int(file.name.split("-")[1]): file.read_text() for file in place.glob("said-*")}
    seen = int(state["seen"].sum())
    return {"said": said, "seconds": seconds, "statuses": statuses, "same": same, "seen": seen}


if __name__ == "__main__":
    main(*sys.argv[1:])
