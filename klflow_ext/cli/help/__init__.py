"""The help of each command as a file, which klflow.py prints at once: `python -m klflow_ext.cli.help` writes all of them anew."""

from __future__ import annotations

import contextlib
import io
import os
from functools import partial
from pathlib import Path
from unittest import mock

from klflow_ext.cli.command import asked, commands
from klflow_ext.files import write_file

COLUMNS = 80  # in a narrower terminal tyro writes it, after a second or more


def helps() -> dict[str, str]:
    """What tyro says of each command, without colours."""
    found = {}
    with mock.patch.dict(os.environ, {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}):
        for name, kind in commands():
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
                asked(kind, f"klflow {name}", ["--help"])
            found[name] = "\n".join(line.rstrip() for line in said.getvalue().strip().splitlines()) + "\n"
    return found


def write() -> None:
    """Writes them beside this file."""
    for name, text in helps().items():
        write_file(Path(__file__).with_name(f"{name}.txt"), partial(Path.write_text, data=text, encoding="utf-8"))
