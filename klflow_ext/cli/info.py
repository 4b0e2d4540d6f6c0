"""klflow info."""

from __future__ import annotations

from dataclasses import dataclass

from klflow_ext.cli.about import print_info
from klflow_ext.cli.command import Command


@dataclass
class Info(Command):
    """Print torch, the compiled CUDA architectures, the CPU instruction set in use, and what falls back and why."""

    def run(self):
        print_info()
