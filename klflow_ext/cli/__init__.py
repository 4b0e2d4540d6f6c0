"""The command line, whose commands are listed in klflow.py. It prints; the package does the work."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

import klflow
from klflow_ext.cli.info import print_info
from klflow_ext.cli.terminal import printable

__all__ = ["main", "printable"]


def main() -> None:
    words = sys.argv[1:]
    code = klflow.answer(words)
    if code is not None:
        sys.exit(code)
    try:
        import tyro
    except ImportError:
        if words == ["info"]:
            print_info()
            sys.exit()
        sys.exit("klflow: this command needs the train extra: pip install 'klflow_ext[train]' (klflow info does not)")
    from klflow_ext.cli.options import with_config
    from klflow_ext.train import Stopped

    for stream in (sys.stdout, sys.stderr):  # a console that is not UTF-8 shows escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    module, name = klflow.COMMANDS[words[0]][0].split(":")
    try:
        words = with_config(words)
        command = getattr(import_module(f"klflow_ext.cli.{module}"), name)
        tyro.cli(command, prog=f"klflow {words[0]}", args=words[1:]).run()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has gone, as head does; what is left would fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except (ValueError, TypeError, ImportError, OSError) as error:
        sys.exit(f"klflow: {error}")
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise  # a mistake of the package
        sys.exit(f"klflow: not enough memory: {(str(error).splitlines() or [''])[0]}")
    except (KeyboardInterrupt, Stopped) as stop:
        print(f"klflow: stopped{'; ' * bool(str(stop))}{stop}", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, Stopped) else 128 + signal.SIGINT)
