"""A folder that one process at a time works in."""

from __future__ import annotations

import errno
import logging
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where a folder is not locked
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("ntkgp")

_NAME = ".lock"
# A process never waits for itself by a lock of the operating system. The locks of each process and folder: a fork has
# those of its parent in its memory, but not in the operating system.
_OWN: dict[tuple[int, str], FolderLock] = {}


class FolderInUse(RuntimeError):
    """Another run works in a folder; the message names its process."""


class FolderLock:
    """A lock file in a folder, held until :meth:`release` or the end of the process, however it ends.

    The operating system has the lock, the file only tells whose it is: that of a process which was killed is free.

    :param folder: exists.
    :raises FolderInUse: another process has it, or another run of this one.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._file, self._key = folder / _NAME, -1, (os.getpid(), str(folder.resolve()))
        # At one stroke: two threads may ask at once.
        if _OWN.setdefault(self._key, self) is not self:
            raise FolderInUse(f"checkpoint: {folder} is in use by another run of this process; give each its own")
        try:
            if fcntl is not None:
                self._lock(folder)
        except BaseException:
            self._forget()
            raise

    def _lock(self, folder: Path) -> None:
        while self._file < 0:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever had it before may have removed the file in between.
                if self._is_there(file):
                    self._file = file
            except OSError as reason:
                if reason.errno not in (errno.EACCES, errno.EAGAIN):
                    logger.warning("checkpoint: %s cannot be locked (%s); give it to one run at a time", folder, reason)
                    return
                owner = os.read(file, 200).decode(errors="replace").strip() or "another process"
                raise FolderInUse(
                    f"checkpoint: {folder} is in use by {owner}; wait for its end, or give this run another folder"
                ) from reason
            finally:
                if self._file < 0:
                    os.close(file)
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _is_there(self, file: int) -> bool:
        """Whether an open file is the one in the folder."""
        try:
            return os.fstat(file).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others have the folder; once is enough."""
        if self._key[0] != os.getpid() or _OWN.get(self._key) is not self:
            return
        try:
            if self._file >= 0:
                self._path.unlink(missing_ok=True)
        finally:
            self._forget()

    def _forget(self) -> None:
        # Before another thread may ask: to close any file of it gives up all locks that a process has on it.
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        del _OWN[self._key]
