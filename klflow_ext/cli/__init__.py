"""The command line, whose commands are listed in klflow.py. It prints; the package does the work."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING

from klflow import main
from klflow_ext.cli.about import print_info
from klflow_ext.cli.terminal import VERBOSE, note, printable, speak, spoken
from klflow_ext.files import first_line

if TYPE_CHECKING:
    from klflow_ext.cli.command import Command

__all__ = ["main", "printable", "run"]


def run(words: list[str]) -> int | str | None:
    """Runs a command, whose name is words[0]; returns what `sys.exit` takes."""
    try:
        import tyro  # noqa: F401
    except ImportError:
        if words == ["info"]:
            print_info()
            return 0
        return "klflow: this command needs the train extra: pip install 'klflow_ext[train]' (klflow info does not)"
    from klflow_ext.train import Stopped

    for stream in (sys.stdout, sys.stderr):  # a console that is not UTF-8 shows escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    speak(1)
    try:
        command = parsed(words)
        speak(command.voice.level)
        command.run()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has gone, as head does; what is left would fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, ImportError, OSError) as error:
        return said(str(error))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise  # a mistake of the package
        return said(f"not enough memory: {first_line(error)}")
    except (KeyboardInterrupt, Stopped) as stop:
        print(f"klflow: stopped{'; ' * bool(str(stop))}{stop}", file=sys.stderr)
        return stop.code if isinstance(stop, Stopped) else 128 + signal.SIGINT
    return 0


def parsed(words: list[str]) -> Command:
    """The command that the words say, with its options."""
    from klflow_ext.cli.command import asked, command_of
    from klflow_ext.cli.options import with_config

    words = with_config(words)
    return asked(command_of(words[0]), f"klflow {words[0]}", words[1:])


def said(error: str) -> str:
    """The line of an error that is being handled."""
    if spoken() >= VERBOSE:
        note(traceback.format_exc().rstrip())
    return f"klflow: {printable(error)}"
