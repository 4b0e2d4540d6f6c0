"""The command line: klflow info | demo | prepare | train | sample | complete | infill | watch | plot | eval. It prints; the package does the work."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

from klflow_ext.cli.info import print_info
from klflow_ext.cli.terminal import printable

__all__ = ["main", "printable"]


def main() -> None:
    try:
        import tyro
    except ImportError:
        if sys.argv[1:] == ["info"]:
            print_info()
            sys.exit()
        sys.exit("klflow: this command needs the train extra: pip install 'klflow_ext[train]' (klflow info does not)")
    from klflow_ext.cli.evaluate import Eval
    from klflow_ext.cli.generate import Complete, Infill, Sample
    from klflow_ext.cli.info import Info
    from klflow_ext.cli.options import with_config
    from klflow_ext.cli.plot import Plot
    from klflow_ext.cli.prepare import Prepare
    from klflow_ext.cli.train import Demo, Train
    from klflow_ext.cli.watch import Watch
    from klflow_ext.train import Stopped

    commands: dict[str, Callable[..., Any]] = {
        "info": Info,
        "demo": Demo,
        "prepare": Prepare,
        "train": Train,
        "sample": Sample,
        "complete": Complete,
        "infill": Infill,
        "watch": Watch,
        "plot": Plot,
        "eval": Eval,
    }
    for stream in (sys.stdout, sys.stderr):  # a console that is not UTF-8 shows escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        words = with_config(sys.argv[1:])
        tyro.extras.subcommand_cli_from_dict(commands, prog="klflow", args=words).run()
    except (ValueError, TypeError, ImportError, OSError) as error:
        sys.exit(f"klflow: {error}")
    except (KeyboardInterrupt, Stopped) as stop:
        print(f"klflow: stopped{'; ' * bool(str(stop))}{stop}", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, Stopped) else 128 + signal.SIGINT)
