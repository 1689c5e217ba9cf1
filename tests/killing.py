"""Runs that are killed again and again, by a process that imports the library once and forks.

``python -m tests.killing CASE FOLDER KILLS SEED LOW HIGH`` runs a case of `tests.killed_cases` undisturbed, then with
so many SIGKILLs, each at a random time after LOW to HIGH further states, beginning anew whenever it comes to its end
before, and prints what it found as JSON.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.elsewhere import FOLDER, Elsewhere

ROOT = Path(__file__).parent.parent
PAUSE = 0.02  # seconds of each offer, and of each synchronisation with the disk


def killed_again_and_again(case: str, kills: int, seed: int = 0, distance: tuple[int, int] = (0, 3)) -> Elsewhere:
    """A case of `tests.killed_cases` in a process of its own; kills are so many states apart."""
    run = Elsewhere("tests.killing", case, FOLDER, *map(str, (kills, seed, *distance)))
    run.wanted_by = sys._getframe(1).f_globals["__name__"]
    return run


def what_was_found(run: Elsewhere) -> dict[str, Any]:
    """What `main` printed at the end of such a run."""
    return json.loads(run.finished()[1].splitlines()[-1])


def forked(work: Callable[[], Any]) -> int:
    """Start a child that works and exits; its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def in_child(work: Callable[[], Any], path: Path) -> Any:
    """What work in a child returns; modules that it imports on the way are imported here too, for later children."""
    import torch

    child = forked(lambda: torch.save([work(), sorted(sys.modules)], path))
    assert os.waitpid(child, 0)[1] == 0, "the undisturbed run failed"
    found, modules = torch.load(path, weights_only=False)
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)
    assert threading.active_count() == 1
    return found


def _slow_down() -> None:
    """Make offers and writes slow, so that kills find them at work."""
    from ntkgp.checkpoint import Run

    offer, fsync = Run.offer, os.fsync

    def slow_offer(self: Any, *args: Any, **kwargs: Any) -> bool:
        time.sleep(PAUSE)
        return offer(self, *args, **kwargs)

    def slow_fsync(file: int) -> None:
        time.sleep(PAUSE / 2)
        fsync(file)

    Run.offer, os.fsync = slow_offer, slow_fsync  # type: ignore[method-assign]


def main(case: str, folder: str, kills: str, seed: str, low: str, high: str) -> None:
    """See the module."""
    import torch

    torch.set_num_threads(1)
    from tests import killed_cases

    run = getattr(killed_cases, case)
    place, rng = Path(folder), random.Random(int(seed))
    place.mkdir(parents=True, exist_ok=True)

    def disturbed() -> None:
        _slow_down()
        torch.save(run(place / "kept"), place / "disturbed.pt")

    # Never in this process, which forks: a computation may leave a thread behind, whose locks children would inherit.
    first = in_child(lambda: run(None), place / "undisturbed.pt")
    found: dict[str, Any] = {"kills": 0, "parts": 0, "finished": 0, "different": [], "states": []}
    while found["kills"] < int(kills) or not found["finished"]:
        child = forked(disturbed)
        wanted = None
        if found["kills"] < int(kills):
            wanted = _states(place / "kept") + rng.randint(int(low), int(high)), rng.uniform(0, 4 * PAUSE)
        status = _wait(child, place / "kept", wanted)
        found["states"].append(_states(place / "kept"))
        found["parts"] += len(list((place / "kept").rglob("*.part")))
        if status is None:
            found["kills"] += 1
            continue
        assert status == 0, "a disturbed run failed"
        found["finished"] += 1
        again = torch.load(place / "disturbed.pt", weights_only=False)
        found["different"] += [name for name in first if not _equal(first[name], again[name])]
        shutil.rmtree(place / "kept")
    print(json.dumps({**found, "names": sorted(first)}))


def _states(folder: Path) -> int:
    """How many states were ever written."""
    return max((int(file.name.split(".")[0]) for file in folder.glob("*.ckpt")), default=0)


def _wait(child: int, folder: Path, wanted: tuple[int, float] | None) -> int | None:
    """The exit status of a child; None where it was killed, some time after so many states were there."""
    end = math.inf
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        # By progress and not by the clock alone: machines may be slow or busy.
        if wanted is not None and end == math.inf and _states(folder) >= wanted[0]:
            end = time.monotonic() + wanted[1]
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _equal(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a == b or (a != a and b != b)


if __name__ == "__main__":
    main(*sys.argv[1:])
