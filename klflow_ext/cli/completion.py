"""klflow completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from klflow_ext.cli.command import Command, asked, commands


@dataclass
class Completion(Command):
    """Print a script by which a shell completes commands and options. Of bash it belongs into
    ~/.local/share/bash-completion/completions/klflow, of zsh into a file _klflow in a folder of fpath. A new version of klflow needs a
    new one."""

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]

    def run(self):
        named = [Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, kind in commands()]
        every: Any = Union[tuple(named)]  # noqa: UP007
        asked(every, "klflow", ["--tyro-print-completion", self.shell])
