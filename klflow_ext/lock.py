"""Who may write to a folder: one process at a time; and how a new one takes the place of an old."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from klflow_ext.files import reason, remove, sync


class Lock:
    """A file in a folder that one process holds, from the making of this object to `release` or the end of the process.

    The lock is the kernel's (flock), so that a killed process leaves none behind. The file names its owner. Over NFS it
    holds between machines. On a file system without flock a warning says so: then nothing keeps a second process out.

    Raises:
        ValueError: another process has it, or the file cannot be written.
    """

    NAME = "lock"

    def __init__(self, folder: Path):
        self.path = folder / self.NAME
        try:
            while True:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                self._take()
                if self.holds():
                    break
                os.close(self._file)  # its owner removed the file between the two calls
            try:
                self._sign()
            except OSError:
                self.release()
                raise
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {reason(error)}") from error

    def _sign(self) -> None:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, (json.dumps(owner) + "\n").encode(), 0)

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = self._owner()
            os.close(self._file)
            raise ValueError(
                f"run: got {self.path.parent}, which {said} writes to, allowed is a folder that no other process writes to"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                os.close(self._file)
                raise
            warnings.warn(
                f"{self.path}: this file system has no locks ({error.strerror}); nothing keeps a second process out",
                stacklevel=4,
            )

    def _owner(self) -> str:
        try:
            owner = json.loads(os.pread(self._file, 4096, 0))
            return f"process {owner['pid']} on {owner['host']}, since {owner['since']},"
        except (ValueError, KeyError, TypeError):  # it is just being written
            return "another process"

    def holds(self) -> bool:
        """Whether the file that is held is still the one in the folder; not where the folder has gone or was replaced."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def moved(self, folder: Path) -> None:
        """The folder has been renamed."""
        self.path = folder / self.NAME

    def release(self) -> None:
        if self.holds():
            remove(self.path)
        os.close(self._file)


@contextmanager
def new_folder(out: Path, check: Callable[[], None]) -> Iterator[tuple[Path, Lock]]:
    """A folder beside `out`, with its lock, which takes the place of `out` when the block ends, and goes when it fails.

    Args:
        check: raises where `out` holds what may not be replaced; asked again before it is, as another may have come there.

    Raises:
        ValueError: another process is making it, or it cannot be written.
    """
    check()
    staging, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {out} cannot be written: {error.strerror}") from None
    lock = Lock(staging)
    try:
        for file in staging.iterdir():  # of a process that was killed
            if file.name != Lock.NAME:
                remove(file)
        yield staging, lock
        sync(staging)
        remove(old)
        try:
            os.rename(staging, out)  # also over an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ValueError(f"out: {out} cannot be written: {error.strerror}") from None
            check()
            theirs = Lock(out)
            try:
                os.rename(out, old)
                os.rename(staging, out)
            finally:
                theirs.release()
            remove(old)
        lock.moved(out)
        sync(out.resolve().parent)
    except BaseException:
        remove(staging)
        raise
    finally:
        lock.release()
