"""The log of a run: a line of JSON for each step, in the file as soon as it is written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from klflow_ext.files import reason, write_file

LONGEST = 2**16  # bytes of a line; what is longer is torn


class Log:
    """log.jsonl, to append steps to. A killed process loses no line of it; `sync` guards against the loss of power.

    Args:
        path: of the file.
        step: where the run stands. Lines of later steps, which will be made again, and torn ones are cut off first.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        try:
            if path.exists() and any(line is None for line in _lines(path, step)):
                write_file(path, lambda new: _copy(path, new, step))
            self._file = open(path, "ab", buffering=0)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {reason(error)}") from error

    def write(self, record: dict[str, Any]) -> None:
        """A line; numbers that are not finite, for which JSON has no word, are null."""
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        line = (json.dumps(known) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {reason(error)}") from error

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {reason(error)}") from error

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, in the order of their steps; torn lines are left out, as of a run that is being trained.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return [json.loads(line) for line in _lines(path, 2**63) if line is not None]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {reason(error)}") from error


def _lines(path: Path, step: int) -> Iterator[bytes | None]:
    """Each line that stays: a whole record of a later step than those before it, up to `step`; None for one that does not."""
    last = 0
    with open(path, "rb") as file:
        while line := file.readline(LONGEST):
            try:
                at = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError, RecursionError):
                at = None
            if isinstance(at, int) and last < at <= step and line.endswith(b"\n"):
                last = at
                yield line
            else:
                yield None


def _copy(path: Path, new: Path, step: int) -> None:
    with open(new, "wb") as file:
        file.writelines(line for line in _lines(path, step) if line is not None)
