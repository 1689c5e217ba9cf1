"""What tests look at and other processes do: begun when the tests are, and done beside them.

A module of tests says ``RUN = Elsewhere("tests.some_module", FOLDER, "3")`` and asks ``RUN.finished()``. The runs of
all modules that were selected are done by one further process, one after another (``python -m tests.elsewhere``).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = "{folder}"


class Elsewhere:
    """A module that is run with arguments, where `FOLDER` stands for a folder of its own."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [module, *arguments]
        self._place: Path | None = None
        self._runner: subprocess.Popen[bytes] | None = None
        # By whom it is wanted: the module that calls.
        self.wanted_by = sys._getframe(1).f_globals["__name__"]
        ALL.append(self)

    def finished(self) -> tuple[Path, str]:
        """Wait for the end: its folder, and what it printed. Fails with what it wrote to standard error."""
        if self._place is None:
            start([self])
        assert self._place is not None
        assert self._runner is not None
        while not (self._place / "done.json").exists():
            assert self._runner.poll() in (None, 0), "the process that runs other processes ended"
            time.sleep(0.01)
        status, stdout, stderr = json.loads((self._place / "done.json").read_text(encoding="utf-8"))
        assert status == 0, stderr[-3000:]
        return self._place, stdout


ALL: list[Elsewhere] = []
_STARTED: list[tuple[subprocess.Popen[bytes], Path]] = []


def start(runs: Iterable[Elsewhere]) -> None:
    """Begin with these runs in a process beside this one."""
    runs = list(runs)
    if not runs:
        return
    place = Path(tempfile.mkdtemp(prefix="elsewhere-"))
    for number, run in enumerate(runs):
        run._place = place / str(number)
        run._place.mkdir()
    (place / "commands.json").write_text(json.dumps([run._command for run in runs]), encoding="utf-8")
    runner = subprocess.Popen(
        [sys.executable, "-m", "tests.elsewhere", str(place)], cwd=ROOT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE,
    )  # fmt: skip
    for run in runs:
        run._runner = runner
    _STARTED.append((runner, place))


def end() -> None:
    """Stop what still runs, and remove its folders."""
    while _STARTED:
        runner, place = _STARTED.pop()
        if runner.poll() is None:
            os.killpg(runner.pid, signal.SIGKILL)
            runner.wait()
        assert runner.stdin is not None
        runner.stdin.close()
        shutil.rmtree(place, ignore_errors=True)


def _end_with_the_tests(place: Path) -> None:
    """Wait for the end of the pipe from the tests, which is theirs too, even if they are killed; leave nothing then."""
    while os.read(0, 1):
        pass
    shutil.rmtree(place, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def main(place: Path) -> None:
    """Run the commands of a folder one after another."""
    if os.getpgrp() == os.getpid():
        threading.Thread(target=_end_with_the_tests, args=(place,), daemon=True).start()
    for number, (module, *arguments) in enumerate(json.loads((place / "commands.json").read_text(encoding="utf-8"))):
        own = place / str(number)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, *(a.replace(FOLDER, str(own)) for a in arguments)],
            cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        part = own / "done.part"
        part.write_text(json.dumps([done.returncode, done.stdout, done.stderr]), encoding="utf-8")
        part.replace(own / "done.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
