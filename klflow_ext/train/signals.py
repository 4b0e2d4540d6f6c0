"""Signals that end training after the step, so that it is saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class Stopped(SystemExit):
    """Training was ended by a signal; its text says what is kept. Nobody catching it, the process ends with 128 + `signal`."""

    def __init__(self, number: int, text: str):
        super().__init__(128 + number)
        self.signal, self.text = number, text

    def __str__(self) -> str:
        return self.text


def stopped(number: int, text: str) -> BaseException:
    """What is raised after a signal: KeyboardInterrupt for SIGINT, else Stopped."""
    return KeyboardInterrupt(text) if number == signal.SIGINT else Stopped(number, text)


class Signals:
    """Notes, within its block, the first of some signals, of NAMES where none is named. A second one does what it did before: by default, it ends the
    process at once.

    A signal that is ignored (nohup, a background job) stays ignored, and one that the program handles itself stays its own.
    Only the main thread can handle signals; in another one nothing is noted.

    Attributes:
        number: of the signal; 0: none came. at: when, by time.monotonic().
    """

    TWICE = 1.0  # seconds in which a second SIGHUP is the first: a closing terminal and its shell both send one

    def __init__(self, *names: str) -> None:
        self.names = names or NAMES
        self.number, self.at = 0, 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in self.names:
                number = getattr(signal, name)
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._put_back(*self._before)

    def _put_back(self, *numbers: int) -> None:
        for number in numbers:
            signal.signal(number, self._before.pop(number))  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self.at = number, now
            # Now, not when the second one comes: it then ends even a process that hangs outside of Python.
            self._put_back(*(other for other in self._before if not other == number == signal.SIGHUP))
        elif now - self.at > self.TWICE:
            self._put_back(number)
            os.kill(os.getpid(), number)
