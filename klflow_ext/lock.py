"""Who may write to a folder: one process at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path

from klflow_ext.files import reason, remove


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
