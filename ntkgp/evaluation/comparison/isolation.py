"""Each task in a process of its own, forked from one that holds the data: what it takes is its own."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch

_MEBIBYTE = 2**20
_PULSE = 0.02


class Outcome(NamedTuple):
    """What became of a task: its result or why there is none, and the memory that it took at most, in MiB."""

    result: Any
    failure: str
    memory: float


class Workplace:
    """An interpreter of its own, with the data loaded, that forks itself for each task.

    Its forks start from the same state however many tasks ran before, without another import of torch, and do not see
    this process's threads. Nothing of the user's script is run again: what can only be found in ``__main__`` cannot be
    sent.

    :param task: ``task(data, argument) -> result``, a function of an importable module.
    :param data: what every task reads; pickled once.
    :param warm_up: called there first, and before each task: what it imports is no task's time or memory.
    :raises Unsendable: data that cannot be pickled, or only be read where they are.

    Memory: the data once more in the other interpreter. Start-up: its imports, some seconds.
    """

    def __init__(self, task: Callable[[Any, Any], Any], data: Any, warm_up: Callable[[], Any]) -> None:
        if not hasattr(os, "fork"):
            raise Unsendable("this system cannot fork processes")
        self._folder = tempfile.TemporaryDirectory(prefix="ntkgp-")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start(task, data, warm_up)
        except BaseException:
            self.close()
            raise

    def _start(self, task: Callable[[Any, Any], Any], data: Any, warm_up: Callable[[], Any]) -> None:
        folder = Path(self._folder.name)
        settings = {"threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "path": list(sys.path)}
        try:
            parcel = pickle.dumps((task, data, warm_up))
        except Exception as error:
            raise Unsendable(f"cannot be pickled: {error}") from error
        (folder / "settings").write_bytes(pickle.dumps(settings))
        (folder / "parcel").write_bytes(parcel)
        del parcel
        paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
        # Not "-m": functions that are pickled by this module's name must be found in it, and not in __main__.
        # The current folder is no place of modules, unless it is one here.
        command = (
            f"import sys; sys.path[:] = filter(None, sys.path); import {__name__} as here; here.serve({str(folder)!r})"
        )
        environment = {**os.environ, "PYTHONPATH": paths}
        # An interruption from the terminal reaches this process alone, which then ends the other.
        self._process = subprocess.Popen(
            [sys.executable, "-c", command], stdin=subprocess.PIPE, env=environment, start_new_session=True
        )
        (status,) = self._wait("ready")
        (folder / "parcel").unlink()
        if status:
            raise Unsendable(status)

    def run(self, argument: Any, time_limit: float | None = None) -> Outcome:
        """Do the task with one argument.

        :param time_limit: seconds after which it is ended.
        :raises Unsendable: an argument that cannot be pickled or read there.
        :raises Ended: the other interpreter is no more; another one is needed.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            parcel = pickle.dumps(argument)
        except Exception as error:
            raise Unsendable(f"cannot be pickled: {error}") from error
        folder = Path(self._folder.name)
        (folder / "argument").write_bytes(parcel)
        (folder / "limit").write_bytes(pickle.dumps(time_limit))
        with contextlib.suppress(BrokenPipeError):  # seen while waiting
            process.stdin.write(b"\n")
            process.stdin.flush()
        status, outcome = self._wait("done")
        if status:
            raise Unsendable(status)
        return Outcome(*outcome)

    def _wait(self, name: str) -> tuple[Any, ...]:
        """The message that appears in a file, which is then removed."""
        assert self._process is not None
        path = Path(self._folder.name) / name
        while not path.exists():
            if self._process.poll() is not None and not path.exists():
                raise Ended(f"the other interpreter ended with status {self._process.returncode}")
            time.sleep(_PULSE)
        message = pickle.loads(path.read_bytes())
        path.unlink()
        return message

    def close(self) -> None:
        """End the other interpreter, whatever it is doing."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            # What was ended from outside left its fork behind.
            with contextlib.suppress(FileNotFoundError, ValueError):
                _end(int((Path(self._folder.name) / "fork").read_text()))
        self._folder.cleanup()

    def __enter__(self) -> Workplace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Unsendable(RuntimeError):
    """The task cannot be done in another process."""


class Ended(RuntimeError):
    """The other interpreter was ended from outside, or by what it was told to do."""


def attempt(task: Callable[[Any, Any], Any], data: Any, argument: Any) -> tuple[Any, str]:
    """Result and reason of failure, one of them empty; interruptions pass."""
    try:
        return task(data, argument), ""
    except (Exception, SystemExit) as error:
        return None, describe(error)


def describe(error: BaseException) -> str:
    """One line: the error's kind and its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def serve(place: str) -> None:
    """The other interpreter: a task per line of its standard input."""
    folder = Path(place)
    settings = pickle.loads((folder / "settings").read_bytes())
    sys.path[:] = settings["path"]
    torch.set_default_dtype(settings["dtype"])
    try:
        task, data, warm_up = pickle.loads((folder / "parcel").read_bytes())
        # With one thread, for forks of a process whose OpenMP has started others would wait for these.
        torch.set_num_threads(1)
        warm_up()

        def warm() -> None:
            torch.set_num_threads(settings["threads"])
            warm_up()

    except Exception as error:
        _write(folder / "ready", (f"cannot be read in another process: {describe(error)}",))
        return
    _write(folder / "ready", ("",))
    while os.read(0, 1):
        limit = pickle.loads((folder / "limit").read_bytes())
        _write(folder / "done", _forked(folder, task, data, limit, warm))
    # Where nobody is left to do it.
    shutil.rmtree(folder, ignore_errors=True)


