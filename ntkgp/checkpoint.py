"""Checkpoints of long runs: a run that was killed goes on from its last one, bit by bit as if nothing had happened."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkgp.distributed import broadcast_object, gather_objects, rank, world_size
from ntkgp.fingerprint import digest
from ntkgp.locking import FolderInUse, FolderLock

logger = logging.getLogger("ntkgp")

FORMAT = "ntkgp checkpoint"
SCHEMA = 1
_NAME = re.compile(r"(\d{8,})\.ckpt")
_PART = re.compile(r"\d{8,}\.ckpt\.\d+\.part")


class CheckpointMismatch(ValueError):
    """A checkpoint belongs to another run; the message names what differs."""


class UnreadableFile(ValueError):
    """A file is truncated, corrupted, or was not written by this library."""


def plain(value: Any, name: str = "state") -> Any:
    """A copy of nested mappings, lists and tuples of tensors and plain values, on the CPU.

    :raises TypeError: anything else, named by where it is.

    >>> plain({"step": 3, "pair": (torch.zeros(2), None)})
    {'step': 3, 'pair': (tensor([0., 0.]), None)}
    """
    if isinstance(value, Tensor):
        # A copy: of a view, torch would write all that is behind it. Strides stay: products round differently by them.
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int):
                raise TypeError(f"{name}: expected keys of type str or int, got {key!r}")
        return {key: plain(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [plain(part, f"{name}[{i}]") for i, part in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(f"{name}: expected tensors, str, int, float, bool, None or containers of them, got {type(value)}")


def moved_to(value: Any, device: torch.device | str) -> Any:
    """What :func:`plain` returns, with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved_to(part, device) for key, part in value.items()}
    return type(value)(moved_to(part, device) for part in value) if isinstance(value, list | tuple) else value


