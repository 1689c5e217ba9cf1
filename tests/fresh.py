"""Programs in processes that only imported the library: forks of one interpreter that did nothing else.

For what a process has imported and what memory it takes, which the process of the tests cannot tell. The import of
torch and GPyTorch costs some seconds, so that one is shared.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent


class FreshInterpreter:
    """One interpreter with torch (one thread), GPyTorch and ntkgp, forked for each program; started at the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: object, timeout: float = 240.0) -> str:
        """What a program prints, given ``sys.argv[1:]``; fails with what it writes to standard error."""
        if self._process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.fresh", str(self._folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"code": code, "arguments": [str(argument) for argument in arguments], "timeout": timeout}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the interpreter ended"
        errors = (self._folder / "stderr").read_text(encoding="utf-8")
        assert json.loads(answer) == 0, f"{answer.strip()}: {errors[-3000:]}"
        return (self._folder / "stdout").read_text(encoding="utf-8")

    def close(self) -> None:
        """End the interpreter."""
        if self._process is not None:
            self._process.communicate()


def _do(request: dict, folder: Path) -> NoReturn:
    """The fork's whole life."""
    status = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv[1:] = request["arguments"]
        exec(compile(request["code"], "<program>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, timeout: float) -> int | str:
    """The exit status of a fork, which is killed when its time is over."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"over {timeout:g} s"


def main(folder: str) -> None:
    """A program per line of standard input, an exit status per line of standard output."""
    import torch

    torch.set_num_threads(1)
    import gpytorch  # noqa: F401

    import ntkgp  # noqa: F401

    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _do(request, Path(folder))
        print(json.dumps(_wait(child, request["timeout"])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
