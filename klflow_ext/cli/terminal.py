"""What passes between a terminal and the commands: texts and the name of a device."""

from __future__ import annotations

import os
import sys
import unicodedata

import torch

from klflow_ext.checks import check_device

QUIET, USUAL, VERBOSE = 0, 1, 2
_level = USUAL


def speak(level: int) -> None:
    """How much is said from now on: QUIET, USUAL or VERBOSE."""
    global _level
    _level = level


def spoken() -> int:
    return _level


def note(line: str, level: int = USUAL) -> None:
    """A line on stderr, where so much is said."""
    if _level >= level:
        print(printable(line), file=sys.stderr, flush=True)


def shows_progress() -> bool:
    """Whether a line on stderr tells how far the work is: in a terminal, and not where only results are wanted."""
    return _level >= USUAL and sys.stderr.isatty()


def printable(text: str) -> str:
    """Text for a terminal: control characters but line ends and tabs as escapes, so that they do nothing."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else repr(c)[1:-1] for c in text
    )


def given_text(name: str, text: str) -> str:
    """An argument of the command line as text: bytes of UTF-8, whatever encoding this terminal claims."""
    raw = text.encode("utf-8", "surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: got {raw!r}, allowed is UTF-8") from None


def choose_device(name: str | None) -> torch.device:
    """That of --device, or cuda where torch sees a GPU for which there are kernels, else cpu, with a word on why.

    Raises:
        ValueError: the device is not here, or there are no kernels for it.
    """
    if name is None:
        name = "cpu"
        if torch.cuda.is_available():
            try:
                check_device(torch.device("cuda"))
                name = "cuda"
            except ValueError as error:
                note(f"the CPU is used, not the GPU: {error}", QUIET)
    try:
        device = torch.device(name)
        if (
            device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ
        ):  # of torchrun: a GPU for each process
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        check_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # of torch
        raise ValueError(f"device: {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device