def write_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write what :func:`plain` accepts; under its name the file appears whole or not at all, also if power fails.

    :raises OSError: the folder cannot be written; nothing is left behind.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            torch.save(plain(content, path.name), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_file(path: Path, kind: str, schema: int) -> dict[str, Any]:
    """Read a file by ``torch.load(weights_only=True)`` and check its kind, schema and digest.

    :param kind: what its entry "format" must be.
    :param schema: what its entry "schema" must be.
    :raises UnreadableFile: truncated, corrupted, of another kind or schema.
    :raises FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # a broken file may raise anything
        raise UnreadableFile(f"{path}: truncated, corrupted or no file of this library ({reason})") from reason
    if not isinstance(content, dict) or content.get("format") != kind:
        raise UnreadableFile(f"{path}: expected a file of the kind {kind!r}")
    if content.get("schema") != schema:
        raise UnreadableFile(f"{path}: has schema {content.get('schema')!r}, this version reads {schema}")
    if content.get("digest") != digest(content.get("state")):
        raise UnreadableFile(f"{path}: corrupted, its content is not what was written")
    return content


class Checkpoint:
    r"""Where a long run keeps its state, how often, and how many of them.

    Given to a fit (``fit_evidence(model, checkpoint=...)``), or used in a loop of your own::

        with Checkpoint("run").run(network=net, data=(x, y), configuration={"rate": 1e-3}) as run:
            if run.state is not None:
                ...  # take it
            for step in ...:
                ...
                run.offer(lambda: {"step": step, "net": net.state_dict(), "generator": generator.get_state()})

    A state is made of tensors and plain values only; ``torch.load(file, weights_only=True)`` reads it. It is written to
    another name, synchronised to the disk and renamed: a file is there whole or not at all. Kept are the last
    `keep_last` and the one with the best score. A broken or foreign file is never deleted; the state before it is used,
    and the logger ``"ntkgp"`` says so.

    Inside its ``with`` block, in the main thread, a run also answers SIGTERM: at the next offer the state is written,
    and then whatever handled the signal before handles it. The handler before is back afterwards.

    A folder belongs to one run at a time: a second one, of this process or of another, is refused while the first goes
    on. The folder of a process that has ended, however it did, is free.

    Of several processes (:mod:`ntkgp.distributed`) rank 0 reads and writes; the others get the state from it, so only
    rank 0 needs to see the folder. A state does not depend on how many they are.

    :param path: a folder of the run's own; made where it is missing.
    :param every: seconds between two states at least; 0 writes at every offer.
    :param keep_last: how many of the last states are kept.
    :raises ValueError: a negative `every`, `keep_last` below one.
    :raises NotADirectoryError: `path` is a file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for attempt in range(2):
    ...         with Checkpoint(folder, every=0).run(data=torch.ones(3)) as run:
    ...             print(run.state)
    ...             _ = run.offer(lambda: {"step": 7})
    None
    {'step': 7}
    """

    def __init__(self, path: str | os.PathLike[str], every: float = 60.0, keep_last: int = 2) -> None:
        if not (isinstance(every, int | float) and every >= 0):
            raise ValueError(f"every: expected seconds >= 0, got {every!r}")
        if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1:
            raise ValueError(f"keep_last: expected an integer >= 1, got {keep_last!r}")
        self.path, self.every, self.keep_last = Path(path), float(every), keep_last
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"path: expected a folder for checkpoints, {self.path} is a file")

    @classmethod
    def of(cls, value: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
        """The checkpoint itself, or one with default options at a path."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str | os.PathLike):
            return cls(value)
        raise TypeError(f"checkpoint: expected a path or a ntkgp.checkpoint.Checkpoint, got {type(value).__name__}")

    def part(self, name: str) -> Checkpoint:
        """The same options in a folder below: for a part of the run that keeps states of its own."""
        return Checkpoint(self.path / name, self.every, self.keep_last)

    def files(self) -> list[Path]:
        """The files of states, the oldest first."""
        if not self.path.is_dir():
            return []
        found = [(int(match[1]), file) for file in self.path.iterdir() if (match := _NAME.fullmatch(file.name))]
        return [file for _, file in sorted(found)]

    def best(self) -> dict[str, Any] | None:
        """The state with the best score among those kept; None where none has a score."""
        best: dict[str, Any] | None = None
        for file in self.files():
            content = _readable(file)
            score = None if content is None else content["score"]
            if score is not None and (best is None or score >= best["score"]):
                best = content
        return None if best is None else best["state"]

    @contextmanager
    def run(
        self, network: Any = None, data: Any = None, configuration: Mapping[str, Any] | None = None
    ) -> Iterator[Run]:
        """One run, from the last state that is kept here, or from the start.

        :param network: what stands for the network, for instance θ̃; see :func:`~ntkgp.fingerprint.digest`.
        :param data: what stands for the data.
        :param configuration: whatever else the result depends on, by name.
        :raises CheckpointMismatch: the folder has states of a run with another network, data or configuration.
        :raises FolderInUse: another run works in the folder.
        """
        identity = {"network": digest(network), "data": digest(data)}
        identity |= {f"configuration: {name}": _described(value) for name, value in (configuration or {}).items()}
        run = self._opened(identity)
        run._answer_signals()
        try:
            yield run
        finally:
            run._close()

    def _opened(self, identity: Mapping[str, str]) -> Run:
        """The run as this process has it: rank 0 with the folder, the others with the state that it found."""
        asked = gather_objects({"folder": str(self.path), **identity})
        different = [name for name in asked[0] if any(other.get(name) != asked[0][name] for other in asked)]
        if different:
            raise ValueError(
                f"checkpoint: the processes differ in {', '.join(different)}; expected the same of all, or the call "
                "within ntkgp.distributed.alone()"
            )
        run, failure = Run(), None
        if rank() == 0:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                run = Run(self, identity)
            except (OSError, ValueError, FolderInUse) as reason:
                failure = reason
        if world_size() > 1:
            try:
                failure, run.state = broadcast_object((failure, run.state))
            except BaseException:
                run._close()
                raise
            run._checkpoint = self
        if failure is not None:
            raise failure
        run._writes = rank() == 0
        return run

    def fit(self, image_prior: Any, y: Tensor) -> Any:
        """Fit a :class:`~ntkgp.inverse.DeepImagePrior` to measurements, or go on where an earlier call was killed.

        :param image_prior: with the same operator, network and options as in that call; ``max_iterations`` may differ.
        :param y: the measurements, as of its `fit`.
        :return: `image_prior`, fitted. States are offered every ``callback_every`` iterations.
        :raises CheckpointMismatch: the folder has states of other measurements or options.
        """
        callback = image_prior.callback
        names = ["isotropic", "stop", "tau", "learning_rate", "dtype", "seed", "_unet"]
        names += [f"_asked_{name}" for name in ("input", "scale", "tv", "noise", "held_out")]
        options = {name.removeprefix("_asked_").lstrip("_"): getattr(image_prior, name) for name in names}
        with self.run(
            network=image_prior._given_net, data=[y, _operator(image_prior.A, y)], configuration=options
        ) as run:

            def offer(fitted: Any) -> None:
                run.offer(fitted.state_dict)
                if callback is not None:
                    callback(fitted)

            image_prior.callback = offer
            try:
                if run.state is None:
                    image_prior.fit(y)
                else:
                    image_prior.load_state_dict(run.state)
                    if image_prior.stopped_by not in ("discrepancy", "held_out", "plateau"):
                        image_prior.resume()
            finally:
                image_prior.callback = callback
            run.save(image_prior.state_dict())
        return image_prior


def _operator(A: Any, y: Tensor) -> Any:
    """What a forward operator does to one image of random numbers, in place of the operator."""
    image = torch.rand(tuple(A.image_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return A(image.to(y))


def _described(value: Any) -> str:
    """A value for people if it is short, else its digest."""
    if value is None or isinstance(value, str | int | float | bool | torch.dtype):
        return repr(value)
    return digest(value)


def _readable(file: Path) -> dict[str, Any] | None:
    """The content of a file, or None with a line in the log."""
    try:
        return read_file(file, FORMAT, SCHEMA)
    except (UnreadableFile, FileNotFoundError) as reason:
        logger.warning("checkpoint refused: %s", reason)
        return None


class Run:
    """What :meth:`Checkpoint.run` gives: the state to start from, and where new ones are offered.

    :ivar state: the last state, or None at the start.
    """

    def __init__(self, checkpoint: Checkpoint | None = None, identity: Mapping[str, str] | None = None) -> None:
        self.state: dict[str, Any] | None = None
        self._checkpoint, self._identity = checkpoint, dict(identity or {})
        self._scores: dict[Path, float | None] = {}
        self._number = 0
        self._saved = time.monotonic()
        self._signal: tuple[int, Any] | None = None
        self._previous: Any = None
        self._answers = False
        self._writes = True
        self._lock: FolderLock | None = None
        if checkpoint is not None:
            self._lock = FolderLock(checkpoint.path)
            try:
                self._resume(checkpoint)
            except BaseException:
                self._lock.release()
                raise

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Where states are kept; None for a run without a checkpoint, whose offers do nothing."""
        return self._checkpoint

    def _resume(self, checkpoint: Checkpoint) -> None:
        for file in checkpoint.path.iterdir():
            if _PART.fullmatch(file.name):  # of a run that was killed while it wrote
                file.unlink(missing_ok=True)
        for file in checkpoint.files():
            self._number = max(self._number, int(file.name.split(".")[0]))
            content = _readable(file)
            if content is None:
                continue
            self._compare(content["identity"], file)
            self._scores[file] = content["score"]
            self.state = content["state"]
        if self.state is not None:
            logger.info("resumed from %s", max(self._scores))

    def _compare(self, found: Mapping[str, str], file: Path) -> None:
        """Refuse a state of another run, by name of what differs."""
        own, different = self._identity, []
        for name in sorted({*own, *found}):
            there, here = found.get(name), own.get(name)
            if there == here:
                continue
            values = [name.removeprefix("configuration: ")]
            if name.startswith("configuration") and all(v is None or len(v) < 64 for v in (there, here)):
                values.append(f"({there} there, {here} here)")
            different.append(" ".join(values))
        if different:
            raise CheckpointMismatch(
                f"checkpoint: {file} is of another run; different: {', '.join(different)}. Give the same, or another "
                "folder"
            )

    def offer(self, make: Callable[[], Mapping[str, Any]], score: float | None = None) -> bool:
        """Write the state if it is time to, or if the process was asked to end; return whether it was.

        :param make: called if so; returns the state.
        :param score: the larger the better; for the best state that is kept.
        """
        if not self.due:
            return False
        if self._writes:
            self.save(make(), score)
        self._pass_on()
        return self._writes

    @property
    def due(self) -> bool:
        """Whether an offer would be taken now: the process was asked to end, or writes and it is time to."""
        if self._checkpoint is None:
            return False
        return self._signal is not None or (self._writes and time.monotonic() - self._saved >= self._checkpoint.every)

    def save(self, state: Mapping[str, Any], score: float | None = None) -> None:
        """Write the state now.

        :raises TypeError: a state of other things than tensors and plain values.
        """
        if self._checkpoint is None or not self._writes:
            return
        score = None if score is None or math.isnan(score) else float(score)
        content = plain(state)
        self._number += 1
        file = self._checkpoint.path / f"{self._number:08d}.ckpt"
        head = {"format": FORMAT, "schema": SCHEMA, "identity": self._identity, "score": score}
        write_file(file, {**head, "digest": digest(content), "state": content})
        self._scores[file] = score
        self._prune()
        self._saved = time.monotonic()

    def _prune(self) -> None:
        """Delete what is neither among the last nor the best; never what could not be read."""
        assert self._checkpoint is not None
        files = sorted(self._scores, key=lambda file: int(file.name.split(".")[0]))
        keep = set(files[-self._checkpoint.keep_last :])
        scored = [file for file in files if self._scores[file] is not None]
        if scored:
            keep.add(max(scored, key=lambda file: (self._scores[file], file)))
        for file in files:
            if file not in keep:
                file.unlink(missing_ok=True)
                del self._scores[file]

    def _answer_signals(self) -> None:
        # A handler that was not installed from Python could not be put back.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is not None:
            self._previous = signal.signal(signal.SIGTERM, self._remember)
            self._answers = True

    def _remember(self, number: int, frame: Any) -> None:
        self._signal = number, frame

    def _pass_on(self) -> None:
        """Let the handler before have the signal, if one came; runs around this one have nothing new to write."""
        if self._signal is None:
            return
        (number, frame), self._signal = self._signal, None
        previous = self._previous
        while isinstance(getattr(previous, "__self__", None), Run):
            previous = previous.__self__._previous
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.release()
        if not self._answers:
            return
        self._answers = False
        if signal.getsignal(signal.SIGTERM) == self._remember:
            signal.signal(signal.SIGTERM, self._previous)
        self._pass_on()


@contextmanager
def running(
    checkpoint: Checkpoint | str | os.PathLike[str] | None, identity: Callable[[], Mapping[str, Any]]
) -> Iterator[Run]:
    """A run for a fit whose `checkpoint` may be None: offers do nothing then, and nothing is hashed.

    :param identity: the arguments of :meth:`Checkpoint.run`; called only where there is a checkpoint.
    """
    if checkpoint is None:
        yield Run()
        return
    with Checkpoint.of(checkpoint).run(**identity()) as run:
        yield run
