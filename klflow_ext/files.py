"""Files that are written whole, have reached the disk when they are named, and are read with errors that name them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Writer = Callable[[Path], object]
TEMPORARY = ".tmp"  # ends the name of what is not whole yet
MOST_JSON = 2**24  # bytes of a file that is read as JSON


def sync(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk; where a file system cannot sync folders, without that."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(number)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a read-only or vanished folder, of which the caller's own error tells
        pass


def write_files(folder: Path, writers: dict[str, Writer]) -> None:
    """Writes each file under a temporary name and syncs it, then renames all: each is as it was before or whole.

    Raises:
        ValueError: one cannot be written. It is named, nothing temporary is left, and what was there before stays.
    """
    temporary = {name: folder / (name + TEMPORARY) for name in writers}
    with _writing(folder / next(iter(writers)), *temporary.values()) as now:
        for name, write in writers.items():
            now(folder / name)
            _write(temporary[name], write)
        for name in writers:
            os.replace(temporary[name], folder / name)
        sync(folder)


def write_file(path: Path, write: Writer) -> None:
    """One file, as `write_files` does it."""
    write_files(path.parent, {path.name: write})


def write_folder(path: Path, writers: dict[str, Writer]) -> None:
    """A new folder with these files, there whole or not at all: one rename gives it its name.

    A writer gets the path of its file, beside which those before it lie.

    Raises:
        ValueError: as `write_files` does.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with _writing(path, temporary) as now:
        remove(temporary)
        temporary.mkdir()
        for name, write in writers.items():
            now(path / name)
            _write(temporary / name, write)
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)


def _write(path: Path, write: Writer) -> None:
    mask = os.umask(0)
    os.umask(mask)
    write(path)
    os.chmod(path, 0o666 & ~mask)  # safetensors' files would be private
    sync(path)


@contextmanager
def _writing(path: Path, *temporary: Path) -> Iterator[Callable[[Path], None]]:
    """Makes one error of any failure, which names the path that was last told to what this gives."""
    at = [path]
    try:
        yield lambda path: at.__setitem__(0, path)
    except BaseException as error:  # each library has its own for a full disk
        for unfinished in temporary:
            remove(unfinished)
        if isinstance(error, Exception):
            raise ValueError(f"{at[0]} cannot be written: {reason(error)}") from error
        raise


def reason(error: BaseException) -> str:
    """What an error says, or the one that caused it, in one line."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return getattr(error, "strerror", None) or first_line(error)


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first line; of one that says nothing its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def checksum(path: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    sums = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            sums.update(part)
    return sums.hexdigest()


@contextmanager
def reading(path: Path, name: str = "run") -> Iterator[Path]:
    """Any failure to read a file, of a run folder where no other name is given, becomes a ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"{name}: {path.parent} is not whole: it has no {path.name}")
    try:
        yield path
    except Exception as error:  # each library has its own exceptions for a broken file
        raise ValueError(f"{name}: {path} cannot be read: {first_line(error)[:300]}") from error  # some quote the file


def read_json(path: Path, name: str = "run") -> dict[str, Any]:
    """The object that a file holds; name: of the argument that named it."""
    with reading(path, name):
        size = path.stat().st_size
        if size > MOST_JSON:
            raise ValueError(f"it has {size} bytes, allowed are {MOST_JSON}")
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, allowed is an object")
    return value
