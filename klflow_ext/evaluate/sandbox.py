"""A Python program that nobody has read, run where it can harm nothing but its own score.

It has an interpreter of its own without site-packages, an empty folder, no environment, no stdin, and limits on time, memory,
files and output. Around it are up to three layers; at least one of the first two is there, or nothing is run:

    namespaces  no network but an empty one, all files read-only but a folder in memory, and a process 1 with which all end,
                wherever they moved; the number of processes is counted by it
    seccomp     no socket, one process (fork fails, as RLIMIT_NPROC does not hold for root), no memory outside its address space
    landlock    nothing is written outside the folder; where the kernel has it, with either

Without namespaces a program can still read what its user can, and fill the disk by many files until it is stopped. Linux only.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from klflow_ext.checks import check_int, check_scalar, fail

GUARD = Path(__file__).with_name("guard.py")
LAYERS = ("namespaces", "seccomp")
MOST_OUTPUT = 2**16  # bytes, of stdout and stderr together
MOST_DISK = 2**26  # bytes, of a file, and of all together with namespaces
MOST_PROCESSES = 8  # where seccomp does not refuse all but one
GRACE = 5.0  # seconds until the guard itself is killed


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    passed: it ran to its end, its tests too. reason: "passed", "timeout", "output", "processes", "exit", "signal SIGSEGV",
    or the class of its error. output: the first 64 KiB of stdout and stderr. network: what kept it off, "namespace" or
    "seccomp". processes: what kept their number down, "seccomp" or "counted".
    """

    passed: bool
    reason: str
    seconds: float
    output: str
    network: str
    processes: str


def run_program(
    source: str, *, timeout: float = 10.0, memory: int = 2**29, layers: tuple[str, ...] | None = None
) -> Outcome:
    """Runs a program to its end, its tests included, and says whether it got there.

    Args:
        timeout: seconds of the clock, with the start of two interpreters.
        memory: bytes of address space.
        layers: of LAYERS; None: those that this machine permits.

    Raises:
        ValueError: an argument is outside its range; the message names it.
        RuntimeError: the sandbox cannot be set up on this machine.
    """
    timeout = check_scalar("timeout", timeout, 0, 86400, "seconds in (0, 86400]", open_low=True)
    memory = check_int("memory", memory, 2**26, 2**50, "bytes in [2**26, 2**50]")
    layers = permitted_layers() if layers is None else tuple(layers)
    if not layers or not set(layers) <= set(LAYERS):
        fail(ValueError, "layers", layers, f"some of {LAYERS}")
    try:
        source.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair: no file of Python
        return Outcome(False, type(error).__name__, 0.0, "", *_kept_by(layers))
    return _run(source, timeout, memory, layers)


def _kept_by(layers: tuple[str, ...]) -> tuple[str, str]:
    return "namespace" if "namespaces" in layers else "seccomp", "seccomp" if "seccomp" in layers else "counted"


@cache
def permitted_layers() -> tuple[str, ...]:
    """The layers that this machine permits, tried once."""
    found, said = [], []
    for layer in LAYERS:
        try:
            if _run("pass", 20.0, 2**29, (layer,)).passed:
                found.append(layer)
        except RuntimeError as error:
            said.append(str(error))
    if not found:
        raise RuntimeError(f"sandbox: {platform.system()} permits none of {LAYERS}: {'; '.join(said)}")
    return tuple(found)


@contextmanager
def _folder() -> Iterator[str]:
    folder = tempfile.TemporaryDirectory(prefix="klflow-", ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        try:
            folder.cleanup()
        except RecursionError:  # folders in folders in folders
            subprocess.run(["rm", "-rf", "--", folder.name], stderr=subprocess.DEVNULL)


def _run(source: str, timeout: float, memory: int, layers: tuple[str, ...]) -> Outcome:
    token, start = secrets.token_hex(16), time.perf_counter()
    with _folder() as folder, tempfile.TemporaryFile() as program:
        program.write(f"{token}\n{source}".encode())
        program.seek(0)
        (output, output_end), (result, result_end) = os.pipe(), os.pipe()
        settings = {
            "folder": folder, "source": program.fileno(), "result": result_end, "timeout": timeout, "memory": memory,
            "disk": MOST_DISK, "processes": MOST_PROCESSES, "layers": layers,
        }  # fmt: skip
        try:
            guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=output_end,
                stderr=output_end,
                pass_fds=(program.fileno(), result_end),
                cwd="/",
                env={},
                start_new_session=True,
            )
        except BaseException:
            for number in (output, result):
                os.close(number)
            raise
        finally:
            for number in (output_end, result_end):
                os.close(number)
        try:
            stopped, printed, said = _watch(guard, output, result, start + timeout)
        finally:
            _stop(guard)
            os.close(output)
            os.close(result)
    seconds = time.perf_counter() - start
    if said.startswith(b"setup: "):
        raise RuntimeError(f"sandbox: {said[7:].decode(errors='replace')}")
    passed = not stopped and said == token.encode() and guard.returncode == 0
    reason = stopped or ("passed" if passed else _reason(guard.returncode, said))
    return Outcome(passed, reason, seconds, printed.decode(errors="replace"), *_kept_by(layers))


def _watch(guard: subprocess.Popen, output: int, result: int, deadline: float) -> tuple[str, bytes, bytes]:
    """Reads until the guard has ended, or until time or output are used up: (why it was stopped or "", output, result)."""
    read: dict[int, bytearray] = {output: bytearray(), result: bytearray()}
    end = os.pidfd_open(guard.pid)
    with selectors.DefaultSelector() as selector:
        for number in (output, result, end):
            selector.register(number, selectors.EVENT_READ)
        stopped, ended = "", False
        try:
            while not stopped:
                # When the guard has ended, what still stands in the pipes is read, and nothing is waited for.
                left = 0.0 if ended else deadline - time.perf_counter()
                if left < 0:
                    stopped = "timeout"
                    break
                ready = [key.fd for key, _ in selector.select(left)]
                for number in ready:
                    if number == end:
                        ended = True
                        selector.unregister(end)
                        continue
                    if not (part := os.read(number, 2**14)):
                        selector.unregister(number)
                    read[number] += part
                if len(read[output]) > MOST_OUTPUT or len(read[result]) > 1000:
                    stopped = "output"
                if ended and not ready:
                    break
        finally:
            os.close(end)
    return stopped, bytes(read[output][:MOST_OUTPUT]), bytes(read[result])


def _stop(guard: subprocess.Popen) -> None:
    """Ends the guard and with it all that it started, and waits until they are gone."""
    guard.terminate()  # it kills its child and waits, which of a namespace means for all that is in there
    try:
        guard.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


def _reason(status: int, said: bytes) -> str:
    if status == 126:
        return "processes"
    if status > 128:
        try:
            return f"signal {signal.Signals(status - 128).name}"
        except ValueError:  # a program may end with any number
            return "exit"
    name = said.decode(errors="replace")
    return name if status == 1 and name.isidentifier() else "exit"
