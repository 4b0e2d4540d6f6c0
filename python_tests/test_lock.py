"""One process at a time writes to a folder."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from klflow_ext.lock import Lock


def test_the_second_is_refused_and_told_by_whom(tmp_path):
    lock = Lock(tmp_path)
    owner = json.loads((tmp_path / "lock").read_text())
    assert owner["pid"] == os.getpid() and owner["host"] == socket.gethostname()
    said = f"{tmp_path}, which process {os.getpid()} on {socket.gethostname()}, since {owner['since']}, writes to"
    for _ in range(2):
        with pytest.raises(ValueError) as refused:
            Lock(tmp_path)
        assert said.replace("+", "+") in str(refused.value)
    lock.release()
    assert not (tmp_path / "lock").exists()
    Lock(tmp_path).release()


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tmp_path):
    program = (
        f"from klflow_ext.lock import Lock; from pathlib import Path; import time\nlock = Lock(Path({str(tmp_path)!r}))"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program + "\nprint('held', flush=True)\ntime.sleep(100)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} on"):
        Lock(tmp_path)
    holder.kill()
    holder.wait()
    assert (tmp_path / "lock").exists()
    lock = Lock(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.slow
def test_many_at_once_are_one_after_another(tmp_path):
    """The file is removed at each release; still no two hold it together."""
    program = f"""
from klflow_ext.lock import Lock
from pathlib import Path
import os, time
folder, held = Path({str(tmp_path)!r}), 0
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        lock = Lock(folder)
    except ValueError:
        continue
    os.mkdir(folder / "held")  # fails where another is within
    held += 1
    os.rmdir(folder / "held")
    lock.release()
print(held)
"""
    every = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    counts = [int(process.communicate()[0]) for process in every]
    assert sum(counts) > 50 and list(tmp_path.iterdir()) == []


def test_a_folder_that_has_gone_or_is_another(tmp_path):
    (tmp_path / "a").mkdir()
    lock = Lock(tmp_path / "a")
    assert lock.holds()
    os.rename(tmp_path / "a", tmp_path / "b")
    assert not lock.holds()
    lock.moved(tmp_path / "b")
    assert lock.holds()
    lock.release()
    (tmp_path / "a").mkdir()
    lock, other = Lock(tmp_path / "a"), Lock(tmp_path / "b")
    os.rename(tmp_path / "b" / "lock", tmp_path / "a" / "lock")
    lock.release()
    assert (tmp_path / "a" / "lock").exists()  # it is not its own
    other.release()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.warns(UserWarning, match="this file system has no locks .Operation not supported."):
        lock = Lock(tmp_path)
    assert lock.holds()
    lock.release()


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="gone/lock cannot be written: No such file or directory"):
        Lock(tmp_path / "gone")
    (tmp_path / "lock").mkdir()
    with pytest.raises(ValueError, match="lock cannot be written: Is a directory"):
        Lock(tmp_path)