def _forked(folder: Path, task: Any, data: Any, limit: float | None, warm: Callable[[], Any]) -> tuple[Any, ...]:
    """Why there is no outcome, and the outcome of a task in a fork of this process."""
    path, started = folder / "result", folder / "started"
    path.unlink(missing_ok=True)
    started.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks of processes with threads: numpy's and scipy's are idle
        child = os.fork()
    if child == 0:
        _do(folder, task, data, warm)
    (folder / "fork").write_text(str(child))
    end = math.inf
    with _no_orphans(child):
        found, status = os.waitpid(child, os.WNOHANG)
        while not found:
            if limit is not None and end == math.inf and started.exists():
                end = time.monotonic() + limit
            if time.monotonic() > end:
                _end(child)
                os.waitpid(child, 0)
                (folder / "fork").unlink()
                return "", (None, f"stopped after {limit:g} s (time_limit)", math.nan)
            # Readable before the task is done: the caller is gone.
            if select.select([0], [], [], _PULSE)[0]:
                raise SystemExit
            found, status = os.waitpid(child, os.WNOHANG)
    _end(child)
    (folder / "fork").unlink()
    if os.WIFSIGNALED(status):
        hint = ": out of memory?" if os.WTERMSIG(status) == signal.SIGKILL else ""
        return "", (None, f"its process was ended by signal {os.WTERMSIG(status)}{hint}", math.nan)
    if not path.exists():
        return "", (None, f"its process ended with status {os.WEXITSTATUS(status)}", math.nan)
    message = pickle.loads(path.read_bytes())
    path.unlink()
    return message


def _do(folder: Path, task: Any, data: Any, warm: Callable[[], Any]) -> NoReturn:
    """The fork's whole life."""
    code = 1
    try:
        # What the task starts is ended with it, and does not read what is meant for this process's parent.
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # A fork has none of the libraries' pages in its memory until it uses them.
        warm()
        before = _peak()
        (folder / "started").touch()
        try:
            argument = pickle.loads((folder / "argument").read_bytes())
        except Exception as error:
            _write(folder / "result", (f"cannot be read in another process: {describe(error)}", None))
        else:
            result, failure = attempt(task, data, argument)
            _write(folder / "result", ("", (result, failure, (_peak() - before) / _MEBIBYTE)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _end(child: int) -> None:
    """Kill a fork and whatever it started."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)


@contextlib.contextmanager
def _no_orphans(child: int) -> Iterator[None]:
    """End the child if this process is interrupted."""
    try:
        yield
    except BaseException:
        _end(child)
        raise


def _peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _write(path: Path, message: Any) -> None:
    """Appears whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(message))
    part.replace(path)
